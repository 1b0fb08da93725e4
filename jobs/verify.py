"""Check a dataset against its plan: `python -m jobs.verify DIR [--deep]`. Changes nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from depthvar.errors import InputError
from jobs._entry import EXIT_DONE, EXIT_INCOMPLETE, run_job
from pipeline.config import VerifyConfig, load_config
from pipeline.manifest import shard_name
from pipeline.plan import read_plan
from pipeline.schedule import available_cores
from pipeline.storage import Storage
from pipeline.verify import Report, verify


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 for a sound and complete dataset, 1 with one line per problem."""
    config = load_config(
        VerifyConfig, argv, prog="python -m jobs.verify", description=__doc__ or ""
    )
    storage = Storage.open(config.out)
    plan = read_plan(storage)
    if plan is None:
        raise InputError(f"got {storage}, which is empty, wanted a dataset: generate one first")
    with tqdm(total=plan.num_shards, unit="shard", desc="verify", file=sys.stderr) as bar:
        report = verify(storage, plan, config.deep, bar.update, threads=available_cores())
    print(report_text(report, str(storage)))
    return EXIT_DONE if report.is_sound else EXIT_INCOMPLETE


def report_text(report: Report, where: str) -> str:
    """One line per problem, then the verdict and what to do."""
    lines = [
        f"{'-' if p.shard is None else shard_name(p.shard)}  {p.kind}: {p.message}"
        for p in report.problems
    ]
    depth = "hashes, contents and labels" if report.is_deep else "records and sizes"
    lines.append(
        f"{where}: {report.num_sound:,} of {report.num_shards:,} shards sound"
        f" ({report.num_samples:,} images), {len(report.problems)} problems; checked {depth}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main)
