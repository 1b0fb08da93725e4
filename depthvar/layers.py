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

from depthvar.pointwise import Layer, unit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConditionT = TypeVar("ConditionT", bound="DataclassInstance")
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q_GHKD, k_GHKD, v_GHKD, scale_1H11) of the tokens given to a block -> attention output_GHKD.

Queries and keys come as a product gave them: the keys are brought to length 1, the queries to that
of the scale. The cache or the mask is its business.
"""
_TreeT = TypeVar("_TreeT")
_MAX_LOG_SCALE = math.log(100.0)


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


def heads(x_GKC: Tensor, num_heads: int) -> Tensor:
    """(G, K, C) to (G, H, K, D)."""
    return x_GKC.view(*x_GKC.shape[:2], num_heads, -1).transpose(1, 2)


def unrounded(layer: nn.Linear, x_GTC: Tensor) -> Tensor:
    """A linear layer whose sums are never rounded to half precision, as the logits need it."""
    if layer.weight.dtype in (torch.float32, torch.float64):
        return at_least_float32(layer(x_GTC))
    bias_V = layer.bias.float()
    if x_GTC.is_cuda:  # the product's sums are float32 already, and can be had at no cost
        flat_NV = torch.mm(x_GTC.flatten(0, 1), layer.weight.t(), out_dtype=torch.float32)
        return flat_NV.view(*x_GTC.shape[:2], -1) + bias_V
    return F.linear(x_GTC.float(), layer.weight.float(), bias_V)


@tree_of_tensors
@dataclass(frozen=True)
class AttentionConstants:
    """What an attention makes of its parameters: bias of queries, keys and values, query scale."""

    bias_M: Tensor
    scale_1H11: Tensor


class Attention(nn.Module):
    """Multi-head attention with L2-normalised queries and keys and a learned scale per head.

    Keys that are still to be turned stay in at least float32, to be rounded then.
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
        wide = torch.promote_types(k_GHKD.dtype, torch.float32)
        return unit(k_GHKD, wide if self.turns else k_GHKD.dtype), v_GHKD

    def forward(self, x_GKC: Tensor, constants: AttentionConstants, attend: Attend) -> Tensor:
        """Attend through `attend`, which owns the cache or the mask."""
        qkv_GKM = F.linear(x_GKC, self.mat_qkv.weight, constants.bias_M)
        q, k, v = (heads(part_GKC, self.num_heads) for part_GKC in qkv_GKM.chunk(3, dim=2))
        out_GHKD = attend(q, k, v, constants.scale_1H11)
        projected: Tensor = self.proj(out_GHKD.transpose(1, 2).flatten(2))
        return projected


class FeedForward(Layer):
    """Two linear layers around a tanh GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_GKC: Tensor) -> Tensor:
        """(G, K, C) to the same shape."""
        out: Tensor = self.fc2(self.pointwise.linear_gelu(self.fc1, x_GKC))
        return out


class HeadNorm(Layer):
    """LayerNorm before the output layer, with conditional scale and shift."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.norm_eps = eps
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_GTC: Tensor, scale_G1C: Tensor, shift_G1C: Tensor) -> Tensor:
        """(G, T, C) to the same shape."""
        dtype = next(self.parameters()).dtype
        return self.pointwise.modulated(x_GTC, scale_G1C, shift_G1C, eps=self.norm_eps, dtype=dtype)
