"""The parts that depth policies are made of, each a value: presets choose them, studies vary them.

(P) marks what the paper fixes, (R) our reading where it leaves room.

Source: Li, Zhao, Cao, "Depth Adaptive Efficient Visual Autoregressive Modeling" (arXiv 2604.17286).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

Schedule = Literal["constant", "linear", "power", "cosine", "octaves", "step"]
Ranking = Literal["change", "distance", "entropy", "log-probability", "spread", "random"]
SkippedKeysValues = Literal["none", "proxy"]
BlockOrder = Literal["bit-reversal", "first", "ends", "last-ends"]
Allocation = Literal["reference", "equal", "coarse-first", "least"]


@dataclass(frozen=True, kw_only=True)
class PolicyKnobs:
    """What a preset settles and a study may vary; no flag of the product does.

    allocation: how the later scales share what they may spend in sum: each what scale R spends, so
        that the mean depth falls as scales grow (P), all at the same mean depth, each in turn as
        much as full depth (or `kept_depth`) takes until nothing is left, or nothing: every token
        runs `min_depth` blocks.
    mean_depths: mean depth of each scale after R as a share of the blocks, in [0, 1], in place of
        what `allocation` gives; scales behind the last one named run at full depth.
    schedule: family of the scheduling function G (P). `octaves` gives every token one of two
        neighbouring depths of L, L/2, L/4 ..., whose bit-reversed blocks are evenly spaced.
    steepness: how far G departs from constant, in [0, 1]; `linear` and `cosine` only.
    rotation: fraction of a turn by which the percentiles move on from one scale to the next (R).
    ranking: what orders the tokens, lowest first: the feature change of the previous scale (P), the
        distance from the scale's mean feature (FastVAR), or, of the distribution that the previous
        scale's token at that place was drawn from, its entropy, the surprise -log p of what was
        drawn or the variance of the code vectors; or random numbers of the sample's own stream.
    separate_ranking: rank the conditional and the unconditional stream of a sample each by its own
        change or distance, in place of the sum of both (R).
    skipped_keys_values: whether skipped tokens still make keys and values, from their proxies.
    compensation: scale what a block adds by min(4/3, sqrt(L / depth)).
    block_order: which blocks a token of depth d runs: bit-reversed (P), the first d, or
        alternately from both ends, the first (`ends`) or the last block (`last-ends`) before all.
    dither: spend the budget exactly: depth floor(S L + percentile) in place of floor(S L) (P), so
        that a fraction of a block becomes one whole block for that fraction of the tokens.
    min_depth: blocks that every token runs at least.
    """

    allocation: Allocation = "reference"
    mean_depths: tuple[float, ...] = ()
    schedule: Schedule = "constant"
    steepness: float = 1.0
    rotation: float = 0.0
    ranking: Ranking = "change"
    separate_ranking: bool = False
    skipped_keys_values: SkippedKeysValues = "none"
    compensation: bool = False
    block_order: BlockOrder = "bit-reversal"
    dither: bool = False
    min_depth: int = 0

    @property
    def ranks_by_distribution(self) -> bool:
        """Whether tokens are ordered by what the last scale's tokens were drawn from."""
        return self.ranking in ("entropy", "log-probability", "spread")

    def mistakes(self) -> Iterator[str]:
        """What no model could run, each in words that follow "policy"."""
        for name, hint in get_type_hints(type(self)).items():
            allowed, value = get_args(hint), getattr(self, name)
            if allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
                yield f"{name} is {value!r}, wanted one of {', '.join(allowed)}: correct it"
        if not 0.0 <= self.steepness <= 1.0:
            yield f"steepness is {self.steepness}, wanted 0..1: correct it"
        if not 0.0 <= self.rotation < 1.0:
            yield f"rotation is {self.rotation}, wanted 0 <= x < 1: correct it"
        if self.min_depth < 0:
            yield f"min_depth is {self.min_depth}, wanted >= 0: correct it"
        if not all(0.0 <= depth <= 1.0 for depth in self.mean_depths):
            yield f"mean_depths are {self.mean_depths}, wanted 0..1 each: correct them"
        if self.mean_depths and self.allocation != "reference":
            yield f"mean_depths with allocation {self.allocation!r}: leave one of them out"
        if self.allocation == "least" and not self.min_depth:
            yield (
                "allocation 'least' with min_depth 0 leaves the later scales no block: "
                "give min_depth"
            )
        if self.separate_ranking and self.ranking not in ("change", "distance"):
            yield (
                f"separate_ranking with ranking {self.ranking!r}, which a sample's streams share: "
                "use ranking 'change' or 'distance', or leave separate_ranking out"
            )
