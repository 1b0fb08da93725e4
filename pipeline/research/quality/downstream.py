"""What a dataset is good for: classifiers trained on its shards, tested on images it never saw.

Shape legend: N images of a set, B of a batch, H W sides, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from depthvar.config import MODELS
from depthvar.errors import InputError
from depthvar.host.names import comparable
from depthvar.training.class_folders import folder_names
from depthvar.training.folders import PictureFolder, ReadingReport
from depthvar.training.pictures import WHITE, Background
from pipeline.dataset.loader import (
    check_enough_shards,
    iterate_samples,
    open_dataset,
    requested_samples,
    require_classes,
    shard_parts,
    stacked,
    training_pipeline,
)
from pipeline.request.classes import ClassIndex
from pipeline.request.plan_file import PLAN_NAME
from pipeline.research.quality.evaluation import shows_digits
from pipeline.research.quality.features import (
    Classifier,
    ClassifierRecipe,
    ShuffledArrays,
    check_enough_images,
    digit_arrays,
    fit_classifier,
    new_classifier,
)
from pipeline.shards.committed import Dataset
from pipeline.shards.samples import ShardError

DIGITS = "digits"
MIN_SIDE = 8
"""Pixels that the classifier needs on a side."""
_DEFAULT_WORKERS = 2
_LOADED_BATCH = 100


@dataclass(frozen=True, eq=False)
class TestSet:
    """The images to test on: uint8 (N, H, W, C) and int64 labels, with a name for reports.

    `reading` says how the pictures of a folder were read.
    """

    name: str
    images_NHWC: np.ndarray
    labels_N: np.ndarray
    reading: ReadingReport | None = None


@dataclass(frozen=True)
class TrainingSet:
    """The first `num_samples` images of a dataset and `num_real` real digits, by class in turn.

    `num_workers` processes read the shards; with 0 the training process does.
    """

    dataset: Dataset | None
    num_samples: int
    num_real: int
    num_workers: int

    @property
    def num_classes(self) -> int:
        """Classes of the model behind the dataset, with images or without."""
        if self.dataset is None:
            return len(MODELS[DIGITS].class_names)
        return len(self.dataset.plan.class_names)

    @property
    def num_channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        if self.dataset is None:
            return MODELS[DIGITS].image_channels
        return self.dataset.plan.image_channels

    def class_ids(self) -> set[int]:
        """Classes with at least one image, from the plan: nothing is read."""
        found: set[int] = set()
        if self.dataset is not None:
            plan = self.dataset.plan
            possible = set(plan.subject_counts)
            for part in shard_parts(self.dataset, self.num_samples):
                labels = set(plan.shard(part.shard_id).labels[: len(part.taken)].tolist())
                found |= set(map(plan.subject_of, labels))
                if found == possible:
                    break
        if self.num_real:
            found |= set(_real_digits(self.num_real)[1].tolist())
        return found


def open_test_set(
    test: str,
    dataset: Dataset | None,
    *,
    background: Background = WHITE,
    skip_unreadable: bool = False,
) -> TestSet:
    """The images that `--test` names, held in memory: what a classifier of `dataset` can read.

    `digits` are the 1,000 real held-out digits. Else a dataset of the same classes and image
    format, or a local folder of `<class name>/<image files>`, to which alone `background` and
    `skip_unreadable` apply, as in `PictureFolder.read`.
    Errors: `InputError` for images that do not fit or have no classes; `ShardError` for a damaged
    shard.
    """
    if dataset is not None:
        require_classes(dataset)
    if test == DIGITS:
        if dataset is not None and not shows_digits(dataset):
            raise InputError(
                f"got --test digits for {dataset.storage}, which shows no 32x32 grey digits: name "
                "a dataset or a folder <class name>/<image files> of its classes"
            )
        return TestSet("real held-out digits", *digit_arrays("held-out"))
    if dataset is None:
        raise InputError(
            f"got --test {test} without a dataset, wanted --test digits for real digits alone: "
            "name a dataset to train on"
        )
    side = dataset.plan.image_size[0]
    if side < MIN_SIDE:
        raise InputError(
            f"{dataset.storage} holds images of {side}x{side} pixels, wanted at least "
            f"{MIN_SIDE}x{MIN_SIDE} for the classifier: use another model"
        )
    folder = Path(test)
    if folder.is_dir() and not (folder / PLAN_NAME).exists():
        return _folder_images(folder, dataset, background, skip_unreadable)
    return _dataset_images(open_dataset(test), dataset)


def training_sets(
    dataset: Dataset | None,
    test_set: TestSet,
    *,
    samples: Sequence[int],
    real: Sequence[int],
    num_workers: int | None,
    recipe: ClassifierRecipe,
) -> list[TrainingSet]:
    """Every number of samples with every number of real digits, checked; no samples means all.

    Errors: `InputError` for too few images, shards or classes.
    """
    if dataset is None:
        if samples or not any(real):
            raise InputError(
                "got no dataset to take samples from, wanted one, or real digits alone: name a "
                "dataset, or give --real and no --samples"
            )
        counts = [0]
    else:
        counts = [requested_samples(dataset, number) for number in samples]
        counts = counts or [dataset.num_samples]
    _check_real(dataset, real)
    sets = [
        TrainingSet(dataset, number, num_real, _loader_workers(dataset, number, num_workers))
        for number in counts
        for num_real in real
    ]
    for one in sets:
        check_enough_images(one.num_samples + one.num_real, recipe)
        missing = sorted(set(test_set.labels_N.tolist()) - one.class_ids())
        if missing:
            raise InputError(
                f"got no image of {len(missing)} classes to train on, class {missing[0]} first, "
                f"which {test_set.name} have: generate all classes, or ask for more samples"
            )
    return sets


def train_on(
    training_set: TrainingSet,
    recipe: ClassifierRecipe,
    *,
    seed: int,
    after_step: Callable[[], object] | None = None,
) -> Classifier:
    """A classifier trained on shards, real digits, or both in proportion in every batch.

    Its weights are a function of the data, the seed, the numbers of loader workers and torch
    threads, and the processor. Errors: `ShardError` for a damaged shard.
    """
    generator = torch.Generator().manual_seed(seed)
    model = new_classifier(training_set.num_classes, training_set.num_channels, seed)
    real = None
    if training_set.num_real:
        real = ShuffledArrays(*_real_digits(training_set.num_real), generator)
    made = None
    if training_set.dataset is not None:
        made = ShardStream(training_set, training_set.dataset, seed)
    batches = _batches(training_set, made, real, recipe)
    return fit_classifier(model, batches, recipe, generator, after_step)


class ShardStream:
    """Images from the shards, epoch after epoch, cut into batches of any size."""

    def __init__(self, training_set: TrainingSet, dataset: Dataset, seed: int) -> None:
        workers = training_set.num_workers
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            training_pipeline(dataset, seed=seed, num_samples=training_set.num_samples),
            batch_size=_LOADED_BATCH,
            num_workers=workers,
            collate_fn=_collated,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers and not dataset.storage.is_local else None,
            generator=torch.Generator(),  # or it would draw from the global random stream
        )
        self._loaded = _epochs(loader)
        self._images_BHWC = torch.empty(0)
        self._labels_B = torch.empty(0, dtype=torch.int64)

    def take(self, number: int) -> tuple[Tensor, Tensor]:
        """The next images, uint8 (B, C, H, W), and their labels (B,)."""
        images, labels, num_there = [self._images_BHWC], [self._labels_B], len(self._labels_B)
        while num_there < number:
            images_BHWC, labels_B = next(self._loaded)
            images.append(images_BHWC)
            labels.append(labels_B)
            num_there += len(labels_B)
        images_BHWC = torch.cat([part for part in images if len(part)])
        labels_B = torch.cat(labels)
        self._images_BHWC, self._labels_B = images_BHWC[number:], labels_B[number:]
        return images_BHWC[:number].permute(0, 3, 1, 2), labels_B[:number]


def _epochs(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        with _plain_errors(loader.num_workers):
            yield from loader


def _batches(
    training_set: TrainingSet,
    made: ShardStream | None,
    real: ShuffledArrays | None,
    recipe: ClassifierRecipe,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches with both kinds in proportion: after an epoch every image was seen once."""
    total = training_set.num_samples + training_set.num_real
    num_real_taken = 0
    for step in range(recipe.steps):
        due = (step + 1) * recipe.batch * training_set.num_real // total
        num_real, num_real_taken = due - num_real_taken, due
        parts = []
        if made is not None and num_real < recipe.batch:
            parts.append(made.take(recipe.batch - num_real))
        if real is not None and num_real:
            parts.append(real.take(num_real))
        images, labels = zip(*parts, strict=True)
        yield torch.cat(images), torch.cat(labels)


def _collated(pairs: Sequence[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*pairs, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels, dtype=torch.int64)


@contextmanager
def _plain_errors(num_workers: int) -> Iterator[None]:
    """Take the worker's traceback, which torch puts into the message, away again."""
    try:
        yield
    except (ShardError, OSError) as error:
        if not num_workers:
            raise
        message = str(error).rstrip().splitlines()[-1].partition(": ")[2]
        raise type(error)(message) from error


def _loader_workers(dataset: Dataset | None, num_samples: int, num_workers: int | None) -> int:
    if dataset is None:
        return 0
    num_shards = len(shard_parts(dataset, num_samples))
    if num_workers is None:
        return min(_DEFAULT_WORKERS, num_shards)
    check_enough_shards(num_shards, num_workers=num_workers)
    return num_workers


def _check_real(dataset: Dataset | None, real: Sequence[int]) -> None:
    if not any(real):
        return
    if dataset is not None and not shows_digits(dataset):
        raise InputError(
            f"got --real {max(real)} for {dataset.storage}, which shows no 32x32 grey digits: "
            "leave --real out"
        )
    available = len(digit_arrays("train")[1])
    if max(real) > available:
        raise InputError(
            f"got --real {max(real)}, wanted at most {available}, the real training digits: "
            "ask for fewer"
        )


def _real_digits(number: int) -> tuple[np.ndarray, np.ndarray]:
    """The first real training digits, the classes taking turns."""
    images_NHWC, labels_N = digit_arrays("train")
    turns_N = np.empty(len(labels_N), dtype=np.int64)
    for label in np.unique(labels_N):
        of_label = labels_N == label
        turns_N[of_label] = np.arange(of_label.sum())
    chosen = np.lexsort((labels_N, turns_N))[:number]
    return images_NHWC[chosen], labels_N[chosen]


def _folder_images(
    folder: Path, dataset: Dataset, background: Background, skip_unreadable: bool
) -> TestSet:
    plan = dataset.plan
    pictures = PictureFolder.open(folder, flag="--test")
    ids = _ids_of_folders(pictures, plan.class_names)
    if unknown := [name for name, class_id in ids.items() if class_id is None]:
        raise InputError(
            f"--test {folder} has a class folder {unknown[0]!r}, wanted {folder}/<class name>/"
            f"<image files> with the class names of {plan.model}, such as "
            f"{plan.class_names[0]!r}: correct it"
        )
    images, report = pictures.read(
        side=plan.image_size[0],
        channels=plan.image_channels,
        background=background,
        skip_unreadable=skip_unreadable,
    )
    ids_of_folders = np.array(list(ids.values()), np.int64)
    return TestSet(
        f"images of {folder}",
        np.ascontiguousarray(images.images_NCHW.permute(0, 2, 3, 1).numpy()),
        ids_of_folders[images.labels_N.numpy()],
        report,
    )


def _ids_of_folders(pictures: PictureFolder, class_names: Sequence[str]) -> dict[str, int | None]:
    """The class of each folder, named as an export names it or as the class; None for no class."""
    exported = {comparable(folder): i for i, folder in enumerate(folder_names(class_names))}
    index = ClassIndex(class_names)
    ids: dict[str, int | None] = {}
    for folder, name in zip(pictures.files, pictures.class_names, strict=True):
        named = index.ids_named(name)
        ids[folder] = exported.get(comparable(folder), named[0] if len(named) == 1 else None)
    return ids


def _dataset_images(test: Dataset, dataset: Dataset) -> TestSet:
    ours, theirs = dataset.plan, test.plan
    our_names, their_names = ([*map(comparable, s.class_names)] for s in (ours, theirs))
    differing = {
        "class_names": our_names != their_names,
        "image_size": ours.image_size != theirs.image_size,
        "image_channels": ours.image_channels != theirs.image_channels,
    }
    for field, differs in differing.items():
        if differs:
            raise InputError(
                f"--test {test.storage} and {dataset.storage} differ in {field}: test on a dataset "
                "of the same classes and image format"
            )
    if test.plan.fingerprint == dataset.plan.fingerprint:
        raise InputError(
            f"--test {test.storage} holds the images that are trained on: test on other images"
        )
    return TestSet(f"images of {test.storage}", *stacked(list(iterate_samples(test))))
