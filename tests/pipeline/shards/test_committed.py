from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from pipeline.request.job_plan import JobPlan
from pipeline.shards import committed
from pipeline.shards.claims import make_claim
from pipeline.shards.committed import (
    ShardSummary,
    committed_shards,
    environments,
    keep_summaries,
    mixed_environments,
)
from pipeline.shards.manifest import SUMMARIES_NAME, read_record, record_name
from pipeline.storage import Storage
from tests.fake_shards import make_plan, object_store, publish_one
from tests.measure_scale import files_read, many_shards

NUM_SHARDS = 2_000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, JobPlan]:
    """A dataset with summaries of all its shards; tests that change a file put it right again."""
    out = tmp_path_factory.mktemp("many") / "out"
    plan = many_shards(out, NUM_SHARDS)
    keep_summaries(Storage.open(out), plan)
    return Storage.open(out), plan


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Storage, JobPlan]:
    """Five shards, for which there are summaries here."""
    monkeypatch.setattr(committed, "FEWEST_KEPT", 1)
    plan = many_shards(tmp_path / "out", 5)
    storage = Storage.open(tmp_path / "out")
    keep_summaries(storage, plan)
    return storage, plan


def edited(storage: Storage, shard_id: int, **changes: object) -> None:
    stored = json.loads(storage.read(record_name(shard_id)))
    storage.publish_bytes(
        json.dumps({**stored, **changes}, indent=1).encode(), record_name(shard_id)
    )


def test_of_many_shards_no_record_is_read_and_each_folder_is_listed_once(many, monkeypatch):
    storage, plan = many
    listed: list[str] = []
    answer = Storage._entries
    monkeypatch.setattr(Storage, "_entries", lambda s, n: (listed.append(n), answer(s, n))[1])
    with files_read() as names:
        found = committed_shards(storage, plan)
    assert names == [SUMMARIES_NAME]
    assert sorted(listed) == [".claims", "commits", "meta", "train"]
    with files_read() as names:
        assert committed_shards(storage, plan, reread=True) == found
    assert sorted(names) == [record_name(i) for i in range(NUM_SHARDS)]


def test_a_summary_says_what_its_record_says(many):
    storage, plan = many
    found = committed_shards(storage, plan)
    assert list(found) == list(range(NUM_SHARDS))
    for shard_id in (0, NUM_SHARDS - 1):
        record = read_record(storage, shard_id)
        assert record is not None
        assert found[shard_id] == ShardSummary.of(record)
        assert found[shard_id].made_with == record.made_with
        assert found[shard_id].seconds["sampling"] == sum(b.sampling_s for b in record.batches)


def test_records_without_a_summary_or_newer_than_it_are_read_and_then_kept(few):
    storage, plan = few
    edited(storage, 3, attempt=7)
    edited(storage, 1, attempt=10)
    with files_read() as names:
        found = committed_shards(storage, plan)
    assert sorted(names) == [record_name(1), record_name(3), SUMMARIES_NAME]
    assert {i: summary.attempt for i, summary in found.items()} == {0: 1, 1: 10, 2: 1, 3: 7, 4: 1}
    assert keep_summaries(storage, plan) == found
    with files_read() as names:
        assert committed_shards(storage, plan) == found
    assert names == [SUMMARIES_NAME]


def test_a_record_of_the_same_size_and_another_time_is_read(few):
    storage, plan = few
    path = Path(storage.root, record_name(2))
    path.write_bytes(path.read_bytes().replace(b'"attempt": 1', b'"attempt": 2'))
    assert committed_shards(storage, plan)[2].attempt == 2


def test_a_summary_proves_nothing_against_the_files(few):
    storage, plan = few
    for name in ("train/00000.tar", "meta/00001.parquet"):
        Path(storage.root, name).write_bytes(b"cut off")
    Path(storage.root, "train/00002.tar").unlink()
    Path(storage.root, record_name(3)).unlink()
    assert list(committed_shards(storage, plan)) == [4]
    assert list(keep_summaries(storage, plan)) == [4]


def test_summaries_of_another_plan_are_of_no_shard(few):
    storage, plan = few
    assert committed_shards(storage, replace(plan, seed=6)) == {}


@pytest.mark.parametrize("damage", [None, b"", b"PAR1", "cut", "middle", "foreign"])
def test_damaged_or_missing_summaries_count_as_none_and_are_written_anew(few, damage):
    storage, plan = few
    good, wanted = storage.read(SUMMARIES_NAME), committed_shards(storage, plan)
    path = Path(storage.root, SUMMARIES_NAME)
    if damage is None:
        path.unlink()
    elif damage == "foreign":
        storage.publish_bytes(foreign_parquet(), SUMMARIES_NAME)
    else:
        middle = good[: len(good) // 2] + bytes(64) + good[len(good) // 2 + 64 :]
        path.write_bytes({"cut": good[:-100], "middle": middle}.get(damage, damage))
    with files_read() as names:
        assert committed_shards(storage, plan) == wanted
    assert {record_name(i) for i in range(5)} <= set(names)
    assert keep_summaries(storage, plan) == wanted
    assert storage.read(SUMMARIES_NAME) == good


def foreign_parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"record": ["commits/00000.json"]}), buffer)
    return buffer.getvalue()


def test_a_shard_in_doubt_is_read_and_has_no_summary(few):
    storage, plan = few
    claim = make_claim(storage, 2)
    with files_read() as names:
        found = committed_shards(storage, plan)
    assert names == [SUMMARIES_NAME, record_name(2)]
    assert list(found) == [0, 1, 3, 4], "its files are not those of its hashes"
    keep_summaries(storage, plan)
    storage.remove(claim)
    with files_read() as names:
        assert len(committed_shards(storage, plan)) == 5
    assert names == [SUMMARIES_NAME, record_name(2)]


def test_few_records_have_no_summaries(tmp_path, monkeypatch):
    plan, storage = many_shards(tmp_path / "out", 3), Storage.open(tmp_path / "out")
    monkeypatch.setattr(committed, "FEWEST_KEPT", 4)
    assert len(keep_summaries(storage, plan)) == 3
    assert storage.size(SUMMARIES_NAME) is None
    monkeypatch.setattr(committed, "FEWEST_KEPT", 3)
    keep_summaries(storage, plan)
    assert storage.size(SUMMARIES_NAME) is not None


def test_summaries_that_are_right_are_left_alone(few):
    storage, plan = few
    before = os.stat(Path(storage.root, SUMMARIES_NAME))
    keep_summaries(storage, plan)
    assert os.stat(Path(storage.root, SUMMARIES_NAME)).st_ino == before.st_ino


def test_a_storage_that_takes_no_summaries_tells_what_is_done_all_the_same(few, monkeypatch):
    storage, plan = few
    storage.remove(SUMMARIES_NAME)

    def refuse(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Storage, "publish_bytes", refuse)
    assert len(keep_summaries(storage, plan)) == 5


def test_a_store_is_listed_and_read_as_a_disk_is(few):
    storage, plan = few
    store = Storage("s3://bucket/out", fs.LocalFileSystem(), storage.root, is_local=False)
    store.remove(SUMMARIES_NAME)
    wanted = keep_summaries(store, plan)
    with files_read() as names:
        assert committed_shards(store, plan) == wanted
    assert names == [SUMMARIES_NAME]


def test_a_store_that_knows_no_times_has_its_records_read(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "FEWEST_KEPT", 1)
    storage, plan = object_store(), make_plan()
    publish_one(storage, plan, 1, tmp_path / "scratch")
    assert list(keep_summaries(storage, plan)) == [1]
    assert storage.size(SUMMARIES_NAME) is None


def test_what_differs_between_many_shards_is_told_from_each_environment_once(many, monkeypatch):
    found = committed_shards(*many)
    found[7] = replace(found[7], environment='{"torch": "9"}')
    read: list[str] = []
    loads = json.loads
    monkeypatch.setattr(committed.json, "loads", lambda text: (read.append(text), loads(text))[1])
    mixed = mixed_environments(found.values())
    assert mixed["torch"] == {"1.2.3": tuple(i for i in found if i != 7), "9": (7,)}
    assert len(read) == len(environments(found.values())) == 2
