"""Costs by arithmetic against published figures and against operations counted as they run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from depthvar.config import ModelConfig, model_config
from depthvar.cost import TEXT_TOKENS, Cost, decoder_flops, image_cost, transformer_flops
from depthvar.counting import is_composite
from depthvar.infinity_config import INFINITY_2B, INFINITY_8B
from depthvar.plan import DepthPlan
from depthvar.policy import DepthPolicy
from depthvar.presets import PRESETS, make_policy
from depthvar.sampling import Sampler
from depthvar.weights.checkpoint import LoadedTextModel, random_model
from depthvar.weights.find import FoundModel, blank_part
from depthvar.weights.tensor_files import PARTS
from tests.tiny_models import (
    GUIDED,
    SHAPES,
    UNGUIDED,
    covering_policies,
    label_of,
    tiny_infinity,
    tiny_model,
    tiny_policy,
)

POLICIES = covering_policies()


class CountedFlops(TorchDispatchMode):
    """Torch's formulas over the operations that run, as its `FlopCounterMode` applies them.

    That one counts by module as well and takes several times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def full_cost(config: ModelConfig) -> Cost:
    return image_cost(config, DepthPlan.build(config.sides, config.num_blocks, DepthPolicy()))


@pytest.mark.parametrize(
    ("name", "transformer", "decoder", "share"),
    [
        ("var-d16", 597, 394, 40),
        ("var-d20", 1143, 394, 26),
        ("var-d24", 1950, 394, 17),
        ("var-d30", 3763, 394, 9),
        ("var-d36-512", 22802, 1583, 6),
    ],
)
def test_full_depth_costs_what_was_worked_out_by_hand(name, transformer, decoder, share):
    """GFLOP per image with guidance, and the decoder's share of them in percent."""
    cost = full_cost(model_config(name))
    assert cost.transformer_flops / 1e9 == pytest.approx(transformer, rel=0.001)
    assert cost.decoder_flops / 1e9 == pytest.approx(decoder, abs=0.5)
    assert cost.total_flops == cost.transformer_flops + cost.decoder_flops
    assert round(100 * cost.decoder_flops / cost.total_flops) == share


@pytest.mark.parametrize(
    ("name", "reference_scale", "bound"),
    [
        ("var-d16", 5, 1.65),
        ("var-d20", 5, 1.95),
        ("var-d24", 5, 2.19),
        ("var-d30", 5, 2.45),
        ("var-d36-512", 6, 2.45),
    ],
)
def test_the_whole_image_gains_what_the_decoder_leaves(name, reference_scale, bound):
    config = model_config(name)
    policy = DepthPolicy(reference_scale=reference_scale)
    plan = DepthPlan.build(config.sides, config.num_blocks, policy)
    spent = sum(scale.scores.sum() for scale in plan.scales) / config.transformer.num_tokens
    full = full_cost(config)
    gain = full.total_flops / (full.transformer_flops * spent + full.decoder_flops)
    assert gain == pytest.approx(bound, abs=0.006)


def counted_while_sampling(shape: int, policy: DepthPolicy, *, guided: bool) -> tuple[int, Cost]:
    """Operations of one image's tokens, less the convolutions of the feature map, and the cost."""
    model = tiny_model(shape)
    sampler = Sampler(model, policy, GUIDED if guided else UNGUIDED)
    tokenizer = model.config.tokenizer
    with CountedFlops() as counter, sdpa_kernel(SDPBackend.MATH):
        sampler.tokens([1], seed=0, indices=[0])
    phi = 2 * tokenizer.code_channels**2 * 9 * tokenizer.latent_side**2
    return counter.total - len(sampler.plan.scales) * phi, sampler.cost


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_full_depth_runs_exactly_the_operations_of_the_cost(shape, guided):
    counted, cost = counted_while_sampling(shape, make_policy("full"), guided=guided)
    assert counted == cost.transformer_flops


@pytest.mark.parametrize("number", range(len(POLICIES)), ids=[label_of(p) for p in POLICIES])
def test_adaptive_depth_runs_exactly_the_operations_of_the_cost(number):
    counted, cost = counted_while_sampling(number % len(SHAPES), POLICIES[number], guided=True)
    assert counted == cost.transformer_flops


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_exactly_the_operations_of_its_cost(preset):
    counted, cost = counted_while_sampling(1, tiny_policy(preset), guided=True)
    assert counted == cost.transformer_flops
    if preset != "full":
        assert counted < counted_while_sampling(1, make_policy("full"), guided=True)[0]


@pytest.mark.parametrize(
    ("policy", "fewer"),
    [
        (make_policy("fastvar", skip_last_scales=0), 1.12),
        (make_policy("skip-scales", skip_last_scales=2), 3.15),
        (make_policy("fastvar"), 4.23),
    ],
    ids=["prune only", "skip only", "both"],
)
def test_the_published_baselines_of_infinity_leave_out_what_was_worked_out_by_hand(policy, fewer):
    config = INFINITY_2B
    full, cost = (
        image_cost(config, DepthPlan.build(config.grids, config.num_blocks, p)).transformer_flops
        for p in (make_policy("full"), policy)
    )
    assert full / cost == pytest.approx(fewer, rel=0.03)


@pytest.mark.parametrize("channels", [1, 3])
def test_decoding_runs_exactly_the_operations_of_the_cost(channels):
    model = tiny_model(0, image_channels=channels)
    sampler = Sampler(model, make_policy("full"), GUIDED)
    with CountedFlops() as counter, sdpa_kernel(SDPBackend.MATH):
        sampler.decode(torch.zeros(1, 6, 5, 5, dtype=torch.float64))
    assert counter.total == sampler.cost.decoder_flops


def test_the_published_decoder_runs_exactly_the_operations_of_its_cost():
    from depthvar.var.tokenizer import Tokenizer

    config = model_config("var-d16").tokenizer
    with torch.device("meta"):
        model = Tokenizer(config)
        with CountedFlops() as counter, sdpa_kernel(SDPBackend.MATH):
            model.decode(torch.zeros(1, 32, 16, 16))
    assert counter.total == decoder_flops(config)


def counted_of_text(model: LoadedTextModel, policy: DepthPolicy) -> tuple[int, int, Cost]:
    """FLOPs of sampling and of decoding one guided image of a text of 64 tokens, and the cost."""
    config, device = model.config, model.device
    sampler = Sampler(model, policy, config.sampling)
    shapes = ((1, config.num_tokens * config.bits), (1, config.num_tokens))
    bits, ranking = (torch.full(shape, 0.5, dtype=torch.float64, device=device) for shape in shapes)
    states = torch.ones(TEXT_TOKENS, config.text_width, dtype=model.dtype, device=device)
    with CountedFlops() as sampling, sdpa_kernel(SDPBackend.MATH):
        sampled = sampler.tokens_from_uniforms([states], bits, ranking)
    with CountedFlops() as decoding, torch.inference_mode():
        model.tokenizer.decode(sampled.feature_map_BZHW)
    return sampling.total, decoding.total, sampler.cost


@pytest.mark.parametrize(
    "policy",
    [
        make_policy("full"),
        make_policy("depthvar", reference_scale=1),
        make_policy("depthvar-paper", reference_scale=1),
        make_policy("hard-pruning", reference_scale=1),
        make_policy("depthvar-paper", reference_scale=1, guided_scales=2, kept_guidance=0.5),
    ],
    ids=label_of,
)
@pytest.mark.parametrize("shape", [0, 1])
def test_a_text_model_runs_exactly_the_operations_of_its_cost(policy, shape):
    config = tiny_infinity(shape, max_text_tokens=TEXT_TOKENS)
    model = random_model(config, dtype=torch.float64)
    sampling, decoding, cost = counted_of_text(model, policy)
    assert (sampling, decoding) == (cost.transformer_flops, cost.decoder_flops)


@pytest.mark.parametrize(
    ("config", "size", "transformer", "decoder"),
    [
        (INFINITY_2B, (1024, 1024), 115.3, 9.85),
        (INFINITY_2B, (512, 512), 21.1, 2.46),
        (INFINITY_8B, (1024, 1024), 382, 9.89),
    ],
)
def test_infinity_costs_what_was_worked_out_by_hand(config, size, transformer, decoder):
    """TFLOP of a guided image of a text of 64 tokens."""
    config = config.of_size(size)
    cost = image_cost(config, DepthPlan.build(config.grids, config.num_blocks, DepthPolicy()))
    assert cost.transformer_flops / 1e12 == pytest.approx(transformer, rel=0.005)
    assert cost.decoder_flops / 1e12 == pytest.approx(decoder, rel=0.001)


def test_infinity_2b_runs_exactly_the_operations_of_its_cost_at_a_million_pixels():
    """Counted without storage as they would run, with 2 of its 32 equal blocks."""
    config = replace(INFINITY_2B, num_blocks=2, num_chunks=1)
    found = FoundModel(config, Path("blank"), Path("blank"), None, ())
    model = LoadedTextModel(found, *(blank_part(config, part) for part in PARTS), None)
    sampling, decoding, cost = counted_of_text(model, make_policy("full"))
    assert (sampling, decoding) == (cost.transformer_flops, cost.decoder_flops)


def test_a_scale_without_the_unconditional_stream_costs_half():
    config = tiny_model(0).config
    flops = [
        transformer_flops(
            config, DepthPlan.build(config.sides, 5, make_policy("full", **options)), 2
        )
        for options in ({}, {"guided_scales": 3}, {"guided_scales": 2})
    ]
    per_token = 5 * 2 * (4 + 2 * 2) * 12**2 + 2 * 12 * (29 + 6)
    attention = [5 * count * 4 * 12 * seen for count, seen in ((25, 39), (9, 14))]
    assert flops[0] - flops[1] == 25 * per_token + attention[0]
    assert flops[1] - flops[2] == 9 * per_token + attention[1]


def test_one_stream_costs_half_of_two_but_for_the_expected_codes():
    config = tiny_model(0).config
    plan = DepthPlan.build(
        config.sides, 5, make_policy("uniform", reference_scale=1, blending="mean")
    )
    one, two = (transformer_flops(config, plan, streams) for streams in (1, 2))
    expected_codes = 2 * (9 + 25) * 29 * 6
    assert 2 * one - two == expected_codes
