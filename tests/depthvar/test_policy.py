"""Policies as values: how they are stored, and what is refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from depthvar.errors import InputError
from depthvar.policy import DepthPolicy
from depthvar.presets import make_policy


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
