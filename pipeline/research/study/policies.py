"""Policies that only studies ask for: baselines at random, and every field of a policy changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from depthvar.policy import DepthPolicy
from depthvar.presets import PRESETS, policy_of

STUDY_PRESETS: Mapping[str, DepthPolicy] = {
    **PRESETS,
    "random-pruning": DepthPolicy(
        "random-pruning", reference_scale=4, schedule="step", ranking="random", proxy="output"
    ),
    "random-depth": DepthPolicy(
        "random-depth", reference_scale=4, schedule="linear", ranking="random", compensation=True
    ),
}
_FIELDS = {field.name for field in fields(DepthPolicy)} - {"preset", "reference_scale"}


def study_policy(preset: str, *, reference_scale: int | None = None, **changes: Any) -> DepthPolicy:
    """As `make_policy`, with the presets of studies and any field changed."""
    return policy_of(preset, reference_scale, changes, presets=STUDY_PRESETS, options=_FIELDS)
