from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.shard_check import Finding, check_shard
from pipeline.request.job_plan import JobPlan
from pipeline.shards.manifest import CommitRecord, parquet_name, record_name, tar_name
from pipeline.shards.samples import encode_image
from pipeline.storage import Storage
from tests.fake_shards import (
    WITH_DEPTH_MAPS,
    committed_anew,
    fake_batch,
    make_plan,
    publish_one,
    rewrite_rows,
    rewrite_tar,
)

Members = list[tuple[str, bytes]]
Rows = list[dict[str, Any]]
SHARD = 1  # the images 9 to 17
TAR, PARQUET = tar_name(SHARD), parquet_name(SHARD)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, JobPlan]]:
    """A folder with one shard of a plan, made once."""
    known: dict[str, tuple[Path, JobPlan]] = {}

    def make(**changes: Any) -> tuple[Path, JobPlan]:
        if str(changes) not in known:
            folder, plan = tmp_path_factory.mktemp("made"), make_plan(**changes)
            publish_one(Storage.open(folder / "out"), plan, SHARD, folder / "scratch")
            known[str(changes)] = folder / "out", plan
        return known[str(changes)]

    return make


class Shard:
    """A copy of the shard to do damage to."""

    def __init__(self, made: Any, tmp_path: Path, **changes: Any) -> None:
        folder, self.plan = made(**changes)
        shutil.copytree(folder, tmp_path / "out")
        self.storage = Storage.open(tmp_path / "out")

    def check(self) -> Finding:
        record = CommitRecord.from_json(self.storage.read(record_name(SHARD)))
        assert record is not None
        return check_shard(self.storage, self.plan, record)

    def found(
        self,
        tar: Callable[[Members], object] | None = None,
        rows: Callable[[Rows], object] | None = None,
    ) -> list[tuple[str, str]]:
        """The problems after changes that the record was made to fit."""
        if rows is not None:
            rewrite_rows(self.storage, SHARD, rows)
        if tar is not None:
            rewrite_tar(self.storage, SHARD, tar)
        committed_anew(self.storage, SHARD)
        return self.check().problems


@pytest.fixture
def shard(made: Any, tmp_path: Path) -> Shard:
    return Shard(made, tmp_path)


def set_member(place: int, data: bytes) -> Callable[[Members], object]:
    return lambda members: members.__setitem__(place, (members[place][0], data))


def changed_json(place: int, **fields: object) -> Callable[[Members], object]:
    def change(members: Members) -> None:
        name, data = members[place]
        assert name.endswith(".json")
        members[place] = (name, json.dumps({**json.loads(data), **fields}).encode())

    return change


def test_a_whole_shard_has_no_problem_and_its_labels_are_counted(shard: Shard):
    finding = shard.check()
    assert finding.problems == []
    assert finding.subjects == Counter(shard.plan.shard(SHARD).labels.tolist())
    assert finding.subjects.total() == 9


@pytest.mark.parametrize("name", [TAR, PARQUET])
def test_a_file_that_is_taken_away_while_it_is_read_is_missing(shard: Shard, name: str):
    shard.storage.remove(name)
    ((kind, message),) = shard.check().problems
    assert kind == "missing"
    assert message.startswith("taken away while it was read: ")


def test_bytes_behind_the_end_of_the_tar_are_not_what_was_committed(shard: Shard):
    """Its reader stops before them."""
    shard.storage.publish_bytes(shard.storage.read(TAR) + b"\0" * 3 * 2**20 + b"x", TAR)
    assert shard.check().problems == [("hash", f"{TAR}: it is not what was committed")]


def test_rows_are_read_whatever_their_hash_is(shard: Shard):
    rewrite_rows(shard.storage, SHARD, lambda rows: rows[0].update(class_name="other"))
    hashed, labels, *_ = shard.check().problems
    assert hashed == ("hash", f"{PARQUET} is not what was committed")
    assert labels == ("labels", f"{PARQUET}: 1 labels, first 000000000009")


# Rows


def test_wrong_rows_are_counted_and_the_first_is_named(shard: Shard):
    def change(rows: Rows) -> None:
        rows[2].update(class_name="other")
        rows[7].update(class_name="other")
        rows[4].update(label=(rows[4]["label"] + 1) % 3)

    first, *others = shard.found(rows=change)
    assert first == ("labels", f"{PARQUET}: 3 labels, first 000000000011")
    assert [kind for kind, _ in others] == ["content"] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop(),
        lambda rows: rows.reverse(),
        lambda rows: rows[0].update(key="000000000001"),
        lambda rows: rows[8].update(index=18),
    ],
)
def test_rows_that_are_not_those_of_the_plan_end_the_reading(shard: Shard, change):
    message = f"{PARQUET} does not have one row for each planned sample, in order"
    assert shard.found(rows=change) == [("unreadable", message)]


def test_a_parquet_that_is_none_is_named_with_its_reason(shard: Shard):
    shard.storage.publish_bytes(b"x" * 400, PARQUET)
    (damaged,) = shard.found()
    assert damaged[0] == "unreadable"
    assert damaged[1].startswith(f"{PARQUET}: the Parquet is damaged or cut off: ")


# The tar against the rows


def test_a_sample_less_and_a_sample_more_are_named(shard: Shard):
    last: Members = []

    def cut(members: Members) -> None:
        last.extend(members[-3:])
        del members[-3:]

    ends = f"{TAR}: it ends before the sample 000000000017"
    assert shard.found(tar=cut) == [("unreadable", ends)]
    more = [(f"000000000018.{name.partition('.')[2]}", data) for name, data in last]
    more_told = f"{TAR}: the sample 000000000018 is not the next one"
    assert shard.found(tar=lambda members: members.extend([*last, *more])) == [
        ("unreadable", more_told)
    ]
    assert shard.found(tar=lambda members: members.__delitem__(slice(3, 6))) == [
        ("unreadable", f"{TAR}: the sample 000000000011 is not the next one")
    ]


def test_only_a_row_that_is_ok_has_a_sample(shard: Shard):
    told = f"{TAR}: the sample 000000000011 is not the next one"
    assert shard.found(rows=lambda rows: rows[2].update(status="failed")) == [("unreadable", told)]


def test_a_label_is_compared_with_the_plan_and_with_the_row(shard: Shard):
    label = int(shard.plan.shard(SHARD).labels[1])
    wrong = (label + 1) % 3
    told = f"{TAR}: 000000000010"
    in_tar = ("labels", f"{told} has label {wrong}")
    between = ("content", f"{told}: label {wrong} in the tar, {label} in the Parquet")
    assert shard.found(tar=set_member(3, b"%d" % wrong)) == [in_tar, between]


def content(shard: Shard, **changes: Any) -> str:
    """What is said of the one sample that differs, the third."""
    ((kind, message),) = shard.found(**changes)
    prefix = f"{TAR}: 000000000011: "
    assert kind == "content"
    assert message.startswith(prefix)
    return message.removeprefix(prefix)


def test_an_image_of_other_bytes_is_another_whether_its_size_or_its_hash_tells(shard: Shard):
    another = "the image is another than in the Parquet"
    for field in ({"image_bytes": 3}, {"image_sha256": "0" * 64}):
        before: Rows = []

        def change(rows: Rows, field: Any = field, before: Rows = before) -> None:
            before.append(dict(rows[2]))
            rows[2].update(field)

        assert content(shard, rows=change) == another
        shard.found(rows=lambda rows, before=before: rows[2].update(before[0]))
    assert shard.check().problems == []


def refit(rows: Rows, image: bytes, **fields: Any) -> None:
    digest = hashlib.sha256(image).hexdigest()
    rows[2].update(image_sha256=digest, image_bytes=len(image), **fields)


def test_what_is_no_image_cannot_be_decoded(shard: Shard):
    said = content(shard, tar=set_member(8, b"x"), rows=lambda rows: refit(rows, b"x"))
    assert said.startswith("it cannot be decoded: the image cannot be decoded: ")


@pytest.mark.parametrize("data", [b"not json", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_cannot_be_decoded(shard: Shard, data: bytes):
    assert content(shard, tar=set_member(7, data)).startswith("it cannot be decoded: ")


@pytest.mark.parametrize("change", [{"width": 8}, {"height": 8}])
def test_the_size_of_an_image_is_that_of_its_row(shard: Shard, change):
    assert content(shard, rows=lambda rows: rows[2].update(change)) == "the image is 7 x 7 pixels"


def test_pixels_are_compared_where_the_format_keeps_them(made: Any, tmp_path: Path):
    for image_format, place in (("png", 8), ("jpg", 7)):
        shard = Shard(made, tmp_path / image_format, image_format=image_format)
        other = encode_image(fake_batch(shard.plan, [3]).images_BHWC[0], image_format).image
        found = shard.found(set_member(place, other), lambda rows, data=other: refit(rows, data))
        said = f"{TAR}: 000000000011: the pixels are others than in the Parquet"
        assert found == ([("content", said)] if image_format == "png" else [])


@pytest.mark.parametrize(
    "fields", [{"index": 3}, {"label": 7}, {"class_name": "other"}, {"pixel_sha256": "0" * 64}]
)
def test_what_the_json_says_is_what_the_row_says(shard: Shard, fields):
    said = "the .json member says something else than the Parquet"
    assert content(shard, tar=changed_json(7, **fields)) == said


def test_json_that_is_no_object_says_something_else(shard: Shard):
    said = "the .json member says something else than the Parquet"
    assert content(shard, tar=set_member(7, b"[]")) == said


def test_a_depth_map_is_there_where_it_was_planned_and_nowhere_else(made: Any, tmp_path: Path):
    with_maps = Shard(made, tmp_path / "with", **WITH_DEPTH_MAPS)
    assert with_maps.check().problems == []
    depths: Members = []

    def deeper(members: Members) -> None:
        members[9] = (members[9][0], members[9][1][:-1] + b"\x04")

    assert content(with_maps, tar=deeper).startswith("it cannot be decoded: got scales of mean dep")
    gone = content(with_maps, tar=lambda members: depths.append(members.pop(9)))
    assert gone == "it has no depth map"
    without = Shard(made, tmp_path / "without")
    assert (
        content(without, tar=lambda members: members.insert(7, depths[0])) == "it has a depth map"
    )


# How much is told


@pytest.mark.parametrize("num_wrong", [2, 3, 9])
def test_of_many_findings_in_a_tar_three_are_told_the_whole_file_first(
    shard: Shard, num_wrong: int
):
    def change(members: Members) -> None:
        for place in range(num_wrong):
            changed_json(3 * place + 1, index=0)(members)

    rewrite_tar(shard.storage, SHARD, change)
    said = "the .json member says something else than the Parquet"
    messages = [f"{key:012}: {said}" for key in range(9, 9 + num_wrong)]
    if num_wrong > 2:
        messages[2:] = [f"and {num_wrong - 2} more findings"]
    assert shard.check().problems == [
        ("hash", f"{TAR}: it is not what was committed"),
        *(("content", f"{TAR}: {message}") for message in messages),
    ]
