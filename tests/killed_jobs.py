"""A job killed in the middle, and the processes that it had started."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for init to take note of its end."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] == "Z"


def assert_no_process_outlives(command: Sequence[str], *, of: int) -> None:
    """Run `python -m command`, kill it once it has done some of its `of` steps, look for orphans.

    SIGINT is ignored, as in what a shell script starts with `&`.
    """
    job = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$0" "$@"', sys.executable, "-m", *command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    assert job.stderr is not None
    shown = b""
    while not re.search(rb" [1-9]\d*/%d" % of, shown):  # a bar shows some of the steps alone
        shown += job.stderr.read1()
        assert job.poll() is None, shown.decode()
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
    pids = [int(pid) for pid in children.stdout.split()]
    assert len(pids) >= 2
    job.kill()
    job.wait()
    deadline_s = time.monotonic() + 120
    while not all(map(has_ended, pids)):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
