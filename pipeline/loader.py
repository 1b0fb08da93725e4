"""Reading a dataset back: only shards that are done, from a folder or an object store.

`iterate_samples` reads everything once, in order. `training_pipeline` is a webdataset pipeline for
`torch.utils.data.DataLoader` with shuffling, several workers and several ranks. The shards are
plain WebDataset tars, so `webdataset.WebDataset` reads them too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import webdataset as wds
from webdataset.utils import PipelineStage, pytorch_worker_info

from depthvar.errors import InputError
from pipeline.manifest import CommitRecord, committed_shards, tar_name
from pipeline.plan import JobPlan, read_plan
from pipeline.samples import ShardError, TarSample, decode_image, read_tar
from pipeline.storage import Storage


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample read back; `image` is uint8 (height, width, channels)."""

    key: str
    label: int
    image: np.ndarray
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """The part of a dataset that is done: its plan and its commit records by shard id."""

    storage: Storage
    plan: JobPlan
    records: dict[int, CommitRecord]

    @property
    def num_samples(self) -> int:
        """Samples in the shards that are done."""
        return sum(record.num_samples for record in self.records.values())

    @property
    def num_missing(self) -> int:
        """Planned shards that are not done."""
        return self.plan.num_shards - len(self.records)


def open_dataset(uri: str) -> Dataset:
    """The dataset in a folder or at a store URI.

    Errors: `InputError` where there is none, or none of its shards is done.
    """
    storage = Storage.open(uri)
    plan = read_plan(storage)
    if plan is None:
        raise InputError(f"got {storage}, which is empty, wanted a dataset: generate one first")
    records = committed_shards(storage, plan)
    if not records:
        raise InputError(
            f"got {storage}, where none of {plan.num_shards} shards is done: run its job first"
        )
    return Dataset(storage, plan, records)


def iterate_samples(dataset: Dataset) -> Iterator[Sample]:
    """Every sample of the shards that are done, in key order.

    Errors: `ShardError` where a shard does not hold what its record says.
    """
    settings = dataset.plan.settings
    for shard_id, record in sorted(dataset.records.items()):
        num_read = 0
        try:
            with dataset.storage.open_input(tar_name(shard_id)) as stream:
                for stored in read_tar(stream, settings.image_format):
                    yield _decoded(stored, settings.image_channels)
                    num_read += 1
            if num_read != record.num_samples:
                raise ShardError(f"got {num_read} samples, wanted {record.num_samples}")
        except ShardError as error:
            raise ShardError(
                f"{tar_name(shard_id)}: {error}; run verify --deep, then generate again"
            ) from error


def training_pipeline(
    dataset: Dataset,
    *,
    seed: int = 0,
    shuffle_buffer: int = 1000,
    equal_share: bool = False,
    transform: Callable[[np.ndarray], Any] | None = None,
) -> TrainingPipeline:
    """Pairs (image, label) for training, shuffled, split over ranks and loader workers by shard.

    `shuffle_buffer` samples wait in each worker to be mixed; 0 keeps the order. With `equal_share`
    every worker gives the same number of samples (total // workers, repeating its shards where
    they hold fewer), so that no rank waits for another at the end of an epoch; without it every
    sample comes exactly once. `transform` maps the uint8 image (height, width, channels). Object
    stores want loader workers that are spawned, not forked.
    Errors, at the start of iteration: `InputError` for fewer shards than ranks x workers.
    """
    settings = dataset.plan.settings
    shards = ShardOrder(dataset, seed, shuffle=shuffle_buffer > 0, repeat=equal_share)
    stages: list[Any] = [
        shards,
        partial(_read_shards, uri=dataset.storage.uri, image_format=settings.image_format),
    ]
    if shuffle_buffer > 0:
        stages.append(SampleShuffle(shards, shuffle_buffer))
    stages.append(partial(_training_pairs, channels=settings.image_channels, transform=transform))
    if equal_share:
        stages.append(partial(_first_share, num_samples=dataset.num_samples))
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
    """The first stage: the ids and sample counts of the shards this worker reads, in order."""

    def __init__(self, dataset: Dataset, seed: int, *, shuffle: bool, repeat: bool) -> None:
        self.shards = [(i, record.num_samples) for i, record in sorted(dataset.records.items())]
        self.seed, self.shuffle, self.repeat = seed, shuffle, repeat
        self.epoch = 0

    def run(self) -> Iterator[tuple[int, int]]:
        """One epoch, or with `repeat` one epoch after the other without an end."""
        rank, num_ranks, worker, num_workers = pytorch_worker_info()
        readers = num_ranks * num_workers
        if len(self.shards) < readers:
            raise InputError(
                f"got {len(self.shards)} shards for {num_ranks} ranks x {num_workers} loader "
                "workers, wanted a shard for each: use fewer workers, or generate with a smaller "
                "--samples-per-shard"
            )
        first_epoch, self.epoch = self.epoch, self.epoch + 1
        mine = list(self.shards)
        self._mix(mine, f"{first_epoch}")
        mine = mine[rank * num_workers + worker :: readers]
        yield from mine
        for lap in count(1) if self.repeat else ():
            self._mix(mine, f"{first_epoch} {lap}")
            yield from mine

    def _mix(self, shards: list[tuple[int, int]], when: str) -> None:
        if self.shuffle:
            random.Random(f"{self.seed} {when}").shuffle(shards)


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


def _read_shards(
    shards: Iterable[tuple[int, int]], *, uri: str, image_format: str
) -> Iterator[TarSample]:
    """The samples of the shards; the storage is opened here, in the loader worker's process."""
    storage = Storage.open(uri)
    for shard_id, num_samples in shards:
        num_read = 0
        with storage.open_input(tar_name(shard_id)) as stream:
            for sample in read_tar(stream, image_format):
                yield sample
                num_read += 1
        if num_read != num_samples:
            raise ShardError(
                f"{tar_name(shard_id)}: got {num_read} samples, wanted {num_samples}: "
                "run verify --deep, then generate again"
            )


def _training_pairs(
    samples: Iterable[TarSample],
    *,
    channels: int,
    transform: Callable[[np.ndarray], Any] | None,
) -> Iterator[tuple[Any, int]]:
    for sample in samples:
        image = decode_image(sample.image, channels)
        yield (image if transform is None else transform(image)), sample.label


def _first_share(pairs: Iterable[Any], *, num_samples: int) -> Iterator[Any]:
    _, num_ranks, _, num_workers = pytorch_worker_info()
    return islice(iter(pairs), num_samples // (num_ranks * num_workers))


def _decoded(stored: TarSample, channels: int) -> Sample:
    try:
        metadata = json.loads(stored.metadata)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"the .json member of {stored.key} does not parse") from error
    return Sample(stored.key, stored.label, decode_image(stored.image, channels), metadata)
