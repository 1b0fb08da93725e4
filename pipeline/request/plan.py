"""What a job will make, decided before it starts: every shard is a pure function of this plan.

`plan.json` is written once. A second run compares its own plan with the stored one: the same goes
on, another is refused with a field-by-field difference, a larger one may be appended as a segment.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from depthvar.errors import InputError, advice
from pipeline.faults import reach
from pipeline.request.labels import MAX_SAMPLES, LabelCounts
from pipeline.request.settings import STRICT, ImageCompute, JobSettings, Sha256, canonical_json
from pipeline.storage import Storage

__all__ = [
    "ImageCompute",
    "JobPlan",
    "JobSettings",
    "Segment",
    "ShardPlan",
    "check_output",
    "key_of",
    "open_plan",
    "read_plan",
    "stored_plan",
]

PLAN_NAME = "plan.json"
KEY_DIGITS = 12


@dataclass(frozen=True)
class Segment:
    """A run of samples planned together. Shards never cross a segment's start."""

    __pydantic_config__ = STRICT

    counts: LabelCounts


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """One shard: the global indices start ... stop - 1 and their labels, int64 (stop - start,)."""

    shard_id: int
    start: int
    stop: int
    labels: np.ndarray
    batch_size: int

    @property
    def num_samples(self) -> int:
        """Samples in this shard."""
        return self.stop - self.start

    @property
    def micro_batches(self) -> list[tuple[int, int]]:
        """Global (start, stop) of each batch, fixed by the plan."""
        starts = range(self.start, self.stop, self.batch_size)
        return [(start, min(start + self.batch_size, self.stop)) for start in starts]


@dataclass(frozen=True)
class JobPlan:
    """The whole job. Memory and look-ups do not grow with the number of samples."""

    settings: JobSettings
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise InputError("got a plan without samples, wanted at least one")
        num_classes = len(self.settings.class_names)
        for segment in self.segments:
            if segment.counts.class_ids[-1] >= num_classes:
                raise InputError(
                    f"got class id {segment.counts.class_ids[-1]}, "
                    f"wanted 0 to {num_classes - 1} of {self.settings.model}"
                )
        if self.num_samples > MAX_SAMPLES:
            raise InputError(f"got {self.num_samples} samples, wanted at most {MAX_SAMPLES}")

    @cached_property
    def num_samples(self) -> int:
        """Samples of all segments."""
        return sum(segment.counts.total for segment in self.segments)

    @cached_property
    def num_shards(self) -> int:
        """Shards of all segments; ids run from 0 without a gap."""
        return self._first_shards[-1]

    @cached_property
    def total_counts(self) -> LabelCounts:
        """Samples per class over all segments."""
        return _summed(self.segments)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of the settings and all segments."""
        return self._segment_fingerprints[-1]

    def shard_fingerprint(self, shard_id: int) -> str:
        """SHA-256 of the settings and the segments up to the shard's own: extending keeps it."""
        return self._segment_fingerprints[self._segment_of(shard_id)]

    def shard_range(self, shard_id: int) -> tuple[int, int]:
        """The global indices (start, stop) of a shard."""
        segment = self._segment_of(shard_id)
        size = self.settings.samples_per_shard
        start = self._first_samples[segment] + (shard_id - self._first_shards[segment]) * size
        return start, min(start + size, self._first_samples[segment + 1])

    def shard(self, shard_id: int) -> ShardPlan:
        """One shard with its labels, made on demand in milliseconds."""
        segment = self._segment_of(shard_id)
        start, stop = self.shard_range(shard_id)
        offset = self._first_samples[segment]
        labels = self.segments[segment].counts.labels(start - offset, stop - offset)
        return ShardPlan(shard_id, start, stop, labels, self.settings.batch_size)

    def to_json(self) -> bytes:
        """The content of plan.json: readable, ends with a line feed."""
        return _pretty({"fingerprint": self.fingerprint, **asdict(self)})

    @staticmethod
    def from_json(data: bytes) -> JobPlan:
        """The plan back from `to_json`, checked strictly, its fingerprint included.

        Errors: `InputError` with the first thing that is wrong.
        """
        try:
            stored = _PLAN_FILE.validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(f"{place}: {first['msg']}") from error
        plan = JobPlan(stored.settings, stored.segments)
        if plan.fingerprint != stored.fingerprint:
            raise InputError("its fingerprint does not fit its content")
        return plan

    def difference(self, other: JobPlan, name: str = "the output") -> list[str]:
        """What differs, field by field: self is what `name` holds, `other` is this run's."""
        pairs = _differing(asdict(self.settings), asdict(other.settings))
        lines = [f"{field}: {name} has {a}, this run has {b}" for field, a, b in pairs]
        stored, wanted = self.total_counts.as_mapping(), other.total_counts.as_mapping()
        changed = [c for c in sorted({*stored, *wanted}) if stored.get(c, 0) != wanted.get(c, 0)]
        lines += [
            f"samples of class {c}: {name} has {stored.get(c, 0)}, this run has {wanted.get(c, 0)}"
            for c in changed[:3]
        ]
        if len(changed) > 3:
            lines.append(f"and the samples of {len(changed) - 3} more classes")
        return lines

    def extended_to(self, counts: LabelCounts) -> JobPlan:
        """This plan with a further segment, so that the totals are `counts`.

        Errors: `InputError` where a class would lose samples.
        """
        have, wanted = self.total_counts.as_mapping(), counts.as_mapping()
        for class_id, count in have.items():
            if wanted.get(class_id, 0) < count:
                raise InputError(
                    f"got {wanted.get(class_id, 0)} samples of class {class_id}, but {count} "
                    "are planned already: a dataset can grow, not shrink"
                )
        more = {c: n - have.get(c, 0) for c, n in wanted.items() if n > have.get(c, 0)}
        if not more:
            return self
        return JobPlan(self.settings, (*self.segments, Segment(LabelCounts.from_mapping(more))))

    def is_covered_by(self, counts: LabelCounts) -> bool:
        """Whether no class has fewer samples in `counts` than here."""
        wanted = counts.as_mapping()
        return all(wanted.get(c, 0) >= n for c, n in self.total_counts.as_mapping().items())

    def _segment_of(self, shard_id: int) -> int:
        if not 0 <= shard_id < self.num_shards:
            raise IndexError(f"shard {shard_id} of {self.num_shards}")
        return bisect_right(self._first_shards, shard_id) - 1

    @cached_property
    def _first_samples(self) -> tuple[int, ...]:
        return tuple(accumulate((s.counts.total for s in self.segments), initial=0))

    @cached_property
    def _first_shards(self) -> tuple[int, ...]:
        size = self.settings.samples_per_shard
        return tuple(accumulate((-(-s.counts.total // size) for s in self.segments), initial=0))

    @cached_property
    def _segment_fingerprints(self) -> tuple[str, ...]:
        settings = asdict(self.settings)
        segments = [asdict(segment) for segment in self.segments]
        return tuple(
            hashlib.sha256(
                canonical_json({"settings": settings, "segments": segments[:n]})
            ).hexdigest()
            for n in range(1, len(segments) + 1)
        )


@dataclass(frozen=True)
class _PlanFile:
    __pydantic_config__ = STRICT

    fingerprint: Sha256
    settings: JobSettings
    segments: tuple[Segment, ...]


_PLAN_FILE = TypeAdapter(_PlanFile)


def key_of(index: int) -> str:
    """The key of a sample: its global index in twelve digits, which sorts as the number does."""
    return f"{index:0{KEY_DIGITS}d}"


def read_plan(storage: Storage) -> JobPlan | None:
    """The stored plan; None where the output is still empty. Writes nothing.

    Errors: `InputError` for a plan that is damaged, and for files that belong to something else.
    """
    data = _read_plan_file(storage)
    if data is None:
        if storage.is_empty():
            return None
        # Another run may have begun since the first look: it writes its plan before all else.
        data = _read_plan_file(storage)
    if data is None:
        raise InputError(
            f"got {storage}, which holds files but no {PLAN_NAME}, wanted an empty folder or "
            "an earlier output of this job: choose another output"
        )
    return _parsed(data, storage, "restore it or choose another output")


def stored_plan(storage: Storage) -> JobPlan:
    """The plan of a dataset that is there to be read.

    Errors: `InputError` where there is none, saying what is there instead, or it is damaged.
    """
    folder = Path(storage.root)
    if storage.is_local and not folder.is_dir():
        raise InputError(
            f"got {storage}, which {_no_folder(folder)}, wanted a dataset's folder: check the path"
        )
    data = _read_plan_file(storage)
    if data is None and storage.is_empty():
        what = "is empty" if storage.is_local else "does not exist"
        raise InputError(f"got {storage}, which {what}, wanted a dataset: generate one first")
    if data is None:
        near = _datasets_near(folder) if storage.is_local else []
        hint = f"name {' or '.join(near)}" if near else "name the folder that generate wrote"
        raise InputError(f"got {storage}, which holds no {PLAN_NAME}, wanted a dataset: {hint}")
    return _parsed(data, storage, "restore it from a copy")


def _no_folder(path: Path) -> str:
    if path.exists():
        return "is a file"
    return "is a broken symbolic link" if path.is_symlink() else "does not exist"


def _datasets_near(folder: Path) -> list[str]:
    """The dataset that a folder is a part of, or a few of those directly inside it."""
    near = [folder.parent] if (folder.parent / PLAN_NAME).is_file() else []
    return [
        str(found) for found in near or sorted(f.parent for f in folder.glob(f"*/{PLAN_NAME}"))[:3]
    ]


def _parsed(data: bytes, storage: Storage, todo: str) -> JobPlan:
    try:
        return JobPlan.from_json(data)
    except InputError as error:
        raise InputError(
            f"got {storage}/{PLAN_NAME}, which is damaged or of another program: {error}; {todo}"
        ) from error


def _read_plan_file(storage: Storage) -> bytes | None:
    try:
        return storage.read(PLAN_NAME)
    except FileNotFoundError:
        return None
    except OSError as error:
        todo = advice(error, f"{storage}/{PLAN_NAME}")
        raise InputError(
            f"got {storage}, whose {PLAN_NAME} cannot be read ({error}): {todo}"
        ) from error


def check_output(storage: Storage, plan: JobPlan, *, extend: bool = False) -> JobPlan | None:
    """The plan to go on with, or None for a fresh output. Writes nothing.

    With `extend`, a plan that differs only by more samples gives the stored one with one segment
    more. Errors: `InputError` for an output with another plan, a foreign or unwritable output.
    """
    storage.check_writable()
    stored = read_plan(storage)
    if stored is None:
        return None
    differences = stored.difference(plan, str(storage))
    if not differences:
        return stored
    if stored.settings == plan.settings and extend:
        return stored.extended_to(plan.total_counts)
    hint = "resume with the old configuration or choose a new output"
    if stored.settings == plan.settings and stored.is_covered_by(plan.total_counts):
        hint = "add --extend to keep what is there and make the rest, or choose a new output"
    raise InputError(f"{'; '.join(differences)}: {hint}")


def open_plan(storage: Storage, plan: JobPlan, *, extend: bool = False) -> JobPlan:
    """The plan to work by, stored in the output: written by the first run, kept by later ones.

    Errors: as `check_output`; also `InputError` where plan.json cannot be written, or where
    another run with another plan started at the same moment.
    """
    agreed = check_output(storage, plan, extend=extend)
    if agreed is not None and agreed == read_plan(storage):
        return agreed
    reach("plan-wanted")
    try:
        if agreed is not None:
            storage.publish_bytes(agreed.to_json(), PLAN_NAME)
        else:
            storage.create(plan.to_json(), PLAN_NAME)
    except OSError as error:
        raise InputError(
            f"got the output {storage}, which cannot be written ({error}): "
            f"{advice(error, str(storage))}, then run it again"
        ) from error
    reach("plan-written")
    stored = check_output(storage, plan, extend=False)
    assert stored is not None, "plan.json was written"
    return stored


def _summed(segments: tuple[Segment, ...]) -> LabelCounts:
    totals: dict[int, int] = {}
    for segment in segments:
        for class_id, count in segment.counts.as_mapping().items():
            totals[class_id] = totals.get(class_id, 0) + count
    return LabelCounts.from_mapping(totals)


def _differing(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted name, left value, right value) of the leaves that differ."""
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differing(left, right, f"{prefix}{name}.")
        elif left != right or (name in a) != (name in b):
            yield f"{prefix}{name}", _brief(left), _brief(right)


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else f"{text[:45]}..."


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def _pretty(value: object) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
