"""One run over the missing shards: its bookkeeping and its signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from depthvar.errors import advice
from pipeline.request.job_plan import JobPlan
from pipeline.run.console import environment_changes, say
from pipeline.run.progress import Tally, View
from pipeline.run.schedule import Assignment, ShardQueue
from pipeline.run.worker import Progress, ShardDone, WorkerInfo
from pipeline.shards.committed import ShardSummary, environments
from pipeline.shards.failures import NODE, SHARD, STORAGE, given_up, ledger_lines
from pipeline.shards.manifest import LEDGER_NAME, read_commit, shard_name
from pipeline.storage import Storage

_SET_ASIDE = f"set aside, see {LEDGER_NAME}"
_MAX_STORAGE_FAILURES = 5  # in a row, without a shard committed in between


class JobStopped(Exception):  # noqa: N818 - names what happened to the job
    """The job cannot go on; the message is the real error."""


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP ask for an orderly stop; a second one ends the process at once.

    They are taken from `install` on, until the end of the context.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in self._SIGNALS}
            if self._before[signal.SIGHUP] == signal.SIG_IGN:  # as `nohup` wants it
                del self._before[signal.SIGHUP]
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals; call it again after something else (`ray.init`) took them.

        Only the main thread can: elsewhere nothing happens and the signals keep their meaning.
        """
        for number in self._before:
            signal.signal(number, self._on_signal)

    def is_set(self) -> bool:
        """Whether the job was asked to stop."""
        return self._asked.is_set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            os._exit(128 + number)
        self._asked.set()
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping: shards being made are dropped, once more to end at once\n")


class ShardRun:
    """Bookkeeping of one run: what is heard of a shard goes to the queue, the tally and the ledger.

    The tally is shown to `views` whenever something was heard. The ledger is
    `commits/failures.jsonl`, one line per charged failure with its traceback, and one per charge
    that was taken back.
    """

    def __init__(
        self,
        storage: Storage,
        plan: JobPlan,
        queue: ShardQueue,
        earlier: Iterable[ShardSummary] = (),
        views: Iterable[View] = (),
    ) -> None:
        """`earlier` are the records of the shards that this run finds committed."""
        self.plan = plan
        self.queue = queue
        self.memory_may_be_short = False
        self.unstored: set[int] = set()
        self.views = list(views)
        self.started_s = time.monotonic()
        self.ready_s: float | None = None
        self.finished_s: float | None = None
        self.workers: list[str] = []
        self._storage_failures = 0
        committed = tuple(earlier)
        self._earlier = environments(committed)
        self._said: set[str] = set()
        self._storage = storage
        self.tally = Tally(
            plan,
            queue,
            images_before=sum(record.num_samples for record in committed),
            shards_before=len(committed),
        )

    @property
    def where(self) -> str:
        """The dataset, without anything secret."""
        return str(self._storage)

    def show(self) -> None:
        """Show how far the run is."""
        for view in self.views:
            view(self.tally)

    def crew(self, ready: int, starting: int) -> None:
        """There are so many workers now: ready, and not yet."""
        self.tally.workers_ready, self.tally.workers_starting = ready, starting
        self.show()

    def worker_ready(self, info: WorkerInfo) -> None:
        """A worker has loaded its model; says so if earlier shards were made with other things."""
        self.workers.append(info.device)
        for line in environment_changes(self._earlier, info.made_with):
            if line not in self._said:
                say(f"warning: {line}: the same bytes are only promised for the same environment")
            self._said.add(line)
        if self.ready_s is None:
            self.ready_s = time.monotonic()

    @property
    def loading_s(self) -> float:
        """Seconds until the first worker was ready."""
        return (self.ready_s or time.monotonic()) - self.started_s

    def finish(self) -> None:
        """Stop the clock."""
        self.finished_s = time.monotonic()

    @property
    def making_s(self) -> float:
        """Seconds from the first ready worker to the end of the run."""
        end_s = self.finished_s or time.monotonic()
        return end_s - (self.ready_s or end_s)

    def heard(self, event: Progress | ShardDone) -> None:
        """Take in what a worker yields."""
        tally = self.tally
        if isinstance(event, Progress):
            tally.sampled += event.num_images
            tally.in_hand[event.shard_id] = tally.in_hand.get(event.shard_id, 0) + event.num_images
            self.show()
        else:
            tally.num_bytes += event.num_bytes
            for stage, seconds in event.seconds.items():
                tally.seconds[stage] = tally.seconds.get(stage, 0.0) + seconds
            self._done(event.shard_id)

    def failed(
        self,
        assignment: Assignment,
        error: str,
        trace: str,
        worker: str,
        *,
        storage_error: OSError | None = None,
    ) -> bool:
        """Charge a shard with a failure, unless it was committed all the same; True if charged.

        `storage_error`: a file could not be read or written, which is no fault of the shard; a
        later run tries it again without being told. Raises `JobStopped` when nothing else happens.
        """
        shard_id = assignment.shard_id
        if self._is_committed(shard_id):
            say(f"shard {shard_name(shard_id)} was committed before {worker} failed: {error}")
            self._done(shard_id)
            return False
        is_storage = storage_error is not None
        set_aside = self.queue.failed(shard_id)
        self._forget(shard_id)
        self.memory_may_be_short |= _is_out_of_memory(error)
        if set_aside and is_storage:
            self.unstored.add(shard_id)
        self._write_ledger(
            shard_id,
            attempt=assignment.attempt,
            set_aside=set_aside,
            cause=STORAGE if is_storage else SHARD,
            error=error,
            traceback=trace,
            worker=worker,
        )
        what = "will be tried again"
        if set_aside:
            what = f"left for the next run, see {LEDGER_NAME}" if is_storage else _SET_ASIDE
        say(f"shard {shard_name(shard_id)} failed on {worker}, {what}: {error}")
        self._storage_failures = self._storage_failures + 1 if is_storage else 0
        if storage_error is not None and self._storage_failures >= _MAX_STORAGE_FAILURES:
            raise JobStopped(
                f"{self._storage_failures} shards in a row could not be stored, the last with"
                f" {error}: {advice(storage_error)}"
            )
        return True

    def lost(self, assignment: Assignment, reason: str, *, alone: bool = False) -> None:
        """Put a shard back, free of charge: its worker went away or was asked to stop.

        `alone`: to be made beside no other, see `ShardQueue`.
        """
        if self._is_committed(assignment.shard_id):
            self._done(assignment.shard_id)
            return
        self.queue.lost(assignment.shard_id, alone=alone)
        self._forget(assignment.shard_id)
        if reason:
            say(f"shard {shard_name(assignment.shard_id)} goes to another worker: {reason}")

    def refund(self, shard_id: int, reason: str) -> None:
        """Take back the charge for a failure that was none of the shard's."""
        self.queue.refund(shard_id)
        self.unstored.discard(shard_id)
        self._write_ledger(shard_id, set_aside=False, cause=NODE, error=reason)
        say(f"shard {shard_name(shard_id)} gets its attempt back: {reason}")

    def _done(self, shard_id: int) -> None:
        start, stop = self.plan.shard_range(shard_id)
        self.queue.done(shard_id)
        self._storage_failures = 0
        self.tally.images += stop - start
        self.tally.shards += 1
        self._forget(shard_id)

    def _forget(self, shard_id: int) -> None:
        """A shard is in nobody's hands any more."""
        self.tally.in_hand.pop(shard_id, None)
        self.show()

    def _is_committed(self, shard_id: int) -> bool:
        try:
            return read_commit(self._storage, self.plan, shard_id) is not None
        except OSError:
            return False

    def _write_ledger(self, shard_id: int, **what: object) -> None:
        entry = {
            "shard_id": shard_id,
            "fingerprint": self.plan.shard_fingerprint(shard_id),
            "failures": self.queue.failures(shard_id),
            **what,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            earlier = b""
            with contextlib.suppress(FileNotFoundError):
                earlier = self._storage.read(LEDGER_NAME)
            line = json.dumps(entry).encode() + b"\n"
            self._storage.publish_bytes(earlier + line, LEDGER_NAME)
        except OSError as error:
            say(f"warning: {LEDGER_NAME} cannot be written: {error}")


def _is_out_of_memory(error: str) -> bool:
    """Whether a failure's one line says that memory ran out, or that it may have."""
    words = ("memoryerror", "out of memory", "can't allocate memory", "alloc_failed")
    return any(word in error.lower() for word in words)


def set_aside_earlier(storage: Storage, plan: JobPlan) -> frozenset[int]:
    """The shards that an earlier run of this plan gave up. Errors: `OSError`."""
    return frozenset(given_up(ledger_lines(storage, plan)))


def one_line(error: BaseException) -> str:
    """Return `ValueError: what happened`: the first line of an error with its type."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
