"""Text states in safetensors files: for each prompt what the encoder made of its tokens.

A file holds a float array (tokens, width) for each prompt, named by the SHA-256 of the prompt in
UTF-8 (`prompt_sha256`), or by the prompt itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from depthvar.errors import InputError, naming, shown
from depthvar.weights.files import sha256_of

Encode = Callable[[Sequence[str]], list[np.ndarray]]
"""Gives the states of each prompt, (tokens, width), float16 or float32."""

_DTYPES = ("F16", "F32")


def prompt_sha256(prompt: str) -> str:
    """What a prompt's states are called."""
    return hashlib.sha256(prompt.encode()).hexdigest()


def write_states(path: Path | str, states: Mapping[str, Any]) -> None:
    """Write a file for `--text-states`: for each prompt an array or CPU tensor (tokens, width).

    float16 is kept, everything else becomes float32. Errors: `InputError` for another shape.
    """
    arrays = {}
    for prompt, given in states.items():
        array = np.ascontiguousarray(given)
        if array.ndim != 2:
            raise InputError(
                f"got states of shape {array.shape} for {shown(prompt)}, wanted (tokens, width)"
            )
        dtype = np.float16 if array.dtype == np.float16 else np.float32
        arrays[prompt_sha256(prompt)] = array.astype(dtype)
    with naming(path):
        save_file(arrays, path)


@dataclass(frozen=True)
class GivenStates:
    """A file with the states of prompts, in place of the encoder that made them.

    Errors: `InputError` for a file that is none.
    """

    path: Path

    def __post_init__(self) -> None:
        """Read the names."""
        _ = self._names

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, which is read when it is first asked for."""
        return sha256_of(self.path)

    def check(self, prompts: Iterable[str], *, width: int, max_tokens: int) -> None:
        """`InputError` unless the states of all prompts are there, of this width and length."""
        prompts = list(prompts)
        missing = [prompt for prompt in prompts if self._name(prompt) is None]
        if missing:
            raise InputError(
                f"{self.path} holds no states of {len(missing):,} of {len(prompts):,} prompts, the"
                f" first {shown(missing[0])}: add them, or give --text-encoder"
            )
        with self._open() as file:
            for prompt in prompts:
                found = file.get_slice(self._name(prompt))
                shape, dtype = tuple(found.get_shape()), found.get_dtype()
                is_right = len(shape) == 2 and 1 <= shape[0] <= max_tokens
                if not is_right or shape[1] != width or dtype not in _DTYPES:
                    raise InputError(
                        f"{self.path} holds states of shape {shape} and type {dtype} for"
                        f" {shown(prompt)}, wanted (1 to {max_tokens} tokens, {width}) of F16"
                        " or F32: make them with the encoder of this model"
                    )

    def num_bytes(self, *, half: bool) -> int:
        """Nothing stays in memory."""
        return 0

    def load(self, device: str, *, half: bool, threads: int) -> Encode:
        """What reads the states of prompts, as they were stored."""
        return self._read

    def _read(self, prompts: Sequence[str]) -> list[np.ndarray]:
        with self._open() as file:
            found = [file.get_tensor(self._name(prompt)) for prompt in prompts]
        for prompt, states in zip(prompts, found, strict=True):
            if not np.isfinite(states).all():
                raise InputError(f"{self.path} holds states that are no numbers: {shown(prompt)}")
        return found

    def _name(self, prompt: str) -> str | None:
        """What the file calls a prompt."""
        return next((n for n in (prompt_sha256(prompt), prompt) if n in self._names), None)

    @cached_property
    def _names(self) -> frozenset[str]:
        with self._open() as file:
            return frozenset(file.keys())

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"got the text states {self.path}, which cannot be read as safetensors ({error}):"
                " name a file that depthvar.text.states.write_states wrote"
            ) from error
