"""How far a run is, in numbers, and how they are shown while it goes on."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm import tqdm

from depthvar.host.rate import duration, rate_text
from pipeline.request.job_plan import JobPlan
from pipeline.run.schedule import ShardQueue

_WINDOW_S = 120.0  # what is made in it gives the rate,
_MIN_READINGS = 20  # and so many batches at least
_REDRAW_S = 0.2
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 60.0  # between the lines of a log
_PAUSE_SHARE = 0.1  # of the time since the first one


class Counted(Protocol):
    """Work that goes on: how much is done of how much, and what has been `made` for its rate.

    `made` never falls; it is None as long as nothing can be made.
    """

    @property
    def done(self) -> int:
        """How much is there."""

    @property
    def total(self) -> int:
        """How much is wanted."""

    @property
    def made(self) -> int | None:
        """How much was made, that included which was lost."""

    def text(self, per_second: float) -> str:
        """One line that says so; at a rate of 0 it is not known."""


@dataclass
class PromptTally:
    """Prompts that are encoded before the first shard."""

    total: int
    done: int = 0

    @property
    def made(self) -> int | None:
        """All that are done; the first ones come with the time that the encoder takes to load."""
        return self.done or None

    def text(self, per_second: float) -> str:
        """One line: prompts, rate, time left."""
        parts = [f"{self.done:,}/{self.total:,} prompts ({100 * self.done // self.total}%)"]
        parts += _pace("prompts", per_second, self.total - self.done)
        return f"text encoder: {', '.join(parts)}"


@dataclass
class Tally:
    """What a run counts, for whoever shows it.

    `images_before` and `shards_before` were committed when it began; `images`, `shards` and
    `num_bytes` are what it committed, `seconds` what that took by stage. `sampled` images include
    those of shards that were lost, `in_hand` those of every shard that is not committed yet.
    """

    plan: JobPlan
    queue: ShardQueue
    images_before: int = 0
    shards_before: int = 0
    images: int = 0
    shards: int = 0
    num_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    sampled: int = 0
    in_hand: dict[int, int] = field(default_factory=dict)
    workers_ready: int = 0
    workers_starting: int = 0

    @property
    def total(self) -> int:
        """Images of the plan."""
        return self.plan.num_samples

    @property
    def made(self) -> int | None:
        """Images sampled; None while the first worker loads."""
        return self.sampled if self.workers_ready or self.sampled else None

    @property
    def done(self) -> int:
        """Images that are committed or in hand."""
        return self.images_before + self.images + sum(self.in_hand.values())

    @property
    def images_left(self) -> int:
        """Images that this run will still make, at most: shards that are set aside it won't."""
        of_queue = self.queue.num_open * self.plan.samples_per_shard - sum(self.in_hand.values())
        return max(0, min(self.total - self.done, of_queue))

    def text(self, per_second: float) -> str:
        """One line: images, shards, rate, time left, workers, and what went wrong if it did."""
        retries, aside = self.queue.num_retries, len(self.queue.set_aside)
        parts = [
            f"{self.done:,}/{self.total:,} images ({100 * self.done // self.total}%)",
            f"{self.shards_before + self.shards:,}/{self.plan.num_shards:,} shards",
            *_pace("images", per_second, self.images_left),
        ]
        if self.workers_ready:
            noun = "worker" if self.workers_ready == 1 else "workers"
            parts.append(f"{self.workers_ready:,} {noun}")
        if self.workers_starting:
            parts.append(f"{self.workers_starting:,} starting")
        if retries:
            parts.append(f"{retries:,} {'retry' if retries == 1 else 'retries'}")
        if aside:
            parts.append(f"{aside:,} set aside")
        return f"{self.plan.model}: {', '.join(parts)}"


View = Callable[[Tally], None]
"""Shows a tally, whenever it has changed and every now and then."""


class RecentRate:
    """How fast a number grows: over the last two minutes, or the last readings where these are
    few."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, total: int) -> None:
        """Take in a reading; those of one second count as the last of them."""
        if self._seen and self._seen[-1][1] == total:
            return
        if len(self._seen) > 1 and now_s - self._seen[-2][0] < 1.0:
            self._seen.pop()
        self._seen.append((now_s, total))
        while len(self._seen) > _MIN_READINGS and self._seen[1][0] < now_s - _WINDOW_S:
            self._seen.popleft()

    def per_second(self, now_s: float) -> float:
        """The rate; 0 before the second reading."""
        if len(self._seen) < 2:
            return 0.0
        first_s, first = self._seen[0]
        return (self._seen[-1][1] - first) / max(now_s - first_s, 1e-3)


def _pace(noun: str, per_second: float, left: int) -> list[str]:
    """The rate, and the time left if anything is; nothing where there is none."""
    told = [f"{rate_text(per_second)} {noun}/s"] if per_second else []
    return told + ([f"{duration(left / per_second)} left"] if per_second and left else [])


class ProgressDisplay:
    """Shows a count on stderr: redrawn in place on a terminal, in a log a line now and then.

    Lines come every ten seconds at first, later every minute. What is shown last is the end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun_s = self._next_s = clock()
        self._rate = RecentRate()
        self._counted: Counted | None = None
        self._shown = ""
        self._on_terminal = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._counted is not None and self._text(self._counted) != self._shown:
            self._draw(self._counted)
        if self._bar is not None:
            self._bar.close()

    def show(self, counted: Counted) -> None:
        """Take in how far the work is, and show it if that is due."""
        self._counted, now_s = counted, self._clock()
        if counted.made is not None:
            self._rate.add(now_s, counted.made)
        if now_s >= self._next_s:
            self._draw(counted)
            pause_s = max(_FIRST_PAUSE_S, _PAUSE_SHARE * (now_s - self._begun_s))
            pause_s = _REDRAW_S if self._on_terminal else min(pause_s, _LONGEST_PAUSE_S)
            self._next_s = now_s + pause_s

    def _text(self, counted: Counted) -> str:
        return counted.text(self._rate.per_second(self._clock()))

    def _draw(self, counted: Counted) -> None:
        self._shown = self._text(counted)
        if not self._on_terminal:
            print(self._shown, file=sys.stderr, flush=True)
            return
        if self._bar is None:
            form, total = "|{bar:10}| {desc}", counted.total
            self._bar = tqdm(total=total, bar_format=form, dynamic_ncols=True, file=sys.stderr)
        self._bar.n = counted.done
        self._bar.set_description_str(self._shown)
