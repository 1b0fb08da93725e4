from __future__ import annotations

import json
import os
import signal
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.ledger import (
    JobStopped,
    ShardRun,
    StopSignals,
    one_line,
    set_aside_earlier,
)
from pipeline.run.schedule import Assignment, ShardQueue
from pipeline.run.worker import Progress, ShardDone, WorkerInfo
from pipeline.shards.committed import ShardSummary
from pipeline.shards.manifest import LEDGER_NAME
from pipeline.storage import Storage
from tests.fake_shards import make_plan, publish_one

DISK_FULL = OSError(28, "No space left on device")


class Job:
    """A run of three shards over an empty folder."""

    def __init__(self, folder: Path, max_attempts: int = 3, **options: Any) -> None:
        self.storage, self.plan = Storage.open(folder), make_plan()
        self.queue = ShardQueue(range(3), max_attempts)
        self.run = ShardRun(self.storage, self.plan, self.queue, **options)

    def take(self) -> Assignment:
        assignment = self.queue.take()
        assert assignment is not None
        return assignment

    def fail(self, assignment: Assignment, error: str = "boom", **options: Any) -> bool:
        return self.run.failed(assignment, error, "Traceback: boom", "host:7", **options)

    def ledger(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.storage.read(LEDGER_NAME).splitlines()]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "out")


# What is written of a failure


def test_every_charge_is_a_line_of_the_ledger_with_all_that_is_known(tmp_path: Path, capsys):
    job = Job(tmp_path, max_attempts=2)
    before = datetime.now(UTC) - timedelta(seconds=1)
    for shard_id in (0, 1, 2):
        assert job.take().shard_id == shard_id
    assert job.fail(Assignment(1, 1))
    assert job.fail(Assignment(2, 1), storage_error=DISK_FULL)
    again = job.take()
    assert again == Assignment(1, 2)
    assert job.fail(again)
    lines = job.ledger()
    assert all(
        before <= datetime.fromisoformat(line.pop("at")) <= datetime.now(UTC) for line in lines
    )
    known = {"error": "boom", "traceback": "Traceback: boom", "worker": "host:7"}
    first, second = (
        {"shard_id": i, "fingerprint": job.plan.shard_fingerprint(i), **known} for i in (1, 2)
    )
    assert lines == [
        {**first, "failures": 1, "attempt": 1, "set_aside": False, "cause": "shard"},
        {**second, "failures": 1, "attempt": 1, "set_aside": False, "cause": "storage"},
        {**first, "failures": 2, "attempt": 2, "set_aside": True, "cause": "shard"},
    ]
    assert capsys.readouterr().err.splitlines() == [
        "shard 00001 failed on host:7, will be tried again: boom",
        "shard 00002 failed on host:7, will be tried again: boom",
        f"shard 00001 failed on host:7, set aside, see {LEDGER_NAME}: boom",
    ]


def test_only_what_is_no_fault_of_storage_is_given_up_for_the_next_run(tmp_path: Path, capsys):
    job = Job(tmp_path, max_attempts=1)
    job.fail(job.take())
    job.fail(job.take(), storage_error=DISK_FULL)
    assert job.queue.set_aside == (0, 1)
    assert job.run.unstored == {1}
    assert set_aside_earlier(job.storage, job.plan) == {0}
    assert f"left for the next run, see {LEDGER_NAME}: boom" in capsys.readouterr().err


def test_a_shard_that_storage_failed_once_is_not_left_for_the_next_run(job: Job):
    job.fail(job.take(), storage_error=DISK_FULL)
    assert job.run.unstored == set()


def test_a_charge_that_is_taken_back_is_forgotten_by_the_ledger(tmp_path: Path, capsys):
    job = Job(tmp_path, max_attempts=1)
    first, second = job.take(), job.take()
    job.fail(first)
    job.fail(second, storage_error=DISK_FULL)
    for assignment in (first, second):
        job.run.refund(assignment.shard_id, "its node is gone")
    assert set_aside_earlier(job.storage, job.plan) == frozenset(), "a run that ends now"
    assert job.run.unstored == set()
    assert job.queue.failures(0) == 0
    last = job.ledger()[-1]
    assert (last["shard_id"], last["failures"], last["set_aside"]) == (1, 0, False)
    assert (last["cause"], last["error"]) == ("node", "its node is gone")
    assert "shard 00001 gets its attempt back: its node is gone" in capsys.readouterr().err


def test_a_ledger_with_foreign_lines_sets_nothing_aside(tmp_path: Path):
    storage, plan = Storage.open(tmp_path), make_plan()
    good = {
        "shard_id": 1,
        "fingerprint": plan.shard_fingerprint(1),
        "set_aside": True,
        "cause": "shard",
        "error": "it broke",
        "at": "2026-01-02T03:04:05+00:00",
    }
    foreign: list[object] = [1, [], {}, {**good, "fingerprint": "x"}, {**good, "set_aside": 1}]
    foreign += [{**good, "shard_id": number} for number in (99, 3, -1, "1", None)]
    foreign += [{k: v for k, v in good.items() if k != name} for name in good if name != "cause"]
    lines = ["{", "\xff", "[" * 100_000, *map(json.dumps, foreign)]
    for line in lines:
        storage.publish_bytes(line.encode("latin-1"), LEDGER_NAME)
        assert set_aside_earlier(storage, plan) == frozenset(), line[:80]
    text = "\n".join(lines)
    more = f"{text}\n{json.dumps(good)}\n{json.dumps({**good, 'fingerprint': 'x'})}"
    storage.publish_bytes(more.encode("latin-1"), LEDGER_NAME)
    assert set_aside_earlier(storage, plan) == {1}
    retried = json.dumps({**good, "cause": "storage"})
    storage.publish_bytes(f"{more}\n{retried}".encode("latin-1"), LEDGER_NAME)
    assert set_aside_earlier(storage, plan) == frozenset()


def test_the_ledger_of_an_earlier_release_is_read_before_that_of_this_one(tmp_path: Path):
    storage, plan = Storage.open(tmp_path), make_plan()

    def entry(shard_id: int, is_given_up: bool) -> bytes:
        fingerprint = plan.shard_fingerprint(shard_id)
        line = {"shard_id": shard_id, "fingerprint": fingerprint, "set_aside": is_given_up}
        more = {"cause": "shard", "error": "boom", "at": "2026-01-02T03:04:05+00:00"}
        return json.dumps({**line, **more}).encode() + b"\n"

    storage.publish_bytes(entry(0, True) + entry(2, True), "meta/failures.jsonl")
    assert set_aside_earlier(storage, plan) == {0, 2}
    storage.publish_bytes(entry(2, False), LEDGER_NAME)
    assert set_aside_earlier(storage, plan) == {0}


def test_a_ledger_that_cannot_be_written_ends_no_job(job: Job, monkeypatch, capsys):
    def full(self: Storage, data: bytes, name: str) -> None:
        raise DISK_FULL

    monkeypatch.setattr(Storage, "publish_bytes", full)
    assert job.fail(job.take())
    assert f"warning: {LEDGER_NAME} cannot be written: {DISK_FULL}" in capsys.readouterr().err


# What is counted


def test_a_failed_shard_gives_its_images_back(job: Job):
    job.run.heard(Progress(0, 4))
    job.run.heard(Progress(1, 4))
    assert job.run.tally.in_hand == {0: 4, 1: 4}
    job.take()
    job.fail(Assignment(0, 1))
    assert job.run.tally.in_hand == {1: 4}


def test_a_committed_shard_counts_with_all_its_images(job: Job):
    for _ in range(3):
        job.take()
    for shard_id in (2, 0):
        job.run.heard(ShardDone(shard_id, 1000, {}))
    assert (job.run.tally.images, job.run.tally.done) == (13, 13)
    assert job.queue.num_open == 1


@pytest.mark.parametrize("how", ["failed", "lost"])
def test_a_shard_that_was_committed_all_the_same_is_done(job: Job, how, tmp_path: Path, capsys):
    publish_one(job.storage, job.plan, 0, tmp_path / "scratch")
    assignment = job.take()
    if how == "failed":
        assert not job.fail(assignment)
        said = capsys.readouterr().err
        assert said == "shard 00000 was committed before host:7 failed: boom\n"
    else:
        job.run.lost(assignment, "its node is gone")
    assert (job.run.tally.images, job.queue.num_open) == (9, 2)
    assert job.queue.failures(0) == 0
    assert job.storage.size(LEDGER_NAME) is None


def test_a_record_that_cannot_be_read_is_no_commit(job: Job, tmp_path: Path, monkeypatch):
    publish_one(job.storage, job.plan, 0, tmp_path / "scratch")

    def broken(self: Storage, name: str) -> int | None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Storage, "size", broken)
    assert job.fail(job.take())


@pytest.mark.parametrize("alone", [False, True])
def test_a_lost_shard_is_made_again_at_no_charge(job: Job, alone: bool, capsys):
    job.run.heard(Progress(0, 4))
    job.run.lost(job.take(), "its node is gone", alone=alone)
    assert job.run.tally.done == 0
    assert capsys.readouterr().err == "shard 00000 goes to another worker: its node is gone\n"
    assert job.take() == Assignment(0, 2, alone)
    job.run.lost(Assignment(0, 2), "")
    assert capsys.readouterr().err == ""
    assert job.take() == Assignment(0, 3, alone)
    assert job.storage.size(LEDGER_NAME) is None


# When a job cannot go on


def test_five_shards_in_a_row_that_cannot_be_stored_stop_the_job(tmp_path: Path):
    job = Job(tmp_path, max_attempts=99)

    def fail(times: int, **options: Any) -> None:
        for _ in range(times):
            job.fail(job.take(), **options)

    fail(4, storage_error=DISK_FULL)
    job.run.heard(ShardDone(job.take().shard_id, 1000, {}))
    fail(4, storage_error=DISK_FULL)
    fail(1)
    fail(4, storage_error=DISK_FULL)
    stopped = r"^5 shards in a row could not be stored, the last with boom: free space on"
    with pytest.raises(JobStopped, match=stopped):
        fail(1, storage_error=OSError(28, "No space left on device", str(tmp_path)))
    assert len(job.ledger()) == 14, "the last one is charged too"


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        ("MemoryError: ", True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate", True),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", True),
        ("RuntimeError: CUBLAS_STATUS_ALLOC_FAILED", True),
        ("ValueError: mean_change is nan", False),
    ],
)
def test_what_may_be_a_lack_of_memory_is_remembered(job: Job, error: str, is_memory: bool):
    assert not job.run.memory_may_be_short
    job.fail(job.take(), error)
    job.fail(job.take(), "KeyError: 'x'")
    assert job.run.memory_may_be_short == is_memory


# Workers and clocks


def test_a_run_is_timed_from_its_first_ready_worker(tmp_path: Path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    job = Job(tmp_path)
    worker = WorkerInfo("host", 7, "cpu", 2, {"torch": "2"})
    now = 103.0
    assert (job.run.loading_s, job.run.making_s) == (3.0, 0.0)
    job.run.worker_ready(worker)
    now = 110.0
    job.run.worker_ready(worker)
    assert (job.run.loading_s, job.run.making_s) == (3.0, 7.0)
    job.run.finish()
    now = 200.0
    assert (job.run.loading_s, job.run.making_s) == (3.0, 7.0)
    assert job.run.workers == ["cpu", "cpu"]


def test_each_difference_to_what_earlier_shards_were_made_with_is_warned_of_once(
    tmp_path: Path, capsys
):
    earlier = Job(tmp_path)
    record = publish_one(earlier.storage, earlier.plan, 1, tmp_path / "scratch")
    job = Job(tmp_path, earlier=[ShardSummary.of(record)])
    said = []
    for torch in ("2", "3", "3"):
        job.run.worker_ready(WorkerInfo("host", 7, "cpu", 1, {"torch": torch}))
        said.append(capsys.readouterr().err)
    assert said[0] == said[2] == ""
    assert said[1].startswith("warning: torch: 2 in 1 shard (1), this run has 3: the same bytes")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no\nluck"), "ValueError: no"),
        (KeyError(), "KeyError"),
        (RuntimeError("\n  later\n"), "RuntimeError: later"),
    ],
)
def test_an_error_in_one_line_is_its_type_and_first_line(error: Exception, line: str):
    assert one_line(error) == line


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_for_an_orderly_stop_only_while_the_job_works(number, capfd):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert signal.getsignal(number) == before, "what joins a cluster may be ended at once"
        stop.install()
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err.startswith("\nstopping: shards being made are dropped")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_with_the_code_of_a_shell(number, monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    with StopSignals() as stop:
        stop.install()
        os.kill(os.getpid(), number)
        assert codes == []
        os.kill(os.getpid(), number)
    assert codes == [128 + number]


def test_a_lost_terminal_stops_nothing_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            stop.install()
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_keep_their_meaning_outside_the_main_thread():
    before, found = signal.getsignal(signal.SIGTERM), []

    def job() -> None:
        with StopSignals() as stop:
            stop.install()
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert found == [before]
