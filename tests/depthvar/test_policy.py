"""Policies as values: presets, overrides, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from depthvar.errors import InputError
from depthvar.policy import PRESETS, DepthPolicy, make_policy


def test_the_presets_have_their_names_and_full_depth_is_the_plain_one():
    assert set(PRESETS) >= {
        "full",
        "depthvar",
        "depthvar-paper",
        "hard-pruning",
        "random-pruning",
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
    for preset, ranking in (("hard-pruning", "distance"), ("random-pruning", "random")):
        policy = make_policy(preset)
        assert (policy.schedule, policy.proxy, policy.ranking) == ("step", "output", ranking)
    mended = make_policy(
        "hard-pruning", allocation="coarse-first", ranking="spread", blending="mean"
    )
    assert make_policy("spread-pruning") == dataclasses.replace(mended, preset="spread-pruning")
    shallow = make_policy("hard-pruning", kept_depth=0.75, blending="pruned")
    assert make_policy("shallow-pruning") == dataclasses.replace(shallow, preset="shallow-pruning")
    assert make_policy("uniform").schedule == "constant"
    assert make_policy("skip-scales").reference_scale is None
    assert make_policy("skip-scales").skip_last_scales == 1


def test_fields_of_a_preset_can_be_replaced():
    base = make_policy("depthvar")
    changed = make_policy("depthvar", reference_scale=2, rotation=0.25, compensation=False)
    assert changed == dataclasses.replace(
        base, reference_scale=2, rotation=0.25, compensation=False
    )
    assert make_policy("depthvar") == base


def test_a_policy_is_json_scalars():
    for preset in PRESETS:
        values = dataclasses.asdict(make_policy(preset))
        assert DepthPolicy(**json.loads(json.dumps(values))) == make_policy(preset)


def test_a_policy_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_policy("full").rotation = 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cubic"}, "policy schedule is 'cubic', wanted one of constant, linear"),
        ({"ranking": "luck"}, "policy ranking is 'luck', wanted one of change, distance, entropy"),
        (
            {"ranking": "entropy", "separate_ranking": True},
            "policy separate_ranking with ranking 'entropy', which a sample's streams share",
        ),
        ({"proxy": None}, "policy proxy is None, wanted one of none, raw, calibrated, output"),
        ({"blending": "max"}, "policy blending is 'max', wanted one of none, score, mean, pruned"),
        ({"skipped_keys_values": "all"}, "policy skipped_keys_values is 'all', wanted one of none"),
        ({"block_order": "last"}, "policy block_order is 'last', wanted one of bit-reversal"),
        ({"steepness": 1.1}, r"policy steepness is 1.1, wanted 0\.\.1"),
        ({"steepness": -0.1}, r"policy steepness is -0.1, wanted 0\.\.1"),
        ({"steepness": float("nan")}, "policy steepness is nan"),
        ({"schedule": "step", "kept_depth": 0.0}, "policy kept_depth is 0.0, wanted 0 < x <= 1"),
        ({"schedule": "step", "kept_depth": 1.5}, "policy kept_depth is 1.5"),
        ({"kept_depth": 0.5}, "kept_depth 0.5 with schedule 'octaves'.*use schedule 'step'"),
        ({"rotation": 1.0}, "policy rotation is 1.0, wanted 0 <= x < 1"),
        ({"rotation": -0.5}, "policy rotation is -0.5"),
        ({"min_depth": -1}, "policy min_depth is -1"),
        ({"skip_last_scales": -2}, "skip_last_scales -2, wanted both >= 0"),
        ({"proxy": "output"}, "proxy 'output' with schedule 'octaves'.*use schedule 'step'"),
        (
            {"depth": 3},
            "unknown policy option 'depth', wanted some of allocation, blending, block_order",
        ),
    ],
)
def test_what_no_model_could_run_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_policy("depthvar", **options)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(InputError, match="unknown policy 'fast', wanted one of full, depthvar"):
        make_policy("fast")


@pytest.mark.parametrize("preset", ["full", "skip-scales"])
def test_a_reference_scale_for_a_policy_without_one_is_refused(preset):
    with pytest.raises(InputError, match=f"policy '{preset}' has no reference scale and got 3"):
        make_policy(preset, reference_scale=3)
