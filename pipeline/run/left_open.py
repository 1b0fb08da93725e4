"""What a request leaves open and its workers decide, with the plan: precision and batch size."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from depthvar.config import AnyModel
from depthvar.memory import MemoryNeed, largest_batch, memory_need
from depthvar.settings import records
from pipeline.request.generation import GenerateConfig, Precision
from pipeline.request.job_plan import JobPlan
from pipeline.run.console import depth_plan, human_bytes
from pipeline.run.schedule import WorkerShape


@dataclass(frozen=True)
class Room:
    """What one worker has for a batch: bytes, None where nobody knows.

    `records`: whether it records its batches. `is_gpu`: whether they are made on a GPU.
    """

    num_bytes: int | None
    records: bool = False
    is_gpu: bool = False

    @staticmethod
    def of(num_bytes: int | None, shape: WorkerShape, config: GenerateConfig) -> Room:
        """The room of a worker of a shape that has so many bytes."""
        is_gpu = bool(shape.num_gpus)
        return Room(num_bytes, records(config.kernels, on_gpu=is_gpu), is_gpu)


def settled(
    plan: JobPlan, model: AnyModel, room: Room, left_open: Collection[str]
) -> tuple[JobPlan, list[str]]:
    """The plan with what a request left open decided for workers with this room; what to say."""
    notes: list[str] = []
    if "precision" in left_open and room.is_gpu:
        precision: Precision = "bfloat16" if model.is_text else "float16"
        plan = replace(plan, precision=precision)
        notes.append(f"precision {precision}, the default on GPUs: --precision sets another")
    if "batch_size" in left_open:
        plan, told = fitted(plan, model, room)
        notes += [told] if told else []
    return plan, notes


def fitted(plan: JobPlan, model: AnyModel, room: Room) -> tuple[JobPlan, str | None]:
    """The plan with the largest batch up to its own that fits, and why it is no other.

    A batch of one image where none fits.
    """
    batch = plan.batch_size
    if room.num_bytes is None:
        return plan, (
            f"batch size {batch}: the memory of a worker is not known, --batch-size sets another"
        )
    at_most = min(batch, plan.samples_per_shard)
    need = _need(plan, model, at_most)
    peak = need.recorded_peak if room.records else need.peak
    if peak <= room.num_bytes:
        return plan, None
    fitting = _largest(plan, model, room.num_bytes, at_most, is_recorded=room.records) or 1
    recorded = " as recordings (--kernels plain makes none)" if room.records else ""
    return replace(plan, batch_size=fitting), (
        f"batch size {fitting}: {at_most} would need {human_bytes(peak)} of memory{recorded}, a"
        f" worker has {human_bytes(room.num_bytes)}"
    )


def memory_warning(
    plan: JobPlan, model: AnyModel, room: Room, *, is_stored: bool = False
) -> str | None:
    """What to change if a batch does not fit into the bytes a worker has; None where it fits.

    `is_stored`: the output holds the plan, whose batch size stays.
    """
    batch = min(plan.batch_size, plan.samples_per_shard)
    need = _need(plan, model, batch)
    if room.num_bytes is None or need.peak <= room.num_bytes:
        return None
    fitting = _largest(plan, model, room.num_bytes, batch)
    advice = f"--batch-size {fitting} fits" if fitting else "no batch size fits"
    has = human_bytes(room.num_bytes)
    needs = f"a worker needs about {human_bytes(need.peak)} of memory and has {has}"
    if is_stored:
        return (
            f"at the plan's batch size, {batch}, {needs}: go on where workers have more, fewer"
            " --workers on CPUs leave more for each; the plan keeps its batch size, for the last"
            f" bit of an image may depend on it: under another --out {advice}"
        )
    return (
        f"at --batch-size {batch} {needs}: {advice}, fewer --workers on CPUs leave more for each;"
        " the batch size is part of the plan, for the last bit of an image may depend on it: choose"
        " it before the first shard"
    )


def _need(plan: JobPlan, model: AnyModel, batch_size: int) -> MemoryNeed:
    streams, precision = plan.sampling.streams, plan.precision
    depth = depth_plan(plan, model)
    return memory_need(model, depth, batch_size=batch_size, streams=streams, precision=precision)


def _largest(
    plan: JobPlan, model: AnyModel, room: int, at_most: int, *, is_recorded: bool = False
) -> int:
    return largest_batch(
        model,
        depth_plan(plan, model),
        room,
        at_most=at_most,
        streams=plan.sampling.streams,
        precision=plan.precision,
        is_recorded=is_recorded,
    )
