"""The driver: hands shards to workers and answers for the result. The only file that imports Ray.

Ray Core only: one actor per GPU, or per share of the cores. Ray retries nothing: the driver counts
failures itself, starts a fresh actor after each, and tells the loss of a node (free) from a failure
(charged). What is done is read from the output, never remembered.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal, cast

import grpc
import ray
from ray import exceptions as ray_errors

from depthvar.config import is_model_path
from depthvar.errors import InputError
from pipeline.actor import (
    Progress,
    ShardDone,
    Worker,
    WorkerInfo,
    WorkerSpec,
    job_plan,
    require_device,
)
from pipeline.address import (
    AUTO,
    ClusterAddress,
    cluster_address,
    require_listener,
    who_answers,
)
from pipeline.claims import sweep_claims
from pipeline.config import GenerateConfig, resolve_job
from pipeline.console import (
    ProgressBar,
    class_line,
    dataset_summary,
    memory_warning,
    missing_summary,
    run_summary,
    say,
)
from pipeline.contact_sheet import CONTACT_SHEET_NAME, write_contact_sheet
from pipeline.faults import reach
from pipeline.loader import Dataset
from pipeline.manifest import LEDGER_NAME, CommitRecord, committed_shards, write_indexes
from pipeline.plan import JobPlan, check_output, open_plan
from pipeline.run import (
    JobStopped,
    ShardRun,
    StopSignals,
    one_line,
    run_in_process,
    set_aside_earlier,
)
from pipeline.samples import ShardError
from pipeline.schedule import (
    Assignment,
    Machine,
    ShardQueue,
    WorkerShape,
    available_cores,
    available_memory,
    gpu_memory,
    num_slots,
    require_fit,
    require_slots,
    worker_room,
    worker_shape,
)
from pipeline.storage import Storage

_WAIT_S = 0.5  # longest wait for a worker's word: how fast a signal is noticed
_NODE_POLL_S = 1.0
_NODE_GRACE_S = 60.0  # Ray may take this long to find out that a worker died with its node
_PATIENCE_S = 4.0  # without any worker, before the user is told what the job waits for
_LOADING_S = 30.0  # the same where a worker is there and loads its model
_REMIND_S = 60.0
_STOP_GRACE_S = 8.0  # a worker leaves its shard between two micro-batches
_CLOSE_GRACE_S = 2.0
_MAX_LOAD_FAILURES = 2
_MEMORY_RESOURCES = ("memory", "object_store_memory")  # a node's memory as Ray shares it out
_OBJECT_STORE_BYTES = 128 * 2**20  # images never enter the object store


def generate(config: GenerateConfig, *, sampler_factory: str | None = None) -> int:
    """Make every missing shard of a dataset; 0 if all planned shards are committed, else 1.

    `sampler_factory` replaces the sampler (`module:function`, see `WorkerSpec`). Raises
    `InputError` before anything is written for a request that cannot work.
    """
    job = resolve_job(config)
    plan = job_plan(config, job)
    storage = Storage.open(config.out)
    stored = check_output(storage, plan, extend=config.extend)
    plan = stored or plan
    done = {} if stored is None else committed_shards(storage, plan)
    if len(done) == plan.num_shards:
        say(f"all {plan.num_shards:,} shards of {storage} are committed already")
        return _conclude(config, storage, plan, None, interrupted=False)
    given_up = frozenset[int]()
    if stored is not None and not config.retry_failed:
        given_up = set_aside_earlier(storage, plan)
    missing = [i for i in range(plan.num_shards) if i not in done and i not in given_up]
    if not missing:
        return _conclude(config, storage, plan, None, interrupted=False, given_up=given_up)
    queue = ShardQueue(missing, config.max_attempts)
    spec = _worker_spec(config, storage, plan, sampler_factory)
    with StopSignals() as stop:
        with _crew(config, storage, spec, stop) as crew:
            stop.install()
            if warning := memory_warning(job, config, crew.room):
                say(f"warning: {warning}")
            plan = open_plan(storage, plan, extend=config.extend)
            num_done = sum(record.num_samples for record in done.values())
            say("\n".join([class_line(plan), *(f"note: {note}" for note in job.notes)]))
            with ProgressBar(plan, num_done=num_done, shards_done=len(done)) as bar:
                run = ShardRun(storage, plan, queue, bar, done.values())
                problem = _made(crew.make, run)
        stopped = stop.is_set()
        return _conclude(
            config, storage, plan, run, problem, interrupted=stopped, given_up=given_up
        )


def _worker_spec(
    config: GenerateConfig, storage: Storage, plan: JobPlan, sampler_factory: str | None
) -> WorkerSpec:
    """What the workers are told, with paths that do not depend on the current folder."""
    weights = config.weights
    if weights is None and is_model_path(config.model):
        weights = config.model
    if weights is not None and os.path.exists(weights):
        weights = os.path.abspath(weights)
    spec = WorkerSpec(
        plan_json=plan.to_json(),
        out=storage.root if storage.is_local else storage.uri,
        weights=weights,
        scratch=None if config.scratch is None else os.path.abspath(config.scratch),
        device=config.device,
        threads=config.threads_per_worker,
    )
    return spec if sampler_factory is None else replace(spec, sampler_factory=sampler_factory)


_SETTLING_S = 60.0  # a publication takes seconds, to a slow store up to a minute
_PROBE_S = 5.0
_TOKEN = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

Make = Callable[[ShardRun], None]


@dataclass(frozen=True)
class _Crew:
    """Who makes the shards, and the bytes that one worker may take, None if nobody knows."""

    make: Make
    room: int | None


def _made(make: Make, run: ShardRun) -> str | None:
    """Run to the end; the reason if the job had to be given up."""
    try:
        make(run)
    except JobStopped as error:
        return str(error)
    finally:
        run.finish()
    return None


def _conclude(
    config: GenerateConfig,
    storage: Storage,
    plan: JobPlan,
    run: ShardRun | None,
    problem: str | None = None,
    *,
    interrupted: bool,
    given_up: frozenset[int] = frozenset(),
) -> int:
    """Read what is committed, write the indexes and the contact sheet, and say how it went."""
    set_aside = given_up | set(() if run is None else run.queue.set_aside)
    done = committed_shards(storage, plan)
    if problem is None and not interrupted:
        done = _settled(storage, plan, done, set_aside)
    is_complete = len(done) == plan.num_shards
    if run is not None and run.num_images:
        print(run_summary(run.num_images, run.making_s, run.loading_s, run.workers))
    print(dataset_summary(plan, done, str(storage)))
    if is_complete:
        reach("indexes-wanted")
        write_indexes(storage, plan, done)
        reach("indexes-written")
        sweep_claims(storage, done)
        is_new = run is not None or storage.size(CONTACT_SHEET_NAME) is None
        if config.contact_sheet and is_new:
            try:
                write_contact_sheet(Dataset(storage, plan, done), config.contact_sheet)
            except ShardError as error:
                say(f"error: {error}")
                return 1
        if config.contact_sheet:
            print(f"pictures  {storage}/{CONTACT_SHEET_NAME}")
        return 0
    if problem is not None:
        say(f"error: {problem}")
    missing = [shard_id for shard_id in range(plan.num_shards) if shard_id not in done]
    unstored = set() if run is None else run.unstored
    is_memory_short = run is not None and run.memory_may_be_short
    text = missing_summary(
        missing,
        sorted((set_aside - unstored).intersection(missing)),
        LEDGER_NAME,
        num_shards=plan.num_shards,
        interrupted=interrupted,
        unstored=sorted(unstored.intersection(missing)),
        too_large_batch=plan.settings.batch_size if is_memory_short else None,
    )
    say(text)
    return 1


def _settled(
    storage: Storage, plan: JobPlan, done: dict[int, CommitRecord], set_aside: Collection[int]
) -> dict[int, CommitRecord]:
    """What is committed once another job has published the shards that it writes over.

    All shards but those set aside were committed when this run ended. One that is not any more is
    being made again, by a job in another environment: it is waited for, within bounds.
    """
    wanted = set(range(plan.num_shards)) - set(set_aside)
    deadline_s = time.monotonic() + _SETTLING_S
    while wanted - done.keys() and time.monotonic() < deadline_s:
        time.sleep(0.2)
        done = committed_shards(storage, plan)
    return done


@contextlib.contextmanager
def _crew(
    config: GenerateConfig, storage: Storage, spec: WorkerSpec, stop: StopSignals
) -> Iterator[_Crew]:
    """Give those who make the shards; what cannot work is found out before they are given.

    A cluster is joined at once, Ray on this machine starts with the work. Raises `InputError` for
    more workers than this machine has room for, and for a cluster that cannot be joined.
    """
    address = None if config.workers == 0 else cluster_address(config.address, os.environ)
    if config.workers == 0:
        machine = _this_machine(with_gpus=config.device != "cpu")
        shape = worker_shape([machine], device=config.device, threads_per_worker=1)
        require_slots(None, num_slots([machine], shape), shape)
        require_device(config.device)
        yield _Crew(
            lambda run: run_in_process(spec, run, stop.is_set), worker_room([machine], shape, 1)
        )
    elif address is not None:
        found = _found_cluster(address)
        with _ray_session({"address": found.text}):
            yield _cluster_crew(config, storage, spec, stop)
    else:
        yield _local_crew(config, spec, stop)


def _local_crew(config: GenerateConfig, spec: WorkerSpec, stop: StopSignals) -> _Crew:
    """Check that the workers fit on this machine, then make shards with Ray started here."""
    machine = _this_machine(with_gpus=config.device != "cpu")
    shape = worker_shape([machine], device=config.device, threads_per_worker=spec.threads)
    slots = num_slots([machine], shape)
    require_slots(config.workers, slots, shape)
    require_device(config.device)

    def make(run: ShardRun) -> None:
        with _ray_session({"address": "local", "num_cpus": int(machine.num_cpus)}):
            stop.install()
            RayCrew(spec, shape, lambda: config.workers or slots, stop.is_set).make(run)

    return _Crew(make, worker_room([machine], shape, config.workers))


@contextlib.contextmanager
def _ray_session(connect: dict[str, Any]) -> Iterator[None]:
    """Start Ray here or join a cluster, quietly; whoever is connected already stays connected."""
    if ray.is_initialized():
        yield
        return
    if connect["address"] == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        connect = {
            **connect,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    try:
        with _hangups_held_back():
            ray.init(**connect, log_to_driver=False, logging_level=logging.ERROR)
    except SystemExit:  # raised by Ray's own handler of SIGTERM
        say("stopped")
        raise SystemExit(128 + signal.SIGTERM) from None
    except (ConnectionError, ray_errors.RayError, RuntimeError, ValueError) as error:
        reason = one_line(error if error.__cause__ is None else error.__cause__)
        raise InputError(
            f"cannot join or start Ray at {connect['address']}: {reason}: check --address and that"
            " the cluster runs"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _hangups_held_back() -> Iterator[None]:
    """Start what is started meanwhile deaf to SIGHUP, which a lost terminal sends to all of a job.

    Processes inherit what is held back; Ray does the same with Ctrl-C. The driver hears of it then.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _found_cluster(address: ClusterAddress) -> ClusterAddress:
    """The cluster that answers at an address, found out within seconds; Ray would try for minutes.

    Raises `InputError` where it is none, wants another token, has another version of Ray, or where
    this machine is none of its nodes.
    """
    if address.text == AUTO:
        address = _cluster_here(address)
    require_listener(address)
    try:
        version, nodes = _ask_gcs(address)
        nodes_here = _private("services").find_node_ids()
    except (ImportError, AttributeError):  # it has moved: Ray finds out by itself
        return address
    except ray_errors.AuthenticationError as error:
        reason = str(error).partition(". ")[0]
        raise InputError(f"{address}, and there is no token to show: {reason}: {_TOKEN}") from None
    except grpc.RpcError as error:
        raise InputError(f"{address}, {_unfit(address, error.code())}") from None
    if version and version != ray.__version__:
        raise InputError(
            f"{address}, a cluster of Ray {version}, and this process has Ray {ray.__version__}:"
            " install the cluster's version"
        )
    if nodes.isdisjoint(nodes_here):
        raise InputError(
            f"{address}, a cluster that this machine is no node of: run the command on one of its"
            f" nodes, or with `ray job submit --address http://{address.host}:8265`"
        )
    return address


def _ask_gcs(address: ClusterAddress) -> tuple[str, frozenset[str]]:
    """Ray's version there and the ids of the nodes that are alive."""
    generated = "ray.core.generated"
    messages = importlib.import_module(f"{generated}.gcs_service_pb2")
    services = importlib.import_module(f"{generated}.gcs_service_pb2_grpc")
    states = importlib.import_module(f"{generated}.gcs_pb2").GcsNodeInfo
    with _private("gcs_utils").create_gcs_channel(address.text) as channel:
        gcs = services.NodeInfoGcsServiceStub(channel)
        alive = gcs.CheckAlive(messages.CheckAliveRequest(), timeout=_PROBE_S)
        nodes = gcs.GetAllNodeInfo(messages.GetAllNodeInfoRequest(), timeout=_PROBE_S)
    ids = (n.node_id.hex() for n in nodes.node_info_list if n.state == states.ALIVE)
    return alive.ray_version, frozenset(ids)


def _cluster_here(address: ClusterAddress) -> ClusterAddress:
    """The cluster that `auto` means: one that runs on this machine, with the token it has here."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    services = _private("services")
    services.find_gcs_addresses.cache_clear()
    try:
        found = services.canonicalize_bootstrap_address(AUTO)
    except ConnectionError:
        raise InputError(
            f"{address}, and no Ray cluster runs on this machine: give --address HOST:PORT, start"
            " one with `ray start --head`, or leave it out for Ray on this machine"
        ) from None
    tokens = _private("authentication.authentication_token_setup")
    tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return ClusterAddress(f"{address.source} auto", found)


def _private(module: str) -> ModuleType:
    """A module of Ray that promises nothing."""
    return importlib.import_module(f"ray._private.{module}")


def _unfit(address: ClusterAddress, code: grpc.StatusCode) -> str:
    """Why a server is not a cluster that can be joined, and what to do."""
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return f"a cluster that refuses this process without its token: {_TOKEN}"
    who = "a gRPC server answers, as Ray Client's is on 10001,"
    if code != grpc.StatusCode.UNIMPLEMENTED:
        who = who_answers(address)
    return (
        f"where {who} and no Ray cluster: give its GCS, on port 6379 unless it was started with"
        " another"
    )


def _cluster_crew(
    config: GenerateConfig, storage: Storage, spec: WorkerSpec, stop: StopSignals
) -> _Crew:
    """Workers on a cluster, whose nodes may come and go while the job runs."""
    machines, node_types = _machines(), _node_types()
    shape = worker_shape(
        [*machines, *(node_types or ())],
        device=config.device,
        threads_per_worker=spec.threads,
    )
    if node_types is not None:
        require_fit(machines, node_types, shape)
    limit = _autoscaler_limit()
    room = num_slots(machines, shape)
    if config.workers is not None and config.workers > room:
        say(
            f"warning: --workers is {config.workers}, the cluster has room for {room} now:"
            " the others start when nodes join"
        )
    if storage.is_local and len(machines) > 1:
        say(f"warning: {storage} must be one shared folder on all {len(machines)} nodes")

    def target() -> int:
        return config.workers or max(num_slots(_machines(), shape), num_slots([limit], shape), 1)

    make = RayCrew(spec, shape, target, stop.is_set, is_shared=True).make
    return _Crew(make, worker_room(machines, shape, config.workers))


class RayWorker(Worker):
    """The worker as a Ray actor: it knows its node, and stops when its task is cancelled."""

    def introduce(self) -> tuple[WorkerInfo, str]:
        """Return who this is and the id of its node; answered once the model is loaded."""
        return self.info, ray.get_runtime_context().get_node_id()

    def make(self, shard_id: int, attempt: int) -> Iterator[Progress | ShardDone]:
        """Stream one shard's progress."""
        context = ray.get_runtime_context()
        yield from self.run_shard(shard_id, attempt, should_stop=context.is_canceled)


@dataclass
class _Hired:
    """One live actor: loading until it has introduced itself, then idle or making a shard."""

    actor: Any
    introduction: Any
    info: WorkerInfo | None = None
    node_id: str = ""
    stream: Any = None
    assignment: Assignment | None = None

    @property
    def is_idle(self) -> bool:
        """Ready for a shard."""
        return self.info is not None and self.stream is None

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

    spec: WorkerSpec
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
        try:
            while not run.queue.finished and not self.should_stop():
                self._look_at_nodes(run)
                self._staff(run)
                self._listen(run, _WAIT_S)
                waited_s = time.monotonic() - waiting_since_s
                if any(worker.info for worker in self._hired):
                    patience_s, waiting_since_s = _PATIENCE_S, time.monotonic()
                elif waited_s > patience_s and (reason := self._reason_to_wait(waited_s)):
                    say(reason)
                    patience_s = waited_s + _REMIND_S
        finally:
            self._dismiss_all(run)

    def _reason_to_wait(self, waited_s: float) -> str | None:
        """Why there is no worker yet; None if that takes no longer than it may."""
        machines = _machines()
        if self.is_shared and not num_slots(machines, self.shape):
            return f"waiting for a node with {self.shape.each} to join: no node has it now"
        if self.is_shared and not any(_is_placed(worker.actor) for worker in self._hired):
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
        self._draining = _draining_nodes()
        if self._charges:
            alive = _alive_nodes()
            for charge in self._charges:
                if charge.node_id not in alive:
                    run.refund(charge.shard_id, "its worker had died with its node")
            self._charges = [c for c in self._charges if c.node_id in alive and c.until_s > now_s]

    def _staff(self, run: ShardRun) -> None:
        """Dismiss idle workers of draining nodes, hire up to the wanted number, hand out shards."""
        for worker in [w for w in self._hired if w.is_idle and w.node_id in self._draining]:
            self._dismiss(worker)
        for _ in range(min(self._wanted, run.queue.num_open) - len(self._hired)):
            self._hired.append(self._hire())
        for worker in [w for w in self._hired if w.is_idle]:
            assignment = run.queue.take()
            if assignment is None:
                break
            worker.assignment = assignment
            worker.stream = worker.actor.make.remote(assignment.shard_id, assignment.attempt)

    def _hire(self) -> _Hired:
        options = {"num_cpus": self.shape.num_cpus, "num_gpus": self.shape.num_gpus}
        actor_class: Any = ray.remote(RayWorker)
        retries = {"max_restarts": 0, "max_task_retries": 0}
        actor = actor_class.options(**options, **retries).remote(self.spec)
        return _Hired(actor, actor.introduce.remote())

    def _listen(self, run: ShardRun, timeout_s: float) -> None:
        """Take in whatever workers say within the time."""
        sources = {w.stream or w.introduction: w for w in self._hired if w.stream or not w.info}
        if not sources:
            return
        ready, _ = ray.wait(list(sources), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(list(sources), num_returns=len(sources), timeout=0)
        for source in ready:
            self._hear(sources[source], run)

    def _hear(self, worker: _Hired, run: ShardRun) -> None:
        """Take in one thing a worker says: its introduction, progress, a result, or its end."""
        try:
            if worker.stream is None:
                worker.info, worker.node_id = ray.get(worker.introduction)
                self._welcome(worker.info, run)
                return
            event = ray.get(next(worker.stream))
        except StopIteration:
            raise AssertionError("a worker ended its stream without a result") from None
        except ray_errors.RayError as error:
            self._dismiss(worker)
            if worker.assignment is None:
                self._failed_to_load(worker, error)
            else:
                self._lost_or_failed(worker, worker.assignment, error, run)
            return
        run.heard(event)
        if isinstance(event, ShardDone):
            worker.stream = worker.assignment = None

    def _welcome(self, info: WorkerInfo, run: ShardRun) -> None:
        self._load_failures = 0
        run.worker_ready(info)
        if self.shape.num_gpus and info.device == "cpu":
            say(f"warning: {info.name} holds a GPU that torch cannot use: it runs on its CPU")

    def _failed_to_load(self, worker: _Hired, error: ray_errors.RayError) -> None:
        if cause_of(error) == "node":
            return
        self._load_failures += 1
        if self._load_failures >= _MAX_LOAD_FAILURES:
            raise JobStopped(
                f"the model could not be loaded by {self._load_failures} workers in a row:"
                f" {reason_of(error)}"
            ) from error

    def _lost_or_failed(
        self, worker: _Hired, assignment: Assignment, error: ray_errors.RayError, run: ShardRun
    ) -> None:
        cause = cause_of(error)
        if cause == "node" or (cause == "worker" and worker.node_id not in _alive_nodes()):
            run.lost(assignment, f"{worker.name} is gone with its node")
            return
        is_charged = run.failed(
            assignment,
            reason_of(error),
            plain(error),
            worker.name,
            storage_error=storage_error_of(error),
        )
        if is_charged and cause == "worker":
            until_s = time.monotonic() + _NODE_GRACE_S
            self._charges.append(_Charge(assignment.shard_id, worker.node_id, until_s))

    def _dismiss(self, worker: _Hired) -> None:
        """Let go of an actor for good; a failed process is never used again."""
        self._hired.remove(worker)
        with contextlib.suppress(ray_errors.RayError):
            ray.kill(worker.actor, no_restart=True)

    def _dismiss_all(self, run: ShardRun) -> None:
        """End all workers: first ask those at work to leave their shard, then insist."""
        deadline_s = time.monotonic() + _STOP_GRACE_S
        for worker in self._hired:
            if worker.stream is not None:
                ray.cancel(worker.stream)
        while time.monotonic() < deadline_s and any(w.stream for w in self._hired):
            self._await_end(run)
        closing = [w.actor.close.remote() for w in self._hired if w.is_idle]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_GRACE_S)
        for worker in list(self._hired):
            self._dismiss(worker)

    def _await_end(self, run: ShardRun) -> None:
        """Hear cancelled workers out: a shard that was being published may still be committed."""
        streams: dict[Any, _Hired] = {w.stream: w for w in self._hired if w.stream}
        ready, _ = ray.wait(list(streams), num_returns=1, timeout=_WAIT_S)
        for worker in [streams[stream] for stream in ready]:
            try:
                event = ray.get(next(worker.stream))
            except (StopIteration, ray_errors.RayError):
                worker.stream = None
                continue
            run.heard(event)
            if isinstance(event, ShardDone):
                worker.stream = worker.assignment = None


def cause_of(error: ray_errors.RayError) -> Literal["exception", "memory", "node", "worker"]:
    """What ended a task: its own code, the memory monitor, its node, or its process.

    A worker that nobody can reach is taken for lost with its node: of a process that dies alone,
    its node tells at once, and Ray needs a quarter of a minute to call a node dead.
    """
    if isinstance(error, ray_errors.RayTaskError):
        return "exception"
    if isinstance(error, ray_errors.OutOfMemoryError):
        return "memory"
    if isinstance(error, ray_errors.NodeDiedError | ray_errors.ActorUnavailableError):
        return "node"
    if getattr(error, "preempted", False):
        return "node"
    if isinstance(error, ray_errors.RayActorError) and "node has died" in str(error):
        return "node"
    return "worker"


def reason_of(error: ray_errors.RayError) -> str:
    """Return one line: the error that the worker raised, or what became of its process."""
    is_traceback = isinstance(error, ray_errors.RayTaskError) or getattr(
        error, "actor_init_failed", False
    )
    lines = [line.strip() for line in plain(error).splitlines() if line.strip()]
    if lines and is_traceback:
        return lines[-1]
    if cause_of(error) == "worker":
        return "its process died: it crashed, was killed, or ran out of memory"
    return one_line(error)


def storage_error_of(error: ray_errors.RayError) -> OSError | None:
    """The error of a file that a worker could not read or write, None for any other."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, OSError) else None


def plain(error: BaseException) -> str:
    """Return the error's text without the colours that Ray adds for terminals."""
    return _COLOURS.sub("", str(error))


def _this_machine(*, with_gpus: bool) -> Machine:
    num_gpus = _local_gpus() if with_gpus else 0
    return Machine(
        available_cores(), num_gpus, available_memory(), gpu_memory() if num_gpus else None
    )


def _local_gpus() -> int:
    """GPUs that Ray would find here, without starting it; 0 if Ray's detection has moved."""
    try:
        from ray._private.accelerators import get_accelerator_manager_for_resource

        manager: Any = get_accelerator_manager_for_resource("GPU")
        visible = manager.get_current_process_visible_accelerator_ids()
        found = int(manager.get_current_node_num_accelerators())
    except Exception:
        return 0
    return found if visible is None else min(found, len(visible))


def _machines() -> list[Machine]:
    """The cluster's nodes that are alive and not draining."""
    draining = _draining_nodes()
    return [
        Machine(
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            memory=int(sum(node["Resources"].get(name, 0) for name in _MEMORY_RESOURCES)) or None,
        )
        for node in _nodes()
        if node["Alive"] and node["NodeID"] not in draining
    ]


def _is_placed(actor: Any) -> bool:
    """Whether an actor has a process, where it may still load its model. Private to Ray."""
    try:
        return bool(ray._private.state.actors(actor._actor_id.hex())["Pid"])
    except Exception:
        return True


def _alive_nodes() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in _nodes() if node["Alive"])


def _nodes() -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", ray.nodes())  # type: ignore[no-untyped-call]


def _draining_nodes() -> frozenset[str]:
    """Nodes about to go away. Private to Ray, used by its own libraries: absent means none."""
    try:
        return frozenset(ray._private.state.state.get_draining_nodes())
    except Exception:
        return frozenset()


def _node_types() -> list[Machine] | None:
    """Nodes that an autoscaler may start: none without one, None if it does not tell which.

    Private to Ray: where that has moved nobody knows.
    """
    try:
        config = ray._private.state.state.get_cluster_config()
        groups = [] if config is None else config.node_group_configs
        if groups:
            kinds = [group.resources for group in groups if group.max_count]
            return [Machine(kind.get("CPU", 0), kind.get("GPU", 0)) for kind in kinds]
        return None if _has_autoscaler() else []
    except Exception:
        return None


def _has_autoscaler() -> bool:
    """Whether something starts nodes when they are asked for: either version of the autoscaler."""
    from ray.experimental.internal_kv import _internal_kv_get

    status = importlib.import_module("ray.core.generated.autoscaler_pb2").GetClusterStatusReply()
    gcs = _private("worker").global_worker.gcs_client
    status.ParseFromString(gcs.get_cluster_status(timeout_s=_PROBE_S))
    if status.autoscaling_state.autoscaler_state_version:
        return True
    return _starts_nodes(_internal_kv_get("__autoscaling_status"))


def _starts_nodes(monitor_status: bytes | None) -> bool:
    """Whether the head's monitor reports node types; else every node is a type of its own."""
    if monitor_status is None:
        return False
    report = json.loads(monitor_status).get("autoscaler_report") or {}
    node_types = {*(report.get("active_nodes") or {}), *(report.get("pending_launches") or {})}
    return not all(re.fullmatch(r"node_[0-9a-f]{32,}", name) for name in node_types)


def _autoscaler_limit() -> Machine:
    """The most the cluster may grow to; nothing if it does not grow. Private to Ray."""
    try:
        most = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    except Exception:
        most = {}
    return Machine(most.get("CPU", 0) or 0, most.get("GPU", 0) or 0)
