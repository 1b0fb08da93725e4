"""Faults of every kind in one process: what is bad is named, made again, and never called done."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline.shards.manifest as manifest
from depthvar.errors import InputError
from jobs import verify as verify_job
from pipeline.dataset.loader import iterate_samples, open_dataset
from pipeline.request.flags import load_config
from pipeline.request.generation import GenerateConfig
from pipeline.request.job_plan import JobPlan
from pipeline.request.labels_file import read_labels_file
from pipeline.request.plan_file import read_plan
from pipeline.run.driver import generate
from pipeline.shards.claims import CLAIMS_FOLDER, doubtful_shards, make_claim
from pipeline.shards.committed import committed_shards
from pipeline.shards.manifest import CommitRecord, tar_name
from pipeline.shards.samples import ShardError
from pipeline.storage import Storage
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fake_shards import (
    data_files,
    fill,
    make_plan,
    record_of,
    to_old_layout,
    write_dataset,
)
from tests.fakes import set_faults, without_torch
from tests.fault_hook import FAULTS_VARIABLE
from tests.forked_job import ForkedJob

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    set_faults(tmp_path / "faults.json")
    monkeypatch.setenv(FAULTS_VARIABLE, str(tmp_path / "faults.json"))


def config(out: Path | str, **changes: Any) -> GenerateConfig:
    """20 images in 3 shards of at most 8, batches of 4."""
    wanted = {"per_class": 2, "samples_per_shard": 8, "batch_size": 4, "contact_sheet": 0}
    return GenerateConfig(**{"out": str(out), "workers": 0, "device": "cpu", **wanted, **changes})


def run(out: Path, **changes: Any) -> int:
    changes = {"scratch": out.parent / "scratch", **changes}
    return generate(config(out, **changes), sampler_factory=FAKE_SAMPLER)


def ledger(out: Path) -> list[dict[str, Any]]:
    file = out / "commits" / "failures.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def out(tmp_path: Path) -> Path:
    assert run(tmp_path / "out") == 0
    return tmp_path / "out"


# Poison


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("poison", "ValueError: poison"),
        ("memory", "MemoryError"),
        ("gpu_memory", "OutOfMemoryError: CUDA out of memory"),
        ("nan", "mean_change"),
    ],
)
def test_a_poison_shard_is_set_aside_until_it_is_asked_for(
    kind: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    set_faults(tmp_path / "faults.json", **{kind: 9})
    assert run(out, max_attempts=2) == 1
    assert [(e["shard_id"], e["attempt"], e["set_aside"]) for e in ledger(out)] == [
        (1, 1, False),
        (1, 2, True),
    ]
    assert all(word in e["error"] and "Traceback" in e["traceback"] for e in ledger(out))
    said = capsys.readouterr().err
    assert "missing: 1 shard: 1" in said
    assert ("if memory ran out at --batch-size 4" in said) == (kind in ("memory", "gpu_memory"))
    set_faults(tmp_path / "faults.json")
    assert run(out) == 1
    assert len(ledger(out)) == 2, "it was not tried"
    assert run(out, retry_failed=True) == 0


# Storage


def limited_run(out: Path, limit: int) -> int:
    """The job in a child that may write no file larger than `limit` bytes."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = run(out, max_attempts=2)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_files_that_cannot_be_written_whole_charge_nothing_for_the_next_run(tmp_path: Path):
    assert limited_run(tmp_path / "out", 25_000) == 1
    assert {entry["cause"] for entry in ledger(tmp_path / "out")} == {"storage"}
    made = sorted(f.name for f in (tmp_path / "out").glob("train/*"))
    assert made == ["00002.tar"], "only the small last shard fits"
    assert not list((tmp_path / "scratch").glob("*/shard-*"))
    assert run(tmp_path / "out") == 0, "the same command goes on once there is room"
    assert verify_job.main([str(tmp_path / "out"), "--deep"]) == 0


def test_an_output_that_turns_full_stops_the_job_with_its_real_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    publish = Storage.publish_file

    def full(self: Storage, local: Path, name: str) -> None:
        if name != "train/00000.tar":
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(self, local, name)

    monkeypatch.setattr(Storage, "publish_file", full)
    assert run(tmp_path / "out", max_attempts=9) == 1
    said = capsys.readouterr().err
    assert "5 shards in a row could not be stored" in said
    assert "No space left on device" in said
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    assert run(tmp_path / "out") == 0


def damage(out: Path, kind: str) -> None:
    tar, record = out / "train" / "00001.tar", out / "commits" / "00001.json"
    if kind == "truncated":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif kind == "flipped":
        data = bytearray(tar.read_bytes())
        data[2000] ^= 1
        tar.write_bytes(data)
    elif kind == "no parquet":
        (out / "meta" / "00001.parquet").unlink()
    elif kind == "empty record":
        record.write_bytes(b"")
    else:
        record.write_bytes(record.read_bytes()[:300])


@pytest.mark.parametrize(
    "kind", ["truncated", "flipped", "no parquet", "empty record", "half a record"]
)
def test_damage_is_named_by_verify_unmarked_by_repair_and_made_again(
    out: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    before = data_files(out)
    damage(out, kind)
    assert verify_job.main([str(out), "--deep", "--repair"]) == 1
    said = capsys.readouterr().out
    assert "00001  " in said
    assert "run the generate command" in said
    assert not (out / "commits" / "00001.json").exists()
    assert run(out) == 0
    assert data_files(out) == before
    assert verify_job.main([str(out), "--deep"]) == 0


@pytest.mark.parametrize("kind", ["truncated", "no parquet", "empty record", "half a record"])
def test_damage_that_changes_a_size_or_a_record_is_seen_and_made_again_by_generate_alone(
    out: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    before = data_files(out)
    damage(out, kind)
    assert verify_job.main([str(out)]) == 1
    assert "00001  " in capsys.readouterr().out
    assert run(out) == 0
    assert data_files(out) == before


def test_only_a_deep_check_sees_a_flipped_byte_and_the_other_says_what_it_compared(
    out: Path, capsys: pytest.CaptureFixture[str]
):
    damage(out, "flipped")
    assert verify_job.main([str(out)]) == 0
    assert "checked records and sizes only, add --deep" in capsys.readouterr().out
    assert verify_job.main([str(out), "--deep"]) == 1
    said = capsys.readouterr().out
    assert "00001  hash: train/00001.tar" in said
    assert "checked hashes, contents and labels" in said


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def delete_shard(out: Path) -> None:
    for name in ("train/00001.tar", "meta/00001.parquet", "commits/00001.json"):
        (out / name).unlink()


def wrong_hash(out: Path) -> None:
    file = out / "commits" / "00001.json"
    record = json.loads(file.read_text())
    entry = record["files"]["tar"]
    entry["sha256"] = ("1" if entry["sha256"][0] == "0" else "0") + entry["sha256"][1:]
    file.write_text(json.dumps(record))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte of an image": lambda out: flip(out / "train/00001.tar", 4000),
    "a byte of a tar header": lambda out: flip(out / "train/00001.tar", 1030),
    "a byte of a Parquet": lambda out: flip(out / "meta/00001.parquet", 300),
    "a byte of a Parquet's footer": lambda out: flip(out / "meta/00001.parquet", -20),
    "a byte that ends a record": lambda out: flip(out / "commits/00001.json", 0),
    "a digit of a hash in a record": wrong_hash,
    "a cut tar": lambda out: cut(out / "train/00001.tar"),
    "a cut Parquet": lambda out: cut(out / "meta/00001.parquet"),
    "a cut record": lambda out: cut(out / "commits/00001.json"),
    "no tar": lambda out: (out / "train/00001.tar").unlink(),
    "no Parquet": lambda out: (out / "meta/00001.parquet").unlink(),
    "no record": lambda out: (out / "commits/00001.json").unlink(),
    "no shard": delete_shard,
    "no index": lambda out: (out / "index.json").unlink(),
    "a byte of an index": lambda out: flip(out / "_info.json", 30),
    "a byte in two shards": lambda out: (
        flip(out / "train/00000.tar", 4000),
        flip(out / "meta/00002.parquet", 300),
        cut(out / "train/00001.tar"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_who_does_what_verify_prints_ends_with_a_sound_dataset(
    out: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    before = data_files(out)
    DAMAGE[kind](out)
    capsys.readouterr()
    assert verify_job.main([str(out), "--deep"]) == 1
    said = capsys.readouterr().out
    if f"`depthvar verify {out} --deep --repair`" in said:
        verify_job.main([str(out), "--deep", "--repair"])
    if "run the generate command" in said:
        assert run(out) == 0
    assert verify_job.main([str(out), "--deep"]) == 0
    assert data_files(out) == before


@pytest.mark.parametrize("kind", ["a byte of a tar header", "a byte of a Parquet's footer"])
def test_whoever_meets_damage_names_what_mends_it(
    out: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    DAMAGE[kind](out)
    told = r"0000[1-9]\.\w+: .*; run verify --deep --repair, then generate again"
    argv = [str(out), "--regenerate", "20", "--device", "cpu"]
    assert verify_job.main(argv, sampler_factory=FAKE_SAMPLER) == 1
    assert re.search(rf"cannot regenerate: (train|meta)/{told}", capsys.readouterr().out)
    if "tar" in kind:
        with pytest.raises(ShardError, match=told):
            list(iterate_samples(open_dataset(str(out))))
        assert run(out, contact_sheet=2) == 1
        assert re.search(rf"error: train/{told}", capsys.readouterr().err)


def test_verify_of_an_unfinished_job_says_how_far_it_is_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert run(out, per_class=8) == 0
    for shard_id in (3, 4, 5, 8):
        for file in out.glob(f"*/{shard_id:05d}.*"):
            file.unlink()
    capsys.readouterr()
    assert verify_job.main([str(out)]) == 1
    assert capsys.readouterr().out == (
        f"{out}: 6 of 10 shards committed (60%), 4 not made yet (3-5, 8): run the generate command"
        f" to go on\n{out}: 6 of 10 shards sound (48 images), 0 problems; checked records and sizes"
        " only, add --deep to read every byte\n"
    )
    (out / "train" / "00002.tar").unlink()
    (out / "commits" / "00001.json").unlink()
    assert verify_job.main([str(out)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "00001  missing: commits/00001.json missing",
        "00002  missing: train/00002.tar missing",
    ]
    assert "4 of 10 shards committed (40%), 4 not made yet (3-5, 8)" in said[2]


def test_shards_of_two_environments_are_noted_and_sound(
    out: Path, capsys: pytest.CaptureFixture[str]
):
    file = out / "commits" / "00001.json"
    record = json.loads(file.read_text())
    now = record["environment"]["torch"]
    record["environment"]["torch"] = "1.0"
    file.write_text(json.dumps(record))
    capsys.readouterr()
    assert verify_job.main([str(out)]) == 0
    said = capsys.readouterr().out
    assert f"note: made with torch: {now} in 2 shards (0, 2), 1.0 in 1 shard (1)" in said


def test_repair_sweeps_what_is_old_and_leaves_what_may_be_in_use(out: Path):
    old, new = out / "train" / ".tmp-old", out / "meta" / ".tmp-new"
    claim = out / make_claim(Storage.open(out), 1)
    for file in (old, new):
        file.touch()
    for file in (old, claim):
        os.utime(file, (time.time() - 4000,) * 2)
    assert verify_job.main([str(out), "--repair"]) == 0
    assert (old.exists(), new.exists(), claim.exists()) == (False, True, False)


# Datasets of earlier releases


def old_dataset(out: Path) -> dict[str, tuple[bytes, int]]:
    """Turn the dataset old; its tars and Parquet with the time of their last change."""
    to_old_layout(out)
    files = [*out.glob("train/*"), *out.glob("meta/*.parquet")]
    return {str(f): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


def test_a_dataset_of_an_earlier_release_is_sound_and_complete(
    out: Path, capsys: pytest.CaptureFixture[str]
):
    old_dataset(out)
    assert verify_job.main([str(out), "--deep"]) == 0
    assert open_dataset(str(out)).num_samples == 20
    assert "3 of 3 shards sound (20 images), 0 problems" in capsys.readouterr().out


def test_a_dataset_of_an_earlier_release_is_finished_and_extended_in_the_new_layout(
    out: Path, capsys: pytest.CaptureFixture[str]
):
    before = old_dataset(out)
    card = (out / "README.md").read_bytes()
    for file in (out / "train" / "00001.tar", out / "meta" / "00001.parquet"):
        file.unlink()
    (out / "meta" / "00001.json").unlink()
    assert run(out) == 0
    assert {f: Path(f).read_bytes() for f in before} == {f: data for f, (data, _) in before.items()}
    kept = [f for f in before if "00001" not in f]
    assert [Path(f).stat().st_mtime_ns for f in kept] == [before[f][1] for f in kept]
    assert [f.name for f in (out / "commits").iterdir()] == ["00001.json"]
    assert verify_job.main([str(out), "--deep"]) == 0
    assert run(out, per_class=3, extend=True) == 0
    names = sorted(f.name for f in (out / "commits").iterdir())
    assert names == ["00001.json", "00003.json", "00004.json"]
    assert (out / "README.md").read_bytes() == card
    assert "kept README.md, which was edited: delete it to have" in capsys.readouterr().err
    assert verify_job.main([str(out), "--deep"]) == 0
    assert open_dataset(str(out)).num_samples == 30


def test_a_damaged_shard_of_an_earlier_release_is_repaired(out: Path):
    before = data_files(out)
    old_dataset(out)
    (out / "commits").mkdir()
    shutil.copy(out / "meta" / "00001.json", out / "commits")
    data = bytearray((out / "train" / "00001.tar").read_bytes())
    data[2000] ^= 1
    (out / "train" / "00001.tar").write_bytes(data)
    assert verify_job.main([str(out), "--deep", "--repair"]) == 1
    assert not (out / "meta" / "00001.json").exists()
    assert not (out / "commits" / "00001.json").exists()
    assert run(out) == 0
    assert data_files(out) == before
    assert verify_job.main([str(out), "--deep"]) == 0


def test_what_an_earlier_release_set_aside_stays_so_until_it_is_asked_for(tmp_path: Path):
    out = tmp_path / "out"
    set_faults(tmp_path / "faults.json", poison=9)
    assert run(out, max_attempts=2) == 1
    to_old_layout(out)
    assert (out / "meta" / "failures.jsonl").exists()
    set_faults(tmp_path / "faults.json")
    assert run(out) == 1
    assert ledger(out) == [], "it was not tried"
    set_faults(tmp_path / "faults.json", poison=9)
    assert run(out, max_attempts=1, retry_failed=True) == 1
    assert [e["shard_id"] for e in ledger(out)] == [1]
    set_faults(tmp_path / "faults.json")
    assert run(out, retry_failed=True) == 0


# Two workers or drivers at once


def test_a_mixture_of_two_environments_is_never_called_done(tmp_path: Path):
    """Orders in which two publications, one of which may die, meet at the level of files."""
    plan = make_plan()
    one, two = tmp_path / "one", tmp_path / "two"
    for place, seed in ((one, 0), (two, 1)):
        write_dataset(Storage.open(place), make_plan(), tmp_path / "scratch")
        if seed:  # same sizes, other bytes, a fitting record: the worst case
            tar = place / tar_name(0)
            data = bytearray(tar.read_bytes())
            data[-1] ^= 1
            tar.write_bytes(data)
    storage = Storage.open(one)
    assert 0 in committed_shards(storage, plan)
    claim = make_claim(storage, 0)  # another worker starts, replaces the tar, and dies
    (one / tar_name(0)).write_bytes((two / tar_name(0)).read_bytes())
    assert 0 not in committed_shards(storage, plan)
    assert manifest.read_commit(storage, plan, 0) is None
    assert doubtful_shards(storage) == {0}
    assert (one / claim).exists()


def test_a_worker_that_meets_a_claim_checks_its_bytes_and_leaves_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from pipeline.shards.writer import ShardWriter

    storage, plan = Storage.open(tmp_path / "out"), make_plan()
    publish_record = manifest.publish_record
    rounds: list[int] = []

    def meddle(target: Storage, record: CommitRecord) -> None:
        publish_record(target, record)
        rounds.append(1)
        if len(rounds) == 1:  # the other worker's tar arrives after this one's
            make_claim(target, 0)
            tar = Path(target.root, tar_name(0))
            tar.write_bytes(tar.read_bytes()[:-1] + b"\1")

    monkeypatch.setattr(manifest, "publish_record", meddle)
    with ShardWriter(plan, plan.shard(0), tmp_path / "scratch") as writer:
        built = fill(writer, plan, plan.shard(0))
        manifest.publish_shard(storage, plan, built, record_of(plan, built))
    assert len(rounds) == 2
    assert list(committed_shards(storage, plan)) == [0]
    assert len(list((tmp_path / "out" / CLAIMS_FOLDER).iterdir())) == 2


def _driver(out: str, scratch: str, faults: str) -> None:
    os.environ[FAULTS_VARIABLE] = faults
    code = generate(config(out, scratch=scratch), sampler_factory=FAKE_SAMPLER)
    os._exit(code)


@pytest.mark.parametrize("other_environment", [0, 1])
def test_two_drivers_at_once_finish_one_sound_dataset(tmp_path: Path, other_environment: int):
    context = multiprocessing.get_context("fork")
    drivers = []
    for number in range(2):
        faults = tmp_path / f"faults-{number}.json"
        set_faults(faults, environment=number * other_environment, batch_s=0.02)
        argv = (str(tmp_path / "out"), str(tmp_path / "scratch"), str(faults))
        drivers.append(context.Process(target=_driver, args=argv))
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(60)
    assert [driver.exitcode for driver in drivers] == [0, 0]
    assert verify_job.main([str(tmp_path / "out"), "--deep"]) == 0


# Extend


def test_extending_keeps_every_byte_and_adds_the_rest(out: Path, tmp_path: Path):
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in out.glob("*/0*")}
    with pytest.raises(InputError, match="add --extend"):
        run(out, per_class=3)
    assert run(out, per_class=3, extend=True) == 0
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in before} == before
    assert verify_job.main([str(out), "--deep"]) == 0
    plan = read_plan(Storage.open(out))
    assert plan is not None
    assert (plan.num_samples, plan.num_shards) == (30, 5)
    assert run(out, per_class=3) == 0, "afterwards the flag is not needed"
    with pytest.raises(InputError, match="grow, not shrink"):
        run(out, per_class=2, extend=True)
    with pytest.raises(InputError, match="seed"):
        run(out, per_class=4, extend=True, seed=3)


# Another environment, too little memory


def test_a_run_in_another_environment_says_so_before_it_goes_on_and_in_its_summary(
    out: Path, capsys: pytest.CaptureFixture[str]
):
    for shard_id in (0, 2):
        file = out / "commits" / f"{shard_id:05d}.json"
        record = json.loads(file.read_text())
        record["environment"]["torch"] = "1.0"
        file.write_text(json.dumps(record))
    (out / "commits" / "00001.json").unlink()
    (out / "commits" / "00002.json").unlink()
    capsys.readouterr()
    assert run(out) == 0
    said = capsys.readouterr()
    (warning,) = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    ours = version("torch")
    assert warning.startswith(f"warning: torch: 1.0 in 1 shard (0), this run has {ours}: ")
    assert f"mixed     torch: 1.0 in 1 shard (0), {ours} in 2 shards (1-2)" in said.out


def test_a_batch_that_does_not_fit_is_said_before_the_plan_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pipeline.run.cluster.available_memory", lambda: 10**9)
    fitting = config(tmp_path / "out", batch_size=2000, samples_per_shard=2000)
    told: list[str] = []

    def refuse(storage: Storage, plan: JobPlan, **_: object) -> JobPlan:
        told.append(capsys.readouterr().err)
        raise InputError("no plan today")

    monkeypatch.setattr("pipeline.run.driver.open_plan", refuse)
    with pytest.raises(InputError, match="no plan today"):
        generate(fitting, sampler_factory=FAKE_SAMPLER)
    found = re.search(
        r"warning: at --batch-size 2000 a worker needs about \S+ GB of memory"
        r" and has 384\.0 MB: --batch-size (\d+) fits",
        told[0],
    )
    assert found is not None, told
    with pytest.raises(InputError, match="no plan today"):
        generate(config(tmp_path / "out", batch_size=int(found[1]), samples_per_shard=2000))
    assert "warning" not in told[1]
    monkeypatch.setattr("pipeline.run.cluster.available_memory", lambda: 10**6)
    with pytest.raises(InputError, match="no plan today"):
        generate(fitting)
    assert "no batch size fits" in told[2]


def test_a_batch_is_fitted_once_and_stays_with_the_plan_on_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Begun with 96 MB for a worker's tensors, gone on with 12 GB, then with 40 MB."""
    out = tmp_path / "out"
    wanted = {"batch_size": None, "per_class": 10, "samples_per_shard": 60}

    def with_memory(memory: int, **changes: Any) -> str:
        monkeypatch.setattr("pipeline.run.cluster.available_memory", lambda: memory)
        assert run(out, **wanted | changes) == 0
        return capsys.readouterr().err

    said = with_memory(640 * 10**6)
    (fit,) = re.findall(r"note: batch size (\d+): 50 would need .* a worker has 96.0 MB", said)
    plan = read_plan(Storage.open(out))
    assert plan is not None
    assert plan.batch_size == int(fit) < 50
    made, (first, *_) = data_files(out), sorted(out.glob("commits/0*.json"))
    for memory, is_short in ((16 * 10**9, False), (570 * 10**6, True)):
        first.unlink()
        said = with_memory(memory)
        assert "note: batch size" not in said
        assert (f"at the plan's batch size, {fit}, a worker needs about" in said) == is_short
        assert data_files(out) == made
    first.unlink()
    with pytest.raises(InputError, match=rf"batch_size: .* has {fit}, this run has 50: resume"):
        with_memory(16 * 10**9, batch_size=50)


# Regenerate


def test_images_sampled_again_are_exact_or_the_difference_is_told(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = [str(out), "--regenerate", "7", "--device", "cpu"]
    assert verify_job.main(argv, sampler_factory=FAKE_SAMPLER) == 0
    assert "regenerated 7 images: 7 exact" in capsys.readouterr().out
    set_faults(tmp_path / "faults.json", environment=3)
    assert verify_job.main(argv, sampler_factory=FAKE_SAMPLER) == 1
    said = capsys.readouterr().out
    assert "0 exact, largest difference 3 of 255" in said
    assert "nothing that was recorded differs" in said
    for file in out.glob("commits/0*.json"):
        record = json.loads(file.read_text())
        record["environment"]["torch"] = "1.0"
        file.write_text(json.dumps(record))
    assert verify_job.main(argv, sampler_factory=FAKE_SAMPLER) == 0
    assert "torch: 1.0 then" in capsys.readouterr().out


# Signals


def test_a_second_interrupt_ends_the_job_at_once(tmp_path: Path):
    set_faults(tmp_path / "faults.json", batch_s=120)
    argv = [f"--out={tmp_path / 'out'}", f"--scratch={tmp_path / 'scratch'}", "--per-class=2"]
    argv += ["--workers=0", "--device=cpu"]
    job = ForkedJob(argv, tmp_path / "log")
    try:
        deadline_s = time.monotonic() + 90
        while not list(tmp_path.glob("scratch/depthvar-*/shard-*/*.tar")):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        time.sleep(0.5)  # into the slow batch
        job.send_signal(signal.SIGINT)
        while b"once more" not in (tmp_path / "log").read_bytes():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=60) == 128 + signal.SIGINT
    finally:
        job.kill()
        job.wait()


# What strangers can hand in

SLOW = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def no_crash(call: Callable[[], object]) -> None:
    """Anything but the clear error is a crash."""
    with contextlib.suppress(InputError):
        call()


@SLOW
@given(data=st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_no_bytes_crash_the_readers_of_plans_and_records(data: bytes):
    assert CommitRecord.from_json(data) is None
    no_crash(lambda: JobPlan.from_json(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@SLOW
@given(field=st.integers(0, 40), value=JSON)
def test_no_changed_field_crashes_the_readers(field: int, value: object):
    plan = json.loads(make_plan().to_json())
    names = [*plan["settings"]]
    plan["settings"][names[field % len(names)]] = value
    no_crash(lambda: JobPlan.from_json(json.dumps(plan).encode()))


@SLOW
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_no_labels_file_crashes(content: bytes, tmp_path: Path):
    (tmp_path / "labels").write_bytes(content)
    no_crash(lambda: read_labels_file(tmp_path / "labels", ("zero", "one")))


@SLOW
@given(
    content=st.dictionaries(st.sampled_from([*GenerateConfig.model_fields]) | st.text(), JSON).map(
        lambda value: json.dumps(value).encode()
    )
    | st.binary(max_size=100)
)
def test_no_configuration_file_crashes(content: bytes, tmp_path: Path):
    (tmp_path / "job.yaml").write_bytes(content)
    argv = ["--config", str(tmp_path / "job.yaml")]
    no_crash(lambda: load_config(GenerateConfig, argv, prog="x", description=""))


def test_nothing_secret_reaches_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    assert run(tmp_path / "out") == 0
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or b"hush-hush" not in file.read_bytes()
    captured = capsys.readouterr()
    assert "hush-hush" not in captured.out + captured.err


def test_class_names_that_look_like_paths_stay_text(tmp_path: Path):
    names = ("../../x", "/etc/passwd", "a/../b", "nul\0")
    storage = Storage.open(tmp_path / "deep" / "out")
    write_dataset(storage, make_plan(class_names=names), tmp_path / "scratch")
    made = {f.name for f in tmp_path.rglob("*") if f.is_file()}
    assert not made & {"x", "passwd", "b"}
    assert {f.name for f in tmp_path.iterdir()} == {"deep", "scratch", "faults.json"}


# Kills


def test_a_handful_of_kills_loses_nothing():
    """`python -m tests.chaos` does hundreds, on Ray too."""
    command = [sys.executable, "-m", "tests.chaos", "--kills", "14", "--ray", "0"]
    environment = {**os.environ, "PYTHONPATH": without_torch()}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| all \| \d+ \| 14 \| 0 \| 0 \| 0 \|", done.stdout), done.stdout
