"""Is what is stored what was planned? Every finding names the shard that has to be made again.

Without `deep`: records and sizes, from one listing, and files that do not belong. With it every
byte is read: hashes, tars, rows against samples, labels and their histogram against the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from depthvar.host.leftovers import is_leftover
from pipeline.dataset.shard_check import Finding, check_shard
from pipeline.request.job_plan import JobPlan
from pipeline.shards.card import is_edited
from pipeline.shards.claims import doubtful_shards
from pipeline.shards.committed import ShardSummary, committed_shards
from pipeline.shards.indexes import index_files
from pipeline.shards.manifest import (
    CARD_NAME,
    FOLDERS,
    INFO_NAME,
    LEDGER_NAME,
    OLD_LEDGER_NAME,
    SIZES_COPY_NAME,
    SUMMARIES_NAME,
    CommitRecord,
    list_shards,
    parquet_name,
    planned_shard,
    record_in,
    record_name,
    tar_name,
)
from pipeline.storage import Storage

_SHOWN = 3  # of many classes
_NOT_STRAY = (LEDGER_NAME, OLD_LEDGER_NAME, SIZES_COPY_NAME, SUMMARIES_NAME)


@dataclass(frozen=True)
class Problem:
    """One finding.

    `kind`: "missing" (some files of the shard are there and others are not), "record" (the commit
    record is damaged or of another plan), "size", "hash", "unreadable", "content" (files disagree
    with each other), "labels" (they disagree with the plan), "histogram", "stray", "index".
    `shard` is None where the finding is about no shard of the plan. `is_hidden`: the record and the
    sizes are right all the same, so that `generate` takes the shard for done until it is repaired.
    """

    shard: int | None
    kind: str
    message: str
    is_hidden: bool = False


@dataclass(frozen=True)
class Report:
    """What `verify` found. `num_samples` counts the samples of the shards without a problem.

    `not_made`: ids of the shards of which there is no file, in order: the job is not finished.
    `notes` says what is worth knowing and makes nothing unsound. `records` are those of the shards
    whose records and sizes are right.
    """

    problems: tuple[Problem, ...]
    not_made: tuple[int, ...]
    notes: tuple[str, ...]
    records: Mapping[int, ShardSummary]
    num_shards: int
    num_sound: int
    num_samples: int
    is_deep: bool

    @property
    def is_sound(self) -> bool:
        """Whether every shard is there and no problem was found."""
        return not self.problems and not self.not_made

    @property
    def shards_to_make(self) -> tuple[int, ...]:
        """The ids of the shards that have to be made, for the first time or again, in order."""
        found = {p.shard for p in self.problems if p.shard is not None}
        return tuple(sorted(found.union(self.not_made)))


def verify(
    storage: Storage,
    plan: JobPlan,
    deep: bool = False,
    progress: Callable[[int], object] | None = None,
    *,
    threads: int = 1,
) -> Report:
    """Check a dataset against its plan; changes nothing.

    `progress` is called with 1 after every shard that is done with (all shards of the plan, in
    this thread); `threads` shards are read at once. Errors: `OSError` where the storage fails.
    """
    records = committed_shards(storage, plan, reread=deep)
    problems, not_made = _undone(storage, plan, records)
    if progress is not None and plan.num_shards > len(records):
        progress(plan.num_shards - len(records))
    subjects: Counter[int | None] = Counter()
    with ThreadPoolExecutor(threads) as pool:
        ids = sorted(records)
        findings = (
            pool.map(lambda i: check_shard(storage, plan, records[i]), ids)
            if deep
            else (Finding() for _ in ids)
        )
        for shard_id, finding in zip(ids, findings, strict=True):
            problems += [Problem(shard_id, *what, is_hidden=True) for what in finding.problems]
            subjects += finding.subjects
            if progress is not None:
                progress(1)
    notes: list[str] = []
    if len(records) == plan.num_shards:
        index_problems, notes = _index_findings(storage, plan, records)
        problems += index_problems
        if deep and not any(problem.kind in ("missing", "unreadable") for problem in problems):
            problems += _histogram_problems(plan, subjects)
    problems += _stray_files(storage, plan)
    broken = {problem.shard for problem in problems}
    sound = [record for shard_id, record in records.items() if shard_id not in broken]
    return Report(
        problems=tuple(problems),
        not_made=tuple(not_made),
        notes=tuple(notes),
        records=records,
        num_shards=plan.num_shards,
        num_sound=len(sound),
        num_samples=sum(record.num_samples for record in sound),
        is_deep=deep,
    )


def _undone(
    storage: Storage, plan: JobPlan, records: Mapping[int, ShardSummary]
) -> tuple[list[Problem], list[int]]:
    """Why each shard that has files but is not done is not, and the shards that have none."""
    problems: list[Problem] = []
    not_made: list[int] = []
    if len(records) == plan.num_shards:
        return problems, not_made
    sizes = list_shards(storage).sizes
    begun = {planned_shard(name, plan) for name in sizes}
    for shard_id in range(plan.num_shards):
        if shard_id in begun and shard_id not in records:
            kind, message = _why_undone(storage, plan, shard_id, sizes)
            problems.append(Problem(shard_id, kind, message))
        elif shard_id not in records:
            not_made.append(shard_id)
    return problems, not_made


def _why_undone(
    storage: Storage, plan: JobPlan, shard_id: int, sizes: Mapping[str, int]
) -> tuple[str, str]:
    names = (tar_name(shard_id), parquet_name(shard_id))
    record_file = record_in(sizes, shard_id)
    missing = [name for name in names if name not in sizes]
    if record_file is None:
        missing.append(record_name(shard_id))
    if record_file is None or missing:
        return "missing", f"{' and '.join(missing)} missing"
    record = None
    with suppress(FileNotFoundError):
        record = CommitRecord.from_json(storage.read(record_file))
    if record is None:
        return "record", f"{record_file} is not a commit record ({sizes[record_file]} bytes)"
    if record.fingerprint != plan.shard_fingerprint(shard_id):
        return "record", f"{record_file} belongs to another plan"
    for entry in (record.files.tar, record.files.parquet):
        if entry.name in names and sizes[entry.name] != entry.size:
            return "size", f"{entry.name} has {sizes[entry.name]} bytes, wanted {entry.size}"
    if shard_id in doubtful_shards(storage):
        return "hash", f"{tar_name(shard_id)} or its Parquet is of another run than {record_file}"
    return "record", f"{record_file} does not describe this shard"


def _histogram_problems(plan: JobPlan, found: Counter[int | None]) -> list[Problem]:
    planned, (one, many) = Counter[int | None](plan.subject_counts), plan.subject_words
    wrong = [s for s in dict.fromkeys([*planned, *found]) if planned[s] != found[s]]
    if not wrong:
        return []
    shown = ", ".join(f"{one} {s}: {found[s]} for {planned[s]}" for s in wrong[:_SHOWN])
    return [Problem(None, "histogram", f"{len(wrong)} {many} off their counts: {shown}")]


def _index_findings(
    storage: Storage, plan: JobPlan, records: Mapping[int, ShardSummary]
) -> tuple[list[Problem], list[str]]:
    """Problems and notes. Indexes and card are made from the records: `generate` writes them again.

    A card may be edited by hand, which keeps it, and earlier releases wrote no INFO_NAME.
    """
    problems, notes = [], []
    for name, wanted in index_files(plan, records).items():
        stored = None
        with suppress(FileNotFoundError):
            stored = storage.read(name)
        if name == INFO_NAME and stored is None:
            notes.append(f"{name} is missing, as earlier releases left it: generate writes it")
        elif name == CARD_NAME and stored is not None and stored != wanted:
            todo = "was edited: generate keeps it" if is_edited(stored) else "is not up to date"
            notes.append(f"{name} {todo}")
        elif stored != wanted:
            problems.append(Problem(None, "index", f"{name} is missing or not up to date"))
    return problems, notes


def _stray_files(storage: Storage, plan: JobPlan) -> list[Problem]:
    """What readers of these folders would trip over. The top of the dataset is the user's."""
    found = [
        f"{folder}/{name}"
        for folder in FOLDERS
        for name in (*storage.list(folder), *(f"{n}/" for n in storage.list_folders(folder)))
        if not is_leftover(name.rstrip("/"))
    ]
    return [
        Problem(None, "stray", f"{name} is not part of the dataset")
        for name in sorted(found)
        if name not in _NOT_STRAY and planned_shard(name, plan) is None
    ]
