"""A user's own VAR, which has no `config.json` of this project: what it is, read off its weights.

Its files may have any names and be as the published trainer writes them. What shapes do not tell
may stand beside them: `classes.txt` with a class name a line, by class id, and a `config.json` with
the published trainer's `patch_nums`, the sides of the scales.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from depthvar import imagenet
from depthvar.config import (
    CONFIG_FILE,
    MODELS,
    ModelConfig,
    TokenizerConfig,
    TransformerConfig,
    folder_of,
    model_name,
)
from depthvar.errors import InputError
from depthvar.strict_json import read_json
from depthvar.weights.file_kinds import kind_of
from depthvar.weights.files import CLASSES_FILE, choose_files, file_names, weights_among
from depthvar.weights.tensor_files import Part, WeightsFile, read_file

_PATCH_NUMS = "patch_nums"


def read_own_model(
    name: str, place: Path
) -> tuple[ModelConfig, tuple[WeightsFile, WeightsFile], tuple[str, ...]]:
    """The model in a folder, or of a transformer file, by its shapes.

    Gives what it is, the files of its transformer and its tokenizer, which may be one, and notes of
    what was assumed. Raises `InputError` for files that are missing, unreadable or more than can be
    told apart, and for what shapes do not tell and nobody said.
    """
    name, folder = _own_name(name, place), folder_of(str(place))
    transformer, tokenizer = _find_files(place, folder)
    try:
        sides = _sides(transformer, folder)
        of_transformer = _transformer_config(_Sizes(transformer, "transformer"), sides)
        of_tokenizer = _tokenizer_config(_Sizes(tokenizer, "tokenizer"), sides)
        classes, notes = _class_names(folder, of_transformer.num_classes)
        config = ModelConfig(name, of_transformer, of_tokenizer, classes)
    except InputError as error:
        where = "" if str(folder) in str(error) else f"{transformer.path} with {tokenizer.path}: "
        raise InputError(f"{where}{error}") from None
    return config, (transformer, tokenizer), notes


def _own_name(name: str, place: Path) -> str:
    """What to call the model; `InputError` for what looks like a known model's or a lost path."""
    called = model_name(name)
    if called in (place.resolve().name, place.resolve().stem):
        return called
    near = difflib.get_close_matches(called, MODELS, n=1, cutoff=0.85)
    if near or "/" in called or called.startswith("."):
        meant = f"did you mean {near[0]}? Else call" if near else "call"
        raise InputError(
            f"unknown model {called!r}, wanted one of {', '.join(MODELS)}, or another name for a "
            f"model of your own: {meant} yours --model var, say"
        )
    return called


# Which files.


def _find_files(place: Path, folder: Path) -> tuple[WeightsFile, WeightsFile]:
    """The files of the transformer and of the tokenizer, which may be one."""
    given = read_file(place) if place.is_file() else None
    if given is not None and not given.find("transformer"):
        raise given.wrong_part("transformer", "a VAR")
    files: list[WeightsFile] = []
    problems: list[InputError] = []
    for name in weights_among(path.name for path in folder.iterdir()):
        try:
            files.append(read_file(folder / name))
        except InputError as error:
            problems.append(error)
    transformer = given or _only(files, "transformer", folder, problems)
    if transformer.find("tokenizer"):
        return transformer, transformer
    return transformer, _only(files, "tokenizer", folder, problems)


def _only(
    files: Sequence[WeightsFile], part: Part, folder: Path, problems: Sequence[InputError]
) -> WeightsFile:
    """The file that holds a part; `InputError` for none and several."""
    holders = [file for file in files if file.find(part)]
    usual = [file for file in holders if file.path.name in file_names("var-d16")[1]]
    if len(usual or holders) == 1:
        return (usual or holders)[0]
    names = ", ".join(file.path.name for file in holders or files) or "no weights"
    if holders:
        held = [path.name for path in folder.iterdir()]
        known = [f" or --model {m} --weights {folder}" for m in MODELS if choose_files(m, held)][:1]
        choice = f"choose by --model {holders[0].path}{''.join(known)}"
        raise InputError(
            f"{folder} holds the {part} of a VAR in each of {names}, wanted one: "
            f"{choice if part == 'transformer' else 'put the others elsewhere'}"
        )
    kind = kind_of(folder)
    if kind is not None:
        raise InputError(f"{folder} is {kind.what}, wanted a folder of weights: {kind.to_do}")
    if problems:
        raise problems[0]
    raise InputError(
        f"{folder} holds {names}, wanted the {part} of a VAR: put it there, or check --model and "
        "--weights"
    )


# What they are.


class _Sizes:
    """The sizes that a part's tensors have; `InputError` for one that is not there."""

    def __init__(self, file: WeightsFile, part: Part) -> None:
        self.path, self.tensors = file.path, file.part(part)

    def __call__(self, name: str, axis: int = 0) -> int:
        """Size of a tensor along an axis."""
        shape = self.tensors[name].shape if name in self.tensors else ()
        if axis >= len(shape):
            held = f"has the shape {tuple(shape)}" if shape else "is missing"
            raise InputError(
                f"{self.path} is no complete VAR: {name} {held}: save its whole state dict"
            )
        return int(shape[axis])

    def count(self, pattern: str) -> int:
        """How many numbers, from 0 on, names have at the place of `#`."""
        matcher = re.compile(re.escape(pattern).replace("\\#", r"(\d+)"))
        return max((int(m[1]) + 1 for m in map(matcher.match, self.tensors) if m), default=0)


def _transformer_config(size: _Sizes, sides: tuple[int, ...]) -> TransformerConfig:
    width = size("word_embed.weight")
    return TransformerConfig(
        num_classes=size("class_emb.weight") - 1,
        sides=sides,
        num_blocks=size.count("blocks.#."),
        width=width,
        num_heads=size("blocks.0.attn.scale_mul_1H11", 1),
        codebook_size=size("head.weight"),
        code_channels=size("word_embed.weight", 1),
        mlp_ratio=size("blocks.0.ffn.fc1.weight") // width,
        shared_adaln="shared_ada_lin.1.weight" in size.tensors,
    )


def _tokenizer_config(size: _Sizes, sides: tuple[int, ...]) -> TokenizerConfig:
    levels = range(size.count("decoder.up.#."))
    widths = [size(f"decoder.up.{i}.block.0.conv1.weight") for i in levels]
    base = math.gcd(*widths)
    if "encoder.conv_in.weight" in size.tensors:
        base = math.gcd(base, size("encoder.conv_in.weight"))
    return TokenizerConfig(
        sides=sides,
        phi_of_scale=phi_of_scale(len(sides), size.count("quantize.quant_resi.qresi_ls.#.")),
        codebook_size=size("quantize.embedding.weight"),
        code_channels=size("quantize.embedding.weight", 1),
        image_channels=size("decoder.conv_out.weight"),
        base_width=base,
        multipliers=tuple(width // base for width in widths),
        num_res_blocks=size.count("decoder.up.0.block.#.") - 1,
    )


def phi_of_scale(num_scales: int, num_phis: int) -> tuple[int, ...]:
    """Which of the phis smooths each scale: the nearest, phis and scales spread over [0, 1].

    The published code puts the first of four phis at 1/12 and otherwise of K at 1/2K.
    """
    margin = 1 / (3 if num_phis == 4 else 2) / max(num_phis, 1)
    ticks = np.linspace(margin, 1 - margin, max(num_phis, 1))
    places = [scale / max(num_scales - 1, 1) for scale in range(num_scales)]
    return tuple(int(np.argmin(np.abs(ticks - place))) for place in places)


# What shapes do not tell.


def _sides(file: WeightsFile, folder: Path) -> tuple[int, ...]:
    """Sides of the scales: as somebody wrote them down, or the only ones that can be."""
    size = _Sizes(file, "transformer")
    scales, tokens = size("lvl_embed.weight"), size("pos_1LC", 1)

    def fit(sides: Sequence[int]) -> bool:
        return len(sides) == scales and sum(side * side for side in sides) == tokens

    told = _told_sides(size.tensors, file.values, folder)
    for where, sides in told.items():
        if not fit(sides):
            raise InputError(
                f"{where} gives the sides {list(sides)}, wanted {scales} sides whose squares add "
                f"up to {tokens} as the weights in {file.path} have them: correct it"
            )
    for sides in (*told.values(), *(m.sides for m in MODELS.values() if fit(m.sides))):
        return sides
    possible = list(islice(_side_lists(scales - 1, tokens - 1), 2))
    if len(possible) == 1:
        return (1, *possible[0])
    raise InputError(
        f"{file.path} has {scales} scales of {tokens} tokens, which "
        f"{'several lists' if possible else 'no list'} of sides from 1 up can be, wanted the one "
        f"it was trained with: write it into {folder / CONFIG_FILE} as "
        f'{{"{_PATCH_NUMS}": [1, 2, ...]}}'
    )


def _told_sides(
    tensors: Mapping[str, Tensor], values: Mapping[str, object], folder: Path
) -> dict[str, tuple[int, ...]]:
    """Where the sides are written down: beside the weights, in them, in the trainer's settings."""
    told: dict[str, object] = {}
    beside = folder / CONFIG_FILE
    if beside.is_file() and isinstance(content := read_json(beside), dict):
        told[str(beside)] = content.get(_PATCH_NUMS)
    if "lvl_1L" in tensors and not tensors["lvl_1L"].is_floating_point():
        counts = torch.bincount(tensors["lvl_1L"].flatten().long()).tolist()
        told["lvl_1L"] = [math.isqrt(count) for count in counts]
    told |= {name: v for name, v in values.items() if name.rpartition(".")[2] == _PATCH_NUMS}
    return {
        where: tuple(sides)
        for where, sides in told.items()
        if isinstance(sides, list | tuple) and all(type(side) is int for side in sides)
    }


def _side_lists(scales: int, tokens: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """All ascending lists of sides whose squares add up to `tokens`."""
    if scales == 0 and tokens == 0:
        yield ()
    elif scales > 0:
        for side in range(least, math.isqrt(max(tokens, 0) // scales) + 1):
            for rest in _side_lists(scales - 1, tokens - side * side, side):
                yield (side, *rest)


def _class_names(folder: Path, num_classes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the classes, and a note where they are assumed."""
    path = folder / CLASSES_FILE
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} is not readable as UTF-8 text ({error}): correct it"
            ) from error
        names = tuple(line.strip() for line in text.rstrip().splitlines())
        if len(names) != num_classes or not all(names):
            raise InputError(
                f"{path} holds {len(names)} lines, wanted the names of {num_classes} classes, one "
                "a line and by class id: correct it"
            )
        return names, ()
    if num_classes == len(imagenet.CLASS_NAMES):
        names, called = imagenet.CLASS_NAMES, "those of ImageNet"
    else:
        names = tuple(f"class {i}" for i in range(num_classes))
        called = f"called {names[0]} to {names[-1]}"
    note = (
        f"the {num_classes:,} classes are assumed to be {called}: for other names write them into "
        f"{path}, one a line, by class id"
    )
    return names, (note,)
