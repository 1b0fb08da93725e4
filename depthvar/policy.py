"""Depth policies as values: the presets a user may choose, and the options that change one.

A stored plan holds all fields of a policy, those of `PolicyKnobs` too, as one flat mapping,
`DepthPolicy.as_stored`, which `DepthPolicy(**stored)` takes back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from depthvar.errors import InputError
from depthvar.knobs import PolicyKnobs

Proxy = Literal["none", "raw", "calibrated", "output"]
Blending = Literal["none", "score", "mean", "pruned"]


@dataclass(frozen=True)
class DepthPolicy(PolicyKnobs):
    """How the depth of tokens is chosen; `InputError` for what no model could run.

    preset: name this value was made from; a label only.
    reference_scale: R, the last scale at full depth, 0-based; later scales may spend what scale R
        spent (P). None: every scale runs at full depth.
    blending: weight of the drawn code: full, the depth score S (P), S with the expected code in
        place of the rest, or full but for tokens that run no block, which take the expected code.
    kept_depth: share of the blocks that a kept token of schedule `step` runs, in (0, 1]; more
        where the budget could not be spent otherwise. 1 is pruning, the mean depth uniform depth.
    proxy: what a skipped token takes at a block: nothing, the previous scale's change (P), that
        change after a least-squares fit, or, at the end, the previous scale's output (FastVAR).
    skip_last_scales: scales at the end that are not sampled at all.
    guided_scales: scales at the beginning that run the unconditional stream of guidance; later ones
        run the conditional stream alone. None: all.
    kept_guidance: what stands in for the difference of the two streams' logits at a later scale:
        this share, in [0, 1], of that of the scale before at the token that covers a token. It
        falls from scale to scale unless it is 1; 0 drops guidance.
    """

    preset: str = "full"
    reference_scale: int | None = None
    blending: Blending = "none"
    kept_depth: float = 1.0
    proxy: Proxy = "none"
    skip_last_scales: int = 0
    guided_scales: int | None = None
    kept_guidance: float = 0.0

    def __post_init__(self) -> None:
        for mistake in self.mistakes():
            raise InputError(f"policy {mistake}")

    def mistakes(self) -> Iterator[str]:
        """Those of the knobs first."""
        yield from super().mistakes()
        if not 0.0 < self.kept_depth <= 1.0:
            yield f"kept_depth is {self.kept_depth}, wanted 0 < x <= 1: correct it"
        if self.skip_last_scales < 0:
            yield f"skip_last_scales is {self.skip_last_scales}, wanted >= 0: correct it"
        if not 0.0 <= self.kept_guidance <= 1.0:
            yield f"kept_guidance is {self.kept_guidance}, wanted 0..1: correct it"
        if self.kept_guidance and self.guided_scales is None:
            yield (
                f"kept_guidance is {self.kept_guidance} and every scale is guided: give "
                "guided_scales, or leave it out"
            )
        if self.schedule != "step" and (self.kept_depth < 1.0 or self.proxy == "output"):
            what = "proxy 'output'" if self.proxy == "output" else f"kept_depth {self.kept_depth}"
            yield f"{what} with schedule {self.schedule!r}, which prunes nothing: leave it out"

    @property
    def as_stored(self) -> dict[str, Any]:
        """Every field by its name, but those that older plans lack and that are as in them."""
        fields = sorted(asdict(self).items())
        return {k: v for k, v in fields if k not in _FORMERLY or v != _FORMERLY[k]}

    @property
    def proxies_changes(self) -> bool:
        """Whether skipped tokens take the previous scale's changes, block by block."""
        return self.proxy in ("raw", "calibrated")

    @property
    def uses_expected_codes(self) -> bool:
        """Whether some tokens take the expected code in place of the drawn one, or of a part."""
        return self.blending in ("mean", "pruned")


_FORMERLY: Mapping[str, object] = {
    "mean_depths": (),
    "guided_scales": None,
    "kept_guidance": 0.0,
}
_PRUNING = DepthPolicy(
    "hard-pruning", reference_scale=4, schedule="step", ranking="distance", proxy="output"
)
_UNIFORM = DepthPolicy("uniform", reference_scale=4, allocation="equal", compensation=True)

PRESETS: Mapping[str, DepthPolicy] = {
    policy.preset: policy
    for policy in (
        DepthPolicy("full"),
        replace(_UNIFORM, preset="depthvar", schedule="octaves", ranking="spread"),
        DepthPolicy(
            "depthvar-paper",
            reference_scale=4,
            schedule="linear",
            rotation=0.381966,  # of a turn: its multiples spread most evenly over the circle
            proxy="raw",
            blending="score",
        ),
        _PRUNING,
        replace(
            _PRUNING,
            preset="spread-pruning",
            allocation="coarse-first",
            ranking="spread",
            blending="mean",
        ),
        replace(_PRUNING, preset="shallow-pruning", kept_depth=0.75, blending="pruned"),
        DepthPolicy(
            # As published for Infinity at a million pixels; docs/policies.md tells what differs.
            "fastvar",
            reference_scale=8,
            mean_depths=(0.6, 0.5),
            schedule="step",
            ranking="distance",
            block_order="last-ends",
            min_depth=7,
            proxy="raw",
            skip_last_scales=2,
        ),
        _UNIFORM,
        DepthPolicy("skip-scales", skip_last_scales=1),
    )
}
DEFAULT_PRESET = "depthvar"
"""What the jobs use unless they are told another; the README says why."""
TEXT_PRESET = "depthvar-paper"
"""The same for text models: what the paper measured on Infinity. Here nothing was."""
OPTIONS = (
    "blending",
    "guided_scales",
    "kept_depth",
    "kept_guidance",
    "proxy",
    "skip_last_scales",
)
"""The fields that `--policy-options` may change; a study may change any."""


def make_policy(preset: str, *, reference_scale: int | None = None, **changes: Any) -> DepthPolicy:
    """One of the presets with some of the options changed; `InputError` names what is known."""
    return policy_of(PRESETS, OPTIONS, preset, reference_scale, changes)


def policy_of(
    presets: Mapping[str, DepthPolicy],
    options: Collection[str],
    preset: str,
    reference_scale: int | None,
    changes: Mapping[str, Any],
) -> DepthPolicy:
    """As `make_policy`, of other presets, with other options to change."""
    if preset not in presets:
        raise InputError(
            f"unknown policy {preset!r}, wanted one of {', '.join(presets)}: check --policy"
        )
    for name in changes:
        if name not in options:
            raise InputError(
                f"unknown policy option {name!r}, wanted some of {', '.join(sorted(options))}: "
                "check the policy options"
            )
    if reference_scale is not None:
        if presets[preset].reference_scale is None:
            raise InputError(
                f"policy {preset!r} has no reference scale and got {reference_scale}: leave "
                "--reference-scale out or choose an adaptive policy"
            )
        changes = {**changes, "reference_scale": reference_scale}
    return replace(presets[preset], **changes)
