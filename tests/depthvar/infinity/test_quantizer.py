"""Bits: how they are drawn, and what they add to the feature map.

Shape legend: B images, T tokens, Z bits of a token.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from depthvar.infinity.quantizer import DrawnBits, draw_bits
from depthvar.settings import SamplingSettings
from tests import reference_infinity as reference
from tests.tiny_models import TEXT_SHAPES, tiny_infinity, tiny_text_model

ALL = SamplingSettings(cfg=1.0, top_k=0, top_p=1.0, guidance="constant")


def draw(margins: list[float], uniforms: list[float], how: SamplingSettings = ALL) -> DrawnBits:
    """Of one token whose ones have logits so far above its zeros."""
    logits = torch.tensor([[0.5, 0.5 + margin] for margin in margins], dtype=torch.float64)
    return draw_bits(logits.reshape(1, 1, -1), torch.tensor([[uniforms]], dtype=torch.float64), how)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_a_bit_is_one_where_the_uniform_number_reaches_the_probability_of_a_zero():
    drawn = draw([logit(0.3)] * 3, [0.69, 0.71, 0.0])
    assert drawn.tokens.tolist() == [[[False, True, False]]]
    assert drawn.log_prob_BT.item() == pytest.approx(math.log(0.7 * 0.3 * 0.7))
    assert drawn.ones_BTD.flatten().tolist() == pytest.approx([0.3] * 3)


@pytest.mark.parametrize(("p_one", "bit"), [(0.97, True), (0.03, False)])
def test_the_less_likely_value_is_dropped_where_it_has_3_percent_or_less(p_one, bit):
    how = SamplingSettings(cfg=1.0, top_k=900, top_p=0.97, guidance="constant")
    for uniform in (0.0, 1 - 2**-53):
        drawn = draw([logit(p_one) * 1.001], [uniform], how)
        assert drawn.tokens.item() is bit
        assert drawn.log_prob_BT.item() == 0.0
        assert drawn.ones_BTD.item() == float(bit)
    assert draw([logit(p_one) * 0.999], [0.0 if bit else 1 - 2**-53], how).tokens.item() is not bit


def test_top_k_of_one_takes_the_likelier_value():
    how = SamplingSettings(cfg=1.0, top_k=1, top_p=1.0, guidance="constant")
    assert draw([0.1, -0.1, 5.0], [0.0, 0.999, 0.5], how).tokens.tolist() == [[[True, False, True]]]


def test_the_greatest_uniform_number_draws_nothing_impossible_in_float32():
    """As float32 it would be 1, and reach the probability of a zero that is certain."""
    logits = torch.tensor([[[200.0, 0.0]]])
    drawn = draw_bits(logits, torch.tensor([[[1 - 2**-53]]], dtype=torch.float64), ALL)
    assert drawn.tokens.item() is False
    assert drawn.log_prob_BT.item() == 0.0


def test_entropy_and_spread_are_sums_over_the_bits():
    quantizer = tiny_text_model(0).tokenizer.quantize
    drawn = draw([logit(0.5), logit(0.9), 1e3], [0.2] * 3)
    assert drawn.entropy().item() == pytest.approx(math.log(2) + 0.3250829733914482)
    spread = 4 * (0.25 + 0.09) / tiny_infinity(0).map_channels
    assert quantizer.spread(drawn).item() == pytest.approx(spread)
    expected = torch.tensor([0.0, 0.8, 1.0]).double() * quantizer.magnitude
    torch.testing.assert_close(quantizer.expected_codes(drawn)[0, 0], expected)


@pytest.mark.parametrize("shape", range(len(TEXT_SHAPES)))
def test_codes_reach_the_map_and_come_back_as_the_plain_ones(shape):
    config, quantizer = tiny_infinity(shape), tiny_text_model(shape).tokenizer.quantize
    generator = torch.Generator().manual_seed(0)
    for scale, grid in enumerate(config.grids):
        bits = torch.rand(1, math.prod(grid), config.bits, generator=generator) < 0.5
        codes_BTD = quantizer.codes(bits, torch.float64)
        assert codes_BTD.abs().unique().tolist() == [quantizer.magnitude]
        added = quantizer.contribution(scale, codes_BTD)
        plain = reference.to_map(codes_BTD[0], grid, config.patch)
        want = reference.resize(plain, config.map_size)
        torch.testing.assert_close(added[0], want, rtol=0, atol=1e-12)
        back = quantizer.input_of_scale(scale, added)
        cells = (grid[0] * config.patch, grid[1] * config.patch)
        tokens: Tensor = reference.to_tokens(reference.resize(want, cells), grid, config.patch)
        torch.testing.assert_close(back[0], tokens, rtol=0, atol=1e-12)
