"""The workers as Ray actors: hired, given shards, listened to, replaced.

An actor makes up to two shards at once, each a task with a stream of its own: it gets the next one
when the one before is sampled and being committed.

Ray retries nothing: failures are counted here, each is followed by a fresh actor, and the loss of a
node (free) is told from a failure (charged), and the death of a worker that was making two shards
convicts neither: each is made again alone, where a death is its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import ray
from ray import exceptions as ray_errors

from depthvar.errors import InputError
from pipeline.request.job_plan import JobPlan
from pipeline.run.cluster import alive_nodes, cluster_machines, draining_nodes, is_placed
from pipeline.run.console import say
from pipeline.run.encoding import encode_missing
from pipeline.run.ledger import JobStopped, ShardRun
from pipeline.run.ray_metrics import RayMetrics
from pipeline.run.schedule import SHARDS_IN_HAND, InHand, WorkerShape, num_slots, takes_more
from pipeline.run.worker import Progress, ShardDone, Worker, WorkerInfo, Workplace
from pipeline.run.worker_failures import cause_of, plain, reason_of, storage_error_of

_WAIT_S = 0.5  # longest wait for a worker's word: how fast a signal is noticed
_NODE_POLL_S = 1.0
_NODE_GRACE_S = 60.0  # Ray may take this long to find out that a worker died with its node
_PATIENCE_S = 4.0  # without any worker, before the user is told what the job waits for
_LOADING_S = 30.0  # the same where a worker is there and loads its model
_REMIND_S = 60.0
# A worker leaves its shard between two micro-batches and removes its scratch. On a busy machine
# that takes a while; Slurm and Kubernetes kill half a minute after they ask.
_STOP_GRACE_S = 20.0
_LOADING_GRACE_S = 1.0  # for one that may have claimed its scratch and was not heard yet
_MAX_LOAD_FAILURES = 2
_MAX_ENCODERS = 3

Answer = TypeVar("Answer")


def on_a_worker(work: Callable[[], Answer], shape: WorkerShape) -> Answer:
    """What a function gives in a process of the cluster that has what a worker of a shape has.

    Raises what the function raises, and `JobStopped` where its process is lost.
    """
    task: Any = ray.remote(lambda: work())
    options = {"num_cpus": shape.num_cpus, "num_gpus": shape.num_gpus, "max_retries": 0}
    try:
        return cast(Answer, ray.get(task.options(**options).remote()))
    except ray_errors.RayTaskError as error:
        raise error.cause from None
    except ray_errors.RayError as error:
        raise JobStopped(reason_of(error)) from error


def encode_on_a_worker(
    plan: JobPlan, place: Workplace, shape: WorkerShape, should_stop: Callable[[], bool]
) -> Generator[int]:
    """`encode_missing` in a process that has what a worker has, and is gone afterwards.

    One that is lost is followed by another, which goes on with what is missing. Raises `InputError`
    and `OSError` as it does, and `JobStopped` for other errors and where too many are lost.
    """
    # A process is not used again: the next one on its GPU finds the memory free.
    task: Any = ray.remote(max_calls=1)(encode_missing)
    options = {"num_cpus": shape.num_cpus, "num_gpus": shape.num_gpus, "max_retries": 0}
    for remaining in reversed(range(_MAX_ENCODERS)):
        stream = task.options(**options, num_returns="streaming").remote(plan, place)
        try:
            while not should_stop():
                if ray.wait([stream], timeout=_WAIT_S)[0]:
                    yield ray.get(next(stream))
        except StopIteration:
            return
        except ray_errors.RayTaskError as error:
            if isinstance(error.cause, InputError | OSError):
                raise error.cause from None
            raise JobStopped(reason_of(error)) from error
        except ray_errors.RayError as error:
            if not remaining:
                raise JobStopped(reason_of(error)) from error
            say(f"the text encoder goes to another worker: {reason_of(error)}")
        else:
            return
        finally:
            ray.cancel(stream)


class RayWorker(Worker):
    """The worker as a Ray actor: it knows its node, and stops when its task is cancelled."""

    def introduce(self) -> tuple[WorkerInfo, str]:
        """Return who this is and the id of its node; answered once the model is loaded."""
        return self.info, ray.get_runtime_context().get_node_id()

    def make(self, shard_id: int, attempt: int) -> Iterator[Progress | ShardDone]:
        """Stream one shard's progress."""
        context = ray.get_runtime_context()
        yield from self.run_shard(shard_id, attempt, should_stop=context.is_canceled)


@dataclass(eq=False)
class _Task(InHand):
    """A shard in an actor's hands, and the stream of what is heard of it."""

    stream: Any = None


@dataclass(eq=False)
class _Hired:
    """One live actor: loading until it has introduced itself, then idle or making shards.

    Where a shard failed, `is_leaving`: it ends those it has and gets no other.
    """

    actor: Any
    introduction: Any
    info: WorkerInfo | None = None
    node_id: str = ""
    tasks: list[_Task] = field(default_factory=list)
    is_leaving: bool = False

    @property
    def is_idle(self) -> bool:
        """Ready for a shard, with none in hand."""
        return self.info is not None and not self.tasks

    @property
    def name(self) -> str:
        """`host:pid` once it is known."""
        return "a worker that was loading" if self.info is None else self.info.name


@dataclass(frozen=True)
class _Charge:
    """A charge for a worker's death, refunded if its node turns out to have died."""

    shard_id: int
    node_id: str
    until_s: float


@dataclass
class RayCrew:
    """Keeps `target()` workers of one shape at work on a run's queue until nothing is open.

    Workers that wait for resources do not hold up the others. `target` is asked again as nodes
    come and go. `is_shared`: other jobs may take what this one waits for, and nodes may join.
    """

    place: Workplace
    shape: WorkerShape
    target: Callable[[], int]
    should_stop: Callable[[], bool]
    is_shared: bool = False
    _hired: list[_Hired] = field(default_factory=list)
    _charges: list[_Charge] = field(default_factory=list)
    _draining: frozenset[str] = frozenset()
    _wanted: int = 0
    _load_failures: int = 0
    _next_poll_s: float = 0.0

    def make(self, run: ShardRun) -> None:
        """Work until the queue is finished or the job is asked to stop.

        Raises `JobStopped` if the model cannot be loaded.
        """
        patience_s, waiting_since_s = _PATIENCE_S, time.monotonic()
        run.views.append(RayMetrics(run.where).show)
        try:
            while not run.queue.finished and not self.should_stop():
                self._look_at_nodes(run)
                self._staff(run)
                num_ready = sum(worker.info is not None for worker in self._hired)
                run.crew(num_ready, len(self._hired) - num_ready)
                self._listen(run, _WAIT_S)
                waited_s = time.monotonic() - waiting_since_s
                if any(worker.info for worker in self._hired):
                    patience_s, waiting_since_s = _PATIENCE_S, time.monotonic()
                elif waited_s > patience_s and (reason := self._reason_to_wait(waited_s)):
                    say(reason)
                    patience_s = waited_s + _REMIND_S
        finally:
            self._dismiss_all(run)
            run.crew(0, 0)

    def _reason_to_wait(self, waited_s: float) -> str | None:
        """Why there is no worker yet; None if that takes no longer than it may."""
        machines = cluster_machines()
        if self.is_shared and not num_slots(machines, self.shape):
            return f"waiting for a node with {self.shape.each} to join: no node has it now"
        if self.is_shared and not any(is_placed(worker.actor) for worker in self._hired):
            noun, total = self.shape.noun, sum(self.shape.of(machine) for machine in machines)
            free = ray.available_resources().get(noun, 0)  # type: ignore[no-untyped-call]
            return (
                f"waiting for a worker to start: it takes {self.shape.each}, {free:g} of {total:g}"
                f" {noun}s in the cluster are free now"
            )
        return "waiting for a worker to load the model" if waited_s > _LOADING_S else None

    def _look_at_nodes(self, run: ShardRun) -> None:
        """Refresh the number of workers wanted, the draining nodes, and refunds."""
        now_s = time.monotonic()
        if now_s < self._next_poll_s:
            return
        self._next_poll_s = now_s + _NODE_POLL_S
        self._wanted = self.target()
        self._draining = draining_nodes()
        if self._charges:
            alive = alive_nodes()
            for charge in self._charges:
                if charge.node_id not in alive:
                    run.refund(charge.shard_id, "its worker had died with its node")
            self._charges = [c for c in self._charges if c.node_id in alive and c.until_s > now_s]

    def _staff(self, run: ShardRun) -> None:
        """Dismiss idle workers of draining nodes, hire up to the wanted number, hand out shards."""
        going = [w for w in self._hired if w.is_leaving or w.node_id in self._draining]
        for worker in [w for w in going if w.is_idle]:
            self._dismiss(worker)
        for _ in range(min(self._wanted, run.queue.num_open) - len(self._hired)):
            self._hired.append(self._hire(run.plan))
        free = [w for w in self._hired if w.info and w not in going and takes_more(w.tasks)]
        for worker in sorted(free, key=lambda w: len(w.tasks)):  # those without any first
            if assignment := run.queue.take(beside_another=bool(worker.tasks)):
                stream = worker.actor.make.remote(assignment.shard_id, assignment.attempt)
                worker.tasks.append(_Task(assignment, stream=stream))

    def _hire(self, plan: JobPlan) -> _Hired:
        options = {"num_cpus": self.shape.num_cpus, "num_gpus": self.shape.num_gpus}
        actor_class: Any = ray.remote(RayWorker)
        retries = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": SHARDS_IN_HAND}
        actor = actor_class.options(**options, **retries).remote(plan, self.place)
        return _Hired(actor, actor.introduce.remote())

    def _listen(self, run: ShardRun, timeout_s: float) -> None:
        """Take in whatever workers say within the time."""
        sources: dict[Any, tuple[_Hired, _Task | None]] = {
            w.introduction: (w, None) for w in self._hired if not w.info
        }
        sources |= {task.stream: (w, task) for w in self._hired for task in w.tasks}
        if not sources:
            return
        ready, _ = ray.wait(list(sources), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(list(sources), num_returns=len(sources), timeout=0)
        for source in ready:
            worker, task = sources[source]
            if task is None:
                self._hear_introduction(worker, run)
            elif task in worker.tasks:  # its worker may have died since
                self._hear(worker, task, run)

    def _hear_introduction(self, worker: _Hired, run: ShardRun) -> None:
        try:
            worker.info, worker.node_id = ray.get(worker.introduction)
        except ray_errors.RayError as error:
            self._dismiss(worker)
            self._failed_to_load(error)
        else:
            self._welcome(worker.info, run)

    def _hear(self, worker: _Hired, task: _Task, run: ShardRun) -> None:
        """Take in one thing a worker says of a shard: progress, its result, or its end."""
        try:
            event = ray.get(next(task.stream))
        except StopIteration:
            raise AssertionError("a worker ended its stream without a result") from None
        except ray_errors.RayTaskError as error:
            worker.tasks.remove(task)
            worker.is_leaving = True
            self._failed(worker, task, error, run)
        except ray_errors.RayError as error:
            self._dismiss(worker)
            self._died(worker, error, run)
        else:
            self._take_in(event, worker, task, run)

    def _take_in(
        self, event: Progress | ShardDone, worker: _Hired, task: _Task, run: ShardRun
    ) -> None:
        if isinstance(event, ShardDone):
            worker.tasks.remove(task)
        elif event.is_last:
            task.is_sampled = True
        run.heard(event)

    def _welcome(self, info: WorkerInfo, run: ShardRun) -> None:
        self._load_failures = 0
        run.worker_ready(info)
        if self.shape.num_gpus and info.device == "cpu":
            say(f"warning: {info.name} holds a GPU that torch cannot use: it runs on its CPU")

    def _failed_to_load(self, error: ray_errors.RayError) -> None:
        if cause_of(error) == "node":
            return
        self._load_failures += 1
        if self._load_failures >= _MAX_LOAD_FAILURES:
            raise JobStopped(
                f"the model could not be loaded by {self._load_failures} workers in a row:"
                f" {reason_of(error)}"
            ) from error

    def _died(self, worker: _Hired, error: ray_errors.RayError, run: ShardRun) -> None:
        """Account for all shards of a worker whose process or node is gone."""
        tasks, worker.tasks = worker.tasks, []
        cause = cause_of(error)
        if cause == "node" or (cause == "worker" and worker.node_id not in alive_nodes()):
            for task in reversed(tasks):
                run.lost(task.assignment, f"{worker.name} is gone with its node")
        elif len(tasks) > 1:
            reason = f"{worker.name} died making it and another one, now each is made alone"
            for task in reversed(tasks):
                run.lost(task.assignment, f"{reason}: {reason_of(error)}", alone=True)
        elif self._failed(worker, tasks[0], error, run) and cause == "worker":
            until_s = time.monotonic() + _NODE_GRACE_S
            charge = _Charge(tasks[0].assignment.shard_id, worker.node_id, until_s)
            self._charges.append(charge)

    def _failed(
        self, worker: _Hired, task: _Task, error: ray_errors.RayError, run: ShardRun
    ) -> bool:
        return run.failed(
            task.assignment,
            reason_of(error),
            plain(error),
            worker.name,
            storage_error=storage_error_of(error),
        )

    def _dismiss(self, worker: _Hired) -> None:
        """Let go of an actor for good; a failed process is never used again."""
        self._hired.remove(worker)
        with contextlib.suppress(ray_errors.RayError):
            ray.kill(worker.actor, no_restart=True)

    def _dismiss_all(self, run: ShardRun) -> None:
        """End all workers: first ask those at work to leave their shard, then insist."""
        deadline_s = time.monotonic() + _STOP_GRACE_S
        for task in [task for worker in self._hired for task in worker.tasks]:
            if not task.is_sampled:
                ray.cancel(task.stream)
        while time.monotonic() < deadline_s and any(w.tasks for w in self._hired):
            self._await_end(run)
        idle = [w.actor.close.remote() for w in self._hired if w.is_idle]
        loading = [w.actor.close.remote() for w in self._hired if w.info is None]
        left_s = max(deadline_s - time.monotonic(), _LOADING_GRACE_S)
        for closing, grace_s in ((idle, left_s), (loading, _LOADING_GRACE_S)):
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=grace_s)
        for worker in list(self._hired):
            self._dismiss(worker)

    def _await_end(self, run: ShardRun) -> None:
        """Hear cancelled workers out: a shard that was being published may still be committed."""
        streams = {task.stream: (w, task) for w in self._hired for task in w.tasks}
        ready, _ = ray.wait(list(streams), num_returns=1, timeout=_WAIT_S)
        for worker, task in [streams[stream] for stream in ready]:
            try:
                event = ray.get(next(task.stream))
            except (StopIteration, ray_errors.RayError):
                worker.tasks.remove(task)
            else:
                self._take_in(event, worker, task, run)
