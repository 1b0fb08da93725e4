"""Policies as values: presets, overrides, and what is refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from depthvar.errors import InputError
from depthvar.policy import OPTIONS, PRESETS, DepthPolicy, make_policy


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


def test_a_policy_in_a_stored_plan_is_what_it_was():
    """The fields that plans on disk hold, and are fingerprinted over: none more, none less."""
    stored = {
        "allocation": "equal", "blending": "none", "block_order": "bit-reversal",
        "compensation": True, "dither": False, "kept_depth": 1.0, "min_depth": 0,
        "preset": "depthvar", "proxy": "none", "ranking": "spread", "reference_scale": 4,
        "rotation": 0.0, "schedule": "octaves", "separate_ranking": False,
        "skip_last_scales": 0, "skipped_keys_values": "none", "steepness": 1.0,
    }  # fmt: skip
    assert make_policy("depthvar").as_stored == stored
    assert DepthPolicy(**stored) == make_policy("depthvar")
    other = {"preset": "random-depth", "ranking": "random", "dither": True, "steepness": 0.25}
    assert DepthPolicy(**stored | other).as_stored == stored | other
    later = {"preset": "fastvar", "allocation": "reference", "mean_depths": (0.6, 0.5)}
    assert DepthPolicy(**stored | later).as_stored == stored | later
    guided = {"guided_scales": 5, "kept_guidance": 0.5}
    assert make_policy("depthvar", **guided).as_stored == stored | guided
    assert DepthPolicy(**stored | guided) == make_policy("depthvar", **guided)


def test_what_studies_vary_is_no_option_of_the_product():
    for name in stored_names() - {*OPTIONS, "preset", "reference_scale"}:
        with pytest.raises(InputError, match=f"unknown policy option '{name}', wanted some of ble"):
            make_policy("depthvar", **{name: getattr(make_policy("depthvar"), name)})


def stored_names() -> set[str]:
    return set(asdict(DepthPolicy()))


def test_a_policy_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
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
        ({"kept_depth": 0.5}, "kept_depth 0.5 with schedule 'octaves', which prunes nothing"),
        ({"mean_depths": (0.5,)}, "policy mean_depths with allocation 'equal': leave one of them"),
        ({"mean_depths": (0.5, 1.5)}, r"policy mean_depths are \(0.5, 1.5\), wanted 0..1 each"),
        ({"rotation": 1.0}, "policy rotation is 1.0, wanted 0 <= x < 1"),
        ({"rotation": -0.5}, "policy rotation is -0.5"),
        ({"min_depth": -1}, "policy min_depth is -1"),
        ({"skip_last_scales": -2}, "skip_last_scales is -2, wanted >= 0"),
        ({"guided_scales": 3, "kept_guidance": 1.5}, "kept_guidance is 1.5, wanted 0..1: correct"),
        ({"kept_guidance": 0.5}, "kept_guidance is 0.5 and every scale is guided: give guided_sc"),
        ({"proxy": "output"}, "proxy 'output' with schedule 'octaves', which prunes nothing"),
    ],
)
def test_what_no_model_could_run_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        replace(make_policy("depthvar"), **options)


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
