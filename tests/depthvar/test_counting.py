"""Operations and bytes, counted: a guard that needs no timer. A change of these numbers is a change
of what the sampler does, up or down, and its commit says which."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from depthvar.config import model_config
from depthvar.counting import BatchWork, OperationCounter, Work, blank_model, work_of_batch
from depthvar.pointwise import PLAIN, Change
from depthvar.presets import make_policy
from depthvar.triton_pointwise import TRITON
from tests.tiny_models import tiny_model, tiny_text_model


def counted(run) -> tuple[int, int]:
    with torch.inference_mode(), OperationCounter() as counter:
        run()
    return counter.operations, counter.operand_bytes


def test_operations_count_with_the_bytes_they_take_and_give():
    x, y = torch.ones(4, 6), torch.ones(6)
    assert counted(lambda: x + y) == (1, 4 * (24 + 6 + 24))
    assert counted(lambda: x.add_(1)) == (1, 4 * (24 + 24))
    assert counted(lambda: F.linear(x, torch.ones(3, 6))) == (2, 4 * 18 + 4 * (24 + 18 + 12))


def test_what_is_only_written_counts_once_and_what_is_changed_twice():
    x, y = torch.ones(4, 6), torch.empty(4, 6)
    assert counted(lambda: y.copy_(x)) == (1, 4 * (24 + 24))
    assert counted(lambda: torch.add(x, x[0], out=y)) == (1, 4 * (24 + 6 + 24))
    change, total = torch.ones(4, 1, 6), torch.zeros(4, 1)
    x_GTC = torch.ones(4, 3, 6)
    reads, writes = 4 * (24 + 4 + 24), 4 * (24 + 4)
    assert counted(lambda: TRITON.add(x_GTC, total, [Change(change)], keep=False)) == (
        1, reads + writes
    )  # fmt: skip
    assert counted(lambda: TRITON.add(x_GTC, total, [Change(change)], keep=True)) == (
        1, reads + writes + 4 * 24
    )  # fmt: skip


def test_views_and_empty_tensors_are_no_work():
    x = torch.ones(4, 6)
    assert counted(lambda: x.t()[:, 1:].unsqueeze(0).expand(5, 6, 3)) == (0, 0)
    assert counted(lambda: torch.empty_like(x)) == (0, 0)


def test_an_expanded_tensor_has_the_bytes_that_it_repeats():
    assert counted(lambda: torch.ones(1, 6).expand(4, 6).clone())[1] == 4 * (6 + 6 + 24)


def test_adding_to_a_slice_is_one_operation():
    def add() -> None:
        x[:, :2] += 1

    x = torch.ones(4, 6)
    assert counted(add) == (1, 4 * 16)


def test_fused_attention_and_resizing_are_one_operation_each():
    q = torch.ones(1, 1, 3, 4)
    assert counted(lambda: F.scaled_dot_product_attention(q, q, q))[0] == 1
    for mode in ("bicubic", "bilinear"):
        assert counted(lambda mode=mode: F.interpolate(q, (5, 5), mode=mode))[0] == 1


@pytest.mark.parametrize(
    ("preset", "options", "operations", "operand_bytes"),
    [
        ("full", {}, 959, 5481110),
        ("full", {"guided_scales": 2}, 953, 3489174),
        ("full", {"guided_scales": 2, "kept_guidance": 0.5}, 960, 3595702),
        ("depthvar", {"reference_scale": 1}, 817, 2621930),
        ("uniform", {"reference_scale": 1}, 761, 2574822),
    ],
)
def test_sampling_a_small_model_does_exactly_this_much(preset, options, operations, operand_bytes):
    work = work_of_batch(tiny_model(0), make_policy(preset, **options), 2)
    assert work.sampling == Work(operations, operand_bytes)
    assert work.decoding == Work(68, 758200)


@pytest.mark.parametrize(
    ("preset", "pointwise", "sampling", "decoding"),
    [
        ("full", PLAIN, Work(1006, 2136110), Work(68, 190450)),
        ("full", TRITON, Work(682, 1483406), Work(71, 177618)),
        ("depthvar", PLAIN, Work(854, 1183274), Work(68, 190450)),
        ("depthvar", TRITON, Work(656, 976010), Work(71, 177618)),
    ],
)
def test_in_half_precision_it_does_exactly_this_much(preset, pointwise, sampling, decoding):
    """What is normed is rounded as it is written, not in a pass of its own."""
    options = {} if preset == "full" else {"reference_scale": 1}
    model = blank_model(tiny_model(0).config, dtype=torch.bfloat16)
    work = work_of_batch(model, make_policy(preset, **options), 2, pointwise)
    assert work == BatchWork(sampling, decoding)


@pytest.mark.parametrize(
    ("name", "operations", "operand_bytes"),
    [("var-d16", 2452, 62207360120), ("var-d30", 3524, 168717250796)],
)
def test_with_triton_s_kernels_published_models_do_exactly_this_much(
    name, operations, operand_bytes
):
    """The rows of docs/performance.md."""
    model = blank_model(model_config(name), dtype=torch.bfloat16)
    work = work_of_batch(model, make_policy("depthvar", reference_scale=5), 50, TRITON)
    assert work == BatchWork(Work(operations, operand_bytes), Work(161, 72005550342))


def test_operations_do_not_depend_on_the_batch():
    work = [work_of_batch(tiny_model(1), make_policy("full"), n) for n in (2, 3)]
    assert work[0].sampling.operations == work[1].sampling.operations
    assert work[0].sampling.operand_bytes < work[1].sampling.operand_bytes


def test_a_model_without_storage_is_counted_like_one_with_it():
    """To within the copies that torch makes of attention's output where it has no kernel."""
    policy = make_policy("uniform", reference_scale=0)
    blank = work_of_batch(blank_model(tiny_model(0).config, dtype=torch.float64), policy, 1)
    real = work_of_batch(tiny_model(0), policy, 1)
    assert blank.decoding == real.decoding
    assert blank.sampling.operations == pytest.approx(real.sampling.operations, rel=0.05)
    assert blank.sampling.operand_bytes == pytest.approx(real.sampling.operand_bytes, rel=0.05)


def test_a_text_model_without_storage_is_counted_like_one_with_it():
    policy = make_policy("uniform", reference_scale=1)
    real = work_of_batch(tiny_text_model(1), policy, 2)
    blank = work_of_batch(blank_model(tiny_text_model(1).config, dtype=torch.float64), policy, 2)
    assert blank.decoding == real.decoding
    assert blank.sampling.operations == pytest.approx(real.sampling.operations, rel=0.05)
    assert blank.sampling.operand_bytes == pytest.approx(real.sampling.operand_bytes, rel=0.05)


def test_a_published_model_can_be_counted_without_its_memory():
    blank = blank_model(model_config("var-d36-512"), dtype=torch.bfloat16)
    assert blank.transformer.head.weight.is_meta
    assert blank.transformer.head.weight.dtype == torch.bfloat16
