"""`python -m tests.fake_submit FLAGS`: `jobs.submit` of a job with the fake sampler."""

from __future__ import annotations

from unittest import mock

from jobs import submit
from jobs._entry import run_job
from pipeline.run import submission


def main() -> int:
    command = submission._COMMAND.replace("jobs.generate", "tests.fake_job")
    with mock.patch("pipeline.run.submission._COMMAND", command):
        return submit.main()


if __name__ == "__main__":
    run_job(main)
