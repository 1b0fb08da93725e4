"""The depth policies that a user may choose by name, and the options that change one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from depthvar.errors import InputError
from depthvar.policy import DepthPolicy

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
OPTIONS = ("blending", "guided_scales", "kept_depth", "kept_guidance", "proxy", "skip_last_scales")
"""The fields that `--policy-options` may change; a study may change any."""


def make_policy(preset: str, *, reference_scale: int | None = None, **changes: Any) -> DepthPolicy:
    """One of the presets with some of the options changed; `InputError` names what is known."""
    return policy_of(preset, reference_scale, changes)


def policy_of(
    preset: str,
    reference_scale: int | None,
    changes: Mapping[str, Any],
    *,
    presets: Mapping[str, DepthPolicy] = PRESETS,
    options: Collection[str] = OPTIONS,
) -> DepthPolicy:
    """As `make_policy`; studies have more presets, and more options to change."""
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
