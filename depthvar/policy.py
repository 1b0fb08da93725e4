"""Depth policies as values: how many blocks each token runs, and what stands in for the rest.

One frozen value describes every policy the engine can run; the published method, ours and the
baselines are presets of it. (P) marks what the paper fixes, (R) our reading where it leaves room.

Source: Li, Zhao, Cao, "Depth Adaptive Efficient Visual Autoregressive Modeling" (arXiv 2604.17286).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from depthvar.errors import InputError

Schedule = Literal["constant", "linear", "power", "cosine", "octaves", "step"]
Ranking = Literal["change", "distance", "entropy", "log-probability", "spread", "random"]
Proxy = Literal["none", "raw", "calibrated", "output"]
Blending = Literal["none", "score", "mean", "pruned"]
SkippedKeysValues = Literal["none", "proxy"]
BlockOrder = Literal["bit-reversal", "first", "ends"]
Allocation = Literal["reference", "equal", "coarse-first", "least"]

MAX_COMPENSATION = 4 / 3


@dataclass(frozen=True)
class DepthPolicy:
    """How the depth of tokens is chosen.

    preset: name this value was made from; a label only.
    reference_scale: R, the last scale at full depth, 0-based; later scales may spend what scale R
        spent (P). None: every scale runs at full depth.
    allocation: how the later scales share what they may spend in sum: each what scale R spends, so
        that the mean depth falls as scales grow (P), all at the same mean depth, each in turn as
        much as full depth (or `kept_depth`) takes until nothing is left, or nothing: every token
        runs `min_depth` blocks.
    schedule: family of the scheduling function G (P). `octaves` gives every token one of two
        neighbouring depths of L, L/2, L/4 ..., whose bit-reversed blocks are evenly spaced.
    steepness: how far G departs from constant, in [0, 1]; `linear` and `cosine` only.
    kept_depth: share of the blocks that a kept token of schedule `step` runs, in (0, 1]; more
        where the budget could not be spent otherwise. 1 is pruning, the mean depth uniform depth.
    rotation: fraction of a turn by which the percentiles move on from one scale to the next (R).
    ranking: what orders the tokens, lowest first: the feature change of the previous scale (P), the
        distance from the scale's mean feature (FastVAR), or, of the distribution that the previous
        scale's token at that place was drawn from, its entropy, the surprise -log p of what was
        drawn or the variance of the code vectors; or random numbers of the sample's own stream.
    separate_ranking: rank the conditional and the unconditional stream of a sample each by its own
        change or distance, in place of the sum of both (R).
    proxy: what a skipped token takes at a block: nothing, the previous scale's change (P), that
        change after a least-squares fit, or, at the end, the previous scale's output (FastVAR).
    blending: weight of the drawn code: full, the depth score S (P), S with the expected code in
        place of the rest, or full but for pruned tokens, those that run no block, which take the
        expected code.
    skipped_keys_values: whether skipped tokens still make keys and values, from their proxies.
    compensation: scale what a block adds by min(4/3, sqrt(L / depth)).
    block_order: which blocks a token of depth d runs: bit-reversed (P), the first d, or
        alternately from both ends.
    dither: spend the budget exactly: depth floor(S L + percentile) in place of floor(S L) (P), so
        that a fraction of a block becomes one whole block for that fraction of the tokens.
    min_depth: blocks that every token runs at least.
    skip_last_scales: scales at the end that are not sampled at all.
    """

    preset: str = "full"
    reference_scale: int | None = None
    allocation: Allocation = "reference"
    schedule: Schedule = "constant"
    steepness: float = 1.0
    kept_depth: float = 1.0
    rotation: float = 0.0
    ranking: Ranking = "change"
    separate_ranking: bool = False
    proxy: Proxy = "none"
    blending: Blending = "none"
    skipped_keys_values: SkippedKeysValues = "none"
    compensation: bool = False
    block_order: BlockOrder = "bit-reversal"
    dither: bool = False
    min_depth: int = 0
    skip_last_scales: int = 0

    def __post_init__(self) -> None:
        """Refuse what no model could run, as `InputError`."""
        for name, hint in get_type_hints(DepthPolicy).items():
            allowed = get_args(hint)
            value = getattr(self, name)
            if allowed and all(isinstance(a, str) for a in allowed) and value not in allowed:
                wanted = ", ".join(allowed)
                raise InputError(f"policy {name} is {value!r}, wanted one of {wanted}: correct it")
        if not 0.0 <= self.steepness <= 1.0:
            raise InputError(f"policy steepness is {self.steepness}, wanted 0..1: correct it")
        if not 0.0 < self.kept_depth <= 1.0:
            raise InputError(
                f"policy kept_depth is {self.kept_depth}, wanted 0 < x <= 1: correct it"
            )
        if self.kept_depth < 1.0 and self.schedule != "step":
            raise InputError(
                f"policy kept_depth {self.kept_depth} with schedule {self.schedule!r}, which keeps "
                "and prunes nothing: use schedule 'step' or leave kept_depth out"
            )
        if not 0.0 <= self.rotation < 1.0:
            raise InputError(f"policy rotation is {self.rotation}, wanted 0 <= x < 1: correct it")
        if self.min_depth < 0 or self.skip_last_scales < 0:
            raise InputError(
                f"policy min_depth is {self.min_depth} and skip_last_scales "
                f"{self.skip_last_scales}, wanted both >= 0: correct them"
            )
        if self.allocation == "least" and not self.min_depth:
            raise InputError(
                "policy allocation 'least' with min_depth 0 leaves the later scales no block: "
                "give min_depth"
            )
        if self.separate_ranking and self.ranking not in ("change", "distance"):
            raise InputError(
                f"policy separate_ranking with ranking {self.ranking!r}, which a sample's streams "
                "share: use ranking 'change' or 'distance', or leave separate_ranking out"
            )
        if self.proxy == "output" and self.schedule != "step":
            raise InputError(
                f"policy proxy 'output' with schedule {self.schedule!r}: it restores the "
                "pruned tokens, so use schedule 'step' or another proxy"
            )

    @property
    def uses_expected_codes(self) -> bool:
        """Whether some tokens take the expected code in place of the drawn one, or of a part."""
        return self.blending in ("mean", "pruned")


GOLDEN_ROTATION = 0.381966
"""Fraction of a turn whose multiples spread most evenly over the circle."""

_PRESETS: dict[str, DepthPolicy] = {
    policy.preset: policy
    for policy in (
        DepthPolicy("full"),
        DepthPolicy(
            "depthvar",
            reference_scale=4,
            allocation="equal",
            schedule="octaves",
            ranking="spread",
            compensation=True,
        ),
        DepthPolicy(
            "depthvar-paper",
            reference_scale=4,
            schedule="linear",
            rotation=GOLDEN_ROTATION,
            proxy="raw",
            blending="score",
        ),
        DepthPolicy(
            "hard-pruning",
            reference_scale=4,
            schedule="step",
            ranking="distance",
            proxy="output",
        ),
        DepthPolicy(
            "spread-pruning",
            reference_scale=4,
            allocation="coarse-first",
            schedule="step",
            ranking="spread",
            proxy="output",
            blending="mean",
        ),
        DepthPolicy(
            "shallow-pruning",
            reference_scale=4,
            schedule="step",
            kept_depth=0.75,
            ranking="distance",
            proxy="output",
            blending="pruned",
        ),
        DepthPolicy(
            "random-pruning",
            reference_scale=4,
            schedule="step",
            ranking="random",
            proxy="output",
        ),
        DepthPolicy(
            "random-depth",
            reference_scale=4,
            schedule="linear",
            ranking="random",
            compensation=True,
        ),
        DepthPolicy("uniform", reference_scale=4, allocation="equal", compensation=True),
        DepthPolicy("skip-scales", skip_last_scales=1),
    )
}

PRESETS: tuple[str, ...] = tuple(_PRESETS)

DEFAULT_PRESET = "depthvar"
"""What the jobs use unless they are told another; the README says why."""


def make_policy(
    preset: str, *, reference_scale: int | None = None, **overrides: Any
) -> DepthPolicy:
    """A preset with fields replaced; `InputError` names the known presets and fields."""
    if preset not in _PRESETS:
        raise InputError(
            f"unknown policy {preset!r}, wanted one of {', '.join(PRESETS)}: check --policy"
        )
    known = {field.name for field in fields(DepthPolicy)} - {"preset", "reference_scale"}
    for name in overrides:
        if name not in known:
            raise InputError(
                f"unknown policy option {name!r}, wanted some of {', '.join(sorted(known))}: "
                "check the policy options"
            )
    base = _PRESETS[preset]
    if reference_scale is not None:
        if base.reference_scale is None:
            raise InputError(
                f"policy {preset!r} has no reference scale and got {reference_scale}: leave "
                "--reference-scale out or choose an adaptive policy"
            )
        overrides["reference_scale"] = reference_scale
    return replace(base, **overrides)
