"""`python -m tests.fake_job FLAGS`: `jobs.generate` with the fake sampler and no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from jobs._entry import run_job
from pipeline.request.config import GenerateConfig, load_config
from pipeline.run.driver import generate

FAKE_SAMPLER = "tests.fakes:fake_sampler"


def fake_weights(model: str, weights: str | None) -> SimpleNamespace:
    return SimpleNamespace(sha256="ab" * 32, calibration=Path("none"))


def main(argv: Sequence[str] | None = None) -> int:
    config = load_config(GenerateConfig, argv, prog="fake_job", description="")
    with mock.patch("pipeline.request.job.identify_weights", fake_weights):
        return generate(config, sampler_factory=FAKE_SAMPLER)


if __name__ == "__main__":
    run_job(main)
