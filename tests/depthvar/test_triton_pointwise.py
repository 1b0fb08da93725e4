"""Triton's kernels, interpreted on the CPU, beside what torch does; and compiled for GPUs.

Without a GPU neither their speed nor what their compiled form gives is shown: see `gpu_check`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch._subclasses import FakeTensorMode

from depthvar.pointwise import PLAIN, Change
from depthvar.policy import DepthPolicy
from depthvar.sampling import Given, Sampler
from depthvar.settings import SamplingSettings
from depthvar.triton_pointwise import TRITON
from depthvar.weights.checkpoint import AnyLoaded, assemble
from tests.test_imports import ROOT
from tests.tiny_models import TEXT_UNGUIDED, UNGUIDED, tiny_model, tiny_policy, tiny_text_model

STEP = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}
"""Largest difference of values of the order of one: of half precision, one step."""
DTYPES = pytest.mark.parametrize("dtype", STEP, ids=str)
ROWS, COUNT, ACTIVE, WIDTH = 2, 5, 3, 12
"""A scale of five tokens of which three are active, 12 channels wide: no power of two."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=STEP[dtype], atol=STEP[dtype])


def vectors(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Six (G, 1, C) that lie between each other, as those of a block do."""
    return noise(ROWS, 1, 6, WIDTH, dtype=wide(dtype), seed=1).unbind(2)


@DTYPES
def test_a_prefix_is_modulated_as_torch_does_it(dtype):
    x_GTC = noise(ROWS, COUNT, WIDTH, dtype=wide(dtype)) * 3 + 5
    scale, shift, *_ = vectors(dtype)
    got, want = (
        way.modulated(x_GTC[:, :ACTIVE], scale, shift, eps=1e-6, dtype=dtype)
        for way in (TRITON, PLAIN)
    )
    assert got.dtype == dtype
    assert_near(got / 8, want / 8, dtype)


@DTYPES
def test_a_branch_is_added_with_or_without_gate_and_base_and_the_sum_modulated(dtype):
    x_GTC = noise(ROWS, COUNT, WIDTH, dtype=wide(dtype))
    branch = noise(ROWS, ACTIVE, WIDTH, dtype=dtype, seed=2)
    base = noise(ROWS, ACTIVE, WIDTH, dtype=wide(dtype), seed=3)
    scale, shift, gate, *_ = vectors(dtype)
    one_for_all = noise(2, WIDTH, dtype=dtype, seed=4).unbind()
    for terms, last in (
        ((branch, gate, None), (scale, shift)),
        ((branch, None, base), (scale, shift)),
        ((branch, gate, None), one_for_all),
    ):
        got, want = (
            way.added_and_modulated(x_GTC[:, :ACTIVE], *terms, *last, eps=1e-6, dtype=dtype)
            for way in (TRITON, PLAIN)
        )
        assert_near(got[0], want[0], wide(dtype))
        assert got[1].dtype == dtype
        assert_near(got[1] / 8, want[1] / 8, dtype)


@DTYPES
@pytest.mark.parametrize("keep", [False, True])
def test_changes_go_to_their_tokens_and_to_no_other(dtype, keep):
    """Active tokens compensated, two that take a proxy, one that takes nothing."""
    _, _, gate, *_ = vectors(dtype)
    compensation = noise(COUNT + 1, 1, dtype=wide(dtype), seed=7)[:ACTIVE]
    results = []
    for way in (TRITON, PLAIN):
        x_GTC = noise(ROWS, COUNT + 1, WIDTH, dtype=wide(dtype))
        total_GT = noise(ROWS, COUNT + 1, dtype=wide(dtype), seed=1)
        last = x_GTC[:, COUNT:].clone(), total_GT[:, COUNT:].clone()
        active = Change(
            noise(ROWS, ACTIVE, WIDTH, dtype=wide(dtype), seed=5),
            noise(ROWS, ACTIVE, WIDTH, dtype=dtype, seed=6),
            gate,
            compensation,
        )
        proxy = Change(noise(ROWS, COUNT - ACTIVE, WIDTH, dtype=wide(dtype), seed=8))
        kept = way.add(x_GTC, total_GT, [active, proxy], keep=keep)
        assert torch.equal(x_GTC[:, COUNT:], last[0])
        assert torch.equal(total_GT[:, COUNT:], last[1])
        results.append((x_GTC, total_GT, *([] if kept is None else [kept])))
    assert len(results[0]) == (3 if keep else 2)
    for got, want in zip(*results, strict=True):
        assert_near(got, want, wide(dtype))
    assert TRITON.add(x_GTC, total_GT, [], keep=True) is None


@DTYPES
@pytest.mark.parametrize("turns", [False, True])
def test_heads_get_their_length_are_turned_and_put_into_their_part_of_the_cache(dtype, turns):
    heads, dim, begin = 3, 6, 2
    qkv = noise(ROWS, ACTIVE, 3 * heads * dim, dtype=dtype)
    q, k, v = (x.view(ROWS, ACTIVE, heads, dim).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    k[0, 1, 2] = 0  # a key of no length
    scale = noise(1, heads, 1, 1, dtype=wide(dtype), seed=1).exp()
    angles = noise(ROWS, COUNT, dim // 2, dtype=wide(dtype), seed=2)
    rotations = torch.cat([angles.cos(), angles.sin()], dim=2)[:, :ACTIVE] if turns else None
    results = []
    for way in (TRITON, PLAIN):
        cache = [noise(ROWS, heads, 9, dim, dtype=dtype, seed=seed) for seed in (3, 4)]
        room = [kept[:, :, begin : begin + ACTIVE] for kept in cache]
        queries = way.put_heads(q, k, v, scale, rotations, *room)
        results.append([queries.to(dtype) / 4, *cache])
    for got, want in zip(*results, strict=True):
        assert_near(got, want, dtype)
    before = noise(ROWS, heads, 9, dim, dtype=dtype, seed=3)
    for outside in (slice(begin), slice(begin + ACTIVE, None)):
        assert torch.equal(results[0][1][:, :, outside], before[:, :, outside])


@DTYPES
@pytest.mark.parametrize("silu", [False, True])
def test_a_channels_last_map_is_normed_in_groups(dtype, silu, monkeypatch):
    """In several chunks of several tiles, of a mean that is large beside the deviation."""
    monkeypatch.setattr("depthvar.triton_pointwise._TILE", 64)
    monkeypatch.setattr("depthvar.triton_pointwise._MOST_PARTS", 3)
    norm = nn.GroupNorm(3, 15, eps=1e-6, dtype=dtype)
    for parameter, seed in ((norm.weight, 1), (norm.bias, 2)):
        parameter.copy_(noise(15, dtype=dtype, seed=seed))
    x_BNIJ = (noise(2, 15, 3, 5, dtype=torch.float64) + 30).to(dtype)
    exact = nn.GroupNorm(3, 15, eps=1e-6, dtype=torch.float64)
    exact.load_state_dict(norm.state_dict())
    last = x_BNIJ.contiguous(memory_format=torch.channels_last)
    got = TRITON.group_norm(norm, last, silu=silu)
    assert torch.equal(got, TRITON.group_norm(norm, x_BNIJ, silu=silu))
    assert got.is_contiguous(memory_format=torch.channels_last)
    want = PLAIN.group_norm(exact, x_BNIJ.double(), silu=silu)
    assert (got.double() / 4 - want / 4).abs().max() <= STEP[dtype]


def test_gelu_is_one_with_its_product_in_half_precision_off_the_cpu():
    """Its shape; and that torch's operation, of the exact GELU on a CPU, is tanh's on a GPU."""
    layer = nn.Linear(4, 6)
    x_GKC = noise(2, 3, 4, dtype=torch.float32)
    assert torch.equal(TRITON.linear_gelu(layer, x_GKC), PLAIN.linear_gelu(layer, x_GKC))
    seen = {}
    for dtype in STEP:
        with OpsSeen() as operations:
            out = TRITON.linear_gelu(layer.to("meta", dtype), x_GKC.to("meta", dtype))
        assert (out.shape, out.dtype) == ((2, 3, 6), dtype)
        seen[dtype] = "_addmm_activation" in operations.options
    assert [dtype for dtype, is_one in seen.items() if is_one] == [torch.float16, torch.bfloat16]
    operation = torch.ops.aten._addmm_activation.default
    made_of = get_decompositions([operation])[operation]
    kinds = {}
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), OpsSeen() as seen:
            made_of(*(torch.empty(s, device=device) for s in (6, (5, 4), (4, 6))), use_gelu=True)
        kinds[device] = seen.options["gelu"]
    assert kinds == {"cpu": {}, "cuda": {"approximate": "tanh"}}


class OpsSeen(torch.utils._python_dispatch.TorchDispatchMode):
    """The keywords that operations were given last."""

    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, dict[str, object]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.options[func.overloadpacket.__name__] = kwargs or {}
        return func(*args, **(kwargs or {}))


# Whole models.


def test_a_sampler_with_triton_s_kernels_draws_the_tokens_and_pixels_of_the_plain_one():
    made = tiny_model(0, torch.float32)
    model = assemble(
        made.found, made.transformer, made.tokenizer, device="cpu", dtype=torch.float32
    )
    fast = assert_draws_the_same(model, tiny_policy("depthvar"), UNGUIDED, [3])
    assert fast.model.transformer.head.weight is model.transformer.head.weight
    assert fast.model.transformer.blocks[0].pointwise is TRITON
    assert model.transformer.blocks[0].pointwise is PLAIN


def test_so_does_one_of_texts():
    """Whose queries and keys turn, with a fitted proxy for the changes of skipped tokens."""
    made = tiny_text_model(0, torch.float32)
    policy = replace(tiny_policy("depthvar-paper"), proxy="calibrated", reference_scale=0)
    made.tokenizer.decoder.to(memory_format=torch.channels_last)
    text = noise(3, made.config.text_width, dtype=torch.float32)
    assert_draws_the_same(made, policy, TEXT_UNGUIDED, [text])


def assert_draws_the_same(
    model: AnyLoaded, policy: DepthPolicy, settings: SamplingSettings, given: Given
) -> Sampler:
    logits: list[list[Tensor]] = []
    samplers = [Sampler(model, policy, settings, pointwise=way) for way in (PLAIN, TRITON)]
    drawn = []
    for sampler in samplers:
        seen: list[Tensor] = []
        drawn.append(
            sampler.tokens(
                given,
                seed=1,
                indices=[4],
                on_scale=lambda _, logits_BTV, __, seen=seen: seen.append(logits_BTV),
            )
        )
        logits.append(seen)
    for plain, fast in zip(*logits, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    want, got = drawn
    for tokens, wanted in zip(got.tokens, want.tokens, strict=True):
        assert torch.equal(tokens, wanted)
    torch.testing.assert_close(got.mean_change_BS, want.mean_change_BS, rtol=1e-4, atol=1e-5)
    pixels = [sampler.decode(want.feature_map_BZHW).int() for sampler in samplers]
    assert (pixels[0] - pixels[1]).abs().max() <= 1
    return samplers[1]


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from depthvar import triton_kernels as kernels


def compiled(kernel, types, **constants):
    names = [parameter.name for parameter in kernel.params]
    signature = {name: types.get(name, "i32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm


for capability, half, stream, wide in (
    (80, "*bf16", "*fp32", tl.float32),
    (90, "*fp16", "*fp32", tl.float32),
    (90, "*fp32", "*fp32", tl.float32),
):
    row = dict(width=1920, block=2048, wide=wide)
    own = dict.fromkeys(("branch", "normed", "queries", "keys", "values", "weight", "bias"), half)
    own |= {"out_" + name: half for name in ("queries", "keys", "values")}
    others = ("x", "gate", "base", "scale", "shift", "added", "total", "compensation", "kept")
    types = own | dict.fromkeys((*others, "rotations", "moments"), stream)
    compiled(kernels.modulate, types, eps=1e-6, **row)
    compiled(kernels.add_change, types, **row)
    heads = dict(num_heads=30, head_dim=64, block_heads=32, block_dim=64, wide=wide)
    turns = {} if half == "*fp16" else {"rotations": None}
    compiled(kernels.put_heads, types, **turns, **heads)
    tile = dict(num_groups=32, group_width=5, block_groups=32, block_width=8, wide=wide)
    tile |= dict(block_pixels=16)
    maps = types | {"x": half}
    compiled(kernels.group_moments, maps, **tile)
    parts = dict(num_parts=100, block_parts=128, eps=1e-6)
    compiled(kernels.group_normalise, maps, silu=True, **parts, **tile)
"""


def test_every_kernel_compiles_for_ampere_and_hopper(tmp_path):
    """In a process of its own, whose Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
