"""Make a labelled image dataset or resume it: `depthvar generate --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence

from jobs._entry import run_job
from pipeline.request.flags import load_config
from pipeline.request.generation import GenerateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if every planned shard is committed, 1 if some are missing."""
    config = load_config(GenerateConfig, argv, prog="depthvar generate", description=__doc__ or "")
    from pipeline.run.driver import generate

    return generate(config)


if __name__ == "__main__":
    run_job(main)
