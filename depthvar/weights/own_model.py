"""A user's own VAR, which has no `config.json` of this project: what it is, read off its weights.

Its files may have any names and be as the published trainer writes them. What shapes do not tell
may stand beside them: `classes.txt` with a class name a line, by class id, and a `config.json` with
the published trainer's `patch_nums`, the sides of the scales.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from depthvar.weights.files import (
    CALIBRATION_FILE,
    CLASSES_FILE,
    WEIGHTS_SUFFIXES,
    WeightsFiles,
    calibration_in,
    choose_files,
    tokenizer_names,
)
from depthvar.weights.tensor_files import (
    Contents,
    Part,
    find_part,
    part_of,
    read_contents,
    wrong_part,
)

_PATCH_NUMS = "patch_nums"
_PREFERRED_TOKENIZERS = tokenizer_names("var-d16")


@dataclass(frozen=True)
class OwnModel:
    """What a user's own VAR is and where; `notes` say what was assumed."""

    config: ModelConfig
    files: WeightsFiles
    notes: tuple[str, ...]


def read_own_model(name: str, place: str) -> OwnModel:
    """The model in a folder, or of a transformer file, by its shapes.

    Raises `InputError` for files that are missing, unreadable or more than can be told apart, and
    for what shapes do not tell and nobody said.
    """
    name = _own_name(name, Path(place))
    folder = folder_of(place)
    transformer, tokenizer, held = _parts(Path(place))
    files = WeightsFiles(transformer, tokenizer, calibration_in(folder))
    try:
        config, notes = _config(name, folder, transformer, tokenizer, held)
    except InputError as error:
        where = "" if str(folder) in str(error) else f"{transformer} with {tokenizer}: "
        raise InputError(f"{where}{error}") from None
    return OwnModel(config, files, notes)


def _config(
    name: str, folder: Path, transformer: Path, tokenizer: Path, held: Mapping[Path, Contents]
) -> tuple[ModelConfig, tuple[str, ...]]:
    tensors = part_of(held[transformer], "transformer", transformer)
    sides = _sides(tensors, held[transformer].values, folder, transformer)
    transformer_config = _transformer_config(tensors, sides, transformer)
    tensors = part_of(held[tokenizer], "tokenizer", tokenizer)
    classes, notes = _class_names(folder, transformer_config.num_classes)
    config = ModelConfig(
        name=name,
        transformer=transformer_config,
        tokenizer=_tokenizer_config(tensors, sides, tokenizer),
        class_names=classes,
    )
    return config, notes


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


def _parts(place: Path) -> tuple[Path, Path, dict[Path, Contents]]:
    """The files of the transformer and of the tokenizer, which may be one, and what they hold."""
    folder = place if place.is_dir() else place.parent
    named = [place] if place.is_file() else []
    held: dict[Path, Contents] = {}
    holders: dict[Part, list[Path]] = {"transformer": [], "tokenizer": []}
    problems: list[InputError] = []
    for path in dict.fromkeys([*named, *_weights_in(folder)]):
        try:
            held[path] = read_contents(path)
            for part in holders:
                if find_part(held[path], part, path):
                    holders[part].append(path)
        except InputError as error:
            if path in named:
                raise
            problems.append(error)
    if named and place not in holders["transformer"]:
        raise wrong_part(place, "transformer", "a VAR", held[place].tensors)
    transformer = named[0] if named else _only(holders, "transformer", folder, problems)
    if transformer in holders["tokenizer"]:
        return transformer, transformer, held
    return transformer, _only(holders, "tokenizer", folder, problems), held


def _weights_in(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name.endswith(WEIGHTS_SUFFIXES) and path.name != CALIBRATION_FILE
    ]


def _only(
    holders: Mapping[Part, Sequence[Path]], part: Part, folder: Path, problems: list[InputError]
) -> Path:
    """The file that holds a part; `InputError` for none and several."""
    found = holders[part]
    preferred = [path for path in found if path.name in _PREFERRED_TOKENIZERS]
    if len(preferred or found) == 1:
        return (preferred or found)[0]
    if found:
        names = ", ".join(path.name for path in found)
        known = [f"--model {model} --weights {folder}" for model in MODELS
                 if choose_files(model, [path.name for path in _weights_in(folder)])]  # fmt: skip
        choices = [f"--model {found[0]}", *known[:1]] if part == "transformer" else []
        raise InputError(
            f"{folder} holds the {part} of a VAR in each of {names}, wanted one: "
            + (f"choose by {' or '.join(choices)}" if choices else "put the others elsewhere")
        )
    kind = kind_of(folder)
    if kind is not None:
        raise InputError(f"{folder} is {kind.what}, wanted a folder of weights: {kind.to_do}")
    if problems:
        raise problems[0]
    names = ", ".join(path.name for path in _weights_in(folder)) or "no weights"
    raise InputError(
        f"{folder} holds {names}, wanted the {part} of a VAR as {', '.join(WEIGHTS_SUFFIXES)}: "
        "put it there, or check --model and --weights"
    )


# What they are.


def _size(tensors: Mapping[str, Tensor], name: str, axis: int, path: Path) -> int:
    shape = tensors[name].shape if name in tensors else ()
    if axis >= len(shape):
        raise InputError(
            f"{path} is no complete VAR: {name} "
            f"{f'has the shape {tuple(shape)}' if shape else 'is missing'}: save its whole state "
            "dict"
        )
    return int(shape[axis])


def _count(tensors: Iterable[str], pattern: str) -> int:
    """How many numbers, from 0 on, names have at the place of `#`."""
    matcher = re.compile(re.escape(pattern).replace("\\#", r"(\d+)"))
    return max((int(m[1]) + 1 for name in tensors if (m := matcher.match(name))), default=0)


def _transformer_config(
    tensors: Mapping[str, Tensor], sides: tuple[int, ...], path: Path
) -> TransformerConfig:
    def size(name: str, axis: int) -> int:
        return _size(tensors, name, axis, path)

    width = size("word_embed.weight", 0)
    return TransformerConfig(
        num_classes=size("class_emb.weight", 0) - 1,
        sides=sides,
        num_blocks=_count(tensors, "blocks.#."),
        width=width,
        num_heads=size("blocks.0.attn.scale_mul_1H11", 1),
        codebook_size=size("head.weight", 0),
        code_channels=size("word_embed.weight", 1),
        mlp_ratio=size("blocks.0.ffn.fc1.weight", 0) // width,
        shared_adaln="shared_ada_lin.1.weight" in tensors,
    )


def _tokenizer_config(
    tensors: Mapping[str, Tensor], sides: tuple[int, ...], path: Path
) -> TokenizerConfig:
    def size(name: str, axis: int = 0) -> int:
        return _size(tensors, name, axis, path)

    levels = _count(tensors, "decoder.up.#.")
    widths = [size(f"decoder.up.{i}.block.0.conv1.weight") for i in range(levels)]
    base = math.gcd(*widths)
    if "encoder.conv_in.weight" in tensors:
        base = math.gcd(base, size("encoder.conv_in.weight"))
    return TokenizerConfig(
        sides=sides,
        phi_of_scale=phi_of_scale(len(sides), _count(tensors, "quantize.quant_resi.qresi_ls.#.")),
        codebook_size=size("quantize.embedding.weight"),
        code_channels=size("quantize.embedding.weight", 1),
        image_channels=size("decoder.conv_out.weight"),
        base_width=base,
        multipliers=tuple(width // base for width in widths),
        num_res_blocks=_count(tensors, "decoder.up.0.block.#.") - 1,
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


def _sides(
    tensors: Mapping[str, Tensor], values: Mapping[str, object], folder: Path, path: Path
) -> tuple[int, ...]:
    """Sides of the scales: as somebody wrote them down, or the only ones that can be."""
    scales = _size(tensors, "lvl_embed.weight", 0, path)
    tokens = _size(tensors, "pos_1LC", 1, path)

    def fit(sides: Sequence[int]) -> bool:
        return len(sides) == scales and sum(side * side for side in sides) == tokens

    told = _told_sides(tensors, values, folder)
    for where, sides in told.items():
        if not fit(sides):
            raise InputError(
                f"{where} gives the sides {list(sides)}, wanted {scales} sides whose squares add "
                f"up to {tokens} as the weights in {path} have them: correct it"
            )
    for sides in (*told.values(), *(m.sides for m in MODELS.values() if fit(m.sides))):
        return sides
    possible = list(islice(_side_lists(scales - 1, tokens - 1), 2))
    if len(possible) == 1:
        return (1, *possible[0])
    raise InputError(
        f"{path} has {scales} scales of {tokens} tokens, which "
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
    for name, value in values.items():
        if name.rpartition(".")[2] == _PATCH_NUMS:
            told[name] = value
    return {
        where: tuple(sides)
        for where, sides in told.items()
        if isinstance(sides, list | tuple) and all(type(side) is int for side in sides)
    }


def _side_lists(scales: int, tokens: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """All ascending lists of sides whose squares add up to `tokens`."""
    if scales == 0:
        if tokens == 0:
            yield ()
        return
    for side in range(least, math.isqrt(max(tokens, 0) // scales) + 1):
        for rest in _side_lists(scales - 1, tokens - side * side, side):
            yield (side, *rest)


def _class_names(folder: Path, num_classes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the classes, and a note where they are assumed."""
    path = folder / CLASSES_FILE
    if path.is_file():
        names = _lines(path)
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


def _lines(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text ({error}): correct it") from error
    return tuple(line.strip() for line in text.rstrip().splitlines())
