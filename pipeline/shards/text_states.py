"""What the text encoder made of a dataset's prompts, kept beside the shards while they are made.

`text-states/*.safetensors`: float arrays (tokens, width), each named by the SHA-256 of its prompt;
the metadata holds the encoder's identity and a checksum of every array. The headers are the index:
a file appears whole, and one that is damaged or of another encoder counts as not there. Nothing is
lost with them: what is missing is encoded anew.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from depthvar.text.states import prompt_sha256
from pipeline.storage import Storage

TEXT_FOLDER = "text-states"
_TOLD = "made"  # the one key of the metadata: of several the order, and so the bytes, would vary
_DTYPES: Mapping[str, np.dtype[Any]] = {"F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_LENGTH_BYTES = 8  # of a header's length, at the start of a file
_READERS = 16
_CACHE_BYTES = 256 * 2**20


class _Place(NamedTuple):
    """Where the states of a prompt are."""

    name: str
    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, int]
    checksum: str

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * self.shape[0] * self.shape[1]


class TextStates:
    """The states of prompts in a dataset, made by one encoder: found once, at the start."""

    def __init__(self, storage: Storage, encoder_sha256: str) -> None:
        """Read what is there. Errors: `OSError`."""
        self._storage, self._encoder = storage, encoder_sha256
        self._places: dict[str, _Place] = {}
        self._cached: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        with ThreadPoolExecutor(_READERS) as pool:
            sizes = storage.list(TEXT_FOLDER)
            for places in pool.map(self._places_in, sizes.keys(), sizes.values()):
                self._places.update(places)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of some prompts whose states are not there, in their order."""
        return [prompt for prompt in prompts if prompt_sha256(prompt) not in self._places]

    def publish(self, prompts: Sequence[str], states: Sequence[np.ndarray]) -> None:
        """Store the states of some prompts, as one file that appears whole. Errors: `OSError`.

        They keep their type, float16 of an encoder in half precision.
        """
        assert {array.dtype for array in states} <= {*_DTYPES.values()}
        arrays = {
            prompt_sha256(p): np.ascontiguousarray(s) for p, s in zip(prompts, states, strict=True)
        }
        checksums = {sha256: _checksum(array.tobytes()) for sha256, array in arrays.items()}
        told = {"encoder": self._encoder, "checksums": checksums}
        data = save(arrays, metadata={_TOLD: json.dumps(told)})
        name = f"{hashlib.sha256(''.join(arrays).encode()).hexdigest()[:16]}.safetensors"
        self._storage.publish_bytes(data, f"{TEXT_FOLDER}/{name}")
        self._places.update(self._places_in(name, len(data)))

    def of(self, prompt: str) -> np.ndarray:
        """The states of a prompt, float32 (tokens, width), the latest ones kept in memory.

        Errors: `OSError` where they are missing or damaged: a damaged file is removed, so that the
        next run makes it again.
        """
        sha256 = prompt_sha256(prompt)
        if sha256 in self._cached:
            self._cached.move_to_end(sha256)
            return self._cached[sha256]
        states = self._read(sha256)
        self._cached[sha256] = states
        self._cached_bytes += states.nbytes
        while self._cached_bytes > _CACHE_BYTES and len(self._cached) > 1:
            self._cached_bytes -= self._cached.popitem(last=False)[1].nbytes
        return states

    def _read(self, sha256: str) -> np.ndarray:
        place = self._places.get(sha256)
        if place is None:
            raise FileNotFoundError(f"{TEXT_FOLDER} lacks states of a prompt: run it again")
        data = self._storage.read_range(place.name, place.start, place.num_bytes)
        if _checksum(data) != place.checksum:
            with suppress(OSError):
                self._storage.remove(place.name)
            raise OSError(f"{place.name} was damaged and is removed: run it again to make it anew")
        return np.frombuffer(data, place.dtype).reshape(place.shape).astype(np.float32)

    def _places_in(self, name: str, size: int) -> Mapping[str, _Place]:
        """What a file holds by its header; nothing where it is cut short, damaged or foreign."""
        path = f"{TEXT_FOLDER}/{name}"
        try:
            length = int.from_bytes(self._storage.read_range(path, 0, _LENGTH_BYTES), "little")
            first = _LENGTH_BYTES + length
            if first > size:
                return {}
            header = json.loads(self._storage.read_range(path, _LENGTH_BYTES, length))
            told = json.loads(header.pop("__metadata__")[_TOLD])
            if told["encoder"] != self._encoder:
                return {}
            places = {
                sha256: _Place(
                    path,
                    first + entry["data_offsets"][0],
                    _DTYPES[entry["dtype"]],
                    (entry["shape"][0], entry["shape"][1]),
                    told["checksums"][sha256],
                )
                for sha256, entry in header.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError):
            return {}
        ends = [place.start + place.num_bytes for place in places.values()]
        return places if max(ends, default=0) == size else {}


def _checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"
