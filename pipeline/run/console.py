"""What the user reads of a job before it runs and after it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tqdm import tqdm

from depthvar.config import AnyModel
from depthvar.host.rate import rate_text
from depthvar.plan import DepthPlan
from pipeline.dataset.report.progress import stage_seconds
from pipeline.request.job_plan import JobPlan
from pipeline.shards.committed import Environment, ShardSummary, mixed_environments

_MAX_RANGES = 12
_MAX_CLASSES = 10  # above it the first and the last ones stand for all
_MAX_NAME = 40


def say(text: str) -> None:
    """Print a line to stderr without tearing a progress bar."""
    tqdm.write(text, file=sys.stderr)


def ranges(numbers: Iterable[int]) -> str:
    """Return `0-2, 5, 7-9` for increasing numbers; a long list ends in its count."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
    if len(texts) > _MAX_RANGES:
        texts = [*texts[:_MAX_RANGES], f"and {len(texts) - _MAX_RANGES} more ranges"]
    return ", ".join(texts)


def _shards(count: int) -> str:
    return "shard" if count == 1 else "shards"


def human_bytes(num_bytes: float) -> str:
    """Return `1.2 MB`: decimal units, as disks and clouds count."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def compute_line(plan: JobPlan) -> str:
    """GFLOP per image, guided, against full depth."""
    compute = plan.compute
    total = compute.transformer_flops + compute.decoder_flops
    full = compute.full_transformer_flops + compute.decoder_flops
    return (
        f"{_gflop(total)} GFLOP per image, full depth {_gflop(full)}: transformer"
        f" {_gflop(compute.transformer_flops)} of {_gflop(compute.full_transformer_flops)},"
        f" decoder {_gflop(compute.decoder_flops)};"
        f" {compute.token_layers_ratio:.1%} of the token-layers"
    )


def _gflop(flops: float) -> str:
    return f"{flops / 1e9:.3g}"


def dataset_summary(plan: JobPlan, records: Mapping[int, ShardSummary], where: str) -> str:
    """What is committed, a line each: images, bytes, compute, time, where."""
    images = sum(record.num_samples for record in records.values())
    tar_bytes = sum(record.files.tar.size for record in records.values())
    parquet_bytes = sum(record.files.parquet.size for record in records.values())
    blank = sum(record.num_blank for record in records.values())
    doubled = sum(record.num_duplicates for record in records.values())
    odd = f", {blank:,} blank, {doubled:,} duplicates" if blank or doubled else ""
    shards = f"{len(records):,} of {plan.num_shards:,} shards"
    lines = [
        f"dataset   {images:,} images of {plan.subjects_told} in {shards}{odd}",
        f"bytes     {human_bytes(tar_bytes)} of images, {human_bytes(parquet_bytes)} of rows",
        f"compute   {compute_line(plan)}",
        f"time      {time_line(records)}",
        *(f"mixed     {line}" for line in mixture_lines(records.values())),
        f"where     {where}",
    ]
    return "\n".join(lines)


def mixture_lines(records: Iterable[ShardSummary]) -> list[str]:
    """What differs between the shards' environments, a line each: every value with its shards."""
    return [
        f"{name}: {_with_shards(values)}" for name, values in mixed_environments(records).items()
    ]


def environment_changes(earlier: Iterable[Environment], made_with: Mapping[str, str]) -> list[str]:
    """Where this worker differs from what committed shards were made with, a line each."""
    others: dict[str, dict[str, list[int]]] = {}
    for environment in earlier:
        then = environment.made_with
        for name in sorted({*then, *made_with}):
            value = then.get(name, "none")
            if value != made_with.get(name, "none"):
                others.setdefault(name, {}).setdefault(value, []).extend(environment.shard_ids)
    return [
        f"{name}: {_with_shards(values)}, this run has {made_with.get(name, 'none')}"
        for name, values in others.items()
    ]


def _with_shards(values: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(
        f"{value} in {len(shards):,} {_shards(len(shards))} ({ranges(sorted(shards))})"
        for value, shards in values.items()
    )


def time_line(records: Mapping[int, ShardSummary]) -> str:
    """Milliseconds of one worker per image, by phase; encoding runs beside the others."""
    if not records:
        return "nothing made yet"
    seconds = stage_seconds(records.values())

    def per_image(stage: str) -> str:
        milliseconds = 1000 * seconds[stage]
        return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"

    return (
        f"per image and worker: transformer {per_image('sampling')},"
        f" decoder {per_image('decoding')}, encoding {per_image('encoding')} beside them"
    )


def run_summary(num_images: int, making_s: float, loading_s: float, workers: Sequence[str]) -> str:
    """What this run did: images per second while workers were ready, and the time to get there."""
    devices = ", ".join(f"{count} x {device}" for device, count in Counter(workers).items())
    rate = num_images / making_s if making_s > 0 else 0.0
    return (
        f"this run  {num_images:,} images in {making_s:.1f} s, {rate_text(rate)} images/s"
        f" on {devices} (ready after {loading_s:.1f} s)"
    )


def depth_plan(plan: JobPlan, model: AnyModel) -> DepthPlan:
    """How many blocks each token of the plan's images runs."""
    return DepthPlan.build(model.grids, model.num_blocks, plan.runnable_policy)


def missing_summary(
    missing: Sequence[int],
    set_aside: Sequence[int],
    ledger: str,
    *,
    num_shards: int,
    interrupted: bool,
    unstored: Sequence[int] = (),
    too_large_batch: int | None = None,
) -> str:
    """Which shards are not there, why, and how to go on.

    `unstored` failed for want of a place to write: the next run tries them again unasked.
    `too_large_batch` is the batch size if memory may have run out with it.
    """
    lines = [f"missing: {len(missing):,} {_shards(len(missing))}: {ranges(missing)}"]
    if set_aside:
        lines.append(f"set aside after repeated failures: {ranges(set_aside)}: see {ledger}")
    if unstored:
        lines.append(
            f"could not be stored: {ranges(unstored)}: see {ledger}, and free or repair the output"
            " and the scratch folder"
        )
    if too_large_batch is not None:
        lines.append(
            f"if memory ran out at --batch-size {too_large_batch}: fewer --workers leave more for"
            " each; a smaller batch needs another --out, for the plan of this one keeps its batch"
            " size, on which the last bit of an image may depend"
            + (": delete what is here or choose another" if num_shards == len(missing) else "")
        )
    if interrupted:
        done = f"{num_shards - len(missing):,} of {num_shards:,} shards"
        lines.insert(0, f"stopped as asked, {done} are done: committed shards are safe")
    if len(set_aside) < len(missing):
        lines.append("run the same command again to make the rest")
    if set_aside:
        lines.append("add --retry-failed to try those again that were set aside")
    return "\n".join(lines)


def class_line(plan: JobPlan) -> str:
    """Which class each id stands for, or which prompts, and how many images each gets."""
    counts = plan.subject_counts
    equal = len(set(counts.values())) == 1
    shown = [
        f"{subject} {_name(plan.subject_name(subject))}" + ("" if equal else f" x {count:,}")
        for subject, count in counts.items()
    ]
    if len(shown) > _MAX_CLASSES:
        half = _MAX_CLASSES // 2
        shown = [*shown[:half], f"... {len(shown) - 2 * half:,} more ...", *shown[-half:]]
    count = next(iter(counts.values()))
    each = f"{count:,} {'image' if count == 1 else 'images'} each: " if equal else ""
    return f"{plan.subject_words[1]:9} {each}{', '.join(shown)}"


def _name(name: str) -> str:
    text = repr(name)
    return text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME - 3]}..."
