"""Jobs in processes of their own whose readers go away: the work ends complete, with its code."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import without_torch

ROOT = Path(__file__).parents[3]
CODE = 7
JOB = f"""
import os, sys, time
from pathlib import Path
from tqdm import tqdm
from jobs._entry import run_job

def main():
    print("first", flush=True)
    print("first", flush=True, file=sys.stderr)
    out = Path(sys.argv[1])
    while not (out / "gone").exists():
        time.sleep(0.01)
    held = open(out / "opened-next", "w")
    with tqdm(total=300, mininterval=0, file=sys.stderr) as bar:
        for number in range(300):
            print("line", number, "caf\\u00e9" * 99)
            bar.update()
    os.write(2, b"from C")
    os.system("echo from a child; echo from a child >&2")
    sys.stderr.write("not ended")
    (out / "done").touch()
    return {CODE}

run_job(main)
"""


def start(out: Path, redirection: str = "", **streams: object) -> subprocess.Popen[bytes]:
    """The job above, with a shell's redirections; it goes on once `out / "gone"` exists."""
    return subprocess.Popen(
        ["sh", "-c", f'exec "$0" -c "$1" "$2" {redirection}', sys.executable, JOB, str(out)],
        cwd=ROOT,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},  # type: ignore[call-overload]
    )


def assert_done(job: subprocess.Popen[bytes], out: Path) -> None:
    assert job.wait(timeout=60) == CODE
    assert (out / "done").exists()
    assert (out / "opened-next").read_bytes() == b"", "no stream got the number of a file"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_job_outlives_the_reader_of_its_output(stream: str, tmp_path: Path):
    """As in `job | head -1`."""
    job = start(tmp_path)
    read = {"stdout": job.stdout, "stderr": job.stderr}
    reader = read.pop(stream)
    assert reader is not None
    assert reader.readline() == b"first\n"
    reader.close()
    (tmp_path / "gone").touch()
    (other,) = read.values()
    assert other is not None
    text = other.read().decode()
    assert_done(job, tmp_path)
    assert "Traceback" not in text
    assert "Exception ignored" not in text
    assert "300" in text or "line 299" in text, "the other stream has all of it"
    other.close()


@pytest.mark.parametrize(
    "redirection", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1"]
)
def test_a_job_outlives_closed_streams_and_full_disks(redirection: str, tmp_path: Path):
    (tmp_path / "gone").touch()
    job = start(tmp_path, redirection)
    _, text = job.communicate(timeout=60)
    assert_done(job, tmp_path)
    assert b"Traceback" not in text
    assert b"Exception ignored" not in text
    if redirection == ">/dev/full":
        assert b"the output cannot be written (No space left on device)" in text


def test_a_job_outlives_its_terminal(tmp_path: Path):
    ours, theirs = pty.openpty()
    job = start(tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 5) == b"first"
    os.close(ours)
    (tmp_path / "gone").touch()
    assert_done(job, tmp_path)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_an_unbuffered_job_says_a_line_when_it_is_printed(stream: str):
    """As Ray starts the drivers of its jobs."""
    program = f"""
import os, sys
from depthvar.host.streams import outlive_readers
outlive_readers()
print("first", file=sys.{stream})
os.write({1 if stream == "stdout" else 2}, b"second")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        check=True,
    )
    assert getattr(done, stream) == b"first\nsecond"


def test_what_the_encoding_lacks_is_escaped(tmp_path: Path):
    (tmp_path / "gone").touch()
    job = start(tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    shown, _ = job.communicate(timeout=60)
    assert_done(job, tmp_path)
    assert rb"line 0 caf\xe9" in shown


def test_generate_ends_complete_without_anyone_to_print_to(tmp_path: Path):
    out = tmp_path / "out"
    words = f"--out={out} --per-class=2 --samples-per-shard=8 --workers=0 --device=cpu"
    command = f'"$0" -m tests.fake_job {words} 2>&- | head -c 1; test "${{PIPESTATUS[0]}}" = 0'
    environment = {**os.environ, "PYTHONPATH": without_torch()}
    done = subprocess.run(
        ["bash", "-c", command, sys.executable], cwd=ROOT, env=environment, timeout=120
    )
    assert done.returncode == 0
    assert (out / "index.json").exists()
    assert len(list(out.glob("commits/0*.json"))) == 3
