"""Show what `depthvar generate` with the same flags would make and cost. Writes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from depthvar.memory import memory_need
from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import load_config
from pipeline.request.generation import GenerateConfig
from pipeline.request.job import plan_job
from pipeline.request.plan_file import check_output
from pipeline.run.console import depth_plan, human_bytes, memory_warning, plan_report
from pipeline.run.schedule import (
    Machine,
    available_cores,
    available_memory,
    gpu_memory,
    worker_room,
    worker_shape,
)
from pipeline.shards.manifest import committed_shards
from pipeline.storage import Storage


def main(argv: Sequence[str] | None = None) -> int:
    """Print the dry run; exit code 0."""
    config = load_config(GenerateConfig, argv, prog="depthvar plan", description=__doc__ or "")
    notes: list[str] = []
    plan, model = plan_job(config, note=notes.append)
    storage = Storage.open(config.out)
    stored = check_output(storage, plan, extend=config.extend)
    records = {} if stored is None else committed_shards(storage, stored)
    workers = config.workers
    if workers is None and config.address is None:
        workers = available_cores() // config.threads_per_worker
    plan = stored or plan
    depth = depth_plan(plan, model)
    print(plan_report(plan, depth, model.sides, records, where=str(storage), workers=workers))
    for note in notes:
        print(f"note: {note}")
    need = memory_need(
        model,
        depth,
        batch_size=plan.batch_size,
        streams=plan.sampling.streams,
        precision=plan.precision,
    )
    print(
        f"memory    {human_bytes(need.peak)} per worker at batch {config.batch_size}:"
        f" weights {human_bytes(need.weights)}, cache {human_bytes(need.cache)},"
        f" sampling {human_bytes(need.sampling)}, decoding {human_bytes(need.decoding)};"
        f" a CPU worker's process {human_bytes(need.process_peak)}"
    )
    gpu = gpu_memory() if config.device != "cpu" else None
    machine = Machine(available_cores(), 0 if gpu is None else 1, available_memory(), gpu)
    shape = worker_shape([machine], device=config.device, threads_per_worker=1, encode_threads=None)
    if config.address is None and (
        warning := memory_warning(plan, model, worker_room([machine], shape, workers or 1))
    ):
        print(f"warning: {warning}")
    return EXIT_DONE


if __name__ == "__main__":
    run_job(main)
