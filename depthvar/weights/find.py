"""A user's `--model` and `--weights` become one value: what the model is, its files, their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from depthvar.config import (
    CONFIG_FILE,
    MODELS,
    ModelConfig,
    folder_of,
    model_config,
    model_name,
    stored_config,
)
from depthvar.errors import InputError
from depthvar.weights.files import WeightsFiles, calibration_in, files_in, find_place, sha256_of
from depthvar.weights.own_model import read_own_model
from depthvar.weights.tensor_files import (
    Part,
    check_fit,
    find_part,
    part_of,
    read_contents,
    read_tensors,
    what_was_taken,
)


@dataclass(frozen=True)
class FoundModel:
    """What a model is and where its files are; `notes` say what was chosen or assumed of them."""

    config: ModelConfig
    transformer: Path
    tokenizer: Path
    calibration: Path | None
    notes: tuple[str, ...]

    @cached_property
    def model_sha256(self) -> str:
        """SHA-256 over the transformer and the tokenizer: what a calibration belongs to."""
        return _combined(self.transformer, self.tokenizer)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over all files, which are read when it is first asked for.

        Raises `InputError` for a calibration of other weights.
        """
        if self.calibration is None:
            return self.model_sha256
        self.read_calibration()
        return _combined(self.transformer, self.tokenizer, self.calibration)

    def read_calibration(self) -> dict[str, Tensor]:
        """`slope` and `offset` of the calibration; `InputError` for one of other weights."""
        assert self.calibration is not None
        tensors = read_tensors(self.calibration)
        shape = (len(self.config.sides), self.config.num_blocks, self.config.transformer.width)
        fits = _shapes(tensors) == {"slope": shape, "offset": shape}
        with safe_open(self.calibration, framework="pt") as file:
            made_from = (file.metadata() or {}).get("weights_sha256")
        if made_from != self.model_sha256 or not fits:
            raise InputError(
                f"{self.calibration} was made from other weights than those beside it: run "
                "depthvar calibrate --overwrite"
            )
        return tensors


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _combined(*paths: Path) -> str:
    return hashlib.sha256("".join(map(sha256_of, paths)).encode()).hexdigest()


def find_model(name: str, weights: str | None = None) -> FoundModel:
    """Find a model's files and compare their names and shapes with the model.

    `name` is a known model, the folder or file of one, or what to call a user's own VAR, whose
    configuration is read off `weights`. No tensor is loaded. Raises `InputError` for missing,
    truncated and unfitting files.
    """
    place = find_place(name, weights)
    is_described = place is None or stored_config(folder_of(place)) is not None
    assumed: tuple[str, ...] = ()
    if place is None or is_described or model_name(name) in MODELS:
        config = model_config(name, place)
        files = _trainer_file(place) or files_in(config, place)
    else:
        own = read_own_model(name, place)
        config, files, assumed = own.config, own.files, own.notes
    parts: dict[Path, list[Part]] = {files.transformer: ["transformer"]}
    parts.setdefault(files.tokenizer, []).append("tokenizer")
    taken = [_check_file(path, config, held) for path, held in parts.items()]
    notes = (*(note for note in taken if note), *assumed)
    return FoundModel(config, files.transformer, files.tokenizer, files.calibration, notes)


def _trainer_file(place: str | None) -> WeightsFiles | None:
    """A file that holds the tokenizer with the transformer, as a trainer writes them."""
    if place is None or not Path(place).is_file() or Path(place).name == CONFIG_FILE:
        return None
    path = Path(place)
    contents = read_contents(path)
    if not (find_part(contents, "transformer", path) and find_part(contents, "tokenizer", path)):
        return None
    return WeightsFiles(path, path, calibration_in(path.parent))


def _check_file(path: Path, config: ModelConfig, parts: Iterable[Part]) -> str | None:
    """`InputError` unless a file fits the model; says what of it was taken if that is not all."""
    contents = read_contents(path)
    for part in parts:
        check_fit(path, config, part, part_of(contents, part, path))
    found = [find_part(contents, part, path) for part in parts]
    return what_was_taken(path, contents, [part for part in found if part])
