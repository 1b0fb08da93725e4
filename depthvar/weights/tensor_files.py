"""Files of named tensors: reading them without running code, and finding a model's parts in them.

Safetensors and torch checkpoints, told apart by their bytes, are mapped into memory: a tensor's
bytes are read when they are used, and processes on one machine share them.
"""

from __future__ import annotations

import pickle
import re
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from depthvar.errors import InputError
from depthvar.weights.file_kinds import SAVE_THE_STATE, kind_of
from depthvar.weights.files import INDEX_SUFFIX, shards_of

Part = Literal["transformer", "tokenizer"]
PARTS: tuple[Part, Part] = ("transformer", "tokenizer")

# Names that a part of a model has and nothing else: of a VAR, then of an Infinity.
_ANCHORS: Mapping[Part, tuple[str, ...]] = {
    "transformer": ("pos_1LC", "word_embed.weight", "cfg_uncond", "text_norm.weight"),
    "tokenizer": (
        *("quantize.embedding.weight", "decoder.conv_in.weight"),
        "decoder.conv_in.conv.weight",
    ),
}
# What the published files hold beside the parameters: tables that are computed, and statistics;
# `n_averaged` is of torch's averaged models.
_BUFFERS = re.compile(
    r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias|n_averaged"
    r"|quantize\.ema_vocab_hit_SV"
    r"|(?:block_chunks\.\d+\.module\.\d+\.[sc]a|text_proj_for_sos\.ca)\.zero_k_bias"
    r"|quantizer?\.lfq\.mask"
)
_ENCODER = ("encoder.", "quant_conv.")
# What data-parallel, compiled, sharded and averaged modules, and whole pickled ones, add to names.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module|_modules|_parameters|_buffers)\.)+"
)
_AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
# Published names that are not ours: phis of each scale, or one, without the list in their names;
# chunks of a text model's blocks, which are wrapped there and so in ours.
_PHI = re.compile(r"^quantize\.quant_resi\.(?:(\d+)|qresi)\.")
_CHUNK = re.compile(r"^(block_chunks\.\d+\.)(?=\d)")
# The bitwise tokenizer's published layers stand within wrappers, which ours lack.
_WRAPPED = "decoder.conv_in.conv.weight"
_INNER = re.compile(r"(?<!upsample)\.(?:conv|norm)(?=\.(?:weight|bias)$)")

_OLDER = b"\x80\x02"
_TORCH = (b"PK", _OLDER)
"""How files of torch begin, today's first."""
_GLOBAL = re.compile(r"GLOBAL (\S+)")
# Modules of Python whose classes a training script keeps its settings in.
_HOLDS_DATA = (
    *("argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "pathlib"),
    *("types", "typing", "uuid"),
)
_UNREADABLE = (
    *(SafetensorError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError),
    *(AttributeError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile),
)


class FoundPart(NamedTuple):
    """Where a part of a model is in a file.

    `place` is what its names begin with there (`trainer.var_wo_ddp.`), "" where they begin with
    nothing. `names` are our names and what the file calls them.
    """

    place: str
    names: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class WeightsFile:
    """What a file holds under dotted names, as deep as it is nested: tensors, and other values."""

    path: Path
    tensors: dict[str, Tensor]
    values: dict[str, object]

    def part(self, part: Part) -> dict[str, Tensor]:
        """The tensors of a part by our names of them; none where the part is not."""
        found = self.find(part)
        return {n: self.tensors[stored] for n, stored in found.names.items()} if found else {}

    def parameters(self, part: Part, *, with_encoder: bool = True) -> dict[str, Tensor]:
        """The same without the published buffers; without the encoder if that is not wanted."""
        return {
            name: tensor
            for name, tensor in self.part(part).items()
            if not _BUFFERS.fullmatch(name) and (with_encoder or not name.startswith(_ENCODER))
        }

    def find(self, part: Part) -> FoundPart | None:
        """Where a part is: at the top, in a checkpoint of a trainer, in a wrapper.

        Moving averages are taken before what they average. Raises `InputError` for a part that is
        there more than once.
        """
        bare = {stored: _WRAPPERS.sub("", stored) for stored in self.tensors}
        places = _places(bare.values(), part)
        chosen = sorted(filter(_AVERAGED.search, places)) or sorted(places)
        if not chosen:
            return None
        if len(chosen) > 1:
            raise self._ambiguous(
                f"the {part}", (place.rstrip(".") or "its top" for place in chosen)
            )
        place, names = chosen[0], dict[str, str]()
        # The other part may lie within this one, as a module of it.
        others = _places(bare.values(), PARTS[1 - PARTS.index(part)])
        within = tuple(other for other in others if other != place and other.startswith(place))
        is_wrapped = place + _WRAPPED in bare.values()
        for stored, name in bare.items():
            if name.startswith(place) and not name.startswith(within):
                ours = _our_name(name.removeprefix(place), is_wrapped=is_wrapped)
                if ours in names:
                    raise self._ambiguous(ours, (names[ours], stored))
                names[ours] = stored
        return FoundPart(place, names)

    def what_was_taken(self, parts: Iterable[Part]) -> str | None:
        """What is used and what is not, in one line; None for a file of the weights alone."""
        found = [place for part in parts if (place := self.find(part))]
        used = {stored for part in found for stored in part.names.values()}
        inner = {prefix for name in used for prefix in _prefixes(name)}
        rest = {
            next(prefix for prefix in _prefixes(name) if prefix not in inner)
            for name in {*self.tensors, *self.values} - used
        }
        places = [part.place.rstrip(".") for part in found if part.place]
        if not places and not rest:
            return None
        taken = [f"{p}, moving averages" if _AVERAGED.search(p) else p for p in places]
        left = f"; left out {', '.join(sorted(rest)[:12])}" if rest else ""
        return f"{self.path}: took {' and '.join(taken) or 'the weights'}{left}"

    def wrong_part(self, part: Part, model: str) -> InputError:
        """The error for a file that does not hold a part of a model."""
        held: list[str] = [other for other in PARTS if self.find(other)]
        if "slope" in self.tensors:
            held.append("calibration")
        names = ", ".join(sorted(self.tensors)[:4]) or "nothing"
        what = f"a {held[0]}" if held else f"no weights of a VAR (its first tensors: {names})"
        to_do = "give the folder that holds both" if held else "check --model and --weights"
        return InputError(f"{self.path} holds {what}, wanted the {part} of {model}: {to_do}")

    def _ambiguous(self, what: str, names: Iterable[str]) -> InputError:
        return InputError(
            f"{self.path} holds {what} more than once, as {' and '.join(names)}, wanted one: save "
            "the state dict of the one to use alone"
        )


def _our_name(published: str, *, is_wrapped: bool) -> str:
    name = _PHI.sub(lambda phi: f"quantize.quant_resi.qresi_ls.{phi[1] or 0}.", published)
    name = _CHUNK.sub(r"\1module.", name)
    return _INNER.sub("", name) if is_wrapped else name


def _places(names: Iterable[str], part: Part) -> set[str]:
    """What the names of a part begin with, wherever it is."""
    return {
        name.removesuffix(anchor)
        for name in names
        for anchor in _ANCHORS[part]
        if name == anchor or name.endswith(f".{anchor}")
    }


def _prefixes(name: str) -> list[str]:
    return list(accumulate(name.split("."), "{}.{}".format))


def holds_encoder(tensors: Iterable[str]) -> bool:
    """Whether a tokenizer's names are with its encoder's; one for sampling alone needs none."""
    return any(name.startswith(_ENCODER) for name in tensors)


def read_file(path: Path) -> WeightsFile:
    """All that a file holds; tensors on the CPU, mapped into memory.

    What is no tensor of torch or plain value is passed over without looking at what it would run.
    Raises `InputError` for a file that is truncated, unreadable, of another kind, or holds code.
    """
    if path.name.endswith(INDEX_SUFFIX):
        shards = [read_file(shard).tensors for shard in shards_of(path)]
        return WeightsFile(path, dict(ChainMap(*shards)), {})
    try:
        held = load_file(path) if _is_safetensors(path) else _read_checkpoint(path)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if not isinstance(held, Mapping):
        raise InputError(
            f"{path} holds a {type(held).__name__}, wanted tensors by name: {SAVE_THE_STATE}"
        )
    leaves = dict(_leaves(held))
    tensors = {name: leaf.detach() for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    return WeightsFile(path, tensors, {n: leaf for n, leaf in leaves.items() if n not in tensors})


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of all that is nested in mappings."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" or (path.suffix == ".safetensors" and not head.startswith(_TORCH))


class _StandIn(dict[object, object]):
    """Stands in for a class that a checkpoint names: keeps what it held, and runs nothing."""

    def __init__(self, *args: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        if isinstance(state, Mapping):
            self.update(state)


def _read_checkpoint(path: Path) -> object:
    """What `torch.save` wrote; classes that torch does not know are replaced, functions refused."""
    with open(path, "rb") as file:
        is_older = file.read(2) == _OLDER
    is_zip = zipfile.is_zipfile(path)
    if not (is_zip or is_older) or kind_of(path) is not None:
        raise ValueError("its start or its end is missing")
    # Files of the older format cannot be mapped, and torch takes this suffix for what it says.
    is_mapped = is_zip and path.suffix != ".safetensors"
    named: set[str] = set()
    while True:
        stand_ins: list[Any] = [(_StandIn, name) for name in named]
        try:
            with open(path, "rb") as file, torch.serialization.safe_globals(stand_ins):
                return torch.load(
                    path if is_mapped else file,
                    map_location="cpu",
                    weights_only=True,
                    mmap=is_mapped,
                )
        except pickle.UnpicklingError as error:
            found = _GLOBAL.search(str(error))
            if found is None or found[1] in named or not _may_be_passed_over(found[1]):
                raise
            named.add(found[1])


def _may_be_passed_over(name: str) -> bool:
    """Whether a name in a pickle is of something that holds data, and not Python's own functions.

    Nothing by that name is imported or called in either case.
    """
    module, dot, _ = name.partition(".")
    module = IMPORT_MAPPING.get(module, module)  # pickles may have the name of Python 2
    return bool(dot) and (module in _HOLDS_DATA or module not in sys.stdlib_module_names)


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, OSError) and not path.is_dir():
        return InputError(f"{path} cannot be read ({error.strerror or error}): check it")
    kind = kind_of(path)
    if kind is not None:
        return InputError(
            f"{path} is {kind.what}, wanted safetensors or a torch checkpoint: {kind.to_do}"
        )
    if isinstance(error, pickle.UnpicklingError):
        code = _GLOBAL.search(str(error))
        what = f"refers to code ({code[1]})" if code else "holds objects that torch does not know"
        return InputError(
            f"{path} {what}, wanted tensors alone: it was not run; fetch the published file, or "
            f"{SAVE_THE_STATE}"
        )
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return InputError(
        f"{path} ({path.stat().st_size:,} bytes) is truncated or no file of weights ({reason}), "
        "wanted safetensors or a torch checkpoint: fetch it again"
    )
