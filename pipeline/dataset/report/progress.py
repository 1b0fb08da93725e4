"""When the images were made, and by whom: from the times and attempts of the commit records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np

from pipeline.shards.committed import ShardSummary

_NUM_BINS = 60
_LONGEST_PAUSE_S, _LONGEST_PAUSE_SHARE = 60.0, 0.05  # longer ones are cut out


@dataclass(frozen=True)
class Work:
    """One worker on one shard: seconds since the epoch, from the first batch to the commit."""

    start_s: float
    stop_s: float
    num_images: int

    @classmethod
    def of(cls, record: ShardSummary) -> Work:
        """The commit's time, and before it what its batches took to sample and decode."""
        stop_s = datetime.fromisoformat(record.committed_at).timestamp()
        return cls(stop_s - making_s(record), stop_s, record.num_samples)


@dataclass(frozen=True, eq=False)
class Timeline:
    """Images per second over the time in which work went on, which starts at 0.

    `pauses`: (when, seconds left out there). `edges_s` are those of the bins of `rate`.
    """

    edges_s: np.ndarray
    rate: np.ndarray
    pauses: list[tuple[float, float]]
    started: datetime
    ended: datetime
    _busy: list[tuple[float, float]]

    @classmethod
    def of(cls, records: Iterable[ShardSummary]) -> Timeline:
        """The timeline of at least one shard: its images are spread over the time it took."""
        works = sorted((Work.of(r) for r in records), key=lambda work: work.start_s)
        busy = _busy_times(works)
        total_s = sum(stop - start for start, stop in busy)
        edges = np.linspace(0.0, total_s, _NUM_BINS + 1)
        rate = np.zeros(_NUM_BINS)
        for work in works:
            start, stop = _working_s(busy, work.start_s), _working_s(busy, work.stop_s)
            inside = np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start)
            rate += np.maximum(inside, 0.0) / (stop - start) * work.num_images
        pauses = [
            (_working_s(busy, stop), following - stop)
            for (_, stop), (following, _) in pairwise(busy)
        ]
        return cls(
            edges_s=edges,
            rate=rate / np.diff(edges),
            pauses=pauses,
            started=datetime.fromtimestamp(busy[0][0], UTC),
            ended=datetime.fromtimestamp(busy[-1][1], UTC),
            _busy=busy,
        )

    @property
    def working_s(self) -> float:
        """Seconds in which work went on."""
        return float(self.edges_s[-1])

    def place(self, moment: datetime) -> float:
        """Where a moment lies on the timeline."""
        return _working_s(self._busy, moment.timestamp())


@dataclass(frozen=True)
class WorkerLine:
    """What one worker committed."""

    name: str
    device: str
    num_shards: int
    num_images: int
    images_per_s: float
    last_commit: str


def worker_lines(records: Iterable[ShardSummary]) -> list[WorkerLine]:
    """The workers in the order of their first commits; rates are of sampling and decoding."""
    by_worker: dict[str, list[ShardSummary]] = {}
    for record in sorted(records, key=lambda r: (r.committed_at, r.shard_id)):
        by_worker.setdefault(record.worker, []).append(record)
    return [
        WorkerLine(
            name,
            ", ".join(dict.fromkeys(record.device for record in made)),
            len(made),
            sum(record.num_samples for record in made),
            sum(record.num_samples for record in made) / sum(map(making_s, made)),
            made[-1].committed_at,
        )
        for name, made in by_worker.items()
    ]


def stage_seconds(records: Iterable[ShardSummary]) -> dict[str, float]:
    """What an image took in every stage, in the mean over at least one shard."""
    totals: Counter[str] = Counter()
    num_images = 0
    for record in records:
        totals.update(record.seconds)
        num_images += record.num_samples
    return {stage: seconds / num_images for stage, seconds in totals.items()}


def making_s(record: ShardSummary) -> float:
    """Seconds that the batches of a shard took to sample and to decode, never 0."""
    return max(1e-3, record.sampling_s + record.decoding_s)


def _busy_times(works: Sequence[Work]) -> list[tuple[float, float]]:
    """The times in which anybody worked, with the short pauses in between, in order."""
    merged: list[tuple[float, float]] = []
    for work in works:
        if merged and work.start_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], work.stop_s))
        else:
            merged.append((work.start_s, work.stop_s))
    worked_s = sum(stop - start for start, stop in merged)
    longest_s = max(_LONGEST_PAUSE_S, _LONGEST_PAUSE_SHARE * worked_s)
    joined = merged[:1]
    for start, stop in merged[1:]:
        if start - joined[-1][1] <= longest_s:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _working_s(busy: Sequence[tuple[float, float]], moment_s: float) -> float:
    """Seconds of work before a moment."""
    return sum(max(0.0, min(stop, moment_s) - start) for start, stop in busy)
