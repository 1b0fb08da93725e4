"""How good a dataset is: quality numbers from the images in its committed shards.

Digits are judged by the shipped feature network and the real digits. Other images are judged as the
field judges ImageNet models: by the Inception network and reference statistics that the user gives.

Shape legend: N images of a set, F features, K classes, B images of a batch, H W sides, C channels.
"""

from __future__ import annotations

import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

import numpy as np
from tqdm import tqdm

from depthvar.config import real_set_of
from depthvar.errors import InputError
from pipeline.dataset.loader import iterate_samples, requested_samples, stacked
from pipeline.research.quality.features import (
    MAX_CAS_SAMPLES,
    ClassifierRecipe,
    Readings,
    cas,
    digit_arrays,
    digit_features,
)
from pipeline.research.quality.inception import InceptionNetwork
from pipeline.research.quality.metrics import (
    Moments,
    frechet_distance,
    frechet_from_moments,
    inception_score,
    moments,
    precision_recall,
)
from pipeline.shards.committed import Dataset

MIN_SAMPLES = 10
"""Below this nothing is computed; a Frechet distance wants thousands."""
NEIGHBOURS = 3
SCORE_SPLIT = 5_000
"""Images of one split of the Inception Score, as in OpenAI's evaluator."""
_BATCH_DIGITS, _BATCH_INCEPTION = 250, 50
_TIMED_STEPS = 20  # of CAS, from which the time of all is told
_UNREADABLE = (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class EvaluationRequest:
    """What to compute; `cas_samples` None means all there are up to `MAX_CAS_SAMPLES`.

    `samples` None means every committed image. A `reference` is an `.npz` with mu and sigma, or
    images in arr_0, or all three, as OpenAI's evaluator has it.
    """

    samples: int | None = None
    cas_samples: int | None = None
    cas_runs: int = 0
    reference: Path | None = None
    inception_weights: Path | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Evaluation:
    """The numbers of a dataset: `scores` by name, in the order to show them."""

    num_samples: int
    num_planned: int
    features: str
    reference: str
    scores: dict[str, float]
    settings: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """One flat object: the scores under their names, then what they were computed from."""
        return {
            **self.scores,
            **self.settings,
            "num_samples": self.num_samples,
            "num_planned": self.num_planned,
            "features": self.features,
            "reference": self.reference,
            "notes": list(self.notes),
        }


class Network(Protocol):
    """What reads images: the digits' classifier or the Inception network."""

    def read(self, images_NHWC: np.ndarray, /) -> Readings:
        """Features and probabilities of uint8 images."""


@dataclass(frozen=True)
class Listener:
    """Who is told what while it happens: numbers once they are known, lines of text."""

    found: Callable[[Mapping[str, float]], object] = lambda scores: None
    said: Callable[[str], object] = lambda line: None


class _Scores(dict[str, float]):
    """Numbers by name, told as soon as they are known."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener

    def add(self, **found: float) -> None:
        self.update(found)
        self._listener.found(found)


def evaluate(
    dataset: Dataset, request: EvaluationRequest, listener: Listener | None = None
) -> Evaluation:
    """The numbers that apply to a dataset; those that take seconds come first.

    Errors: `InputError` for too few images and for missing or unfit references and weights;
    `ShardError` for a shard that does not hold what its record says.
    """
    count = requested_samples(dataset, request.samples)
    if count < MIN_SAMPLES:
        raise InputError(
            f"got {count} images, wanted at least {MIN_SAMPLES} to compare: generate more"
        )
    listener = listener or Listener()
    if shows_digits(dataset):
        return _evaluate_digits(dataset, request, count, listener)
    return _evaluate_with_inception(dataset, request, count, listener)


def shows_digits(dataset: Dataset) -> bool:
    """Whether the images are those of a model of the digits, by classes and format."""
    shown = dataset.plan
    return real_set_of(shown.class_names, shown.image_size[0], shown.image_channels) == "digits"


def _evaluate_digits(
    dataset: Dataset, request: EvaluationRequest, count: int, listener: Listener
) -> Evaluation:
    cas_samples = _cas_samples(request, count)
    network = digit_features()
    scores = _Scores(listener)
    made, labels_N = _read_images(dataset, network, count, _BATCH_DIGITS)
    scores.add(label_accuracy=float((made.labels == labels_N).mean()))
    real = network.read(digit_arrays("train")[0])
    scores.add(frechet_distance=frechet_distance(real.features_NF, made.features_NF))
    precision, recall = precision_recall(real.features_NF, made.features_NF, neighbours=NEIGHBOURS)
    scores.add(precision=precision, recall=recall)
    settings = {}
    if cas_samples:
        shown = stacked(list(islice(iterate_samples(dataset), cas_samples)))
        runs = _cas_runs(*shown, request.cas_runs, listener)
        deviation = float(np.std(runs, ddof=1)) if len(runs) > 1 else 0.0
        scores.add(cas=float(np.mean(runs)), cas_std=deviation)
        settings = {"cas_samples": cas_samples, "cas_runs": request.cas_runs}
    return Evaluation(
        num_samples=count,
        num_planned=dataset.plan.num_samples,
        features="digit features (96, shipped)",
        reference=f"{len(real.features_NF):,} real training digits; cas: 1,000 held-out digits",
        scores=scores,
        settings=settings,
        notes=_notes(dataset, count, labels_N),
    )


def _cas_samples(request: EvaluationRequest, count: int) -> int:
    """Images to train on, 0 for no CAS."""
    least, wanted = ClassifierRecipe().batch, request.cas_samples
    if request.cas_runs == 0 and wanted is not None:
        raise InputError("got --cas-samples without trainings for CAS, wanted both: add --cas-runs")
    if request.cas_runs == 0 or (wanted is None and count < least):
        return 0
    if wanted is None:
        return min(count, MAX_CAS_SAMPLES)
    if not least <= wanted <= count:
        raise InputError(
            f"got --cas-samples {wanted}, wanted {least} to {count}, the images there are: "
            "generate more, or choose another number"
        )
    return wanted


def _cas_runs(
    images_NHWC: np.ndarray, labels_N: np.ndarray, num_runs: int, listener: Listener
) -> list[float]:
    """Accuracy on the real held-out digits of classifiers trained on these images alone.

    How long all of it takes is said after the first few steps, from their time.
    """
    num_steps = ClassifierRecipe().steps
    steps, begun_s = 0, 0.0

    def after_step() -> None:
        nonlocal steps, begun_s
        bar.update()
        steps += 1
        if steps == 1:
            begun_s = time.perf_counter()  # the first step sets things up
        elif steps == 1 + _TIMED_STEPS:
            step_s = (time.perf_counter() - begun_s) / _TIMED_STEPS
            all_s = step_s * num_runs * num_steps
            duration = f"{all_s / 60:,.0f} min" if all_s >= 90 else f"{all_s:.0f} s"
            listener.said(
                f"cas: {num_runs} x {num_steps} steps of training, about {duration} in all"
            )

    with _bar("step of cas", num_runs * num_steps) as bar:
        return [
            cas(images_NHWC, labels_N, real_set="digits", seed=run, after_step=after_step)
            for run in range(num_runs)
        ]


def _evaluate_with_inception(
    dataset: Dataset, request: EvaluationRequest, count: int, listener: Listener
) -> Evaluation:
    weights = "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
    statistics = "reference statistics such as OpenAI's VIRTUAL_imagenet256_labeled.npz"
    missing = [
        f"{flag} is missing, wanted {what}: nothing is downloaded, so fetch it and name it"
        for flag, path, what in (
            ("--inception-weights", request.inception_weights, weights),
            ("--reference", request.reference, statistics),
        )
        if path is None
    ]
    if missing:
        raise InputError("\n".join(missing))
    assert request.reference is not None
    assert request.inception_weights is not None
    plan = dataset.plan
    if plan.image_channels != 3:
        raise InputError(
            f"{dataset.storage} holds grey images of {plan.model}, wanted RGB for the Inception"
            " network, or the bundled digits"
        )
    reference = Reference.open(request.reference, plan.image_size[0])
    network = InceptionNetwork(request.inception_weights, device=request.device)
    return inception_evaluation(dataset, network, reference, count, listener)


def inception_evaluation(
    dataset: Dataset,
    network: Network,
    reference: Reference,
    count: int,
    listener: Listener | None = None,
) -> Evaluation:
    """Inception Score, FID, and precision and recall where the reference holds images."""
    listener = listener or Listener()
    scores = _Scores(listener)
    made, labels_N = _read_images(dataset, network, count, _BATCH_INCEPTION)
    notes = list(_notes(dataset, count, labels_N))
    splits = max(1, count // SCORE_SPLIT)
    score, score_std = inception_score(made.probabilities_NK, splits=splits)
    scores.add(inception_score=score, inception_score_std=score_std)
    real_NF = None
    if reference.num_images:
        with _bar("reference image", reference.num_images) as bar:
            parts = []
            for images_BHWC in reference.batches(_BATCH_INCEPTION):
                parts.append(network.read(images_BHWC).features_NF)
                bar.update(len(images_BHWC))
        real_NF = np.concatenate(parts)
    real = reference.moments
    if real is None:
        assert real_NF is not None, "a reference has moments or images"
        real = moments(real_NF)
    num_features = made.features_NF.shape[1]
    if real.mean_F.size != num_features:
        raise InputError(
            f"{reference.path} holds {real.mean_F.size} features, wanted {num_features}: "
            "use reference statistics of the pooled Inception features"
        )
    scores.add(fid=frechet_from_moments(real, moments(made.features_NF)))
    if real_NF is not None and len(real_NF) > NEIGHBOURS:
        precision, recall = precision_recall(real_NF, made.features_NF, neighbours=NEIGHBOURS)
        scores.add(precision=precision, recall=recall)
    else:
        notes.append("the reference has no images (arr_0): no precision and recall")
    return Evaluation(
        num_samples=count,
        num_planned=dataset.plan.num_samples,
        features="Inception v3 of 2015-12-05, pooled (2048)",
        reference=reference.path.name,
        scores=scores,
        settings={"inception_splits": splits},
        notes=tuple(notes),
    )


@dataclass(frozen=True, eq=False)
class Reference:
    """Real images' statistics in an `.npz`: their moments (mu, sigma), `num_images` images, both.

    The images (arr_0, uint8, N x H x W x 3) are read in batches: 10,000 of 256 pixels are 2 GB.
    """

    path: Path
    moments: Moments | None
    num_images: int

    @staticmethod
    def open(path: Path, image_side: int) -> Reference:
        """Read the moments and check the images' shape.

        Errors: `InputError` for a file that is missing, damaged, no `.npz` or of another size.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = set(arrays.files)
                found = None
                if {"mu", "sigma"} <= names:
                    found = _checked_moments(path, arrays["mu"], arrays["sigma"])
            shape = _image_shape(path) if "arr_0" in names else None
        except _UNREADABLE as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"cannot read the reference {path} ({error}), wanted an .npz file with mu and "
                "sigma or with images in arr_0: check --reference"
            ) from error
        if found is None and shape is None:
            raise InputError(
                f"{path} holds {', '.join(sorted(names)) or 'nothing'}, wanted mu and sigma or "
                "images in arr_0: check --reference"
            )
        if shape is not None and shape[1:] != (image_side, image_side, 3):
            raise InputError(
                f"{path} holds images {'x'.join(map(str, shape[1:]))}, the dataset's are "
                f"{image_side}x{image_side}x3: use the reference of this size"
            )
        return Reference(path, found, 0 if shape is None else shape[0])

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The images in order, uint8 (B, H, W, 3), without holding all of them."""
        with _opened_images(self.path) as (stream, shape):
            image_bytes = int(np.prod(shape[1:]))
            for start in range(0, shape[0], size):
                count = min(size, shape[0] - start)
                data = stream.read(count * image_bytes)
                if len(data) != count * image_bytes:
                    raise InputError(f"{self.path} is cut off in arr_0: fetch it again")
                yield np.frombuffer(data, dtype=np.uint8).reshape(count, *shape[1:]).copy()


def _checked_moments(path: Path, mean: np.ndarray, covariance: np.ndarray) -> Moments:
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise InputError(
            f"{path} holds mu {mean.shape} and sigma {covariance.shape}, wanted (F,) and (F, F): "
            "check --reference"
        )
    return Moments(mean.astype(np.float64), covariance.astype(np.float64))


def _image_shape(path: Path) -> tuple[int, ...]:
    with _opened_images(path) as (_, shape):
        return shape


@contextmanager
def _opened_images(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The stream of arr_0's bytes after its header, and its shape."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise InputError(f"{path} has arr_0 in format {version}, wanted 1.0 or 2.0: save anew")
        shape, is_fortran, dtype = read_header(stream)
        if dtype != np.uint8 or is_fortran or len(shape) != 4 or shape[0] == 0:
            raise InputError(
                f"{path} holds arr_0 {shape} of {dtype}, wanted uint8 (images, height, width, 3): "
                "check --reference"
            )
        yield stream, shape


def _read_images(
    dataset: Dataset, network: Network, count: int, batch_size: int
) -> tuple[Readings, np.ndarray]:
    """What a network makes of the first `count` images in key order, and their labels."""
    samples = islice(iterate_samples(dataset), count)
    labels, readings = [], []
    with _bar("image", count) as bar:
        while batch := list(islice(samples, batch_size)):
            images_BHWC, labels_B = stacked(batch)
            readings.append(network.read(images_BHWC))
            labels.append(labels_B)
            bar.update(len(batch))
    return Readings.joined(readings), np.concatenate(labels)


def _bar(unit: str, total: int) -> tqdm[NoReturn]:
    return tqdm(total=total, unit=unit, desc="evaluate", file=sys.stderr)


def _notes(dataset: Dataset, count: int, labels_N: np.ndarray) -> tuple[str, ...]:
    """What a reader of the numbers must know."""
    notes = []
    plan = dataset.plan
    if dataset.num_missing:
        notes.append(
            f"not finished: {dataset.num_samples:,} of {plan.num_samples:,} images are committed; "
            "the numbers are of these alone"
        )
    if count < dataset.num_samples:
        notes.append(f"the first {count:,} of {dataset.num_samples:,} committed images were used")
    if plan.class_names:
        shares = np.bincount(labels_N, minlength=len(plan.class_names)) / count
        if shares.max() - shares.min() > max(0.2 / len(shares), 2.5 / count):
            notes.append("the classes are not balanced, those of the reference are")
    if plan.image_format == "jpg":
        notes.append("the images are JPEG files: their losses are part of the numbers")
    return tuple(notes)
