"""Fake jobs as processes of their own, forked from one that has imported all that they need.

A fresh process takes two seconds for its imports, of which nothing is tested.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.fakes import STAND_INS, without_torch

_JOBS = multiprocessing.get_context("forkserver")
_JOBS.set_forkserver_preload(["tests.preloaded"])


class ForkedJob:
    """`python -m tests.fake_job` in a session of its own; what it prints is added to a file.

    Its environment is that of the test with changes. Codes, waits and signals as in `subprocess`.
    """

    def __init__(
        self, argv: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        log.touch()
        given = {**os.environ, "PYTHONPATH": without_torch(), **(environment or {})}
        self._process: BaseProcess = _JOBS.Process(target=_run, args=(list(argv), log, given))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code once it has ended; minus the signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float = 150) -> int:
        """The same, in at most so many seconds."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(argv: list[str], log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(STAND_INS))
    sys.argv = ["fake_job", *argv]

    from jobs._entry import run_job
    from tests import fake_job

    run_job(fake_job.main)
