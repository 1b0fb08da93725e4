"""Layers that the transformers have in common, and what they keep in float32.

Shape legend: G stream rows, T tokens of a scale, K active tokens, C width, H heads, D head
channels, V outputs, M = 3C rows of the fused queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConditionT = TypeVar("ConditionT", bound="DataclassInstance")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_GHKD, k_GHKD, v_GHKD) of the tokens given to a block -> attention output_GHKD."""
_TreeT = TypeVar("_TreeT")
_MAX_LOG_SCALE = math.log(100.0)
_LEAST_LENGTH = 1e-12


def tree_of_tensors(cls: type[_TreeT]) -> type[_TreeT]:
    """Let torch walk through the tensors of a dataclass, as through those of a tuple."""
    torch.export.register_dataclass(cls)
    return cls


def first_rows(condition: ConditionT, count: int) -> ConditionT:
    """A dataclass with its tensors, all of which are of stream rows, cut to the first as views."""
    rows = {name: x[:count] for name, x in vars(condition).items() if isinstance(x, Tensor)}
    return replace(condition, **rows)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


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


def heads(x_GKC: Tensor, num_heads: int) -> Tensor:
    """(G, K, C) to (G, H, K, D)."""
    return x_GKC.view(*x_GKC.shape[:2], num_heads, -1).transpose(1, 2)


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


def unrounded(layer: nn.Linear, x_GTC: Tensor) -> Tensor:
    """A linear layer whose sums are never rounded to half precision, as the logits need it."""
    if layer.weight.dtype in (torch.float32, torch.float64):
        return at_least_float32(layer(x_GTC))
    bias_V = layer.bias.float()
    if x_GTC.is_cuda:  # the product's sums are float32 already, and can be had at no cost
        flat_NV = torch.mm(x_GTC.flatten(0, 1), layer.weight.t(), out_dtype=torch.float32)
        return flat_NV.view(*x_GTC.shape[:2], -1) + bias_V
    return F.linear(x_GTC.float(), layer.weight.float(), bias_V)


def modulated(
    x_GTC: Tensor, scale_G1C: Tensor, shift_G1C: Tensor, *, eps: float, dtype: torch.dtype
) -> Tensor:
    """Layer norm with conditional scale and shift (AdaLN), rounded once, to `dtype`."""
    normed = F.layer_norm(x_GTC, x_GTC.shape[-1:], eps=eps)
    return _rounded(torch.addcmul, shift_G1C, normed, scale_G1C, dtype=dtype)


@tree_of_tensors
@dataclass(frozen=True)
class AttentionConstants:
    """What an attention makes of its parameters: bias of queries, keys and values, query scale."""

    bias_M: Tensor
    scale_1H11: Tensor


class Attention(nn.Module):
    """Multi-head attention with L2-normalised queries and keys and a learned scale per head.

    Queries and keys that `attend` is to turn reach it in at least float32, to be rounded by it.
    """

    def __init__(self, width: int, num_heads: int, *, turns: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.turns = turns
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def constants(self) -> AttentionConstants:
        """What every call needs of the parameters beside the weights."""
        bias_M = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        scale_1H11 = self.scale_mul_1H11.clamp(max=_MAX_LOG_SCALE).exp()
        return AttentionConstants(bias_M, scale_1H11)

    def keys_values(self, x_GKC: Tensor, constants: AttentionConstants) -> tuple[Tensor, Tensor]:
        """Unit keys and values, each (G, H, K, D)."""
        width = x_GKC.shape[2]
        weight, bias = self.mat_qkv.weight[width:], constants.bias_M[width:]
        k_GKC, v_GKC = F.linear(x_GKC, weight, bias).chunk(2, dim=2)
        k_GHKD, v_GHKD = heads(k_GKC, self.num_heads), heads(v_GKC, self.num_heads)
        return unit(k_GHKD, self._unit_dtype(k_GHKD)), v_GHKD

    def forward(self, x_GKC: Tensor, constants: AttentionConstants, attend: Attend) -> Tensor:
        """Attend through `attend`, which owns the cache or the mask."""
        qkv_GKM = F.linear(x_GKC, self.mat_qkv.weight, constants.bias_M)
        q, k, v = (heads(part_GKC, self.num_heads) for part_GKC in qkv_GKM.chunk(3, dim=2))
        dtype = self._unit_dtype(qkv_GKM)
        out_GHKD = attend(unit(q, dtype, constants.scale_1H11), unit(k, dtype), v)
        projected: Tensor = self.proj(out_GHKD.transpose(1, 2).flatten(2))
        return projected

    def _unit_dtype(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, torch.float32) if self.turns else x.dtype


class FeedForward(nn.Module):
    """Two linear layers around a tanh GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_GKC: Tensor) -> Tensor:
        """(G, K, C) to the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x_GKC), approximate="tanh"))
        return out


class HeadNorm(nn.Module):
    """LayerNorm before the output layer, with conditional scale and shift."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm_eps = eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_GTC: Tensor, scale_G1C: Tensor, shift_G1C: Tensor) -> Tensor:
        """(G, T, C) to the same shape."""
        dtype = next(self.parameters()).dtype
        return modulated(x_GTC, scale_G1C, shift_G1C, eps=self.norm_eps, dtype=dtype)
