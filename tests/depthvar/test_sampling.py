"""The sampler against the plain reference, and what a sample may depend on.

Shape legend: B images, G stream rows, T tokens of a scale, N tokens of an image, C width, V codes.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from depthvar import published
from depthvar.cost import image_cost
from depthvar.engine import ScaleTrace
from depthvar.errors import InputError
from depthvar.plan import DepthPlan
from depthvar.policy import DepthPolicy
from depthvar.presets import PRESETS, make_policy
from depthvar.randomness import ranking_uniforms, token_uniforms
from depthvar.sampling import SampledTokens, Sampler
from depthvar.settings import SamplingSettings
from depthvar.weights.checkpoint import LoadedModel
from tests import reference_depthvar as reference
from tests.tiny_models import (
    GUIDED,
    SHAPES,
    TOLERANCE,
    UNGUIDED,
    covering_policies,
    label_of,
    states,
    tiny_model,
    tiny_policy,
    without_guidance,
)

LABELS = [1, 4]
POLICIES = covering_policies()
IDS = [label_of(policy) for policy in POLICIES]


class Ours(NamedTuple):
    sampled: SampledTokens
    logits: list[Tensor]
    traces: list[ScaleTrace]


def uniforms_for(model: LoadedModel, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Numbers for the draws and for random ranking, each (B, N)."""
    shape = (2, count, model.config.transformer.num_tokens)
    both = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return both[0], both[1]


def run(model: LoadedModel, policy: DepthPolicy, how: SamplingSettings, seed: int = 0) -> Ours:
    logits: list[Tensor] = []
    traces: list[ScaleTrace] = []

    def keep(scale: int, logits_BTV: Tensor, trace: ScaleTrace) -> None:
        assert scale == len(logits)
        logits.append(logits_BTV)
        traces.append(trace)

    sampled = Sampler(model, policy, how).tokens_from_uniforms(
        torch.tensor(LABELS), *uniforms_for(model, len(LABELS), seed), on_scale=keep
    )
    return Ours(sampled, logits, traces)


def dense(
    model: LoadedModel, policy: DepthPolicy, how: SamplingSettings, seed: int = 0
) -> reference.Sampled:
    fit = (model.proxy_fit.slope_SLC, model.proxy_fit.offset_SLC) if model.proxy_fit else None
    uniforms = uniforms_for(model, len(LABELS), seed)
    return reference.sample(states(model), model.config, policy, how, LABELS, *uniforms, fit)


def assert_matches_the_reference(
    model: LoadedModel, policy: DepthPolicy, how: SamplingSettings, seed: int = 0
) -> None:
    got, want = run(model, policy, how, seed), dense(model, policy, how, seed)
    close = {"rtol": 0, "atol": TOLERANCE[model.dtype]}
    assert len(want.scales) == len(got.logits) == len(got.sampled.tokens)
    for i, scale in enumerate(want.scales):
        assert got.sampled.tokens[i].tolist() == scale.tokens_BT.tolist(), f"tokens of scale {i}"
        torch.testing.assert_close(got.traces[i].hidden_GTC, scale.hidden_GTC, **close)
        torch.testing.assert_close(got.logits[i], scale.logits_BTV, **close)
        torch.testing.assert_close(got.traces[i].change_BT, scale.change_BT, **close)
        mean_log_prob_B = scale.log_prob_BT.mean(1)
        torch.testing.assert_close(got.sampled.mean_log_prob_BS[:, i], mean_log_prob_B, **close)
        mean_change_B = scale.change_BT.mean(1)
        torch.testing.assert_close(got.sampled.mean_change_BS[:, i], mean_change_B, **close)
    torch.testing.assert_close(got.sampled.feature_map_BZHW, want.feature_map_BZHW, **close)


@pytest.mark.parametrize("number", range(len(POLICIES)), ids=IDS)
def test_every_pair_of_policy_fields_equals_the_dense_reference_in_float64(number):
    shape = number % len(SHAPES)
    assert_matches_the_reference(tiny_model(shape), POLICIES[number], GUIDED)
    unguided = without_guidance(POLICIES[number])
    assert_matches_the_reference(tiny_model((shape + 1) % len(SHAPES)), unguided, UNGUIDED)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_equals_the_dense_reference_in_float64(preset, guided):
    for shape in (list(PRESETS).index(preset) % 2, 2 + guided):
        how = GUIDED if guided else UNGUIDED
        assert_matches_the_reference(tiny_model(shape), tiny_policy(preset), how)


@pytest.mark.parametrize("number", range(len(POLICIES)), ids=IDS)
def test_float32_draws_the_same_tokens_as_the_reference(number):
    model = tiny_model((number + number // 4) % len(SHAPES), torch.float32)
    policy, how = POLICIES[number], GUIDED
    if number % 3 == 0:
        policy, how = without_guidance(policy), UNGUIDED
    assert_matches_the_reference(model, policy, how)


@given(
    shape=st.integers(0, len(SHAPES) - 1),
    reference_scale=st.integers(0, 3),
    schedule=st.sampled_from(["constant", "linear", "power", "cosine", "step"]),
    steepness=st.floats(0, 1),
    rotation=st.floats(0, 1, exclude_max=True),
    min_depth=st.integers(0, 5),
    proxy=st.sampled_from(["none", "raw", "calibrated"]),
    how=st.builds(
        SamplingSettings,
        cfg=st.sampled_from([0.0, 0.5, 4.0]),
        top_k=st.integers(0, 40),
        top_p=st.floats(0.05, 1),
    ),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_numbers_in_a_policy_equal_the_dense_reference(
    shape, reference_scale, schedule, steepness, rotation, min_depth, proxy, how, seed
):
    policy = DepthPolicy(
        "any",
        reference_scale=reference_scale,
        schedule=schedule,
        steepness=steepness,
        rotation=rotation,
        min_depth=min_depth,
        proxy=proxy,
        blending="mean",
        skipped_keys_values="proxy",
        compensation=True,
    )
    assert_matches_the_reference(tiny_model(shape), policy, how, seed)


def test_depth_is_spent_as_the_plan_says_and_differs_between_tokens():
    """The reference itself is not at full depth by mistake, and agrees with the plan's numbers."""
    model = tiny_model(2)
    policy = make_policy("depthvar-paper", reference_scale=1)
    plan = DepthPlan.build(model.config.sides, model.config.num_blocks, policy)
    for planned, scale in zip(plan.scales, dense(model, policy, GUIDED).scales, strict=True):
        for depths in scale.depths:
            assert sorted(depths, reverse=True) == planned.depths.tolist()
    assert len(set(plan.scales[-1].depths.tolist())) > 2


def test_guidance_grows_linearly_from_none_at_the_first_scale_to_cfg_at_the_last_of_the_model():
    model = tiny_model(0)
    how = SamplingSettings(cfg=3.0, top_k=0, top_p=1.0)
    seen = []

    def keep(scale: int, guided_BTV: Tensor, trace: ScaleTrace) -> None:
        labels = torch.tensor([*LABELS, 5, 5])
        logits = model.transformer.logits(trace.hidden_GTC, model.transformer.condition(labels))
        conditional, unconditional = logits.chunk(2)
        towards = (guided_BTV - conditional).flatten() @ (conditional - unconditional).flatten()
        seen.append((towards / (conditional - unconditional).square().sum()).item())

    policy = make_policy("skip-scales")
    uniforms = uniforms_for(model, len(LABELS))
    Sampler(model, policy, how).tokens_from_uniforms(torch.tensor(LABELS), *uniforms, on_scale=keep)
    assert seen == pytest.approx([0.0, 1.0, 2.0], abs=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sample_does_not_depend_on_its_batch_or_its_place_in_it(preset):
    model = tiny_model(3, torch.float32)
    sampler = Sampler(model, tiny_policy(preset), GUIDED)
    labels, indices = [2, 0, 2, 4, 1], [70, 3, 71, 2**40, 9]
    together = sampler.tokens(labels, seed=5, indices=indices)
    images = sampler(labels, seed=5, indices=indices).images_BHWC
    for order in ([3], [1, 3, 0], [4, 3, 2, 1, 0]):
        some = {"seed": 5, "indices": [indices[i] for i in order]}
        apart = sampler.tokens([labels[i] for i in order], **some)
        for all_BT, some_BT in zip(together.tokens, apart.tokens, strict=True):
            assert some_BT.tolist() == all_BT[order].tolist()
        again = sampler([labels[i] for i in order], **some).images_BHWC
        assert np.abs(again.astype(int) - images[order]).max() <= 1


def test_a_sample_depends_on_seed_index_and_label():
    sampler = Sampler(tiny_model(0, torch.float32), make_policy("full"), UNGUIDED)

    def tokens(label: int, seed: int, index: int) -> list[list[list[int]]]:
        return [t.tolist() for t in sampler.tokens([label], seed=seed, indices=[index]).tokens]

    assert tokens(1, 5, 9) == tokens(1, 5, 9)
    others = [tokens(2, 5, 9), tokens(1, 6, 9), tokens(1, 5, 10), tokens(1, 9, 5)]
    assert tokens(1, 5, 9) not in others
    assert len({str(t) for t in others}) == 4


def test_tokens_are_drawn_with_the_sample_s_own_numbers():
    model = tiny_model(1)
    policy = DepthPolicy(reference_scale=1, schedule="linear", ranking="random")
    sampler = Sampler(model, policy, GUIDED)
    indices, num_tokens = [4, 12], model.config.transformer.num_tokens
    got = sampler.tokens(LABELS, seed=3, indices=indices)
    want = sampler.tokens_from_uniforms(
        torch.tensor(LABELS),
        torch.from_numpy(token_uniforms(3, indices, num_tokens)),
        torch.from_numpy(ranking_uniforms(3, indices, num_tokens)),
    )
    for got_BT, want_BT in zip(got.tokens, want.tokens, strict=True):
        assert got_BT.tolist() == want_BT.tolist()


def test_forced_tokens_are_what_later_scales_see_and_the_drawn_ones_are_returned():
    model = tiny_model(1)
    sampler = Sampler(model, make_policy("full"), GUIDED)
    labels, (uniforms, ranking) = torch.tensor(LABELS), uniforms_for(model, len(LABELS))

    def run_with(numbers: Tensor, forced: tuple[Tensor, ...] | None) -> Ours:
        logits: list[Tensor] = []
        sampled = sampler.tokens_from_uniforms(
            labels, numbers, ranking, forced=forced, on_scale=lambda i, x, _: logits.append(x)
        )
        return Ours(sampled, logits, [])

    free = run_with(uniforms, None)
    others = run_with(1 - uniforms, free.sampled.tokens)
    for forced_BTV, free_BTV in zip(others.logits, free.logits, strict=True):
        assert torch.equal(forced_BTV, free_BTV)
    assert torch.equal(others.sampled.feature_map_BZHW, free.sampled.feature_map_BZHW)
    assert not torch.equal(others.sampled.tokens[-1], free.sampled.tokens[-1])
    again = run_with(uniforms, others.sampled.tokens)
    assert torch.equal(again.logits[0], free.logits[0])
    assert not torch.equal(again.logits[1], free.logits[1])


def test_without_guidance_only_the_conditional_stream_runs():
    unguided = run(tiny_model(0), make_policy("full"), UNGUIDED)
    assert [len(trace.hidden_GTC) for trace in unguided.traces] == [2] * 4
    guided = run(tiny_model(0), make_policy("full"), GUIDED)
    assert [len(trace.hidden_GTC) for trace in guided.traces] == [4] * 4


def test_after_the_guided_scales_only_the_conditional_stream_runs():
    policy = make_policy("depthvar-paper", reference_scale=1, guided_scales=3)
    got = run(tiny_model(0), policy, GUIDED)
    assert [len(trace.hidden_GTC) for trace in got.traces] == [4, 4, 4, 2]


@pytest.mark.parametrize("kept_guidance", [0.0, 0.7])
@pytest.mark.parametrize("preset", PRESETS)
def test_guiding_every_scale_gives_the_bits_of_a_policy_that_says_nothing_of_it(
    preset, kept_guidance
):
    model, policy = tiny_model(1, torch.float32), tiny_policy(preset)
    num_sampled = len(model.config.sides) - policy.skip_last_scales
    explicit = replace(policy, guided_scales=num_sampled, kept_guidance=kept_guidance)
    got, want = run(model, explicit, GUIDED), run(model, policy, GUIDED)
    for got_BTV, want_BTV in zip(got.logits, want.logits, strict=True):
        assert torch.equal(got_BTV, want_BTV)
    assert torch.equal(got.sampled.feature_map_BZHW, want.sampled.feature_map_BZHW)
    assert torch.equal(got.sampled.mean_change_BS, want.sampled.mean_change_BS)


def test_scales_after_the_guided_ones_give_the_logits_of_no_guidance_at_the_same_tokens():
    model, numbers = tiny_model(3), uniforms_for(tiny_model(3), len(LABELS))
    forced = run(model, make_policy("full"), GUIDED).sampled.tokens

    def logits_of(how: SamplingSettings, **options: float) -> list[Tensor]:
        logits: list[Tensor] = []
        Sampler(model, make_policy("full", **options), how).tokens_from_uniforms(
            torch.tensor(LABELS), *numbers, forced=forced, on_scale=lambda i, x, _: logits.append(x)
        )
        return logits

    unguided, guided = logits_of(replace(GUIDED, cfg=0.0)), logits_of(GUIDED)
    dropped = logits_of(GUIDED, guided_scales=3)
    kept = logits_of(GUIDED, guided_scales=3, kept_guidance=1.0)
    for i, dropped_BTV in enumerate(dropped):
        wanted_BTV = guided[i] if i < 3 else unguided[i]
        torch.testing.assert_close(dropped_BTV, wanted_BTV, rtol=0, atol=1e-12)
        if i >= 3:
            assert (kept[i] - dropped_BTV).abs().max() > 0.1


def test_full_depth_through_a_reference_at_the_last_scale_equals_the_full_policy():
    full = run(tiny_model(2), make_policy("full"), GUIDED)
    same = run(tiny_model(2), make_policy("depthvar", reference_scale=3), GUIDED)
    assert torch.equal(full.sampled.feature_map_BZHW, same.sampled.feature_map_BZHW)


def test_a_budget_of_one_equals_the_full_policy():
    """In the last model sides 3 and 3 follow each other: b = 1 at the second."""
    model = tiny_model(3)
    policies = [
        replace(make_policy(preset, **options), skip_last_scales=1)
        for preset, options in (("full", {}), ("depthvar", {"reference_scale": 2}))
    ]
    full, same = (run(model, policy, GUIDED) for policy in policies)
    assert torch.equal(full.sampled.feature_map_BZHW, same.sampled.feature_map_BZHW)


def test_images_are_the_reference_s_pixels_rounded():
    for channels in (1, 3):
        model = tiny_model(0, image_channels=channels)
        policy = make_policy("depthvar", reference_scale=1)
        feature_map = dense(model, policy, GUIDED).feature_map_BZHW
        pixels = published.decode(states(model)[1], model.config.tokenizer, feature_map)
        rounded = torch.floor((pixels + 1) / 2 * 255 + 0.5).permute(0, 2, 3, 1).int()
        images = Sampler(model, policy, GUIDED).decode(feature_map)
        assert images.dtype == torch.uint8
        assert images.shape == (2, 10, 10, channels)
        assert torch.equal(images.int(), rounded)
        assert len(images.unique()) > 50


@pytest.mark.parametrize("guided_scales", [None, 2])
def test_a_batch_records_what_the_reference_computes(guided_scales):
    model = tiny_model(1)
    policy = make_policy("depthvar", reference_scale=1, guided_scales=guided_scales)
    indices = [8, 31]
    batch = Sampler(model, policy, GUIDED)(LABELS, seed=2, indices=indices)
    fit = (model.proxy_fit.slope_SLC, model.proxy_fit.offset_SLC)
    count = model.config.transformer.num_tokens
    numbers = [torch.from_numpy(f(2, indices, count)) for f in (token_uniforms, ranking_uniforms)]
    want = reference.sample(states(model), model.config, policy, GUIDED, LABELS, *numbers, fit)
    change = torch.stack([scale.change_BT.mean(1) for scale in want.scales], 1)
    log_prob = torch.stack([scale.log_prob_BT.mean(1) for scale in want.scales], 1)
    assert batch.mean_change_BS.dtype == batch.mean_log_prob_BS.dtype == np.float32
    np.testing.assert_allclose(batch.mean_change_BS, change.numpy(), atol=1e-6)
    np.testing.assert_allclose(batch.mean_log_prob_BS, log_prob.numpy(), atol=1e-6)
    for i in range(len(LABELS)):
        conditional = [s.depths[i * len(s.depths) // len(LABELS)] for s in want.scales]
        depths = [depth for depths_T in conditional for depth in depths_T]
        assert batch.depths_BN[i].tolist() == depths
    assert (batch.depths_BN[0] != batch.depths_BN[1]).any()
    pixels = published.decode(states(model)[1], model.config.tokenizer, want.feature_map_BZHW)
    rounded = ((pixels + 1) / 2 * 255).round().permute(0, 2, 3, 1).numpy()
    assert (batch.images_BHWC == rounded).all()
    assert batch.sampling_s > 0
    assert batch.decoding_s > 0


def test_skipped_scales_are_not_sampled_and_recorded_as_zero():
    model = tiny_model(0)
    sampler = Sampler(model, make_policy("skip-scales", skip_last_scales=2), GUIDED)
    batch = sampler(LABELS, seed=0, indices=[0, 1])
    assert batch.mean_change_BS.shape == batch.mean_log_prob_BS.shape == (2, 4)
    assert (batch.mean_change_BS[:, 2:] == 0).all()
    sampled = sum(side * side for side in model.config.sides[:2])
    assert (batch.depths_BN[:, :sampled] == model.config.num_blocks).all()
    assert (batch.depths_BN[:, sampled:] == 0).all()
    assert batch.depths_BN.shape == (2, model.config.transformer.num_tokens)
    assert (batch.mean_log_prob_BS[:, 2:] == 0).all()
    assert (batch.mean_change_BS[:, :2] > 0).all()
    assert (batch.mean_log_prob_BS[:, :2] < 0).all()


def test_an_image_that_is_not_finite_is_refused():
    sampler = Sampler(tiny_model(0), make_policy("full"), GUIDED)
    feature_map = torch.zeros(2, 6, 5, 5, dtype=torch.float64)
    feature_map[1, 3, 2, 2] = torch.nan
    with pytest.raises(ArithmeticError, match="tiny made an image with a pixel that is not finite"):
        sampler.decode(feature_map)


@pytest.mark.parametrize(
    ("dtype", "name", "value", "told"),
    [
        ("float32", "head.bias", torch.nan, "tiny holds NaN in head.bias: it is damaged"),
        ("bfloat16", "pos_start", torch.nan, "tiny holds NaN in pos_start: it is damaged"),
        ("float32", "decoder.conv_out.bias", -torch.inf, "holds infinity in decoder.conv_out.bias"),
        ("bfloat16", "head.bias", torch.inf, "tiny holds infinity in head.bias: it is damaged"),
        (
            "float16",
            "head.bias",
            torch.inf,
            "float16 cannot hold: use --precision bfloat16",
        ),
        ("float16", "decoder.conv_in.bias", 6e4, "may not: try --precision bfloat16 or float32"),
        ("bfloat16", "decoder.conv_in.bias", 3e38, "bfloat16, what .* try --precision float32$"),
        ("float32", "decoder.conv_in.bias", 3e38, "finite, but too large to compute with"),
    ],
)
def test_numbers_that_are_not_finite_are_told_with_their_cause(dtype, name, value, told):
    model = copy.deepcopy(tiny_model(0, getattr(torch, dtype)))
    module = model.tokenizer if name.startswith("decoder") else model.transformer
    dict(module.named_parameters())[name].data.fill_(value)
    with pytest.raises(ArithmeticError, match=told) as caught:
        Sampler(model, make_policy("full"), GUIDED)(LABELS, seed=0, indices=[0, 1])
    if "holds" in told or dtype == "float32":
        assert "precision" not in str(caught.value)


def test_calibrated_proxies_without_a_calibration_are_refused():
    model = replace(tiny_model(0), proxy_fit=None)
    with pytest.raises(InputError, match=r"'depthvar' uses calibrated proxies and tiny has no"):
        Sampler(model, make_policy("depthvar", reference_scale=1, proxy="calibrated"), GUIDED)
    Sampler(model, make_policy("depthvar-paper", reference_scale=1), GUIDED)


def test_a_reference_scale_outside_the_model_is_refused():
    with pytest.raises(InputError, match="reference scale is 4, wanted 0 to 3"):
        Sampler(tiny_model(0), make_policy("depthvar", reference_scale=4), GUIDED)


def test_stopping_a_stream_that_does_not_run_is_refused():
    policy = make_policy("full", guided_scales=2)
    with pytest.raises(InputError, match=r"guided_scales is 2 and guidance is off \(cfg\): leave"):
        Sampler(tiny_model(0), policy, UNGUIDED)


def test_the_cost_counts_the_streams_that_run():
    model, policy = tiny_model(0), make_policy("uniform", reference_scale=1)
    for how, streams in ((GUIDED, 2), (UNGUIDED, 1)):
        sampler = Sampler(model, policy, how)
        assert sampler.cost == image_cost(model.config, sampler.plan, streams=streams)
