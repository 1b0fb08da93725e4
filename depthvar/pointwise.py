"""What lies between the products of a model, as torch does it; `triton_pointwise` is its sibling.

Shape legend: G stream rows, T tokens of a scale, K active tokens, C width, F hidden width, H heads,
D head channels, B images, N channels of a map of sides I J.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
_LEAST_LENGTH = 1e-12


@dataclass(frozen=True)
class Change:
    """What is added to the stream of some tokens: `base + branch * gate`, times `compensation`.

    base, branch (G, K, C), gate (G, 1, C), compensation (K, 1). Tensors of the receiver's own. The
    parts stay apart where one pass takes them together (`Pointwise.gated_sum`).
    """

    base_GKC: Tensor
    branch_GKC: Tensor | None = None
    gate_G1C: Tensor | None = None
    compensation_K1: Tensor | None = None

    def whole(self) -> Tensor:
        """The change as one tensor, which may be `base_GKC`, changed in place."""
        change_GKC = self.base_GKC
        if self.branch_GKC is not None and self.gate_G1C is not None:
            change_GKC = torch.addcmul(change_GKC, self.branch_GKC, self.gate_G1C)
        if self.compensation_K1 is not None:
            change_GKC *= self.compensation_K1
        return change_GKC


class Pointwise:
    """Every pass over a tensor that the blocks and the decoder make beside products."""

    def runs_on(self, device: torch.device) -> bool:
        """Whether a device can run it."""
        return True

    def modulated(
        self,
        x_GTC: Tensor,
        scale_G1C: Tensor,
        shift_G1C: Tensor,
        *,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Layer norm with conditional scale and shift (AdaLN), rounded once, to `dtype`."""
        normed = F.layer_norm(x_GTC, x_GTC.shape[-1:], eps=eps)
        return _rounded(torch.addcmul, shift_G1C, normed, scale_G1C, dtype=dtype)

    def added_and_modulated(
        self,
        x_GTC: Tensor,
        branch_GTC: Tensor,
        gate_G1C: Tensor | None,
        base_GTC: Tensor | None,
        scale_G1C: Tensor,
        shift_G1C: Tensor,
        *,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """`added = base + branch * gate`, and `x + added` as `modulated` gives it.

        Without a gate it is 1, without a base 0; `added` has the stream's precision.
        """
        added_GTC = branch_GTC if gate_G1C is None else branch_GTC * gate_G1C
        if base_GTC is not None:
            added_GTC = base_GTC + added_GTC
        normed_GTC = self.modulated(x_GTC + added_GTC, scale_G1C, shift_G1C, eps=eps, dtype=dtype)
        return added_GTC, normed_GTC

    def gated_sum(self, base_GKC: Tensor, branch_GKC: Tensor, gate_G1C: Tensor) -> Change:
        """`base + branch * gate`."""
        return Change(torch.addcmul(base_GKC, branch_GKC, gate_G1C))

    def add(
        self, x_GTC: Tensor, total_GT: Tensor, changes: Sequence[Change], *, keep: bool
    ) -> Tensor | None:
        """Add to the first tokens, in place, their changes, one after the other along the tokens.

        Adds to `total_GT` the sums of their absolute values over the channels, at least float32.
        Gives the change of all of these tokens if told to keep it.
        """
        if not changes:
            return None
        wholes = [change.whole() for change in changes]
        change_GKC = torch.cat(wholes, dim=1) if len(wholes) > 1 else wholes[0]
        changed = slice(change_GKC.shape[1])
        x_GTC[:, changed] += change_GKC
        total_GT[:, changed] += torch.linalg.vector_norm(change_GKC, 1, dim=2, dtype=total_GT.dtype)
        return change_GKC if keep else None

    def put_heads(
        self,
        q_GHKD: Tensor,
        k_GHKD: Tensor,
        v_GHKD: Tensor,
        scale_1H11: Tensor,
        rotations_GKD: Tensor | None,
        keys_GHKD: Tensor,
        values_GHKD: Tensor,
    ) -> Tensor:
        """Queries at the length of a scale, in the precision of the values; put keys and values.

        Keys have length 1; both are turned by the rotations, before they are rounded.
        """
        dtype = v_GHKD.dtype
        if rotations_GKD is not None:
            dtype = torch.promote_types(dtype, torch.float32)
        q_GHKD, k_GHKD = unit(q_GHKD, dtype, scale_1H11), unit(k_GHKD, dtype)
        if rotations_GKD is not None:
            q_GHKD, k_GHKD = turned(q_GHKD, rotations_GKD), turned(k_GHKD, rotations_GKD)
        keys_GHKD.copy_(k_GHKD)
        values_GHKD.copy_(v_GHKD)
        return q_GHKD.to(v_GHKD.dtype)

    def linear_gelu(self, layer: nn.Linear, x_GKC: Tensor) -> Tensor:
        """Tanh GELU of a linear layer (G, K, F)."""
        return F.gelu(layer(x_GKC), approximate="tanh")

    def group_norm(self, norm: nn.GroupNorm, x_BNIJ: Tensor, *, silu: bool) -> Tensor:
        """Group norm, and SiLU of it if told so."""
        normed_BNIJ: Tensor = norm(x_BNIJ)
        return F.silu(normed_BNIJ) if silu else normed_BNIJ


PLAIN = Pointwise()


class Layer(nn.Module):
    """A module with pointwise regions."""

    pointwise: Pointwise = PLAIN


def with_pointwise(module: _ModuleT, pointwise: Pointwise) -> _ModuleT:
    """A copy of a module whose layers have other pointwise regions; its tensors are shared."""
    tensors = (*module.parameters(), *module.buffers())
    other = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for layer in other.modules():
        if isinstance(layer, Layer):
            layer.pointwise = pointwise
    return other


def _rounded(operation: Callable[..., Tensor], *operands: Tensor, dtype: torch.dtype) -> Tensor:
    """What an operation on float32 gives, rounded as it is written where no gradient is asked."""
    if dtype in (torch.float32, torch.float64) or torch.is_grad_enabled():
        return operation(*operands).to(dtype)
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands))
    rounded = operands[0].new_empty(shape, dtype=dtype)
    operation(*operands, out=rounded)
    return rounded


def unit(x_GHKD: Tensor, dtype: torch.dtype, scale_1H11: Tensor | None = None) -> Tensor:
    """The vectors at length 1, or at that of a scale, rounded once, to `dtype`.

    Their length is at least float32: half precision would round it first.
    """
    wide = torch.promote_types(x_GHKD.dtype, torch.float32)
    length_GHK1: Tensor = torch.linalg.vector_norm(x_GHKD, dim=-1, keepdim=True, dtype=wide)
    length_GHK1 = length_GHK1.clamp_min(_LEAST_LENGTH)
    divisor_GHK1 = length_GHK1 if scale_1H11 is None else length_GHK1 / scale_1H11
    return _rounded(torch.div, x_GHKD, divisor_GHK1, dtype=dtype)


def turned(x_GHKD: Tensor, rotations_GKD: Tensor) -> Tensor:
    """Rotary positions: pair (2m, 2m + 1) of a head's channels turns by the token's angle m.

    `rotations_GKD` holds the cosines of a token's D / 2 angles, then their sines.
    """
    cos_G1KP, sin_G1KP = rotations_GKD.unsqueeze(1).chunk(2, dim=-1)
    even_GHKP, odd_GHKP = x_GHKD.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = (
        even_GHKP * cos_G1KP - odd_GHKP * sin_G1KP,
        even_GHKP * sin_G1KP + odd_GHKP * cos_G1KP,
    )
    return torch.stack(pairs, dim=-1).flatten(-2)
