"""A job of a text model without a text model: prompts of the digits' names, and their states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np

from depthvar.text.states import GivenStates, write_states
from pipeline.request.generation import GenerateConfig
from pipeline.request.job import plan_job
from pipeline.request.job_plan import JobPlan
from pipeline.request.prompts import ClassPrompts
from pipeline.run.worker import Workplace
from tests.fake_job import FAKE_SAMPLER, fake_weights

TEMPLATES = ("a photo of {class}", "{class} in the snow")


def states_of(prompt: str) -> np.ndarray:
    """Another number in every place, as many rows as the prompt has words."""
    rows = len(prompt.split())
    return (np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) + sum(prompt.encode())) / 7


def text_job(folder: Path, *more_templates: str) -> tuple[JobPlan, Workplace]:
    """20 images of 10 classes in 3 shards of at most 8, batches of 3; two prompts of each class."""
    states, out = folder / "states.safetensors", str(folder / "out")
    config = GenerateConfig(out=out, per_class=2, samples_per_shard=8, batch_size=3, device="cpu")
    with mock.patch("pipeline.request.job.fetch_model", fake_weights):
        plan = plan_job(config)[0]
    plan = replace(plan, prompts=ClassPrompts((*TEMPLATES, *more_templates)))
    if not states.exists():
        write_states(states, {p: states_of(p) for p in plan.distinct_prompts()})
    return replace(plan, text_encoder_sha256=GivenStates(states).sha256), Workplace(
        out=out,
        text_states=str(states),
        scratch=str(folder / "scratch"),
        device="cpu",
        sampler_factory=FAKE_SAMPLER,
    )
