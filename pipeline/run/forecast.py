"""What `depthvar plan` says: what would be made, what it costs, and what may not be meant."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby

from depthvar.config import AnyModel
from depthvar.host.rate import rate_text
from depthvar.memory import memory_need
from depthvar.plan import DepthPlan
from pipeline.request.job import UNREAD_WEIGHTS
from pipeline.request.job_plan import JobPlan
from pipeline.run.console import class_line, compute_line, human_bytes
from pipeline.run.schedule import WorkerShape
from pipeline.shards.committed import ShardSummary

LOADER_WORKERS = 8
"""Readers that a training run has at least: PyTorch's `num_workers` times its ranks."""
PHOTOGRAPH_BYTES = {"png": 1.70, "jpg": 0.64, "webp": 1.35}
"""Bytes of a file per pixel: the mean of eight pieces of 256x256 of two photographs in RGB.

Single ones differ from it by up to half (tests/pipeline/run/test_forecast.py)."""
DIGIT_BYTES = {"png": 0.39, "jpg": 0.71, "webp": 0.31}
"""The same of the bundled model's digits of 32x32 in grey."""
_BLOCK = 512  # what tar rounds up to, and the size of its headers


@dataclass(frozen=True)
class Speed:
    """Wall seconds of a worker: to load its model, and of an image to make it and to write it.

    `making_s` is the transformer's and the decoder's on `device`, `writing_s` of one thread, from
    pixels to a shard that was read back. They were measured one after the other.
    """

    device: str
    threads: int
    num_images: int
    loading_s: float
    making_s: float
    writing_s: float

    def images_per_s(self, shape: WorkerShape, encoders: int) -> float:
        """Of a worker that writes with some threads while it samples.

        On CPUs both share the worker's own: what they take together is bound by these.
        """
        slowest_s = max(self.making_s, self.writing_s / encoders)
        if not shape.num_gpus:
            core_s = self.making_s * self.threads + self.writing_s
            slowest_s = max(slowest_s, core_s / max(1, shape.num_cpus))
        return 1 / slowest_s


def plan_report(
    plan: JobPlan,
    model: AnyModel,
    depth: DepthPlan,
    records: Mapping[int, ShardSummary],
    *,
    where: str,
) -> str:
    """The dry run: what would be made, what it costs and what is there already."""
    done = sum(record.num_samples for record in records.values())
    sampling, compute = plan.sampling, plan.compute
    height, width = plan.image_size
    is_unread = UNREAD_WEIGHTS in (plan.weights_sha256, plan.text_encoder_sha256)
    weights = _told(plan.weights_sha256)
    if plan.text_encoder_sha256 is not None:
        weights += f", text encoder {_told(plan.text_encoder_sha256)}"
    drawing = f"cfg {sampling.cfg:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}"
    images = f"{plan.num_samples:,} images of {plan.subjects_told}, {width}x{height}"
    sample_bytes, basis = _sample_bytes(plan, records)
    shard_bytes = human_bytes(sample_bytes * min(plan.samples_per_shard, plan.num_samples))
    identity = "not known before the weights are read" if is_unread else plan.fingerprint
    layers = f"{compute.token_layers:,} token-layers per image, {compute.full_token_layers:,}"
    size = f"{plan.num_shards:,} of {plan.samples_per_shard:,} images, about {shard_bytes} each"
    return "\n".join(
        [
            f"model     {plan.model}, weights {weights}, {plan.precision}",
            f"policy    {plan.policy.preset}, {drawing}, seed {plan.seed}",
            f"dataset   {images} {plan.image_format}",
            class_line(plan),
            f"shards    {size}",
            f"done      {done:,} images in {len(records):,} shards",
            f"bytes     about {human_bytes(sample_bytes * plan.num_samples)} of images, {basis}",
            f"compute   {compute_line(plan)}",
            f"layers    {layers} at full depth",
            f"memory    {_memory(plan, model, depth)}",
            f"where     {where}",
            f"identity  {identity}",
            "",
            f"depth     {depth_words(depth)}",
            depth_table(depth),
        ]
    )


def _told(sha256: str) -> str:
    """The beginning of a file's identity."""
    return "not read" if sha256 == UNREAD_WEIGHTS else sha256[:12]


def _memory(plan: JobPlan, model: AnyModel, depth: DepthPlan) -> str:
    need = memory_need(
        model,
        depth,
        batch_size=plan.batch_size,
        streams=plan.sampling.streams,
        precision=plan.precision,
    )
    return (
        f"{human_bytes(need.peak)} per worker at batch {plan.batch_size}:"
        f" weights {human_bytes(need.weights)}, cache {human_bytes(need.cache)},"
        f" sampling {human_bytes(need.sampling)}, decoding {human_bytes(need.decoding)};"
        f" a CPU worker's process {human_bytes(need.process_peak)}"
    )


def _sample_bytes(plan: JobPlan, records: Mapping[int, ShardSummary]) -> tuple[float, str]:
    """Bytes of a sample in its tar, and what that is known from."""
    done = sum(record.num_samples for record in records.values())
    if done:
        tar_bytes = sum(record.files.tar.size for record in records.values())
        return tar_bytes / done, "as in the shards that are committed"
    is_grey = plan.image_channels == 1
    per_pixel = (DIGIT_BYTES if is_grey else PHOTOGRAPH_BYTES)[plan.image_format]
    kind = "the bundled model's digits" if is_grey else "photographs of 256x256"
    if not plan.png_level:
        per_pixel, kind = float(plan.image_channels), "images that are not compressed"
    # A row of .json has two numbers for each scale, of about 12 characters.
    members: list[float] = [1] * len(plan.caption_suffixes)
    members += [
        320 + 24 * len(plan.compute.depth_per_scale),
        per_pixel * math.prod(plan.image_size),
    ]
    if plan.depth_map_grids:
        members.append(128 + sum(map(math.prod, plan.depth_map_grids)))
    in_tar = sum(_BLOCK * (1 + -(-size // _BLOCK)) for size in members)
    return in_tar, f"{per_pixel:g} bytes a pixel, measured on {kind}, until a shard is committed"


def depth_words(depth: DepthPlan) -> str:
    """Which scales run how deep, in a sentence."""
    last = depth.num_blocks

    def words(scale: int) -> str:
        if scale >= len(depth.scales):
            return "not sampled"
        depths, mean = depth.scales[scale].depths, depth.mean_depth_per_scale[scale]
        fewest, most = int(min(depths)), int(max(depths))
        if fewest == most:
            return f"all {last} blocks" if fewest == last else f"{fewest} of {last} blocks"
        return f"{mean:.3g} of {last} blocks in the mean, {fewest} to {most} by token"

    parts = []
    for text, run in groupby(range(len(depth.grids)), key=words):
        scales = list(run)
        first, final = scales[0], scales[-1]
        name = f"scale {first}" if first == final else f"scales {first}-{final}"
        ends = (depth.grids[scale] for scale in dict.fromkeys((first, final)))
        maps = " to ".join(f"{rows}x{columns}" for rows, columns in ends)
        parts.append(f"{name} ({maps} tokens) {text}")
    return "; ".join(parts)


def depth_table(depth: DepthPlan) -> str:
    """One row per scale: tokens, mean depth, and how many tokens how many blocks compute."""
    rows = [("scale", "grid", "tokens", "depth", "tokens x blocks")]
    for index, (grid, mean) in enumerate(zip(depth.grids, depth.mean_depth_per_scale, strict=True)):
        is_sampled = index < len(depth.scales)
        widths = Counter(int(k) for k in depth.scales[index].prefix) if is_sampled else {}
        work = ", ".join(f"{k} x {n}" for k, n in sorted(widths.items(), reverse=True))
        work = work or "not sampled"
        shape = "x".join(map(str, grid))
        rows.append((str(index), shape, str(math.prod(grid)), f"{mean:.2f}", work))
    widths_of = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths_of, strict=False)), row[4]])
        for row in rows
    )


def plan_warnings(plan: JobPlan, workers: int | None) -> list[str]:
    """What will work, but perhaps not as meant."""
    size, batch = plan.samples_per_shard, plan.batch_size
    warnings = []
    start, stop = plan.shard_range(plan.num_shards - 1)
    if stop - start < size and plan.num_shards > 1:
        warnings.append(
            f"the last shard holds {stop - start:,} images, the others {size:,}:"
            " choose --samples-per-shard that divides the total for equal shards"
        )
    if size % batch and size > batch:
        warnings.append(
            f"--batch-size {batch} does not divide --samples-per-shard {size}: every shard ends"
            f" with a batch of {size % batch}"
        )
    if batch > size:
        warnings.append(
            f"--batch-size {batch} is more than --samples-per-shard {size}: batches of {size}"
        )
    shards = f"{plan.num_shards} {'shard' if plan.num_shards == 1 else 'shards'}"
    if workers is not None and plan.num_shards < workers:
        warnings.append(
            f"{shards} for {workers} workers: {workers - plan.num_shards} of them stay idle;"
            " fewer --samples-per-shard make more shards"
        )
    if plan.num_shards < LOADER_WORKERS:
        warnings.append(
            f"{shards} for training: a loader worker wants one of its own, and a training run often"
            f" has {LOADER_WORKERS}; fewer --samples-per-shard make more shards"
        )
    return warnings


def speed_report(
    plan: JobPlan,
    speed: Speed,
    shape: WorkerShape,
    records: Mapping[int, ShardSummary],
    *,
    encoders: int,
    workers: int,
    price_per_gpu_hour: float | None,
    now: datetime,
) -> list[str]:
    """What the images that are missing take and cost, from the speed of one worker, and warnings.

    A GPU's hours are those in which it makes images: not those in which it waits for the last one.
    """
    left = plan.num_samples - sum(record.num_samples for record in records.values())
    rounds = -(-(plan.num_shards - len(records)) // workers)
    rate = speed.images_per_s(shape, encoders)
    hours = left / rate / 3600
    takes = timedelta(
        seconds=round(speed.loading_s + rounds * min(plan.samples_per_shard, left) / rate)
    )
    kind = "GPU hours" if shape.num_gpus else f"worker hours of {shape.each} each, no GPU"
    who = f"{workers} {'worker' if workers == 1 else 'workers'}"
    phases = f"{_ms(speed.making_s)} of sampling and {_ms(speed.writing_s)} of encoding and writing"
    until = f"{now + takes:%Y-%m-%d %H:%M}"
    lines = [
        f"speed     {rate_text(rate)} images/s of a worker with {shape.each} ({speed.device}):",
        f"          {phases} an image, from {speed.num_images:,} of them",
        f"time      {left:,} images left: {rate_text(hours)} {kind};",
        f"          {who}, ready after {speed.loading_s:.1f} s, take about {takes}, until {until}",
    ]
    if price_per_gpu_hour is not None and shape.num_gpus:
        price = hours * price_per_gpu_hour
        lines.append(f"cost      {price:,.2f} at {price_per_gpu_hour:g} a GPU hour")
    elif price_per_gpu_hour is not None:
        lines.append("cost      not known: no GPU was measured, and the price is of GPU hours")
    makes, writes = 1 / speed.making_s, encoders / speed.writing_s
    if writes < makes:
        wanted = -(-speed.writing_s // speed.making_s)
        threads = f"{encoders} encode {'thread writes' if encoders == 1 else 'threads write'}"
        lines.append(
            f"warning: {threads} {rate_text(writes)} images/s, the sampler makes"
            f" {rate_text(makes)}: --encode-threads {wanted:.0f} keep up, and --image-format jpg or"
            " --png-level 1 take less"
        )
    return lines


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
