"""Depth policies as values: what `presets` names, `plan` counts and the sampler follows.

A stored plan holds all fields of a policy, those of `PolicyKnobs` too, as one flat mapping,
`DepthPolicy.as_stored`, which `DepthPolicy(**stored)` takes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
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
