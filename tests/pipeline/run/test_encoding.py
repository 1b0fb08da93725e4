"""Every prompt is encoded once, whatever stops the job, and each sample gets its own states."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from depthvar.errors import InputError
from depthvar.text.states import GivenStates, write_states
from pipeline.request.job_plan import JobPlan, ShardPlan
from pipeline.run.encoding import encode_missing, missing_prompts
from pipeline.run.worker import Resampler, Worker, Workplace
from pipeline.shards.text_states import TEXT_FOLDER
from tests.fake_text import states_of, text_job


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobPlan:
    """20 prompts, 8 to a file."""
    monkeypatch.setattr("pipeline.run.encoding._FILE_PROMPTS", 8)
    return text_job(tmp_path)[0]


@pytest.fixture
def place(tmp_path: Path, plan: JobPlan) -> Workplace:
    return text_job(tmp_path)[1]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts whose states were asked for."""
    asked: list[str] = []
    read = GivenStates._read

    def noted(states: GivenStates, prompts: Sequence[str]) -> list[np.ndarray]:
        asked.extend(prompts)
        return read(states, prompts)

    monkeypatch.setattr(GivenStates, "_read", noted)
    return asked


def files(place: Workplace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(place.out, TEXT_FOLDER).iterdir()}


def test_an_encoding_that_was_stopped_or_damaged_is_made_whole_with_the_same_bytes(
    plan: JobPlan, place: Workplace, encoded: list[str]
):
    prompts = list(plan.distinct_prompts())
    assert missing_prompts(plan, place.out) == prompts
    assert list(encode_missing(plan, place)) == [8, 8, 4]
    assert encoded == prompts
    assert missing_prompts(plan, place.out) == []
    whole = files(place)
    for file in Path(place.out, TEXT_FOLDER).iterdir():
        file.unlink()

    encoded.clear()
    stopped = encode_missing(plan, place)
    assert next(stopped) == 8
    stopped.close()
    assert list(encode_missing(plan, place)) == [8, 4]
    assert encoded == prompts
    assert files(place) == whole

    encoded.clear()
    for name in sorted(whole)[:2]:
        (Path(place.out, TEXT_FOLDER) / name).write_bytes(whole[name][:-1])
    assert sum(encode_missing(plan, place)) == len(encoded) < 20
    assert files(place) == whole


def test_a_larger_plan_encodes_what_it_has_more(
    plan: JobPlan, place: Workplace, encoded: list[str], tmp_path: Path
):
    (tmp_path / "states.safetensors").unlink()
    larger, _ = text_job(tmp_path, "no more of {class}")
    plan, _ = text_job(tmp_path)
    list(encode_missing(plan, place))
    encoded.clear()
    assert list(encode_missing(larger, place)) == [8, 2]
    assert all(prompt.startswith("no more of") for prompt in encoded)


def test_other_states_than_those_planned_are_refused(plan: JobPlan, place: Workplace):
    write_states(Path(str(place.text_states)), {"a photo": np.zeros((2, 4))})
    with pytest.raises(InputError, match=f"the plan has {plan.text_encoder_sha256}: give every"):
        next(encode_missing(plan, place))


def test_every_sample_is_made_from_the_states_of_its_own_prompt(
    plan: JobPlan, place: Workplace, monkeypatch: pytest.MonkeyPatch
):
    list(encode_missing(plan, place))
    resampler = Resampler(plan, place)
    taken: dict[int, np.ndarray] = {}

    def sampler(given: Sequence[object], *, seed: int, indices: Sequence[int]) -> None:
        taken.update(zip(indices, given, strict=True))

    monkeypatch.setattr(resampler, "_sampler", sampler)
    for shard in map(plan.shard, range(plan.num_shards)):
        for start, stop in shard.micro_batches:
            resampler.sample(shard, start, stop)
        for label, index in zip(shard.labels, range(shard.start, shard.stop), strict=True):
            prompt = plan.prompt_of(label, index)
            assert prompt is not None
            assert np.array_equal(taken[index], states_of(prompt.text))
    assert sorted(taken) == list(range(20))


def test_the_states_of_a_batch_are_read_while_the_one_before_is_sampled(
    plan: JobPlan, place: Workplace, monkeypatch: pytest.MonkeyPatch
):
    list(encode_missing(plan, place))
    worker, is_read = Worker(plan, place), threading.Event()
    given = worker._given

    def read(shard: ShardPlan, start: int, stop: int) -> Sequence[object]:
        if start == 3:
            is_read.set()
        return given(shard, start, stop)

    def sampler(given: Sequence[object], *, seed: int, indices: Sequence[int]) -> int:
        assert indices[0] > 0 or is_read.wait(60)
        return len(given)

    monkeypatch.setattr(worker, "_given", read)
    monkeypatch.setattr(worker, "_sampler", sampler)
    batches = list(worker._sampled(plan.shard(0), lambda: False))
    assert batches == [(0, 3, 3), (3, 6, 3), (6, 8, 2)]
    worker.close()
