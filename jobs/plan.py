"""Show what `depthvar generate` with the same flags would make and cost. Writes nothing there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from jobs._entry import EXIT_DONE, EXIT_INCOMPLETE, run_job
from pipeline.request.flags import load_config
from pipeline.request.generation import PlanConfig
from pipeline.request.job import UNREAD_WEIGHTS, plan_job
from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import check_output, read_plan
from pipeline.run.address import cluster_address
from pipeline.run.console import depth_plan, say
from pipeline.run.forecast import plan_report, plan_warnings, speed_report
from pipeline.run.left_open import Room, memory_warning, settled
from pipeline.run.schedule import (
    Machine,
    available_cores,
    available_memory,
    gpu_memories,
    num_slots,
    worker_room,
    worker_shape,
)
from pipeline.shards.committed import committed_shards
from pipeline.storage import Storage

if TYPE_CHECKING:
    from pipeline.run.driver import Trial


def main(argv: Sequence[str] | None = None, *, sampler_factory: str | None = None) -> int:
    """Print the dry run; exit code 0, 1 where no batch could be timed.

    `sampler_factory` as of `Workplace`.
    """
    config = load_config(PlanConfig, argv, prog="depthvar plan", description=__doc__ or "")
    notes: list[str] = []
    plan, model = plan_job(config, note=notes.append, fetches=config.calibrate)
    storage = Storage.open(config.out)
    if there := None if config.calibrate else read_plan(storage):
        plan = _as_read(plan, there)
    stored = check_output(storage, plan, extend=config.extend, left_open=config.left_open)
    records = {} if stored is None else committed_shards(storage, stored)
    wanted = stored or plan

    def planned(room: Room) -> JobPlan:
        """The plan for workers with this room; it is shown."""
        plan, told = settled(wanted, model, room, config.left_open if stored is None else ())
        print(plan_report(plan, model, depth_plan(plan, model), records, where=str(storage)))
        for note in (*notes, *told):
            print(f"note: {note}")
        return plan

    if config.calibrate and len(records) < wanted.num_shards:
        trial = _try_out(config, planned, sampler_factory)
        if trial is None:
            return EXIT_INCOMPLETE
        plan, workers, room = trial.plan, trial.workers.number, trial.workers.room
        lines = speed_report(
            plan,
            trial.speed,
            trial.workers.shape,
            records,
            encoders=trial.workers.place.encode_threads,
            workers=workers,
            price_per_gpu_hour=config.price_per_gpu_hour,
            now=datetime.now(),
        )
        print("\n".join(["", *lines]))
    else:
        workers, room = _workers_here(config)
        plan = planned(room)
    warnings = plan_warnings(plan, workers)
    if warning := memory_warning(plan, model, room, is_stored=stored is not None):
        warnings.append(warning)
    for warning in warnings:
        print(f"warning: {warning}")
    return EXIT_DONE


def _as_read(plan: JobPlan, there: JobPlan) -> JobPlan:
    """A plan as if the files had been read that another one was made from."""
    if plan.weights_sha256 == UNREAD_WEIGHTS:
        plan = replace(plan, weights_sha256=there.weights_sha256)
    if plan.text_encoder_sha256 == UNREAD_WEIGHTS:
        plan = replace(plan, text_encoder_sha256=there.text_encoder_sha256)
    return plan


def _try_out(
    config: PlanConfig, planned: Callable[[Room], JobPlan], sampler_factory: str | None
) -> Trial | None:
    """A worker timed; None, with the reason said, where it can make no batch."""
    from pipeline.run.driver import try_out  # brings torch and Ray
    from pipeline.run.ledger import JobStopped
    from pipeline.run.worker import LOAD_SAMPLER

    try:
        return try_out(config, planned, sampler_factory=sampler_factory or LOAD_SAMPLER)
    except JobStopped as error:
        say(f"error: {error}")
        return None


def _workers_here(config: PlanConfig) -> tuple[int | None, Room]:
    """How many workers this machine would have, None where nobody knows, and the room of each."""
    if config.workers != 0 and cluster_address(config.address, os.environ) is not None:
        return config.workers, Room(None)
    gpus = gpu_memories() if config.device != "cpu" else ()
    machine = Machine(available_cores(), len(gpus), available_memory(), min(gpus, default=None))
    shape = worker_shape(config, [machine])
    workers = 1 if config.workers == 0 else config.workers or num_slots([machine], shape) or None
    return workers, Room.of(worker_room([machine], shape, workers), shape, config)


if __name__ == "__main__":
    run_job(main)
