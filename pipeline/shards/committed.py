"""What is done of a dataset, as slim values: from the commit records, or a compact index of them.

The records are the truth. `commits/summaries.parquet` repeats what is needed of each, with the
size and the time that a listing gives of the record: where those agree the record is not read. What
is missing there, older, or in doubt is read, and a file that is damaged counts as none: so it may
be deleted at any time, and `keep_summaries` writes it anew.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from sys import intern
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.request.job_plan import JobPlan
from pipeline.shards.claims import doubtful_shards
from pipeline.shards.manifest import (
    SUMMARIES_NAME,
    CommitRecord,
    FileEntry,
    Listing,
    ShardFacts,
    ShardFiles,
    describes_shard,
    is_whole,
    list_shards,
    listed_shards,
    made_with,
    parquet_name,
    seconds_by_stage,
    tar_name,
)
from pipeline.storage import Storage

_READERS = 16  # records are small: an object store answers many at once
_AT_ONCE = 32  # records that a reader reads before it asks for more
_ROWS_AT_ONCE = 4_096  # as Python objects rows take much memory
FEWEST_KEPT = 1_000
"""Committed shards from which on there is a file of summaries."""

_WHOLE, _TEXT, _SECONDS = pa.int64(), pa.string(), pa.float64()
_COLUMNS = {
    "record": _TEXT,
    "record_size": _WHOLE,
    "record_time_ns": _WHOLE,
    "shard_id": _WHOLE,
    "fingerprint": _TEXT,
    "num_samples": _WHOLE,
    "num_blank": _WHOLE,
    "num_duplicates": _WHOLE,
    "tar_size": _WHOLE,
    "tar_sha256": _TEXT,
    "parquet_size": _WHOLE,
    "parquet_sha256": _TEXT,
    "attempt": _WHOLE,
    "worker": _TEXT,
    "device": _TEXT,
    "threads": _WHOLE,
    "environment": _TEXT,
    "committed_at": _TEXT,
    "sampling_s": _SECONDS,
    "decoding_s": _SECONDS,
    "encoding_s": _SECONDS,
}
_SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()])


@dataclass(frozen=True, slots=True)
class ShardSummary(ShardFacts):
    """What is needed of a commit record: all but the timing of single batches.

    `environment` is that of the record as JSON: one string for all shards that have the same.
    """

    environment: str
    committed_at: str
    sampling_s: float
    decoding_s: float
    encoding_s: float

    @staticmethod
    def of(record: CommitRecord) -> ShardSummary:
        """The summary of a record."""
        values = {name: getattr(record, name) for name in _FACTS}
        values |= {f"{stage}_s": s for stage, s in seconds_by_stage(record.batches).items()}
        values["environment"] = json.dumps(record.environment, sort_keys=True)
        values["committed_at"] = record.committed_at
        return _made(values)

    @property
    def made_with(self) -> dict[str, str]:
        """As of `CommitRecord`."""
        return made_with(json.loads(self.environment), self.device, self.threads)

    @property
    def seconds(self) -> dict[str, float]:
        """As of `seconds_by_stage`."""
        return {
            "sampling": self.sampling_s,
            "decoding": self.decoding_s,
            "encoding": self.encoding_s,
        }


@dataclass(frozen=True)
class Dataset:
    """The part of a dataset that is done: its plan and its commit records by shard id."""

    storage: Storage
    plan: JobPlan
    records: dict[int, ShardSummary]

    @property
    def num_samples(self) -> int:
        """Samples in the shards that are done."""
        return sum(record.num_samples for record in self.records.values())

    @property
    def num_missing(self) -> int:
        """Planned shards that are not done."""
        return self.plan.num_shards - len(self.records)


@dataclass(frozen=True)
class Environment:
    """What some shards were made with, and their ids in order."""

    made_with: Mapping[str, str]
    shard_ids: list[int]


def environments(summaries: Iterable[ShardSummary]) -> list[Environment]:
    """The different things that shards were made with, each with its shards."""
    found: dict[tuple[str, str, int], Environment] = {}
    for summary in sorted(summaries, key=lambda summary: summary.shard_id):
        same = (summary.environment, summary.device, summary.threads)
        if same not in found:
            found[same] = Environment(summary.made_with, [])
        found[same].shard_ids.append(summary.shard_id)
    return list(found.values())


def mixed_environments(
    summaries: Iterable[ShardSummary],
) -> dict[str, dict[str, tuple[int, ...]]]:
    """What the shards were made with that is not one value in all: name -> value -> shard ids.

    Empty where one environment made them all. A name that a record lacks has the value `none`.
    """
    found = environments(summaries)
    mixed: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in sorted({name for each in found for name in each.made_with}):
        shards: dict[str, list[int]] = {}
        for each in found:
            shards.setdefault(each.made_with.get(name, "none"), []).extend(each.shard_ids)
        if len(shards) > 1:
            mixed[name] = {value: tuple(sorted(ids)) for value, ids in shards.items()}
    return mixed


def committed_shards(
    storage: Storage, plan: JobPlan, *, reread: bool = False
) -> dict[int, ShardSummary]:
    """The shards of the plan that are done, by id, from one listing of each folder.

    `reread`: every record is read, whatever the summaries say. Errors: `OSError` where the storage
    does not answer; never for what a file holds.
    """
    listing = list_shards(storage)
    listed = listed_shards(listing.sizes, plan)
    return committed_among(listed, storage, plan, listing, reread=reread)


def committed_among(
    listed: Mapping[int, str],
    storage: Storage,
    plan: JobPlan,
    listing: Listing,
    *,
    reread: bool = False,
) -> dict[int, ShardSummary]:
    """Those of some listed shards whose records say that they are done."""
    stored = {} if reread else _stored_summaries(storage, listing)
    return _committed(listed, storage, plan, listing, stored)[0]


def keep_summaries(storage: Storage, plan: JobPlan) -> dict[int, ShardSummary]:
    """As `committed_shards`, and writes what it read into the summaries, for whoever looks next.

    Not where records are so few that reading them takes no time, nor those of shards in doubt. A
    storage that does not take the file, which only saves time, raises nothing.
    """
    listing = list_shards(storage)
    listed = listed_shards(listing.sizes, plan)
    stored = _stored_summaries(storage, listing)
    done, doubtful = _committed(listed, storage, plan, listing, stored)
    kept = [
        (listed[i], summary)
        for i, summary in done.items()
        if i not in doubtful and listed[i] in listing.times
    ]
    if len(kept) >= FEWEST_KEPT and {name for name, _ in kept} != stored.keys():
        with suppress(OSError):
            storage.publish_bytes(_to_parquet(kept, listing), SUMMARIES_NAME)
    return done


def _committed(
    listed: Mapping[int, str],
    storage: Storage,
    plan: JobPlan,
    listing: Listing,
    stored: Mapping[str, ShardSummary],
) -> tuple[dict[int, ShardSummary], frozenset[int]]:
    """Those of some listed shards that are done, and the shards in doubt; read is what is not in
    `stored` or not right.

    A summary can show that a shard is done, only its record that it is not. Claims are looked for
    when the records have been read, for a claim is made before a record is written over.
    """

    def read(shards: Sequence[tuple[int, str]]) -> list[tuple[int, ShardSummary]]:
        found = []
        for shard_id, name in shards:
            with suppress(FileNotFoundError):  # taken away since the listing
                record = CommitRecord.from_json(storage.read(name))
                if record is not None and describes_shard(record, shard_id, plan, listing.sizes):
                    found.append((shard_id, ShardSummary.of(record)))
        return found

    done = {
        shard_id: summary
        for shard_id, name in listed.items()
        if (summary := stored.get(name)) is not None
        and describes_shard(summary, shard_id, plan, listing.sizes)
    }
    unread = [item for item in listed.items() if item[0] not in done]
    parts = [unread[start : start + _AT_ONCE] for start in range(0, len(unread), _AT_ONCE)]
    with ThreadPoolExecutor(_READERS) as pool:
        for part in pool.map(read, parts):
            done |= part
    doubtful = doubtful_shards(storage)
    for shard_id in doubtful & done.keys():
        name, found = listed[shard_id], [(shard_id, done.pop(shard_id))]
        if name in stored:
            found = read([(shard_id, name)])
        done |= [(i, summary) for i, summary in found if is_whole(storage, summary.files)]
    return {i: done[i] for i in sorted(done)}, doubtful


def _stored_summaries(storage: Storage, listing: Listing) -> dict[str, ShardSummary]:
    """What is stored of the records that are as they were then, by the names of the records."""
    if SUMMARIES_NAME not in listing.sizes:
        return {}
    try:
        file = pq.ParquetFile(io.BytesIO(storage.read(SUMMARIES_NAME)))
        if not file.schema_arrow.equals(_SCHEMA):
            return {}
        columns = list(_COLUMNS)[3:]
        return {
            name: _summary(dict(zip(columns, values, strict=True)))
            for part in file.iter_batches(_ROWS_AT_ONCE)
            for name, size, time_ns, *values in zip(*part.to_pydict().values(), strict=True)
            if listing.sizes.get(name) == size and listing.times.get(name) == time_ns
        }
    except (pa.ArrowException, OSError, ValueError):
        return {}


_FACTS = tuple(field.name for field in fields(ShardFacts))
_FIELDS = tuple(field.name for field in fields(ShardSummary))


def _made(values: dict[str, Any]) -> ShardSummary:
    """A summary, with one string for all shards that have the same."""
    for name in ("fingerprint", "worker", "device", "environment"):
        values[name] = intern(values[name])
    return ShardSummary(**values)


def _summary(row: dict[str, Any]) -> ShardSummary:
    """A shard from its row, without what that says of the record."""
    shard_id = row["shard_id"]
    row["files"] = ShardFiles(
        FileEntry(tar_name(shard_id), row.pop("tar_size"), row.pop("tar_sha256")),
        FileEntry(parquet_name(shard_id), row.pop("parquet_size"), row.pop("parquet_sha256")),
    )
    return _made(row)


def _row(name: str, summary: ShardSummary, listing: Listing) -> dict[str, object]:
    """A shard as a row of the schema."""
    tar, parquet = summary.files.tar, summary.files.parquet
    return {
        "record": name,
        "record_size": listing.sizes[name],
        "record_time_ns": listing.times[name],
        **{field: getattr(summary, field) for field in _FIELDS},
        "tar_size": tar.size,
        "tar_sha256": tar.sha256,
        "parquet_size": parquet.size,
        "parquet_sha256": parquet.sha256,
    }


def _to_parquet(kept: Sequence[tuple[str, ShardSummary]], listing: Listing) -> bytes:
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, _SCHEMA, compression="zstd") as writer:
        for start in range(0, len(kept), _ROWS_AT_ONCE):
            part = kept[start : start + _ROWS_AT_ONCE]
            rows = [_row(name, summary, listing) for name, summary in part]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
    return buffer.getvalue()
