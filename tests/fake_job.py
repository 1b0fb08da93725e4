"""`python -m tests.fake_job FLAGS`: `jobs.generate` with the fake sampler and no weights."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from unittest import mock

from depthvar.config import model_config
from jobs._entry import run_job
from pipeline.request.flags import load_config
from pipeline.request.generation import GenerateConfig
from pipeline.run.driver import generate
from tests.fakes import TEXT_MODEL

FAKE_SAMPLER = "tests.fakes:fake_sampler"


def fake_weights(model: str, weights: str | None) -> SimpleNamespace:
    """A known model found, with a calibration, and nothing of it read."""
    return SimpleNamespace(
        config=TEXT_MODEL if model == TEXT_MODEL.name else model_config(model, weights),
        sha256="ab" * 32,
        require_calibration=lambda config, policy: None,
        notes=(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    config = load_config(GenerateConfig, argv, prog="fake_job", description="")
    with mock.patch("pipeline.request.job.fetch_model", fake_weights):
        return generate(config, sampler_factory=FAKE_SAMPLER)


if __name__ == "__main__":
    run_job(main)
