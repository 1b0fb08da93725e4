"""Files of named tensors: reading them without running code, and saying what they hold.

`.safetensors` and `.pth` (a flat mapping of names to tensors) are mapped into memory: a tensor's
bytes are read when they are used, and processes on one machine share them.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from depthvar.config import MODELS, ModelConfig, TokenizerConfig, TransformerConfig
from depthvar.errors import InputError
from depthvar.tokenizer import Tokenizer
from depthvar.transformer import Transformer

Part = Literal["transformer", "tokenizer"]
Shapes = Mapping[str, tuple[int, ...]]

# What the published files hold beside the parameters: tables that are computed, and statistics.
_DROPPED = {
    "transformer": re.compile(r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias"),
    "tokenizer": re.compile(r"quantize\.ema_vocab_hit_SV"),
}
_ENCODER = ("encoder.", "quant_conv.")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SAFETENSORS_TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_UNREADABLE = (
    SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, mapped into memory, on the CPU.

    Raises `InputError` for a file that is truncated, unreadable, holds code, or holds anything
    but tensors under their names.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _read_checkpoint(path)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def read_header(path: Path) -> dict[str, Tensor]:
    """Names, shapes and types of the tensors of a file, as meta tensors.

    Costs the same for a file of any size. Raises `InputError` as `read_tensors` does.
    """
    try:
        if path.suffix != ".safetensors":
            return {name: tensor.to("meta") for name, tensor in _read_checkpoint(path).items()}
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: torch.empty(
                    part.get_shape(),
                    dtype=_SAFETENSORS_TYPES.get(part.get_dtype(), torch.uint8),
                    device="meta",
                )
                for name, part in slices.items()
            }
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    # Files of the older format, which is no zip, cannot be mapped.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(state, Mapping) and all(isinstance(t, Tensor) for t in state.values()):
        return {str(name): tensor for name, tensor in state.items()}
    held = ", ".join(map(str, list(state)[:6])) if isinstance(state, Mapping) else type(state)
    if isinstance(state, Mapping) and "trainer" in state:
        advice = (
            'save its ["trainer"]["var_wo_ddp"] and ["trainer"]["vae_local"] to files of their own'
        )
    else:
        advice = "save the state dict alone"
    raise InputError(
        f"{path} holds {held}, wanted tensors by name as in the published files: {advice}"
    )


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    code = re.search(r"GLOBAL (\S+)", str(error)) if path.suffix != ".safetensors" else None
    if code is not None:
        return InputError(
            f"{path} refers to code ({code[1]}), wanted tensors alone: it was not run; fetch the "
            "published file, or save the state dict alone"
        )
    size = f"{path.stat().st_size:,} bytes" if path.exists() else "missing"
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return InputError(
        f"{path} ({size}) is truncated or no file of weights ({reason}), wanted safetensors or a "
        "torch checkpoint: fetch it again"
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
    held = _part_of(header)
    if held == part:
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
                f"this shape; give the weights of {config.name}"
            )
        raise InputError(
            f"{path} is no complete {part} of {config.name}: {'; '.join(problems)}: fetch it again"
        )
    if held is not None:
        raise InputError(
            f"{path} holds a {held}, wanted the {part} of {config.name}: give the folder that "
            "holds both"
        )
    names = ", ".join(sorted(header)[:4]) or "nothing"
    raise InputError(
        f"{path} holds no weights of this kind of model (its first tensors: {names}), wanted the "
        f"{part} of {config.name}: check --weights"
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
    for kind, name in (
        ("transformer", "pos_1LC"),
        ("transformer", "word_embed.weight"),
        ("tokenizer", "quantize.embedding.weight"),
        ("tokenizer", "decoder.conv_in.weight"),
        ("calibration", "slope"),
    ):
        if name in header:
            return kind
    return None


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
