"""Hand a generate job to a cluster: `depthvar submit --address http://HEAD:8265 --out URI`.

Takes the flags of `depthvar generate` and checks them before anything is sent. The same command
joins the job while it runs, and goes on with its dataset afterwards.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from depthvar.paths import checked_as_submitted
from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import load_config
from pipeline.request.generation import SubmitConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the job, 0 without waiting for it under `--no-follow`."""
    with checked_as_submitted():
        config = load_config(SubmitConfig, argv, prog="depthvar submit", description=__doc__ or "")
    from pipeline.request.job import check_before_submission
    from pipeline.run.address import dashboard_url
    from pipeline.run.submission import follow, submit

    check_before_submission(config)
    job = submit(config, dashboard_url(config.address, os.environ))
    if not config.follow:
        return EXIT_DONE
    try:
        return follow(job)
    except KeyboardInterrupt:
        print(
            f"the job {job.id} goes on: the same command follows it, `{job.stop_command}` ends it"
        )
        return 128 + signal.SIGINT


if __name__ == "__main__":
    run_job(main)
