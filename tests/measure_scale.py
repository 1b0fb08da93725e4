"""What a dataset of many shards costs the driver and whoever looks at it, without a sampler:

    python -m tests.measure_scale [--shards 100000] [--workers 8 32 64] [--folder DIR]

Writes the files of so many committed shards, small ones but for their records, then measures each
step in a process of its own: seconds, processor seconds, memory beyond what the imports take, and
how many files it reads. Seconds mean something on a machine that does nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import open_plan
from pipeline.shards.manifest import (
    FOLDERS,
    BatchTiming,
    CommitRecord,
    FileEntry,
    ShardFiles,
    parquet_name,
    record_name,
    tar_name,
)
from pipeline.storage import Storage
from tests.fake_shards import make_plan

SAMPLES_PER_SHARD, BATCH_SIZE = 512, 32
FILE_BYTES = 64
ENVIRONMENT = dict.fromkeys(
    ("cuda", "cudnn", "depthvar", "machine", "numpy", "pillow", "platform", "python", "torch"),
    "1.2.3",
)
HEADINGS = ("step", "seconds", "processor", "memory", "files read")


def many_shards(out: Path, num_shards: int, *, num_missing: int = 0) -> JobPlan:
    """A planned dataset whose shards look committed, all but the last ones."""
    storage = Storage.open(out)
    counts = {0: num_shards * SAMPLES_PER_SHARD}
    sizes = {"samples_per_shard": SAMPLES_PER_SHARD, "batch_size": BATCH_SIZE}
    plan = open_plan(storage, make_plan(counts, **sizes))
    for folder in FOLDERS:
        (out / folder).mkdir()
    template = _record(plan, 0).to_json().decode()
    for shard_id in range(num_shards - num_missing):
        text = template.replace('"shard_id": 0', f'"shard_id": {shard_id}')
        for name_of in (tar_name, parquet_name):
            first, own = _entry(name_of(0)), _entry(name_of(shard_id))
            text = text.replace(first.name, own.name).replace(first.sha256, own.sha256)
            (out / own.name).write_bytes(bytes(FILE_BYTES))
        (out / record_name(shard_id)).write_text(text)
    return plan


def _record(plan: JobPlan, shard_id: int) -> CommitRecord:
    starts = range(0, SAMPLES_PER_SHARD, BATCH_SIZE)
    took_s = (0.1234567, 0.0234567, 0.3456789)
    return CommitRecord(
        shard_id=shard_id,
        fingerprint=plan.shard_fingerprint(shard_id),
        num_samples=SAMPLES_PER_SHARD,
        num_blank=0,
        num_duplicates=0,
        files=ShardFiles(_entry(tar_name(shard_id)), _entry(parquet_name(shard_id))),
        attempt=1,
        worker="node-17:4242",
        device="NVIDIA H100 80GB HBM3",
        threads=1,
        environment=ENVIRONMENT,
        batches=tuple(BatchTiming(i, i + BATCH_SIZE, *took_s) for i in starts),
        committed_at="2026-01-02T03:04:05.678+00:00",
    )


def _entry(name: str) -> FileEntry:
    return FileEntry(name, FILE_BYTES, hashlib.sha256(name.encode()).hexdigest())


@contextmanager
def files_read() -> Iterator[list[str]]:
    """The names of the files that are read meanwhile."""
    names: list[str] = []
    read = Storage.read

    def counted(storage: Storage, name: str) -> bytes:
        names.append(name)
        return read(storage, name)

    with mock.patch.object(Storage, "read", counted):
        yield names
