"""Copy a dataset into another format: `depthvar export DIR --format adm-npz --out FILE.npz`.

adm-npz is the sample file of OpenAI's evaluator; png-folder is OUT/{class name}/{key}.png, with
`%2F` and the like for what no folder can be called (`/`, a dot in front, a space at the end). Where
images have prompts, OUT/metadata.jsonl holds them; without classes all files are in OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from tqdm import tqdm

from depthvar.errors import InputError
from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import JobConfig, Positional, load_config
from pipeline.request.paths import LocalPath, Location


class ExportConfig(JobConfig):
    """What `depthvar export` can be told."""

    dataset: Annotated[Location, Positional()] = Field(description="dataset to copy")
    format: Literal["adm-npz", "png-folder"] = Field(description="what to write")
    out: LocalPath = Field(description="new file (adm-npz) or new folder (png-folder)")
    flat: bool = Field(False, description="png-folder: all files in one folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the copy and print its size; exit code 0."""
    config = load_config(ExportConfig, argv, prog="depthvar export", description=__doc__ or "")
    if config.flat and config.format != "png-folder":
        raise InputError("got --flat with adm-npz, wanted it with png-folder alone: leave it out")
    from pipeline.dataset.export import export_adm_npz, export_png_folder
    from pipeline.dataset.loader import open_dataset
    from pipeline.shards.samples import ShardError

    dataset = open_dataset(config.dataset)
    count, planned = dataset.num_samples, dataset.plan.num_samples
    try:
        with tqdm(total=count, unit="image", desc="export", file=sys.stderr) as bar:
            if config.format == "adm-npz":
                export_adm_npz(dataset, config.out, bar.update)
            else:
                export_png_folder(dataset, config.out, bar.update, flat=config.flat)
    except ShardError as error:
        raise InputError(str(error)) from error
    print(f"{config.out}: {count:,} images of {dataset.storage} as {config.format}")
    if count < planned:
        print(f"note: not finished: {count:,} of {planned:,} planned images are committed")
    return EXIT_DONE


if __name__ == "__main__":
    run_job(main)
