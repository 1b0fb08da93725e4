"""Kills and waits at the fault points of the pipeline, told by files.

Imported while `pipeline` is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

FAULTS_VARIABLE = "FAKE_SAMPLER_FAULTS"  # names a JSON file, see `tests.fakes`
FAULT_HOOK = "tests.fault_hook:reach_point"  # for DEPTHVAR_FAULT
WHOEVER = "whoever"  # gets there
ITS_NODE = "node"  # of a Ray worker: its raylet, and itself


def arm(folder: Path, point: str, passes: int = 0, victim: str = WHOEVER) -> None:
    """Kill at a fault point after `passes` passages: `WHOEVER`, `ITS_NODE`, or a process id.

    Each passage and the kill itself use up a file, so that all processes together count.
    """
    for number in range(passes):
        (folder / f"pass-{point}-{number}").touch()
    (folder / f"kill-{point}-{victim}").touch()


def hold(folder: Path, point: str) -> Path:
    """Have everything wait at a fault point for as long as the file that comes back exists."""
    file = folder / f"hold-{point}"
    file.touch()
    return file


def armed(folder: Path) -> list[str]:
    """The kills that have not happened yet."""
    return sorted(f.name for f in folder.glob("kill-*"))


def disarm(folder: Path) -> None:
    """Take back the passages and kills that are left."""
    for file in [*folder.glob("kill-*"), *folder.glob("pass-*")]:
        file.unlink(missing_ok=True)


def reach_point(point: str) -> None:
    folder = Path(os.environ[FAULTS_VARIABLE]).parent
    for file in sorted(folder.glob(f"pass-{point}-*")):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            return
    for file in folder.glob(f"kill-{point}-*"):
        doomed = victims(file.name.rpartition("-")[2])
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
            for pid in doomed:
                os.kill(pid, signal.SIGKILL)
    while (folder / f"hold-{point}").exists():
        time.sleep(0.05)


def victims(name: str) -> list[int]:
    if name == ITS_NODE:
        raylet = os.getppid()
        assert Path(f"/proc/{raylet}/comm").read_text().strip() == "raylet"
        return [raylet, os.getpid()]
    return [os.getpid() if name == WHOEVER else int(name)]
