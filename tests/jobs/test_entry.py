"""Signals to jobs that have nothing to put in order."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.killed_jobs import has_ended

ROOT = Path(__file__).parents[2]
JOB = """
import multiprocessing, signal, sys, time
from pathlib import Path
from jobs._entry import run_job

def sleep(lost):
    def lose(number, frame):
        signal.signal(number, signal.SIG_IGN if lost > 1 else signal.SIG_DFL)

    if lost:
        signal.signal(signal.SIGTERM, lose)
    ready.set()
    time.sleep(600)

def main():
    child = multiprocessing.get_context("fork").Process(target=sleep, args=(int(sys.argv[2]),))
    child.start()
    ready.wait()
    try:
        print(child.pid, flush=True)
        time.sleep(float(sys.argv[1]))
        child.terminate()
    finally:
        print("put away", flush=True)
    return 0

ready = multiprocessing.get_context("fork").Event()
run_job(main)
"""


def start(shell: str = "", seconds: int = 600, lost: int = 0) -> subprocess.Popen[str]:
    """The job above, whose process loses some signals, started by a shell after some commands."""
    return subprocess.Popen(
        ["sh", "-c", f'{shell} exec "$0" -c "$1" {seconds} {lost}', sys.executable, JOB],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "lost"),
    [(signal.SIGINT, 0), (signal.SIGTERM, 1), (signal.SIGHUP, 2)],
    ids=["hears the first", "hears the second", "hears none"],
)
def test_a_signal_ends_a_job_and_its_processes_in_order_with_the_code_of_the_signal(
    number: signal.Signals, lost: int
):
    job = start(lost=lost)
    assert job.stdout is not None
    child = int(job.stdout.readline())
    job.send_signal(number)
    shown, said = job.communicate(timeout=120)
    assert job.returncode == 128 + number
    assert shown == "put away\n"
    assert said == "stopped\n"
    deadline_s = time.monotonic() + 60
    while not has_ended(child):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_under_nohup_a_lost_terminal_ends_nothing():
    job = start('trap "" HUP;', seconds=1)
    assert job.stdout is not None
    job.stdout.readline()
    job.send_signal(signal.SIGHUP)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 0
    assert said == ""
