"""Which class each sample has: a pure function of the counts, never a list of all samples.

The order interleaves the classes so that every shard is a fair mixture. Classes with the same
count form a group and take turns by class id; a group of m samples puts its k-th one at the time
(k + u) / m, and all groups are merged by time. With equal counts this is plain round robin. The
phase u differs from group to group, or else many small classes would meet at the same times (every
class with one sample at 1/2) and fill whole shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from depthvar.errors import InputError

MAX_SAMPLES = 10**12  # keys have twelve digits
_GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2


@dataclass(frozen=True)
class LabelCounts:
    """How many samples of which class: ids strictly increasing, counts positive.

    Errors: `InputError` for anything else.
    """

    class_ids: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.class_ids or len(self.class_ids) != len(self.counts):
            raise InputError(
                f"got {len(self.class_ids)} classes and {len(self.counts)} counts, "
                "wanted at least one class and one count for each"
            )
        pairs = zip(self.class_ids, self.class_ids[1:], strict=False)
        if self.class_ids[0] < 0 or any(a >= b for a, b in pairs):
            raise InputError("got class ids out of order, wanted each once and increasing from 0")
        for class_id, count in zip(self.class_ids, self.counts, strict=True):
            if count < 1:
                raise InputError(f"got {count} samples of class {class_id}, wanted 1 or more")
        if self.total > MAX_SAMPLES:
            raise InputError(
                f"got {self.total} samples, wanted at most {MAX_SAMPLES}: split the dataset"
            )

    @staticmethod
    def from_mapping(counts: Mapping[int, int]) -> LabelCounts:
        """Counts by class id, in any order."""
        ids = tuple(sorted(counts))
        return LabelCounts(ids, tuple(counts[class_id] for class_id in ids))

    @cached_property
    def total(self) -> int:
        """The number of samples of all classes."""
        return sum(self.counts)

    def as_mapping(self) -> dict[int, int]:
        """Class id -> number of samples."""
        return dict(zip(self.class_ids, self.counts, strict=True))

    def labels(self, start: int, stop: int) -> np.ndarray:
        """The int64 class ids of the positions start ... stop - 1.

        Time and memory grow with classes + (stop - start), not with the total.
        """
        assert 0 <= start <= stop <= self.total, f"[{start}, {stop}) of {self.total} samples"
        if start == stop:
            return np.empty(0, dtype=np.int64)
        groups = self._groups
        # At time t each group has sent within 1 of m * t samples, all together within G of
        # N * t: from these times on, the window needs at most 4 G samples more than it holds.
        margin = len(groups) + 2  # two for rounding
        first = [g.sent_before((start - margin) / self.total) for g in groups]
        last = [g.sent_before((stop + margin) / self.total) for g in groups]
        skipped = start - sum(first)
        assert skipped >= 0
        assert sum(last) >= stop
        steps = [np.arange(a, b, dtype=np.int64) for a, b in zip(first, last, strict=True)]
        times = np.concatenate([g.times(k) for g, k in zip(groups, steps, strict=True)])
        ids = np.concatenate([g.labels(k) for g, k in zip(groups, steps, strict=True)])
        order = np.lexsort((ids, times))
        window: np.ndarray = ids[order[skipped : skipped + stop - start]]
        return window

    @cached_property
    def _groups(self) -> tuple[_Group, ...]:
        ids, counts = np.array(self.class_ids, np.int64), np.array(self.counts, np.int64)
        distinct = np.unique(counts)[::-1]
        return tuple(
            _Group(ids[counts == count], int(count) * int((counts == count).sum()), _phase(rank))
            for rank, count in enumerate(distinct)
        )


@dataclass(frozen=True, eq=False)
class _Group:
    """Classes with equal counts, taking turns: `size` samples in all."""

    class_ids: np.ndarray
    size: int
    phase: float

    def times(self, steps: np.ndarray) -> np.ndarray:
        """When the k-th samples come, in (0, 1); increasing in k in float64 up to 1e12 samples."""
        return (steps + self.phase) / self.size

    def labels(self, steps: np.ndarray) -> np.ndarray:
        """The class ids of the k-th samples."""
        ids: np.ndarray = self.class_ids[steps % len(self.class_ids)]
        return ids

    def sent_before(self, time: float) -> int:
        """How many samples have a time below `time`; rounding may move one at that very time."""
        return min(max(math.ceil(self.size * time - self.phase), 0), self.size)


def _phase(rank: int) -> float:
    """In (0, 1). Quadratic in the rank: a linear one resonates with counts such as 1, 2, 3, ..."""
    return (0.5 + rank * rank * _GOLDEN) % 1.0
