"""The transformer: published names and shapes, and the teacher-forced pass against the cached one.

Shape legend: B images, T tokens of an image, C width, S scales, V codes, Z code channels.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from depthvar.config import TransformerConfig, model_config
from depthvar.engine import DepthEngine, KeyValueCache
from depthvar.plan import DepthPlan
from depthvar.pointwise import unit
from depthvar.policy import DepthPolicy
from depthvar.var.transformer import Transformer, block_causal_mask, initialise
from tests import reference_depthvar as reference
from tests.tiny_models import SHAPES, fill_with_noise, states, tiny_config, tiny_model

CPU = torch.device("cpu")


# The published checkpoints: var_d16.pth ... var_d36.pth.


def published_shapes(depth: int, scales: int, tokens: int, *, shared: bool) -> dict[str, tuple]:
    """The table of the public files, their three buffers left out."""
    width, heads, codes = 64 * depth, depth, 4096
    shapes: dict[str, tuple] = {
        "pos_start": (1, 1, width),
        "pos_1LC": (1, tokens, width),
        "word_embed.weight": (width, 32),
        "word_embed.bias": (width,),
        "class_emb.weight": (1001, width),
        "lvl_embed.weight": (scales, width),
        "head_nm.ada_lin.1.weight": (2 * width, width),
        "head_nm.ada_lin.1.bias": (2 * width,),
        "head.weight": (codes, width),
        "head.bias": (codes,),
    }
    if shared:
        shapes["shared_ada_lin.1.weight"] = (6 * width, width)
        shapes["shared_ada_lin.1.bias"] = (6 * width,)
    for i in range(depth):
        block = f"blocks.{i}"
        if shared:
            shapes[f"{block}.ada_gss"] = (1, 1, 6, width)
        else:
            shapes[f"{block}.ada_lin.1.weight"] = (6 * width, width)
            shapes[f"{block}.ada_lin.1.bias"] = (6 * width,)
        shapes[f"{block}.attn.scale_mul_1H11"] = (1, heads, 1, 1)
        shapes[f"{block}.attn.q_bias"] = (width,)
        shapes[f"{block}.attn.v_bias"] = (width,)
        shapes[f"{block}.attn.mat_qkv.weight"] = (3 * width, width)
        shapes[f"{block}.attn.proj.weight"] = (width, width)
        shapes[f"{block}.attn.proj.bias"] = (width,)
        shapes[f"{block}.ffn.fc1.weight"] = (4 * width, width)
        shapes[f"{block}.ffn.fc1.bias"] = (4 * width,)
        shapes[f"{block}.ffn.fc2.weight"] = (width, 4 * width)
        shapes[f"{block}.ffn.fc2.bias"] = (width,)
    return shapes


PUBLISHED = [
    ("var-d16", 16, 10, 680, False, 0.310),
    ("var-d20", 20, 10, 680, False, 0.601),
    ("var-d24", 24, 10, 680, False, 1.033),
    ("var-d30", 30, 10, 680, False, 2.010),
    ("var-d36-512", 36, 10, 2240, True, 2.354),
]


@pytest.mark.parametrize(("name", "depth", "scales", "tokens", "shared", "billions"), PUBLISHED)
def test_names_shapes_and_sizes_are_those_of_the_public_checkpoints(
    name, depth, scales, tokens, shared, billions
):
    with torch.device("meta"):
        model = Transformer(model_config(name).transformer)
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert found == published_shapes(depth, scales, tokens, shared=shared)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == billions


# Numbers.


def random_codes(shape: int, batch: int) -> torch.Tensor:
    config = tiny_model(shape).config.transformer
    generator = torch.Generator().manual_seed(7)
    size = (batch, config.num_tokens - 1, config.code_channels)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def teacher_forced(model: Transformer, labels: list[int], codes_BTZ: torch.Tensor) -> torch.Tensor:
    mask_TT = block_causal_mask(model.config.sides)
    return model(torch.tensor(labels), codes_BTZ, mask_TT, list(range(model.config.num_blocks)))


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_teacher_forced_logits_equal_the_plain_ones(shape):
    model = tiny_model(shape)
    labels, codes_BTZ = [2, 5], random_codes(shape, 2)
    want = reference.teacher_forced_logits(states(model)[0], model.config, labels, codes_BTZ)
    got = teacher_forced(model.transformer, labels, codes_BTZ)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_the_teacher_forced_pass_equals_the_run_scale_by_scale_with_a_cache(shape):
    loaded = tiny_model(shape)
    model, config = loaded.transformer, loaded.config.transformer
    labels, codes_BTZ = [2, 5], random_codes(shape, 2)
    plan = DepthPlan.build(config.sides, config.num_blocks, DepthPolicy())
    engine = DepthEngine(model, plan, device=CPU, dtype=torch.float64)
    cache = KeyValueCache(plan, 2, config.num_heads, config.head_dim, model.pos_start)
    condition = model.condition(torch.tensor(labels))
    logits, begin, trace = [], 0, None
    for i, side in enumerate(config.sides):
        codes = codes_BTZ[:, begin : begin + side * side] if i else None
        begin += side * side if i else 0
        x_GTC = model.embed(i, codes, condition)
        trace = engine.run_scale(i, x_GTC, condition, cache, trace, torch.zeros(2, side * side))
        logits.append(model.logits(trace.hidden_GTC, condition))
    want = teacher_forced(model, labels, codes_BTZ)
    torch.testing.assert_close(torch.cat(logits, dim=1), want, rtol=0, atol=1e-9)


def test_left_out_blocks_are_as_if_they_were_not_there():
    loaded = tiny_model(0)
    labels, codes_BTZ = torch.tensor([2, 5]), random_codes(0, 2)
    mask_TT = block_causal_mask(loaded.config.sides)
    got = loaded.transformer(labels, codes_BTZ, mask_TT, [0, 3])
    shorter = Transformer(replace(loaded.config.transformer, num_blocks=2)).double()
    weights = loaded.transformer.state_dict()
    kept = {
        name.replace("blocks.3.", "blocks.1."): tensor
        for name, tensor in weights.items()
        if not name.startswith(("blocks.1.", "blocks.2.", "blocks.4."))
    }
    shorter.load_state_dict(kept)
    want = shorter(labels, codes_BTZ, mask_TT, [0, 1])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_token_does_not_see_later_scales():
    model = tiny_model(0).transformer
    codes_BTZ = random_codes(0, 1)
    changed_BTZ = codes_BTZ.clone()
    changed_BTZ[:, 4 + 9 :] += 1.0  # the inputs of the last scale, side 5
    before, after = (teacher_forced(model, [1], codes) for codes in (codes_BTZ, changed_BTZ))
    torch.testing.assert_close(after[:, : 1 + 4 + 9], before[:, : 1 + 4 + 9], rtol=0, atol=0)
    assert (after[:, 1 + 4 + 9 :] - before[:, 1 + 4 + 9 :]).abs().amin(dim=(0, 2)).min() > 0


def test_the_mask_shows_a_token_its_own_scale_and_the_earlier_ones():
    sides = (1, 2, 3)
    scale_of = [0] + [1] * 4 + [2] * 9
    want = [[scale_of[column] <= scale_of[row] for column in range(14)] for row in range(14)]
    assert block_causal_mask(sides).tolist() == want


@pytest.mark.parametrize("shape", [0, 1])
def test_keys_of_tokens_that_a_block_skips_are_those_it_would_have_made(shape):
    loaded = tiny_model(shape)
    model, width = loaded.transformer, loaded.config.transformer.width
    condition = model.condition(torch.tensor([1, 5]))
    x_GTC = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0)).double()
    seen = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _scale: torch.Tensor):
        seen.append((unit(k, k.dtype), v))
        return q

    for block in range(loaded.config.num_blocks):
        model.run_block(block, x_GTC, condition, attend)
        for got, want in zip(model.keys_values(block, x_GTC, condition), seen[-1], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_in_half_precision_and_close(dtype):
    exact = tiny_model(0).transformer
    half = Transformer(exact.config)
    half.load_state_dict(exact.state_dict())
    half.to(dtype).requires_grad_(False)
    condition = half.condition(torch.tensor([1]))
    x_GTC = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(0))
    got = half.logits(x_GTC.to(dtype), condition)
    want = exact.logits(x_GTC.double(), exact.condition(torch.tensor([1])))
    assert got.dtype == torch.float32
    assert want.dtype == torch.float64
    assert (got - want).abs().max() < 0.1 * want.abs().max()


# Weights for training.


@pytest.mark.parametrize("shared", [False, True])
def test_fresh_weights_are_seeded_and_modulate_nothing_yet(shared):
    config = TransformerConfig(
        num_classes=3,
        sides=(1, 2),
        num_blocks=2,
        width=64,
        num_heads=2,
        codebook_size=8,
        code_channels=4,
        shared_adaln=shared,
    )
    models = [Transformer(config) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        initialise(model, torch.Generator().manual_seed(seed))
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["word_embed.weight"], other["word_embed.weight"])
    given = models[0].condition(torch.tensor([0, 1])).blocks[1]
    factors = (given.gamma1, given.gamma2, given.scale1, given.scale2)
    assert all((factor - 1).abs().max() < 0.2 for factor in factors)
    assert all(shift.abs().max() < 0.2 for shift in (given.shift1, given.shift2))
    assert first["blocks.0.attn.scale_mul_1H11"].flatten().tolist() == pytest.approx(
        [math.log(4)] * 2
    )
    assert not first["blocks.0.ffn.fc1.bias"].any()


def test_the_scale_of_queries_is_clamped_at_a_hundred():
    """Raising a head's scale above ln 100 changes nothing; raising a smaller one does."""
    config = tiny_config().transformer
    model = Transformer(config).double().requires_grad_(False)
    fill_with_noise(model, torch.Generator().manual_seed(0))
    codes_BTZ = random_codes(0, 1)
    before = teacher_forced(model, [1], codes_BTZ)
    for block in model.blocks:
        block.attn.scale_mul_1H11[:, 0] += 3.0
    assert torch.equal(teacher_forced(model, [1], codes_BTZ), before)
    model.blocks[0].attn.scale_mul_1H11[:, 1] += 0.1
    assert not torch.allclose(teacher_forced(model, [1], codes_BTZ), before, atol=1e-4)
