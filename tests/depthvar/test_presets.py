"""Presets by name, their options, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from depthvar.errors import InputError
from depthvar.policy import DepthPolicy
from depthvar.presets import OPTIONS, PRESETS, make_policy


def test_the_presets_have_their_names_and_full_depth_is_the_plain_one():
    assert set(PRESETS) >= {
        "full",
        "depthvar",
        "depthvar-paper",
        "hard-pruning",
        "uniform",
        "skip-scales",
    }
    for preset in PRESETS:
        assert make_policy(preset).preset == preset
    assert make_policy("full") == DepthPolicy()


def test_the_published_method_is_a_preset():
    policy = make_policy("depthvar-paper", reference_scale=5)
    assert policy.reference_scale == 5
    assert (policy.ranking, policy.proxy, policy.blending) == ("change", "raw", "score")
    assert (policy.skipped_keys_values, policy.compensation) == ("none", False)
    assert (policy.block_order, policy.min_depth, policy.skip_last_scales) == ("bit-reversal", 0, 0)
    assert policy.rotation > 0


def test_the_baselines_are_what_their_names_say():
    pruning = make_policy("hard-pruning")
    assert (pruning.schedule, pruning.proxy, pruning.ranking) == ("step", "output", "distance")
    mended = replace(pruning, allocation="coarse-first", ranking="spread", blending="mean")
    assert make_policy("spread-pruning") == replace(mended, preset="spread-pruning")
    shallow = make_policy("hard-pruning", kept_depth=0.75, blending="pruned")
    assert make_policy("shallow-pruning") == replace(shallow, preset="shallow-pruning")
    uniform = make_policy("uniform")
    assert (uniform.schedule, uniform.allocation, uniform.ranking) == (
        "constant",
        "equal",
        "change",
    )
    assert make_policy("skip-scales").reference_scale is None
    assert make_policy("skip-scales").skip_last_scales == 1


def test_fields_of_a_preset_can_be_replaced():
    base = make_policy("depthvar")
    changed = make_policy("depthvar", reference_scale=2, blending="mean", skip_last_scales=1)
    assert changed == replace(base, reference_scale=2, blending="mean", skip_last_scales=1)
    assert make_policy("depthvar") == base


def test_what_studies_vary_is_no_option_of_the_product():
    for name in stored_names() - {*OPTIONS, "preset", "reference_scale"}:
        with pytest.raises(InputError, match=f"unknown policy option '{name}', wanted some of ble"):
            make_policy("depthvar", **{name: getattr(make_policy("depthvar"), name)})


def stored_names() -> set[str]:
    return set(asdict(DepthPolicy()))


def test_an_unknown_option_names_the_known_ones():
    known = "blending, guided_scales, kept_depth, kept_guidance, proxy, skip_last_scales"
    with pytest.raises(InputError, match=f"unknown policy option 'depth', wanted some of {known}:"):
        make_policy("depthvar", depth=3)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(InputError, match="unknown policy 'fast', wanted one of full, depthvar"):
        make_policy("fast")


@pytest.mark.parametrize("preset", ["full", "skip-scales"])
def test_a_reference_scale_for_a_policy_without_one_is_refused(preset):
    with pytest.raises(InputError, match=f"policy '{preset}' has no reference scale and got 3"):
        make_policy(preset, reference_scale=3)
