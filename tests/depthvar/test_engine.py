"""The depth engine alone: against the dense reference, its shapes, its cache, other backbones.

Shape legend: B images, G stream rows, T tokens of a scale, K active tokens, N tokens of an image,
C width, D head channels, M text tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from depthvar.engine import (
    DepthEngine,
    KeyValueCache,
    ProxyFit,
    ScaleTrace,
    parent_positions,
)
from depthvar.layers import Attend
from depthvar.plan import DepthPlan
from depthvar.pointwise import Change
from depthvar.policy import DepthPolicy
from depthvar.presets import PRESETS, make_policy
from depthvar.sampling import Sampler
from depthvar.var.transformer import Condition
from depthvar.weights.checkpoint import LoadedModel
from tests import reference_depthvar as reference
from tests.tiny_models import (
    GUIDED,
    SHAPES,
    covering_policies,
    label_of,
    states,
    tiny_model,
    tiny_policy,
)

CPU = torch.device("cpu")
POLICIES = covering_policies()
IDS = [label_of(policy) for policy in POLICIES]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run_scales(
    engine: DepthEngine[Any], plan: DepthPlan, cache: KeyValueCache, condition: Any, batch: int
) -> list[ScaleTrace]:
    """All scales on random inputs for the two streams of every sample."""
    traces: list[ScaleTrace] = []
    for i, (x_GTC, random_BT) in enumerate(inputs_of(plan, batch)):
        previous = traces[-1] if traces else None
        traces.append(engine.run_scale(i, x_GTC, condition, cache, previous, random_BT))
    return traces


def inputs_of(plan: DepthPlan, batch: int, width: int = 12) -> list[tuple[Tensor, Tensor]]:
    return [
        (noise(2 * batch, scale.count, width, seed=i), noise(batch, scale.count, seed=50 + i))
        for i, scale in enumerate(plan.scales)
    ]


# A backbone that is no VAR: rotary positions in the last channel, and cross attention to a text.


@dataclass
class RotaryText:
    """Blocks whose unit queries turn with a position, which the stream's last channel carries.

    The condition is the text (G, M, C); every token attends to it besides its own kind.
    """

    weights: Tensor  # (L, 4, C, C): query, key, value, text

    def rotations(self, scale: int) -> None:
        return None

    def _turned(self, x_GKC: Tensor, weight: Tensor) -> Tensor:
        a, b = (x_GKC @ weight).chunk(2, dim=-1)
        angle = x_GKC[:, :, -1:]
        turned = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
        return F.normalize(torch.cat(turned, dim=-1), dim=-1)[:, None]

    def query(self, block: int, x_GKC: Tensor) -> Tensor:
        return self._turned(x_GKC, self.weights[block, 0])

    def keys_values(self, block: int, x_GKC: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        value = (x_GKC + condition.mean(1, keepdim=True)) @ self.weights[block, 2]
        return self._turned(x_GKC, self.weights[block, 1]), value[:, None]

    def run_block(self, block: int, x_GKC: Tensor, condition: Tensor, attend: Attend) -> Change:
        keys, values = self.keys_values(block, x_GKC, condition)
        scale_1H11 = torch.ones(1, 1, 1, 1, dtype=keys.dtype)
        attended = attend(self.query(block, x_GKC), keys, values, scale_1H11)[:, 0]
        return Change(self._combined(block, x_GKC, condition, attended))

    def _combined(self, block: int, x_GKC: Tensor, text_GMC: Tensor, attended: Tensor) -> Tensor:
        looks = torch.softmax(x_GKC @ self.weights[block, 3] @ text_GMC.mT, dim=-1)
        added = torch.tanh(attended) + looks @ text_GMC
        return torch.cat([added[:, :, :-1], torch.zeros_like(added[:, :, -1:])], dim=-1)


@dataclass
class DenseRotaryText:
    """The same as the reference wants it: all tokens, with an explicit list of what they see."""

    blocks: RotaryText
    text_GMC: Tensor

    def projections(self, block: int, x_GTC: Tensor) -> list[Tensor]:
        query = self.blocks.query(block, x_GTC)
        return [query, *self.blocks.keys_values(block, x_GTC, self.text_GMC)]

    def output(
        self, block: int, x_GTC: Tensor, q: Tensor, keys: Tensor, values: Tensor, kept_GM: Tensor
    ) -> Tensor:
        def attend(_q: Tensor, _k: Tensor, _v: Tensor, _scale: Tensor) -> Tensor:
            return reference.masked_attention(q, keys, values, kept_GM)

        return x_GTC + self.blocks.run_block(block, x_GTC, self.text_GMC, attend).whole()


def rotary_text(num_blocks: int) -> tuple[RotaryText, Tensor]:
    return RotaryText(0.3 * noise(num_blocks, 4, 12, 12)), noise(6, 4, 12, seed=9)


@pytest.mark.parametrize("number", range(len(POLICIES)), ids=IDS)
def test_a_backbone_with_rotary_positions_and_text_equals_the_dense_reference(number):
    policy, sides, num_blocks = POLICIES[number], (1, 2, 3, 5), 3 + number % 4
    backbone, text_GMC = rotary_text(num_blocks)
    plan = DepthPlan.build(sides, num_blocks, policy)
    fit = ProxyFit(noise(4, num_blocks, 12, seed=3), 0.1 * noise(4, num_blocks, 12, seed=4))
    # Where a token sits must not be moved by a proxy.
    fit.slope_SLC[:, :, -1], fit.offset_SLC[:, :, -1] = 1.0, 0.0
    engine = DepthEngine(backbone, plan, device=CPU, dtype=torch.float64, proxy_fit=fit)
    cache = KeyValueCache(plan, rows=6, heads=1, head_dim=12, like=text_GMC)
    traces = run_scales(engine, plan, cache, text_GMC, batch=3)
    for sample in range(3):
        rows = [sample, sample + 3]
        blocks = DenseRotaryText(backbone, text_GMC[rows])
        fits = (fit.slope_SLC, fit.offset_SLC)
        sampled = sides[: len(plan.scales)]
        dense = reference.DenseDepth(blocks, reference.squares(sampled), num_blocks, policy, *fits)
        for i, (x_GTC, random_BT) in enumerate(inputs_of(plan, 3)):
            want = dense.run_scale(x_GTC[rows], random_BT[sample].tolist())
            close = {"rtol": 0, "atol": 1e-9}
            torch.testing.assert_close(traces[i].hidden_GTC[rows], want.hidden_GTC, **close)
            torch.testing.assert_close(traces[i].change_BT[sample], want.seen(None)[1], **close)
            weights_T = engine.code_weights(i, traces[i])[sample]
            torch.testing.assert_close(weights_T, want.code_weights_T, **close)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_active_tokens_are_those_of_the_boolean_mask_of_every_block(shape):
    """The prefix of the slots, taken back to raster order, is the reference's mask."""
    model = tiny_model(shape)
    policy = make_policy("depthvar-paper", reference_scale=1)
    plan = DepthPlan.build(model.config.sides, model.config.num_blocks, policy)
    engine = DepthEngine(model.transformer, plan, device=CPU, dtype=torch.float64)
    labels = [3, model.config.num_classes]
    condition = model.transformer.condition(torch.tensor(labels))
    width = model.config.transformer.width
    blocks = reference.VarBlocks(
        states(model)[0], model.config, states(model)[0]["class_emb.weight"][labels]
    )
    dense = reference.DenseDepth(blocks, plan.grids, plan.num_blocks, policy)
    cache, trace = var_cache(model, plan, rows=2), None
    for i, scale in enumerate(plan.scales):
        x_GTC = noise(2, scale.count, width, seed=i)
        random_BT = torch.zeros(1, scale.count)
        trace = engine.run_scale(i, x_GTC, condition, cache, trace, random_BT)
        want = dense.run_scale(x_GTC, random_BT[0].tolist())
        slots_T = trace.slot_of_raster_GT[0]
        masks = [(slots_T < scale.prefix[block]).tolist() for block in range(plan.num_blocks)]
        assert [[mask_T] * 2 for mask_T in masks] == want.active
        assert sorted(slots_T.tolist()) == list(range(scale.count))


def var_cache(model: LoadedModel, plan: DepthPlan, rows: int) -> KeyValueCache:
    shape = model.config.transformer
    like = model.transformer.pos_start
    return KeyValueCache(plan, rows, shape.num_heads, shape.head_dim, like)


# Full depth.


def all_tokens_permuted(plan: DepthPlan) -> DepthPlan:
    """The same plan at full depth, its tokens ranked all the same, with slots turned around."""
    scales = [plan.scales[0]]
    for scale in plan.scales[1:]:
        scales.append(replace(scale, ranked=True, rank_of_slot=scale.rank_of_slot[::-1].copy()))
    return replace(plan, scales=tuple(scales))


@pytest.mark.parametrize("ranking", ["change", "distance", "random"])
def test_permuting_with_every_token_active_changes_nothing(ranking):
    backbone, text_GMC = rotary_text(5)
    plain = DepthPlan.build((1, 2, 3, 5), 5, DepthPolicy(ranking=ranking))
    outputs = []
    for plan in (plain, all_tokens_permuted(plain)):
        engine = DepthEngine(backbone, plan, device=CPU, dtype=torch.float64)
        cache = KeyValueCache(plan, rows=6, heads=1, head_dim=12, like=text_GMC)
        outputs.append(run_scales(engine, plan, cache, text_GMC, batch=3))
    moved = outputs[1][-1].slot_of_raster_GT
    assert not torch.equal(moved, outputs[0][-1].slot_of_raster_GT)
    for full, permuted in zip(*outputs, strict=True):
        close = {"rtol": 0, "atol": 1e-12}
        torch.testing.assert_close(permuted.hidden_GTC, full.hidden_GTC, **close)
        torch.testing.assert_close(permuted.change_BT, full.change_BT, **close)


def test_full_depth_runs_the_backbone_s_blocks_in_order_and_nothing_else():
    """Against a loop over the blocks on the whole sequence under a block-causal mask."""
    backbone, text_GMC = rotary_text(5)
    plan = DepthPlan.build((1, 2, 3, 5), 5, DepthPolicy())
    engine = DepthEngine(backbone, plan, device=CPU, dtype=torch.float64)
    cache = KeyValueCache(plan, rows=6, heads=1, head_dim=12, like=text_GMC)
    traces = run_scales(engine, plan, cache, text_GMC, batch=3)
    x = torch.cat([x_GTC for x_GTC, _ in inputs_of(plan, 3)], dim=1)
    level = torch.cat([torch.full((s * s,), i) for i, (s, _) in enumerate(plan.grids)])
    hidden_from = level[None, :] > level[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, _scale: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(hidden_from, -torch.inf).softmax(-1) @ v

    for block in range(5):
        x = x + backbone.run_block(block, x, text_GMC, attend).whole()
    got = torch.cat([trace.hidden_GTC for trace in traces], dim=1)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-10)


# What a sample depends on.


@pytest.mark.parametrize("policy", POLICIES[::5], ids=label_of)
def test_the_tokens_of_a_sample_do_not_meet_those_of_another(policy):
    plan = DepthPlan.build((1, 2, 3, 5), 5, policy)
    backbone, text_GMC = rotary_text(5)
    fit = ProxyFit(noise(4, 5, 12, seed=3), noise(4, 5, 12, seed=4))
    engine = DepthEngine(backbone, plan, device=CPU, dtype=torch.float64, proxy_fit=fit)
    hidden = []
    for others in (1.0, -3.0):
        cache = KeyValueCache(plan, rows=6, heads=1, head_dim=12, like=text_GMC)
        factor_G = torch.tensor([others, 1.0, others, others, 1.0, others]).double()[:, None, None]
        trace = None
        for i, (x_GTC, random_BT) in enumerate(inputs_of(plan, 3)):
            x_GTC, random_BT = x_GTC * factor_G, random_BT * factor_G[:3, 0]
            trace = engine.run_scale(i, x_GTC, text_GMC * factor_G, cache, trace, random_BT)
        hidden.append(trace.hidden_GTC)
    torch.testing.assert_close(hidden[0][[1, 4]], hidden[1][[1, 4]], rtol=0, atol=1e-12)
    assert (hidden[0][[0, 2]] - hidden[1][[0, 2]]).abs().min(dim=0).values.max() > 0.1


# Static shapes.


class Recorder(TorchDispatchMode):
    """Every operation with the shapes and types of its tensors; those of the block loops apart."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.spans: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        described = [self._described(arg) for arg in (*args, *(kwargs or {}).values())]
        self.operations.append(f"{func}({', '.join(described)})")
        return func(*args, **(kwargs or {}))

    def _described(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype}{tuple(value.shape)}"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(self._described(item) for item in value) + "]"
        return repr(value)

    @property
    def in_block_loops(self) -> list[str]:
        """From the first block's start to the last block's end, of every scale."""
        return [op for begin, end in self.spans for op in self.operations[begin:end]]


@dataclass
class MarkingBackbone:
    """Passes everything on and notes where the recorder stands at a scale's blocks."""

    inner: Any
    recorder: Recorder
    num_blocks: int

    def rotations(self, scale: int) -> None:
        return None

    def keys_values(self, block: int, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        return self.inner.keys_values(block, x, condition)

    def run_block(self, block: int, x: Tensor, condition: Condition, attend: Attend) -> Change:
        begin = len(self.recorder.operations)
        if self.recorder.spans and block:
            begin = self.recorder.spans.pop()[0]
        out = self.inner.run_block(block, x, condition, attend)
        self.recorder.spans.append((begin, len(self.recorder.operations)))
        return out


def record(policy: DepthPolicy, seed: int, labels: list[int]) -> Recorder:
    """One batch of the sampler on the second shape, recorded from the condition to the map."""
    model = tiny_model(1)
    recorder = Recorder()
    sampler = Sampler(model, policy, GUIDED)
    sampler._engine._backbone = MarkingBackbone(
        model.transformer, recorder, model.config.num_blocks
    )
    numbers = torch.rand(
        (2, len(labels), model.config.transformer.num_tokens),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    labels_B = torch.tensor(labels)
    with recorder:
        sampler.tokens_from_uniforms(labels_B, *numbers)
    return recorder


ADAPTIVE = [preset for preset in PRESETS if preset not in ("full", "skip-scales")]
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "is_nonzero")
DATA_DEPENDENT = ("masked", "where", "scatter", "index_put", "index.", "sort", "bool")


AT_RANDOM = DepthPolicy("random", reference_scale=1, schedule="linear", ranking="random")
ALL_KEYS = replace(tiny_policy("depthvar"), skipped_keys_values="proxy")
RECORDED = [*map(tiny_policy, ADAPTIVE), AT_RANDOM, ALL_KEYS, make_policy("full")]


@pytest.mark.parametrize("policy", RECORDED, ids=label_of)
def test_operations_and_shapes_are_the_same_for_every_image(policy):
    first, second = record(policy, 0, [0, 1]), record(policy, 1, [4, 3])
    assert first.operations == second.operations
    assert first.spans == second.spans
    assert len(first.spans) >= 3
    assert len(first.in_block_loops) > 0.3 * len(first.operations)


@pytest.mark.parametrize("policy", RECORDED, ids=label_of)
def test_the_block_loop_neither_waits_for_the_host_nor_masks_nor_scatters(policy):
    recorder = record(policy, 0, [0, 1])
    names = {op.removeprefix("aten.").split("(")[0] for op in recorder.in_block_loops}
    assert "scaled_dot_product_attention.default" in names
    for forbidden in (*SYNCHRONISING, *DATA_DEPENDENT):
        assert not [name for name in names if forbidden in name], forbidden
    assert not [op for op in recorder.in_block_loops if "torch.bool" in op]


@pytest.mark.parametrize("policy", RECORDED, ids=label_of)
def test_sampling_never_waits_for_the_host(policy):
    for operation in record(policy, 0, [0, 1]).operations:
        name = operation.removeprefix("aten.").split("(")[0]
        assert not any(forbidden in name for forbidden in SYNCHRONISING), operation
        if name.startswith("index"):
            assert "torch.bool" not in operation, operation


def names_of(operations: list[str]) -> list[str]:
    return [operation.removeprefix("aten.").split(".")[0] for operation in operations]


def test_constants_of_the_parameters_are_made_before_the_first_scale():
    """Joined biases, clamped and raised scales, factors of one more than the linear gives."""
    recorder = record(make_policy("full"), 0, [0, 1])
    in_blocks, num_blocks = names_of(recorder.in_block_loops), tiny_model(1).config.num_blocks
    assert not {"exp", "clamp", "cat", "zeros_like"} & set(in_blocks)
    num_runs = num_blocks * len(tiny_model(1).config.sides)
    assert in_blocks.count("add") == num_runs  # the attention's change, and nothing else
    assert in_blocks.count("linear") == 4 * num_runs


def test_tokens_move_as_whole_rows():
    """Into the slots, out of them, and where a block skips some; no channel by itself."""
    policy, config = tiny_policy("depthvar-paper"), tiny_model(1).config
    plan = DepthPlan.build(config.sides, config.num_blocks, policy)
    ranked = [scale for scale in plan.scales if scale.ranked]
    skipping = sum(active < scale.count for scale in ranked for active in scale.prefix)
    recorder = record(policy, 0, [0, 1])
    moves = [op for op in recorder.operations if "index_select" in op and ", 0, torch" in op]
    assert len(moves) == 2 * len(ranked) + skipping
    assert not {"gather", "arange"} & set(names_of(recorder.in_block_loops))
    assert all("take_along_dim" not in op for op in recorder.operations)


def blocks_see(policy: DepthPolicy) -> list[int]:
    """Tokens given to every block, scale after scale, as a backbone sees them."""
    plan = DepthPlan.build((1, 2, 3, 5), 6, policy)
    backbone, text_GMC = rotary_text(6)
    seen: list[int] = []

    class Counting(RotaryText):
        def run_block(self, block: int, x: Tensor, condition: Tensor, attend: Attend) -> Change:
            seen.append(x.shape[1])
            return super().run_block(block, x, condition, attend)

    engine = DepthEngine(Counting(backbone.weights), plan, device=CPU, dtype=torch.float64)
    cache = KeyValueCache(plan, rows=6, heads=1, head_dim=12, like=text_GMC)
    run_scales(engine, plan, cache, text_GMC, batch=3)
    return seen


def test_scales_whose_tokens_all_have_one_depth_are_neither_ranked_nor_permuted():
    """Octaves with nothing to share out do, operation for operation, what uniform depth does."""

    def operations(schedule: str) -> list[str]:
        policy = DepthPolicy(reference_scale=1, schedule=schedule, compensation=True)
        plan = DepthPlan.build((1, 2, 4), 4, policy)
        backbone, text_GMC = rotary_text(4)
        engine = DepthEngine(backbone, plan, device=CPU, dtype=torch.float64)
        cache = KeyValueCache(plan, rows=6, heads=1, head_dim=12, like=text_GMC)
        with Recorder() as recorder:
            run_scales(engine, plan, cache, text_GMC, batch=3)
        return [op for op in recorder.operations if "randn" not in op]

    assert operations("octaves") == operations("constant")
    assert not [op for op in operations("octaves") if "sort" in op or "gather" in op]
    assert [op for op in operations("linear") if "sort" in op]


def test_blocks_run_on_exactly_the_tokens_that_the_plan_counts():
    policy = make_policy("depthvar-paper", reference_scale=1)
    plan = DepthPlan.build((1, 2, 3, 5), 6, policy)
    assert blocks_see(policy) == [k for scale in plan.scales for k in scale.prefix if k]
    assert sum(blocks_see(policy)) == plan.token_layers < plan.full_token_layers


# The parts.


@pytest.mark.parametrize("rows", range(1, 10))
def test_a_token_s_parent_covers_its_centre(rows):
    for columns, *coarse in itertools.product((1, 3, 8), range(1, 10), (1, 2, 5)):
        grid = (rows, columns)
        parents = parent_positions(grid, tuple(coarse), CPU).tolist()
        assert parents == reference.covering_token(grid, tuple(coarse))
        for position, parent in enumerate(parents):
            for mine, its, length, short in zip(
                divmod(position, columns), divmod(parent, coarse[1]), grid, coarse, strict=True
            ):
                centre = (mine + Fraction(1, 2)) / length
                assert Fraction(its, short) <= centre <= Fraction(its + 1, short)


def cache_of(policy: DepthPolicy, sides: tuple[int, ...] = (1, 2, 3)) -> tuple[DepthPlan, Any]:
    plan = DepthPlan.build(sides, 5, policy)
    return plan, KeyValueCache(plan, rows=2, heads=3, head_dim=4, like=noise(1))


@pytest.mark.parametrize("policy", POLICIES, ids=label_of)
def test_the_cache_is_as_long_as_the_keys_that_are_made(policy):
    plan = DepthPlan.build((1, 2, 3, 5), 5, policy)
    backbone, text_GMC = rotary_text(5)
    made = [0] * 5

    class Counting(RotaryText):
        def keys_values(self, block: int, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
            made[block] += x.shape[1]
            return super().keys_values(block, x, condition)

    fit = ProxyFit(noise(4, 5, 12, seed=3), noise(4, 5, 12, seed=4))
    backbone = Counting(backbone.weights)
    engine = DepthEngine(backbone, plan, device=CPU, dtype=torch.float64, proxy_fit=fit)
    cache = KeyValueCache(plan, rows=6, heads=1, head_dim=12, like=text_GMC)
    run_scales(engine, plan, cache, text_GMC, batch=3)
    assert plan.cache_lengths == tuple(made)
    for block in range(5):
        with pytest.raises(AssertionError):
            cache.append(block, noise(6, 1, 1, 12), noise(6, 1, 1, 12))


def test_the_cache_gives_attention_over_what_was_appended_and_nothing_else():
    _, cache = cache_of(DepthPolicy())
    keys, values, queries = noise(2, 3, 6, 4), noise(2, 3, 6, 4, seed=1), noise(2, 3, 2, 4, seed=2)
    for block, lengths in ((0, (1, 5)), (3, (2, 1, 3))):
        begin = 0
        for length in lengths:
            part = slice(begin, begin + length)
            cache.append(block, keys[:, :, part], values[:, :, part])
            begin += length
            weights = torch.softmax(queries @ keys[:, :, :begin].mT, dim=-1)
            want = weights @ values[:, :, :begin]
            torch.testing.assert_close(cache.attend(block, queries), want, rtol=0, atol=1e-12)


def traces_of(policy: DepthPolicy) -> list[ScaleTrace]:
    plan = DepthPlan.build((1, 2, 3, 5), 5, policy)
    backbone, text_GMC = rotary_text(5)
    engine = DepthEngine(backbone, plan, device=CPU, dtype=torch.float64)
    cache = KeyValueCache(plan, rows=6, heads=1, head_dim=12, like=text_GMC)
    return run_scales(engine, plan, cache, text_GMC, batch=3)


def test_the_changes_that_are_kept_are_all_that_is_added_to_the_stream():
    policy = make_policy("depthvar-paper", reference_scale=0)
    traces = traces_of(policy)
    inputs = inputs_of(DepthPlan.build((1, 2, 3, 5), 5, policy), 3)
    for (x_GTC, _), trace in zip(inputs[:-1], traces[:-1], strict=True):
        total_GTC = sum(trace.changes).take_along_dim(trace.slot_of_raster_GT[:, :, None], dim=1)
        torch.testing.assert_close(trace.hidden_GTC, x_GTC + total_GTC, rtol=0, atol=1e-12)


def test_no_change_is_kept_that_no_one_asks_for():
    for policy in (make_policy("full"), make_policy("uniform", reference_scale=1)):
        for trace in traces_of(policy):
            assert trace.changes == (None,) * 5
    raw = traces_of(make_policy("depthvar-paper", reference_scale=1))
    assert raw[0].changes == (None,) * 5
    assert any(change is not None for change in raw[1].changes)
    assert raw[3].changes == (None,) * 5


@dataclass
class BackAndForth:
    """Adds a number to 5 of 12 channels at even blocks and takes it away at odd ones."""

    step: float

    def rotations(self, scale: int) -> None:
        return None

    def keys_values(self, block: int, x: Tensor, condition: None) -> tuple[Tensor, Tensor]:
        return x[:, None], x[:, None]

    def run_block(self, block: int, x: Tensor, condition: None, attend: Attend) -> Change:
        step_C = torch.tensor([self.step] * 5 + [0.0] * 7, dtype=x.dtype)
        return Change((step_C if block % 2 == 0 else -step_C).expand_as(x))


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.bfloat16, 1 + 2**-7), (torch.float16, 1 + 2**-10)]
)
def test_the_ranking_signal_is_summed_in_float32_in_half_precision(dtype, step):
    plan = DepthPlan.build((1, 2), 5, DepthPolicy())
    engine = DepthEngine(BackAndForth(step), plan, device=CPU, dtype=dtype)
    cache = KeyValueCache(plan, rows=2, heads=1, head_dim=12, like=torch.zeros(1, dtype=dtype))
    x_GTC = torch.zeros(2, 1, 12, dtype=dtype)
    trace = engine.run_scale(0, x_GTC, None, cache, None, torch.zeros(1, 1))
    assert trace.hidden_GTC.dtype == dtype
    # Five changes in each of two streams: a mean and a sum that half precision cannot hold.
    exact = 5 * 2 * step * 5 / 12
    assert trace.change_BT.item() == pytest.approx(exact, rel=1e-6)
    assert torch.tensor(exact, dtype=dtype).item() != pytest.approx(exact, rel=1e-5)
