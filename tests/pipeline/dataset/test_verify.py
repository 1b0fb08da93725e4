from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.dataset.verify import Problem, Report, verify
from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import open_plan
from pipeline.shards import committed
from pipeline.shards.card import sealed
from pipeline.shards.claims import make_claim
from pipeline.shards.committed import committed_shards, keep_summaries
from pipeline.shards.indexes import write_indexes
from pipeline.shards.manifest import parquet_name, record_name, tar_name
from pipeline.storage import Storage
from tests.fake_shards import (
    WITH_DEPTH_MAPS,
    committed_anew,
    make_plan,
    object_store,
    publish_one,
    rewrite_rows,
    rewrite_tar,
    write_dataset,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JobPlan]:
    folder = tmp_path_factory.mktemp("made")
    storage = Storage.open(folder / "out")
    return folder / "out", write_dataset(storage, make_plan(), folder / "scratch")


@pytest.fixture
def out(made: tuple[Path, JobPlan], tmp_path: Path) -> tuple[Storage, JobPlan]:
    return Storage.open(shutil.copytree(made[0], tmp_path / "out")), made[1]


def found(report: Report) -> list[tuple[int | None, str]]:
    return sorted({(p.shard, p.kind) for p in report.problems}, key=str)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_a_good_dataset_has_no_problem(tmp_path, deep, image_format):
    storage = Storage.open(str(tmp_path / "out"))
    plan = make_plan(image_format=image_format, image_channels=3)
    write_dataset(storage, plan, tmp_path / "scratch")
    ticks: list[int] = []
    report = verify(storage, plan, deep, ticks.append, threads=2)
    assert report.is_sound
    assert (report.num_shards, report.num_sound, report.num_samples) == (3, 3, 22)
    assert report.shards_to_make == ()
    assert sum(ticks) == 3


def test_a_store_is_verified_as_a_folder_is(tmp_path):
    storage = object_store()
    plan = write_dataset(storage, make_plan(), tmp_path)
    assert verify(storage, plan, deep=True).is_sound
    data = bytearray(storage.read(tar_name(1)))
    data[700] ^= 4
    storage.publish_bytes(bytes(data), tar_name(1))
    assert verify(storage, plan, deep=True).shards_to_make == (1,)


def test_an_unfinished_dataset_names_the_shards_to_make(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    plan = open_plan(storage, make_plan())
    publish_one(storage, plan, 1, tmp_path / "scratch")
    ticks: list[int] = []
    for deep in (False, True):
        report = verify(storage, plan, deep, ticks.append)
        assert report.shards_to_make == report.not_made == (0, 2)
        assert found(report) == []
        assert not report.is_sound
        assert (report.num_shards, report.num_sound, report.num_samples) == (3, 1, 9)
        assert report.records.keys() == {1}
        assert report.is_deep == deep
        assert report.notes == ()
    assert sum(ticks) == 6


def test_verifying_changes_nothing(out):
    storage, plan = out

    def state() -> dict[str, tuple[int, int]]:
        paths = Path(storage.root).rglob("*")
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in paths}

    before = state()
    verify(storage, plan, deep=True)
    assert state() == before


@pytest.mark.parametrize("name", [tar_name(1), parquet_name(1)])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_is_found_by_reading_everything(out, name, part):
    storage, plan = out
    data = bytearray(storage.read(name))
    data[int(part * (len(data) - 1))] ^= 0x10
    storage.publish_bytes(bytes(data), name)
    assert verify(storage, plan).is_sound
    report = verify(storage, plan, deep=True)
    assert report.shards_to_make == (1,)
    assert (1, "hash") in found(report)
    assert all(problem.is_hidden for problem in report.problems)
    assert (report.num_sound, report.num_samples) == (2, 13)


@pytest.mark.parametrize("name", [tar_name(0), parquet_name(0)])
def test_a_truncated_file_is_found_by_its_size(out, name):
    storage, plan = out
    whole = storage.read(name)
    storage.publish_bytes(whole[:-1024], name)
    said = f"{name} has {len(whole) - 1024} bytes, wanted {len(whole)}"
    assert verify(storage, plan).problems == (Problem(0, "size", said),)


@pytest.mark.parametrize(
    "names",
    [
        *([tar_name(2)], [parquet_name(2)], [record_name(2)]),
        *([tar_name(2), parquet_name(2)], [parquet_name(2), record_name(2)]),
    ],
)
def test_missing_files_are_named(out, names):
    storage, plan = out
    for name in names:
        Path(storage.root, name).unlink()
    said = f"{' and '.join(names)} missing"
    assert verify(storage, plan).problems == (Problem(2, "missing", said),)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff" * 99])
def test_a_record_that_is_none_is_found(out, data):
    storage, plan = out
    storage.publish_bytes(data, record_name(0))
    said = f"{record_name(0)} is not a commit record ({len(data)} bytes)"
    assert verify(storage, plan).problems == (Problem(0, "record", said),)


def test_a_record_that_is_taken_away_meanwhile_is_none(out, monkeypatch):
    storage, plan = out
    read = Storage.read

    def without(self: Storage, name: str) -> bytes:
        if name == record_name(0):
            raise FileNotFoundError(name)
        return read(self, name)

    monkeypatch.setattr(Storage, "read", without)
    assert found(verify(storage, plan)) == [(0, "record")]


def test_a_record_of_another_plan_is_found(out, tmp_path):
    storage, plan = out
    publish_one(storage, make_plan(seed=77), 1, tmp_path / "scratch")
    said = f"{record_name(1)} belongs to another plan"
    report = verify(storage, plan)
    assert report.problems == (Problem(1, "record", said),)
    assert report.shards_to_make == (1,)


def test_a_record_of_another_shard_is_found(out):
    storage, plan = out
    other = json.loads(storage.read(record_name(0)))
    other["fingerprint"] = plan.shard_fingerprint(1)
    storage.publish_bytes(json.dumps(other).encode(), record_name(1))
    said = f"{record_name(1)} does not describe this shard"
    assert verify(storage, plan).problems == (Problem(1, "record", said),)
    other["files"]["tar"]["name"] = "train/00009.tar"  # which is not there
    storage.publish_bytes(json.dumps(other).encode(), record_name(1))
    assert verify(storage, plan).problems == (Problem(1, "record", said),)


def test_a_claimed_shard_is_hashed_without_being_asked(out):
    storage, plan = out
    for shard_id in (0, 1):
        make_claim(storage, shard_id)
    data = bytearray(storage.read(tar_name(1)))
    data[700] ^= 4
    storage.publish_bytes(bytes(data), tar_name(1))
    said = f"{tar_name(1)} or its Parquet is of another run than {record_name(1)}"
    assert verify(storage, plan).problems == (Problem(1, "hash", said),)


def test_swapped_labels_in_the_tar_are_found_even_under_a_fitting_record(out):
    storage, plan = out

    def swap(members: list[tuple[str, bytes]]) -> None:
        members[0], members[3] = (members[0][0], members[3][1]), (members[3][0], members[0][1])

    rewrite_tar(storage, 0, swap)
    committed_anew(storage, 0)
    report = verify(storage, plan, deep=True)
    assert report.shards_to_make == (0,)
    assert {(0, "labels"), (0, "content")} <= set(found(report))


def test_labels_wrong_in_tar_rows_and_record_break_the_histogram(out):
    storage, plan = out
    wrong = (int(plan.shard(0).labels[0]) + 1) % 3

    def relabel(members: list[tuple[str, bytes]]) -> None:
        members[0] = (members[0][0], b"%d" % wrong)

    rewrite_tar(storage, 0, relabel)
    rewrite_rows(storage, 0, lambda rows: rows[0].update(label=wrong))
    committed_anew(storage, 0)
    report = verify(storage, plan, deep=True)
    assert {(None, "histogram"), (0, "labels")} <= set(found(report))
    assert report.shards_to_make == (0,)
    right = int(plan.shard(0).labels[0])
    planned = {0: 8, 1: 6, 2: 8}
    there = {**planned, right: planned[right] - 1, wrong: planned[wrong] + 1}
    shown = [f"class {c}: {there[c]} for {planned[c]}" for c in sorted((right, wrong))]
    (told,) = [p for p in report.problems if p.kind == "histogram"]
    assert told.message == f"2 classes off their counts: {', '.join(shown)}"


def test_no_histogram_is_told_of_shards_that_could_not_be_read(out):
    storage, plan = out
    storage.publish_bytes(b"x" * 400, parquet_name(0))
    committed_anew(storage, 0)
    assert found(verify(storage, plan, deep=True)) == [(0, "unreadable")]


def test_of_many_classes_off_their_counts_three_are_told(tmp_path):
    storage = Storage.open(tmp_path / "out")
    plan = write_dataset(storage, make_plan({0: 1, 1: 1, 2: 1, 3: 1}), tmp_path / "scratch")

    def relabel(members: list[tuple[str, bytes]]) -> None:
        members[:] = [(n, b"9" if n.endswith("cls") else data) for n, data in members]

    rewrite_tar(storage, 0, relabel)
    committed_anew(storage, 0)
    (told,) = [p for p in verify(storage, plan, deep=True).problems if p.kind == "histogram"]
    shown = "class 0: 0 for 1, class 1: 0 for 1, class 2: 0 for 1"
    assert told.message == f"5 classes off their counts: {shown}"


def test_swapped_images_are_found_even_under_a_fitting_record(out):
    storage, plan = out

    def swap(members: list[tuple[str, bytes]]) -> None:
        members[2], members[5] = (members[2][0], members[5][1]), (members[5][0], members[2][1])

    rewrite_tar(storage, 2, swap)
    committed_anew(storage, 2)
    report = verify(storage, plan, deep=True)
    assert (2, "content") in found(report)
    assert report.shards_to_make == (2,)


def test_a_depth_map_that_is_not_the_plans_is_found(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    plan = write_dataset(storage, make_plan(**WITH_DEPTH_MAPS), tmp_path / "scratch")
    assert verify(storage, plan, deep=True).is_sound

    def deeper(members: list[tuple[str, bytes]]) -> None:
        name, data = members[1]
        assert name.endswith(".depth.npy")
        members[1] = (name, data[:-1] + b"\x04")

    rewrite_tar(storage, 0, deeper)
    committed_anew(storage, 0)
    rewrite_tar(storage, 1, lambda members: members.pop(1))
    committed_anew(storage, 1)
    first, second = verify(storage, plan, deep=True).problems
    assert (first.shard, first.kind) == (0, "content")
    assert "got scales of mean depth" in first.message
    assert (second.shard, second.kind) == (1, "content")
    assert "it has no depth map" in second.message


def test_an_image_with_other_pixels_than_hashed_is_found_even_if_its_row_fits_the_file(out):
    storage, plan = out
    images: list[bytes] = []

    def repeat_first(members: list[tuple[str, bytes]]) -> None:
        images.append(members[2][1])
        members[5] = (members[5][0], images[0])

    def fit(rows: list[dict]) -> None:
        digest = hashlib.sha256(images[0]).hexdigest()
        rows[1].update(image_sha256=digest, image_bytes=len(images[0]))

    rewrite_tar(storage, 0, repeat_first)
    rewrite_rows(storage, 0, fit)
    committed_anew(storage, 0)
    problems = [p for p in verify(storage, plan, deep=True).problems if p.shard == 0]
    assert len(problems) == 1
    assert "the pixels are others" in problems[0].message


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop(),
        lambda m: m.__delitem__(slice(0, 3)),
        lambda m: m.append(("extra.txt", b"x")),
        lambda m: m.append(m[0]),
        lambda m: m.reverse(),
        lambda m: m.__setitem__(1, (m[1][0], b"{}")),
        lambda m: m.__setitem__(1, (m[1][0], b"not json")),
        lambda m: m.__setitem__(0, (m[0][0], b"\xd9\xa1")),
        lambda m: m.__setitem__(2, (m[2][0], b"no image")),
    ],
    ids=["member", "sample", "extra", "twice", "order", "json", "no-json", "label", "image"],
)
def test_a_tar_that_disagrees_with_its_rows_is_found(out, change):
    storage, plan = out
    rewrite_tar(storage, 1, change)
    committed_anew(storage, 1)
    assert verify(storage, plan, deep=True).shards_to_make == (1,)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop(),
        lambda rows: rows.reverse(),
        lambda rows: rows[0].update(key="000000000001"),
        lambda rows: rows[0].update(class_name="other"),
        lambda rows: rows[3].update(pixel_sha256="0" * 64),
        lambda rows: rows[3].update(image_sha256="0" * 64),
        lambda rows: rows[3].update(width=8),
    ],
)
def test_rows_that_disagree_with_plan_or_tar_are_found(out, change):
    storage, plan = out
    rewrite_rows(storage, 0, change)
    committed_anew(storage, 0)
    assert verify(storage, plan, deep=True).shards_to_make == (0,)


def test_a_parquet_that_is_none_is_found(out):
    storage, plan = out
    storage.publish_bytes(b"x" * 400, parquet_name(0))
    committed_anew(storage, 0)
    assert (0, "unreadable") in found(verify(storage, plan, deep=True))


@pytest.mark.parametrize(
    "name",
    [
        *("train/notes.txt", "train/00099.tar", "train/a/b.tar", "meta/0.json", "meta/sizes.json"),
        *("commits/0.json", "commits/00000.parquet", "commits/failures.json"),
    ],
)
def test_files_that_do_not_belong_are_named_and_make_nothing_again(out, name):
    storage, plan = out
    storage.publish_bytes(b"x", name)
    report = verify(storage, plan)
    assert found(report) == [(None, "stray")]
    assert report.shards_to_make == ()


def test_what_the_job_itself_leaves_is_no_stray(out):
    storage, plan = out
    for name in (
        *("commits/failures.jsonl", "meta/failures.jsonl", "contact_sheet.png"),
        *("train/.tmp-0-00000.tar", "train/sizes.json"),
    ):
        storage.publish_bytes(b"x", name)
    assert verify(storage, plan, deep=True).is_sound


@pytest.mark.parametrize(
    "name", [".DS_Store", "._00000.tar", "Thumbs.db", "desktop.ini", "@eaDir/00000.tar"]
)
def test_what_systems_leave_in_a_dataset_is_no_finding(out, name):
    storage, plan = out
    for folder in ("train", "meta"):
        storage.publish_bytes(b"x", f"{folder}/{name}")
    assert verify(storage, plan, deep=True).is_sound


@pytest.mark.parametrize("name", ["sizes.json", "index.json", "README.md"])
def test_an_index_that_is_missing_or_not_up_to_date_is_found(out, name):
    storage, plan = out
    problem = Problem(None, "index", f"{name} is missing or not up to date")
    if name != "README.md":
        storage.publish_bytes(b"{}", name)
        assert verify(storage, plan).problems == (problem,)
    storage.remove(name)
    assert verify(storage, plan).problems == (problem,)
    write_indexes(storage, plan, committed_shards(storage, plan))
    assert verify(storage, plan).is_sound


def test_the_facts_that_earlier_releases_did_not_write_are_a_note(out):
    storage, plan = out
    storage.remove("_info.json")
    report = verify(storage, plan)
    assert report.problems == ()
    said = "_info.json is missing, as earlier releases left it: generate writes it"
    assert report.notes == (said,)
    storage.publish_bytes(b"{}", "_info.json")
    assert found(verify(storage, plan)) == [(None, "index")]


def test_strays_are_told_in_order_with_folders_as_such(out):
    storage, plan = out
    for name in ("train/z.txt", "train/a/b.tar", "meta/x", "commits/00000.tar"):
        storage.publish_bytes(b"x", name)
    assert verify(storage, plan).problems == tuple(
        Problem(None, "stray", f"{name} is not part of the dataset")
        for name in ("commits/00000.tar", "meta/x", "train/a/", "train/z.txt")
    )


def test_a_card_that_is_not_the_plans_is_a_note_that_says_what_generate_does(out):
    storage, plan = out
    card = storage.read("README.md")
    storage.publish_bytes(card.replace(b"synthetic", b"mine"), "README.md")
    report = verify(storage, plan)
    assert (report.problems, report.notes) == ((), ("README.md was edited: generate keeps it",))
    storage.publish_bytes(sealed("# of fewer shards\n"), "README.md")
    report = verify(storage, plan)
    assert (report.problems, report.notes) == ((), ("README.md is not up to date",))


def test_many_findings_in_one_shard_are_told_in_short(out):
    storage, plan = out

    def blank(members: list[tuple[str, bytes]]) -> None:
        members[:] = [(n, json.dumps({}).encode() if n.endswith("json") else d) for n, d in members]

    rewrite_tar(storage, 0, blank)
    committed_anew(storage, 0)
    problems = [p for p in verify(storage, plan, deep=True).problems if p.shard == 0]
    assert len(problems) == 4
    assert problems[-1].message.endswith("and 6 more findings")


def test_a_deep_check_reads_every_record_whatever_the_summaries_say(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "FEWEST_KEPT", 1)
    storage = Storage.open(tmp_path / "out")
    plan = write_dataset(storage, make_plan(), tmp_path / "scratch")
    keep_summaries(storage, plan)
    record = tmp_path / "out" / record_name(1)
    before = record.stat()
    record.write_bytes(b" " * before.st_size)
    os.utime(record, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert verify(storage, plan).is_sound
    assert [(p.shard, p.kind) for p in verify(storage, plan, deep=True).problems] == [(1, "record")]
