"""The depth engine: runs one scale under its plan, every block on a prefix of the slots.

Tokens are permuted once into slot order, deepest first; a block then works on `x[:, :k]` with `k`
known before sampling starts. No mask, gather of active tokens or host synchronisation enters the
loop over the blocks, and every shape depends on the plan alone.

Shape legend: B images, G stream rows (2B: conditional then unconditional), T tokens of a scale, K
active tokens, C width, H heads, D head channels, L blocks.

Source: arXiv 2604.17286, steps 3 to 8; the prefix form is ours.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.layers import Attend, first_rows
from depthvar.plan import DepthPlan, Grid, ScalePlan
from depthvar.pointwise import PLAIN, Change, Pointwise, turned

ConditionT = TypeVar("ConditionT", contravariant=True)


class Backbone(Protocol[ConditionT]):
    """What the engine needs of a transformer; `condition` is the backbone's own business."""

    def rotations(self, scale: int) -> Tensor | None:
        """What turns the queries and keys of every token of a scale (`layers.turned`): (T, D).

        None where positions turn nothing.
        """
        ...

    def run_block(self, block: int, x_GKC: Tensor, condition: ConditionT, attend: Attend) -> Change:
        """What a block adds to the residual stream of some tokens: tensors of the caller's own.

        `attend` brings queries and keys to their length, turns them by the places of these tokens,
        where the backbone has such, and rounds them to the precision of the values.
        """
        ...

    def keys_values(
        self, block: int, x_GKC: Tensor, condition: ConditionT
    ) -> tuple[Tensor, Tensor]:
        """Keys of length 1, not yet turned, and values of tokens that a block does not compute.

        Each (G, H, K, D).
        """
        ...


@dataclass(frozen=True)
class ProxyFit:
    """Least-squares fit of a block's change by the up-sampled change of the previous scale.

    change ~ slope * up(previous change) + offset, per scale, block and channel: each (S, L, C).
    """

    slope_SLC: Tensor
    offset_SLC: Tensor


class KeyValueCache:
    """Keys and values of every block, allocated once at the exact length the plan gives."""

    def __init__(self, plan: DepthPlan, rows: int, heads: int, head_dim: int, like: Tensor) -> None:
        self._keys = [like.new_empty(rows, heads, n, head_dim) for n in plan.cache_lengths]
        self._values = [torch.empty_like(keys) for keys in self._keys]
        self._filled = [0] * plan.num_blocks

    def first_rows(self, count: int) -> KeyValueCache:
        """The cache of the first stream rows alone, to go on with: views of this one."""
        part = copy(self)
        part._keys, part._values = (
            [x_GHND[:count] for x_GHND in kept] for kept in (self._keys, self._values)
        )
        part._filled = self._filled.copy()
        return part

    def append(self, block: int, k_GHKD: Tensor, v_GHKD: Tensor) -> None:
        """Keep keys and values of some tokens of the current scale."""
        keys_GHKD, values_GHKD = self.room(block, k_GHKD.shape[2])
        keys_GHKD.copy_(k_GHKD)
        values_GHKD.copy_(v_GHKD)

    def room(self, block: int, count: int) -> tuple[Tensor, Tensor]:
        """Where keys and values of so many tokens of the current scale go, as views."""
        begin = self._filled[block]
        end = self._filled[block] = begin + count
        assert end <= self._keys[block].shape[2]
        return self._keys[block][:, :, begin:end], self._values[block][:, :, begin:end]

    def kept(self, block: int) -> tuple[Tensor, Tensor]:
        """The keys and values that a block has so far, as views (G, H, tokens, D)."""
        end = self._filled[block]
        return self._keys[block][:, :, :end], self._values[block][:, :, :end]

    def attend(self, block: int, q_GHKD: Tensor) -> Tensor:
        """Attention of queries over everything the block has kept."""
        return F.scaled_dot_product_attention(q_GHKD, *self.kept(block), scale=1.0)


@dataclass(frozen=True)
class ScaleTrace:
    """What a scale leaves for the next one.

    hidden_GTC: output of the last block, raster order. change_GT: the absolute change summed over
    blocks, averaged over channels, raster order. change_BT: its sum over the guided streams.
    changes: the change at every block in slot order (G, T, C), None where no one will ask.
    slot_of_raster_GT: where the token at a raster position sits in slot order.
    """

    hidden_GTC: Tensor
    change_GT: Tensor
    change_BT: Tensor
    changes: tuple[Tensor | None, ...]
    slot_of_raster_GT: Tensor

    def first_rows(self, count: int) -> ScaleTrace:
        """What the first stream rows leave, as views."""
        changes = tuple(None if change is None else change[:count] for change in self.changes)
        return replace(first_rows(self, count), changes=changes)


def parent_positions(grid: Grid, previous: Grid, device: torch.device) -> Tensor:
    """Raster position at the previous scale that covers each position of this one: (T,)."""
    rows, columns = (
        (2 * torch.arange(length, device=device) + 1) * coarse // (2 * length)
        for length, coarse in zip(grid, previous, strict=True)
    )
    return (rows[:, None] * previous[1] + columns[None, :]).flatten()


@dataclass(frozen=True)
class _ScaleTensors:
    """A scale's plan on the device, made once: nothing crosses from the host while sampling."""

    identity_T: Tensor
    rank_of_slot_T: Tensor
    parents_T: Tensor
    code_weights_T: Tensor
    compensation_T1: Tensor
    rotations_TD: Tensor | None

    @classmethod
    def of(
        cls,
        scale: ScalePlan,
        previous: ScalePlan,
        rotations_TD: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> _ScaleTensors:
        compensation_T = torch.as_tensor(scale.compensation, dtype=dtype, device=device)
        return cls(
            identity_T=torch.arange(scale.count, device=device),
            rank_of_slot_T=torch.as_tensor(scale.rank_of_slot, device=device),
            parents_T=parent_positions(scale.grid, previous.grid, device),
            code_weights_T=torch.as_tensor(scale.code_weights, device=device),
            compensation_T1=compensation_T[:, None],
            rotations_TD=None if rotations_TD is None else rotations_TD.to(device, dtype),
        )


@dataclass(frozen=True)
class _Parents:
    """Where the slots of a scale find the changes of the scale before: places in all streams."""

    changes: tuple[Tensor | None, ...]
    places_GT: Tensor


@dataclass(frozen=True)
class _Slots:
    """What the blocks of a scale know of its slots: where their parents are, what turns them."""

    parents: _Parents | None
    rotations_GTD: Tensor | None

    def of(self, slots: slice) -> Tensor | None:
        """What turns some of them (G, K, D)."""
        return None if self.rotations_GTD is None else self.rotations_GTD[:, slots]


class DepthEngine(Generic[ConditionT]):
    """Runs the scales of a batch under a plan; made once per (backbone, plan, device, dtype).

    `dtype` is the precision of the residual stream; the cache may have another.
    """

    def __init__(
        self,
        backbone: Backbone[ConditionT],
        plan: DepthPlan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        proxy_fit: ProxyFit | None = None,
        pointwise: Pointwise = PLAIN,
    ) -> None:
        assert plan.policy.proxy != "calibrated" or proxy_fit is not None
        self._backbone = backbone
        self._plan = plan
        self._pointwise = pointwise
        self._fit = proxy_fit if plan.policy.proxy == "calibrated" else None
        self._tensors = [
            _ScaleTensors.of(scale, previous, backbone.rotations(i), device, dtype)
            for i, (previous, scale) in enumerate(pairwise((plan.scales[0], *plan.scales)))
        ]

    def upsample(self, index: int, values_BT: Tensor) -> Tensor:
        """Values (B, T, ...) of the scale before at the tokens of this one that they cover."""
        return values_BT.index_select(1, self._tensors[index].parents_T)

    def code_weights(self, index: int, trace: ScaleTrace) -> Tensor:
        """Weight of the drawn code of every token of a scale (B, T), raster order, float64.

        Where the streams of a sample are ranked apart, the mean of theirs.
        """
        batch, count = trace.change_BT.shape
        weights_GT = self._tensors[index].code_weights_T[trace.slot_of_raster_GT]
        if not self._plan.policy.separate_ranking:
            return weights_GT[:batch]
        return weights_GT.view(-1, batch, count).mean(0)

    def run_scale(
        self,
        index: int,
        x_GTC: Tensor,
        condition: ConditionT,
        cache: KeyValueCache,
        previous: ScaleTrace | None,
        given_BT: Tensor,
    ) -> ScaleTrace:
        """All blocks of one scale; input and output in raster order.

        `given_BT` is what the tokens are ranked by where the policy ranks by something that the
        engine does not see.
        """
        scale, policy = self._plan.scales[index], self._plan.policy
        if scale.ranked:
            assert previous is not None
            order_GT = self._order(index, x_GTC, previous, given_BT)
            slots_GTC = _permute(x_GTC, order_GT)
        else:
            order_GT = self._tensors[index].identity_T.expand(x_GTC.shape[:2])
            slots_GTC = x_GTC.clone()
        slots = _Slots(self._parents(index, order_GT, previous), self._rotations(index, order_GT))
        total_GT, changes = self._run_blocks(index, slots_GTC, condition, cache, slots)
        if policy.proxy == "output" and scale.kept < scale.count:
            assert previous is not None
            restored_GTC = self.upsample(index, previous.hidden_GTC)
            slots_GTC[:, scale.kept :] = _permute(restored_GTC, order_GT[:, scale.kept :])
        slot_of_raster_GT = order_GT
        if scale.ranked:
            slot_of_raster_GT = order_GT.argsort(dim=1)
            total_GT = total_GT.gather(1, slot_of_raster_GT)
            slots_GTC = _permute(slots_GTC, slot_of_raster_GT)
        change_BT = _sum_of_streams(total_GT, len(given_BT))
        return ScaleTrace(slots_GTC, total_GT, change_BT, changes, slot_of_raster_GT)

    def _order(self, index: int, x_GTC: Tensor, previous: ScaleTrace, given_BT: Tensor) -> Tensor:
        """Raster position of the token in every slot (G, T)."""
        policy, batch = self._plan.policy, len(given_BT)
        if policy.ranking == "distance":
            ranking = (x_GTC - x_GTC.mean(dim=1, keepdim=True)).square().sum(dim=2)
        elif policy.ranking == "change":
            ranking = self.upsample(index, previous.change_GT)
        else:
            ranking = given_BT
        if len(ranking) > batch and not policy.separate_ranking:
            ranking = _sum_of_streams(ranking, batch)
        order = ranking.argsort(dim=1, stable=True)[:, self._tensors[index].rank_of_slot_T]
        return order.repeat(len(x_GTC) // len(order), 1)

    def _parents(
        self, index: int, order_GT: Tensor, previous: ScaleTrace | None
    ) -> _Parents | None:
        """What the skipped tokens of a scale take, if it is the changes of the scale before."""
        if not (self._plan.scales[index].adaptive and self._plan.policy.proxies_changes):
            return None
        assert previous is not None
        raster_GT = self._tensors[index].parents_T[order_GT]
        slots_GT = previous.slot_of_raster_GT.gather(1, raster_GT)
        return _Parents(previous.changes, _places(slots_GT, previous.hidden_GTC.shape[1]))

    def _rotations(self, index: int, order_GT: Tensor) -> Tensor | None:
        """What turns the queries and keys of every slot (G, T, D)."""
        rotations_TD = self._tensors[index].rotations_TD
        if rotations_TD is None or self._plan.scales[index].ranked:
            return None if rotations_TD is None else rotations_TD[order_GT]
        return rotations_TD.expand(len(order_GT), -1, -1)

    def _run_blocks(
        self,
        index: int,
        x_GTC: Tensor,
        condition: ConditionT,
        cache: KeyValueCache,
        slots: _Slots,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Run the blocks on `x_GTC`, in slot order and in place.

        Returns the mean absolute change (G, T), summed over the blocks, and the change at every
        block that the next scale takes.
        """
        total_GT = x_GTC.new_zeros(
            x_GTC.shape[:2], dtype=torch.promote_types(x_GTC.dtype, torch.float32)
        )
        changes: list[Tensor | None] = []
        for block in range(self._plan.num_blocks):
            parts = self._changes(index, block, x_GTC, condition, cache, slots)
            keep = self._plan.keeps_change(index, block)
            changes.append(self._pointwise.add(x_GTC, total_GT, parts, keep=keep))
        return total_GT / x_GTC.shape[2], tuple(changes)

    def _changes(
        self,
        index: int,
        block: int,
        x_GTC: Tensor,
        condition: ConditionT,
        cache: KeyValueCache,
        slots: _Slots,
    ) -> list[Change]:
        """What a block adds to its active tokens, and what stands in for that in the others."""
        scale, policy = self._plan.scales[index], self._plan.policy
        active = scale.prefix[block]
        changes: list[Change] = []
        if active < scale.count and policy.skipped_keys_values == "proxy":
            k_GHKD, v_GHKD = self._backbone.keys_values(block, x_GTC[:, active:], condition)
            rotations_GKD = slots.of(slice(active, None))
            if rotations_GKD is not None:
                k_GHKD = turned(k_GHKD, rotations_GKD)
            cache.append(block, k_GHKD, v_GHKD)
        if active:

            def attend(
                q_GHKD: Tensor, k_GHKD: Tensor, v_GHKD: Tensor, scale_1H11: Tensor
            ) -> Tensor:
                turns, room = slots.of(slice(active)), cache.room(block, active)
                q_GHKD = self._pointwise.put_heads(q_GHKD, k_GHKD, v_GHKD, scale_1H11, turns, *room)
                return cache.attend(block, q_GHKD)

            change = self._backbone.run_block(block, x_GTC[:, :active], condition, attend)
            if policy.compensation and scale.adaptive:
                compensation_K1 = self._tensors[index].compensation_T1[:active]
                change = replace(change, compensation_K1=compensation_K1)
            changes.append(change)
        if active < scale.count and slots.parents is not None:
            earlier_GTC = slots.parents.changes[block]
            assert earlier_GTC is not None
            proxy_GKC = _rows(earlier_GTC, slots.parents.places_GT[:, active:])
            if self._fit is not None:
                slope_SLC, offset_SLC = self._fit.slope_SLC, self._fit.offset_SLC
                proxy_GKC = torch.addcmul(
                    offset_SLC[index, block], proxy_GKC, slope_SLC[index, block]
                )
            changes.append(Change(proxy_GKC))
        return changes


def _permute(values_GTC: Tensor, order_GK: Tensor) -> Tensor:
    """The rows of every stream at some places of its own: (G, K, C)."""
    return _rows(values_GTC, _places(order_GK, values_GTC.shape[1]))


def _places(order_GK: Tensor, count: int) -> Tensor:
    """Places of the streams' tokens in one list of all, `count` of each."""
    begins_G = torch.arange(0, len(order_GK) * count, count, device=order_GK.device)
    return order_GK + begins_G[:, None]


def _rows(values_GTC: Tensor, places_GK: Tensor) -> Tensor:
    """Rows of all streams by their places: (G, K, C).

    Whole rows: a gather along the tokens would look up every channel by itself.
    """
    chosen_NC = values_GTC.flatten(0, 1).index_select(0, places_GK.flatten())
    return chosen_NC.view(*places_GK.shape, -1)


def _sum_of_streams(values_GT: Tensor, batch: int) -> Tensor:
    """The guided streams of a sample share one ranking: (G, T) to (B, T)."""
    by_stream = values_GT.view(-1, batch, values_GT.shape[1])
    return by_stream.sum(0, dtype=torch.promote_types(values_GT.dtype, torch.float32))
