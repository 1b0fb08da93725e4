"""Infinity in the sampler against the plain reference; what a sample may depend on.

Shape legend: B images, G stream rows, T tokens of a scale, N tokens of an image, E channels of a
text's states, Z bits of a token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from depthvar.engine import ScaleTrace
from depthvar.errors import InputError
from depthvar.policy import DepthPolicy
from depthvar.presets import PRESETS, make_policy
from depthvar.sampling import SampledTokens, Sampler
from depthvar.settings import SamplingSettings
from depthvar.weights.checkpoint import LoadedTextModel
from tests import reference_infinity as reference
from tests.tiny_models import (
    TEXT_GUIDED,
    TEXT_SHAPES,
    TEXT_UNGUIDED,
    TOLERANCE,
    covering_policies,
    label_of,
    text_states,
    tiny_policy,
    tiny_text_model,
    without_guidance,
)

POLICIES = covering_policies()
LENGTHS = (5, 1, 5)


def uniforms_for(model: LoadedTextModel, count: int) -> tuple[Tensor, Tensor]:
    """Numbers for the bits (B, N Z) and for random ranking (B, N)."""
    generator = torch.Generator().manual_seed(0)
    tokens = model.config.num_tokens
    bits, ranking = (
        torch.rand((count, tokens * each), generator=generator, dtype=torch.float64)
        for each in (model.config.bits, 1)
    )
    return bits, ranking


def assert_matches_the_reference(
    model: LoadedTextModel,
    policy: DepthPolicy,
    how: SamplingSettings,
    lengths: tuple[int, ...] = LENGTHS[:2],
) -> SampledTokens:
    logits: list[Tensor] = []
    traces: list[ScaleTrace] = []

    def keep(scale: int, logits_BTV: Tensor, trace: ScaleTrace) -> None:
        logits.append(logits_BTV)
        traces.append(trace)

    dtype = model.dtype
    texts = [states.to(dtype) for states in text_states(lengths)]
    bits, ranking = uniforms_for(model, len(texts))
    got = Sampler(model, policy, how).tokens_from_uniforms(texts, bits, ranking, on_scale=keep)
    fit = model.proxy_fit
    close = {"rtol": 0, "atol": TOLERANCE[dtype]}
    for b, states in enumerate(texts):
        scales, map_ZHW = reference.sample(
            model.transformer.state_dict(),
            model.config,
            policy,
            how,
            states,
            bits[b].tolist(),
            ranking[b].tolist(),
            None if fit is None else (fit.slope_SLC, fit.offset_SLC),
        )
        assert len(scales) == len(got.tokens)
        for i, want in enumerate(scales):
            assert got.tokens[i][b].int().tolist() == want.bits_TZ, f"bits of scale {i}"
            rows = [b, len(texts) + b][: len(want.hidden_GTC)]
            torch.testing.assert_close(traces[i].hidden_GTC[rows], want.hidden_GTC, **close)
            torch.testing.assert_close(logits[i][b], want.logits_TV, **close)
            torch.testing.assert_close(traces[i].change_BT[b], want.change_T, **close)
            mean_log_prob = torch.tensor(want.log_prob_T, dtype=dtype).mean()
            torch.testing.assert_close(got.mean_log_prob_BS[b, i], mean_log_prob, **close)
        torch.testing.assert_close(got.feature_map_BZHW[b], map_ZHW, **close)
    return got


@pytest.mark.parametrize("number", range(len(POLICIES)), ids=map(label_of, POLICIES))
def test_every_policy_equals_the_dense_reference_in_float64(number):
    policy, how = POLICIES[number], TEXT_GUIDED
    if number % 4 == 0:
        policy, how = without_guidance(policy), TEXT_UNGUIDED
    # Without a position in them tokens tie in a small map, and rounding would decide who is far.
    shape = 1 if policy.ranking == "distance" else number % 2
    assert_matches_the_reference(tiny_text_model(shape), policy, how)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_draws_the_same_bits_as_the_reference_in_float32(preset):
    model = tiny_text_model(0, torch.float32)
    assert_matches_the_reference(model, tiny_policy(preset), TEXT_GUIDED)


@pytest.mark.parametrize("shape", range(len(TEXT_SHAPES)))
def test_pruning_as_fastvar_equals_the_dense_reference_in_float64(shape):
    assert_matches_the_reference(tiny_text_model(shape), tiny_policy("fastvar"), TEXT_GUIDED)


@pytest.mark.parametrize("shape", range(len(TEXT_SHAPES)))
def test_texts_of_any_length_are_looked_at_whole_and_alone(shape):
    """Beside a longer one, at the longest there may be, and beside one that it shares."""
    model, full = tiny_text_model(shape), make_policy("full")
    assert_matches_the_reference(model, full, TEXT_GUIDED, lengths=(1, 9, 4))


@pytest.mark.parametrize("kept_guidance", [0.0, 0.7])
def test_texts_of_any_length_stay_apart_when_the_unconditional_stream_stops(kept_guidance):
    policy = make_policy(
        "depthvar-paper", reference_scale=1, guided_scales=2, kept_guidance=kept_guidance
    )
    for dtype in (torch.float64, torch.float32):
        model = tiny_text_model(1, dtype)
        assert_matches_the_reference(model, policy, TEXT_GUIDED, lengths=(1, 9, 4))


def test_a_text_that_images_share_gives_each_what_it_gives_alone():
    model = tiny_text_model(0)
    sampler = Sampler(model, make_policy("depthvar", reference_scale=1), TEXT_GUIDED)
    shared, other = text_states((4, 7))
    batch = sampler([shared, other, shared], seed=3, indices=[10, 11, 12])
    for place, (states, index) in enumerate(((shared, 10), (other, 11), (shared, 12))):
        alone = sampler([states.clone()], seed=3, indices=[index])
        assert (alone.images_BHWC[0] == batch.images_BHWC[place]).all()
    assert not (batch.images_BHWC[0] == batch.images_BHWC[2]).all()
    assert batch.images_BHWC.shape == (3, 10, 10, 3)


@pytest.mark.parametrize("shape", range(len(TEXT_SHAPES)))
def test_the_decoder_equals_the_plain_one(shape):
    model = tiny_text_model(shape)
    generator = torch.Generator().manual_seed(1)
    map_BZHW = torch.randn(
        2, model.config.map_channels, *model.config.map_size, generator=generator
    ).double()
    want = reference.decode(model.tokenizer.state_dict(), model.config, map_BZHW)
    torch.testing.assert_close(model.tokenizer.decode(map_BZHW), want, rtol=0, atol=1e-9)
    assert want.shape[2:] == model.config.image_size


def test_half_precision_keeps_the_stream_and_the_map_in_float32():
    model = tiny_text_model(1, torch.bfloat16)
    sampler = Sampler(model, make_policy("depthvar", reference_scale=1), TEXT_GUIDED)
    sampled = sampler.tokens(text_states((5, 2)), seed=0, indices=[0, 1])
    assert sampled.feature_map_BZHW.dtype == torch.float32
    assert sampler.decode(sampled.feature_map_BZHW).shape == (2, 24, 16, 3)


def test_stopping_a_stream_that_does_not_run_is_refused():
    with pytest.raises(InputError, match=r"guided_scales is 2 and guidance is off \(cfg\): leave"):
        Sampler(tiny_text_model(0), make_policy("full", guided_scales=2), TEXT_UNGUIDED)


@pytest.mark.parametrize("shape", [(0, 10), (10, 10), (3, 9), (3,)])
def test_states_of_another_shape_are_refused(shape):
    sampler = Sampler(tiny_text_model(0), make_policy("full"), TEXT_GUIDED)
    with pytest.raises(InputError, match=r"wanted \(1 to 9, 10\) for tiny-infinity"):
        sampler.tokens([torch.zeros(shape)], seed=0, indices=[0])
