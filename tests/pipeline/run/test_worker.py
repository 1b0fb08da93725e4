from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from depthvar.errors import InputError
from pipeline.request.generation import GenerateConfig
from pipeline.request.job import plan_job
from pipeline.request.job_plan import FormerPolicy, JobPlan, policy_fields
from pipeline.run.worker import (
    Progress,
    Scratch,
    ShardDone,
    ShardStopped,
    Worker,
    Workplace,
    load_sampler,
)
from pipeline.shards.manifest import committed_shards
from pipeline.storage import Storage
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fakes import FAULTS_VARIABLE, set_faults


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobPlan:
    """20 images in 3 shards of at most 8, batches of 3."""
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    config = GenerateConfig(
        out=str(tmp_path / "out"), per_class=2, samples_per_shard=8, batch_size=3, device="cpu"
    )
    return plan_job(config)[0]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(
        out=str(tmp_path / "out"),
        scratch=str(tmp_path / "scratch"),
        device="cpu",
        threads=3,
        sampler_factory=FAKE_SAMPLER,
    )


def test_a_shard_streams_its_batches_and_then_its_result(plan: JobPlan, place: Workplace):
    worker = Worker(plan, place)
    *batches, done = list(worker.run_shard(2, attempt=4))
    assert batches == [Progress(2, 3), Progress(2, 1)]
    assert isinstance(done, ShardDone)
    record = committed_shards(Storage.open(place.out), plan)[2]
    assert done.num_bytes == record.files.tar.size + record.files.parquet.size
    assert (record.attempt, record.threads, record.device) == (4, 3, "cpu")
    assert record.worker == worker.info.name
    assert {"python", "torch", "numpy", "pillow", "machine"} <= record.environment.keys()


def test_nothing_is_committed_before_the_last_batch(plan: JobPlan, place: Workplace):
    storage, stream = Storage.open(place.out), Worker(plan, place).run_shard(0, attempt=1)
    for _ in range(3):
        assert isinstance(next(stream), Progress)
        assert committed_shards(storage, plan) == {}
    assert isinstance(next(stream), ShardDone)
    assert list(committed_shards(storage, plan)) == [0]


@pytest.mark.parametrize("end", ["stop", "close", "raise"])
def test_a_shard_that_is_left_leaves_nothing_behind(
    plan: JobPlan, place: Workplace, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(FAULTS_VARIABLE, str(tmp_path / "faults.json"))
    set_faults(tmp_path / "faults.json", **({"poison": 4} if end == "raise" else {}))
    worker, asked = Worker(plan, place), []
    stream = worker.run_shard(0, attempt=1, should_stop=lambda: bool(asked))
    next(stream)
    if end == "close":
        stream.close()  # type: ignore[attr-defined]
    else:
        asked.extend(["stop"] if end == "stop" else [])
        with pytest.raises(ShardStopped if end == "stop" else ValueError):
            next(stream)
    (folder,) = Path(place.scratch or "").iterdir()
    assert [f.name for f in folder.iterdir()] == ["lock"]
    assert not (tmp_path / "out").exists()
    worker.close()
    assert not folder.exists()


def test_the_plan_holds_what_decides_a_byte_and_nothing_else(plan: JobPlan, tmp_path: Path):
    def other(**changes: object) -> JobPlan:
        config = GenerateConfig(
            **{
                "out": str(tmp_path / "out"),
                "per_class": 2,
                "samples_per_shard": 8,
                "batch_size": 3,
                **changes,
            }
        )
        return plan_job(config)[0]

    for changes in ({"workers": 7}, {"scratch": tmp_path}, {"out": "x"}, {"device": "cuda"}):
        assert other(**changes) == plan, changes
    for changes in (
        {"seed": 1},
        {"cfg": 3.0},
        {"top_k": 5},
        {"top_p": 0.5},
        {"policy": "full"},
        {"reference_scale": 2},
        {"policy_options": {"blending": "mean"}},
        {"precision": "bfloat16"},
        {"batch_size": 4},
        {"samples_per_shard": 9},
        {"image_format": "webp"},
        {"classes": "0-8"},
        {"per_class": 3},
    ):
        assert other(**changes).fingerprint != plan.fingerprint, changes


def test_scratch_of_a_killed_process_is_swept_and_that_of_a_live_one_is_not(tmp_path: Path):
    code = (
        "import os, signal, sys; from pipeline.run.worker import Scratch;"
        "s = Scratch.claim(sys.argv[1], 'a' * 64); (s.folder / 'big').write_bytes(b'1');"
        "print(s.folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    dead = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    assert (Path(dead) / "big").exists()
    live = Scratch.claim(str(tmp_path), "a" * 64)
    assert not Path(dead).exists()
    second = Scratch.claim(str(tmp_path), "a" * 64)
    assert live.folder.exists()
    assert live.folder != second.folder
    stranger = tmp_path / "depthvar-aaaaaaaaaaaa-notes"
    stranger.mkdir()
    Scratch.claim(str(tmp_path), "a" * 64).remove()
    assert stranger.exists(), "a folder without a lock is not ours to delete"


def test_another_plan_than_the_sampler_has_is_not_run(plan: JobPlan, place: Workplace):
    changed = replace(plan, compute=replace(plan.compute, token_layers=1))
    with pytest.raises(AssertionError):
        Worker(changed, place)


def test_a_policy_that_this_release_does_not_have_is_not_sampled(plan: JobPlan, place: Workplace):
    fields = {**policy_fields(plan.policy), "gain": 0.5}
    with pytest.raises(InputError, match="use the release that wrote it"):
        load_sampler(replace(plan, policy=FormerPolicy(fields)), place, "cpu")
