"""The work of a study: what is not done yet, in the study's processes, each piece into a file."""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from depthvar.host.processes import end_with_parent
from depthvar.timing import pixel_distance, time_policies
from depthvar.weights.checkpoint import LoadedModel, load_model
from depthvar.weights.find import FoundModel
from pipeline.research.quality.features import (
    MAX_CAS_SAMPLES,
    cas,
    real_arrays,
    to_safetensors,
    train_features,
)
from pipeline.research.quality.forced_images import ForcedImages
from pipeline.research.study.measure import (
    Judge,
    PolicySamples,
    badness,
    best_of_each_class,
    joined,
    judge_of,
    sample_policies,
)
from pipeline.research.study.protocol import AT_RANDOM, DISTANCE, HEADROOM_IMAGES, Cell, Study

_FILTER_SHARES = (0.05, 0.10)
_FILTER_SIGNALS = ("surprise", "change")
_BAR_EVERY_S = 0.5

Pair = tuple[Cell, int]
"""A cell and a seed."""
Part = tuple[Cell, int, range]
"""Some images of a cell and seed, by global index."""
Advance = Callable[[int], object]
"""Moves the progress bar on."""
Task = Callable[[Study, Any, Advance], None]
_shared_count: Any
"""In a process that was started for tasks: what all of them have counted."""


def run_study(study: Study) -> None:
    """Do what is not done yet: sample, measure, ask the signals, take the times."""
    config = study.config
    pairs = [(cell, seed) for cell in study.cells for seed in config.seeds]

    def lacking(kind: str, pairs: list[Pair] = pairs) -> list[Pair]:
        return [pair for pair in pairs if study.lacks(study.file(kind, *pair))]

    parts = [
        (cell, seed, part)
        for cell, seed in pairs
        for part in study.parts(cell)
        if study.lacks(study.samples_file(cell, seed, part))
    ]
    images = sum(len(part) for _, _, part in parts)
    _in_processes(study, _sample_group, _groups(parts), "sample", "image", images)
    comparable = [pair for pair in pairs if pair[0].num_samples <= study.full.num_samples]
    _in_processes(study, _take_distance, lacking("distances", comparable), "distances", "cell")
    if study.trains_features and study.lacks(study.features_file):
        _in_processes(study, _train_features, [None], "features", "network")
    _in_processes(study, _measure, lacking("measures"), "measures", "cell")
    without_losses = [cell for cell in study.with_losses if study.lacks(study.losses_file(cell))]
    _in_processes(study, _take_losses, without_losses, "losses", "cell")
    if config.headroom_after is not None and study.lacks(study.headroom_file):
        asked = [config.headroom_after]
        _in_processes(study, _ask_headroom, asked, "headroom", "image", HEADROOM_IMAGES)
    runs = [
        (cell, seed, run)
        for run in range(max(cell.cas_runs for cell in study.cells))
        for cell, seed in pairs
        if run < cell.cas_runs and study.lacks(study.cas_file(cell, seed, run))
    ]
    _in_processes(study, _train_classifier, runs, "cas", "run")
    unasked = lacking("signals", [pair for pair in pairs if pair[0].signals])
    filters = len(unasked) * (len(_FILTER_SIGNALS) + 1) * len(_FILTER_SHARES)
    _in_processes(study, ask_signals, unasked, "signals", "filter", filters)
    if study.lacks(study.times_file):
        rounds = config.timing_rounds
        total = (rounds + 1) * len(study.timed)  # one that is not counted comes first
        _in_processes(study, _take_times, [rounds], "times", "batch", total)


def _groups(parts: list[Part]) -> list[list[Part]]:
    """The same images of all cells go together: they share what they run in full depth."""

    def key(part: Part) -> tuple[int, int, int]:
        cell, seed, indices = part
        return -cell.num_samples, seed, indices.start

    return [list(group) for _, group in groupby(sorted(parts, key=key), key=key)]


def _in_processes(
    study: Study,
    task: Task,
    arguments: Sequence[Any],
    what: str,
    unit: str,
    total: int | None = None,
) -> None:
    """Run a task on every argument in the study's processes, under one progress bar.

    `total` is what the bar counts, one unit an argument unless given. One process is this one:
    nothing is started for it.
    """
    if not arguments:
        return
    bar = tqdm(total=total or len(arguments), desc=what, unit=unit, file=sys.stderr)
    if study.config.processes == 1:
        torch.set_num_threads(1)
        with bar:
            for argument in arguments:
                task(study, argument, bar.update)
        return
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        min(study.config.processes, len(arguments)),
        mp_context=context,
        initializer=_begin_process,
        initargs=(count,),
    )
    with pool, bar:
        waiting = {pool.submit(_run_task, task, study, argument) for argument in arguments}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=_BAR_EVERY_S)
                bar.update(count.get_obj().value - bar.n)  # unlocked: a holder may have died
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_process(count: Any) -> None:
    """Prepare a process for tasks that count on the number that the bar shows."""
    global _shared_count
    _shared_count = count
    end_with_parent()
    torch.set_num_threads(1)


def _run_task(task: Task, study: Study, argument: object) -> None:
    task(study, argument, _count_up)


def _count_up(number: int) -> None:
    with _shared_count.get_lock():
        _shared_count.value += number


def _model(study: Study) -> LoadedModel:
    return load_model(study.weights)


def _sample_group(study: Study, parts: list[Part], advance: Advance) -> None:
    cells = {cell.name: cell for cell, _, _ in parts}
    _, seed, indices = parts[0]
    made = sample_policies(
        _model(study),
        {name: cell.policy for name, cell in cells.items()},
        indices=indices,
        seed=seed,
        batch_size=study.config.batch_size,
        after_batch=advance,
    )
    for name, samples in made.items():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **vars(samples))
        file = study.samples_file(cells[name], seed, indices)
        study.storage.publish_bytes(buffer.getvalue(), file)


def load_samples(study: Study, cell: Cell, seed: int) -> PolicySamples:
    """What a finished cell made."""
    parts = []
    for part in study.parts(cell):
        data = study.storage.read(study.samples_file(cell, seed, part))
        with np.load(io.BytesIO(data)) as arrays:
            parts.append(PolicySamples(**arrays))
    return joined(parts)


def _take_distance(study: Study, pair: Pair, advance: Advance) -> None:
    cell, seed = pair
    samples, full = load_samples(study, cell, seed), load_samples(study, study.full, seed)
    distance = pixel_distance(samples.images_NHWC, full.images_NHWC)
    _publish_json(study, study.file("distances", cell, seed), {DISTANCE: distance})
    advance(1)


def _train_features(study: Study, _: None, advance: Advance) -> None:
    trained = to_safetensors(train_features(study.real_set))
    study.storage.publish_bytes(trained, study.features_file)
    advance(1)


def _judge(study: Study) -> Judge:
    trained = study.storage.read(study.features_file) if study.trains_features else None
    return judge_of(study.real_set, trained)


@lru_cache(maxsize=1)
def _forced_images(found: FoundModel, real_set: str) -> ForcedImages:
    """Those of the held-out images, made once in a process."""
    return ForcedImages(load_model(found, with_encoder=True), *real_arrays(real_set, "held-out"))


def _take_losses(study: Study, cell: Cell, advance: Advance) -> None:
    images = _forced_images(study.weights, study.real_set)
    buffer = io.BytesIO()
    np.save(buffer, images.losses(cell.policy))
    study.storage.publish_bytes(buffer.getvalue(), study.losses_file(cell))
    advance(1)


def _ask_headroom(study: Study, after: int, advance: Advance) -> None:
    images = _forced_images(study.weights, study.real_set)
    found = images.headroom(after, num_images=HEADROOM_IMAGES, after_batch=advance)
    _publish_json(study, study.headroom_file, [asdict(headroom) for headroom in found])


def _measure(study: Study, pair: Pair, advance: Advance) -> None:
    measured = _judge(study).measure(load_samples(study, *pair))
    _publish_json(study, study.file("measures", *pair), measured)
    advance(1)


def _train_classifier(study: Study, run: tuple[Cell, int, int], advance: Advance) -> None:
    cell, seed, number = run
    accuracy = _cas(study, load_samples(study, cell, seed), number)
    _publish_json(study, study.cas_file(cell, seed, number), {"cas": accuracy})
    advance(1)


def _cas(study: Study, samples: PolicySamples, run: int) -> float:
    images_NHWC, labels_N = samples.images_NHWC, samples.labels_N
    return cas(
        images_NHWC[:MAX_CAS_SAMPLES],
        labels_N[:MAX_CAS_SAMPLES],
        real_set=study.real_set,
        seed=run,
    )


def ask_signals(study: Study, pair: Pair, advance: Advance) -> None:
    """AUROC of every signal, and the quality when the worst by a signal are left out.

    The comparison drops as many at random (by global index, which knows nothing of the image).
    CAS is the mean of as many classifiers as the cell has.
    """
    judge, samples = _judge(study), load_samples(study, *pair)
    suspects = {name: badness(samples)[name] for name in _FILTER_SIGNALS}
    suspects[AT_RANDOM] = np.arange(len(samples.labels_N))
    filtered: dict[str, dict[str, float]] = {}
    for name, values_N in suspects.items():
        for share in _FILTER_SHARES:
            rest = best_of_each_class(samples, values_N, share)
            quality = judge.measure(rest)
            runs = [_cas(study, rest, run) for run in range(pair[0].cas_runs)]
            if runs:
                quality["cas"] = float(np.mean(runs))
            filtered[f"{name} {share:.0%}"] = quality
            advance(1)
    content = {"auroc": judge.signals(samples), "without_worst": filtered}
    _publish_json(study, study.file("signals", *pair), content)


def _take_times(study: Study, rounds: int, advance: Advance) -> None:
    laps = time_policies(
        _model(study),
        {cell.name: cell.policy for cell in study.timed},
        rounds=rounds,
        batch_size=study.config.batch_size,
        after_batch=advance,
    )
    times = {name: [lap.image_s for lap in of_cell] for name, of_cell in laps.items()}
    _publish_json(study, study.times_file, times)


def _publish_json(study: Study, name: str, content: object) -> None:
    study.storage.publish_bytes(json.dumps(content, indent=1).encode(), name)
