"""The numbers of a run as metrics of Ray, for Prometheus: `ray_depthvar_...` at every node.

The driver tells them all, so that a worker's death takes none away. Times are counters too: Ray
keeps no exact sum of a histogram, only the counts of its buckets.
"""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge

from pipeline.run.progress import Tally

_PAUSE_S = 0.5  # whoever reads them comes every few seconds, and telling takes Ray a while
_DATASET, _STAGE, _STATE = "dataset", "stage", "state"
_COUNTERS = {
    "depthvar_images": "Images committed",
    "depthvar_shards": "Shards committed",
    "depthvar_bytes": "Bytes of committed tars and Parquet files",
    "depthvar_sampled_images": "Images sampled, those of lost shards included",
    "depthvar_flops": "Operations of the sampled images, transformer and decoder",
    "depthvar_retries": "Shards begun again",
    "depthvar_stage_seconds": "Seconds that committed shards took by stage, of all threads",
}
_GAUGES = {
    "depthvar_images_left": "Images still to be made",
    "depthvar_queue_shards": "Shards waiting for a worker, running, or set aside",
    "depthvar_workers": "Workers ready, or starting",
}
_OWN_TAG = {
    "depthvar_stage_seconds": _STAGE,
    "depthvar_queue_shards": _STATE,
    "depthvar_workers": _STATE,
}
PROMETHEUS_NAMES = frozenset(
    {*(f"ray_{name}_total" for name in _COUNTERS), *(f"ray_{name}" for name in _GAUGES)}
)
"""What Prometheus calls them."""


class RayMetrics:
    """Tells Ray the tally of a dataset's run; made where Ray is connected."""

    def __init__(self, dataset: str) -> None:
        def tags(name: str) -> tuple[str, ...]:
            return (_DATASET, *((_OWN_TAG[name],) if name in _OWN_TAG else ()))

        self._dataset = dataset
        self._counters = {n: Counter(n, what, tags(n)) for n, what in _COUNTERS.items()}
        self._gauges = {n: Gauge(n, what, tags(n)) for n, what in _GAUGES.items()}
        self._told: dict[tuple[str, str], float] = {}
        self._next_s = 0.0

    def show(self, tally: Tally) -> None:
        """Tell what has changed since the last time, twice a second and where nobody works."""
        now_s = time.monotonic()
        if now_s < self._next_s and tally.workers_ready:
            return
        self._next_s = now_s + _PAUSE_S
        compute, queue = tally.plan.compute, tally.queue
        flops = compute.transformer_flops + compute.decoder_flops
        self._count("depthvar_images", tally.images)
        self._count("depthvar_shards", tally.shards)
        self._count("depthvar_bytes", tally.num_bytes)
        self._count("depthvar_sampled_images", tally.sampled)
        self._count("depthvar_flops", tally.sampled * flops)
        self._count("depthvar_retries", queue.num_retries)
        for stage, seconds in tally.seconds.items():
            self._count("depthvar_stage_seconds", seconds, stage)
        self._set("depthvar_images_left", tally.images_left)
        self._set("depthvar_queue_shards", queue.num_waiting, "waiting")
        self._set("depthvar_queue_shards", queue.num_running, "running")
        self._set("depthvar_queue_shards", len(queue.set_aside), "set aside")
        self._set("depthvar_workers", tally.workers_ready, "ready")
        self._set("depthvar_workers", tally.workers_starting, "starting")

    def _count(self, name: str, total: float, own: str = "") -> None:
        more = total - self._told.get((name, own), 0.0)
        if more > 0:
            self._counters[name].inc(more, self._tags(name, own))
            self._told[name, own] = total

    def _set(self, name: str, value: float, own: str = "") -> None:
        self._gauges[name].set(value, self._tags(name, own))

    def _tags(self, name: str, own: str) -> dict[str, str]:
        return {_DATASET: self._dataset, **({_OWN_TAG[name]: own} if own else {})}
