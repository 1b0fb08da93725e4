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
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.faults import reach
from pipeline.request.job_plan import STRICT, JobPlan, PositiveInt, Sha256
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
SUMMARIES_NAME = f"{COMMITS_FOLDER}/summaries.parquet"
"""What is needed of many commit records, see `committed`."""
_SHARD_DIGITS = 5
_FILE_NAME = re.compile(rf"([a-z]+)/([0-9]{{{_SHARD_DIGITS},18}})\.([a-z]+)")
_KINDS = {
    (TRAIN_FOLDER, "tar"),
    (META_FOLDER, "parquet"),
    (COMMITS_FOLDER, "json"),
    (META_FOLDER, "json"),
}
_MAX_ROUNDS = 5  # of publishing a shard that another worker publishes at the same moment

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
    match = _FILE_NAME.fullmatch(name)
    if match is None or (match[1], match[3]) not in _KINDS:
        return None
    shard_id = int(match[2])
    is_ours = shard_id < plan.num_shards and shard_name(shard_id) == match[2]
    return shard_id if is_ours else None


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A published file: its name in the dataset, its bytes and its SHA-256."""

    __pydantic_config__ = STRICT

    name: str
    size: PositiveInt
    sha256: Sha256


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What was made of a shard, and how.

    `fingerprint` is `JobPlan.shard_fingerprint`, which extending the plan does not change.
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


@dataclass(frozen=True)
class CommitRecord(ShardFacts):
    """The content of `commits/{shard}.json`: what was made, and by whom, when and with what.

    `environment` holds versions and hardware, never variables of the process environment.
    """

    __pydantic_config__ = STRICT

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
        return made_with(self.environment, self.device, self.threads)

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


def made_with(environment: Mapping[str, str], device: str, threads: int) -> dict[str, str]:
    """All that may decide a last bit, in one."""
    return {**environment, "device": device, "threads": str(threads)}


@dataclass(frozen=True)
class _OldCommitRecord(CommitRecord):
    """As earlier releases wrote it: with the fingerprint of the whole plan too."""

    __pydantic_config__ = STRICT

    plan_fingerprint: Sha256


_RECORD: TypeAdapter[CommitRecord] = TypeAdapter(
    Annotated[CommitRecord | _OldCommitRecord, Field(union_mode="left_to_right")]
)


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


@dataclass(frozen=True)
class Listing:
    """Every file of the shards by name: its bytes, and of a record when it was written.

    `times` in ns since 1970, without the records of which the storage does not know it.
    """

    sizes: dict[str, int]
    times: dict[str, int]


def list_shards(storage: Storage) -> Listing:
    """The files of the shards, from one listing of each folder."""
    sizes: dict[str, int] = {}
    times: dict[str, int] = {}
    for folder in FOLDERS:
        for base_name, (size, time_ns) in storage.list_with_times(folder).items():
            sizes[name := f"{folder}/{base_name}"] = size
            if time_ns is not None and base_name.endswith(".json"):
                times[name] = time_ns
    return Listing(sizes, times)


def listed_shards(sizes: Mapping[str, int], plan: JobPlan) -> dict[int, str]:
    """The shards of which all files are there, each with the name of its record, in order.

    They are done unless their record says something else; `sizes` as of `Listing`.
    """
    named = {planned_shard(name, plan) for name in sizes if name.endswith(".json")}
    return {
        shard_id: record
        for shard_id in sorted(shard_id for shard_id in named if shard_id is not None)
        if (record := record_in(sizes, shard_id)) is not None
        and tar_name(shard_id) in sizes
        and parquet_name(shard_id) in sizes
    }


def read_commit(storage: Storage, plan: JobPlan, shard_id: int) -> CommitRecord | None:
    """The record of one shard if it is done, else None.

    Errors: `OSError` where the storage does not answer; never for what a file holds.
    """
    sizes = {}
    for name in (tar_name(shard_id), parquet_name(shard_id)):
        size = storage.size(name)
        if size is None:
            return None
        sizes[name] = size
    record = read_record(storage, shard_id)
    if record is None or not describes_shard(record, shard_id, plan, sizes):
        return None
    is_doubtful = shard_id in doubtful_shards(storage)
    return None if is_doubtful and not is_whole(storage, record.files) else record


def read_record(storage: Storage, shard_id: int) -> CommitRecord | None:
    """What the record of a shard says, whatever its files are; None without one, or for no record.

    Errors: `OSError` where the storage does not answer.
    """
    for name in (record_name(shard_id), old_record_name(shard_id)):
        with suppress(FileNotFoundError):
            return CommitRecord.from_json(storage.read(name))
    return None


def is_whole(storage: Storage, files: ShardFiles) -> bool:
    """Whether the files have their hashes: taken for granted unless there is a claim."""
    try:
        for entry in (files.tar, files.parquet):
            with storage.open_input(entry.name) as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:  # type: ignore[arg-type]
                    return False
    except FileNotFoundError:
        return False
    return True


def describes_shard(
    record: ShardFacts, shard_id: int, plan: JobPlan, sizes: Mapping[str, int]
) -> bool:
    """Whether a record is that of a shard of the plan, and the sizes are those of its files."""
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
