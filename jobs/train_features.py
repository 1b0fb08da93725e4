"""Train the feature network of the digits again, as the shipped one was: see depthvar evaluate."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import Field
from tqdm import tqdm

from depthvar.errors import naming
from depthvar.paths import check_output_file
from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import JobConfig, load_config
from pipeline.request.paths import LocalPath


class TrainFeaturesConfig(JobConfig):
    """What `depthvar train-features` can be told."""

    out: LocalPath = Field(description="new .safetensors file")
    threads: int = Field(1, gt=0, description="CPU threads; another number may change the last bit")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file and print what the network reads right; exit code 0."""
    config = load_config(
        TrainFeaturesConfig, argv, prog="depthvar train-features", description=__doc__ or ""
    )
    check_output_file(config.out, "--out", is_new=True)
    import torch

    from pipeline.research.quality.features import (
        ClassifierRecipe,
        accuracy,
        digit_arrays,
        to_safetensors,
        train_features,
    )

    torch.set_num_threads(config.threads)
    with tqdm(total=ClassifierRecipe().steps, unit="step", desc="train", file=sys.stderr) as bar:
        model = train_features("digits", bar.update)
    with naming(config.out):
        config.out.write_bytes(to_safetensors(model))
    print(
        f"{config.out}: reads {accuracy(model, *digit_arrays('held-out')):.1%} of held-out digits"
    )
    return EXIT_DONE


if __name__ == "__main__":
    run_job(main)
