"""Calibrate the proxies of a model on its own full-depth samples: run once per set of weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from depthvar.errors import InputError
from depthvar.weights.files import BUNDLED, CALIBRATION_FILE
from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import JobConfig, load_config
from pipeline.request.paths import LocalPath, ModelName, Weights
from pipeline.request.weights import fetch_model


class CalibrateConfig(JobConfig):
    """What `depthvar calibrate` can be told."""

    model: ModelName = Field("digits", description="model to calibrate")
    weights: Weights | None = Field(
        None,
        description="weights as a folder, file, URI or Hugging Face repository (default: the"
        " model's own)",
    )
    out: LocalPath | None = Field(
        None,
        description="new model folder for a copy of the weights with the calibration; sample from"
        " it with --model (default: the calibration goes beside the weights, where these are in a"
        " folder of your own)",
    )
    samples: int = Field(400, gt=0, description="full-depth samples to fit on")
    batch_size: int = Field(50, gt=0, description="images sampled at once")
    device: str = Field("cpu", description="where the model runs: cpu or cuda")
    overwrite: bool = Field(False, description="replace a calibration that is beside the weights")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the calibration and print what it explains."""
    job = load_config(CalibrateConfig, argv, prog="depthvar calibrate", description=__doc__ or "")
    from depthvar.training.calibration import calibrate
    from depthvar.weights.checkpoint import (
        check_new_folder,
        convert_weights,
        load_model,
        save_proxy_fit,
        why_not_finite,
    )

    found = fetch_model(job.model, job.weights)
    if job.out is None:
        _check_own_folder(job, found.transformer.parent)
    else:
        check_new_folder(job.out)
    for note in found.notes:
        print(f"note: {note}")
    model = load_model(found, device=job.device)
    fit, explained_SL = calibrate(
        model, model.config.sampling, num_samples=job.samples, batch_size=job.batch_size
    )
    if not fit.slope_SLC.isfinite().all() or not fit.offset_SLC.isfinite().all():
        raise InputError(f"the samples are not finite: {why_not_finite(model)}")
    if job.out is not None:
        found = convert_weights(found, job.out, dtype=None)
    target = found.transformer.parent / CALIBRATION_FILE
    save_proxy_fit(target, fit, found)
    for scale, share in enumerate(explained_SL.mean(1).tolist()):
        side = model.config.sides[scale]
        print(f"scale {scale} ({side}x{side}): {share:.0%} of the change's energy explained")
    print(f"wrote {target}: sample with it by --model {job.out or _flags(job)}")
    return EXIT_DONE


def _check_own_folder(job: CalibrateConfig, folder: Path) -> None:
    """`InputError` unless a calibration may be written beside the weights."""
    given = Path(job.weights or job.model)
    is_own = given.exists() and BUNDLED.resolve() not in given.resolve().parents
    if not is_own or not os.access(folder, os.W_OK):
        raise InputError(
            f"the weights are in {folder}, wanted a folder of your own to write beside them: give "
            "--out with a new folder, which gets a copy of them"
        )
    target = folder / CALIBRATION_FILE
    if target.exists() and not job.overwrite:
        raise InputError(
            f"{target} exists, wanted a model without calibration: pass --overwrite; datasets "
            "begun with the old one can then not be resumed with the new"
        )


def _flags(job: CalibrateConfig) -> str:
    return job.model if job.weights is None else f"{job.model} --weights {job.weights}"


if __name__ == "__main__":
    run_job(main)
