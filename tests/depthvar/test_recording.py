"""A batch as one recording: replayed on other inputs it does what the sampler does without it.

A tape stands in for a CUDA graph where there is no GPU: it keeps the operations that run, their
constants and their order, and runs them again with no line of ours in between.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from depthvar.counting import any_given, blank_model
from depthvar.errors import InputError
from depthvar.pointwise import PLAIN
from depthvar.policy import DepthPolicy
from depthvar.recording import Outputs, Recorded, Replay, pointwise_of, recorder
from depthvar.sampling import SampleBatch, Sampler
from depthvar.triton_pointwise import TRITON
from tests.tiny_models import GUIDED, label_of, tiny_model, tiny_policy, tiny_text_model


class Tape(TorchDispatchMode):
    """Keeps every operation with its operands, to run them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, (args, kwargs or {}), result))
        return result

    def run_again(self, outputs: Outputs) -> Outputs:
        """What the last operations give now for what they gave then."""
        made: dict[int, Any] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value)

        for func, operands, then in self.calls:
            args, kwargs = tree_map(now, operands)
            results = tree_leaves(func(*args, **kwargs))
            made |= {id(a): b for a, b in zip(tree_leaves(then), results, strict=True)}
        return tuple(map(now, outputs))


class Tapes:
    """Records on tapes, and counts them."""

    def __init__(self) -> None:
        self.recordings = 0

    def __call__(self, function: Callable[..., Outputs], inputs: tuple[Any, ...]) -> Replay:
        self.recordings += 1
        with Tape() as tape:
            outputs = function(*inputs)
        return lambda: tape.run_again(outputs)


def assert_same(got: SampleBatch, want: SampleBatch) -> None:
    assert np.array_equal(got.images_BHWC, want.images_BHWC)
    assert np.array_equal(got.depths_BN, want.depths_BN)
    assert np.array_equal(got.mean_change_BS, want.mean_change_BS)
    assert np.array_equal(got.mean_log_prob_BS, want.mean_log_prob_BS)


# Between them they rank by changes, distances and spreads, blend with expected codes, and stop the
# unconditional stream.
POLICIES = (
    *map(tiny_policy, ("depthvar", "spread-pruning", "fastvar")),
    replace(tiny_policy("depthvar-paper"), guided_scales=2, kept_guidance=0.5),
)


@pytest.mark.parametrize("policy", POLICIES, ids=label_of)
def test_a_recorded_batch_makes_the_same_bits_of_every_other_batch(policy):
    model, tapes = tiny_model(0, torch.float32), Tapes()
    plain = Sampler(model, policy, GUIDED)
    recorded = Sampler(model, policy, GUIDED, record=tapes)
    for labels, seed, begin in (([1, 4], 3, 0), ([0, 2], 8, 10), ([3, 3], 8, 12)):
        indices = range(begin, begin + 2)
        assert_same(
            recorded(labels, seed=seed, indices=indices), plain(labels, seed=seed, indices=indices)
        )
    assert tapes.recordings == 2, "the tokens and the pixels, once each"


def test_every_batch_size_is_recorded_once():
    tapes = Tapes()
    model, policy = tiny_model(0, torch.float32), tiny_policy("depthvar")
    plain, recorded = Sampler(model, policy, GUIDED), Sampler(model, policy, GUIDED, record=tapes)
    for labels in ([1, 4, 2], [0], [2, 2, 2], [4]):
        indices = range(len(labels))
        assert_same(
            recorded(labels, seed=1, indices=indices), plain(labels, seed=1, indices=indices)
        )
    assert tapes.recordings == 4


def test_texts_of_most_lengths_share_a_recording_and_stay_themselves():
    model, tapes = tiny_text_model(0, torch.float32), Tapes()
    settings, policy = model.config.sampling, tiny_policy("depthvar-paper")
    plain, recorded = (
        Sampler(model, policy, settings),
        Sampler(model, policy, settings, record=tapes),
    )
    generator = torch.Generator().manual_seed(0)
    for lengths in ((3, 3), (5, 2), (1, 4)):
        texts = [torch.randn(n, model.config.text_width, generator=generator) for n in lengths]
        got, want = (sampler(texts, seed=4, indices=[0, 1]) for sampler in (recorded, plain))
        assert np.array_equal(got.depths_BN, want.depths_BN)
        assert np.allclose(got.mean_log_prob_BS, want.mean_log_prob_BS, atol=1e-4)
        assert abs(got.images_BHWC.astype(int) - want.images_BHWC).max() <= 1
    assert tapes.recordings == 2


def test_a_recording_is_refused_where_there_is_no_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(InputError, match=r"^got --kernels graph .* cpu, .*: use --kernels plain$"):
        recorder("graph", cpu)
    assert recorder("auto", cpu) is recorder("plain", cpu) is recorder("plain", gpu) is None


def test_triton_s_kernels_are_refused_where_nothing_runs_them(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    assert recorder("triton", cpu) is None, "interpreted, and not recorded"
    assert pointwise_of("triton") is TRITON
    assert pointwise_of("graph") is pointwise_of("auto") is PLAIN
    monkeypatch.setattr("depthvar.triton_pointwise.INTERPRETED", False)
    with pytest.raises(InputError, match=r"^got --kernels triton .* cpu, .*: use --kernels plain$"):
        recorder("triton", cpu)
    assert TRITON.runs_on(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "depthvar.triton_pointwise", None)
    with pytest.raises(InputError, match=r"^got --kernels triton, but Triton cannot .* plain$"):
        recorder("triton", cpu)


def test_triton_s_kernels_are_operations_of_a_recording():
    def region(x_GTC: Tensor, branch_GTC: Tensor, gate_G1C: Tensor) -> Outputs:
        total_GT = x_GTC.new_zeros(x_GTC.shape[:2])
        added, normed = TRITON.added_and_modulated(
            x_GTC, branch_GTC, gate_G1C, None, gate_G1C, gate_G1C, eps=1e-6, dtype=torch.float16
        )
        change = TRITON.gated_sum(added, normed, gate_G1C)
        kept = TRITON.add(x_GTC, total_GT, [change], keep=True)
        return x_GTC, total_GT, kept

    tapes, generator = Tapes(), torch.Generator().manual_seed(0)
    recorded = Recorded(region, tapes)
    with torch.inference_mode():
        for _ in range(2):
            given = [torch.randn(2, n, 6, generator=generator) for n in (3, 3, 1)]
            for got, want in zip(recorded(*given), region(*given), strict=True):
                assert torch.equal(got, want)
    assert tapes.recordings == 1


class NoHost(TorchDispatchMode):
    """Refuses operations that see a tensor of the host: a GPU would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, Tensor) or leaf.is_meta, f"{func} meets {leaf.device}"
        return result


@pytest.mark.parametrize("make", [tiny_model, tiny_text_model])
@pytest.mark.parametrize(
    ("policy", "pointwise"),
    [*((policy, PLAIN) for policy in POLICIES), (POLICIES[-1], TRITON)],
    ids=lambda each: label_of(each) if isinstance(each, DepthPolicy) else type(each).__name__,
)
def test_what_is_recorded_never_meets_the_host(policy, pointwise, make):
    """On tensors without values nothing can be decided by one either."""
    model = blank_model(make(0).config, dtype=torch.float32)

    def record(function: Callable[..., Outputs], inputs: tuple[Any, ...]) -> Replay:
        with NoHost():
            outputs = function(*inputs)
        return lambda: outputs

    settings = model.config.sampling
    sampler = Sampler(model, policy, settings, record=record, pointwise=pointwise)
    with torch.inference_mode():
        numbers = (numbers.to("meta") for numbers in sampler._numbers(0, [0, 1]))
        given = model.transformer.tensors_of(any_given(model.config, 2, model.device), 2)
        feature_map_BZHW, *told = sampler._draw(given, *numbers)
        pixels_BHWC, is_finite = sampler._show(feature_map_BZHW)
    assert pixels_BHWC.dtype == torch.uint8
    assert all(values.is_meta for values in (*told, is_finite))
