"""Compare depth policies: `depthvar study --config jobs/study.yaml`; rerun to resume.

Writes results.parquet, table.md and plots into the study's folder.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import load_config
from pipeline.research.study.protocol import StudyConfig, resolve_study


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all of the study is done and reported."""
    config = load_config(StudyConfig, argv, prog="depthvar study", description=__doc__ or "")
    study = resolve_study(config)
    from pipeline.research.study.report import write_report
    from pipeline.research.study.work import run_study

    run_study(study)
    for name in write_report(study):
        print(f"wrote {study.storage}/{name}")
    return EXIT_DONE


if __name__ == "__main__":
    run_job(main)
