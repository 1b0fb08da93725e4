"""Calibrate the proxies of a model on its own full-depth samples: run once per set of weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from depthvar.calibration import calibrate
from depthvar.checkpoint import CALIBRATION_FILE, load_model, save_proxy_fit
from depthvar.errors import InputError
from jobs._entry import EXIT_DONE, run_job
from pipeline.config import JobConfig, load_config
from pipeline.weights import local_weights


class CalibrateConfig(JobConfig):
    """What `jobs.calibrate` can be told."""

    model: str = Field("digits", description="model to calibrate")
    weights: str | None = Field(None, description="weights file or folder (default: the model's)")
    samples: int = Field(400, gt=0, description="full-depth samples to fit on")
    batch_size: int = Field(50, gt=0, description="images sampled at once")
    device: str = Field("cpu", description="where the model runs: cpu or cuda")
    overwrite: bool = Field(False, description="replace a calibration that is there")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the calibration beside the weights and print what it explains."""
    job = load_config(
        CalibrateConfig, argv, prog="python -m jobs.calibrate", description=__doc__ or ""
    )
    model = load_model(job.model, local_weights(job.model, job.weights), device=job.device)
    target = model.identity.transformer.parent / CALIBRATION_FILE
    if target.exists() and not job.overwrite:
        raise InputError(
            f"{target} exists, wanted a model without calibration: pass --overwrite; datasets "
            "begun with the old one can then not be resumed with the new"
        )
    fit, explained_SL = calibrate(
        model, model.config.sampling, num_samples=job.samples, batch_size=job.batch_size
    )
    unfinished = target.with_suffix(".tmp")
    save_proxy_fit(unfinished, fit, model.identity)
    shutil.move(unfinished, target)
    for scale, share in enumerate(explained_SL.mean(1).tolist()):
        side = model.config.sides[scale]
        print(f"scale {scale} ({side}x{side}): {share:.0%} of the change's energy explained")
    print(f"wrote {Path(target)}")
    return EXIT_DONE


if __name__ == "__main__":
    run_job(main)
