"""Small plans and batches with invented pixels, for the tests of the pipeline."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from depthvar.presets import make_policy
from depthvar.settings import SamplingSettings
from pipeline.dataset.loader import open_dataset
from pipeline.request.job_plan import ImageCompute, JobPlan, Segment, ShardPlan
from pipeline.request.labels import LabelCounts
from pipeline.request.plan_file import open_plan
from pipeline.shards.committed import Dataset, committed_shards
from pipeline.shards.indexes import write_indexes
from pipeline.shards.manifest import (
    BuiltShard,
    CommitRecord,
    parquet_name,
    publish_shard,
    record_name,
    tar_name,
)
from pipeline.shards.writer import ShardWriter
from pipeline.storage import Storage

NUM_SCALES = 3
DEPTHS = ((4, 2, 2, 0), (3, 3, 1, 1, 1, 1, 1, 1, 0))
"""Of the tokens after the first, in some order."""
WITH_DEPTH_MAPS: dict[str, Any] = {
    "depth_map_grids": ((1, 1), (2, 2), (3, 3)),
    "compute": ImageCompute(24, 56, 2e6, 1e6, 6e6, (4.0, 2.0, 12 / 9)),
}
"""What makes a plan store the depths of `fake_batch`."""


def data_files(out: Path) -> dict[str, bytes]:
    """Tars and Parquet by name: what must be the same bytes whatever happened on the way."""
    files = [*out.glob("train/*.tar"), *out.glob("meta/*.parquet")]
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(files)}


def make_plan(counts: Mapping[int, int] | None = None, **changes: Any) -> JobPlan:
    """22 samples of 3 classes in shards of 9, batches of 4: nothing divides evenly."""
    settings: dict[str, Any] = {
        "model": "fake",
        "weights_sha256": "ab" * 32,
        "class_names": ("zero", "one, or uno", "../tw|o\n", "three"),
        "image_size": (7, 7),
        "image_channels": 1,
        "policy": make_policy("depthvar", reference_scale=1),
        "sampling": SamplingSettings(cfg=1.5, top_k=90, top_p=0.96),
        "precision": "float32",
        "seed": 5,
        "samples_per_shard": 9,
        "batch_size": 4,
        "image_format": "png",
        "compute": ImageCompute(34, 100, 2e6, 1e6, 6e6, (4.0, 2.0, 1.25)),
    }
    labels = LabelCounts.from_mapping(counts or {0: 8, 1: 6, 2: 8})
    return JobPlan(**{**settings, **changes}, segments=(Segment(labels),))


@dataclass(frozen=True)
class FakeBatch:
    images_BHWC: np.ndarray
    mean_change_BS: np.ndarray
    mean_log_prob_BS: np.ndarray
    sampling_s: float = 0.25
    decoding_s: float = 0.125
    depths_BN: np.ndarray | None = None


def fake_batch(plan: JobPlan, indices: Iterable[int]) -> FakeBatch:
    """A function of the seed and the indices alone, as a sampler's batch is."""
    shape = (*plan.image_size, plan.image_channels)
    images, changes, log_probs, depths = [], [], [], []
    for index in indices:
        rng = np.random.default_rng((plan.seed, index))
        images.append(rng.integers(0, 256, shape, dtype=np.uint8))
        changes.append(rng.random(NUM_SCALES, dtype=np.float32))
        log_probs.append(-rng.random(NUM_SCALES, dtype=np.float32))
        depths.append(np.concatenate([[4], *(rng.permutation(d) for d in DEPTHS)]))
    depths_BN = np.stack(depths).astype(np.uint8)
    signals = np.stack(changes), np.stack(log_probs)
    return FakeBatch(np.stack(images), *signals, depths_BN=depths_BN)


def fill(writer: ShardWriter, plan: JobPlan, shard: ShardPlan) -> BuiltShard:
    for start, stop in shard.micro_batches:
        writer.add(fake_batch(plan, range(start, stop)), start)
    return writer.finish()


def record_of(plan: JobPlan, built: BuiltShard) -> CommitRecord:
    return CommitRecord.of(
        plan,
        built,
        attempt=1,
        worker="host:1",
        device="cpu",
        threads=1,
        environment={"torch": "2"},
    )


def publish_one(storage: Storage, plan: JobPlan, shard_id: int, scratch: Path) -> CommitRecord:
    shard = plan.shard(shard_id)
    with ShardWriter(plan, shard, scratch) as writer:
        built = fill(writer, plan, shard)
        record = record_of(plan, built)
        publish_shard(storage, plan, built, record)
    return record


def write_dataset(storage: Storage, plan: JobPlan, scratch: Path) -> JobPlan:
    """All shards and indexes, as a run that ended well leaves them."""
    plan = open_plan(storage, plan)
    for shard_id in range(plan.num_shards):
        publish_one(storage, plan, shard_id, scratch)
    write_indexes(storage, plan, committed_shards(storage, plan))
    return plan


def to_old_layout(out: Path) -> None:
    """Turn a dataset into what earlier releases left: records and ledger in `meta/`, one more field
    in every record, another card, and no `_info.json`."""
    for file in sorted((out / "commits").iterdir()):
        data = file.read_bytes()
        if file.suffix == ".json":
            fields = iter(json.loads(data).items())
            head = dict(next(fields) for _ in range(2))
            old = {**head, "plan_fingerprint": head["fingerprint"], **dict(fields)}
            data = (json.dumps(old, indent=1) + "\n").encode()
        (out / "meta" / file.name).write_bytes(data)
        file.unlink()
    (out / "commits").rmdir()
    (out / "_info.json").unlink(missing_ok=True)
    if (out / "README.md").exists():
        (out / "README.md").write_text("# The card of an earlier release\n")


def write_images(folder: Path, plan: JobPlan, images_NHWC: np.ndarray) -> Dataset:
    """A dataset that holds these images, one for each index."""
    storage = Storage.open(folder)
    plan = open_plan(storage, plan)
    for shard_id in range(plan.num_shards):
        shard = plan.shard(shard_id)
        with ShardWriter(plan, shard, folder.parent / "scratch") as writer:
            for start, stop in shard.micro_batches:
                zeros = np.zeros((stop - start, NUM_SCALES), dtype=np.float32)
                writer.add(FakeBatch(images_NHWC[start:stop], zeros, zeros), start)
            built = writer.finish()
            publish_shard(storage, plan, built, record_of(plan, built))
    return open_dataset(str(folder))


def fake_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Noise in place of `features.digit_arrays`, which takes seconds: ordered by class as it is."""
    per_class = {"train": 20, "held-out": 5}[split]
    rng = np.random.default_rng(per_class)
    images = rng.integers(0, 256, (10 * per_class, 32, 32, 1), dtype=np.uint8)
    return images, np.repeat(np.arange(10), per_class)


def committed_anew(storage: Storage, shard_id: int) -> None:
    """Make the record fit the files again, as an intruder or a bug would."""
    record = CommitRecord.from_json(storage.read(record_name(shard_id)))
    assert record is not None
    entries = {}
    for kind, name in (("tar", tar_name(shard_id)), ("parquet", parquet_name(shard_id))):
        data = storage.read(name)
        entry = getattr(record.files, kind)
        entries[kind] = dataclasses.replace(
            entry, size=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
    files = dataclasses.replace(record.files, **entries)
    storage.publish_bytes(dataclasses.replace(record, files=files).to_json(), record_name(shard_id))


def rewrite_tar(
    storage: Storage, shard_id: int, change: Callable[[list[tuple[str, bytes]]], None]
) -> None:
    with tarfile.open(fileobj=io.BytesIO(storage.read(tar_name(shard_id)))) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    change(members)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    storage.publish_bytes(buffer.getvalue(), tar_name(shard_id))


def rewrite_rows(storage: Storage, shard_id: int, change: Callable[[list[dict]], None]) -> None:
    table = pq.read_table(io.BytesIO(storage.read(parquet_name(shard_id))))
    rows = table.to_pylist()
    change(rows)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), buffer)
    storage.publish_bytes(buffer.getvalue(), parquet_name(shard_id))


def object_store() -> Storage:
    """A store in memory: names without folders, whole uploads, no rename, as S3 looks to us."""
    filesystem = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    root = f"bucket/{uuid.uuid4().hex}"
    return Storage(f"s3://{root}", filesystem, root, is_local=False)
