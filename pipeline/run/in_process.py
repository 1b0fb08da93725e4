"""The worker in this process, without Ray: a shard is sampled while the one before is committed."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from depthvar.errors import InputError, advice
from pipeline.request.job_plan import JobPlan
from pipeline.run.encoding import encode_missing
from pipeline.run.ledger import JobStopped, ShardRun, one_line
from pipeline.run.schedule import SHARDS_IN_HAND, Assignment, InHand, takes_more
from pipeline.run.worker import Progress, ShardDone, ShardStopped, Worker, Workplace


def run_in_process(place: Workplace, run: ShardRun, should_stop: Callable[[], bool]) -> None:
    """Make the shards of a run in this process.

    Raises `InputError` or `JobStopped` if the model cannot be loaded.
    """
    run.crew(0, 1)
    try:
        worker = Worker(run.plan, place)
    except InputError:
        raise
    except OSError as error:
        raise JobStopped(f"no worker can start: {one_line(error)}: {advice(error)}") from error
    except Exception as error:
        raise JobStopped(f"the model cannot be loaded: {one_line(error)}") from error
    run.worker_ready(worker.info)
    run.crew(1, 0)
    try:
        _make(worker, run, should_stop)
    finally:
        worker.close()
        run.crew(0, 0)


def encode_in_process(plan: JobPlan, place: Workplace) -> Generator[int]:
    """`encode_missing` in this process. Raises `InputError`, `OSError` or `JobStopped`."""
    try:
        yield from encode_missing(plan, place)
    except (InputError, OSError):
        raise
    except Exception as error:
        raise JobStopped(one_line(error)) from error


def _make(worker: Worker, run: ShardRun, should_stop: Callable[[], bool]) -> None:
    """Hand out shards and take in what is heard of them, until none is left in hand."""
    heard: SimpleQueue[tuple[InHand, Progress | ShardDone | BaseException]] = SimpleQueue()
    in_hand: list[InHand] = []
    given_up = threading.Event()
    problem: JobStopped | None = None

    def is_stopping() -> bool:
        return given_up.is_set() or should_stop()

    def make(shard: InHand) -> None:
        wanted = shard.assignment
        try:
            for event in worker.run_shard(wanted.shard_id, wanted.attempt, should_stop=is_stopping):
                heard.put((shard, event))
        except BaseException as error:
            heard.put((shard, error))

    with ThreadPoolExecutor(SHARDS_IN_HAND, thread_name_prefix="shard") as pool:
        while True:
            if takes_more(in_hand) and not is_stopping() and (assignment := run.queue.take()):
                in_hand.append(InHand(assignment))
                pool.submit(make, in_hand[-1])
            if not in_hand:
                break
            shard, event = heard.get()
            if not isinstance(event, Progress):
                in_hand.remove(shard)
            elif event.is_last:
                shard.is_sampled = True
            try:
                _take_in(event, shard.assignment, worker, run)
            except JobStopped as error:
                problem = problem or error
                given_up.set()
    if problem is not None:
        raise problem


def _take_in(
    event: Progress | ShardDone | BaseException,
    assignment: Assignment,
    worker: Worker,
    run: ShardRun,
) -> None:
    if isinstance(event, ShardStopped):
        run.lost(assignment, "")
    elif isinstance(event, BaseException):
        run.failed(
            assignment,
            one_line(event),
            "".join(traceback.format_exception(event)),
            worker.info.name,
            storage_error=event if isinstance(event, OSError) else None,
        )
    else:
        run.heard(event)
