"""Random numbers: Philox 4x64-10 written out, golden values, and what a number may depend on."""

from __future__ import annotations

import numpy as np
import pytest

from depthvar.errors import InputError
from depthvar.randomness import ranking_uniforms, token_uniforms

MASK = 2**64 - 1
GOLDEN_TOKENS = [
    [0.011546754286331562, 0.24154919656271812, 0.11142585551493822],
    [0.8133540609793564, 0.7513314251083365, 0.6716490436969984],
]
GOLDEN_RANKING = [
    [0.34218278474233466, 0.5765144536585864, 0.08665198221933101],
    [0.1360783448500149, 0.1521586574569137, 0.7010045827565365],
]


def philox_4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """The generator as published (Salmon et al., SC 2011)."""
    key = list(key)
    for _ in range(10):
        high_0, low_0 = divmod(counter[0] * 0xD2E7470EE14C6C93, 2**64)
        high_1, low_1 = divmod(counter[2] * 0xCA5A826395121157, 2**64)
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


def plain_uniforms(seed: int, index: int, use: int, count: int) -> list[float]:
    """53 bits of every output; the counter is stepped before it is used."""
    outputs: list[int] = []
    step = 1
    while len(outputs) < count:
        outputs += philox_4x64_10([step, 0, 0, use], [seed, index])
        step += 1
    return [(output >> 11) / 2**53 for output in outputs[:count]]


def test_the_plain_philox_gives_the_published_known_answers():
    assert [f"{x:016x}" for x in philox_4x64_10([0, 0, 0, 0], [0, 0])] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]
    assert [f"{x:016x}" for x in philox_4x64_10([MASK] * 4, [MASK] * 2)] == [
        "87b092c3013fe90b",
        "438c3c67be8d0224",
        "9cc7d7c69cd777b6",
        "a09caebf594f0ba0",
    ]


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (1, 0), (0, 1), (7, 123456), (MASK, 2**40)])
def test_uniforms_are_philox_keyed_by_seed_and_index(seed, index):
    assert token_uniforms(seed, [index], 11)[0].tolist() == plain_uniforms(seed, index, 0, 11)
    assert ranking_uniforms(seed, [index], 11)[0].tolist() == plain_uniforms(seed, index, 1, 11)


def test_golden_numbers_never_change():
    """A change here changes every image ever made with a seed."""
    assert token_uniforms(0, [0, 1], 3).tolist() == GOLDEN_TOKENS
    assert ranking_uniforms(0, [0, 1], 3).tolist() == GOLDEN_RANKING


def test_a_sample_s_numbers_do_not_depend_on_its_batch():
    indices = [5, 2**35, 0, 17]
    together = token_uniforms(3, indices, 9)
    assert together.shape == (4, 9)
    for row, index in zip(together, indices, strict=True):
        assert (token_uniforms(3, [index], 9)[0] == row).all()
    assert (token_uniforms(3, indices[::-1], 9) == together[::-1]).all()


def test_more_numbers_begin_with_the_same():
    assert (token_uniforms(3, [4], 100)[:, :7] == token_uniforms(3, [4], 7)).all()


def test_uses_seeds_and_indices_are_independent():
    rows = [
        token_uniforms(0, [0], 200)[0],
        ranking_uniforms(0, [0], 200)[0],
        token_uniforms(1, [0], 200)[0],
        token_uniforms(0, [1], 200)[0],
    ]
    correlation = np.corrcoef(rows) - np.eye(4)
    assert np.abs(correlation).max() < 0.25
    assert len(set(np.concatenate(rows))) == 800


def test_numbers_fill_the_unit_interval_evenly():
    numbers = np.sort(token_uniforms(12, range(40), 250).ravel())
    assert numbers[0] >= 0
    assert numbers[-1] < 1
    even = (np.arange(10_000) + 0.5) / 10_000
    assert np.abs(numbers - even).max() < 0.02


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed):
    with pytest.raises(InputError, match=rf"seed is {seed}, wanted 0 <= seed < 2\*\*64"):
        token_uniforms(seed, [0], 1)
