from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import open_plan
from pipeline.shards import manifest
from pipeline.shards.claims import make_claim
from pipeline.shards.committed import ShardSummary, committed_shards, mixed_environments
from pipeline.shards.indexes import index_files, write_indexes
from pipeline.shards.manifest import (
    CommitRecord,
    planned_shard,
    publish_shard,
    read_commit,
    record_name,
)
from pipeline.shards.writer import ShardWriter
from pipeline.storage import Storage
from tests.fake_shards import (
    fill,
    make_plan,
    object_store,
    publish_one,
    record_of,
    to_old_layout,
    write_dataset,
)


@pytest.fixture(params=["disk", "store"])
def storage(request, tmp_path) -> Storage:
    return Storage.open(str(tmp_path / "out")) if request.param == "disk" else object_store()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Storage:
    """A finished dataset; tests that break it put it right again."""
    storage = Storage.open(str(tmp_path_factory.mktemp("finished") / "out"))
    write_dataset(storage, make_plan(), tmp_path_factory.mktemp("scratch"))
    return storage


def test_a_published_shard_is_done_and_the_others_are_not(storage, tmp_path):
    plan = open_plan(storage, make_plan())
    assert committed_shards(storage, plan) == {}
    record = publish_one(storage, plan, 1, tmp_path / "scratch")
    assert committed_shards(storage, plan) == {1: ShardSummary.of(record)}
    assert read_commit(storage, plan, 1) == record
    assert read_commit(storage, plan, 0) is None


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_publication_that_stops_before_the_record_is_not_done(
    storage, tmp_path, monkeypatch, steps
):
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    plan = open_plan(storage, make_plan())
    name = ("publish_tar", "publish_parquet", "publish_record")[steps]
    monkeypatch.setattr(manifest, name, kill)
    with pytest.raises(Killed):
        publish_one(storage, plan, 0, tmp_path / "scratch")
    assert committed_shards(storage, plan) == {}
    assert read_commit(storage, plan, 0) is None
    monkeypatch.undo()
    publish_one(storage, plan, 0, tmp_path / "scratch")
    assert list(committed_shards(storage, plan)) == [0]


def test_the_record_says_who_made_what_and_holds_the_times(tmp_path):
    plan = make_plan()
    with ShardWriter(plan, plan.shard(0), tmp_path) as writer:
        record = record_of(plan, fill(writer, plan, plan.shard(0)))
    stored = json.loads(record.to_json())
    assert stored["fingerprint"] == plan.shard_fingerprint(0)
    assert "plan_fingerprint" not in stored
    assert set(stored["files"]) == {"tar", "parquet"}
    assert [b["start"] for b in stored["batches"]] == [0, 4, 8]
    assert CommitRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize(
    "edit",
    [
        {"shard_id": 1},
        {"fingerprint": "0" * 64},
        {"num_samples": 8},
        {"num_samples": 9.0},
        {"attempt": 0},
        {"attempt": True},
        {"extra": 1},
        {"batches": None},
        {"environment": {"torch": 2}},
        {"tar": 1},
        {"parquet": 1},
    ],
)
def test_a_record_that_is_not_exactly_this_shards_is_not_done(finished, edit):
    plan, name = make_plan(), record_name(0)
    good, other = finished.read(name), json.loads(finished.read(record_name(1)))
    files = {**json.loads(good)["files"]}
    if kind := next((kind for kind in files if kind in edit), None):
        edit = {"files": {**files, kind: other["files"][kind]}}
    finished.publish_bytes(json.dumps({**json.loads(good), **edit}).encode(), name)
    try:
        assert sorted(committed_shards(finished, plan)) == [1, 2]
        assert read_commit(finished, plan, 0) is None
    finally:
        finished.publish_bytes(good, name)


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(data=st.binary(max_size=300))
def test_no_bytes_in_a_record_crash_or_finish_a_shard(finished, data):
    plan, name = make_plan(), record_name(2)
    good = finished.read(name)
    try:
        Path(finished.root, name).write_bytes(data)
        assert sorted(committed_shards(finished, plan)) == [0, 1]
    finally:
        Path(finished.root, name).write_bytes(good)


@given(st.data())
def test_a_record_with_bytes_changed_or_cut_never_crashes(data):
    good = bytearray(_example_record())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(good) - 1))
        good[place] = data.draw(st.integers(0, 255))
    CommitRecord.from_json(bytes(good))
    CommitRecord.from_json(bytes(good[: data.draw(st.integers(0, len(good)))]))


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a":' * 50_000, b"1" * 10_000, b"NaN"])
def test_json_made_to_break_parsers_is_no_record(data):
    assert CommitRecord.from_json(data) is None


def _example_record() -> bytes:
    entry = {"name": "train/00000.tar", "size": 5, "sha256": "ab" * 32}
    batch = {"start": 0, "stop": 4, "sampling_s": 0.5, "decoding_s": 0.5, "encoding_s": 0.0}
    record = {
        "shard_id": 0, "fingerprint": "ab" * 32, "num_samples": 4,
        "num_blank": 0, "num_duplicates": 0, "files": {"tar": entry, "parquet": entry},
        "attempt": 1, "worker": "w", "device": "cpu", "threads": 1, "environment": {},
        "batches": [batch], "committed_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    data = json.dumps(record).encode()
    assert CommitRecord.from_json(data) is not None
    return data


@pytest.fixture
def old(tmp_path) -> Storage:
    """A finished dataset as earlier releases left it."""
    write_dataset(Storage.open(tmp_path / "old"), make_plan(), tmp_path / "scratch")
    to_old_layout(tmp_path / "old")
    return Storage.open(tmp_path / "old")


def test_the_records_of_earlier_releases_count_where_there_is_no_newer_one(old, finished):
    plan = make_plan()
    assert old.list("commits") == {}
    found, newer = committed_shards(old, plan), committed_shards(finished, plan)
    assert [record.files for record in found.values()] == [r.files for r in newer.values()]
    read = [read_commit(old, plan, i) for i in range(3)]
    assert [ShardSummary.of(record) for record in read] == list(found.values())
    stored = json.loads(old.read("meta/00001.json"))
    assert list(stored)[:4] == ["shard_id", "fingerprint", "plan_fingerprint", "num_samples"]


def test_a_newer_record_wins_over_an_old_one_and_counts_once(old, finished):
    plan = make_plan()
    record = json.loads(finished.read("commits/00000.json"))
    old.publish_bytes(json.dumps({**record, "attempt": 7}).encode(), "commits/00000.json")
    old.publish_bytes(b"{", "commits/00002.json")
    assert {i: r.attempt for i, r in committed_shards(old, plan).items()} == {0: 7, 1: 1}
    assert read_commit(old, plan, 0).attempt == 7
    assert read_commit(old, plan, 2) is None


@pytest.mark.parametrize("edit", [{"plan_fingerprint": None}, {"plan_fingerprint": "x"}, {"x": 1}])
def test_an_old_record_is_read_as_strictly_as_a_new_one(old, edit):
    stored = json.loads(old.read("meta/00001.json"))
    old.publish_bytes(json.dumps({**stored, **edit}).encode(), "meta/00001.json")
    assert sorted(committed_shards(old, make_plan())) == [0, 2]


def test_one_listing_of_each_folder_finds_what_is_done(finished, monkeypatch):
    asked: list[str] = []
    for name in ("list_with_times", "size", "read"):
        answer = getattr(Storage, name)
        monkeypatch.setattr(
            Storage, name, lambda s, n, a=answer, k=name: (asked.append(f"{k} {n}"), a(s, n))[1]
        )
    committed_shards(finished, make_plan())
    lists = [f"list_with_times {folder}" for folder in (".claims", "commits", "meta", "train")]
    assert sorted(asked) == [*lists, *(f"read commits/0000{i}.json" for i in range(3))]
    asked.clear()
    larger = make_plan({0: 80, 1: 60, 2: 80})
    assert read_commit(finished, larger, 5) is None
    assert asked == ["size train/00005.tar"], "a shard that is made for the first time"


@pytest.mark.parametrize("name", ["train/00000.tar", "meta/00000.parquet"])
def test_a_file_of_another_size_or_none_means_not_done(finished, name):
    plan, good = make_plan(), finished.read(name)
    path = Path(finished.root, name)
    try:
        path.write_bytes(good[:-512])
        assert sorted(committed_shards(finished, plan)) == [1, 2]
        path.unlink()
        assert sorted(committed_shards(finished, plan)) == [1, 2]
        assert read_commit(finished, plan, 0) is None
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("folder", ["commits", "meta"])
def test_foreign_files_beside_the_records_change_nothing(finished, folder):
    plan = make_plan()
    names = [
        "x.json",
        "0.json",
        "000000.json",
        "\u0660" * 5 + ".json",
        "99999.json",
        "-0001.json",
        "00000.json.bak",
    ]
    for name in names:
        Path(finished.root, folder, name).write_bytes(b"{")
    try:
        assert sorted(committed_shards(finished, plan)) == [0, 1, 2]
    finally:
        for name in names:
            Path(finished.root, folder, name).unlink()


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("train/00002.tar", 2), ("meta/00001.parquet", 1), ("commits/00000.json", 0),
        ("meta/00000.json", 0), ("commits/00000.parquet", None), ("train/00000.json", None),
        ("train/00003.tar", None), ("train/2.tar", None), ("train/000002.tar", None),
        ("meta/00002.tar", None), ("train/00002.tar/", None), ("train/00002.tar\n", None),
    ],
)  # fmt: skip
def test_a_name_belongs_to_a_shard_only_if_it_is_spelled_so(name, shard):
    assert planned_shard(name, make_plan()) == shard


def test_extending_leaves_the_earlier_shards_done(storage, tmp_path):
    plan = write_dataset(storage, make_plan(), tmp_path / "scratch")
    before = committed_shards(storage, plan)
    longer = plan.extended_to(make_plan({0: 20, 1: 6, 2: 8}))
    assert committed_shards(storage, longer) == before
    assert longer.num_shards > len(before)


def test_the_indexes_are_those_of_wids_and_open_clip(finished):
    index, sizes = (json.loads(finished.read(n)) for n in ("index.json", "sizes.json"))
    assert index["wids_version"] == 1
    assert [s["url"] for s in index["shardlist"]] == [f"train/0000{i}.tar" for i in range(3)]
    assert sum(s["nsamples"] for s in index["shardlist"]) == 22
    assert all(s["filesize"] == finished.size(s["url"]) for s in index["shardlist"])
    assert sizes == {"00000.tar": 9, "00001.tar": 9, "00002.tar": 4}


def test_sizes_copied_beside_the_tars_are_kept_up_to_date(tmp_path):
    plan, storage = make_plan(), Storage.open(str(tmp_path / "out"))
    write_indexes(storage, plan, {})
    assert storage.size("train/sizes.json") is None, "other readers take every file there for a tar"
    storage.publish_bytes(b"{}", "train/sizes.json")
    write_indexes(storage, plan, {0: publish_one(storage, plan, 0, tmp_path / "scratch")})
    assert json.loads(storage.read("train/sizes.json")) == {"00000.tar": 9}


def test_the_info_file_is_what_timm_reads(finished):
    """timm 1.0.31, data/readers/reader_wds.py: `_load_info` and `_parse_split_info`, with
    `--dataset wds/ --data-dir OUT --train-split train`; shards are joined to the data dir."""
    split = json.loads(finished.read("_info.json"))["splits"]["train"]
    assert split == {
        "name": "train",
        "num_samples": 22,
        "filenames": ["train/00000.tar", "train/00001.tar", "train/00002.tar"],
        "shard_lengths": [9, 9, 4],
    }
    assert all(finished.size(name) for name in split["filenames"])


def test_readers_of_whole_folders_meet_tars_and_parquet_alone(finished):
    """`datasets` 5.2.0 opens all of `load_dataset("webdataset", data_dir=OUT)` as tars, and polars
    2.1.0 refuses a folder with two endings."""
    assert {Path(name).suffix for name in finished.list("train")} == {".tar"}
    assert {Path(name).suffix for name in finished.list("meta")} == {".parquet"}
    table = pandas.read_parquet(Path(finished.root, "meta"))
    assert table["index"].tolist() == list(range(22))


def test_the_rows_of_committed_shards_alone_are_one_line_as_the_readme_has_it(tmp_path):
    write_dataset(Storage.open(tmp_path / "out"), make_plan(), tmp_path / "scratch")
    out = tmp_path / "out"
    (out / "commits" / "00001.json").unlink()
    Path(out, "commits", "failures.jsonl").touch()
    table = pandas.read_parquet(
        [f"{out}/meta/{record.stem}.parquet" for record in Path(f"{out}/commits").glob("*.json")]
    )
    assert sorted(table["index"]) == [*range(9), *range(18, 22)]


def test_the_card_points_the_hub_to_the_shards_and_shows_no_raw_names(finished):
    card = finished.read("README.md").decode()
    _, front, text = card.split("---\n", 2)
    config = yaml.safe_load(front)["configs"][0]
    assert config["data_files"] == [{"split": "train", "path": "train/*.tar"}]
    assert "0.340 of full depth" in text
    assert "../tw\\|o" in text
    rows = [line for line in text.splitlines() if line.startswith("| 2 ")]
    assert len(rows) == 1


def test_indexes_that_are_right_are_not_written_again(finished):
    plan = make_plan()
    before = {n: os.stat(Path(finished.root, n)).st_mtime_ns for n in finished.list("")}
    write_indexes(finished, plan, committed_shards(finished, plan))
    assert {n: os.stat(Path(finished.root, n)).st_mtime_ns for n in finished.list("")} == before


def test_a_card_that_was_edited_is_kept_and_told_and_any_other_is_written_again(tmp_path):
    plan, storage = make_plan(), Storage.open(tmp_path / "out")
    assert not write_indexes(storage, plan, {})
    first = storage.read("README.md")
    records = {0: publish_one(storage, plan, 0, tmp_path / "scratch")}
    assert not write_indexes(storage, plan, records)
    written = storage.read("README.md")
    assert written != first
    assert b"| samples | 9 of 22 planned |" in written
    for edited in (written.replace(b"# fake", b"# My digits"), b"my own\n", b"", first + b"more\n"):
        storage.publish_bytes(edited, "README.md")
        assert write_indexes(storage, plan, records)
        assert storage.read("README.md") == edited
    Path(storage.root, "README.md").unlink()
    assert not write_indexes(storage, plan, records)
    assert storage.read("README.md") == written


def test_publishing_a_shard_twice_gives_the_same_files(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    plan = open_plan(storage, make_plan())
    publish_one(storage, plan, 0, tmp_path / "a")
    names = ("train/00000.tar", "meta/00000.parquet")
    before = [storage.read(n) for n in names]
    with ShardWriter(plan, plan.shard(0), tmp_path / "b") as writer:
        built = fill(writer, plan, plan.shard(0))
        publish_shard(storage, plan, built, replace(record_of(plan, built), attempt=2))
    assert [storage.read(n) for n in names] == before
    assert read_commit(storage, plan, 0).attempt == 1, "what is done stays as it is"
    assert list(committed_shards(storage, plan)) == [0]


def test_a_shard_is_published_record_last(tmp_path, monkeypatch):
    names: list[str] = []
    publish_bytes, publish_file = Storage.publish_bytes, Storage.publish_file
    monkeypatch.setattr(
        Storage, "publish_bytes", lambda s, d, n: (names.append(n), publish_bytes(s, d, n))
    )
    monkeypatch.setattr(
        Storage, "publish_file", lambda s, p, n: (names.append(n), publish_file(s, p, n))
    )
    plan = make_plan()
    with ShardWriter(plan, plan.shard(0), tmp_path / "scratch") as writer:
        built = fill(writer, plan, plan.shard(0))
        publish_shard(Storage.open(str(tmp_path / "out")), plan, built, record_of(plan, built))
    assert names[0].startswith(".claims/0-"), "others are told before the first byte"
    assert names[1:] == ["train/00000.tar", "meta/00000.parquet", "commits/00000.json"]
    assert Storage.open(str(tmp_path / "out")).list(".claims") == {}


def in_doubt(storage: Storage, plan: JobPlan, scratch: Path, monkeypatch, rounds: int) -> None:
    """Publish shard 0 while somebody else, who has a claim, writes over its tar so many times."""
    make_claim(storage, 0)
    publish_record, meddled = manifest.publish_record, []

    def publish_then_meddle(storage: Storage, record: CommitRecord) -> None:
        publish_record(storage, record)
        meddled.append(record)
        if len(meddled) <= rounds:
            storage.publish_bytes(bytes(record.files.tar.size), record.files.tar.name)

    monkeypatch.setattr(manifest, "publish_record", publish_then_meddle)
    publish_one(storage, plan, 0, scratch)


def test_a_shard_that_somebody_writes_over_is_published_again_and_both_claims_stay(
    storage, tmp_path, monkeypatch
):
    plan = open_plan(storage, make_plan())
    in_doubt(storage, plan, tmp_path / "scratch", monkeypatch, rounds=2)
    assert list(committed_shards(storage, plan)) == [0]
    assert len(storage.list(".claims")) == 2
    for name in ("train/00000.tar", "meta/00000.parquet"):
        good = storage.read(name)
        storage.publish_bytes(good[:-1] + b"?", name)
        assert committed_shards(storage, plan) == {}, "a shard with a claim is hashed"
        assert read_commit(storage, plan, 0) is None
        storage.publish_bytes(good, name)
    assert read_commit(storage, plan, 0) is not None


def test_a_shard_that_is_written_over_all_the_time_is_an_error(storage, tmp_path, monkeypatch):
    plan = open_plan(storage, make_plan())
    with pytest.raises(OSError, match="shard 00000 is written by somebody else all the time"):
        in_doubt(storage, plan, tmp_path / "scratch", monkeypatch, rounds=99)
    assert committed_shards(storage, plan) == {}


def test_files_taken_away_while_they_are_read_mean_not_done(storage, tmp_path, monkeypatch):
    plan = open_plan(storage, make_plan())
    publish_one(storage, plan, 0, tmp_path / "scratch")
    make_claim(storage, 0)
    assert list(committed_shards(storage, plan)) == [0]
    open_input = Storage.open_input
    for name in ("commits/00000.json", "train/00000.tar"):

        def gone(storage: Storage, asked: str, name: str = name):
            if asked == name:
                raise FileNotFoundError(asked)
            return open_input(storage, asked)

        monkeypatch.setattr(Storage, "open_input", gone)
        assert committed_shards(storage, plan) == {}


def test_the_indexes_are_in_order_whatever_the_order_of_the_records(finished):
    plan = make_plan()
    records = committed_shards(finished, plan)
    assert index_files(plan, dict(reversed(records.items()))) == index_files(plan, records)


def test_shards_made_in_different_environments_are_told_apart_by_what_differs(finished):
    record = CommitRecord.from_json(finished.read(record_name(0)))
    assert record is not None
    same = {"python": "3.12.1", "torch": "2.13.0"}
    records = [
        ShardSummary.of(replace(record, **changes))
        for changes in (
            {"shard_id": 2, "environment": same, "device": "NVIDIA H100"},
            {"shard_id": 0, "environment": same, "threads": 2},
            {"shard_id": 1, "environment": {**same, "torch": "2.9.0", "pillow": "11"}},
        )
    ]
    assert mixed_environments(records) == {
        "device": {"cpu": (0, 1), "NVIDIA H100": (2,)},
        "pillow": {"none": (0, 2), "11": (1,)},
        "threads": {"2": (0,), "1": (1, 2)},
        "torch": {"2.13.0": (0, 2), "2.9.0": (1,)},
    }
    assert mixed_environments(records[:1]) == mixed_environments([]) == {}


def test_publishing_a_shard_is_eleven_requests_to_a_store(tmp_path, monkeypatch):
    plan, store, asked = make_plan(), object_store(), []
    answer = Storage._asking
    monkeypatch.setattr(
        Storage, "_asking", lambda s, r: (asked.append(r.__qualname__), answer(s, r))[1]
    )
    publish_one(store, plan, 1, tmp_path / "scratch")
    kinds = Counter(name.split(".")[1] for name in asked)
    assert kinds == {"_upload": 4, "size": 5, "_entries": 1, "remove": 1}
