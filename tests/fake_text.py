"""A job of a text model without a text model: prompts of the digits' names, and their states."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from depthvar.text.states import write_states
from pipeline.request.generation import GenerateConfig
from pipeline.request.job import plan_job
from pipeline.request.job_plan import JobPlan
from pipeline.run.worker import Workplace
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fakes import TEXT_MODEL

TEMPLATES = ("a photo of {class}", "{class} in the snow")
CLASSES = "zero,one,two,three,four,five,six,seven,eight,nine"


def states_of(prompt: str) -> np.ndarray:
    """Another number in every place, as many rows as the prompt has words."""
    rows = len(prompt.split())
    return (np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) + sum(prompt.encode())) / 7


def text_request(folder: Path, *more_templates: str, **changes: Any) -> GenerateConfig:
    """20 images of 10 classes in 3 shards of at most 8, batches of 3; two prompts of each class."""
    states, templates = folder / "states.safetensors", folder / "templates.txt"
    templates.write_text("\n".join((*TEMPLATES, *more_templates)))
    texts = [
        t.format(**{"class": c}) for c in CLASSES.split(",") for t in (*TEMPLATES, *more_templates)
    ]
    if not states.exists():
        write_states(states, {text: states_of(text) for text in texts})
    settings: dict[str, Any] = {
        "model": TEXT_MODEL.name,
        "class_names": CLASSES,
        "templates": templates,
        "text_states": states,
        "per_class": 2,
        "samples_per_shard": 8,
        "batch_size": 3,
        "device": "cpu",
        "scratch": folder / "scratch",
    }
    return GenerateConfig(out=str(folder / "out"), **{**settings, **changes})


def text_job(folder: Path, *more_templates: str) -> tuple[JobPlan, Workplace]:
    """The plan of `text_request`, and a place for its workers."""
    config = text_request(folder, *more_templates)
    with mock.patch("pipeline.request.job.fetch_model", fake_weights):
        plan, _ = plan_job(config)
    return plan, Workplace(
        out=config.out,
        text_states=str(config.text_states),
        scratch=str(config.scratch),
        device="cpu",
        sampler_factory=FAKE_SAMPLER,
    )
