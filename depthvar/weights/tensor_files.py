"""Files of named tensors: reading them without running code, and saying what they hold.

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
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from depthvar.config import MODELS, ModelConfig, TokenizerConfig, TransformerConfig
from depthvar.errors import InputError
from depthvar.var.tokenizer import Tokenizer
from depthvar.var.transformer import Transformer
from depthvar.weights.file_kinds import SAVE_THE_STATE, kind_of

Part = Literal["transformer", "tokenizer"]
Shapes = Mapping[str, tuple[int, ...]]

# What the published files hold beside the parameters: tables that are computed, and statistics;
# `n_averaged` is of torch's averaged models.
_DROPPED = {
    "transformer": re.compile(
        r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias|n_averaged"
    ),
    "tokenizer": re.compile(r"quantize\.ema_vocab_hit_SV|n_averaged"),
}
_ENCODER = ("encoder.", "quant_conv.")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Names that a part of a model has and nothing else.
_ANCHORS: Mapping[Part, tuple[str, ...]] = {
    "transformer": ("pos_1LC", "word_embed.weight"),
    "tokenizer": ("quantize.embedding.weight", "decoder.conv_in.weight"),
}
_OTHER: Mapping[Part, Part] = {"transformer": "tokenizer", "tokenizer": "transformer"}
# What data-parallel, compiled, sharded and averaged modules, and whole pickled ones, add to names.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module|_modules|_parameters|_buffers)\.)+"
)
_AVERAGED = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)
# The published code has phis of each scale, or one, without the list in their names.
_PHI = re.compile(r"^quantize\.quant_resi\.(?:(\d+)|qresi)\.")

_TORCH = (b"PK", b"\x80\x02")
_GLOBAL = re.compile(r"GLOBAL (\S+)")
# Modules of Python whose classes a training script keeps its settings in.
_HOLDS_DATA = (
    *("argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "pathlib"),
    *("types", "typing", "uuid"),
)
_UNREADABLE = (
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class Contents:
    """What a file holds under dotted names, as deep as it is nested: tensors, and other values."""

    tensors: dict[str, Tensor]
    values: dict[str, object]


@dataclass(frozen=True)
class FoundPart:
    """Where a part of a model is in a file.

    `place` is what its names begin with there (`trainer.var_wo_ddp.`), "" where they begin with
    nothing. `names` are the published names and what the file calls them.
    """

    place: str
    names: Mapping[str, str]


def read_contents(path: Path) -> Contents:
    """All that a file holds; tensors on the CPU, mapped into memory.

    What is no tensor of torch or plain value is passed over without looking at what it would run.
    Raises `InputError` for a file that is truncated, unreadable, of another kind, or holds code.
    """
    try:
        if _is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                return Contents({n: file.get_tensor(n) for n in file.keys()}, {})  # noqa: SIM118
        held = _read_checkpoint(path)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if not isinstance(held, Mapping):
        raise InputError(
            f"{path} holds a {type(held).__name__}, wanted tensors by name: {SAVE_THE_STATE}"
        )
    leaves = list(_leaves(held))
    return Contents(
        {name: leaf.detach() for name, leaf in leaves if isinstance(leaf, Tensor)},
        {name: leaf for name, leaf in leaves if not isinstance(leaf, Tensor)},
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, as `read_contents` has them."""
    return read_contents(path).tensors


def read_part(path: Path, part: Part) -> dict[str, Tensor]:
    """The tensors of a part of a model by their published names; every tensor where it is not."""
    return part_of(read_contents(path), part, path)


def part_of(contents: Contents, part: Part, path: Path) -> dict[str, Tensor]:
    """As `read_part`, of what was read from `path`."""
    found = find_part(contents, part, path)
    if found is None:
        return contents.tensors
    return {name: contents.tensors[stored] for name, stored in found.names.items()}


def find_part(contents: Contents, part: Part, path: Path) -> FoundPart | None:
    """Where a part of a model is in a file: at the top, in a checkpoint of a trainer, in a wrapper.

    Moving averages are taken before what they average. Raises `InputError` for a part that is there
    more than once.
    """
    bare = {name: _WRAPPERS.sub("", name) for name in contents.tensors}
    places = _places(bare.values(), part)
    averaged = {place for place in places if _AVERAGED.search(place)}
    chosen = averaged or places
    if len(chosen) > 1:
        raise InputError(
            f"{path} holds the {part} more than once, as "
            f"{' and '.join(sorted(place.rstrip('.') or 'its top' for place in chosen))}, wanted "
            "one: save the state dict of the one to use alone"
        )
    if not chosen:
        return None
    (place,) = chosen
    # The other part may lie within this one, as a module of it.
    within = tuple(
        other
        for other in _places(bare.values(), _OTHER[part])
        if other != place and other.startswith(place)
    )
    names: dict[str, str] = {}
    for stored, name in bare.items():
        if not name.startswith(place) or (within and name.startswith(within)):
            continue
        published = _PHI.sub(
            lambda phi: f"quantize.quant_resi.qresi_ls.{phi[1] or 0}.", name.removeprefix(place)
        )
        if published in names:
            raise InputError(
                f"{path} holds {published} twice, as {names[published]} and {stored}, wanted one: "
                "save the state dict of the one to use alone"
            )
        names[published] = stored
    return FoundPart(place, names)


def what_was_taken(path: Path, contents: Contents, found: Iterable[FoundPart]) -> str | None:
    """What of a file is used and what is not, in one line; None for a file of the weights alone."""
    places = [part.place.rstrip(".") for part in found if part.place]
    used = {stored for part in found for stored in part.names.values()}
    inner = {name[:dot] for name in used for dot in _dots(name)}
    rest = {
        next((name[:dot] for dot in _dots(name) if name[:dot] not in inner), name)
        for name in {*contents.tensors, *contents.values} - used
    }
    if not places and not rest:
        return None
    taken = [f"{p}, moving averages" if _AVERAGED.search(p) else p for p in places]
    left = f"; left out {', '.join(sorted(rest)[:12])}" if rest else ""
    return f"{path}: took {' and '.join(taken) or 'the weights'}{left}"


def _dots(name: str) -> list[int]:
    return [match.start() for match in re.finditer(r"\.", name)]


def _places(names: Iterable[str], part: Part) -> set[str]:
    """What the names of a part begin with, wherever it is."""
    return {
        name.removesuffix(anchor)
        for name in names
        for anchor in _ANCHORS[part]
        if name == anchor or name.endswith(f".{anchor}")
    }


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of all that is nested in mappings and in the attributes of objects."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    attributes = {k: v for k, v in getattr(value, "__dict__", {}).items() if k != "_metadata"}
    for key, inner in (*value.items(), *attributes.items()):
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" or (path.suffix == ".safetensors" and not head.startswith(_TORCH))


class _Attributes:
    """Stands in for a class that a checkpoint names: an empty mapping that takes attributes."""

    def __new__(cls, *args: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()


class _Opaque:
    """Stands in for what numpy makes of its numbers."""

    def __new__(cls, *args: object) -> _Opaque:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


def _read_checkpoint(path: Path) -> object:
    """What `torch.save` wrote; classes that torch does not know are replaced, functions refused."""
    with open(path, "rb") as file:
        head = file.read(2)
    if not head.startswith(_TORCH):
        raise ValueError("it does not begin as one")
    if head == b"PK" and not zipfile.is_zipfile(path):
        raise ValueError("its end is missing")
    if kind_of(path) is not None:
        raise ValueError("it is something else")
    # Files of the older format, which is no zip, cannot be mapped, and torch takes this suffix for
    # what it says.
    is_mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
    stand_ins: dict[str, type] = {}
    while True:
        try:
            with (
                open(path, "rb") as file,
                torch.serialization.safe_globals([(kind, n) for n, kind in stand_ins.items()]),
            ):
                return torch.load(
                    path if is_mapped else file,
                    map_location="cpu",
                    weights_only=True,
                    mmap=is_mapped,
                )
        except pickle.UnpicklingError as error:
            found = _GLOBAL.search(str(error))
            if found is None or found[1] in stand_ins or not _may_be_passed_over(found[1]):
                raise
            stand_ins[found[1]] = _Opaque if found[1].startswith("numpy.") else _Attributes


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


@lru_cache(maxsize=32)
def _shapes(config: TransformerConfig | TokenizerConfig) -> Shapes:
    with torch.device("meta"):
        module = Transformer(config) if isinstance(config, TransformerConfig) else Tokenizer(config)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def wanted_shapes(config: ModelConfig, part: Part) -> Shapes:
    """Shape of every parameter of a part of a model, by its published name."""
    return _shapes(config.transformer if part == "transformer" else config.tokenizer)


def parameter_names(
    part: Part, header: Mapping[str, Tensor], *, with_encoder: bool = False
) -> list[str]:
    """Names of a fitting file without the published buffers; without the encoder if not asked."""
    return [
        name
        for name in header
        if _is_parameter(part, name) and (with_encoder or not is_encoder(part, name))
    ]


def is_encoder(part: Part, name: str) -> bool:
    """Whether a tensor serves training alone: from image to latent map."""
    return part == "tokenizer" and name.startswith(_ENCODER)


def _is_parameter(part: Part, name: str) -> bool:
    return _DROPPED[part].fullmatch(name) is None


def holds_encoder(header: Mapping[str, Tensor]) -> bool:
    """Whether a tokenizer file holds its encoder; one for sampling alone need not."""
    return any(is_encoder("tokenizer", name) for name in header)


def check_fit(path: Path, config: ModelConfig, part: Part, header: Mapping[str, Tensor]) -> None:
    """`InputError` unless a file holds a part of a model: exactly its names, shapes, and floats.

    The published buffers may be there; a tokenizer may lack its whole encoder. The error says what
    the file holds instead and which model it fits, or names every tensor that is off.
    """
    problems = _problems(config, part, header)
    if not problems:
        return
    if _part_of(header) == part:
        fitting = [m.name for m in MODELS.values() if not _problems(m, part, header)]
        if fitting:
            raise InputError(
                f"{path} holds the {part} of {' or '.join(fitting)}, wanted that of {config.name}: "
                f"use --model {fitting[0]}, or give the weights of {config.name}"
            )
        wanted_facts, facts = _facts(part, wanted_shapes(config, part)), _facts(part, _of(header))
        differing = [
            f"{facts[name]} {name} (wanted {wanted_facts[name]})"
            for name in wanted_facts.keys() & facts.keys()
            if facts[name] != wanted_facts[name]
        ]
        if differing:
            raise InputError(
                f"{path} holds a {part} with {', '.join(sorted(differing))}: no known model has "
                f"this shape; give the weights of {config.name}, or use --model {path} for a VAR "
                "of your own"
            )
        raise InputError(
            f"{path} is no complete {part} of {config.name}: {'; '.join(problems)}: fetch it again"
        )
    raise wrong_part(path, part, config.name, header)


def wrong_part(path: Path, part: Part, model: str, header: Mapping[str, Tensor]) -> InputError:
    """The error for a file that holds something else than a part of a model."""
    held = _part_of(header)
    if held is not None:
        return InputError(
            f"{path} holds a {held}, wanted the {part} of {model}: give the folder that holds both"
        )
    names = ", ".join(sorted(header)[:4]) or "nothing"
    return InputError(
        f"{path} holds no weights of this kind of model (its first tensors: {names}), wanted the "
        f"{part} of {model}: check --weights"
    )


def _of(header: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in header.items()}


def _problems(config: ModelConfig, part: Part, header: Mapping[str, Tensor]) -> list[str]:
    """Every name that is missing, unexpected or of another shape or type, blocks together."""
    wanted = wanted_shapes(config, part)
    if part == "tokenizer" and not holds_encoder(header):
        wanted = {name: shape for name, shape in wanted.items() if not is_encoder(part, name)}
    found = {name for name in header if _is_parameter(part, name)}
    off = [(name, "missing") for name in wanted.keys() - found]
    off += [(name, "unexpected") for name in found - wanted.keys()]
    for name in found & wanted.keys():
        shape, kind = tuple(header[name].shape), header[name].dtype
        if shape != wanted[name]:
            off.append((name, f"shape {shape} in place of {wanted[name]}:"))
        elif kind not in _FLOATS:
            off.append((name, f"{str(kind).removeprefix('torch.')} in place of floats:"))
    return _grouped(off)


def _grouped(off: list[tuple[str, str]]) -> list[str]:
    """(name, problem) as text; names that differ in their first number alone share an entry."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, problem in off:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if number is None else f"{name[: number.start()]}#{name[number.end() :]}"
        groups.setdefault((problem, pattern), []).append(-1 if number is None else int(number[0]))
    return [
        f"{problem} {pattern.replace('#', _ranges(sorted(numbers)), 1)}"
        for (problem, pattern), numbers in sorted(groups.items())
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "{0-2,5}", [4] as "4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _part_of(header: Mapping[str, Tensor]) -> str | None:
    """What a file holds, by the names that nothing else has."""
    for part, names in _ANCHORS.items():
        if header.keys() & set(names):
            return part
    return "calibration" if "slope" in header else None


def _facts(part: Part, shapes: Shapes) -> dict[str, int]:
    """The sizes that tell models apart, as far as a file shows them."""

    def size(name: str, axis: int, plus: int = 0) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] + plus if axis < len(shape) else None

    if part == "tokenizer":
        facts = {
            "codes": size("quantize.embedding.weight", 0),
            "code channels": size("quantize.embedding.weight", 1),
            "decoder channels": size("decoder.conv_in.weight", 0),
            "image channels": size("decoder.conv_out.weight", 0),
        }
    else:
        blocks = {int(name.split(".")[1]) for name in shapes if re.match(r"blocks\.\d+\.", name)}
        facts = {
            "blocks": len(blocks),
            "channels": size("pos_1LC", 2),
            "tokens": size("pos_1LC", 1),
            "scales": size("lvl_embed.weight", 0),
            "classes": size("class_emb.weight", 0, -1),
            "codes": size("head.weight", 0),
        }
    return {name: value for name, value in facts.items() if value is not None}
