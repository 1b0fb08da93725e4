"""A user's `--model` and `--weights` become one value: what the model is, its files, their hash."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from depthvar.config import (
    CONFIG_FILE,
    KNOWN_MODELS,
    MODELS,
    AnyModel,
    ModelConfig,
    folder_of,
    model_config,
    model_name,
    of_written_size,
    stored_config,
)
from depthvar.errors import InputError
from depthvar.infinity.tokenizer import BitTokenizer
from depthvar.infinity.transformer import InfinityTransformer
from depthvar.infinity_config import InfinityConfig
from depthvar.var.tokenizer import Tokenizer
from depthvar.var.transformer import Transformer
from depthvar.weights.files import CALIBRATION_FILE, files_in, find_place, sha256_of
from depthvar.weights.own_model import read_own_model
from depthvar.weights.tensor_files import PARTS, Part, WeightsFile, holds_encoder, read_file

WEIGHTS_KEY, IMAGE_SIZE_KEY = "weights_sha256", "image_size"
"""Metadata of a calibration: the weights, and of a text model the size, that it was made on."""


@dataclass(frozen=True)
class FoundModel:
    """What a model is and where its files are; `notes` say what was chosen or assumed of them."""

    config: AnyModel
    transformer: Path
    tokenizer: Path
    calibration: Path | None
    notes: tuple[str, ...]

    @property
    def class_config(self) -> ModelConfig:
        """What a model of classes is; `InputError` for one of texts."""
        if isinstance(self.config, ModelConfig):
            return self.config
        raise InputError(
            f"{self.config.name} is asked in words, wanted a model of classes here: choose one of "
            f"{', '.join(MODELS)}, or one of your own"
        )

    def file(self, part: Part) -> Path:
        """The file of a part."""
        return self.transformer if part == "transformer" else self.tokenizer

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

    @cached_property
    def calibrated_config(self) -> AnyModel | None:
        """The model at the size of image that its calibration was made on; None without one."""
        if self.calibration is None:
            return None
        return of_written_size(self.config, _metadata(self.calibration).get(IMAGE_SIZE_KEY))

    def require_calibration(self, config: AnyModel, policy: str) -> None:
        """`InputError` unless there is a calibration, made on images of a size as `config` has."""
        made_on = self.calibrated_config
        if made_on is not None and made_on.image_size == config.image_size:
            return
        height, width = config.image_size
        words = f" --image-size {width}x{height} --prompts FILE" if config.is_text else ""
        raise InputError(
            f"policy {policy!r} uses calibrated proxies and {config.name} has no calibration for"
            f" images of {width}x{height}: run `depthvar calibrate --model {config.name} --weights"
            f" {self.transformer}{words}`, or choose a policy with another proxy"
        )

    def read_calibration(self) -> dict[str, Tensor]:
        """`slope` and `offset` of the calibration; `InputError` for one of other weights."""
        assert self.calibration is not None
        tensors = read_file(self.calibration).tensors
        is_of_these = _metadata(self.calibration).get(WEIGHTS_KEY) == self.model_sha256
        config = (is_of_these and self.calibrated_config) or self.config
        shape = (len(config.grids), config.num_blocks, config.width)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if not is_of_these or shapes != {"slope": shape, "offset": shape}:
            raise InputError(
                f"{self.calibration} was made from other weights than those beside it: run "
                "depthvar calibrate --overwrite"
            )
        return tensors


def find_model(name: str, weights: str | None = None) -> FoundModel:
    """Find a model's files and compare their names and shapes with the model.

    `name` is a known model, the folder or file of one, or what to call a user's own VAR, whose
    configuration is read off `weights`. No tensor is loaded. Raises `InputError` for missing,
    truncated and unfitting files.
    """
    place = find_place(name, weights)
    is_described = place is None or stored_config(folder_of(place)) is not None
    assumed: tuple[str, ...] = ()
    if place is None or is_described or model_name(name) in KNOWN_MODELS:
        config = model_config(name, place)
        files = _known_files(config, place)
    else:
        config, files, assumed = read_own_model(name, Path(place))
    transformer, tokenizer = files
    check_fit(transformer, config, "transformer")
    check_fit(tokenizer, config, "tokenizer")
    if transformer is tokenizer:
        taken = [transformer.what_was_taken(PARTS)]
    else:
        taken = [file.what_was_taken([part]) for file, part in zip(files, PARTS, strict=True)]
    calibration = transformer.path.with_name(CALIBRATION_FILE)
    return FoundModel(
        config,
        transformer.path,
        tokenizer.path,
        calibration if calibration.is_file() else None,
        (*(note for note in taken if note), *assumed),
    )


def _known_files(config: AnyModel, place: str | None) -> tuple[WeightsFile, WeightsFile]:
    """The transformer's and the tokenizer's file, which a trainer writes as one."""
    if place is not None and Path(place).is_file() and Path(place).name != CONFIG_FILE:
        given = read_file(Path(place))
        if given.find("tokenizer"):
            return given, given
    transformer, tokenizer = files_in(config, place)
    return read_file(transformer), read_file(tokenizer)


def check_fit(file: WeightsFile, config: AnyModel, part: Part) -> None:
    """`InputError` unless a file holds a part of a model: exactly its names, shapes, and floats.

    The published buffers may be there; a tokenizer may lack its whole encoder. The error names the
    model that the file fits, or what is off first.
    """
    if not file.find(part):
        raise file.wrong_part(part, config.name)
    problem = _misfit(file, config, part)
    if not problem:
        return
    fitting = [model.name for model in KNOWN_MODELS.values() if not _misfit(file, model, part)]
    if fitting:
        raise InputError(
            f"{file.path} holds the {part} of {' or '.join(fitting)}, wanted that of "
            f"{config.name}: use --model {fitting[0]}, or give the weights of {config.name}"
        )
    own = "" if config.is_text else f", or use --model {file.path} for a VAR of your own"
    raise InputError(
        f"{file.path} holds a {part} of no known model, wanted that of {config.name} ({problem}): "
        f"fetch it again{own}"
    )


def _misfit(file: WeightsFile, config: AnyModel, part: Part) -> str:
    """What torch has against a file as a part of a model, the first names of it; "" if nothing."""
    tensors = file.parameters(part, with_encoder=not config.is_text)
    try:
        blank_part(config, part, with_encoder=holds_encoder(tensors)).load_state_dict(
            tensors, assign=True
        )
    except RuntimeError as error:
        lines = [line.strip(" \t.") for line in str(error).splitlines()[1:]]
        few = [re.sub(r'((?:"[^"]*", ){3})"(.*)', r"\1...", line) for line in lines[:4]]
        return "; ".join(few + ["..."] * (len(lines) > 4))
    return ""


class _NoNoise(TorchFunctionMode):
    """Leaves random starts out, which do nothing without storage.

    `normal_` would import torch's compiler for it: 2 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func in _RANDOM_STARTS else func(*args, **(kwargs or {}))


_RANDOM_STARTS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


def blank_part(config: AnyModel, part: Part, *, with_encoder: bool = False) -> nn.Module:
    """A part of a model without storage; `with_encoder` is of the tokenizer of a VAR."""
    with torch.device("meta"), _NoNoise():
        if isinstance(config, InfinityConfig):
            return InfinityTransformer(config) if part == "transformer" else BitTokenizer(config)
        if part == "transformer":
            return Transformer(config.transformer)
        tokenizer = Tokenizer(config.tokenizer)
    if not with_encoder:
        del tokenizer.encoder, tokenizer.quant_conv
    return tokenizer


def _metadata(calibration: Path) -> dict[str, str]:
    with safe_open(calibration, framework="pt") as file:
        return file.metadata() or {}


def _combined(*paths: Path) -> str:
    return hashlib.sha256("".join(map(sha256_of, paths)).encode()).hexdigest()
