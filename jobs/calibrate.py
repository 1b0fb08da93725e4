"""Calibrate the proxies of a model on its own full-depth samples: run once per set of weights.

Of a text model also once per size of image, on samples of prompts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from depthvar.config import AnyModel, ModelConfig, of_written_size
from depthvar.errors import InputError
from depthvar.infinity_config import InfinityConfig
from depthvar.weights.files import BUNDLED, CALIBRATION_FILE
from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import load_config
from pipeline.request.generation import DEFAULT_BATCH_SIZE, DEFAULT_PRECISION, ModelRequest
from pipeline.request.job import asked_in_words
from pipeline.request.paths import LocalPath
from pipeline.request.prompts import distinct_texts
from pipeline.request.text import find_text
from pipeline.request.weights import fetch_model

if TYPE_CHECKING:
    import numpy as np

    from depthvar.sampling import Given

_ENCODED_AT_ONCE = 64


class CalibrateConfig(ModelRequest):
    """What `depthvar calibrate` can be told."""

    out: LocalPath | None = Field(
        None,
        description="new model folder for a copy of the weights with the calibration; sample from"
        " it with --model (default: the calibration goes beside the weights, where these are in a"
        " folder of your own)",
    )
    samples: int = Field(
        400, gt=0, description="full-depth samples to fit on, of the classes or prompts in turn"
    )
    batch_size: int | None = Field(
        None,
        gt=0,
        description=f"images sampled at once (default: {DEFAULT_BATCH_SIZE}, of a text model 1)",
    )
    device: str = Field("cpu", description="where the model runs: cpu or cuda")
    overwrite: bool = Field(False, description="replace a calibration that is beside the weights")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the calibration and print what it explains."""
    job = load_config(CalibrateConfig, argv, prog="depthvar calibrate", description=__doc__ or "")
    import torch

    from depthvar.training.calibration import calibrate
    from depthvar.weights.checkpoint import (
        check_new_folder,
        convert_weights,
        load_any,
        save_proxy_fit,
        why_not_finite,
    )

    found = fetch_model(job.model, job.weights)
    if job.out is None:
        _check_own_folder(job, found.transformer.parent)
    else:
        check_new_folder(job.out)
    config = of_written_size(found.config, job.image_size)
    found = replace(found, config=config, calibration=None)  # an earlier one is of no use here
    given = _given(job, config)
    for note in found.notes:
        print(f"note: {note}")
    model = load_any(
        found, device=job.device, dtype=getattr(torch, job.precision or DEFAULT_PRECISION)
    )
    batch_size = job.batch_size or (1 if config.is_text else DEFAULT_BATCH_SIZE)
    fit, explained_SL = calibrate(model, config.sampling, given, batch_size=batch_size)
    if not fit.slope_SLC.isfinite().all() or not fit.offset_SLC.isfinite().all():
        raise InputError(f"the samples are not finite: {why_not_finite(model)}")
    if job.out is not None:
        found = convert_weights(found, job.out, dtype=None)
    target = found.transformer.parent / CALIBRATION_FILE
    save_proxy_fit(target, fit, found)
    for scale, share in enumerate(explained_SL.mean(1).tolist()):
        rows, columns = config.grids[scale]
        print(f"scale {scale} ({rows}x{columns}): {share:.0%} of the change's energy explained")
    print(f"wrote {target}: sample with it by --model {job.out or _flags(job)}")
    return EXIT_DONE


def _given(job: CalibrateConfig, model: AnyModel) -> Given:
    """What each sample is of: the classes in turn, or the states of the prompts in turn."""
    if wrong := job.unfit_for(is_text=model.is_text):
        kind = "knows its own classes alone: leave it out"
        if model.is_text:
            kind = "makes images from text: give --class-names or --prompts"
        raise InputError(f"got {wrong}, but {model.name} {kind}")
    if isinstance(model, ModelConfig):
        return [i % model.num_classes for i in range(job.samples)]
    states = _states(job, model)
    return [states[i % len(states)] for i in range(job.samples)]


def _states(job: CalibrateConfig, model: InfinityConfig) -> list[np.ndarray]:
    """The states of the prompts, or of as many as there are samples, from all over the list.

    The encoder is gone from memory at the end.
    """
    import torch
    from tqdm import tqdm

    asked = asked_in_words(job, 1, print)
    assert asked.prompts is not None
    texts = list(distinct_texts(asked.prompts, asked.counts.class_ids, asked.class_names))
    texts = texts[:: max(1, len(texts) // job.samples)][: job.samples]
    source = find_text(job.text_encoder, None if job.text_states is None else str(job.text_states))
    source.check(texts, width=model.text_width, max_tokens=model.max_text_tokens)
    is_half = (job.precision or DEFAULT_PRECISION) != "float32"
    encode = source.load(job.device, half=is_half, threads=torch.get_num_threads())
    states: list[np.ndarray] = []
    with tqdm(total=len(texts), desc="encode", unit="prompt") as bar:
        while len(states) < len(texts):
            states += encode(texts[len(states) : len(states) + _ENCODED_AT_ONCE])
            bar.update(len(states) - bar.n)
    return states


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
