"""Drawing tokens: top-k, then top-p, then the inverse of the distribution function at a uniform.

Shape legend: B images, T tokens of a scale, V codes, Z code channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depthvar.config import SamplingSettings


@dataclass(frozen=True)
class Drawn:
    """Drawn tokens and the truncated distribution they come from.

    tokens_BT: code indices. log_prob_BT: natural log of their probabilities. probs_BTV: the
    truncated distribution by ascending (logit, code), with the codes in `codes_BTV`.
    """

    tokens_BT: Tensor
    log_prob_BT: Tensor
    probs_BTV: Tensor
    codes_BTV: Tensor

    def expected_codes(self, codebook_VZ: Tensor) -> Tensor:
        """Mean code vector under the distribution (B, T, Z)."""
        return self._by_code().to(codebook_VZ.dtype) @ codebook_VZ

    def entropy(self) -> Tensor:
        """Entropy of the distribution in nats (B, T)."""
        entropy_BT: Tensor = torch.special.entr(self.probs_BTV).sum(dim=2)
        return entropy_BT

    def spread(self, codebook_VZ: Tensor) -> Tensor:
        """Variance of the code vector under the distribution, summed over its channels (B, T)."""
        probs_BTV = self._by_code().to(codebook_VZ.dtype)
        squares_V1 = codebook_VZ.square().sum(dim=1, keepdim=True)
        means = probs_BTV @ torch.cat([codebook_VZ, squares_V1], dim=1)
        spread_BT: Tensor = means[:, :, -1] - means[:, :, :-1].square().sum(dim=2)
        return spread_BT

    def _by_code(self) -> Tensor:
        """The distribution by code (B, T, V)."""
        return torch.zeros_like(self.probs_BTV).scatter_(2, self.codes_BTV, self.probs_BTV)


def draw_tokens(logits_BTV: Tensor, uniforms_BT: Tensor, settings: SamplingSettings) -> Drawn:
    """Draw one token per position from guided logits (float32 or float64).

    Top-k keeps every code whose logit is at least the k-th largest. Top-p then drops, from the
    least likely up, the codes whose cumulative probability is at most 1 - p, and always keeps the
    likeliest. Equal logits stand in the order of their codes. The uniform number picks from what is
    left, laid out by ascending (logit, code).
    """
    num_codes = logits_BTV.shape[2]
    ascending_BTV, codes_BTV = logits_BTV.sort(dim=2, stable=True)
    if 0 < settings.top_k < num_codes:
        kth = ascending_BTV[:, :, num_codes - settings.top_k, None]
        ascending_BTV = ascending_BTV.masked_fill(ascending_BTV < kth, -torch.inf)
    probs_BTV = ascending_BTV.softmax(dim=2)
    cumulative_BTV = probs_BTV.cumsum(dim=2)
    dropped_BTV = cumulative_BTV <= 1 - settings.top_p
    dropped_BTV[:, :, -1] = False
    removed_BT1 = cumulative_BTV.masked_fill(~dropped_BTV, 0).amax(dim=2, keepdim=True)
    kept_BT1 = cumulative_BTV[:, :, -1:] - removed_BT1
    target_BT1 = removed_BT1 + uniforms_BT[:, :, None].to(kept_BT1.dtype) * kept_BT1
    place_BT1 = torch.searchsorted(cumulative_BTV, target_BT1, right=True).clamp(max=num_codes - 1)
    probs_BTV = probs_BTV.masked_fill(dropped_BTV, 0)
    probs_BTV = probs_BTV / probs_BTV.sum(dim=2, keepdim=True)
    return Drawn(
        tokens_BT=codes_BTV.gather(2, place_BT1)[:, :, 0],
        log_prob_BT=probs_BTV.gather(2, place_BT1)[:, :, 0].log(),
        probs_BTV=probs_BTV,
        codes_BTV=codes_BTV,
    )
