"""The depth engine: runs one scale under its plan, every block on a prefix of the slots.

Tokens are permuted once into slot order, deepest first; a block then works on `x[:, :k]` with `k`
known before sampling starts. No mask, gather of active tokens or host synchronisation enters the
loop over the blocks, and every shape depends on the plan alone.

Shape legend: B images, G stream rows (2B: conditional then unconditional), T tokens of a scale, K
active tokens, C width, H heads, D head channels, L blocks.

Source: arXiv 2604.17286, steps 3 to 8; the prefix form is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.plan import DepthPlan

ConditionT = TypeVar("ConditionT", contravariant=True)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Backbone(Protocol[ConditionT]):
    """What the engine needs of a transformer; `condition` is the backbone's own business."""

    def run_block(self, block: int, x_GKC: Tensor, condition: ConditionT, attend: Attend) -> Tensor:
        """Residual stream of some tokens after a block."""
        ...

    def keys_values(
        self, block: int, x_GKC: Tensor, condition: ConditionT
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (G, H, K, D) of tokens that a block does not compute."""
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

    def append(self, block: int, k_GHKD: Tensor, v_GHKD: Tensor) -> None:
        """Keep keys and values of some tokens of the current scale."""
        begin = self._filled[block]
        end = begin + k_GHKD.shape[2]
        assert end <= self._keys[block].shape[2]
        self._keys[block][:, :, begin:end] = k_GHKD
        self._values[block][:, :, begin:end] = v_GHKD
        self._filled[block] = end

    def take_over(self, other: KeyValueCache) -> None:
        """Copy what another cache has kept so far."""
        for block, filled in enumerate(other._filled):
            self._keys[block][:, :, :filled] = other._keys[block][:, :, :filled]
            self._values[block][:, :, :filled] = other._values[block][:, :, :filled]
        self._filled = list(other._filled)

    def attend(self, block: int, q_GHKD: Tensor) -> Tensor:
        """Attention of queries over everything the block has kept."""
        end = self._filled[block]
        keys, values = self._keys[block][:, :, :end], self._values[block][:, :, :end]
        return F.scaled_dot_product_attention(q_GHKD, keys, values, scale=1.0)


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


def parent_positions(side: int, previous_side: int, device: torch.device) -> Tensor:
    """Raster position at the previous scale that covers each position of this one: (T,)."""
    along = (2 * torch.arange(side, device=device) + 1) * previous_side // (2 * side)
    return (along[:, None] * previous_side + along[None, :]).flatten()


@dataclass(frozen=True)
class _ScaleTensors:
    """A scale's plan on the device, made once: nothing crosses from the host while sampling."""

    identity_T: Tensor
    rank_of_slot_T: Tensor
    parents_T: Tensor
    code_weights_T: Tensor
    compensation_T1: Tensor


@dataclass(frozen=True)
class _Parents:
    """Where the slots of a scale find the change of the scale before: (G, T, 1)."""

    previous: ScaleTrace
    slots_GT1: Tensor


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
        keep_changes: bool = False,
    ) -> None:
        assert plan.policy.proxy != "calibrated" or proxy_fit is not None
        self._backbone = backbone
        self._plan = plan
        self._fit = proxy_fit
        self._keep_changes = keep_changes
        self._tensors = []
        for i, scale in enumerate(plan.scales):
            previous_side = plan.scales[max(i - 1, 0)].side
            compensation = torch.as_tensor(scale.compensation, dtype=dtype, device=device)
            code_weights = torch.as_tensor(scale.code_weights(plan.policy.blending), device=device)
            self._tensors.append(
                _ScaleTensors(
                    identity_T=torch.arange(scale.count, device=device),
                    rank_of_slot_T=torch.as_tensor(scale.rank_of_slot, device=device),
                    parents_T=parent_positions(scale.side, previous_side, device),
                    code_weights_T=code_weights,
                    compensation_T1=compensation[:, None],
                )
            )

    def upsampled(self, index: int, values_BT: Tensor) -> Tensor:
        """Values (B, T, ...) of the scale before at the tokens of this one that they cover."""
        return values_BT[:, self._tensors[index].parents_T]

    def code_weights_raster(self, index: int, trace: ScaleTrace) -> Tensor:
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
        """All blocks of one scale; input in raster order.

        `given_BT` is what the tokens are ranked by where the policy ranks by something that the
        engine does not see.
        """
        scale, tensors = self._plan.scales[index], self._tensors[index]
        streams = x_GTC.shape[0] // given_BT.shape[0]
        if not scale.adaptive:
            identity_GT = tensors.identity_T.expand(x_GTC.shape[:2])
            x_GTC, total_GT, changes = self._run_blocks(index, x_GTC, condition, cache, None)
            change_BT = _sum_of_streams(total_GT, streams)
            return ScaleTrace(x_GTC, total_GT, change_BT, changes, identity_GT)
        assert previous is not None
        order_GT = self._order(index, x_GTC, previous, given_BT)
        slot_of_raster_GT = order_GT.argsort(dim=1)
        parent_GT = previous.slot_of_raster_GT.gather(1, tensors.parents_T[order_GT])
        parents = _Parents(previous, parent_GT[:, :, None])
        slots_GTC = x_GTC.take_along_dim(order_GT[:, :, None], dim=1)
        slots_GTC, total_GT, changes = self._run_blocks(index, slots_GTC, condition, cache, parents)
        if self._plan.policy.proxy == "output":
            restored = self.upsampled(index, previous.hidden_GTC)
            restored = restored.take_along_dim(order_GT[:, :, None], dim=1)
            slots_GTC[:, scale.kept :] = restored[:, scale.kept :]
        change_GT = total_GT.gather(1, slot_of_raster_GT)
        hidden_GTC = slots_GTC.take_along_dim(slot_of_raster_GT[:, :, None], dim=1)
        change_BT = _sum_of_streams(change_GT, streams)
        return ScaleTrace(hidden_GTC, change_GT, change_BT, changes, slot_of_raster_GT)

    def _order(self, index: int, x_GTC: Tensor, previous: ScaleTrace, given_BT: Tensor) -> Tensor:
        """Raster position of the token in every slot (G, T)."""
        policy, tensors = self._plan.policy, self._tensors[index]
        if policy.ranking == "distance":
            ranking = (x_GTC - x_GTC.mean(dim=1, keepdim=True)).square().sum(dim=2)
        elif policy.ranking == "change":
            ranking = self.upsampled(index, previous.change_GT)
        else:
            ranking = given_BT
        streams = x_GTC.shape[0] // given_BT.shape[0]
        if policy.ranking in ("change", "distance") and not policy.separate_ranking:
            ranking = _sum_of_streams(ranking, streams)
        order = ranking.argsort(dim=1, stable=True)[:, tensors.rank_of_slot_T]
        return order if policy.separate_ranking else order.repeat(streams, 1)

    def _run_blocks(
        self,
        index: int,
        x_GTC: Tensor,
        condition: ConditionT,
        cache: KeyValueCache,
        parents: _Parents | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """The loop over the blocks: output, total absolute change (G, T), changes; slot order."""
        scale, policy = self._plan.scales[index], self._plan.policy
        x_GTC = x_GTC.clone()
        total_GT = x_GTC.new_zeros(x_GTC.shape[:2], dtype=_real(x_GTC.dtype))
        changes: list[Tensor | None] = []
        for block, active in enumerate(scale.prefix):
            tail_GKC = x_GTC[:, active:]
            kept = torch.zeros_like(x_GTC) if self._is_asked_for(index, block) else None
            proxy = self._proxy(index, block, active, parents)
            if policy.skipped_keys_values == "proxy" and active < scale.count:
                cache.append(block, *self._backbone.keys_values(block, tail_GKC, condition))
            if active:
                change = self._change(index, block, x_GTC[:, :active], condition, cache)
                x_GTC[:, :active] += change
                total_GT[:, :active] += _magnitude(change)
                if kept is not None:
                    kept[:, :active] = change
            if proxy is not None:
                tail_GKC += proxy
                total_GT[:, active:] += _magnitude(proxy)
                if kept is not None:
                    kept[:, active:] = proxy
            changes.append(kept)
        return x_GTC, total_GT, tuple(changes)

    def _change(
        self, index: int, block: int, x_GKC: Tensor, condition: ConditionT, cache: KeyValueCache
    ) -> Tensor:
        """What a block adds to its active tokens."""

        def attend(q_GHKD: Tensor, k_GHKD: Tensor, v_GHKD: Tensor) -> Tensor:
            cache.append(block, k_GHKD, v_GHKD)
            return cache.attend(block, q_GHKD)

        change_GKC = self._backbone.run_block(block, x_GKC, condition, attend) - x_GKC
        if self._plan.policy.compensation and self._plan.scales[index].adaptive:
            change_GKC *= self._tensors[index].compensation_T1[: x_GKC.shape[1]]
        return change_GKC

    def _proxy(
        self, index: int, block: int, active: int, parents: _Parents | None
    ) -> Tensor | None:
        """What stands in for the change of the tokens after the first `active`, if anything."""
        if parents is None or active == self._plan.scales[index].count:
            return None
        if self._plan.policy.proxy not in ("raw", "calibrated"):
            return None
        earlier_GTC = parents.previous.changes[block]
        assert earlier_GTC is not None
        proxy_GKC = earlier_GTC.take_along_dim(parents.slots_GT1[:, active:], dim=1)
        if self._plan.policy.proxy == "calibrated":
            assert self._fit is not None
            slope_C, offset_C = (
                self._fit.slope_SLC[index, block],
                self._fit.offset_SLC[index, block],
            )
            proxy_GKC = torch.addcmul(offset_C, proxy_GKC, slope_C)
        return proxy_GKC

    def _is_asked_for(self, index: int, block: int) -> bool:
        """Whether this block's change is kept: the next scale will need it as a proxy."""
        if self._keep_changes:
            return True
        if index + 1 >= len(self._plan.scales):
            return False
        following = self._plan.scales[index + 1]
        uses_changes = self._plan.policy.proxy in ("raw", "calibrated")
        return uses_changes and following.prefix[block] < following.count


def _real(dtype: torch.dtype) -> torch.dtype:
    """Precision of sums over blocks: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _magnitude(change_GKC: Tensor) -> Tensor:
    """Mean absolute value over the channels (G, K)."""
    return change_GKC.abs().mean(dim=2, dtype=_real(change_GKC.dtype))


def _sum_of_streams(values_GT: Tensor, streams: int) -> Tensor:
    """The guided streams of a sample share one ranking: (G, T) to (B, T)."""
    return values_GT.view(streams, -1, values_GT.shape[1]).sum(0, dtype=_real(values_GT.dtype))
