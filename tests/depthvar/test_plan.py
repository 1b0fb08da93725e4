"""The depth plan: budgets, ranks, prefixes and block orders against numbers written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from depthvar.errors import InputError
from depthvar.knobs import BlockOrder
from depthvar.plan import DepthPlan, block_order, schedule_scores
from depthvar.policy import DepthPolicy
from depthvar.presets import make_policy
from tests import reference_depthvar as reference

VAR_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
INFINITY_1M = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)

SCHEDULES = ("constant", "linear", "power", "cosine", "octaves", "step")

policies = st.builds(
    DepthPolicy,
    preset=st.just("any"),
    reference_scale=st.integers(0, 3),
    schedule=st.sampled_from(SCHEDULES),
    steepness=st.floats(0, 1),
    rotation=st.floats(0, 1, exclude_max=True),
    block_order=st.sampled_from(["bit-reversal", "first", "ends"]),
    min_depth=st.integers(0, 1),
    skip_last_scales=st.integers(0, 3),
    allocation=st.sampled_from(["reference", "equal", "coarse-first"]),
    skipped_keys_values=st.sampled_from(["none", "proxy"]),
    compensation=st.booleans(),
)
sides = st.lists(st.integers(1, 12), min_size=4, max_size=6).map(lambda s: (1, *sorted(s)[1:]))


# The order of the blocks.


def test_bit_reversal_of_32_blocks():
    order = block_order(32)
    assert order[:8] == (0, 16, 8, 24, 4, 20, 12, 28)
    assert order[-4:] == (7, 23, 15, 31)


@pytest.mark.parametrize(
    ("num_blocks", "order"),
    [
        (1, (0,)),
        (2, (0, 1)),
        (3, (0, 2, 1)),
        (5, (0, 4, 2, 1, 3)),
        (6, (0, 4, 2, 1, 5, 3)),
        (8, (0, 4, 2, 6, 1, 5, 3, 7)),
        (12, (0, 8, 4, 2, 10, 6, 1, 9, 5, 3, 11, 7)),
    ],
)
def test_bit_reversal_drops_what_is_out_of_range(num_blocks, order):
    assert block_order(num_blocks) == order


def test_other_orders():
    assert block_order(5, "first") == (0, 1, 2, 3, 4)
    assert block_order(5, "ends") == (0, 4, 1, 3, 2)
    assert block_order(6, "ends") == (0, 5, 1, 4, 2, 3)
    assert block_order(5, "last-ends") == (4, 0, 3, 1, 2)


@given(num_blocks=st.integers(1, 70), order=st.sampled_from(get_args(BlockOrder)))
@settings(deadline=None, derandomize=True)
def test_every_order_holds_every_block_once(num_blocks, order):
    assert sorted(block_order(num_blocks, order)) == list(range(num_blocks))
    want = reference.order_of_blocks(DepthPolicy(block_order=order), num_blocks)
    assert list(block_order(num_blocks, order)) == want


# The scheduling function.


@given(
    schedule=st.sampled_from(SCHEDULES),
    steepness=st.floats(0, 1),
    mean=st.floats(0.01, 1),
    side=st.integers(1, 24),
)
@settings(deadline=None, derandomize=True)
def test_scores_ascend_within_the_unit_interval_and_have_the_mean(schedule, steepness, mean, side):
    count = side * side
    # A ramp through the origin has no smaller mean than its highest point over the tokens.
    assume(schedule != "power" or mean * count >= 1)
    policy = DepthPolicy(reference_scale=0, schedule=schedule, steepness=steepness)
    scores = schedule_scores(policy, mean, count)
    assert scores.shape == (count,)
    assert (np.diff(scores) >= -1e-12).all()
    assert scores.min() >= -1e-12
    assert scores.max() <= 1 + 1e-12
    within = 0.5 / count if schedule in ("step", "octaves") else 1e-6
    assert abs(scores.mean() - mean) <= within + 1e-12


def test_octaves_give_two_neighbouring_depths_whose_blocks_are_evenly_spaced():
    policy = DepthPolicy(reference_scale=0, schedule="octaves")
    assert schedule_scores(policy, 0.375, 4).tolist() == [0.25, 0.25, 0.5, 0.5]
    assert schedule_scores(policy, 0.25, 4).tolist() == [0.25] * 4
    assert schedule_scores(policy, 0.9, 5).tolist() == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_equal_allocation_spends_as_much_in_sum_with_one_mean_depth():
    sides, blocks = (1, 2, 3, 4, 5, 6, 8), 16
    mean = 4 * 9 / (16 + 25 + 36 + 64)
    policy = DepthPolicy(reference_scale=2, allocation="equal")
    plan = DepthPlan.build(sides, blocks, policy)
    for scale in plan.scales[3:]:
        assert scale.scores.tolist() == pytest.approx([mean] * scale.count)
    assert plan.mean_depth_per_scale == (16, 16, 16, 4, 4, 4, 4)


def test_coarse_first_allocation_fills_scale_after_scale():
    sides = (1, 2, 3, 4, 6, 8)
    policy = DepthPolicy(reference_scale=3, allocation="coarse-first", schedule="step")
    plan = DepthPlan.build(sides, 8, policy)  # 2 x 16 tokens at full depth: 32 of the 36
    assert [min(scale.prefix) for scale in plan.scales] == [1, 4, 9, 16, 32, 0]
    deeper = DepthPlan.build(sides, 8, replace(policy, reference_scale=2))
    assert [min(scale.prefix) for scale in deeper.scales] == [1, 4, 9, 16, 11, 0]
    assert [scale.adaptive for scale in deeper.scales] == [False] * 4 + [True] * 2


def test_kept_tokens_run_the_kept_depth_and_so_reach_further_for_the_same_budget():
    sides = (1, 2, 3, 4, 6, 8)
    policy = DepthPolicy(reference_scale=3, allocation="coarse-first", schedule="step")
    pruning, half = (
        DepthPlan.build(sides, 8, replace(policy, kept_depth=depth)) for depth in (1.0, 0.5)
    )
    # 32 tokens at full depth: most of the 36 of side 6, or all of them at half depth, whose other
    # half reaches 28 of the 64 of side 8.
    assert [scale.kept for scale in pruning.scales[4:]] == [32, 0]
    assert [scale.kept for scale in half.scales[4:]] == [36, 28]
    assert half.scales[5].depths.tolist() == [4] * 28 + [0] * 36
    assert half.scales[5].scores.tolist() == [0.5] * 28 + [0.0] * 36
    assert half.token_layers == pruning.token_layers


def test_a_budget_above_the_kept_depth_is_spent_as_uniform_depth_spends_it():
    sides = (1, 2, 3, 4, 6, 8)
    policy = DepthPolicy(reference_scale=4, schedule="step", kept_depth=0.25)
    for allocation in ("reference", "equal", "coarse-first"):
        plan = DepthPlan.build(sides, 8, replace(policy, allocation=allocation))
        assert set(plan.scales[5].depths.tolist()) == {8 * 36 // 64}  # 36 in place of 64 tokens


def test_pruned_tokens_alone_are_blended_or_every_token_by_its_score():
    def weights(blending: str) -> list[float]:
        policy = DepthPolicy(reference_scale=1, schedule="step", kept_depth=0.5, blending=blending)
        scale = DepthPlan.build((1, 2, 4), 4, policy).scales[2]  # a mean of 1/4: half the tokens
        return scale.code_weights.tolist()

    assert weights("pruned") == [1.0] * 8 + [0.0] * 8
    assert weights("mean") == weights("score") == [0.5] * 8 + [0.0] * 8
    assert weights("none") == [1.0] * 16


def test_scales_whose_slots_are_all_alike_are_not_ranked():
    def ranked(sides: tuple[int, ...] = (1, 2, 3, 4), **fields: object) -> list[bool]:
        policy = DepthPolicy(reference_scale=1, **fields)
        return [scale.ranked for scale in DepthPlan.build(sides, 4, policy).scales]

    assert ranked() == [False] * 4
    assert ranked(blending="mean") == [False] * 4
    assert ranked(schedule="octaves") == [False, False, True, False]  # 4/9 and 4/16 of 4 blocks
    assert ranked(schedule="linear") == [False, False, True, True]
    # One block each, but not one score, by which codes are weighted.
    assert ranked((1, 2, 4), schedule="linear", steepness=0.1, min_depth=1) == [False] * 3
    assert ranked((1, 2, 4), schedule="linear", steepness=0.1, min_depth=1, blending="score") == [
        False,
        False,
        True,
    ]


def test_changes_are_kept_for_the_tokens_that_the_next_scale_skips():
    policy = DepthPolicy(reference_scale=1, schedule="linear", proxy="raw")
    plan = DepthPlan.build((1, 2, 3, 4), 4, policy)  # as written out above
    kept = [[plan.keeps_change(i, block) for block in range(4)] for i in range(4)]
    assert kept == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
    uniform = DepthPlan.build((1, 2, 4), 4, DepthPolicy(reference_scale=1, proxy="calibrated"))
    assert [uniform.keeps_change(1, block) for block in range(4)] == [False, True, True, True]
    for proxy in ("none", "output"):
        plan = DepthPlan.build((1, 2, 4), 4, replace(policy, proxy=proxy, schedule="step"))
        assert not any(plan.keeps_change(1, block) for block in range(4))


def test_least_allocation_gives_every_later_token_the_least_depth():
    for schedule in SCHEDULES:
        policy = DepthPolicy(reference_scale=1, allocation="least", schedule=schedule, min_depth=5)
        plan = DepthPlan.build((1, 2, 3, 4), 16, policy)
        assert plan.mean_depth_per_scale == (16, 16, 5, 5)
    with pytest.raises(InputError, match="give min_depth"):
        DepthPolicy(reference_scale=1, allocation="least")


def test_schedules_at_four_tokens_and_a_mean_of_a_quarter():
    def scores(schedule: str, steepness: float = 1.0) -> list[float]:
        policy = DepthPolicy(reference_scale=0, schedule=schedule, steepness=steepness)
        return schedule_scores(policy, 0.25, 4).tolist()

    assert scores("constant") == [0.25] * 4
    assert scores("linear") == pytest.approx([1 / 16, 3 / 16, 5 / 16, 7 / 16])
    assert scores("linear", 0.5) == pytest.approx([5 / 32, 7 / 32, 9 / 32, 11 / 32])
    assert scores("linear", 0.0) == pytest.approx([0.25] * 4)
    c = [0.25 * math.cos(math.pi * p) for p in (1 / 8, 3 / 8)]
    assert scores("cosine") == pytest.approx([0.25 - c[0], 0.25 - c[1], 0.25 + c[1], 0.25 + c[0]])
    assert scores("step") == [0, 0, 0, 1]
    power = math.log(scores("power")[0]) / math.log(1 / 8)
    assert scores("power") == pytest.approx([p**power for p in (1 / 8, 3 / 8, 5 / 8, 7 / 8)])


def test_a_mean_above_a_half_keeps_scores_at_most_one():
    policy = DepthPolicy(reference_scale=0, schedule="linear")
    assert schedule_scores(policy, 0.75, 2).tolist() == pytest.approx([0.625, 0.875])
    assert schedule_scores(policy, 1.0, 3).tolist() == [1, 1, 1]


# Budgets.


@pytest.mark.parametrize(
    ("model_sides", "reference_scale", "bound"),
    [
        (VAR_256, 4, 3.78),
        (VAR_256, 5, 2.89),
        (VAR_256, 6, 1.96),
        (VAR_256, 7, 1.49),
        (VAR_512, 5, 4.76),
        (VAR_512, 6, 2.72),
        (VAR_512, 7, 1.74),
        (INFINITY_1M, 7, 3.60),
        (INFINITY_1M, 8, 2.77),
        (INFINITY_1M, 9, 1.88),
    ],
)
def test_scores_add_up_to_the_published_speed_up_bounds(model_sides, reference_scale, bound):
    for schedule in SCHEDULES:
        policy = DepthPolicy(reference_scale=reference_scale, schedule=schedule)
        plan = DepthPlan.build(model_sides, 32, policy)
        spent = sum(scale.scores.sum() for scale in plan.scales)
        assert round(sum(side**2 for side in model_sides) / spent, 2) == bound


@pytest.mark.parametrize("num_blocks", [16, 20, 24, 30, 32])
def test_depths_spend_at_most_the_budget_and_less_than_a_block_per_token_under_it(num_blocks):
    for schedule in SCHEDULES:
        policy = DepthPolicy(reference_scale=5, schedule=schedule)
        plan = DepthPlan.build(VAR_256, num_blocks, policy)
        for scale in plan.scales[6:]:
            budget = 36 * num_blocks
            assert budget - scale.count < scale.token_layers <= budget


def test_scales_up_to_the_reference_run_at_full_depth():
    plan = DepthPlan.build(VAR_256, 16, make_policy("depthvar-paper", reference_scale=4))
    assert [scale.adaptive for scale in plan.scales] == [False] * 5 + [True] * 5
    for scale in plan.scales[:5]:
        assert scale.prefix == (scale.count,) * 16
        assert (scale.scores == 1).all()


def test_without_a_reference_every_scale_runs_at_full_depth():
    plan = DepthPlan.build(VAR_256, 16, make_policy("full"))
    assert not any(scale.adaptive for scale in plan.scales)
    assert plan.token_layers == plan.full_token_layers == 680 * 16
    assert plan.mean_depth_per_scale == (16.0,) * 10
    assert plan.cache_lengths == (680,) * 16


# A plan in full, by hand: sides 1, 2, 3 and 4 blocks in the order 0, 2, 1, 3.


def test_a_plan_written_out():
    policy = DepthPolicy(
        reference_scale=1, schedule="linear", rotation=0.5, compensation=True, proxy="raw"
    )
    plan = DepthPlan.build((1, 2, 3, 4), 4, policy)
    third, fourth = plan.scales[2:]
    # Mean 4/9, reach 4/9, at percentiles 17/18, 15/18, ...: scores 68/81, 60/81, ... 4/81.
    assert third.scores.tolist() == pytest.approx([(68 - 8 * i) / 81 for i in range(9)])
    assert third.depths.tolist() == [3, 2, 2, 2, 1, 1, 0, 0, 0]
    assert third.prefix == (6, 1, 4, 0)
    assert third.rank_of_slot.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    compensation = [math.sqrt(4 / 3)] + [4 / 3] * 8
    assert third.compensation.tolist() == pytest.approx(compensation)
    assert third.token_layers == 11
    # Mean 1/4: scores 31/64, 29/64, ... 1/64 and half a turn of 16 tokens.
    assert fourth.depths.tolist() == [1] * 8 + [0] * 8
    assert fourth.prefix == (8, 0, 0, 0)
    assert fourth.rank_of_slot.tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8]
    assert plan.token_layers == 4 + 16 + 11 + 8
    assert plan.full_token_layers == 4 * 30
    assert plan.mean_depth_per_scale == (4.0, 4.0, 11 / 9, 0.5)
    assert plan.cache_lengths == (1 + 4 + 6 + 8, 1 + 4 + 1, 1 + 4 + 4, 1 + 4)


def test_the_first_adaptive_scale_is_not_rotated_and_the_next_ones_by_multiples():
    plan = DepthPlan.build((1, 2, 4, 5, 6), 8, DepthPolicy(reference_scale=1, rotation=0.3))
    lowest = [int(np.argmin(scale.rank_of_slot)) for scale in plan.scales[2:]]
    # The lowest rank moves up the percentiles by round(0.3 * 25) and round(0.6 * 36) tokens.
    assert lowest == [16 - 1, 25 - 1 - 8, 36 - 1 - 22]


def test_keys_of_skipped_tokens_lengthen_the_cache_to_all_tokens():
    policy = DepthPolicy(reference_scale=1, schedule="linear", skipped_keys_values="proxy")
    plan = DepthPlan.build((1, 2, 3, 4), 4, policy)
    assert plan.cache_lengths == (30,) * 4
    assert plan.cached_tokens(2, 3) == 9
    assert plan.token_layers == 4 + 16 + 11 + 8


def test_a_least_depth_is_granted_to_every_token():
    policy = DepthPolicy(reference_scale=1, schedule="step", min_depth=2)
    plan = DepthPlan.build((1, 2, 3), 5, policy)
    assert plan.scales[2].depths.tolist() == [5, 5, 5, 5, 2, 2, 2, 2, 2]
    assert plan.scales[2].scores.tolist() == pytest.approx([1] * 4 + [0.4] * 5)


def test_a_score_of_a_whole_number_of_blocks_is_that_many_blocks():
    """Of 9 tokens 4 are in the budget: 4/9 of 9 blocks are 4, whatever the rounding."""
    for num_blocks in (9, 18, 27, 45, 63):
        plan = DepthPlan.build((1, 2, 3), num_blocks, DepthPolicy(reference_scale=1))
        assert set(plan.scales[2].depths.tolist()) == {num_blocks * 4 // 9}


def test_a_least_depth_does_not_fall_short_by_rounding():
    """In floating point 49 * (1/49) is less than 1."""
    policy = DepthPolicy(reference_scale=1, schedule="step", min_depth=1)
    plan = DepthPlan.build((1, 2, 3), 49, policy)
    assert plan.scales[2].depths.tolist() == [49] * 4 + [1] * 5


def test_skipped_scales_are_left_out_and_cost_nothing():
    plan = DepthPlan.build((1, 2, 3, 4), 5, make_policy("skip-scales", skip_last_scales=2))
    assert [scale.grid for scale in plan.scales] == [(1, 1), (2, 2)]
    assert plan.token_layers == 25
    assert plan.full_token_layers == 150
    assert plan.mean_depth_per_scale == (5.0, 5.0, 0.0, 0.0)


def test_hard_pruning_runs_whole_tokens_or_none():
    plan = DepthPlan.build(VAR_256, 20, make_policy("hard-pruning", reference_scale=6))
    for scale in plan.scales[7:]:
        assert scale.depths.tolist() == [20] * 64 + [0] * (scale.count - 64)
        assert scale.prefix == (64,) * 20


def test_fastvar_drops_its_shares_of_two_scales_in_all_but_the_outer_blocks():
    plan = DepthPlan.build(INFINITY_1M, 32, make_policy("fastvar"))
    assert len(plan.scales) == 11
    assert all(set(scale.prefix) == {scale.count} for scale in plan.scales[:9])
    for scale, kept in zip(plan.scales[9:], (614, 800), strict=True):
        assert scale.prefix == (scale.count,) * 3 + (kept,) * 25 + (scale.count,) * 4
    every_scale = DepthPlan.build(INFINITY_1M, 32, make_policy("fastvar", skip_last_scales=0))
    assert [set(scale.prefix) for scale in every_scale.scales[11:]] == [{48 * 48}, {64 * 64}]


def test_depths_of_scales_that_are_not_sampled_are_refused():
    with pytest.raises(InputError, match=r"'fastvar' gives the depth of 2 scales .* samples 0: c"):
        DepthPlan.build(VAR_256, 16, make_policy("fastvar"))
    earlier = DepthPlan.build(VAR_256, 16, make_policy("fastvar", reference_scale=5))
    assert [scale.prefix[8] for scale in earlier.scales] == [1, 4, 9, 16, 25, 36, 38, 50]


# Any plan.


@given(model_sides=sides, num_blocks=st.integers(1, 13), policy=policies)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_plan_is_consistent(model_sides, num_blocks, policy):
    plan = DepthPlan.build(model_sides, num_blocks, policy)
    order = block_order(num_blocks, policy.block_order)
    assert len(plan.scales) == len(model_sides) - policy.skip_last_scales
    for scale in plan.scales:
        assert sorted(scale.rank_of_slot.tolist()) == list(range(scale.count))
        assert (np.diff(scale.scores) <= 1e-12).all()
        assert (np.diff(scale.depths) <= 0).all()
        assert scale.depths.min() >= 0
        assert scale.depths.max() <= num_blocks
        assert scale.depths.min() >= min(policy.min_depth, num_blocks)
        along_the_order = [scale.prefix[block] for block in order]
        assert along_the_order == sorted(along_the_order, reverse=True)
        # The tokens active at a block are those whose depth reaches it.
        for place, active in enumerate(along_the_order):
            assert active == sum(depth > place for depth in scale.depths)
        assert scale.token_layers == scale.depths.sum()
        assert scale.adaptive == (scale.token_layers < scale.count * num_blocks)
        assert (scale.compensation >= 1).all()
        assert (scale.compensation <= 4 / 3).all()
    assert plan.token_layers <= plan.full_token_layers
    for block, length in enumerate(plan.cache_lengths):
        kept = [plan.cached_tokens(i, block) for i in range(len(plan.scales))]
        assert length == sum(kept)


@given(
    model_sides=sides,
    num_blocks=st.integers(1, 9),
    policy=policies,
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_tokens_get_the_reference_s_scores_by_exact_ranks(model_sides, num_blocks, policy, data):
    """Slots hold ranks of a map with many ties; the reference counts the tokens below each."""
    plan = DepthPlan.build(model_sides, num_blocks, policy)
    scale = data.draw(st.integers(0, len(plan.scales) - 1))
    count = plan.scales[scale].count
    ranking_T = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    order = np.argsort(ranking_T, kind="stable")[plan.scales[scale].rank_of_slot]
    scores = np.empty(count)
    scores[order] = plan.scales[scale].scores
    sampled = plan.grids[: len(plan.scales)]
    want, _ = reference.scores_and_depths_of_scale(policy, sampled, scale, num_blocks, ranking_T)
    assert scores.tolist() == pytest.approx(want, abs=1e-9)


def test_the_unconditional_stream_stops_after_the_guided_scales():
    plan = DepthPlan.build((1, 2, 3, 4), 5, make_policy("full", guided_scales=2))
    assert plan.streams(2) == (2, 2, 1, 1)
    assert plan.token_layers == plan.full_token_layers == 150, "of the conditional stream"
    assert plan.share(2) == (5 + 30) / 60
    full = DepthPlan.build((1, 2, 3, 4), 5, make_policy("full"))
    assert (full.streams(2), full.streams(1)) == ((2, 2, 2, 2), (1, 1, 1, 1))
    assert full.share(2) == full.share(1) == 1


@pytest.mark.parametrize(
    ("guided_scales", "kept_guidance", "scales"),
    [(2, 0.5, [1, 2, 3]), (4, 0.5, []), (2, 0.0, []), (None, 0.0, [])],
)
def test_a_difference_is_kept_from_the_last_guided_scale_on(guided_scales, kept_guidance, scales):
    policy = make_policy("full", guided_scales=guided_scales, kept_guidance=kept_guidance)
    plan = DepthPlan.build((1, 2, 3, 4), 5, policy)
    assert [i for i in range(4) if plan.keeps_difference(i)] == scales


# Bad input.


@pytest.mark.parametrize("guided_scales", [0, 4])
def test_guided_scales_that_are_not_sampled_are_refused(guided_scales):
    policy = make_policy("skip-scales", guided_scales=guided_scales)
    with pytest.raises(InputError, match=rf"guided_scales is {guided_scales}, wanted 1 to 3, the"):
        DepthPlan.build((1, 2, 3, 4), 5, policy)


def test_stopping_a_stream_of_samplers_that_have_one_is_refused():
    plan = DepthPlan.build((1, 2, 3, 4), 5, make_policy("full", guided_scales=3))
    with pytest.raises(InputError, match=r"guided_scales is 3 and guidance is off \(cfg\): leave"):
        plan.streams(1)


def test_a_reference_outside_the_scales_is_refused():
    for scale in (-1, 10):
        with pytest.raises(InputError, match=rf"reference scale is {scale}, wanted 0 to 9"):
            DepthPlan.build(VAR_256, 16, make_policy("uniform", reference_scale=scale))


def test_skipping_every_scale_is_refused():
    with pytest.raises(InputError, match="skips the last 4 scales, the model has 4"):
        DepthPlan.build((1, 2, 3, 4), 5, make_policy("skip-scales", skip_last_scales=4))


def test_a_least_depth_beyond_the_blocks_is_refused():
    with pytest.raises(InputError, match="min_depth is 6, the model has 5 blocks"):
        DepthPlan.build((1, 2), 5, DepthPolicy(reference_scale=0, min_depth=6))
    whole = DepthPlan.build((1, 2), 5, DepthPolicy(reference_scale=0, min_depth=5))
    assert whole.token_layers == whole.full_token_layers == 25


def test_a_kept_depth_of_no_whole_block_is_refused():
    policy = DepthPolicy(reference_scale=1, schedule="step", kept_depth=0.2)
    with pytest.raises(InputError, match=r"kept_depth is 0\.2, which is no whole block of the"):
        DepthPlan.build((1, 2, 3), 4, policy)
    assert DepthPlan.build((1, 2, 3), 5, policy).scales[2].kept == 9


def test_planning_needs_no_torch():
    import subprocess
    import sys

    program = "import sys, depthvar.plan, depthvar.cost; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_dither_spends_the_budget_exactly_with_depths_one_block_apart():
    sides, blocks = (1, 2, 3, 4, 5, 6, 8), 16
    uniform = make_policy("uniform", reference_scale=2)
    policy = replace(uniform, dither=True, allocation="reference")
    plan = DepthPlan.build(sides, blocks, policy)
    for scale, side in zip(plan.scales[3:], sides[3:], strict=True):
        wanted = 9 * blocks / side**2
        assert scale.token_layers == pytest.approx(9 * blocks, abs=0.5)
        assert set(scale.depths.tolist()) <= {math.floor(wanted), math.floor(wanted) + 1}
