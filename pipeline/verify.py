"""Is what is stored what was planned? Every finding names the shard that has to be made again.

Without `deep`: records and sizes, from one listing, and files that do not belong. With it every
byte is read: hashes, tars, rows against samples, labels and their histogram against the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from pipeline.claims import doubtful_shards
from pipeline.manifest import (
    FAILURES_NAME,
    META_FOLDER,
    TRAIN_FOLDER,
    CommitRecord,
    committed_shards,
    index_files,
    parquet_name,
    planned_shard,
    record_name,
    tar_name,
)
from pipeline.plan import JobPlan
from pipeline.shard_check import Finding, check_shard
from pipeline.storage import Storage

_SHOWN = 3  # of many classes


@dataclass(frozen=True)
class Problem:
    """One finding.

    `kind`: "missing" (the shard was never made, or a file of it is gone), "record" (the commit
    record is damaged or of another plan), "size", "hash", "unreadable", "content" (files disagree
    with each other), "labels" (they disagree with the plan), "histogram", "stray", "index".
    `shard` is None where the finding is about no shard of the plan.
    """

    shard: int | None
    kind: str
    message: str


@dataclass(frozen=True)
class Report:
    """What `verify` found. `num_samples` counts the samples of the shards without a problem."""

    problems: tuple[Problem, ...]
    num_shards: int
    num_sound: int
    num_samples: int
    is_deep: bool

    @property
    def is_sound(self) -> bool:
        """Whether nothing at all was found."""
        return not self.problems

    @property
    def shards_to_make(self) -> tuple[int, ...]:
        """The ids of the shards that have to be made again, in order."""
        return tuple(sorted({p.shard for p in self.problems if p.shard is not None}))


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
    records = committed_shards(storage, plan)
    problems = list(_undone(storage, plan, records))
    if progress is not None and plan.num_shards > len(records):
        progress(plan.num_shards - len(records))
    labels: Counter[int] = Counter()
    with ThreadPoolExecutor(threads) as pool:
        ids = sorted(records)
        findings = (
            pool.map(lambda i: check_shard(storage, plan, records[i]), ids)
            if deep
            else (Finding() for _ in ids)
        )
        for shard_id, finding in zip(ids, findings, strict=True):
            problems += [Problem(shard_id, kind, message) for kind, message in finding.problems]
            labels += finding.labels
            if progress is not None:
                progress(1)
    if len(records) == plan.num_shards:
        problems += _index_problems(storage, plan, records)
        if deep and not any(problem.kind in ("missing", "unreadable") for problem in problems):
            problems += _histogram_problems(plan, labels)
    problems += _stray_files(storage, plan)
    broken = {problem.shard for problem in problems}
    sound = [record for shard_id, record in records.items() if shard_id not in broken]
    return Report(
        problems=tuple(problems),
        num_shards=plan.num_shards,
        num_sound=len(sound),
        num_samples=sum(record.num_samples for record in sound),
        is_deep=deep,
    )


def _undone(
    storage: Storage, plan: JobPlan, records: Mapping[int, CommitRecord]
) -> Iterator[Problem]:
    """Why each shard that is not done is not."""
    if len(records) == plan.num_shards:
        return
    sizes = {f"{TRAIN_FOLDER}/{name}": n for name, n in storage.list(TRAIN_FOLDER).items()}
    sizes |= {f"{META_FOLDER}/{name}": n for name, n in storage.list(META_FOLDER).items()}
    for shard_id in range(plan.num_shards):
        if shard_id not in records:
            kind, message = _why_undone(storage, plan, shard_id, sizes)
            yield Problem(shard_id, kind, message)


def _why_undone(
    storage: Storage, plan: JobPlan, shard_id: int, sizes: Mapping[str, int]
) -> tuple[str, str]:
    names = (tar_name(shard_id), parquet_name(shard_id), record_name(shard_id))
    missing = [name for name in names if name not in sizes]
    if len(missing) == len(names):
        return "missing", "not made yet"
    if missing:
        return "missing", f"{' and '.join(missing)} missing"
    record = None
    with suppress(FileNotFoundError):
        record = CommitRecord.from_json(storage.read(names[2]))
    if record is None:
        return "record", f"{names[2]} is not a commit record ({sizes[names[2]]} bytes)"
    if record.fingerprint != plan.shard_fingerprint(shard_id):
        return "record", f"{names[2]} belongs to another plan"
    for entry in (record.files.tar, record.files.parquet):
        if entry.name in names and sizes[entry.name] != entry.size:
            return "size", f"{entry.name} has {sizes[entry.name]} bytes, wanted {entry.size}"
    if shard_id in doubtful_shards(storage):
        return "hash", f"{tar_name(shard_id)} or its Parquet is of another run than {names[2]}"
    return "record", f"{names[2]} does not describe this shard"


def _histogram_problems(plan: JobPlan, labels: Counter[int]) -> list[Problem]:
    planned = Counter(plan.total_counts.as_mapping())
    wrong = sorted(c for c in {*planned, *labels} if planned[c] != labels[c])
    if not wrong:
        return []
    shown = ", ".join(f"class {c}: {labels[c]} for {planned[c]}" for c in wrong[:_SHOWN])
    return [Problem(None, "histogram", f"{len(wrong)} classes off their counts: {shown}")]


def _index_problems(
    storage: Storage, plan: JobPlan, records: Mapping[int, CommitRecord]
) -> list[Problem]:
    """The indexes and the card are made from the records: `generate` writes them again."""
    found = []
    for name, wanted in index_files(plan, records).items():
        try:
            is_current = storage.read(name) == wanted
        except FileNotFoundError:
            is_current = False
        if not is_current:
            found.append(Problem(None, "index", f"{name} is missing or not up to date"))
    return found


def _stray_files(storage: Storage, plan: JobPlan) -> list[Problem]:
    """What readers of the two folders would trip over. The top of the dataset is the user's."""
    found = [
        f"{folder}/{name}"
        for folder in (TRAIN_FOLDER, META_FOLDER)
        for name in (*storage.list(folder), *(f"{n}/" for n in storage.list_folders(folder)))
        if planned_shard(f"{folder}/{name}", plan) is None
        and (folder, name) != (META_FOLDER, FAILURES_NAME)
    ]
    return [Problem(None, "stray", f"{name} is not part of the dataset") for name in sorted(found)]
