"""Drawing tokens: top-k, then top-p, then the inverse of the distribution function at a uniform.

No code is sorted: the k largest logits are, and where equal ones stand is found by counting them.

Shape legend: B images, T tokens of a scale, V codes, K logits that are sorted, Z code channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.settings import SamplingSettings


@dataclass(frozen=True)
class _Place:
    """A code of every token, by ascending (logit, code); each (B, T, 1).

    `rank_BT1` counts the codes of the same logit before it, `below_BT1` is the probability of all
    codes before it.
    """

    logit_BT1: Tensor
    code_BT1: Tensor
    rank_BT1: Tensor
    below_BT1: Tensor


@dataclass(frozen=True)
class Drawn:
    """Drawn tokens and the truncated distribution they come from.

    tokens: code indices (B, T). log_prob_BT: natural log of their probabilities. The distribution
    is the guided logits from `_first` up, and the log of the sum of their exponentials.
    """

    tokens: Tensor
    log_prob_BT: Tensor
    _logits_BTV: Tensor
    _first: _Place
    _log_mass_BT1: Tensor

    @cached_property
    def probs(self) -> Tensor:
        """The truncated distribution by code (B, T, V)."""
        logits_BTV, logit_BT1 = self._logits_BTV, self._first.logit_BT1
        codes_V = torch.arange(logits_BTV.shape[2], device=logits_BTV.device)
        is_dropped_BTV = (logits_BTV == logit_BT1) & (codes_V < self._first.code_BT1)
        is_dropped_BTV |= logits_BTV < logit_BT1
        return (logits_BTV - self._log_mass_BT1).exp_().masked_fill_(is_dropped_BTV, 0)

    def expected_codes(self, codebook_VZ: Tensor) -> Tensor:
        """Mean code vector under the distribution (B, T, Z)."""
        return self.probs.to(codebook_VZ.dtype) @ codebook_VZ

    def entropy(self) -> Tensor:
        """Entropy of the distribution in nats (B, T)."""
        entropy_BT: Tensor = torch.special.entr(self.probs).sum(dim=2)
        return entropy_BT

    def spread(self, codebook_VZ: Tensor) -> Tensor:
        """Variance of the code vector under the distribution, summed over its channels (B, T)."""
        squares_V1 = codebook_VZ.square().sum(dim=1, keepdim=True)
        with_squares_VZ = torch.cat([codebook_VZ, squares_V1], dim=1)
        means = self.probs.to(codebook_VZ.dtype) @ with_squares_VZ
        spread_BT: Tensor = means[:, :, -1] - means[:, :, :-1].square().sum(dim=2)
        return spread_BT


def draw_tokens(logits_BTV: Tensor, uniforms_BT: Tensor, settings: SamplingSettings) -> Drawn:
    """Draw one token per position from guided logits (float32 or float64).

    Top-k keeps every code whose logit is at least the k-th largest. Top-p then drops, from the
    least likely up, the codes whose cumulative probability is at most 1 - p, and always keeps the
    likeliest. Equal logits stand in the order of their codes. The uniform number picks from what is
    left, laid out by ascending (logit, code).
    """
    ascending_BTK, scores_BTK = _largest(logits_BTV, settings.top_k)
    # A zero in front: what lies below a place is what stands at it.
    cumulative_BTK = F.pad(scores_BTK.softmax(dim=2).cumsum(dim=2), (1, 0))
    total_BT1 = cumulative_BTK[:, :, -1:]
    left_out_BT1 = torch.full_like(total_BT1, 1 - settings.top_p)
    first = _place_at(left_out_BT1, logits_BTV, ascending_BTK, cumulative_BTK)
    uniforms_BT1 = uniforms_BT[:, :, None].to(total_BT1.dtype)
    target_BT1 = first.below_BT1 + uniforms_BT1 * (total_BT1 - first.below_BT1)
    drawn = _place_at(target_BT1, logits_BTV, ascending_BTK, cumulative_BTK, at_least=first)
    kept_BTK = scores_BTK.masked_fill(ascending_BTK < first.logit_BT1, -torch.inf)
    log_mass_BT1 = kept_BTK.logsumexp(dim=2, keepdim=True)
    dropped_equals_BT1 = first.rank_BT1 * (first.logit_BT1 - log_mass_BT1).exp()
    log_mass_BT1 = log_mass_BT1 + torch.log1p(-dropped_equals_BT1)
    return Drawn(
        tokens=drawn.code_BT1[:, :, 0],
        log_prob_BT=(drawn.logit_BT1 - log_mass_BT1)[:, :, 0].clamp(max=0),
        _logits_BTV=logits_BTV,
        _first=first,
        _log_mass_BT1=log_mass_BT1,
    )


def _largest(logits_BTV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits ascending, and what they score (B, T, K).

    More codes may have the k-th logit than are among the k: those that are score for all of them.
    """
    if not 0 < top_k < logits_BTV.shape[2]:
        ascending_BTK = logits_BTV.sort(dim=2).values
        return ascending_BTK, ascending_BTK
    ascending_BTK = logits_BTV.topk(top_k, dim=2).values.flip(2)
    kth_BT1 = ascending_BTK[:, :, :1]
    is_kth_BTK = ascending_BTK == kth_BT1
    num_equal_BT1, num_held_BT1 = (
        is_kth.sum(dim=2, keepdim=True, dtype=torch.int32).to(logits_BTV.dtype)
        for is_kth in (logits_BTV == kth_BT1, is_kth_BTK)
    )
    for_all_BTK = ascending_BTK + (num_equal_BT1 / num_held_BT1).log()
    return ascending_BTK, torch.where(is_kth_BTK, for_all_BTK, ascending_BTK)


def _place_at(
    target_BT1: Tensor,
    logits_BTV: Tensor,
    ascending_BTK: Tensor,
    cumulative_BTK: Tensor,
    *,
    at_least: _Place | None = None,
) -> _Place:
    """The first code whose cumulative probability exceeds a target, else the last one.

    `cumulative_BTK` begins with a zero. `at_least` is the first place there is: rounding may put a
    target of its own probability one code before it.
    """
    last = ascending_BTK.shape[2] - 1
    slot_BT1 = torch.searchsorted(cumulative_BTK[:, :, 1:].contiguous(), target_BT1, right=True)
    logit_BT1 = ascending_BTK.gather(2, slot_BT1.clamp(max=last))
    begin_BT1, end_BT1 = (
        torch.searchsorted(ascending_BTK, logit_BT1, right=right) for right in (False, True)
    )
    below_BT1, through_BT1 = (cumulative_BTK.gather(2, edge) for edge in (begin_BT1, end_BT1))
    equals_BTV = (logits_BTV == logit_BT1).cumsum(dim=2, dtype=torch.int32)
    num_equal_BT1 = equals_BTV[:, :, -1:]
    share_BT1 = (target_BT1 - below_BT1) / (through_BT1 - below_BT1)
    rank_BT1 = (share_BT1 * num_equal_BT1).to(torch.int32)
    if at_least is not None:
        is_first_BT1 = logit_BT1 == at_least.logit_BT1
        rank_BT1 = rank_BT1.maximum(at_least.rank_BT1 * is_first_BT1)
    rank_BT1 = rank_BT1.minimum(num_equal_BT1 - 1).clamp(min=0)
    code_BT1 = torch.searchsorted(equals_BTV, rank_BT1, right=True)
    prob_BT1 = (through_BT1 - below_BT1) / num_equal_BT1
    return _Place(
        logit_BT1,
        code_BT1.clamp(max=logits_BTV.shape[2] - 1),
        rank_BT1,
        below_BT1 + rank_BT1 * prob_BT1,
    )
