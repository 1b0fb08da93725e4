"""Write a model's weights as half-precision safetensors: smaller, and mapped instead of read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from depthvar.paths import check_output_folder
from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import JobConfig, load_config
from pipeline.request.paths import LocalPath, ModelName, Weights
from pipeline.request.weights import fetch_model


class ConvertConfig(JobConfig):
    """What `depthvar convert-weights` can be told."""

    model: ModelName = Field(description="model that the weights belong to")
    weights: Weights | None = Field(
        None,
        description="folder, file, URI or Hugging Face repository (default: the model's own)",
    )
    out: LocalPath = Field(description="new folder for the converted weights")
    precision: Literal["float16", "bfloat16"] = Field(
        "float16", description="number type of the files; what runs in float32 stays float32"
    )
    keep_encoder: bool = Field(
        False,
        description="keep the tokenizer's encoder, which training from it and depthvar study use"
        " and sampling does not",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder and print the sizes before and after."""
    job = load_config(
        ConvertConfig, argv, prog="depthvar convert-weights", description=__doc__ or ""
    )
    check_output_folder(job.out, f"--out {job.out}")
    import torch

    from depthvar.weights.checkpoint import convert_weights

    source = fetch_model(job.model, job.weights)
    written = convert_weights(
        source,
        job.out,
        dtype=getattr(torch, job.precision),
        with_encoder=job.keep_encoder,
    )
    for note in source.notes:
        print(f"note: {note}")
    for part in ("transformer", "tokenizer"):
        before, after = getattr(source, part), getattr(written, part)
        print(f"{part}: {_megabytes(before)} ({before.name}) -> {_megabytes(after)} ({after.name})")
    print(f"sample from it with --model {job.out}")
    return EXIT_DONE


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_job(main)
