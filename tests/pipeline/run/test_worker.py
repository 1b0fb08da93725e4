from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from depthvar.errors import InputError
from pipeline.request.generation import GenerateConfig
from pipeline.request.job import plan_job
from pipeline.request.job_plan import FormerPolicy, JobPlan, policy_fields
from pipeline.run.worker import (
    Progress,
    Resampler,
    Scratch,
    ShardDone,
    ShardStopped,
    Worker,
    Workplace,
    load_sampler,
)
from pipeline.shards.committed import committed_shards
from pipeline.shards.manifest import BuiltShard, CommitRecord, publish_shard, read_commit
from pipeline.shards.writer import SampledBatch, ShardWriter
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
    assert batches == [Progress(2, 3), Progress(2, 1, is_last=True)]
    assert isinstance(done, ShardDone)
    record = read_commit(Storage.open(place.out), plan, 2)
    assert record is not None
    assert done.num_bytes == record.files.tar.size + record.files.parquet.size
    assert done.seconds.keys() == {"sampling", "decoding", "encoding", "publishing"}
    assert done.seconds["sampling"] == pytest.approx(2 * 0.01)
    assert done.seconds["decoding"] == pytest.approx(2 * 0.005)
    assert done.seconds["encoding"] == sum(b.encoding_s for b in record.batches)
    assert 0 < done.seconds["publishing"] < 10
    assert (record.attempt, record.threads, record.device) == (4, 3, "cpu")
    assert record.worker == worker.info.name
    assert {"python", "torch", "numpy", "pillow", "machine"} <= record.environment.keys()


def test_kernels_that_may_differ_in_the_last_bit_are_recorded(plan: JobPlan, place: Workplace):
    for kernels, recorded in (("auto", None), ("plain", None), ("triton", "triton")):
        worker = Resampler(plan, replace(place, kernels=kernels, device="cpu"))
        assert worker.info.environment.get("kernels") == recorded


def test_nothing_is_committed_before_the_last_batch(plan: JobPlan, place: Workplace):
    storage, stream = Storage.open(place.out), Worker(plan, place).run_shard(0, attempt=1)
    for _ in range(3):
        assert isinstance(next(stream), Progress)
        assert committed_shards(storage, plan) == {}
    assert isinstance(next(stream), ShardDone)
    assert list(committed_shards(storage, plan)) == [0]


def test_a_shard_is_sampled_while_the_one_before_is_published_and_no_third_one_is_held(
    plan: JobPlan, place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A shard is published only once the next one is sampled whole: without overlap, never."""
    sampled = [threading.Event() for _ in range(plan.num_shards)]
    all_wanted = threading.Event()
    held: list[int] = []  # shards with scratch files, whenever something happens
    order: list[tuple[str, int]] = []
    samplers: set[int] = set()

    def look(what: str, shard_id: int) -> None:
        order.append((what, shard_id))
        held.append(len(list((tmp_path / "scratch").glob("*/shard-*"))))

    def act_out(faults: object, indices: range) -> None:
        look("sampled", indices[0] // 8)
        samplers.add(threading.get_ident())
        if indices[-1] + 1 == plan.shard_range(indices[0] // 8)[1]:
            sampled[indices[0] // 8].set()

    def publish(storage: Storage, plan: JobPlan, built: BuiltShard, record: CommitRecord) -> None:
        assert all_wanted.wait(60)
        if built.shard_id + 1 < plan.num_shards:
            assert sampled[built.shard_id + 1].wait(60)
        publish_shard(storage, plan, built, record)
        look("published", built.shard_id)

    monkeypatch.setattr("tests.fakes._act_out", act_out)
    monkeypatch.setattr("pipeline.run.worker.publish_shard", publish)
    worker, shards = Worker(plan, place), []
    with ThreadPoolExecutor(plan.num_shards) as pool:
        for shard_id in range(plan.num_shards):
            shards.append(pool.submit(lambda i=shard_id: list(worker.run_shard(i, attempt=1))))
            assert shard_id == 2 or sampled[shard_id].wait(60)
        all_wanted.set()
    assert all(isinstance(shard.result()[-1], ShardDone) for shard in shards)
    assert max(held) == 2
    assert len(samplers) == 1, "torch keeps some of its state by thread"
    assert order.index(("published", 0)) < order.index(("sampled", 2)), "it waits for room"
    assert sorted(committed_shards(Storage.open(place.out), plan)) == [0, 1, 2]


def test_a_batch_is_sampled_while_the_one_before_is_taken_in(
    plan: JobPlan, place: Workplace, monkeypatch: pytest.MonkeyPatch
):
    begun = [threading.Event() for _ in range(plan.num_samples)]
    monkeypatch.setattr("tests.fakes._act_out", lambda _, indices: begun[indices[0]].set())
    worker, add = Worker(plan, place), ShardWriter.add

    def slow_add(writer: ShardWriter, batch: SampledBatch, start: int) -> None:
        assert start == 6 or begun[start + 3].wait(60)
        add(writer, batch, start)

    monkeypatch.setattr(ShardWriter, "add", slow_add)
    assert len(list(worker.run_shard(0, attempt=1))) == 4


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

    for changes in (
        {"workers": 7},
        {"scratch": tmp_path},
        {"out": "x"},
        {"device": "cuda"},
        {"encode_threads": 7},
        {"png_level": 6},
    ):
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
        {"png_level": 1},
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


def test_scratch_of_a_process_that_dies_while_another_works_is_swept_when_that_one_ends(
    tmp_path: Path,
):
    dying = Scratch.claim(str(tmp_path), "a" * 64)
    worker = Scratch.claim(str(tmp_path), "a" * 64)
    assert dying.folder.exists()
    os.close(dying.lock)  # as the kernel does for a process that is gone
    worker.remove()
    assert not list(tmp_path.iterdir())


def test_another_plan_than_the_sampler_has_is_not_run(plan: JobPlan, place: Workplace):
    changed = replace(plan, compute=replace(plan.compute, token_layers=1))
    with pytest.raises(AssertionError):
        Worker(changed, place)


def test_a_policy_that_this_release_does_not_have_is_not_sampled(plan: JobPlan, place: Workplace):
    fields = {**policy_fields(plan.policy), "gain": 0.5}
    with pytest.raises(InputError, match="use the release that wrote it"):
        load_sampler(replace(plan, policy=FormerPolicy(fields)), place, "cpu")
