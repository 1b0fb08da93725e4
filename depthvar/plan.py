"""The depth plan: everything about a policy's cost that is known before an image exists.

Percentiles are exact ranks within a sample, so how many tokens of a scale have which depth is a
constant of (scale, blocks, policy); only which tokens they are depends on the image. With the
tokens sorted deepest first ("slot order"), those active at a block are always the first `prefix`.

Pure numbers: no model, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from depthvar.errors import InputError
from depthvar.knobs import BlockOrder
from depthvar.policy import DepthPolicy

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_MAX_COMPENSATION = 4 / 3
Grid = tuple[int, int]
"""Rows and columns of a scale's tokens."""


def block_order(num_blocks: int, order: BlockOrder = "bit-reversal") -> tuple[int, ...]:
    """The sequence in which depth adds blocks: a token of depth d runs the first d of it.

    Bit reversal of 0..L-1, that of the next power of two with what is out of range dropped
    (arXiv 2604.17286; 32 blocks begin 0, 16, 8, 24, 4).
    """
    if order == "first":
        return tuple(range(num_blocks))
    if order in ("ends", "last-ends"):
        inwards = (i // 2 if i % 2 == 0 else num_blocks - 1 - i // 2 for i in range(num_blocks))
        return tuple(b if order == "ends" else num_blocks - 1 - b for b in inwards)
    bits = (num_blocks - 1).bit_length()
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(1 << bits))
    return tuple(block for block in reversed_bits if block < num_blocks)


def schedule_scores(policy: DepthPolicy, mean: float, count: int) -> Floats:
    """Depth scores G at the percentiles of `count` tokens, ascending, with the given mean.

    The percentiles are the midpoints (r + 1/2) / n. Every family is monotone, within [0, 1], and
    has mean `mean` over the tokens; the step and octaves families to within half a token at the
    greater of their two depths.
    """
    percentiles = (np.arange(count) + 0.5) / count
    reach = policy.steepness * min(mean, 1 - mean)
    if mean in (0.0, 1.0):
        return np.full(count, mean)
    if policy.schedule == "linear":
        return mean + reach * (2 * percentiles - 1)
    if policy.schedule == "cosine":
        return mean - reach * np.cos(np.pi * percentiles)
    if policy.schedule == "step":
        kept = max(policy.kept_depth, mean)
        return np.where(np.arange(count) >= count - round(mean / kept * count), kept, 0.0)
    if policy.schedule == "octaves":
        shallow = 0.5 ** math.ceil(math.log2(1 / mean))
        num_deep = round((mean / shallow - 1) * count)
        return np.where(np.arange(count) >= count - num_deep, 2 * shallow, shallow)
    if policy.schedule == "power":
        return _power_with_mean(percentiles, mean)
    return np.full(count, mean)


def _power_with_mean(percentiles: Floats, mean: float) -> Floats:
    """percentiles ** p with p chosen by bisection so that the mean over the tokens is exact."""
    low, high = 0.0, 1.0
    while (percentiles**high).mean() > mean:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (percentiles**middle).mean() > mean else (low, middle)
    return percentiles**high


@dataclass(frozen=True)
class ScalePlan:
    """One scale: the `count` tokens of a grid (rows, columns) in slot order, deepest first.

    scores: depth score S of every slot. depths: blocks every slot runs. prefix: number of active
    slots at every block. rank_of_slot: which rank of the ranking map (0 = lowest) sits in a slot;
    the rotation is in it. code_weights: weight of the drawn code of every slot, in [0, 1].
    compensation: factor on the branches that a slot runs. ranked: whether slots differ, so that it
    matters which token sits in which; where they do not, they stand in raster order.
    """

    grid: Grid
    ranked: bool
    scores: Floats
    depths: Ints
    prefix: tuple[int, ...]
    rank_of_slot: Ints
    code_weights: Floats
    compensation: Floats

    @property
    def count(self) -> int:
        """Tokens of the scale."""
        return math.prod(self.grid)

    @property
    def adaptive(self) -> bool:
        """Whether some token does not run every block."""
        return min(self.prefix) < self.count

    @property
    def kept(self) -> int:
        """Tokens that run any block; the others are pruned."""
        return max(self.prefix)

    @property
    def token_layers(self) -> int:
        """Blocks run, summed over the tokens, for one stream."""
        return sum(self.prefix)


@dataclass(frozen=True)
class DepthPlan:
    """The plan of all sampled scales; scales that a policy skips at the end are left out."""

    grids: tuple[Grid, ...]
    num_blocks: int
    policy: DepthPolicy
    scales: tuple[ScalePlan, ...]

    @classmethod
    def build(cls, scales: Sequence[int | Grid], num_blocks: int, policy: DepthPolicy) -> DepthPlan:
        """Plan a policy for a model of such scales, each a grid or the side of a square one.

        `InputError` when the policy does not fit.
        """
        grids = tuple((scale, scale) if isinstance(scale, int) else scale for scale in scales)
        reference, skipped = policy.reference_scale, policy.skip_last_scales
        if skipped >= len(grids):
            raise InputError(
                f"policy skips the last {skipped} scales, the model has {len(grids)}: skip fewer"
            )
        if reference is not None and not 0 <= reference < len(grids):
            raise InputError(
                f"reference scale is {reference}, wanted 0 to {len(grids) - 1} "
                f"(the model has {len(grids)} scales): check --reference-scale"
            )
        sampled = grids[: len(grids) - skipped]
        if policy.guided_scales is not None and not 1 <= policy.guided_scales <= len(sampled):
            raise InputError(
                f"policy guided_scales is {policy.guided_scales}, wanted 1 to {len(sampled)}, the "
                "scales that the model samples: correct it"
            )
        if policy.min_depth > num_blocks:
            raise InputError(
                f"policy min_depth is {policy.min_depth}, the model has {num_blocks} blocks: "
                "lower it"
            )
        adaptive = 0 if reference is None else max(0, len(sampled) - reference - 1)
        if len(policy.mean_depths) > adaptive:
            raise InputError(
                f"policy {policy.preset!r} gives the depth of {len(policy.mean_depths)} scales "
                f"after the reference scale, of which the model samples {adaptive}: choose an "
                "earlier --reference-scale"
            )
        if round(policy.kept_depth * num_blocks, 9) < 1:
            raise InputError(
                f"policy kept_depth is {policy.kept_depth}, which is no whole block of the model's "
                f"{num_blocks}: give at least 1/{num_blocks}, rounded up"
            )
        plans = tuple(_plan_scale(i, sampled, num_blocks, policy) for i in range(len(sampled)))
        return cls(grids, num_blocks, policy, plans)

    @cached_property
    def token_layers(self) -> int:
        """Blocks run, summed over all tokens of an image, for the conditional stream."""
        return sum(scale.token_layers for scale in self.scales)

    @cached_property
    def full_token_layers(self) -> int:
        """The same at full depth over all scales of the model."""
        return self.num_blocks * sum(map(math.prod, self.grids))

    @cached_property
    def mean_depth_per_scale(self) -> tuple[float, ...]:
        """Mean number of blocks a token runs, for every scale of the model; 0 where skipped."""
        depths = [scale.token_layers / scale.count for scale in self.scales]
        return tuple(depths + [0.0] * (len(self.grids) - len(depths)))

    def streams(self, at_first: int) -> tuple[int, ...]:
        """Streams that run at every sampled scale, of samplers that begin with some.

        `InputError` where the policy stops a stream that does not run.
        """
        guided = self.policy.guided_scales
        if guided is None:
            return (at_first,) * len(self.scales)
        if at_first == 1:
            raise InputError(
                f"policy guided_scales is {guided} and guidance is off (cfg): leave guided_scales "
                "out, or raise cfg"
            )
        return tuple(at_first if i < guided else 1 for i in range(len(self.scales)))

    def over_streams(self, of_scales: Sequence[int], streams: int) -> int:
        """What every scale takes for one stream, summed over those that run there."""
        return sum(n * each for n, each in zip(self.streams(streams), of_scales, strict=True))

    def share(self, streams: int) -> float:
        """Token-layers of all streams that run, as a share of those of full depth."""
        run = self.over_streams([scale.token_layers for scale in self.scales], streams)
        return run / (streams * self.full_token_layers)

    def keeps_difference(self, scale: int) -> bool:
        """Whether a scale ends with a difference of logits: the last guided one and later ones."""
        guided = self.policy.guided_scales
        if guided is None or guided == len(self.scales) or not self.policy.kept_guidance:
            return False
        return scale >= guided - 1

    def keeps_change(self, scale: int, block: int) -> bool:
        """Whether the next scale takes the change that this one's tokens make at a block."""
        if not self.policy.proxies_changes or scale + 1 >= len(self.scales):
            return False
        return self.scales[scale + 1].prefix[block] < self.scales[scale + 1].count

    def cached_tokens(self, scale: int, block: int) -> int:
        """Tokens of one scale whose keys and values a block keeps."""
        plan = self.scales[scale]
        whole = self.policy.skipped_keys_values == "proxy"
        return plan.count if whole else plan.prefix[block]

    @cached_property
    def cache_lengths(self) -> tuple[int, ...]:
        """Tokens in the key-value cache of every block at the end of an image."""
        return tuple(
            sum(self.cached_tokens(i, block) for i in range(len(self.scales)))
            for block in range(self.num_blocks)
        )


def mean_depth(counts: Sequence[int], index: int, policy: DepthPolicy) -> float:
    """Mean depth of a scale after the reference scale, as a share of the blocks, in [0, 1].

    `counts` are the tokens of the sampled scales.
    """
    reference = policy.reference_scale
    assert reference is not None
    if policy.mean_depths:
        behind = index - reference - 1
        return policy.mean_depths[behind] if behind < len(policy.mean_depths) else 1.0
    if policy.allocation == "least":
        return 0.0
    each = counts[reference]
    if policy.allocation == "reference":
        return min(1.0, each / counts[index])
    tokens = counts[reference + 1 :]
    in_sum = each * len(tokens)
    equal = min(1.0, in_sum / sum(tokens))
    if policy.allocation == "equal":
        return equal
    most = max(policy.kept_depth, equal)
    left = max(0.0, in_sum - most * sum(tokens[: index - reference - 1]))
    return min(most, left / counts[index])


def _plan_scale(
    index: int, grids: Sequence[Grid], num_blocks: int, policy: DepthPolicy
) -> ScalePlan:
    counts = [math.prod(grid) for grid in grids]
    count, reference = counts[index], policy.reference_scale
    scores, percentiles, shift = np.ones(count), np.zeros(count), 0
    if reference is not None and index > reference:
        mean = mean_depth(counts, index, policy)
        scores = schedule_scores(policy, mean, count)[::-1]
        scores = np.maximum(scores, policy.min_depth / num_blocks)
        if policy.dither:
            percentiles = (np.arange(count)[::-1] + 0.5) / count
        shift = round((policy.rotation * (index - reference - 1)) % 1.0 * count)
    # The small term keeps a score that is meant to be a whole number of blocks from falling short.
    depths = np.floor(scores * num_blocks + percentiles + 1e-9).astype(np.int64)
    depths = np.minimum(depths, num_blocks)
    place = {block: i for i, block in enumerate(block_order(num_blocks, policy.block_order))}
    code_weights = {
        "none": np.ones(count),
        "pruned": (depths > 0).astype(np.float64),
    }.get(policy.blending, scores)
    compensation = np.ones(count)
    if policy.compensation:
        compensation = np.minimum(_MAX_COMPENSATION, np.sqrt(num_blocks / np.maximum(depths, 1)))
    return ScalePlan(
        grid=grids[index],
        ranked=bool(np.ptp(depths) or np.ptp(code_weights)),
        scores=scores,
        depths=depths,
        prefix=tuple(int((depths > place[block]).sum()) for block in range(num_blocks)),
        rank_of_slot=(count - 1 - np.arange(count) - shift) % count,
        code_weights=code_weights,
        compensation=compensation,
    )
