"""Text states as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from depthvar.errors import InputError
from depthvar.text.states import GivenStates, prompt_sha256, write_states

FOX = np.arange(12, dtype=np.float16).reshape(3, 4) / 7
CAT = np.arange(8, dtype=np.float64).reshape(2, 4) / 7


def test_states_come_back_by_prompt_as_they_were_written(tmp_path: Path):
    path = tmp_path / "states.safetensors"
    write_states(path, {"a fox": torch.from_numpy(FOX), "a cat": CAT})
    assert load_file(path).keys() == {prompt_sha256("a fox"), prompt_sha256("a cat")}
    given = GivenStates(path)
    given.check(["a cat", "a fox"], width=4, max_tokens=3)
    cat, fox = given.load("cpu", half=True, threads=1)(["a cat", "a fox"])
    assert (fox.dtype, cat.dtype) == (np.float16, np.float32)
    assert np.array_equal(fox, FOX)
    assert np.array_equal(cat, CAT.astype(np.float32))


def test_a_file_may_name_states_by_the_prompts_themselves(tmp_path: Path):
    save_file({"a fox": FOX}, tmp_path / "states.safetensors")
    given = GivenStates(tmp_path / "states.safetensors")
    given.check(["a fox"], width=4, max_tokens=512)
    assert np.array_equal(given.load("cpu", half=False, threads=1)(["a fox"])[0], FOX)


@pytest.mark.parametrize(
    ("prompts", "width", "max_tokens", "said"),
    [
        (["a fox", "a cat", "a dog"], 4, 3, "holds no states of 1 of 3 prompts, the first 'a dog'"),
        (["a fox"], 5, 3, r"shape \(3, 4\) and type F16 for 'a fox', wanted \(1 to 3 tokens, 5\)"),
        (["a fox"], 4, 2, r"shape \(3, 4\) .*, wanted \(1 to 2 tokens, 4\) of F16 or F32"),
    ],
)
def test_states_that_do_not_fit_are_refused(
    tmp_path: Path, prompts: list[str], width: int, max_tokens: int, said: str
):
    write_states(tmp_path / "states.safetensors", {"a fox": FOX, "a cat": CAT})
    with pytest.raises(InputError, match=said):
        GivenStates(tmp_path / "states.safetensors").check(
            prompts, width=width, max_tokens=max_tokens
        )


def test_what_holds_no_states_is_refused(tmp_path: Path):
    path = tmp_path / "states.safetensors"
    save_file({"a": np.zeros((2, 4), np.int64), "b": np.zeros(4, np.float32)}, path)
    for name, said in (("a", "type I64"), ("b", r"shape \(4,\)")):
        with pytest.raises(InputError, match=said):
            GivenStates(path).check([name], width=4, max_tokens=9)
    save_file({"a": np.full((2, 4), np.nan, np.float32)}, path)
    with pytest.raises(InputError, match="holds states that are no numbers: 'a'"):
        GivenStates(path).load("cpu", half=False, threads=1)(["a"])
    path.write_bytes(b"no safetensors")
    for no_file in (path, tmp_path / "none"):
        with pytest.raises(InputError, match="cannot be read as safetensors"):
            GivenStates(no_file)
    with pytest.raises(InputError, match=r"shape \(3,\) for 'x', wanted \(tokens, width\)"):
        write_states(path, {"x": np.zeros(3)})
