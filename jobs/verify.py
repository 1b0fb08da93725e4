"""Check a dataset against its plan: `depthvar verify DIR [--deep]`.

Changes nothing, unless `--repair` is given: it takes back the shards that are damaged, and the
generate command of the dataset makes them again.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from tqdm import tqdm

from jobs._entry import EXIT_DONE, EXIT_INCOMPLETE, run_job
from pipeline.dataset.repair import Repair, repair
from pipeline.dataset.verify import Report, verify
from pipeline.request.flags import JobConfig, Positional, load_config
from pipeline.request.generation import Device
from pipeline.request.job_plan import JobPlan
from pipeline.request.paths import Location, Weights
from pipeline.request.plan_file import stored_plan
from pipeline.run.console import mixture_lines, ranges
from pipeline.run.schedule import available_cores
from pipeline.shards.manifest import shard_name
from pipeline.shards.samples import ShardError
from pipeline.storage import Storage

if TYPE_CHECKING:
    from pipeline.run.regenerate import Comparison

_SHOWN = 10  # images that differ, one line each
_SHALLOW = "records and sizes only, add --deep to read every byte"


class VerifyConfig(JobConfig):
    """What `depthvar verify` can be told."""

    out: Annotated[Location, Positional()] = Field(description="dataset to check")
    deep: bool = Field(
        False, description="also hash every file, read every tar and compare it with its Parquet"
    )
    repair: bool = Field(
        False, description="unmark the shards found bad, so that generate makes them again"
    )
    regenerate: int = Field(
        0, ge=0, description="images to sample again and to compare pixel for pixel, 0 for none"
    )
    weights: Weights | None = Field(
        None, description="weights file or folder for --regenerate (default: the model's own)"
    )
    device: Device = Field("auto", description="where --regenerate runs")


def main(argv: Sequence[str] | None = None, *, sampler_factory: str | None = None) -> int:
    """Exit code 0 for a sound and complete dataset, 1 with one line per problem.

    Images that come out otherwise under `--regenerate` are a problem only where nothing in the
    environment differs. `sampler_factory` as of `Workplace`.
    """
    config = load_config(VerifyConfig, argv, prog="depthvar verify", description=__doc__ or "")
    storage = Storage.open(config.out)
    plan = stored_plan(storage)
    with tqdm(total=plan.num_shards, unit="shard", desc="verify", file=sys.stderr) as bar:
        report = verify(storage, plan, config.deep, bar.update, threads=available_cores())
    print(report_text(report, str(storage)))
    is_sound = report.is_sound
    if config.regenerate:
        try:
            compared = _regenerated(config, storage, plan, report, sampler_factory)
        except ShardError as error:
            print(f"cannot regenerate: {error}")
            is_sound = False
        else:
            print(comparison_text(compared))
            is_sound = is_sound and all(c.is_exact or c.differs for c in compared)
    if config.repair:
        print(repair_text(repair(storage, plan, report)))
    if steps := next_steps(report, str(storage), is_repaired=config.repair):
        print("\n".join(steps))
    return EXIT_DONE if is_sound else EXIT_INCOMPLETE


def _regenerated(
    config: VerifyConfig,
    storage: Storage,
    plan: JobPlan,
    report: Report,
    sampler_factory: str | None,
) -> list[Comparison]:
    from pipeline.run.regenerate import regenerate
    from pipeline.run.worker import LOAD_SAMPLER

    bad = set(report.shards_to_make)
    records = {i: r for i, r in report.records.items() if i not in bad}
    num_images = min(config.regenerate, sum(record.num_samples for record in records.values()))
    with tqdm(total=num_images, unit="image", desc="regenerate", file=sys.stderr) as bar:
        return regenerate(
            storage,
            plan,
            records,
            num_images,
            weights=config.weights,
            device=config.device,
            sampler_factory=sampler_factory or LOAD_SAMPLER,
            progress=bar.update,
        )


def report_text(report: Report, where: str) -> str:
    """One line per problem and note, how far the job is, then the verdict."""
    lines = [
        f"{'-' if p.shard is None else shard_name(p.shard)}  {p.kind}: {p.message}"
        for p in report.problems
    ]
    notes = [
        *report.notes,
        *(f"made with {line}" for line in mixture_lines(report.records.values())),
    ]
    lines += [f"note: {note}" for note in notes]
    if report.not_made:
        done, planned = len(report.records), report.num_shards
        lines.append(
            f"{where}: {done:,} of {planned:,} shards committed ({100 * done // planned}%),"
            f" {len(report.not_made):,} not made yet ({ranges(report.not_made)}):"
            " run the generate command to go on"
        )
    depth = "hashes, contents and labels" if report.is_deep else _SHALLOW
    lines.append(
        f"{where}: {report.num_sound:,} of {report.num_shards:,} shards sound"
        f" ({report.num_samples:,} images), {len(report.problems)} problems; checked {depth}"
    )
    return "\n".join(lines)


def comparison_text(compared: Sequence[Comparison]) -> str:
    """How many images came out the same, which did not, and what differs in the environment."""
    other = [c for c in compared if not c.is_exact]
    lines = [
        f"{shard_name(c.shard_id)}  regenerate: {c.key} differs by up to {c.largest_difference}"
        for c in other[:_SHOWN]
    ]
    lines.append(f"regenerated {len(compared):,} images: {len(compared) - len(other):,} exact")
    if other:
        lines[-1] += f", largest difference {max(c.largest_difference for c in other)} of 255"
        reasons = Counter(line for c in other for line in c.differs)
        lines += [f"environment  {line}" for line in sorted(reasons)]
        if not reasons:
            lines.append("environment  nothing that was recorded differs")
    return "\n".join(lines)


def repair_text(done: Repair) -> str:
    """What was put right."""
    lines = [f"removed {done.num_swept:,} leftovers of killed runs"]
    if done.unmarked:
        lines.append(f"unmarked the shards {ranges(done.unmarked)}")
    return "\n".join(lines)


def next_steps(report: Report, where: str, *, is_repaired: bool) -> list[str]:
    """What to run now, so that nothing is left to be found; what `report_text` told is left out."""
    steps, now = [], "now"
    if not is_repaired and any(problem.is_hidden for problem in report.problems):
        now = "then"
        steps.append(
            f"first run `depthvar verify {where} --deep --repair`: records and sizes of"
            " damaged shards are right, so generate alone takes them for done"
        )
    if any(problem.shard is not None for problem in report.problems):
        steps.append(f"{now} run the generate command of this dataset: it makes these shards again")
    elif any(problem.kind == "index" for problem in report.problems):
        steps.append(f"{now} run the generate command of this dataset: it writes the indexes again")
    if any(problem.kind == "stray" for problem in report.problems):
        steps.append("files that are not part of the dataset stay: remove them by hand")
    return steps


if __name__ == "__main__":
    run_job(main)
