from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from depthvar.errors import InputError
from jobs import status as job
from pipeline.dataset import status as module
from pipeline.dataset.status import status
from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import open_plan
from pipeline.shards.claims import make_claim
from pipeline.shards.manifest import CommitRecord, record_name
from pipeline.storage import Storage
from tests.fake_shards import make_plan, object_store, to_old_layout, write_dataset

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
AGAIN = "run the generate command of this dataset again"
GO_ON = f"{AGAIN} to go on, unless a job has just begun"


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Storage, JobPlan]:
    """22 images in 8 shards, of 3 images but for the last one's 1, committed a day ago."""
    storage = Storage.open(tmp_path / "out")
    plan = write_dataset(storage, make_plan(samples_per_shard=3), tmp_path / "scratch")
    for shard_id in range(8):
        commit(storage, shard_id, 86400, "host:1", 20)
    return storage, plan


def commit(storage: Storage, shard_id: int, ago_s: float, worker: str, making_s: float) -> None:
    """Make a record say so: its file is as old, and sampling took three times what decoding did."""
    name = record_name(shard_id)
    record = CommitRecord.from_json(storage.read(name))
    assert record is not None
    (batch,) = record.batches
    at = NOW - timedelta(seconds=ago_s)
    timing = replace(batch, sampling_s=0.75 * making_s, decoding_s=0.25 * making_s)
    changed = replace(
        record, worker=worker, batches=(timing,), committed_at=at.isoformat(timespec="milliseconds")
    )
    storage.publish_bytes(changed.to_json(), name)
    os.utime(Path(storage.root, name), (at.timestamp(),) * 2)


def uncommit(storage: Storage, *shard_ids: int) -> None:
    for shard_id in shard_ids:
        storage.remove(record_name(shard_id))
    storage.remove("index.json")


def at_work(storage: Storage) -> None:
    """Five shards: one worker a shard each 20 s, another one in 40 s, a third one long gone."""
    uncommit(storage, 5, 6, 7)
    commit(storage, 0, 5000, "gone:3", 20)
    commit(storage, 1, 65, "slow:1", 40)
    for shard_id, ago_s in ((2, 50), (3, 30), (4, 10)):
        commit(storage, shard_id, ago_s, "fast:2", 20)


def test_rate_and_time_left_are_those_of_the_workers_at_work(dataset):
    storage, plan = dataset
    at_work(storage)
    found = status(storage, plan, NOW)
    assert (found.num_shards, found.num_images, found.state) == (5, 15, "working")
    assert [p.worker for p in found.pace] == ["fast:2", "slow:1", "gone:3"]
    assert [p.worker for p in found.at_work] == ["fast:2", "slow:1"]
    rate = 9 / 60 + 3 / 40
    assert found.images_per_s == pytest.approx(rate)
    assert found.seconds_left == pytest.approx(7 / rate)
    assert found.as_text().splitlines() == [
        f"dataset   {storage}: fake, 3 classes",
        "done      15 of 22 images (68%), 5 of 8 shards",
        "rate      0.225 images/s by 2 workers, 31.1 s left",
        "state     working: the last commit was 10.0 s ago, by fast:2",
    ]


def test_a_job_that_died_is_quiet_and_what_goes_on_is_named(dataset):
    storage, plan = dataset
    at_work(storage)
    found = status(storage, plan, NOW + timedelta(hours=2))
    assert found.state == "quiet"
    assert (found.images_per_s, found.seconds_left) == (0, None)
    assert found.as_text().splitlines()[2:] == [
        "state     quiet: the last commit was 2 h 0 min ago, by fast:2",
        f"next      {GO_ON}",
    ]


def test_a_worker_is_waited_for_as_long_as_three_of_its_shards_take(dataset):
    storage, plan = dataset
    uncommit(storage, *range(1, 8))
    commit(storage, 0, 1000, "slow:1", 400)
    assert status(storage, plan, NOW).state == "working"
    assert status(storage, plan, NOW + timedelta(seconds=201)).state == "quiet"


def test_a_shard_set_aside_is_told_with_its_error_and_not_waited_for(dataset):
    storage, plan = dataset
    record_of_7 = storage.read(record_name(7))
    uncommit(storage, 2, 7)
    line = {
        "shard_id": 2,
        "fingerprint": plan.shard_fingerprint(2),
        "set_aside": True,
        "cause": "shard",
        "error": "ValueError: no",
        "at": "2026-01-02T03:04:05+00:00",
    }
    lines = [json.dumps({**line, "set_aside": False}), json.dumps(line)]
    storage.publish_bytes("\n".join(lines).encode(), "commits/failures.jsonl")
    commit(storage, 6, 5, "a:1", 10)
    found = status(storage, plan, NOW)
    assert found.seconds_left == pytest.approx(1 / found.images_per_s)
    retry = f"{AGAIN} with --retry-failed to try what was set aside"
    assert found.as_text().splitlines()[-3:] == [
        "failures  2, the last 8 h 55 min ago, see commits/failures.jsonl",
        "set aside 2: ValueError: no",
        f"next      {retry}",
    ]
    assert status(storage, plan, NOW + timedelta(days=1)).steps == (
        GO_ON,
        retry,
    )
    storage.publish_bytes(record_of_7, record_name(7))
    assert status(storage, plan, NOW + timedelta(days=1)).steps == (retry,)


def test_what_is_complete_is_finished_once_its_indexes_are_written(dataset):
    storage, plan = dataset
    found = status(storage, plan, NOW)
    assert (found.state, found.steps) == ("finished", ())
    assert found.as_text().splitlines()[1] == "done      22 of 22 images (100%), 8 of 8 shards"
    storage.remove("index.json")
    ended = status(storage, plan, NOW)
    assert (ended.state, ended.steps) == ("quiet", (f"{AGAIN} to write the indexes",))


def test_of_a_large_dataset_the_newest_records_are_read_and_those_in_doubt(dataset, monkeypatch):
    storage, plan = dataset
    monkeypatch.setattr(module, "RECORDS_READ", 2)
    for shard_id in range(8):
        commit(storage, shard_id, 100 - 10 * (shard_id in (3, 6)), "a:1", 20)
    make_claim(storage, 1)
    opened: list[str] = []
    open_input = Storage.open_input

    def recording(self: Storage, name: str) -> object:
        opened.append(name)
        return open_input(self, name)

    monkeypatch.setattr(Storage, "open_input", recording)
    assert status(storage, plan, NOW).state == "finished"
    hashed = ["meta/00001.parquet", "train/00001.tar"]
    records = [record_name(i) for i in (1, 3, 6)]
    assert sorted(n for n in opened if "failures" not in n) == [*records, *hashed]


def test_a_shard_whose_files_are_not_those_of_its_record_is_not_done(dataset):
    storage, plan = dataset
    make_claim(storage, 1)
    tar = Path(storage.root, "train/00001.tar")
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    Path(storage.root, "meta/00004.parquet").write_bytes(b"x")
    found = status(storage, plan, NOW)
    assert (found.num_shards, found.num_images, found.unsound) == (6, 16, (1, 4))
    assert found.state == "quiet"
    assert found.as_text().splitlines()[-4:] == [
        "unsound   1: the record does not fit its files",
        "unsound   4: the record does not fit its files",
        f"next      `depthvar verify {storage} --deep --repair`",
        f"next      {GO_ON}",
    ]


def test_before_the_first_shard_the_age_of_the_plan_is_told(tmp_path):
    storage = Storage.open(tmp_path)
    plan = open_plan(storage, make_plan())
    os.utime(tmp_path / "plan.json", ((NOW - timedelta(seconds=200)).timestamp(),) * 2)
    assert status(storage, plan, NOW).as_text().splitlines()[1:] == [
        "done      0 of 22 images (0%), 0 of 3 shards",
        "state     quiet: planned 3 min 20 s ago, no shard is committed yet",
        f"next      {GO_ON}",
    ]


def test_of_many_shards_ten_are_named(tmp_path):
    storage = Storage.open(tmp_path)
    plan = open_plan(storage, make_plan(samples_per_shard=1))
    found = replace(status(storage, plan, NOW), unsound=tuple(range(13)))
    lines = found.as_text().splitlines()
    assert sum(line.startswith("unsound") for line in lines) == 10
    assert "          and 3 more" in lines


def test_datasets_of_earlier_releases_and_on_stores_are_counted_too(dataset, tmp_path):
    storage, plan = dataset
    to_old_layout(tmp_path / "out")
    store = object_store()
    write_dataset(store, plan, tmp_path / "scratch")
    for where in (storage, store):
        found = status(where, plan, NOW)
        assert (found.num_shards, found.num_images, found.state) == (8, 22, "finished")


def test_programs_read_the_same_numbers_and_the_exit_code(dataset, monkeypatch, capsys):
    storage, _ = dataset
    assert job.main([str(storage)]) == 0
    at_work(storage)
    monkeypatch.setattr(job, "datetime", _Clock)
    capsys.readouterr()
    assert job.main([str(storage), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    rate = 9 / 60 + 3 / 40
    assert told.pop("images_per_s") == pytest.approx(rate)
    assert told.pop("seconds_left") == pytest.approx(7 / rate)
    assert told == {
        "dataset": str(storage),
        "state": "working",
        "images": {"committed": 15, "planned": 22},
        "shards": {"committed": 5, "planned": 8},
        "workers": ["fast:2", "slow:1"],
        "last_commit": "2026-01-02T11:59:50+00:00",
        "failures": 0,
        "set_aside": {},
        "unsound": [],
        "next": [],
    }


class _Clock:
    @staticmethod
    def now(zone: object) -> datetime:
        return NOW


def test_what_is_no_dataset_is_refused_in_one_line(tmp_path):
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError) as caught:
            job.main([str(place)])
        assert "\n" not in str(caught.value)
        assert f"got {place}, which" in str(caught.value)
