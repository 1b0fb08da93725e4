"""Which shards are done: a fact on disk, written last.

A shard is done if and only if `commits/{shard}.json` parses strictly, carries the shard's id and
fingerprint, and the sizes it names match one listing of `train/` and `meta/`. Everything else, a
half-written record or a foreign file included, means the shard is made again and overwritten.
Where a claim says that two workers may have published it at once, the files are hashed too.

`train/` holds tars and `meta/` Parquet alone, because readers of a folder open whatever is in it.
Earlier releases kept the records and the ledger in `meta/`: they count where there is no newer one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.faults import reach
from pipeline.request.job_plan import STRICT, JobPlan, PositiveInt, Sha256
from pipeline.shards.card import dataset_card, is_edited, sealed
from pipeline.shards.claims import doubtful_shards, make_claim, others_claim
from pipeline.storage import Storage

TRAIN_FOLDER, META_FOLDER, COMMITS_FOLDER = "train", "meta", "commits"
FOLDERS = (TRAIN_FOLDER, META_FOLDER, COMMITS_FOLDER)
CARD_NAME, INDEX_NAME, SIZES_NAME, INFO_NAME = (
    "README.md",
    "index.json",
    "sizes.json",
    "_info.json",
)
CONTACT_SHEET_NAME = "contact_sheet.png"
SIZES_COPY_NAME = f"{TRAIN_FOLDER}/{SIZES_NAME}"
"""Where a user puts the sizes for open_clip."""
LEDGER_NAME = f"{COMMITS_FOLDER}/failures.jsonl"
OLD_LEDGER_NAME = f"{META_FOLDER}/failures.jsonl"
_SHARD_DIGITS = 5
_MAX_ROUNDS = 5  # of publishing a shard that another worker publishes at the same moment
_READERS = 16  # records are small: an object store answers many at once

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


def shard_name(shard_id: int) -> str:
    """The name of a shard without folder and suffix: at least five digits."""
    return f"{shard_id:0{_SHARD_DIGITS}d}"


def tar_name(shard_id: int) -> str:
    """Where the samples of a shard are, relative to the dataset."""
    return f"{TRAIN_FOLDER}/{shard_name(shard_id)}.tar"


def parquet_name(shard_id: int) -> str:
    """Where the rows of a shard are, relative to the dataset."""
    return f"{META_FOLDER}/{shard_name(shard_id)}.parquet"


def record_name(shard_id: int) -> str:
    """Where the commit record of a shard is, relative to the dataset."""
    return f"{COMMITS_FOLDER}/{shard_name(shard_id)}.json"


def old_record_name(shard_id: int) -> str:
    """Where earlier releases put the commit record: it counts where there is no newer one."""
    return f"{META_FOLDER}/{shard_name(shard_id)}.json"


def record_in(names: Collection[str], shard_id: int) -> str | None:
    """Which of some files is the commit record of a shard; None without one."""
    places = (record_name(shard_id), old_record_name(shard_id))
    return next((name for name in places if name in names), None)


def planned_shard(name: str, plan: JobPlan) -> int | None:
    """The shard of the plan that a file belongs to by its name; None for a foreign name."""
    match = re.fullmatch(r"(?:train|meta|commits)/([0-9]{5,18})\.[a-z]+", name)
    shard_id = int(match[1]) if match else plan.num_shards
    if shard_id >= plan.num_shards:
        return None
    names = (
        tar_name(shard_id),
        parquet_name(shard_id),
        record_name(shard_id),
        old_record_name(shard_id),
    )
    return shard_id if name in names else None


@dataclass(frozen=True)
class FileEntry:
    """A published file: its name in the dataset, its bytes and its SHA-256."""

    __pydantic_config__ = STRICT

    name: str
    size: PositiveInt
    sha256: Sha256


@dataclass(frozen=True)
class ShardFiles:
    """The two files of a shard."""

    __pydantic_config__ = STRICT

    tar: FileEntry
    parquet: FileEntry


@dataclass(frozen=True)
class BatchTiming:
    """Wall seconds of one micro-batch, the global indices start ... stop - 1.

    `encoding_s` is summed over the encoding threads and overlaps with sampling.
    """

    __pydantic_config__ = STRICT

    start: Count
    stop: PositiveInt
    sampling_s: Seconds
    decoding_s: Seconds
    encoding_s: Seconds


def seconds_by_stage(batches: Iterable[BatchTiming]) -> dict[str, float]:
    """What some micro-batches took in all."""
    timings = tuple(batches)
    return {
        "sampling": sum(batch.sampling_s for batch in timings),
        "decoding": sum(batch.decoding_s for batch in timings),
        "encoding": sum(batch.encoding_s for batch in timings),
    }


@dataclass(frozen=True)
class BuiltShard:
    """A finished and checked shard in local scratch, not published yet."""

    shard_id: int
    num_samples: int
    num_blank: int
    num_duplicates: int
    tar_path: Path
    parquet_path: Path
    files: ShardFiles
    batches: tuple[BatchTiming, ...]


@dataclass(frozen=True)
class CommitRecord:
    """The content of `commits/{shard}.json`: what was made, and by whom, when and with what.

    `fingerprint` is `JobPlan.shard_fingerprint`, which extending the plan does not change.
    `environment` holds versions and hardware, never variables of the process environment.
    """

    __pydantic_config__ = STRICT

    shard_id: Count
    fingerprint: Sha256
    num_samples: PositiveInt
    num_blank: Count
    num_duplicates: Count
    files: ShardFiles
    attempt: PositiveInt
    worker: str
    device: str
    threads: PositiveInt
    environment: dict[str, str]
    batches: tuple[BatchTiming, ...]
    committed_at: str

    @staticmethod
    def of(
        plan: JobPlan,
        built: BuiltShard,
        *,
        attempt: int,
        worker: str,
        device: str,
        threads: int,
        environment: Mapping[str, str],
    ) -> CommitRecord:
        """The record of a shard that is about to be published; attempts count from 1."""
        return CommitRecord(
            shard_id=built.shard_id,
            fingerprint=plan.shard_fingerprint(built.shard_id),
            num_samples=built.num_samples,
            num_blank=built.num_blank,
            num_duplicates=built.num_duplicates,
            files=built.files,
            attempt=attempt,
            worker=worker,
            device=device,
            threads=threads,
            environment=dict(environment),
            batches=built.batches,
            committed_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )

    @property
    def made_with(self) -> dict[str, str]:
        """All that is recorded of what may decide a last bit: versions, device, threads."""
        return {**self.environment, "device": self.device, "threads": str(self.threads)}

    def to_json(self) -> bytes:
        """The bytes of the record file."""
        return (json.dumps(asdict(self), indent=1, allow_nan=False) + "\n").encode()

    @staticmethod
    def from_json(data: bytes) -> CommitRecord | None:
        """The record, or None for anything that is not exactly one; no bytes raise."""
        try:
            return _RECORD.validate_json(data)
        except ValidationError:
            return None


@dataclass(frozen=True)
class _OldCommitRecord(CommitRecord):
    """As earlier releases wrote it: with the fingerprint of the whole plan too."""

    __pydantic_config__ = STRICT

    plan_fingerprint: Sha256


_RECORD: TypeAdapter[CommitRecord] = TypeAdapter(CommitRecord | _OldCommitRecord)


def publish_shard(storage: Storage, plan: JobPlan, built: BuiltShard, record: CommitRecord) -> None:
    """Make a shard visible: samples, rows, and the record last. Errors: `OSError`.

    A shard that somebody else committed meanwhile keeps that version, whole.
    """
    if read_commit(storage, plan, built.shard_id) is not None:
        return
    claim = make_claim(storage, built.shard_id)
    for _ in range(_MAX_ROUNDS):
        publish_tar(storage, built)
        publish_parquet(storage, built)
        publish_record(storage, record)
        if not others_claim(storage, built.shard_id, claim):
            storage.remove(claim)
            reach("claim-removed")
            return
        if read_commit(storage, plan, built.shard_id) is not None:
            return  # the claim stays: the other worker may not have finished
    raise OSError(f"shard {shard_name(built.shard_id)} is written by somebody else all the time")


def publish_tar(storage: Storage, built: BuiltShard) -> None:
    """First step: the samples. Errors: `OSError`."""
    storage.publish_file(built.tar_path, built.files.tar.name)
    reach("tar-published")


def publish_parquet(storage: Storage, built: BuiltShard) -> None:
    """Second step: the rows. Errors: `OSError`."""
    storage.publish_file(built.parquet_path, built.files.parquet.name)
    reach("parquet-published")


def publish_record(storage: Storage, record: CommitRecord) -> None:
    """Last step: from here on the shard is done. Errors: `OSError`."""
    storage.publish_bytes(record.to_json(), record_name(record.shard_id))
    reach("record-published")


def stored_sizes(storage: Storage) -> dict[str, int]:
    """Bytes of every file of the shards, by name, from one listing of each folder."""
    return {
        f"{folder}/{name}": size
        for folder in FOLDERS
        for name, size in storage.list(folder).items()
    }


def listed_shards(sizes: Mapping[str, int], plan: JobPlan) -> dict[int, str]:
    """The shards of which all files are there, each with the name of its record, in order.

    They are done unless their record says something else; `sizes` as of `stored_sizes`.
    """
    named = {planned_shard(name, plan) for name in sizes}
    return {
        shard_id: record
        for shard_id in sorted(shard_id for shard_id in named if shard_id is not None)
        if (record := record_in(sizes, shard_id)) is not None
        and tar_name(shard_id) in sizes
        and parquet_name(shard_id) in sizes
    }


def committed_shards(storage: Storage, plan: JobPlan) -> dict[int, CommitRecord]:
    """The shards of the plan that are done, by id, from one listing of each folder.

    Errors: `OSError` where the storage does not answer; never for what a file holds.
    """
    sizes = stored_sizes(storage)
    return committed_among(listed_shards(sizes, plan), storage, plan, sizes)


def committed_among(
    listed: Mapping[int, str], storage: Storage, plan: JobPlan, sizes: Mapping[str, int]
) -> dict[int, CommitRecord]:
    """Those of some listed shards whose records are read and say that they are done."""

    def read(name: str) -> CommitRecord | None:
        try:
            return CommitRecord.from_json(storage.read(name))
        except FileNotFoundError:  # taken away since the listing
            return None

    with ThreadPoolExecutor(_READERS) as pool:
        records = zip(listed, pool.map(read, listed.values()), strict=True)
        done = {i: r for i, r in records if r is not None and _is_done(r, i, plan, sizes)}
    doubtful = doubtful_shards(storage)
    return {i: r for i, r in sorted(done.items()) if _is_whole(storage, r, doubtful)}


def mixed_environments(
    records: Iterable[CommitRecord],
) -> dict[str, dict[str, tuple[int, ...]]]:
    """What the shards were made with that is not one value in all: name -> value -> shard ids.

    Empty where one environment made them all. A name that a record lacks has the value `none`.
    """
    made_with = {record.shard_id: record.made_with for record in records}
    mixed: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in sorted({name for environment in made_with.values() for name in environment}):
        shards: dict[str, tuple[int, ...]] = {}
        for shard_id in sorted(made_with):
            value = made_with[shard_id].get(name, "none")
            shards[value] = (*shards.get(value, ()), shard_id)
        if len(shards) > 1:
            mixed[name] = shards
    return mixed


def read_commit(storage: Storage, plan: JobPlan, shard_id: int) -> CommitRecord | None:
    """The record of one shard if it is done, else None. Errors: as `committed_shards`."""
    sizes = {}
    for name in (tar_name(shard_id), parquet_name(shard_id)):
        size = storage.size(name)
        if size is None:
            return None
        sizes[name] = size
    record = _read_record(storage, shard_id)
    if record is None or not _is_done(record, shard_id, plan, sizes):
        return None
    return record if _is_whole(storage, record, doubtful_shards(storage)) else None


def _read_record(storage: Storage, shard_id: int) -> CommitRecord | None:
    for name in (record_name(shard_id), old_record_name(shard_id)):
        with suppress(FileNotFoundError):
            return CommitRecord.from_json(storage.read(name))
    return None


def _is_whole(storage: Storage, record: CommitRecord, doubtful: Collection[int]) -> bool:
    """Whether the files are those of the record: taken for granted unless there is a claim."""
    if record.shard_id not in doubtful:
        return True
    try:
        for entry in (record.files.tar, record.files.parquet):
            with storage.open_input(entry.name) as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:  # type: ignore[arg-type]
                    return False
    except FileNotFoundError:
        return False
    return True


def _is_done(record: CommitRecord, shard_id: int, plan: JobPlan, sizes: Mapping[str, int]) -> bool:
    start, stop = plan.shard_range(shard_id)
    tar, parquet = record.files.tar, record.files.parquet
    return (
        record.shard_id == shard_id
        and record.fingerprint == plan.shard_fingerprint(shard_id)
        and record.num_samples == stop - start
        and tar.name == tar_name(shard_id)
        and parquet.name == parquet_name(shard_id)
        and sizes.get(tar.name) == tar.size
        and sizes.get(parquet.name) == parquet.size
    )


def index_files(plan: JobPlan, records: Mapping[int, CommitRecord]) -> dict[str, bytes]:
    """The content of the indexes and the dataset card, by name.

    index.json is read by wids (0.1.11), `_info.json` by timm (1.0.31) and sizes.json by open_clip
    (3.3.0), which looks beside the tars: there it would stop `datasets` (5.2.0), whose
    `load_dataset("webdataset", data_dir=...)` opens every file below `train/` as a tar, so it is
    left to be copied there.
    """
    done = [records[shard_id] for shard_id in sorted(records)]
    index = {
        "wids_version": 1,
        "name": f"{plan.model}-{plan.fingerprint[:12]}",
        "shardlist": [
            {
                "url": record.files.tar.name,
                "nsamples": record.num_samples,
                "filesize": record.files.tar.size,
            }
            for record in done
        ],
    }
    sizes = {Path(record.files.tar.name).name: record.num_samples for record in done}
    split = {
        "name": TRAIN_FOLDER,
        "num_samples": sum(sizes.values()),
        "filenames": [record.files.tar.name for record in done],
        "shard_lengths": list(sizes.values()),
    }
    num_samples = sum(record.num_samples for record in done)
    tar_bytes = sum(record.files.tar.size for record in done)
    return {
        INDEX_NAME: (json.dumps(index, indent=1) + "\n").encode(),
        SIZES_NAME: (json.dumps(sizes, indent=1) + "\n").encode(),
        INFO_NAME: (json.dumps({"splits": {TRAIN_FOLDER: split}}, indent=1) + "\n").encode(),
        CARD_NAME: sealed(dataset_card(plan, len(done), num_samples, tar_bytes)),
    }


def write_indexes(storage: Storage, plan: JobPlan, records: Mapping[int, CommitRecord]) -> bool:
    """Write the indexes and the dataset card of the shards that are done.

    A file that is right already keeps its bytes and its time, and so does a card that was edited:
    returns whether one was kept for that. A copy of the sizes beside the tars is kept up to date
    where there is one. Errors: `OSError`.
    """
    is_card_kept = False
    files = index_files(plan, records)
    if storage.size(SIZES_COPY_NAME) is not None:
        files[SIZES_COPY_NAME] = files[SIZES_NAME]
    for name, data in files.items():
        stored = None
        with suppress(FileNotFoundError):
            stored = storage.read(name)
        if name == CARD_NAME and stored is not None and stored != data and is_edited(stored):
            is_card_kept = True
        elif stored != data:
            storage.publish_bytes(data, name)
    return is_card_kept
