"""Show a dataset on one page: `depthvar report DIR` writes `DIR/report.html`.

The file needs no network and no other file. A dataset that is being made is shown as far as it is;
of a large one a few shards are read, which the page says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from depthvar.paths import check_output_file
from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import JobConfig, Positional, load_config
from pipeline.request.paths import LocalPath, Location

REPORT_NAME = "report.html"


class ReportConfig(JobConfig):
    """What `depthvar report` can be told."""

    dataset: Annotated[Location, Positional()] = Field(description="dataset to show")
    out: LocalPath | None = Field(
        None, description=f"HTML file to write (default: {REPORT_NAME} in the dataset)"
    )
    per_class: int = Field(8, gt=0, description="images shown of each class")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and say where; exit code 0, also where it shows problems."""
    config = load_config(ReportConfig, argv, prog="depthvar report", description=__doc__ or "")
    if config.out is not None:
        check_output_file(config.out, "--out")
    from pipeline.dataset.report.page import render
    from pipeline.dataset.report.survey import survey
    from pipeline.request.plan_file import stored_plan
    from pipeline.storage import Storage

    storage = Storage.open(config.dataset)
    plan = stored_plan(storage)
    if config.out is None:
        storage.check_writable()
    found = survey(storage, plan, config.per_class)
    page = render(found)
    if config.out is None:
        storage.publish_bytes(page, REPORT_NAME)
    else:
        Storage.open(config.out.resolve().parent).publish_bytes(page, config.out.name)
    print(
        f"report    {config.out or f'{storage}/{REPORT_NAME}'}: {found.num_samples:,} of"
        f" {plan.num_samples:,} images committed, {len(found.problems)} problems"
    )
    return EXIT_DONE


if __name__ == "__main__":
    run_job(main)
