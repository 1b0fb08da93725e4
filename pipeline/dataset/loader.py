"""Reading a dataset back: only shards that are done, from a folder or an object store.

`iterate_samples` reads everything once, in order. `training_pipeline` is a webdataset pipeline for
`torch.utils.data.DataLoader` with shuffling, several workers and several ranks. The shards are
plain WebDataset tars, so `webdataset.WebDataset` reads them too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, Literal, cast

import numpy as np
import pyarrow.compute as pc
import webdataset as wds
from webdataset.utils import PipelineStage, pytorch_worker_info

from depthvar.errors import InputError
from pipeline.dataset.condition import Condition
from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import stored_plan
from pipeline.shards.committed import Dataset, committed_shards
from pipeline.shards.manifest import parquet_name, tar_name
from pipeline.shards.samples import (
    ShardError,
    TarSample,
    decode_image,
    read_parquet,
    read_tar,
)
from pipeline.shards.schema import STATUS_OK, schema_of
from pipeline.storage import Storage

Target = Literal["label", "prompt"]
_READERS = 16  # of rows: an object store answers many at once


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample read back; `image` is uint8 (height, width, channels).

    `label` is its class id, None where there are no classes; `prompt` None where there are none.
    """

    key: str
    label: int | None
    image: np.ndarray
    metadata: dict[str, Any]
    prompt: str | None = None


def open_dataset(uri: str) -> Dataset:
    """The dataset in a folder or at a store URI.

    Errors: `InputError` where there is none, or none of its shards is done.
    """
    storage = Storage.open(uri)
    plan = stored_plan(storage)
    records = committed_shards(storage, plan)
    if not records:
        raise InputError(
            f"got {storage}, where none of {plan.num_shards} shards is done: run its job first"
        )
    return Dataset(storage, plan, records)


def requested_samples(dataset: Dataset, samples: int | None) -> int:
    """How many samples are asked for with `--samples`: all that are committed for None.

    Errors: `InputError` where there are fewer.
    """
    available = dataset.num_samples
    if samples is not None and samples > available:
        raise InputError(
            f"got --samples {samples}, wanted at most {available}, which are committed in "
            f"{dataset.storage}: generate more, or ask for fewer"
        )
    return available if samples is None else samples


def require_classes(dataset: Dataset) -> None:
    """`InputError` for a dataset whose images have no classes."""
    if not dataset.plan.class_names:
        raise InputError(
            f"got {dataset.storage}, whose images have prompts and no classes, wanted labels: name "
            "a dataset with classes"
        )


@dataclass(frozen=True)
class ShardPart:
    """What is read of a shard of `num_samples`: the samples at some places, counted from 0."""

    shard_id: int
    num_samples: int
    taken: Sequence[int]


def shard_parts(
    dataset: Dataset, num_samples: int | None = None, *, where: str | None = None
) -> list[ShardPart]:
    """The shards that hold the first `num_samples` committed samples, in order; None for all.

    `where` leaves out the samples whose rows it does not fit (see `condition`), and reads all rows
    for it. Errors: `InputError` for what is no condition or fits none, `ShardError` for rows that
    are damaged.
    """
    ids = sorted(dataset.records)
    places: Iterable[Sequence[int]]
    if where is None:
        places = (range(dataset.records[shard_id].num_samples) for shard_id in ids)
    else:
        fitting = partial(_fitting, dataset, Condition(where, schema_of(dataset.plan)))
        with ThreadPoolExecutor(_READERS) as pool:
            places = list(pool.map(fitting, ids))
    left = dataset.num_samples if num_samples is None else num_samples
    parts = []
    for shard_id, fitting_places in zip(ids, places, strict=True):
        taken = fitting_places[:left]
        left -= len(taken)
        if len(taken):
            parts.append(ShardPart(shard_id, dataset.records[shard_id].num_samples, taken))
    if where is not None and not parts:
        raise InputError(f"got {where!r}, which fits no sample of {dataset.storage}: widen it")
    return parts


def _fitting(dataset: Dataset, condition: Condition, shard_id: int) -> Sequence[int]:
    """The places in a shard's tar of the samples that fit a condition."""
    name = parquet_name(shard_id)
    with naming_damage(name):
        rows = read_parquet(dataset.storage.read(name), schema_of(dataset.plan))
        rows = rows.filter(pc.field("status") == STATUS_OK)
        if len(rows) != dataset.records[shard_id].num_samples:
            raise ShardError(f"got {len(rows)} rows, wanted one for each sample")
    return cast("Sequence[int]", condition.places(rows))


def check_enough_shards(num_shards: int, *, num_ranks: int = 1, num_workers: int) -> None:
    """`InputError` where some loader worker would have no shard to read."""
    if num_shards < num_ranks * num_workers:
        raise InputError(
            f"got {num_shards} shards for {num_ranks} ranks x {num_workers} loader workers, wanted "
            "a shard for each: use fewer workers, or generate with a smaller --samples-per-shard"
        )


def iterate_samples(dataset: Dataset, *, where: str | None = None) -> Iterator[Sample]:
    """Every sample of the shards that are done, in key order; of those the ones that `where` fits.

    Errors: `ShardError` where a shard does not hold what its record says; as `shard_parts`.
    """
    for stored in iterate_stored(dataset, where=where):
        image = stored_image(stored, dataset.plan.image_channels)
        with naming_damage(stored.key):
            metadata = _metadata(stored)
        yield Sample(stored.key, stored.label, image, metadata, stored.prompt)


def iterate_stored(dataset: Dataset, *, where: str | None = None) -> Iterator[TarSample]:
    """As `iterate_samples`, every sample as the bytes of its files."""
    for part in shard_parts(dataset, where=where):
        yield from _read_shard(dataset.storage, part, dataset.plan)


def stored_image(stored: TarSample, channels: int) -> np.ndarray:
    """The pixels of a stored sample: uint8 (height, width, channels).

    Errors: `ShardError`, with the sample's key, where the file is damaged.
    """
    with naming_damage(stored.key):
        return decode_image(stored.image, channels)


def stacked(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Images of one size as uint8 (N, height, width, channels), and their int64 labels (N,).

    A label is -1 where there are no classes.
    """
    images_NHWC = np.stack([sample.image for sample in samples])
    labels = [-1 if sample.label is None else sample.label for sample in samples]
    return images_NHWC, np.array(labels, dtype=np.int64)


def training_pipeline(
    dataset: Dataset,
    *,
    seed: int = 0,
    where: str | None = None,
    num_samples: int | None = None,
    shuffle_buffer: int = 1000,
    equal_share: bool = False,
    transform: Callable[[np.ndarray], Any] | None = None,
    target: Target = "label",
) -> TrainingPipeline:
    """Pairs (image, target) for training, shuffled, split over ranks and loader workers by shard.

    `where` takes the samples whose rows it fits, such as `mean_log_prob > -2.5 and label in (1, 2)`
    (see `condition`), `num_samples` the first of them, None all.
    `shuffle_buffer` samples wait in each worker to be mixed; 0 keeps the order. With `equal_share`
    every worker gives the same number of samples (total // workers, repeating its shards where
    they hold fewer), so that no rank waits for another at the end of an epoch; without it every
    sample comes exactly once. `transform` maps the uint8 image (height, width, channels). The
    target is the class id, or of a text model's dataset the prompt. Object stores want loader
    workers that are spawned, not forked.
    Errors: `InputError` for a dataset that has no such target; as `shard_parts`; at the start of
    iteration `InputError` for fewer shards than ranks x workers.
    """
    plan, parts = dataset.plan, shard_parts(dataset, num_samples, where=where)
    if target == "label":
        require_classes(dataset)
    elif plan.prompts is None:
        raise InputError(f"got target='prompt' for {dataset.storage}, which has no prompts")
    shards = ShardOrder(parts, seed, shuffle=shuffle_buffer > 0, repeat=equal_share)
    stages: list[Any] = [
        shards,
        partial(_read_shards, uri=dataset.storage.uri, plan=plan),
    ]
    if shuffle_buffer > 0:
        stages.append(SampleShuffle(shards, shuffle_buffer))
    channels = plan.image_channels
    stages.append(partial(_training_pairs, channels=channels, transform=transform, target=target))
    if equal_share:
        total = sum(len(part.taken) for part in parts)
        stages.append(partial(_first_share, num_samples=total))
    return TrainingPipeline(shards, stages)


class TrainingPipeline(wds.DataPipeline):  # type: ignore[misc]
    """A webdataset pipeline whose order depends on (seed, epoch) alone."""

    def __init__(self, shards: ShardOrder, stages: list[Any]) -> None:
        super().__init__(*stages)
        self.shards = shards

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration.

        Call it before each epoch. Persistent loader workers keep their own copy, which counts
        epochs by itself.
        """
        self.shards.epoch = epoch


class ShardOrder(PipelineStage):  # type: ignore[misc]
    """The first stage: what this worker reads of which shards, in order."""

    def __init__(self, parts: list[ShardPart], seed: int, *, shuffle: bool, repeat: bool) -> None:
        self.parts = parts
        self.seed, self.shuffle, self.repeat = seed, shuffle, repeat
        self.epoch = 0

    def run(self) -> Iterator[ShardPart]:
        """One epoch, or with `repeat` one epoch after the other without an end."""
        rank, num_ranks, worker, num_workers = pytorch_worker_info()
        check_enough_shards(len(self.parts), num_ranks=num_ranks, num_workers=num_workers)
        first_epoch, self.epoch = self.epoch, self.epoch + 1
        mine = list(self.parts)
        self._mix(mine, f"{first_epoch}")
        mine = mine[rank * num_workers + worker :: num_ranks * num_workers]
        yield from mine
        for lap in count(1) if self.repeat else ():
            self._mix(mine, f"{first_epoch} {lap}")
            yield from mine

    def _mix(self, parts: list[ShardPart], when: str) -> None:
        if self.shuffle:
            random.Random(f"{self.seed} {when}").shuffle(parts)


class SampleShuffle(PipelineStage):  # type: ignore[misc]
    """Mixes the samples of a worker through a buffer, as (seed, epoch, worker) decide."""

    def __init__(self, shards: ShardOrder, size: int) -> None:
        self.shards, self.size = shards, size

    def run(self, source: Iterable[TarSample]) -> Iterator[TarSample]:
        """Every sample of `source` once."""
        rank, _, worker, _ = pytorch_worker_info()
        rng = random.Random(f"{self.shards.seed} {self.shards.epoch} {rank} {worker}")
        buffer: list[TarSample] = []
        for sample in source:
            buffer.append(sample)
            if len(buffer) > self.size:
                place = rng.randrange(len(buffer))
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                yield buffer.pop()
        rng.shuffle(buffer)
        yield from buffer


def _read_shards(parts: Iterable[ShardPart], *, uri: str, plan: JobPlan) -> Iterator[TarSample]:
    """The samples of the shards; the storage is opened here, in the loader worker's process."""
    storage = Storage.open(uri)
    for part in parts:
        yield from _read_shard(storage, part, plan)


def _read_shard(storage: Storage, part: ShardPart, plan: JobPlan) -> Iterator[TarSample]:
    wanted, num_read = iter(part.taken), 0
    following = next(wanted, None)
    with (
        naming_damage(tar_name(part.shard_id)),
        storage.open_input(tar_name(part.shard_id)) as stream,
    ):
        for sample in read_tar(stream, plan.image_format, plan.caption_suffixes):
            if num_read == following:
                yield sample
                following = next(wanted, None)
            num_read += 1
            if following is None and len(part.taken) < part.num_samples:
                return
        if num_read != part.num_samples:
            raise ShardError(f"got {num_read} samples, wanted {part.num_samples}")


@contextmanager
def naming_damage(what: str) -> Iterator[None]:
    """Say which file or sample is damaged, and what to do."""
    try:
        yield
    except ShardError as error:
        raise ShardError(
            f"{what}: {error}; run verify --deep --repair, then generate again"
        ) from error


def _training_pairs(
    samples: Iterable[TarSample],
    *,
    channels: int,
    transform: Callable[[np.ndarray], Any] | None,
    target: Target,
) -> Iterator[tuple[Any, int | str | None]]:
    for sample in samples:
        image = stored_image(sample, channels)
        wanted = sample.label if target == "label" else sample.prompt
        yield (image if transform is None else transform(image)), wanted


def _first_share(pairs: Iterable[Any], *, num_samples: int) -> Iterator[Any]:
    _, num_ranks, _, num_workers = pytorch_worker_info()
    return islice(iter(pairs), num_samples // (num_ranks * num_workers))


def _metadata(stored: TarSample) -> dict[str, Any]:
    try:
        metadata: dict[str, Any] = json.loads(stored.metadata)
    except (ValueError, RecursionError) as error:
        raise ShardError("its .json member does not parse") from error
    return metadata
