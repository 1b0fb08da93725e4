"""What a dataset of many shards costs the driver and whoever looks at it, without a sampler:

    python -m tests.measure_scale [--shards 100000] [--workers 8 32 64] [--folder DIR]

Writes the files of so many committed shards, small ones but for their records, then measures each
step in a process of its own: seconds, processor seconds, memory beyond what the imports take, and
how many files it reads. Then the shards per second that the driver hands out and hears of, from
workers that take no time and with none of what Ray's own calls take. Seconds mean something on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from pipeline.dataset.status import status
from pipeline.dataset.verify import verify
from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import open_plan, stored_plan
from pipeline.run import ray_crew
from pipeline.run.console import dataset_summary
from pipeline.run.ledger import ShardRun
from pipeline.run.progress import ProgressDisplay
from pipeline.run.ray_crew import RayCrew
from pipeline.run.schedule import ShardQueue, WorkerShape
from pipeline.run.worker import Progress, ShardDone, WorkerInfo, Workplace
from pipeline.shards.committed import committed_shards, keep_summaries
from pipeline.shards.indexes import write_indexes
from pipeline.shards.manifest import (
    FOLDERS,
    BatchTiming,
    CommitRecord,
    FileEntry,
    ShardFiles,
    parquet_name,
    record_name,
    tar_name,
)
from pipeline.storage import Storage
from tests.fake_shards import make_plan

SAMPLES_PER_SHARD, BATCH_SIZE = 512, 32
FILE_BYTES = 64
ENVIRONMENT = dict.fromkeys(
    ("cuda", "cudnn", "depthvar", "machine", "numpy", "pillow", "platform", "python", "torch"),
    "1.2.3",
)
HEADINGS = ("step", "seconds", "processor", "memory", "files read")


def many_shards(out: Path, num_shards: int, *, num_missing: int = 0) -> JobPlan:
    """A planned dataset whose shards look committed, all but the last ones."""
    storage = Storage.open(out)
    counts = {0: num_shards * SAMPLES_PER_SHARD}
    sizes = {"samples_per_shard": SAMPLES_PER_SHARD, "batch_size": BATCH_SIZE}
    plan = open_plan(storage, make_plan(counts, **sizes))
    for folder in FOLDERS:
        (out / folder).mkdir()
    template = _record(plan, 0).to_json().decode()
    for shard_id in range(num_shards - num_missing):
        text = template.replace('"shard_id": 0', f'"shard_id": {shard_id}')
        for name_of in (tar_name, parquet_name):
            first, own = _entry(name_of(0)), _entry(name_of(shard_id))
            text = text.replace(first.name, own.name).replace(first.sha256, own.sha256)
            (out / own.name).write_bytes(bytes(FILE_BYTES))
        (out / record_name(shard_id)).write_text(text)
    return plan


def _record(plan: JobPlan, shard_id: int) -> CommitRecord:
    starts = range(0, SAMPLES_PER_SHARD, BATCH_SIZE)
    took_s = (0.1234567, 0.0234567, 0.3456789)
    return CommitRecord(
        shard_id=shard_id,
        fingerprint=plan.shard_fingerprint(shard_id),
        num_samples=SAMPLES_PER_SHARD,
        num_blank=0,
        num_duplicates=0,
        files=ShardFiles(_entry(tar_name(shard_id)), _entry(parquet_name(shard_id))),
        attempt=1,
        worker="node-17:4242",
        device="NVIDIA H100 80GB HBM3",
        threads=1,
        environment=ENVIRONMENT,
        batches=tuple(BatchTiming(i, i + BATCH_SIZE, *took_s) for i in starts),
        committed_at="2026-01-02T03:04:05.678+00:00",
    )


def _entry(name: str) -> FileEntry:
    return FileEntry(name, FILE_BYTES, hashlib.sha256(name.encode()).hexdigest())


@contextmanager
def files_read() -> Iterator[list[str]]:
    """The names of the files that are read meanwhile."""
    names: list[str] = []
    read = Storage.read

    def counted(storage: Storage, name: str) -> bytes:
        names.append(name)
        return read(storage, name)

    with mock.patch.object(Storage, "read", counted):
        yield names


@dataclass(eq=False)
class _Answer:
    """What a simulated worker has answered."""

    value: Any


@dataclass(eq=False)
class _Stream:
    """What a simulated worker says of a shard: its batches, and that it is committed."""

    events: Iterator[Progress | ShardDone]

    def __next__(self) -> _Answer:
        return _Answer(next(self.events))


class _SimulatedWorker:
    """An actor that makes any shard at once and writes nothing, so that only the driver works."""

    def __init__(self, plan: JobPlan, number: int) -> None:
        self._plan = plan
        introduction = WorkerInfo(f"node-{number}", number, "cpu", 1, {}), f"node-{number}"
        self.introduce = SimpleNamespace(remote=lambda: _Answer(introduction))
        self.make = SimpleNamespace(remote=lambda shard_id, attempt: _Stream(self._says(shard_id)))
        self.close = SimpleNamespace(remote=lambda: _Answer(None))

    def _says(self, shard_id: int) -> Iterator[Progress | ShardDone]:
        for start, stop in (batches := self._plan.shard(shard_id).micro_batches):
            yield Progress(shard_id, stop - start, (start, stop) == batches[-1])
        seconds = dict.fromkeys(("sampling", "decoding", "encoding", "publishing"), 0.1)
        yield ShardDone(shard_id, 2 * FILE_BYTES, seconds)


class SimulatedRay:
    """The part of `ray` that a crew calls, where every worker has always something to say."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._numbers = itertools.count()

    def remote(self, actor_class: type) -> Any:
        """An actor class whose actors are simulated."""
        hire = SimpleNamespace(remote=lambda plan, place: self._hire(plan))
        return SimpleNamespace(options=lambda **options: hire)

    def _hire(self, plan: JobPlan) -> _SimulatedWorker:
        return _SimulatedWorker(plan, next(self._numbers))

    def wait(
        self, sources: list[Any], num_returns: int, timeout: float
    ) -> tuple[list[Any], list[Any]]:
        """As `ray.wait` where all is ready."""
        self.calls["wait"] += 1
        return sources[:num_returns], sources[num_returns:]

    def get(self, answer: _Answer) -> Any:
        """The answer, which is there."""
        self.calls["get"] += 1
        return answer.value

    def kill(self, actor: Any, *, no_restart: bool) -> None:
        """Nothing is left to end."""


def run_simulated(run: ShardRun, num_workers: int) -> SimulatedRay:
    """Have a run's shards made by a crew of simulated workers."""
    simulated = SimulatedRay()
    crew = RayCrew(cast(Workplace, None), WorkerShape(0, 1), lambda: num_workers, lambda: False)
    with (
        mock.patch.object(ray_crew, "ray", simulated),
        mock.patch.object(ray_crew, "draining_nodes", frozenset),
    ):
        crew.make(run)
    return simulated


def plan_a_billion(out: Path) -> None:
    """Plan 10^9 samples of 1,000 classes and look up the last shard."""
    names = tuple(f"class {i}" for i in range(1_000))
    counts = dict.fromkeys(range(1_000), 10**6)
    plan = make_plan(counts, class_names=names, samples_per_shard=1_000)
    assert plan.shard(plan.num_shards - 1).stop == 10**9
    plan.to_json()


def resume(out: Path) -> None:
    """As far as the first shard that is handed out."""
    storage = Storage.open(out)
    plan = stored_plan(storage)
    done = committed_shards(storage, plan)
    missing = [shard_id for shard_id in range(plan.num_shards) if shard_id not in done]
    run = ShardRun(storage, plan, ShardQueue(missing, 3), done.values())
    assert run.queue.take() is not None


def keep(out: Path) -> None:
    """Write the summaries of what is committed."""
    storage = Storage.open(out)
    keep_summaries(storage, stored_plan(storage))


def end(out: Path) -> None:
    """What a run tells and writes when it ends."""
    storage = Storage.open(out)
    plan = stored_plan(storage)
    done = keep_summaries(storage, plan)
    dataset_summary(plan, done, str(storage))
    write_indexes(storage, plan, done)


def look(out: Path) -> None:
    """`depthvar status`."""
    storage = Storage.open(out)
    status(storage, stored_plan(storage), datetime.now(UTC))


def check(out: Path) -> None:
    """`depthvar verify`."""
    storage = Storage.open(out)
    assert not verify(storage, stored_plan(storage)).problems


STEPS = {
    "plan 10^9 samples": plan_a_billion,
    "resume without summaries": resume,
    "write them": keep,
    "resume": resume,
    "end of a run": end,
    "status": look,
    "verify": check,
}


def measured(step: str, out: Path) -> list[str]:
    """The row of a step that is made in this process."""
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    with files_read() as names:
        STEPS[step](out)
    took_s, took_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    more_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) * 1.024e-3
    return [step, f"{took_s:.2f} s", f"{took_cpu_s:.2f} s", f"{more_mb:.0f} MB", f"{len(names):,}"]


def hand_out(num_workers: int, num_shards: int = 2_000) -> list[str]:
    """The row of a driver that does nothing but hand out shards of eight batches and hear."""
    counts = {0: num_shards * SAMPLES_PER_SHARD}
    plan = make_plan(counts, samples_per_shard=SAMPLES_PER_SHARD, batch_size=SAMPLES_PER_SHARD // 8)
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    with tempfile.TemporaryFile("w") as log, redirect_stderr(log), ProgressDisplay() as display:
        queue = ShardQueue(range(num_shards), 3)
        run = ShardRun(Storage.open("nowhere"), plan, queue, views=[display.show])
        run_simulated(run, num_workers)
    took_s, took_cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    assert run.tally.shards == num_shards
    rates = [f"{num_shards / seconds:,.0f}/s" for seconds in (took_s, took_cpu_s)]
    return [f"shards of {num_workers} simulated workers", *rates, "", "0"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--folder", type=Path, help="where to write, by default a temporary folder")
    parser.add_argument("--step", choices=STEPS, help="of a dataset that is there, in this process")
    options = parser.parse_args(argv)
    if options.step is not None:
        print(f"| {' | '.join(measured(options.step, options.folder / 'out'))} |")
        return 0
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        many_shards(Path(folder, "out"), options.shards, num_missing=4)
        for step in STEPS:
            command = [sys.executable, "-m", "tests.measure_scale", "--step", step]
            subprocess.run([*command, "--folder", folder], check=True)
    for num_workers in options.workers:
        print(f"| {' | '.join(hand_out(num_workers))} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
