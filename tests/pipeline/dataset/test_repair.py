from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline.dataset.repair import Repair, repair
from pipeline.dataset.verify import verify
from pipeline.request.job_plan import JobPlan
from pipeline.shards.claims import CLAIMS_FOLDER, make_claim
from pipeline.shards.committed import committed_shards
from pipeline.shards.manifest import FOLDERS, old_record_name, parquet_name, record_name, tar_name
from pipeline.shards.text_states import TEXT_FOLDER
from pipeline.storage import TEMP_PREFIX, Storage
from tests.fake_shards import make_plan, write_dataset

MINUTES_OLD = 61


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JobPlan]:
    folder = tmp_path_factory.mktemp("made")
    plan = write_dataset(Storage.open(folder / "out"), make_plan(), folder / "scratch")
    return folder / "out", plan


@pytest.fixture
def out(made: tuple[Path, JobPlan], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "out")


@pytest.fixture
def plan(made: tuple[Path, JobPlan]) -> JobPlan:
    return made[1]


def repaired(out: Path, plan: JobPlan) -> Repair:
    storage = Storage.open(out)
    return repair(storage, plan, verify(storage, plan, deep=True))


def damage(out: Path, shard_id: int) -> None:
    file = out / tar_name(shard_id)
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def make_old(*files: Path, minutes: int = MINUTES_OLD) -> None:
    for file in files:
        file.touch()
        os.utime(file, (time.time() - 60 * minutes,) * 2)


def test_a_sound_dataset_is_left_as_it_is(out: Path, plan: JobPlan):
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert repaired(out, plan) == Repair((), 0)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before


def test_a_bad_shard_loses_its_record_and_keeps_its_files(out: Path, plan: JobPlan):
    damage(out, 1)
    assert repaired(out, plan) == Repair((1,), 0)
    assert committed_shards(Storage.open(out), plan).keys() == {0, 2}
    assert (out / tar_name(1)).exists()
    assert (out / parquet_name(1)).exists()


def test_a_bad_shard_loses_the_record_of_an_earlier_release_too(out: Path, plan: JobPlan):
    shutil.copy(out / record_name(0), out / old_record_name(0))
    shutil.move(out / record_name(2), out / old_record_name(2))
    for shard_id in (0, 2):
        damage(out, shard_id)
    assert repaired(out, plan) == Repair((0, 2), 0)
    assert committed_shards(Storage.open(out), plan).keys() == {1}
    assert not (out / old_record_name(0)).exists()


def test_a_shard_that_was_never_made_has_no_record_to_lose(out: Path, plan: JobPlan):
    for name in (tar_name(2), parquet_name(2), record_name(2)):
        (out / name).unlink()
    (out / tar_name(0)).unlink()
    assert repaired(out, plan) == Repair((0,), 0)


def test_what_killed_runs_left_an_hour_ago_is_removed_everywhere(out: Path, plan: JobPlan):
    (out / TEXT_FOLDER).mkdir()
    folders = [out, *(out / folder for folder in (TEXT_FOLDER, *FOLDERS))]
    old = [folder / f"{TEMP_PREFIX}old" for folder in folders]
    young = [folder / f"{TEMP_PREFIX}young" for folder in folders]
    theirs = [folder / ".notes" for folder in folders]
    make_old(*old, *theirs)
    make_old(*young, minutes=59)
    assert repaired(out, plan) == Repair((), 5)
    assert not any(file.exists() for file in old)
    assert all(file.exists() for file in (*young, *theirs))


def test_a_file_that_somebody_removes_meanwhile_is_nobodys_loss(
    out: Path, plan: JobPlan, monkeypatch: pytest.MonkeyPatch
):
    make_old(out / f"{TEMP_PREFIX}old")
    remove = Storage.remove

    def twice(self: Storage, name: str) -> None:
        remove(self, name)
        remove(self, name)

    monkeypatch.setattr(Storage, "remove", twice)
    assert repaired(out, plan) == Repair((), 0)


def test_an_old_claim_goes_where_the_shard_was_found_whole(out: Path, plan: JobPlan):
    storage = Storage.open(out)
    make_old(*(out / make_claim(storage, shard_id) for shard_id in (0, 1)))
    make_claim(storage, 2)
    damage(out, 1)
    assert repaired(out, plan) == Repair((1,), 1)
    left = sorted(file.name.partition("-")[0] for file in (out / CLAIMS_FOLDER).iterdir())
    assert left == ["1", "2"]
