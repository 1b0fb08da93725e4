"""Drawing against exact distributions, written out by hand or by the plain reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from depthvar.draw import Drawn, draw_tokens
from depthvar.settings import SamplingSettings
from tests import reference_depthvar as reference

ALL = SamplingSettings(cfg=0.0, top_k=0, top_p=1.0)
JUST_BELOW_ONE = 1 - 2**-53


def keep(top_k: int = 0, top_p: float = 1.0) -> SamplingSettings:
    return SamplingSettings(cfg=0.0, top_k=top_k, top_p=top_p)


def draw_one(logits: list[float], how: SamplingSettings, *uniforms: float, dtype=torch.float64):
    """One position drawn with each uniform: the draw as a batch of one sample."""
    logits_BTV = torch.tensor([[logits] * len(uniforms)], dtype=dtype)
    return draw_tokens(logits_BTV, torch.tensor([uniforms], dtype=torch.float64), how)


def probs_by_code(drawn: Drawn, place: int = 0) -> list[float]:
    return drawn.probs[0, place].tolist()


def survivors(logits: list[float], how: SamplingSettings) -> set[int]:
    return {code for code, p in enumerate(probs_by_code(draw_one(logits, how, 0.5))) if p > 0}


# The plain sibling: every code sorted.


def drawn_by_sorting(logits_BTV: Tensor, uniforms_BT: Tensor, how: SamplingSettings):
    """Tokens, log-probabilities and probabilities by code, with all codes sorted by (logit, code).

    In float64, so that rounding moves nothing.
    """
    num_codes = logits_BTV.shape[2]
    ascending_BTV, codes_BTV = logits_BTV.double().sort(dim=2, stable=True)
    if 0 < how.top_k < num_codes:
        kth = ascending_BTV[:, :, num_codes - how.top_k, None]
        ascending_BTV = ascending_BTV.masked_fill(ascending_BTV < kth, -torch.inf)
    probs_BTV = ascending_BTV.softmax(dim=2)
    is_dropped_BTV = probs_BTV.cumsum(dim=2) <= 1 - how.top_p
    is_dropped_BTV[:, :, -1] = False
    probs_BTV = probs_BTV.masked_fill(is_dropped_BTV, 0)
    probs_BTV = probs_BTV / probs_BTV.sum(dim=2, keepdim=True)
    place_BT1 = (probs_BTV.cumsum(dim=2) <= uniforms_BT[:, :, None]).sum(dim=2, keepdim=True)
    place_BT1 = place_BT1.clamp(max=num_codes - 1)
    tokens_BT, log_prob_BT = (
        values.gather(2, place_BT1)[:, :, 0] for values in (codes_BTV, probs_BTV.log())
    )
    return tokens_BT, log_prob_BT, torch.zeros_like(probs_BTV).scatter(2, codes_BTV, probs_BTV)


def some_logits(kind: str, num_codes: int = 300) -> Tensor:
    """60 positions; in bfloat16 a third of the codes share their logit with another."""
    generator = torch.Generator().manual_seed(6)
    logits_BTV = 3 * torch.randn(4, 15, num_codes, generator=generator, dtype=torch.float64)
    if kind == "bfloat16":
        return logits_BTV.bfloat16().float()
    if kind == "whole numbers":
        return logits_BTV.round().float()
    if kind == "with -inf":
        return logits_BTV.masked_fill(logits_BTV < 1, -torch.inf).float()
    return logits_BTV.to(getattr(torch, kind))


KINDS = ("float64", "float32", "bfloat16", "whole numbers", "with -inf")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [0, 1, 60, 200, 299, 300, 301])
def test_a_draw_is_that_of_sorting_every_code(kind: str, top_k: int):
    for top_p in (1e-9, 0.5, 0.96, 1.0):
        assert_drawn_as_by_sorting(kind, keep(top_k, top_p))


def assert_drawn_as_by_sorting(kind: str, how: SamplingSettings) -> None:
    logits_BTV = some_logits(kind)
    uniforms_BT = torch.rand(4, 15, generator=torch.Generator().manual_seed(7)).double()
    drawn = draw_tokens(logits_BTV, uniforms_BT, how)
    tokens_BT, log_prob_BT, probs_BTV = drawn_by_sorting(logits_BTV, uniforms_BT, how)
    assert drawn.tokens.equal(tokens_BT)
    atol = 1e-12 if kind == "float64" else 3e-6
    torch.testing.assert_close(drawn.log_prob_BT.double(), log_prob_BT, rtol=0, atol=atol)
    torch.testing.assert_close(drawn.probs.double(), probs_BTV, rtol=0, atol=atol)
    assert ((drawn.probs > 0) == (probs_BTV > 0)).all()


@pytest.mark.parametrize(("top_k", "num_sorted"), [(900, 900), (0, 4096), (5000, 4096)])
def test_only_the_k_largest_logits_are_sorted_and_summed(top_k: int, num_sorted: int):
    """Of all the codes: one selection, and what finds equal ones by counting them."""
    logits_BTV = torch.randn(2, 3, 4096, generator=torch.Generator().manual_seed(8))
    with Operations() as made:
        draw_tokens(logits_BTV, torch.rand(2, 3).double(), keep(top_k, 0.96))
    over_all = [name for name, size in made.widest if size == logits_BTV.numel()]
    if num_sorted == 4096:
        assert over_all.count("sort") == 1
        assert "topk" not in over_all
        return
    found_by_counting = ["eq", "cumsum", "slice", "searchsorted"] * 2  # of the cut and of the token
    assert sorted(over_all) == sorted(["topk", "eq", "sum", *found_by_counting])


class Operations(TorchDispatchMode):
    """Names of the operations, with the elements of the largest tensor that each was given."""

    def __init__(self) -> None:
        super().__init__()
        self.widest: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sizes = [arg.numel() for arg in args if isinstance(arg, Tensor)]
        self.widest.append((func.overloadpacket.__name__, max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


# Top-k.


def test_top_k_keeps_the_k_largest():
    logits = [0.3, -1.0, 2.0, 0.5, -4.0]
    assert [survivors(logits, keep(top_k=k)) for k in (1, 2, 3, 4, 5, 6)] == [
        {2},
        {2, 3},
        {0, 2, 3},
        {0, 1, 2, 3},
        {0, 1, 2, 3, 4},
        {0, 1, 2, 3, 4},
    ]


def test_top_k_keeps_every_code_equal_to_the_kth():
    logits = [1.0, 3.0, 1.0, 0.0, 1.0, 2.0]
    assert survivors(logits, keep(top_k=3)) == {0, 1, 2, 4, 5}
    assert survivors(logits, keep(top_k=2)) == {1, 5}
    assert survivors([0.0] * 7, keep(top_k=2)) == set(range(7))


def test_top_k_of_zero_keeps_all():
    assert survivors([5.0, 0.0, -5.0], keep(top_k=0)) == {0, 1, 2}


# Top-p.


def test_top_p_drops_the_ascending_tail_whose_cumulative_probability_is_at_most_what_is_left_out():
    """Four equal codes of a quarter each, and code 4 of almost nothing."""
    logits = [0.0, 0.0, 0.0, 0.0]
    # Exactly 1 - p is dropped: a quarter at p = 3/4.
    assert survivors(logits, keep(top_p=0.75)) == {1, 2, 3}
    assert survivors(logits, keep(top_p=0.7500001)) == {0, 1, 2, 3}
    assert survivors(logits, keep(top_p=0.7499999)) == {1, 2, 3}
    assert survivors(logits, keep(top_p=0.5)) == {2, 3}
    assert survivors([math.log(p) for p in (0.05, 0.5, 0.15, 0.3)], keep(top_p=0.85)) == {1, 2, 3}
    assert survivors([math.log(p) for p in (0.05, 0.5, 0.15, 0.3)], keep(top_p=0.75)) == {1, 3}


def test_equal_logits_are_dropped_in_the_order_of_their_codes():
    logits = [2.0, 0.0, 1.0, 0.0, 1.0]
    total = 2 + 2 * math.e + math.e**2
    almost_two_zeros = 1 - 1.99 / total
    assert survivors(logits, keep(top_p=almost_two_zeros)) == {0, 2, 3, 4}
    two_zeros_and_a_one = 1 - (2 + math.e + 1e-6) / total
    assert survivors(logits, keep(top_p=two_zeros_and_a_one)) == {0, 4}


def test_the_likeliest_code_is_always_kept_of_equals_the_last():
    assert survivors([0.0, 5.0, 1.0], keep(top_p=1e-9)) == {1}
    assert survivors([0.0, 5.0, 5.0, 1.0], keep(top_p=1e-9)) == {2}
    # In float32 all probability is at most 1 - p here.
    rounded = draw_one([0.0, 5.0, 1.0], keep(top_p=1e-9), 0.0, 0.5, dtype=torch.float32)
    assert rounded.tokens.tolist() == [[1, 1]]
    assert probs_by_code(rounded) == [0.0, 1.0, 0.0]


def test_top_p_counts_only_what_top_k_left():
    """Of 0.4, 0.3, 0.2, 0.1 the two best become 4/7 and 3/7; 3/7 goes where 1 - p >= 3/7."""
    logits = [math.log(p) for p in (0.1, 0.3, 0.2, 0.4)]
    assert survivors(logits, keep(top_k=2, top_p=0.58)) == {1, 3}
    assert survivors(logits, keep(top_k=2, top_p=0.57)) == {3}
    assert survivors(logits, keep(top_k=0, top_p=0.57)) == {1, 3}


# The draw.


def test_a_uniform_picks_by_ascending_logit_then_code():
    """By ascending (logit, code): code 2 has 1/8, codes 0 and 3 1/8 each ... of code 1 the rest."""
    logits = [math.log(2), math.log(4), 0.0, math.log(2)]
    total = 9
    edges = [1 / total, 3 / total, 5 / total]
    uniforms = [0.0, *(e + d for e in edges for d in (-1e-9, 1e-9)), JUST_BELOW_ONE]
    assert draw_one(logits, ALL, *uniforms).tokens.tolist() == [[2, 2, 0, 0, 3, 3, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_unit_interval_pick_the_first_and_the_last_of_what_is_kept(dtype):
    logits = torch.randn(4096, generator=torch.Generator().manual_seed(0)).tolist()
    for how in (ALL, keep(900, 0.96), keep(900, 1.0), keep(0, 0.5), keep(1, 1.0), keep(0, 1e-6)):
        drawn = draw_one(logits, how, 0.0, JUST_BELOW_ONE, dtype=dtype)
        kept = sorted(survivors(logits, how), key=lambda code: logits[code])
        assert drawn.tokens.tolist() == [[kept[0], kept[-1]]]


def test_a_dropped_code_is_never_drawn():
    logits_BTV = 3 * torch.randn(20, 50, 40, generator=torch.Generator().manual_seed(1))
    uniforms_BT = torch.rand(20, 50, generator=torch.Generator().manual_seed(2)).double()
    drawn = draw_tokens(logits_BTV, uniforms_BT, keep(12, 0.7))
    assert torch.isfinite(drawn.log_prob_BT).all()
    assert (drawn.log_prob_BT <= 0).all()


def test_rounding_draws_no_dropped_code_among_equals():
    halves = [0, 2, 0, 1, 0, 1, 1, 1, 0, 2, 2, 0, 0, 1, 2, 0, 0, 2, 0, 2, 2, 2, 2, 2]
    drawn = draw_one([h / 2 for h in halves], keep(0, 0.6578925), 0.0, dtype=torch.float32)
    first = next(code for code, p in enumerate(probs_by_code(drawn)) if halves[code] == 1 and p > 0)
    assert drawn.tokens.tolist() == [[first]]


def test_frequencies_are_the_exact_distribution():
    """On an even grid of uniforms a code comes as often as it is likely, to one draw."""
    logits = [0.1, 1.3, -0.4, 0.9, 0.1, -2.0, 1.2]
    count = 5000
    uniforms = [(i + 0.5) / count for i in range(count)]
    how = keep(6, 0.9)
    drawn = draw_one(logits, how, *uniforms)
    frequencies = torch.bincount(drawn.tokens[0], minlength=7).tolist()
    exact = reference.draw(logits, 0.5, how).probs_V
    assert exact[5] == exact[2] == 0
    assert frequencies == pytest.approx([count * p for p in exact], abs=1)


def test_log_probabilities_are_those_of_the_truncated_distribution():
    logits = [math.log(p) for p in (0.1, 0.3, 0.2, 0.4)]
    drawn = draw_one(logits, keep(top_k=3), 0.1, 0.3, 0.9)
    assert drawn.tokens.tolist() == [[2, 1, 3]]
    want = [math.log(p / 0.9) for p in (0.2, 0.3, 0.4)]
    assert drawn.log_prob_BT[0].tolist() == pytest.approx(want, abs=1e-12)
    assert draw_one(logits, keep(top_k=1), 0.7).log_prob_BT.item() == pytest.approx(0, abs=1e-12)


def test_expected_codes_are_the_mean_under_the_truncated_distribution():
    codebook_VZ = torch.tensor([[1.0, 0.0], [0.0, 8.0], [3.0, -1.0], [100.0, 100.0]]).double()
    logits = [math.log(p) for p in (0.2, 0.3, 0.4, 0.1)]
    drawn = draw_one(logits, keep(top_k=3), 0.5)
    want = [(0.2 * 1 + 0.4 * 3) / 0.9, (0.3 * 8 - 0.4) / 0.9]
    assert drawn.expected_codes(codebook_VZ)[0, 0].tolist() == pytest.approx(want, abs=1e-12)


def test_entropy_and_spread_are_those_of_the_truncated_distribution():
    """Of two samples of three positions, so that no sum runs over a wrong axis."""
    generator = torch.Generator().manual_seed(6)
    logits_BTV = torch.randn(2, 3, 7, generator=generator).double()
    codebook_VZ = torch.randn(7, 4, generator=generator).double()
    drawn = draw_tokens(logits_BTV, torch.full((2, 3), 0.5).double(), keep(5, 0.8))
    entropy_BT, spread_BT = drawn.entropy(), drawn.spread(codebook_VZ)
    assert entropy_BT.shape == spread_BT.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            probs = drawn.probs[b, t].tolist()
            mean = sum(p * code for p, code in zip(probs, codebook_VZ, strict=True))
            apart = [float((code - mean).square().sum()) for code in codebook_VZ]
            entropy = -sum(p * math.log(p) for p in probs if p > 0)
            spread = sum(p * distance for p, distance in zip(probs, apart, strict=True))
            assert entropy_BT[b, t].item() == pytest.approx(entropy, abs=1e-12)
            assert spread_BT[b, t].item() == pytest.approx(spread, abs=1e-12)


def test_what_the_codes_are_in_is_what_their_means_are_in():
    drawn = draw_one([0.0, 1.0, 2.0], ALL, 0.5)
    codebook_VZ = torch.ones(3, 2, dtype=torch.float32)
    assert drawn.expected_codes(codebook_VZ).dtype == torch.float32
    assert drawn.spread(codebook_VZ).dtype == torch.float32


def test_positions_and_samples_are_drawn_apart():
    logits_BTV = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(4)).double()
    uniforms_BT = torch.rand(3, 5, generator=torch.Generator().manual_seed(5)).double()
    how = keep(8, 0.9)
    drawn = draw_tokens(logits_BTV, uniforms_BT, how)
    for b in range(3):
        for t in range(5):
            want = reference.draw(logits_BTV[b, t].tolist(), uniforms_BT[b, t].item(), how)
            assert drawn.tokens[b, t] == want.code
            assert drawn.log_prob_BT[b, t].item() == pytest.approx(want.log_prob, abs=1e-12)


def no_code_is_at_the_edge(logits: Tensor, uniform: float, how: SamplingSettings) -> bool:
    """Whether rounding cannot decide: no cumulative probability lies at 1 - p or at the uniform."""
    want = reference.draw(logits.tolist(), uniform, keep(how.top_k))
    ordered = sorted(range(len(logits)), key=lambda code: (logits[code], code))
    cumulative = torch.tensor([want.probs_V[code] for code in ordered]).double().cumsum(0)
    truncated = reference.draw(logits.tolist(), uniform, how)
    walked = torch.tensor([truncated.probs_V[code] for code in ordered]).double().cumsum(0)
    gaps = torch.cat([cumulative - (1 - how.top_p), walked - uniform]).abs()
    return bool(gaps.min() > 1e-9)


@given(
    halves=st.lists(st.integers(-8, 8), min_size=1, max_size=24),
    uniform=st.floats(0, JUST_BELOW_ONE),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.01, 1),
)
@example(halves=[0] * 8, uniform=0.3, top_k=3, top_p=0.6)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_draw_with_many_ties_equals_the_plain_one(halves, uniform, top_k, top_p):
    logits = torch.tensor(halves, dtype=torch.float64) / 2
    how = keep(top_k, top_p)
    if not no_code_is_at_the_edge(logits, uniform, how):
        return
    got = draw_one(logits.tolist(), how, uniform)
    want = reference.draw(logits.tolist(), uniform, how)
    assert got.tokens.item() == want.code
    assert probs_by_code(got) == pytest.approx(want.probs_V, abs=1e-9)
