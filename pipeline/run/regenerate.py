"""Sampling stored images again: is what is stored what this environment makes?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthvar.errors import InputError
from depthvar.settings import Kernels
from pipeline.dataset.loader import naming_damage
from pipeline.request.generation import Device
from pipeline.request.job_plan import JobPlan
from pipeline.run.worker import LOAD_SAMPLER, Resampler, Workplace, require_device
from pipeline.shards.committed import ShardSummary
from pipeline.shards.manifest import parquet_name, tar_name
from pipeline.shards.samples import decode_image, pixel_hash, read_parquet, read_tar
from pipeline.shards.schema import schema_of
from pipeline.storage import Storage


@dataclass(frozen=True)
class Comparison:
    """One image sampled again. `largest_difference` in grey levels, 0 where it is exact.

    `differs` names what the commit record says of its environment that is another now.
    """

    key: str
    shard_id: int
    is_exact: bool
    largest_difference: int
    differs: tuple[str, ...]


def regenerate(
    storage: Storage,
    plan: JobPlan,
    records: Mapping[int, ShardSummary],
    num_images: int,
    *,
    weights: str | None,
    device: Device = "auto",
    sampler_factory: str = LOAD_SAMPLER,
    progress: Callable[[int], object] | None = None,
) -> list[Comparison]:
    """Sample images of committed shards again, in their own micro-batches, and compare pixels.

    They come from micro-batches spread evenly over the shards. Exact means the pixel hash of the
    Parquet row; the difference is to the stored file, for JPEG with its loss. Raises `InputError`
    for weights that are not those of the plan, `ShardError` for a damaged shard.
    """
    chosen = _chosen_batches(plan, records, num_images)
    if not chosen:
        return []
    first = records[chosen[0][0]]
    place = Workplace(
        storage.uri,
        weights,
        device=device,
        kernels=_kernels(first, device),
        threads=first.threads,
        sampler_factory=sampler_factory,
    )
    resampler = Resampler(plan, place)
    found: list[Comparison] = []
    for shard_id, start, stop in chosen:
        images_BHWC = resampler.sample(plan.shard(shard_id), start, stop).images_BHWC
        wanted = min(stop - start, num_images - len(found))
        stored = _stored(storage, plan, shard_id, range(start, start + wanted))
        differs = _differs(records[shard_id], resampler.info.made_with)
        for (key, hash_then, image_then), image_now in zip(stored, images_BHWC, strict=False):
            is_exact = pixel_hash(image_now) == hash_then
            gap = np.abs(image_now.astype(np.int16) - image_then.astype(np.int16))
            largest = 0 if is_exact else int(gap.max())
            found.append(Comparison(key, shard_id, is_exact, largest, differs))
            if progress:
                progress(1)
    return found


def _kernels(record: ShardSummary, device: Device) -> Kernels:
    """Those of a record; where they cannot run the default ones, as a difference that is told."""
    recorded = record.made_with.get("kernels", "plain")
    if recorded == "plain":
        return "plain"
    with suppress(InputError):
        if recorded == "triton":
            require_device(device, "triton")
            return "triton"
    return "auto"


def _chosen_batches(
    plan: JobPlan, records: Mapping[int, ShardSummary], num_images: int
) -> list[tuple[int, int, int]]:
    """(shard, start, stop) of as many micro-batches as hold the images, spread over the shards."""
    rest = sorted(records)
    wanted = min(len(rest), -(-num_images // plan.batch_size))
    spread = [rest[(2 * n + 1) * len(rest) // (2 * wanted)] for n in range(wanted)]
    rest = [shard_id for shard_id in rest if shard_id not in set(spread)]
    chosen: list[tuple[int, int, int]] = []
    lap = num_chosen = 0
    while num_chosen < num_images and spread:
        before = num_chosen
        for shard_id in spread:
            batches = plan.shard(shard_id).micro_batches
            if lap < len(batches) and num_chosen < num_images:
                start, stop = batches[(len(batches) // 2 + lap) % len(batches)]
                chosen.append((shard_id, start, stop))
                num_chosen += stop - start
        lap += 1
        if num_chosen == before:
            spread, rest, lap = rest, [], 0
    return chosen


def _stored(
    storage: Storage, plan: JobPlan, shard_id: int, indices: range
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(key, recorded pixel hash, stored pixels) of some samples. Errors: `ShardError`."""
    with naming_damage(parquet_name(shard_id)):
        table = read_parquet(storage.read(parquet_name(shard_id)), schema_of(plan))
    rows: list[dict[str, Any]] = table.select(["index", "key", "pixel_sha256"]).to_pylist()
    hashes = {row["key"]: row["pixel_sha256"] for row in rows if row["index"] in indices}
    with naming_damage(tar_name(shard_id)), storage.open_input(tar_name(shard_id)) as stream:
        for sample in read_tar(stream, plan.image_format, plan.caption_suffixes):
            if sample.key in hashes:
                pixels = decode_image(sample.image, plan.image_channels)
                yield sample.key, hashes[sample.key], pixels


def _differs(record: ShardSummary, now: Mapping[str, str]) -> tuple[str, ...]:
    then = record.made_with
    names = sorted({*then, *now})
    return tuple(
        f"{name}: {then.get(name, 'none')} then, {now.get(name, 'none')} now"
        for name in names
        if then.get(name) != now.get(name)
    )
