from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset.report import survey as module
from pipeline.dataset.report.survey import Survey, spread, survey
from pipeline.request.job_plan import JobPlan, key_of
from pipeline.storage import Storage
from tests.fake_shards import (
    committed_anew,
    fake_batch,
    make_plan,
    object_store,
    rewrite_tar,
    write_dataset,
)


def surveyed(storage: Storage, scratch: Path, **changes: object) -> Survey:
    plan = write_dataset(storage, make_plan(**changes), scratch)
    return survey(storage, plan, 2)


def certainties(plan: JobPlan) -> dict[str, float]:
    """What the fake sampler says of every image, by key."""
    batch = fake_batch(plan, range(plan.num_samples))
    means = batch.mean_log_prob_BS.mean(axis=1)
    return {key_of(i): float(mean) for i, mean in enumerate(means)}


def test_a_choice_is_even_and_holds_both_ends():
    assert spread(range(3), 5) == [0, 1, 2]
    assert spread(range(101), 5) == [0, 25, 50, 75, 100]
    assert spread([], 5) == []


@pytest.mark.parametrize("is_local", [True, False], ids=["folder", "store"])
def test_images_stand_with_their_class_and_the_extremes_in_order(tmp_path: Path, is_local: bool):
    storage = Storage.open(tmp_path / "out") if is_local else object_store()
    found = surveyed(storage, tmp_path / "scratch")
    plan, wanted = found.plan, certainties(found.plan)
    assert [name for name, _ in found.by_subject] == list(plan.class_names[:3])
    labels = plan.total_counts.labels(0, 22)
    for class_id, (name, pictures) in enumerate(found.by_subject):
        keys = [key_of(int(i)) for i in np.flatnonzero(labels == class_id)]
        assert [p.key for p in pictures] == [keys[0], keys[-1]]
        for p in pictures:
            assert p.subject == name
            assert (p.image_HWC == fake_batch(plan, [int(p.key)]).images_BHWC[0]).all()
            assert p.certainty == pytest.approx(wanted[p.key])
    ranked = sorted(wanted, key=lambda key: wanted[key])
    assert [p.key for p in found.least_certain] == ranked[:11]
    assert [p.key for p in found.most_certain] == ranked[::-1][:11]
    assert found.problems == []


def test_of_a_large_dataset_few_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SHARDS_WITH_ROWS", 3)
    monkeypatch.setattr(module, "SHARDS_WITH_IMAGES", 2)
    monkeypatch.setattr(module, "ROWS_WITH_IMAGES", 2)
    storage = Storage.open(tmp_path / "out")
    plan = write_dataset(storage, make_plan(samples_per_shard=3), tmp_path / "scratch")
    opened: list[str] = []
    open_input = Storage.open_input

    def recording(self: Storage, name: str) -> object:
        opened.append(name)
        return open_input(self, name)

    monkeypatch.setattr(Storage, "open_input", recording)
    found = survey(storage, plan, 8)
    data = sorted(name for name in opened if not name.endswith((".json", ".jsonl")))
    parquet = [f"meta/0000{i}.parquet" for i in (0, 4, 7)]
    assert data == [*parquet, "train/00000.tar", "train/00007.tar"]
    assert found.rows is not None
    assert found.rows.index_N.tolist() == [0, 1, 2, 12, 13, 14, 21]
    shown = {p.key for _, pictures in found.by_subject for p in pictures}
    assert shown == {key_of(i) for i in (0, 1, 21)}
    assert {p.key for p in (*found.least_certain, *found.most_certain)} <= shown
    assert found.num_samples == 22


def test_of_many_classes_forty_are_shown(tmp_path: Path):
    names = tuple(f"class {i}" for i in range(80))
    counts = dict.fromkeys(range(79), 1)
    storage = Storage.open(tmp_path / "out")
    changes = {"counts": counts, "class_names": names, "samples_per_shard": 40}
    found = surveyed(storage, tmp_path / "scratch", **changes)
    assert [name for name, _ in found.by_subject] == [f"class {2 * i}" for i in range(40)]
    assert sum(len(pictures) for _, pictures in found.by_subject) == 40


def test_what_is_damaged_is_named_and_the_rest_shown(tmp_path: Path):
    storage = Storage.open(tmp_path / "out")
    plan = write_dataset(storage, make_plan(), tmp_path / "scratch")

    def swap(members: list[tuple[str, bytes]]) -> None:
        (first, _), (_, image) = members[2], members[5]
        members[2] = (first, image)

    rewrite_tar(storage, 0, swap)
    committed_anew(storage, 0)
    rows = tmp_path / "out" / "meta" / "00001.parquet"
    rows.write_bytes(b"x" * rows.stat().st_size)
    found = survey(storage, plan, 8)
    assert [problem.partition(": ")[0] for problem in found.problems] == [
        "meta/00001.parquet",
        "train/00000.tar",
    ]
    assert f"the image of {key_of(0)} is not the one that was committed" in found.problems[1]
    assert {p.key for _, pictures in found.by_subject for p in pictures} == {
        key_of(i) for i in range(18, 22)
    }


def test_a_job_that_is_under_way_counts_what_is_committed(tmp_path: Path):
    storage = Storage.open(tmp_path / "out")
    plan = write_dataset(storage, make_plan(), tmp_path / "scratch")
    (tmp_path / "out" / "commits" / "00001.json").unlink()
    found = survey(storage, plan, 8)
    made = [*range(9), *range(18, 22)]
    labels = plan.total_counts.labels(0, 22)[made]
    assert found.committed_counts() == Counter(labels.tolist())
    assert found.num_samples == 13
    for folder in ("commits", "meta", "train"):
        for file in (tmp_path / "out" / folder).iterdir():
            file.unlink()
    empty = survey(storage, plan, 8)
    assert (empty.records, empty.rows, empty.by_subject, empty.problems) == ({}, None, [], [])
    assert empty.committed_counts() == {0: 0, 1: 0, 2: 0}


def test_the_ledger_says_what_failed_and_what_was_given_up(tmp_path: Path):
    storage = Storage.open(tmp_path / "out")
    plan = write_dataset(storage, make_plan(samples_per_shard=3), tmp_path / "scratch")
    for shard_id in (2, 3, 4, 5):
        (tmp_path / "out" / "commits" / f"0000{shard_id}.json").unlink()

    def line(shard_id: int, cause: str, set_aside: bool, /, **changes: object) -> str:
        entry = {
            "shard_id": shard_id,
            "fingerprint": plan.shard_fingerprint(shard_id),
            "failures": 1,
            "set_aside": set_aside,
            "cause": cause,
            "error": "it broke",
            "at": "2026-01-02T03:04:05+00:00",
        }
        return json.dumps({**entry, **changes})

    lines = [
        line(2, "shard", False),
        "no line",
        line(2, "shard", True),
        line(3, "shard", True),
        line(3, "node", False),
        line(4, "storage", True),
        line(0, "shard", True),
        line(5, "shard", True, fingerprint="ab" * 32),
        line(5, "shard", True, shard_id=99),
    ]
    storage.publish_bytes("\n".join(lines).encode(), "commits/failures.jsonl")
    found = survey(storage, plan, 1)
    assert [failure.shard_id for failure in found.failures] == [2, 2, 3, 4, 0]
    assert found.set_aside == [2]
