"""One worker timed on a few batches: what is timed, and that nothing stays behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.request.generation import GenerateConfig
from pipeline.request.job import plan_job
from pipeline.request.job_plan import JobPlan
from pipeline.run import speed
from pipeline.run.speed import measure_speed
from pipeline.run.worker import Workplace
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fake_text import text_job
from tests.fakes import FAULTS_VARIABLE, FakeBatch, FakeSampler, set_faults


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobPlan:
    """20 images in 2 shards, batches of 3."""
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    config = GenerateConfig(out=str(tmp_path / "out"), per_class=2, samples_per_shard=14)
    return plan_job(config.model_copy(update={"batch_size": 3}))[0]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    scratch = str(tmp_path / "scratch")
    return Workplace("out", scratch=scratch, device="cpu", threads=3, sampler_factory=FAKE_SAMPLER)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The indices of every batch that is sampled."""
    seen: list[list[int]] = []
    sample = FakeSampler.__call__

    def record(
        self: FakeSampler, labels: Sequence[int], *, seed: int, indices: Sequence[int]
    ) -> FakeBatch:
        seen.append(list(indices))
        return sample(self, labels, seed=seed, indices=indices)

    monkeypatch.setattr(FakeSampler, "__call__", record)
    return seen


def test_three_batches_are_timed_after_one_that_is_not(
    plan: JobPlan,
    place: Workplace,
    sampled: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    set_faults(tmp_path / "faults", batch_s=0.06, slow_from=3)
    monkeypatch.setenv(FAULTS_VARIABLE, str(tmp_path / "faults"))
    found = measure_speed(plan, place)
    assert sampled == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert (found.device, found.threads, found.num_images) == ("cpu", 3, 9)
    assert found.making_s >= 2 * 0.06 / 9
    assert found.writing_s > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["faults", "scratch"]
    assert not list((tmp_path / "scratch").iterdir())


def test_batches_that_take_long_are_not_repeated(
    plan: JobPlan,
    place: Workplace,
    sampled: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(speed, "_ENOUGH_S", 0.0)
    assert measure_speed(plan, place).num_images == 3
    assert sampled == [[0, 1, 2], [0, 1, 2]]


def test_a_text_model_is_timed_without_its_encoder_on_states_of_its_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan, place = text_job(tmp_path)
    seen: list[np.ndarray] = []
    sample = FakeSampler.__call__

    def record(
        self: FakeSampler, given: Sequence[object], *, seed: int, indices: Sequence[int]
    ) -> FakeBatch:
        seen.extend(np.asarray(states) for states in given)
        return sample(self, given, seed=seed, indices=indices)

    monkeypatch.setattr(FakeSampler, "__call__", record)
    assert measure_speed(plan, replace(place, text_states=None)).num_images == 8
    prompts = [plan.prompt_of(label, i) for i, label in enumerate(plan.shard(0).labels[:3])]
    shapes = [(len(prompt.text) // 4 + 1, 4) for prompt in prompts if prompt is not None]
    assert [states.shape for states in seen[:3]] == shapes
    assert {states.dtype for states in seen} == {np.dtype(np.float32)}
    assert not (tmp_path / "out").exists()
