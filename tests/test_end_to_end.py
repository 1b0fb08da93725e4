"""The whole job as a user runs it: killed, stopped, resumed, and read by standard readers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
import webdataset
from PIL import Image

from tests.fake_shards import data_files
from tests.fakes import FAULTS_VARIABLE, set_faults
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


class Job:
    """A job in a process group of its own; what it prints goes to a file."""

    def __init__(self, module: str, argv: list[str], log: Path, faults: Path | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if faults is not None:
            environment[FAULTS_VARIABLE] = str(faults)
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> int:
        return self.process.wait(timeout=150)

    def wait_for_shards(self, out: Path, num_shards: int) -> None:
        deadline_s = time.monotonic() + 150
        while len(committed(out)) < num_shards:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline_s, self.text
            time.sleep(0.02)

    def wait_for_text(self, text: str) -> None:
        deadline_s = time.monotonic() + 60
        while text not in self.text:
            assert time.monotonic() < deadline_s, self.text
            time.sleep(0.01)

    def wait_for_no_process(self) -> None:
        """Wait until no worker and none of Ray's servers is left of the job's session.

        Ray's agents end by themselves when they have missed their head for a minute.
        """
        deadline_s = time.monotonic() + 60
        while left := [name for name in self.session() if not name.startswith(AGENTS)]:
            assert time.monotonic() < deadline_s, left
            time.sleep(0.05)

    def session(self) -> list[str]:
        """The names of the living processes of the job's session."""
        found = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, _, rest = file.read_text().partition("(")[2].rpartition(")")
                state, _, _, session = rest.split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(name)
        return found

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """End whatever of the process group is left."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    file = tmp_path / "faults.json"
    set_faults(file)
    return file


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("undisturbed")
    argv = ["--out", str(folder / "out"), *FAKE_FLAGS, "--workers", "0"]
    job = Job("tests.fake_job", argv, folder / "log")
    assert job.wait() == 0, job.text
    files = data_files(folder / "out")
    assert len(files) == 2 * NUM_SHARDS
    return files


@pytest.mark.parametrize("workers", ["0", "2"])
def test_killing_the_job_then_running_it_again_gives_the_same_bytes(
    workers: str, undisturbed: Files, tmp_path: Path, faults: Path, jobs: list[Job]
):
    out = tmp_path / "out"
    argv = ["--out", str(out), *FAKE_FLAGS, "--workers", workers]
    argv += ["--scratch", str(tmp_path / "scratch")]
    set_faults(faults, batch_s=SLOW_BATCH_S, slow_from=20)
    jobs.append(Job("tests.fake_job", argv, tmp_path / "log-1", faults))
    jobs[0].wait_for_shards(out, 2)
    os.kill(jobs[0].process.pid, signal.SIGKILL)
    assert jobs[0].wait() == -signal.SIGKILL
    done = committed(out)
    before = shard_files(out, done)
    assert 2 <= len(done) < NUM_SHARDS
    assert not (out / "index.json").exists()

    set_faults(faults)
    jobs.append(Job("tests.fake_job", argv, tmp_path / "log-2", faults))
    assert jobs[1].wait() == 0, jobs[1].text
    assert data_files(out) == undisturbed
    assert shard_files(out, done) == before
    assert committed(out) == [f"{i:05d}" for i in range(NUM_SHARDS)]
    assert not list((tmp_path / "scratch").iterdir()), "scratch of the killed job is swept"
    assert not list(out.rglob(".tmp-*")) or workers == "2"

    jobs.append(Job("tests.fake_job", argv, tmp_path / "log-3", faults))
    assert jobs[2].wait() == 0
    assert f"all {NUM_SHARDS} shards" in jobs[2].text
    assert shard_files(out, done) == before


@pytest.mark.parametrize(
    ("number", "to_group", "workers"),
    [
        (signal.SIGTERM, False, "2"),
        (signal.SIGINT, True, "2"),
        (signal.SIGINT, True, "0"),
        (signal.SIGHUP, True, "2"),
    ],
)
def test_a_signal_stops_the_job_cleanly_and_says_how_to_go_on(
    number: signal.Signals,
    to_group: bool,
    workers: str,
    undisturbed: Files,
    tmp_path: Path,
    faults: Path,
    jobs: list[Job],
):
    out = tmp_path / "out"
    argv = ["--out", str(out), *FAKE_FLAGS, "--workers", workers]
    argv += ["--scratch", str(tmp_path / "scratch")]
    set_faults(faults, batch_s=SLOW_BATCH_S, slow_from=10)
    jobs.append(Job("tests.fake_job", argv, tmp_path / "log-1", faults))
    jobs[0].wait_for_shards(out, 1)
    asked_s = time.monotonic()
    if to_group:  # as a terminal does for Ctrl-C, and when it goes away
        os.killpg(jobs[0].process.pid, number)
    else:
        os.kill(jobs[0].process.pid, number)
    assert jobs[0].wait() == 1, jobs[0].text
    assert time.monotonic() - asked_s < 15
    assert "committed shards are safe" in jobs[0].text
    assert "run the same command again" in jobs[0].text
    assert "Traceback" not in jobs[0].text
    assert not list((tmp_path / "scratch").iterdir())
    assert not (out / "commits" / "failures.jsonl").exists()
    done = committed(out)
    assert 1 <= len(done) < NUM_SHARDS
    before = shard_files(out, done)

    set_faults(faults)
    jobs.append(Job("tests.fake_job", [*argv, "--workers", "0"], tmp_path / "log-2", faults))
    assert jobs[1].wait() == 0, jobs[1].text
    assert data_files(out) == undisturbed
    assert shard_files(out, done) == before


def test_a_second_interrupt_ends_a_job_on_ray_at_once_with_all_its_processes(
    undisturbed: Files, tmp_path: Path, faults: Path, jobs: list[Job]
):
    out = tmp_path / "out"
    argv = ["--out", str(out), *FAKE_FLAGS, "--scratch", str(tmp_path / "scratch")]
    set_faults(faults, batch_s=60, slow_from=10)
    jobs.append(Job("tests.fake_job", [*argv, "--workers", "2"], tmp_path / "log-1", faults))
    job = jobs[0]
    job.wait_for_shards(out, 1)
    os.killpg(job.process.pid, signal.SIGINT)
    job.wait_for_text("once more to end at once")
    os.killpg(job.process.pid, signal.SIGINT)
    asked_s = time.monotonic()
    assert job.wait() == 128 + signal.SIGINT, job.text
    assert time.monotonic() - asked_s < 5, "the workers are not waited for"
    job.wait_for_no_process()

    set_faults(faults)
    jobs.append(Job("tests.fake_job", [*argv, "--workers", "0"], tmp_path / "log-2", faults))
    assert jobs[1].wait() == 0, jobs[1].text
    assert data_files(out) == undisturbed


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset by the real sampler on Ray: 21 images of 3 classes in 3 shards."""
    folder = tmp_path_factory.mktemp("real")
    weights = write_random_weights(folder / "weights")
    text = "--policy uniform --classes 2,5,9 --per-class 7 --samples-per-shard 8 --batch-size 3"
    argv = ["--out", str(folder / "out"), "--weights", str(weights), *text.split()]
    job = Job("jobs.generate", [*argv, "--device", "cpu"], folder / "log")
    assert job.wait() == 0, job.text
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


def test_one_process_makes_the_bytes_of_the_workers_on_ray(real: Path, tmp_path: Path):
    plan = json.loads((real / "plan.json").read_bytes())
    text = "--policy uniform --classes 2,5,9 --per-class 7 --samples-per-shard 8 --batch-size 3"
    argv = ["--out", str(tmp_path / "out"), "--weights", str(real.parent / "weights")]
    argv += [*text.split(), "--device", "cpu", "--workers", "0"]
    job = Job("jobs.generate", argv, tmp_path / "log")
    assert job.wait() == 0, job.text
    assert json.loads((tmp_path / "out" / "plan.json").read_bytes()) == plan
    assert data_files(tmp_path / "out") == data_files(real)
