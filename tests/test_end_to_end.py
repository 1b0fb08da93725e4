"""The whole job as a user runs it: killed, stopped, resumed, and read by standard readers."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.dataset
import pytest
import webdataset
from PIL import Image

from jobs import generate
from tests import fake_job
from tests.fake_shards import data_files
from tests.fakes import FAULTS_VARIABLE, open_gate, set_faults, wait_at_gate
from tests.forked_job import ForkedJob
from tests.random_weights import write_random_weights

ROOT = Path(__file__).parent.parent
NUM_SHARDS = 6  # of 10 images, 6 of each class
# The first shards come at once and the others take 5 s each: whoever waits for the first is in
# time to disturb the others, also on a busy machine.
SLOW_BATCH_S = 1.0
FLAGS = "--per-class 6 --samples-per-shard 10 --batch-size 2 --device cpu"
FAKE_FLAGS = tuple(FLAGS.split())

AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")  # as the kernel cuts their names

Files = dict[str, bytes]


def committed(out: Path) -> list[str]:
    return sorted(f.stem for f in out.glob("commits/0*.json"))


def shard_files(out: Path, shards: list[str]) -> dict[Path, tuple[bytes, int]]:
    """Bytes and modification times of the files of some shards."""
    files = [
        out / name
        for s in shards
        for name in (f"train/{s}.tar", f"meta/{s}.parquet", f"commits/{s}.json")
    ]
    return {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


class Process(NamedTuple):
    pid: int
    name: str
    group: int


class Job(ForkedJob):
    """A fake job in a process group of its own; what it prints goes to a file."""

    def __init__(self, argv: list[str], log: Path) -> None:
        super().__init__(argv, log)
        self.log = log

    def wait_for_shards(self, out: Path, num_shards: int) -> None:
        deadline_s = time.monotonic() + 150
        while len(committed(out)) < num_shards:
            assert self.poll() is None, self.text
            assert time.monotonic() < deadline_s, self.text
            time.sleep(0.02)

    def wait_for_text(self, text: str) -> None:
        deadline_s = time.monotonic() + 150
        while text not in self.text:
            assert time.monotonic() < deadline_s, self.text
            time.sleep(0.01)

    def wait_for_no_process(self) -> None:
        """Wait until no worker and none of Ray's servers is left of the job's session.

        Ray's agents end by themselves when they have missed their head for a minute.
        """
        deadline_s = time.monotonic() + 150
        while left := [p for p in self.session() if not p.name.startswith(AGENTS)]:
            assert time.monotonic() < deadline_s, left
            time.sleep(0.05)

    def session(self) -> list[Process]:
        """The living processes of the job's session."""
        found = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, _, rest = file.read_text().partition("(")[2].rpartition(")")
                state, _, group, session = rest.split()[:4]
                if int(session) == self.pid and state != "Z":
                    found.append(Process(int(file.parent.name), name, int(group)))
        return found

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """End whatever of the process group is left."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def wait_for_free_locks(scratch: Path) -> None:
    """Wait until the kernel has let go of the locks of killed workers."""
    deadline_s = time.monotonic() + 150
    for file in scratch.glob("*/lock"):
        with file.open("rb+") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < deadline_s, file
                    time.sleep(0.05)


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that holds the faults of the test's jobs, none at first."""
    file = tmp_path / "faults.json"
    set_faults(file)
    monkeypatch.setenv(FAULTS_VARIABLE, str(file))
    return file


@pytest.fixture
def start(tmp_path: Path, faults: Path) -> Iterator[Callable[..., Job]]:
    """Start the job in a process of its own, with so many workers; it is ended with the test."""
    started: list[Job] = []

    def start(workers: int) -> Job:
        argv = [*flags(tmp_path), f"--workers={workers}"]
        started.append(Job(argv, tmp_path / f"log-{len(started)}"))
        return started[-1]

    yield start
    for job in started:
        job.end()


def flags(folder: Path) -> list[str]:
    return [f"--out={folder / 'out'}", f"--scratch={folder / 'scratch'}", *FAKE_FLAGS]


def run_again(folder: Path, faults: Path) -> None:
    """Run the same command to its end, in this process."""
    set_faults(faults)
    assert fake_job.main([*flags(folder), "--workers=0"]) == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert fake_job.main([*flags(folder), "--workers=0"]) == 0
    files = data_files(folder / "out")
    assert len(files) == 2 * NUM_SHARDS
    return files


@pytest.mark.parametrize("workers", [0, 2])
def test_killing_the_job_then_running_it_again_gives_the_same_bytes(
    workers: int,
    undisturbed: Files,
    start: Callable[..., Job],
    tmp_path: Path,
    faults: Path,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "out"
    set_faults(faults, batch_s=SLOW_BATCH_S, slow_from=20)
    job = start(workers)
    job.wait_for_shards(out, 2)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    job.wait_for_no_process()
    wait_for_free_locks(tmp_path / "scratch")
    done = committed(out)
    before = shard_files(out, done)
    assert 2 <= len(done) < NUM_SHARDS
    assert not (out / "index.json").exists()

    run_again(tmp_path, faults)
    assert data_files(out) == undisturbed
    assert shard_files(out, done) == before
    assert committed(out) == [f"{i:05d}" for i in range(NUM_SHARDS)]
    assert not list((tmp_path / "scratch").iterdir()), "scratch of the killed job is swept"
    assert not list(out.rglob(".tmp-*")) or workers

    capsys.readouterr()
    run_again(tmp_path, faults)
    assert f"all {NUM_SHARDS} shards" in capsys.readouterr().err
    assert shard_files(out, done) == before


def stopped_cleanly(job: Job, folder: Path) -> list[str]:
    """Check how a job ended that a signal had asked to stop; the shards it had committed."""
    assert job.wait() == 1, job.text
    assert "committed shards are safe" in job.text
    assert "run the same command again" in job.text
    assert "Traceback" not in job.text
    assert not list((folder / "scratch").iterdir())
    assert not (folder / "out" / "commits" / "failures.jsonl").exists()
    done = committed(folder / "out")
    assert 1 <= len(done) < NUM_SHARDS
    return done


@pytest.mark.parametrize(
    ("number", "to_group"),
    [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGHUP, True)],
)
def test_a_signal_stops_the_job_cleanly_and_says_how_to_go_on(
    number: signal.Signals,
    to_group: bool,
    undisturbed: Files,
    start: Callable[..., Job],
    tmp_path: Path,
    faults: Path,
):
    out = tmp_path / "out"
    set_faults(faults, batch_s=SLOW_BATCH_S, slow_from=10)
    job = start(workers=0)
    job.wait_for_shards(out, 1)
    asked_s = time.monotonic()
    if to_group:  # as a terminal does for Ctrl-C, and when it goes away
        os.killpg(job.pid, number)
    else:
        os.kill(job.pid, number)
    done = stopped_cleanly(job, tmp_path)
    assert time.monotonic() - asked_s < 25, "the shards that are left take as long"
    before = shard_files(out, done)

    run_again(tmp_path, faults)
    assert data_files(out) == undisturbed
    assert shard_files(out, done) == before


def test_on_ray_the_driver_alone_hears_a_signal_and_its_workers_stop_cleanly(
    undisturbed: Files, start: Callable[..., Job], tmp_path: Path, faults: Path
):
    out, gate = tmp_path / "out", tmp_path / "gate"
    set_faults(faults, gate=str(gate), gate_from=10)
    job = start(workers=2)
    waiting = {int(pid) for pid in wait_at_gate(gate, 2)}
    beside = [p for p in job.session() if p.pid != job.pid]
    assert waiting <= {p.pid for p in beside}
    for number in (signal.SIGINT, signal.SIGHUP):  # of a terminal, which tells the whole group
        for process in beside:
            if process.group == job.pid:
                os.kill(process.pid, number)
    job.send_signal(signal.SIGTERM)
    job.wait_for_text("once more to end at once")
    assert waiting <= {p.pid for p in job.session()}
    open_gate(gate)
    done = stopped_cleanly(job, tmp_path)
    before = shard_files(out, done)

    run_again(tmp_path, faults)
    assert data_files(out) == undisturbed
    assert shard_files(out, done) == before


def test_a_second_interrupt_ends_a_job_on_ray_at_once_with_all_its_processes(
    undisturbed: Files, start: Callable[..., Job], tmp_path: Path, faults: Path
):
    set_faults(faults, batch_s=600, slow_from=10)
    job = start(workers=2)
    job.wait_for_shards(tmp_path / "out", 1)
    os.killpg(job.pid, signal.SIGINT)
    job.wait_for_text("once more to end at once")
    os.killpg(job.pid, signal.SIGINT)
    asked_s = time.monotonic()
    assert job.wait() == 128 + signal.SIGINT, job.text
    assert time.monotonic() - asked_s < 100, "the workers are not waited for"
    job.wait_for_no_process()

    run_again(tmp_path, faults)
    assert data_files(tmp_path / "out") == undisturbed


REAL_FLAGS = (
    "--policy uniform --classes 2,5,9 --per-class 7 --samples-per-shard 8 --batch-size 3"
    " --device cpu"
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset by the real sampler on Ray: 21 images of 3 classes in 3 shards."""
    folder = tmp_path_factory.mktemp("real")
    weights = write_random_weights(folder / "weights")
    argv = [f"--out={folder / 'out'}", f"--weights={weights}", *REAL_FLAGS.split()]
    assert generate.main([*argv, "--workers=1"]) == 0
    return folder / "out"


def pixel_hash(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def test_webdataset_reads_the_output_and_the_pixels_are_those_recorded(real: Path):
    rows = pyarrow.dataset.dataset([str(f) for f in real.glob("meta/*.parquet")]).to_table()
    recorded = {row["key"]: row for row in rows.to_pylist()}
    tars = sorted(str(f) for f in real.glob("train/*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(samples) == len(recorded) == 21
    assert [s["__key__"] for s in samples] == sorted(recorded)
    for sample in samples:
        row = recorded[sample["__key__"]]
        image = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert image.shape == (row["height"], row["width"]) == (32, 32)
        assert pixel_hash(image) == row["pixel_sha256"]
        assert int(sample["cls"]) == row["label"]
        assert json.loads(sample["json"])["label"] == row["label"]
    assert Counter(int(s["cls"]) for s in samples) == {2: 7, 5: 7, 9: 7}


def test_pyarrow_reads_all_of_meta_as_one_table(real: Path):
    files = [str(f) for f in sorted(real.glob("meta/*.parquet"))]
    table = pyarrow.dataset.dataset(files).to_table()
    assert table.column("index").to_pylist() == list(range(21))
    assert set(table.column("status").to_pylist()) == {"ok"}
    by_format = pyarrow.dataset.dataset(str(real / "meta"))
    assert by_format.to_table().num_rows == 21


def test_one_process_makes_the_bytes_of_a_worker_on_ray(real: Path, tmp_path: Path):
    plan = json.loads((real / "plan.json").read_bytes())
    argv = [f"--out={tmp_path / 'out'}", f"--weights={real.parent / 'weights'}", "--workers=0"]
    assert generate.main([*argv, *REAL_FLAGS.split()]) == 0
    assert json.loads((tmp_path / "out" / "plan.json").read_bytes()) == plan
    assert data_files(tmp_path / "out") == data_files(real)
