"""Layers that the transformers have in common, and what they keep in float32.

Shape legend: G stream rows, T tokens of a scale, K active tokens, C width, H heads, D head
channels, V outputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MAX_LOG_SCALE = math.log(100.0)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x_GHKD: Tensor) -> Tensor:
    """The vectors at length 1, in at least float32: half precision would round the length first."""
    return F.normalize(at_least_float32(x_GHKD), dim=-1)


def query_scale(log_scale_1H11: Tensor) -> Tensor:
    """What the unit queries of every head are multiplied by."""
    return log_scale_1H11.clamp(max=_MAX_LOG_SCALE).exp()


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
    return torch.addcmul(shift_G1C, normed, scale_G1C).to(dtype)


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
