"""How far a dataset is, from a few files of it, whoever makes it and wherever.

What is done is counted from the listing. Only the newest commit records are read, for who works
and how fast, and those in doubt; `verify` reads the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from depthvar.host.rate import duration, rate_text
from pipeline.dataset.report.progress import Work
from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import PLAN_NAME
from pipeline.shards.claims import doubtful_shards
from pipeline.shards.committed import ShardSummary, committed_among
from pipeline.shards.failures import LedgerLine, given_up, ledger_lines
from pipeline.shards.manifest import INDEX_NAME, LEDGER_NAME, Listing, list_shards, listed_shards
from pipeline.storage import Storage

RECORDS_READ = 512
_WINDOW_S = 600.0
_SHORTEST_PAUSE_S = 120.0
_PATIENCE = 3.0  # times what a worker takes for a shard, before it is taken for gone
_MAX_LINES = 10

State = Literal["finished", "working", "quiet"]


@dataclass(frozen=True)
class Pace:
    """What one worker committed within the ten minutes before its last commit.

    `is_at_work`: that is not longer ago than three of its shards take.
    """

    worker: str
    images_per_s: float
    last_commit: datetime
    is_at_work: bool

    @classmethod
    def of(cls, worker: str, records: Iterable[ShardSummary], now: datetime) -> Pace:
        """From some records of the worker, at least one."""
        works = sorted((Work.of(record) for record in records), key=lambda work: work.stop_s)
        stop_s = works[-1].stop_s
        late = [work for work in works if work.stop_s > stop_s - _WINDOW_S]
        working_s = stop_s - min(work.start_s for work in late)
        patience_s = max(_SHORTEST_PAUSE_S, _PATIENCE * working_s / len(late))
        return cls(
            worker,
            sum(work.num_images for work in late) / working_s,
            datetime.fromtimestamp(stop_s, UTC),
            now.timestamp() - stop_s < patience_s,
        )


@dataclass(frozen=True)
class Status:
    """How far a dataset is at `now`.

    `pace`: the workers that committed last, the latest first. `unsound`: shards whose files are all
    there and whose record, as far as it was read, is not theirs.
    """

    where: str
    plan: JobPlan
    now: datetime
    planned_at: datetime
    num_shards: int
    num_images: int
    unsound: tuple[int, ...]
    has_index: bool
    pace: tuple[Pace, ...]
    failures: tuple[LedgerLine, ...]
    set_aside: Mapping[int, LedgerLine]

    @property
    def is_complete(self) -> bool:
        """Whether every planned shard is committed."""
        return self.num_shards == self.plan.num_shards

    @property
    def state(self) -> State:
        """`finished` with the indexes written; else whether workers are seen to be at work.

        One that begins is seen with its first shard.
        """
        if self.is_complete and self.has_index:
            return "finished"
        return "working" if self.at_work else "quiet"

    @property
    def at_work(self) -> tuple[Pace, ...]:
        """The workers that seem to be at work."""
        return () if self.is_complete else tuple(pace for pace in self.pace if pace.is_at_work)

    @property
    def images_per_s(self) -> float:
        """Images per second of the workers at work, 0 without any."""
        return sum(pace.images_per_s for pace in self.at_work)

    @property
    def seconds_left(self) -> float | None:
        """At this rate, for all but the shards set aside; None without one."""
        aside = sum(_num_images(self.plan, shard_id) for shard_id in self.set_aside)
        left = self.plan.num_samples - self.num_images - aside
        return left / self.images_per_s if self.images_per_s else None

    @property
    def steps(self) -> tuple[str, ...]:
        """What to do now; nothing where it is finished, or goes on by itself."""
        again = "run the generate command of this dataset again"
        steps = []
        if self.unsound:
            steps.append(f"`depthvar verify {self.where} --deep --repair`")
        if self.is_complete and not self.has_index:
            steps.append(f"{again} to write the indexes")
        elif self.state == "quiet" and len(self.set_aside) < self.plan.num_shards - self.num_shards:
            steps.append(f"{again} to go on, unless a job has just begun")
        if self.set_aside:
            steps.append(f"{again} with --retry-failed to try what was set aside")
        return tuple(steps)

    def as_text(self) -> str:
        """A few lines for people."""
        plan, lines = self.plan, []
        lines.append(f"dataset   {self.where}: {plan.model}, {plan.subjects_told}")
        lines.append(
            f"done      {self.num_images:,} of {plan.num_samples:,} images"
            f" ({100 * self.num_images // plan.num_samples}%), {self.num_shards:,} of"
            f" {plan.num_shards:,} shards"
        )
        if self.at_work:
            workers = "worker" if len(self.at_work) == 1 else "workers"
            lines.append(
                f"rate      {rate_text(self.images_per_s)} images/s by {len(self.at_work):,}"
                f" {workers}, {duration(self.seconds_left or 0)} left"
            )
        lines.append(f"state     {self.state}: {self._last_sign()}")
        if self.failures:
            ago = self._ago(self.failures[-1].at)
            lines.append(f"failures  {len(self.failures):,}, the last {ago}, see {LEDGER_NAME}")
        lines += _few(
            [f"set aside {shard_id}: {line.error}" for shard_id, line in self.set_aside.items()]
        )
        lines += _few([f"unsound   {i}: the record does not fit its files" for i in self.unsound])
        return "\n".join([*lines, *(f"next      {step}" for step in self.steps)])

    def as_json(self) -> dict[str, object]:
        """The same for programs; times in ISO 8601, rates and seconds null where there are none."""
        return {
            "dataset": self.where,
            "state": self.state,
            "images": {"committed": self.num_images, "planned": self.plan.num_samples},
            "shards": {"committed": self.num_shards, "planned": self.plan.num_shards},
            "images_per_s": self.images_per_s or None,
            "seconds_left": self.seconds_left,
            "workers": [pace.worker for pace in self.at_work],
            "last_commit": self.pace[0].last_commit.isoformat() if self.pace else None,
            "failures": len(self.failures),
            "set_aside": {str(i): line.error for i, line in self.set_aside.items()},
            "unsound": list(self.unsound),
            "next": list(self.steps),
        }

    def _last_sign(self) -> str:
        if not self.pace:
            return f"planned {self._ago(self.planned_at)}, no shard is committed yet"
        latest = self.pace[0]
        return f"the last commit was {self._ago(latest.last_commit)}, by {latest.worker}"

    def _ago(self, moment: datetime) -> str:
        return f"{duration(max(0.0, (self.now - moment).total_seconds()))} ago"


def status(storage: Storage, plan: JobPlan, now: datetime) -> Status:
    """Look at a dataset. Errors: `OSError` where the storage does not answer."""
    listing = list_shards(storage)
    listed = listed_shards(listing.sizes, plan)
    wanted = _newest(listing, listed)
    wanted |= {i: listed[i] for i in doubtful_shards(storage) & listed.keys()}
    read = committed_among(wanted, storage, plan, listing, reread=True)
    unsound = tuple(sorted(wanted.keys() - read.keys()))
    done = listed.keys() - unsound
    lines = list(ledger_lines(storage, plan))
    aside = {i: line for i, line in sorted(given_up(lines).items()) if i not in done}
    by_worker: dict[str, list[ShardSummary]] = {}
    for record in read.values():
        by_worker.setdefault(record.worker, []).append(record)
    pace = [Pace.of(worker, records, now) for worker, records in by_worker.items()]
    return Status(
        where=str(storage),
        plan=plan,
        now=now,
        planned_at=storage.times("").get(PLAN_NAME, now),
        num_shards=len(done),
        num_images=sum(_num_images(plan, shard_id) for shard_id in done),
        unsound=unsound,
        has_index=storage.size(INDEX_NAME) is not None,
        pace=tuple(sorted(pace, key=lambda p: p.last_commit, reverse=True)),
        failures=tuple(line for line in lines if line.is_failure),
        set_aside=aside,
    )


def _newest(listing: Listing, listed: Mapping[int, str]) -> dict[int, str]:
    """Those of the listed shards whose records were written last."""
    recent = sorted(listed, key=lambda i: listing.times.get(listed[i], 0))[-RECORDS_READ:]
    return {shard_id: listed[shard_id] for shard_id in recent}


def _num_images(plan: JobPlan, shard_id: int) -> int:
    start, stop = plan.shard_range(shard_id)
    return stop - start


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - _MAX_LINES
    return [*lines[:_MAX_LINES], *([f"          and {more:,} more"] if more > 0 else [])]
