"""Reading one shard whole: its files against their hashes, each other and the plan."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from depthvar.errors import shown
from pipeline.request.job_plan import JobPlan, ShardPlan, key_of
from pipeline.shards.committed import ShardSummary
from pipeline.shards.depth_maps import read_depth_map
from pipeline.shards.manifest import FileEntry, parquet_name
from pipeline.shards.samples import (
    ByteReader,
    ShardError,
    TarSample,
    decode_image,
    pixel_hash,
    read_parquet,
    read_tar,
)
from pipeline.shards.schema import LOSSLESS_FORMATS, STATUS_OK, caption, schema_of
from pipeline.storage import Storage

_BLOCK_BYTES = 2**20
_SHOWN = 3  # of many findings in one shard


@dataclass
class Finding:
    """What reading one shard gave: problems as (kind, message), images of each subject."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    subjects: Counter[int | None] = field(default_factory=Counter)


def check_shard(storage: Storage, plan: JobPlan, record: ShardSummary) -> Finding:
    """Read every byte of a shard that is done. Errors: `OSError` where the storage fails."""
    finding = Finding()
    shard = plan.shard(record.shard_id)
    try:
        rows = _read_rows(storage, plan, record.files.parquet, finding)
        _compare_rows(plan, shard, rows, finding)
        _compare_tar(storage, plan, shard, record.files.tar, rows, finding)
    except FileNotFoundError as error:
        finding.problems.append(("missing", f"taken away while it was read: {error}"))
    except ShardError as error:
        finding.problems.append(("unreadable", str(error)))
    return finding


def _read_rows(
    storage: Storage, plan: JobPlan, entry: FileEntry, finding: Finding
) -> list[dict[str, Any]]:
    data = storage.read(entry.name)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        finding.problems.append(("hash", f"{entry.name} is not what was committed"))
    try:
        table = read_parquet(data, schema_of(plan))
    except ShardError as error:
        raise ShardError(f"{entry.name}: {error}") from error
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _compare_rows(
    plan: JobPlan, shard: ShardPlan, rows: list[dict[str, Any]], finding: Finding
) -> None:
    """The rows against the plan: one for each planned sample, in order, with what it shows."""
    name = parquet_name(shard.shard_id)
    wanted = [(i, key_of(i)) for i in range(shard.start, shard.stop)]
    if [(row["index"], row["key"]) for row in rows] != wanted:
        raise ShardError(f"{name} does not have one row for each planned sample, in order")
    wrong = [
        row["key"]
        for row, label in zip(rows, shard.labels.tolist(), strict=True)
        if not caption(plan, label, row["index"]).items() <= row.items()
    ]
    if wrong:
        what = "labels" if plan.prompts is None else "labels or prompts"
        finding.problems.append(("labels", f"{name}: {len(wrong)} {what}, first {wrong[0]}"))


def _compare_tar(
    storage: Storage,
    plan: JobPlan,
    shard: ShardPlan,
    entry: FileEntry,
    rows: list[dict[str, Any]],
    finding: Finding,
) -> None:
    """The samples against the rows and the plan, and the file against its hash, in one pass."""
    expected = iter([row for row in rows if row["status"] == STATUS_OK])
    messages: list[tuple[str, str]] = []
    with storage.open_input(entry.name) as source:
        stream = _HashingReader(source)
        try:
            for sample in read_tar(stream, plan.image_format, plan.caption_suffixes):
                finding.subjects[plan.stored_subject(sample.label, sample.prompt)] += 1
                row = next(expected, None)
                if row is None or row["key"] != sample.key:
                    raise ShardError(f"the sample {sample.key} is not the next one")
                index = int(sample.key)
                planned = caption(plan, int(shard.labels[index - shard.start]), index)
                for column, stored in (("label", sample.label), ("prompt", sample.prompt)):
                    if stored != planned.get(column):
                        messages.append(("labels", f"{sample.key} has {column} {shown(stored)}"))
                if difference := _difference(plan, sample, row):
                    messages.append(("content", f"{sample.key}: {difference}"))
            if (row := next(expected, None)) is not None:
                raise ShardError(f"it ends before the sample {row['key']}")
        except ShardError as error:
            messages.append(("unreadable", str(error)))
        if stream.hexdigest_to_end() != entry.sha256:
            messages.insert(0, ("hash", "it is not what was committed"))
    if len(messages) > _SHOWN:
        messages[_SHOWN:] = [(messages[_SHOWN][0], f"and {len(messages) - _SHOWN} more findings")]
    finding.problems += [(kind, f"{entry.name}: {message}") for kind, message in messages]


def _difference(plan: JobPlan, sample: TarSample, row: Mapping[str, Any]) -> str:
    """How a stored sample differs from its row; "" where it does not."""
    for column, stored in (("label", sample.label), ("prompt", sample.prompt)):
        if stored != row.get(column):
            return f"{column} {shown(stored)} in the tar, {shown(row[column])} in the Parquet"
    if (
        len(sample.image) != row["image_bytes"]
        or hashlib.sha256(sample.image).hexdigest() != row["image_sha256"]
    ):
        return "the image is another than in the Parquet"
    try:
        image_HWC = decode_image(sample.image, plan.image_channels)
        metadata = json.loads(sample.metadata)
        if sample.depths is not None and plan.depth_map_grids:
            read_depth_map(sample.depths, plan)
    except (ShardError, ValueError, RecursionError) as error:
        return f"it cannot be decoded: {error}"
    if image_HWC.shape[:2] != (row["height"], row["width"]):
        return f"the image is {image_HWC.shape[1]} x {image_HWC.shape[0]} pixels"
    if plan.image_format in LOSSLESS_FORMATS and pixel_hash(image_HWC) != row["pixel_sha256"]:
        return "the pixels are others than in the Parquet"
    if (sample.depths is None) == bool(plan.depth_map_grids):
        return f"it has {'no' if plan.depth_map_grids else 'a'} depth map"
    named = {"index", "label", "class_name", "pixel_sha256", "prompt", "template"} & row.keys()
    if not isinstance(metadata, dict) or any(metadata.get(n) != row[n] for n in named):
        return "the .json member says something else than the Parquet"
    return ""


class _HashingReader:
    """A read-only stream that hashes what passes through it."""

    def __init__(self, source: ByteReader) -> None:
        self._source, self._digest = source, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        data = self._source.read(size)
        self._digest.update(data)
        return data

    def hexdigest_to_end(self) -> str:
        """SHA-256 of the whole stream, the part that nobody has read included."""
        while self.read(_BLOCK_BYTES):
            pass
        return self._digest.hexdigest()
