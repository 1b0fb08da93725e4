"""The driver: hands shards to workers and answers for the result.

Ray Core only: one actor per GPU, or per share of the cores. What is done is read from the output,
never remembered.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial

from depthvar.config import is_model_path
from depthvar.errors import InputError
from pipeline.dataset.contact_sheet import write_contact_sheet
from pipeline.faults import reach
from pipeline.request.generation import GenerateConfig
from pipeline.request.job import plan_job
from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import check_output, open_plan
from pipeline.run.address import cluster_address
from pipeline.run.cluster import (
    autoscaler_limit,
    cluster_machines,
    found_cluster,
    known_node_types,
    ray_session,
    this_machine,
)
from pipeline.run.console import (
    class_line,
    dataset_summary,
    missing_summary,
    run_summary,
    say,
)
from pipeline.run.encoding import missing_prompts
from pipeline.run.forecast import Speed
from pipeline.run.in_process import encode_in_process, run_in_process
from pipeline.run.keeping import SummaryKeeper
from pipeline.run.ledger import JobStopped, ShardRun, StopSignals, one_line, set_aside_earlier
from pipeline.run.left_open import Room, memory_warning, settled
from pipeline.run.progress import ProgressDisplay, PromptTally
from pipeline.run.ray_crew import RayCrew, encode_on_a_worker, on_a_worker
from pipeline.run.schedule import (
    Machine,
    ShardQueue,
    WorkerShape,
    num_slots,
    require_fit,
    require_slots,
    worker_room,
    worker_shape,
)
from pipeline.run.speed import measure_speed
from pipeline.run.worker import LOAD_SAMPLER, Workplace, require_device
from pipeline.shards.claims import sweep_claims
from pipeline.shards.committed import Dataset, ShardSummary, committed_shards, keep_summaries
from pipeline.shards.indexes import write_indexes
from pipeline.shards.manifest import CARD_NAME, CONTACT_SHEET_NAME, LEDGER_NAME
from pipeline.shards.samples import ShardError
from pipeline.storage import Storage

_SETTLING_S = 60.0  # a publication takes seconds, to a slow store up to a minute

Make = Callable[[ShardRun], None]
Encode = Callable[[JobPlan], Generator[int]]


def generate(config: GenerateConfig, *, sampler_factory: str = LOAD_SAMPLER) -> int:
    """Make every missing shard of a dataset; 0 if all planned shards are committed, else 1.

    `sampler_factory` replaces the sampler (`module:function`, see `Workplace`). Raises
    `InputError` before anything is written for a request that cannot work.
    """
    notes: list[str] = []
    plan, model = plan_job(config, note=notes.append)
    storage = Storage.open(config.out)
    stored = check_output(storage, plan, extend=config.extend, left_open=config.left_open)
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
    with StopSignals() as stop:
        with _workers(config, storage, sampler_factory) as workers:
            crew = _crew(config, storage, workers, stop)
            stop.install()
            if stored is None:
                plan, told = settled(plan, model, workers.room, config.left_open)
                notes += told
            if warning := memory_warning(plan, model, workers.room, is_stored=stored is not None):
                say(f"warning: {warning}")
            plan = open_plan(storage, plan, left_open=config.left_open)
            say("\n".join([class_line(plan), *(f"note: {note}" for note in notes)]))
            run = None
            with crew.session():
                problem = _encode(crew.encode, plan, workers.place.out, stop)
                if problem is None and not stop.is_set():
                    with ProgressDisplay() as display, SummaryKeeper(storage, plan) as keeper:
                        views = [display.show, keeper.show]
                        run = ShardRun(storage, plan, queue, done.values(), views)
                        del done  # of many shards it is large
                        problem = _work(crew.make, run)
        stopped = stop.is_set()
        return _conclude(
            config, storage, plan, run, problem, interrupted=stopped, given_up=given_up
        )


def _workplace(
    config: GenerateConfig, storage: Storage, sampler_factory: str, shape: WorkerShape
) -> Workplace:
    """What workers of a shape are told, with paths that do not depend on the current folder."""
    weights = config.weights
    if weights is None and is_model_path(config.model):
        weights = config.model
    return Workplace(
        out=storage.root if storage.is_local else storage.uri,
        weights=_absolute(weights),
        text_encoder=_absolute(config.text_encoder),
        text_states=_absolute(config.text_states),
        scratch=None if config.scratch is None else os.path.abspath(config.scratch),
        device=config.device,
        kernels=config.kernels,
        threads=config.threads_per_worker,
        encode_threads=config.encode_threads or max(1, shape.num_cpus),
        sampler_factory=sampler_factory,
    )


def _absolute(place: str | os.PathLike[str] | None) -> str | None:
    """A path that is there, whatever the current folder; a URI or a repository as it is."""
    if place is None:
        return None
    return os.path.abspath(place) if os.path.exists(place) else os.fspath(place)


@dataclass(frozen=True)
class Workers:
    """The workers that a request can have, here or on the cluster that it joins.

    `shape` and `room` are of each of them, `slots` as many as fit at once now, `number` as many as
    are asked for or fit; `place` is what they are told.
    """

    machines: list[Machine]
    shape: WorkerShape
    slots: int
    number: int
    room: Room
    place: Workplace
    is_shared: bool


@contextlib.contextmanager
def _workers(config: GenerateConfig, storage: Storage, sampler_factory: str) -> Iterator[Workers]:
    """Find out who can work; a cluster is joined meanwhile, Ray on this machine is not started.

    Raises `InputError` for more workers than this machine has room for, for those that fit nowhere,
    and for a cluster that cannot be joined.
    """
    address = None if config.workers == 0 else cluster_address(config.address, os.environ)
    with contextlib.ExitStack() as session:
        machines: list[Machine]
        node_types: list[Machine] | None = None
        if address is None:
            machines = [this_machine(with_gpus=config.device != "cpu")]
        else:
            session.enter_context(ray_session({"address": found_cluster(address).text}))
            # A batch size that is given is the user's business: no node is asked what it can hold.
            asks_gpus = config.batch_size is None and config.device != "cpu"
            machines, node_types = cluster_machines(asks_gpus=asks_gpus), known_node_types()
        shape = worker_shape(config, [*machines, *(node_types or ())])
        if config.workers == 0:
            shape = replace(shape, num_cpus=int(machines[0].num_cpus))
        slots = num_slots(machines, shape)
        if address is None:
            require_slots(config.workers or None, slots, shape)
            require_device(config.device, config.kernels)
        elif node_types is not None:
            require_fit(machines, node_types, shape)
        number = 1 if config.workers == 0 else config.workers or max(slots, 1)
        room = Room.of(worker_room(machines, shape, number), shape, config)
        place = _workplace(config, storage, sampler_factory, shape)
        yield Workers(machines, shape, slots, number, room, place, is_shared=address is not None)


@dataclass(frozen=True)
class _Crew:
    """Who makes the shards and encodes the prompts before, both within `session`."""

    make: Make
    encode: Encode
    session: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def _encode(encode: Encode, plan: JobPlan, out: str, stop: StopSignals) -> str | None:
    """Have the prompts encoded whose states are missing; the reason if that cannot be."""
    missing = missing_prompts(plan, out)
    if not missing:
        return None
    try:
        tally = PromptTally(len(missing))
        with ProgressDisplay() as display, contextlib.closing(encode(plan)) as encoded:
            display.show(tally)
            for num_prompts in encoded:
                tally.done += num_prompts
                display.show(tally)
                if stop.is_set():
                    break
    except JobStopped as error:
        return f"the prompts cannot be encoded: {error}"
    return None


def _work(make: Make, run: ShardRun) -> str | None:
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
    done = keep_summaries(storage, plan)
    if problem is None and not interrupted:
        done = _await_other_jobs(storage, plan, done, set_aside)
    is_complete = len(done) == plan.num_shards
    if run is not None and run.tally.images:
        print(run_summary(run.tally.images, run.making_s, run.loading_s, run.workers))
    print(dataset_summary(plan, done, str(storage)))
    if is_complete:
        reach("indexes-wanted")
        if write_indexes(storage, plan, done):
            say(f"kept {CARD_NAME}, which was edited: delete it to have it written anew")
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
        too_large_batch=plan.batch_size if is_memory_short else None,
    )
    say(text)
    return 1


def _await_other_jobs(
    storage: Storage, plan: JobPlan, done: dict[int, ShardSummary], set_aside: Collection[int]
) -> dict[int, ShardSummary]:
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


def _crew(config: GenerateConfig, storage: Storage, workers: Workers, stop: StopSignals) -> _Crew:
    """Those who make the shards: this process, or Ray's workers here or on the cluster's nodes."""
    place, shape, machines = workers.place, workers.shape, workers.machines
    if config.workers == 0:
        return _Crew(
            lambda run: run_in_process(place, run, stop.is_set),
            lambda plan: encode_in_process(plan, place),
        )
    encode = _encoder(place, shape, stop)
    if workers.is_shared:
        _warn_of_cluster(config, storage, workers)
        limit = autoscaler_limit()

        def target() -> int:
            return config.workers or max(
                num_slots(cluster_machines(), shape), num_slots([limit], shape), 1
            )

        return _Crew(RayCrew(place, shape, target, stop.is_set, is_shared=True).make, encode)

    @contextlib.contextmanager
    def session() -> Iterator[None]:
        with ray_session({"address": "local", "num_cpus": int(machines[0].num_cpus)}):
            stop.install()
            yield

    make = RayCrew(place, shape, lambda: workers.number, stop.is_set).make
    return _Crew(make, encode, session)


def _warn_of_cluster(config: GenerateConfig, storage: Storage, workers: Workers) -> None:
    if config.workers is not None and config.workers > workers.slots:
        say(
            f"warning: --workers is {config.workers}, the cluster has room for {workers.slots} now:"
            " the others start when nodes join"
        )
    if storage.is_local and len(workers.machines) > 1:
        num_nodes = len(workers.machines)
        say(f"warning: {storage} must be one shared folder on all {num_nodes} nodes")


def _encoder(place: Workplace, shape: WorkerShape, stop: StopSignals) -> Encode:
    """Who encodes where Ray has the workers: a file of states lies where the driver is."""
    if place.text_states is not None:
        return lambda plan: encode_in_process(plan, place)
    return lambda plan: encode_on_a_worker(plan, place, shape, stop.is_set)


@dataclass(frozen=True)
class Trial:
    """How fast one of the workers is that a request would have, tried out on its plan."""

    plan: JobPlan
    speed: Speed
    workers: Workers


def try_out(
    config: GenerateConfig,
    planned: Callable[[Room], JobPlan],
    *,
    sampler_factory: str = LOAD_SAMPLER,
) -> Trial:
    """Measure a worker as `generate` would have it, here or on a node of the cluster.

    `planned` gives the plan, told the room of a worker before any is loaded. Raises `InputError`
    for workers that do not fit and for weights that are not those planned, `JobStopped` where no
    batch can be made.
    """
    with _workers(config, Storage.open(config.out), sampler_factory) as workers:
        shape = workers.shape
        plan = planned(workers.room)
        say(f"timing a few batches on a worker with {shape.each}")
        measure = partial(measure_speed, plan, workers.place)
        try:
            speed = on_a_worker(measure, shape) if workers.is_shared else measure()
        except (InputError, JobStopped):
            raise
        except Exception as error:
            raise JobStopped(f"no batch can be made: {one_line(error)}") from error
    return Trial(plan, speed, workers)
