"""The states of prompts in a dataset: found again, and noticed when they are not what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pipeline.shards.text_states
from pipeline.shards.text_states import TEXT_FOLDER, TextStates
from pipeline.storage import Storage

ENCODER = "ab" * 32
RED, BLUE, LONG = "a red fox", "ein blauer F\u00fcchs", "fox " * 20


def states_of(prompt: str) -> np.ndarray:
    """Another number in every place, as many rows as the prompt has words."""
    rows = len(prompt.split())
    return (np.arange(rows * 4, dtype=np.float16).reshape(rows, 4) + len(prompt)) / 7


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage.open(str(tmp_path / "out"))
    states = TextStates(storage, ENCODER)
    assert states.missing([RED, BLUE, LONG]) == [RED, BLUE, LONG]
    states.publish([RED, BLUE], [states_of(RED), states_of(BLUE)])
    states.publish([LONG], [states_of(LONG).astype(np.float32)])
    return storage


def files(storage: Storage) -> list[Path]:
    """The file of one prompt, then that of two."""
    found = Path(storage.root, TEXT_FOLDER).iterdir()
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


def test_states_come_back_as_float32_by_their_prompt(storage: Storage):
    found = TextStates(storage, ENCODER)
    assert found.missing([LONG, "another", RED, BLUE]) == ["another"]
    for prompt in (RED, LONG, BLUE, RED):
        states = found.of(prompt)
        assert states.dtype == np.float32
        assert np.array_equal(states, states_of(prompt))


def test_states_of_another_encoder_are_not_there(storage: Storage):
    assert TextStates(storage, "cd" * 32).missing([RED, LONG]) == [RED, LONG]


@pytest.mark.parametrize("end", [0, 5, 100, -1])
def test_a_file_that_is_cut_short_counts_as_not_there(storage: Storage, end: int):
    long, _ = files(storage)
    long.write_bytes(long.read_bytes()[:end])
    assert TextStates(storage, ENCODER).missing([RED, LONG, BLUE]) == [LONG]


@pytest.mark.parametrize("header", [b"no json", b"[]", b"{}", b'{"__metadata__": {}}'])
def test_a_foreign_file_counts_as_not_there(storage: Storage, header: bytes):
    long, _ = files(storage)
    long.write_bytes(len(header).to_bytes(8, "little") + header)
    assert TextStates(storage, ENCODER).missing([RED, LONG]) == [LONG]


def test_a_flipped_bit_is_noticed_and_the_file_removed_for_the_next_run(storage: Storage):
    found = TextStates(storage, ENCODER)
    long, _ = files(storage)
    data = bytearray(long.read_bytes())
    data[-1] ^= 1
    long.write_bytes(data)
    with pytest.raises(OSError, match="was damaged and is removed: run it again"):
        found.of(LONG)
    assert np.array_equal(found.of(RED), states_of(RED))
    assert TextStates(storage, ENCODER).missing([RED, LONG]) == [LONG]


def test_states_that_are_not_there_are_told(storage: Storage):
    with pytest.raises(FileNotFoundError, match="lacks states of a prompt: run it again"):
        TextStates(storage, ENCODER).of("another")


def test_memory_is_bounded_and_the_latest_states_are_not_read_twice(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
):
    read: list[int] = []
    read_range = Storage.read_range

    def noted(storage: Storage, name: str, start: int, length: int) -> bytes:
        read.append(length)
        return read_range(storage, name, start, length)

    found = TextStates(storage, ENCODER)
    monkeypatch.setattr(Storage, "read_range", noted)
    monkeypatch.setattr(pipeline.shards.text_states, "_CACHE_BYTES", 4 * 4 * (3 + 3))
    for prompt in (RED, BLUE, RED, BLUE):  # both fit
        found.of(prompt)
    assert read == [2 * 4 * 3, 2 * 4 * 3]
    for prompt in (LONG, LONG, RED):  # which takes the place of both
        found.of(prompt)
    assert read[2:] == [4 * 4 * 20, 2 * 4 * 3]
    assert sum(states.nbytes for states in found._cached.values()) == found._cached_bytes
