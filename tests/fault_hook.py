"""Kills at the fault points of the pipeline, told by files. Imported while `pipeline` is."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

FAULTS_VARIABLE = "FAKE_SAMPLER_FAULTS"  # names a JSON file, see `tests.fakes`
FAULT_HOOK = "tests.fault_hook:reach_point"  # for DEPTHVAR_FAULT


def arm(folder: Path, point: str, passes: int = 0, victim: int = 0) -> None:
    """Kill at a fault point: after `passes` passages, process `victim` (0: whoever gets there).

    Each passage and the kill itself use up a file, so that all processes together count.
    """
    for number in range(passes):
        (folder / f"pass-{point}-{number}").touch()
    (folder / f"kill-{point}-{victim}").touch()


def armed(folder: Path) -> list[str]:
    """The kills that have not happened yet."""
    return sorted(f.name for f in folder.glob("kill-*"))


def reach_point(point: str) -> None:
    folder = Path(os.environ[FAULTS_VARIABLE]).parent
    for file in sorted(folder.glob(f"pass-{point}-*")):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            return
    for file in folder.glob(f"kill-{point}-*"):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            os.kill(int(file.name.rpartition("-")[2]) or os.getpid(), signal.SIGKILL)
