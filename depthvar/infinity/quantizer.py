"""Infinity's bitwise quantizer: every token is a vector of bits, each drawn on its own.

Shape legend: B images, T tokens of a scale, D bits of a token, Z channels of the feature map, P
cells of the map that a token covers along a side (D = Z P P), H W sides of the map.

Source: Han et al., arXiv 2412.04431, section 3.2; the public tokenizers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.infinity_config import InfinityConfig
from depthvar.settings import Grid, SamplingSettings


@dataclass(frozen=True)
class DrawnBits:
    """Drawn bits, and the probabilities of ones that they were drawn with.

    tokens: (B, T, D) bool. log_prob_BT: natural log of the probability of all bits of a token.
    """

    tokens: Tensor
    log_prob_BT: Tensor
    ones_BTD: Tensor

    def entropy(self) -> Tensor:
        """Entropy of the token in nats (B, T): the bits are independent."""
        each_BTD = torch.special.entr(self.ones_BTD) + torch.special.entr(1 - self.ones_BTD)
        entropy_BT: Tensor = each_BTD.sum(dim=2)
        return entropy_BT


def draw_bits(logits_BTV: Tensor, uniforms_BTD: Tensor, settings: SamplingSettings) -> DrawnBits:
    """Draw every bit from its two logits, which stand side by side: of zero, of one.

    Top-p drops the less likely value where its probability is at most 1 - p; of two values top-k
    can drop none but for k = 1. Among what is left a one is drawn where the uniform number reaches
    the probability of a zero.
    """
    logits_BTD2 = logits_BTV.unflatten(2, (-1, 2))
    margin_BTD = logits_BTD2[..., 1] - logits_BTD2[..., 0]
    ones_BTD = margin_BTD.sigmoid()
    least = 0.5 if settings.top_k == 1 else 1 - settings.top_p
    # Of a likely one it is the other's probability that is small and exact.
    rarer_BTD = (-margin_BTD.abs()).sigmoid()
    ones_BTD = torch.where(rarer_BTD <= least, (margin_BTD > 0).to(ones_BTD.dtype), ones_BTD)
    # Not in float32, where the greatest uniform number is 1.
    bits_BTD = uniforms_BTD >= (1 - ones_BTD).to(uniforms_BTD.dtype)
    drawn_BTD = torch.where(bits_BTD, ones_BTD, 1 - ones_BTD)
    return DrawnBits(bits_BTD, drawn_BTD.log().sum(dim=2), ones_BTD)


class BitQuantizer:
    """From logits to bits, to codes of +-1/sqrt(Z), to the feature map. Has no weights."""

    def __init__(self, config: InfinityConfig) -> None:
        self._config = config
        self.draws_per_token = config.bits
        self.magnitude = 1 / math.sqrt(config.map_channels)

    def draw(
        self, logits_BTV: Tensor, uniforms_BU: Tensor, settings: SamplingSettings
    ) -> DrawnBits:
        """Draw the bits of a scale; `uniforms_BU` holds one number per token and bit."""
        uniforms_BTD = uniforms_BU.unflatten(1, (-1, self._config.bits))
        return draw_bits(logits_BTV, uniforms_BTD, settings)

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the feature map."""
        return self._config.map_channels, *self._config.map_size

    def codes(self, tokens_BTD: Tensor, dtype: torch.dtype) -> Tensor:
        """The code vectors of bits (B, T, D)."""
        return (tokens_BTD.to(dtype) * 2 - 1) * self.magnitude

    def expected_codes(self, drawn: DrawnBits) -> Tensor:
        """Mean code vectors (B, T, D)."""
        return (drawn.ones_BTD * 2 - 1) * self.magnitude

    def spread(self, drawn: DrawnBits) -> Tensor:
        """Variance of the code vectors, summed over their channels (B, T)."""
        variance_BTD = 4 * drawn.ones_BTD * (1 - drawn.ones_BTD) * self.magnitude**2
        spread_BT: Tensor = variance_BTD.sum(dim=2)
        return spread_BT

    def contribution(self, scale: int, codes_BTD: Tensor) -> Tensor:
        """What the code vectors of a scale add to the feature map (B, Z, H, W): bilinear."""
        rows, columns = self._config.grids[scale]
        h_BDhw = codes_BTD.transpose(1, 2).unflatten(2, (rows, columns))
        return _resized(F.pixel_shuffle(h_BDhw, self._config.patch), self._config.map_size)

    def input_of_scale(self, scale: int, feature_map_BZHW: Tensor) -> Tensor:
        """The feature map resized to the grid of a scale, as tokens (B, T, D): bilinear too."""
        rows, columns = self._config.grids[scale]
        patch = self._config.patch
        h_BZhw = _resized(feature_map_BZHW, (rows * patch, columns * patch))
        return F.pixel_unshuffle(h_BZhw, patch).flatten(2).transpose(1, 2)


def _resized(h_BZhw: Tensor, size: Grid) -> Tensor:
    """Bilinear, without anti-aliasing: growing and shrinking read four values each."""
    if h_BZhw.shape[2:] == size:
        return h_BZhw
    return F.interpolate(h_BZhw, size=size, mode="bilinear", align_corners=False)
