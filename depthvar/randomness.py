"""Random numbers that belong to a sample: a function of (job seed, global index) alone.

Philox is counter based: every sample owns a key, and every use of randomness a counter of its own,
so neither batch, nor worker, nor the number of draws of another sample moves a number. Only raw
64-bit outputs are used, which NumPy guarantees never to change.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from depthvar.errors import InputError

_MAX = 2**64
_TOKENS, _RANKING, _PROMPT = 0, 1, 2


def _uniforms(seed: int, index: int, use: int, count: int) -> npt.NDArray[np.float64]:
    key = np.array([seed, index], dtype=np.uint64)
    counter = np.array([0, 0, 0, use], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _all_uniforms(
    seed: int, indices: Sequence[int], use: int, count: int
) -> npt.NDArray[np.float64]:
    if not 0 <= seed < _MAX:
        raise InputError(f"seed is {seed}, wanted 0 <= seed < 2**64: choose another")
    return np.stack([_uniforms(seed, index, use, count) for index in indices])


def token_uniforms(seed: int, indices: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per token of every sample, in scale order: (B, count)."""
    return _all_uniforms(seed, indices, _TOKENS, count)


def ranking_uniforms(seed: int, indices: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """The numbers that random ranking orders tokens by, independent of the others: (B, count)."""
    return _all_uniforms(seed, indices, _RANKING, count)


def prompt_uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that decides which of its wordings a sample's prompt has."""
    return float(_all_uniforms(seed, [index], _PROMPT, 1)[0, 0])
