"""A model from its files, in a precision, on a device; and back to files.

What stays in float32 when a model runs in bfloat16 or float16, and where:

- the feature map, the codebook and the phi convolutions (`quantize.*`, here), with the bicubic and
  area resizing between the scales, because every scale adds to what the earlier ones left;
- the unconditional states of a text and the norm of all (`cfg_uncond`, `text_norm`, here);
- the attention's learned log scales (`scale_mul_1H11`, here): half precision would move the
  temperature of the attention by up to 1.6%;
- the residual stream, with the AdaLN vectors that norm and gate it and the changes that the engine
  adds to it (`Transformer.embed`, `Transformer.condition`, `Block`): rounded after every branch it
  would lose what they add;
- the logits, guidance, truncation and draws (`Transformer.logits`, `draw`);
- the statistics of every norm: L2 norms of queries and keys (`Attention`), layer norms and group
  norms (torch computes these inside the operation);
- the sums that rank tokens (`engine`).

Everything else is in the model's precision: weights, what goes into the matrix products and comes
out of them, keys and values, and the decoder. Under float32 and float64 all of a model is in that
precision. Float32 is float32 on a GPU too: putting a model together forbids TF32 in this process,
which torch allows convolutions by default (`assemble`).
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Self, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from depthvar.config import CONFIG_FILE, AnyModel, ModelConfig, config_json
from depthvar.engine import ProxyFit
from depthvar.errors import InputError, naming
from depthvar.infinity.tokenizer import BitTokenizer
from depthvar.infinity.transformer import InfinityTransformer
from depthvar.infinity_config import InfinityConfig
from depthvar.pointwise import PLAIN, Pointwise, with_pointwise
from depthvar.var.tokenizer import Tokenizer
from depthvar.var.transformer import Transformer
from depthvar.weights.files import CALIBRATION_FILE, TOKENIZER_FILE, TRANSFORMER_FILE
from depthvar.weights.find import (
    IMAGE_SIZE_KEY,
    WEIGHTS_KEY,
    FoundModel,
    blank_part,
    find_model,
)
from depthvar.weights.tensor_files import PARTS, Part, holds_encoder, read_file

_WIDE = (torch.float32, torch.float64)
_WIDE_PARTS = ("quantize.", "text_norm.", "cfg_uncond")


TransformerT = TypeVar("TransformerT", Transformer, InfinityTransformer)
TokenizerT = TypeVar("TokenizerT", Tokenizer, BitTokenizer)


@dataclass(frozen=True)
class _Loaded(Generic[TransformerT, TokenizerT]):
    """Weights of a model on a device, in a precision; see the module for what stays float32."""

    found: FoundModel
    transformer: TransformerT
    tokenizer: TokenizerT
    proxy_fit: ProxyFit | None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.pos_start.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the transformer and the decoder."""
        return self.transformer.pos_start.dtype

    def with_pointwise(self, pointwise: Pointwise) -> Self:
        """The model with other pointwise regions, its weights shared."""
        if pointwise is PLAIN:
            return self
        parts = {part: with_pointwise(getattr(self, part), pointwise) for part in PARTS}
        return replace(self, **parts)

    @property
    def stream_dtype(self) -> torch.dtype:
        """Precision of the residual stream."""
        return torch.promote_types(self.dtype, torch.float32)


class LoadedModel(_Loaded[Transformer, Tokenizer]):
    """A model of classes."""

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.found.class_config


class LoadedTextModel(_Loaded[InfinityTransformer, BitTokenizer]):
    """A model of texts."""

    @property
    def config(self) -> InfinityConfig:
        """What the model is."""
        config = self.found.config
        assert isinstance(config, InfinityConfig)
        return config


AnyLoaded = LoadedModel | LoadedTextModel


def load_any(
    found: FoundModel,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    with_encoder: bool = False,
) -> AnyLoaded:
    """Load a model of either kind for sampling.

    Every tensor goes from the file straight to its device and precision; those that are as they
    should be stay mapped from the file. Without `with_encoder` the tokenizer has none. Raises
    `InputError` for a calibration of other weights, and a file without the encoder that is asked
    for.
    """
    parts = []
    for part in PARTS:
        parts.append(blank_part(found.config, part, with_encoder=with_encoder))
        parts[-1].load_state_dict(_tensors(found, part, with_encoder), assign=True)
    return assemble(found, *parts, device=device, dtype=dtype)


def load_model(
    found: FoundModel,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    with_encoder: bool = False,
) -> LoadedModel:
    """Load a model of classes as `load_any` does; `InputError` for one of texts."""
    config = found.class_config
    model = load_any(found, device=device, dtype=dtype, with_encoder=with_encoder)
    assert isinstance(model, LoadedModel), config
    return model


def _tensors(found: FoundModel, part: Part, with_encoder: bool = False) -> dict[str, Tensor]:
    """A part's parameters, mapped; `InputError` if the encoder is asked for and not there."""
    path = found.file(part)
    tensors = read_file(path).parameters(part, with_encoder=with_encoder)
    if with_encoder and part == "tokenizer" and not holds_encoder(tensors):
        raise InputError(
            f"{path} holds no encoder, wanted one: give the weights that this file was converted "
            "from"
        )
    return tensors


def random_model(
    config: AnyModel,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    with_encoder: bool = False,
) -> AnyLoaded:
    """A model with random weights, the same every time on a device, whatever the precision.

    It takes the time and the memory of the real one, and makes noise.
    """
    found = FoundModel(config, Path("random"), Path("random"), None, ())
    parts = [blank_part(config, part, with_encoder=with_encoder) for part in PARTS]
    generator = torch.Generator(device).manual_seed(0)
    for module in parts:
        tensors = {
            name: _noise(name, parameter, generator).to(precision_of(name, dtype))
            for name, parameter in module.named_parameters()
        }
        module.load_state_dict(tensors, assign=True)
    return assemble(found, *parts, device=device, dtype=dtype)


def _noise(name: str, blank: Tensor, generator: torch.Generator) -> Tensor:
    """Noise that keeps the size of what passes, and norms that begin as nothing."""
    device = generator.device
    if name.endswith("norm.weight") or (".norm" in name and name.endswith("weight")):
        return torch.ones(blank.shape, device=device)
    if name.endswith("scale_mul_1H11"):
        return torch.full(blank.shape, math.log(4.0), device=device)
    noise = torch.randn(blank.shape, generator=generator, device=device)
    return noise.mul_(0.02 if blank.dim() == 1 else blank[0].numel() ** -0.5)


def precision_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Precision of a parameter of a model that runs in `dtype`."""
    stays_wide = name.startswith(_WIDE_PARTS) or name.endswith(".scale_mul_1H11")
    return torch.float32 if stays_wide and dtype not in _WIDE else dtype


def assemble(
    found: FoundModel,
    transformer: nn.Module,
    tokenizer: nn.Module,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> AnyLoaded:
    """Put modules on a device in a precision, with the calibration if there is one.

    Forbids TF32 in this process. See the top of this file for what stays float32.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for module in (transformer, tokenizer):
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(device=device, dtype=precision_of(name, dtype))
        module.eval().requires_grad_(False)
    tokenizer.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fit = _proxy_fit(found, device=device, dtype=torch.promote_types(dtype, torch.float32))
    if isinstance(transformer, InfinityTransformer):
        assert isinstance(tokenizer, BitTokenizer)
        return LoadedTextModel(found, transformer, tokenizer, fit)
    assert isinstance(transformer, Transformer)
    assert isinstance(tokenizer, Tokenizer)
    return LoadedModel(found, transformer, tokenizer, fit)


def _proxy_fit(
    found: FoundModel, *, device: str | torch.device, dtype: torch.dtype
) -> ProxyFit | None:
    """The calibration; None where there is none that was made on images of the model's size."""
    made_on = found.calibrated_config
    if made_on is None or made_on.image_size != found.config.image_size:
        return None
    tensors = found.read_calibration()
    slope, offset = (tensors[name].to(device=device, dtype=dtype) for name in ("slope", "offset"))
    return ProxyFit(slope, offset)


def why_not_finite(model: AnyLoaded) -> str:
    """Why a model can make numbers that are not finite, and what to do: looks at every weight."""
    for part in PARTS:
        path = model.found.file(part)
        parameters = dict(getattr(model, part).named_parameters())
        bad = [name for name, tensor in parameters.items() if not torch.isfinite(tensor).all()]
        has_nan = any(parameters[name].isnan().any() for name in bad)
        if bad and model.dtype == torch.float16 and not has_nan:
            return f"{path} {_overflow(bad, model.dtype)}: use --precision bfloat16 or float32"
        if bad:
            return _damage(path, bad, "NaN" if has_nan else "infinity")
    if model.dtype in _WIDE:
        return (
            f"the weights of {model.found.transformer} are finite, but too large to compute "
            "with; take another checkpoint, or a smaller --cfg if that is far from its default"
        )
    wider = "float32" if model.dtype == torch.bfloat16 else "bfloat16 or float32"
    narrow = str(model.dtype).removeprefix("torch.")
    return f"the weights fit {narrow}, what they compute may not: try --precision {wider}"


def _damage(path: Path, names: Sequence[str], held: str) -> str:
    return (
        f"{path} holds {held} in {_some(names)}: it is damaged or of a training that diverged, "
        "take another checkpoint"
    )


def _overflow(names: Sequence[str], dtype: torch.dtype) -> str:
    return f"holds values in {_some(names)} that {str(dtype).removeprefix('torch.')} cannot hold"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def save_proxy_fit(path: Path, fit: ProxyFit, found: FoundModel) -> None:
    """Write a calibration that names the weights and the size of image it belongs to."""
    tensors = {"slope": fit.slope_SLC.half(), "offset": fit.offset_SLC.half()}
    height, width = found.config.image_size
    size = {IMAGE_SIZE_KEY: f"{width}x{height}"} if found.config.is_text else {}
    _save(path, tensors, {WEIGHTS_KEY: found.model_sha256, **size})


def save_model(
    folder: Path,
    config: AnyModel,
    transformer: nn.Module,
    tokenizer: nn.Module,
    *,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a model folder in half precision; what runs in float32 is stored in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, module in ((TRANSFORMER_FILE, transformer), (TOKENIZER_FILE, tokenizer)):
        _save(folder / file, _stored(module.state_dict(), dtype))
    _write_config(folder, config)


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to(tensor.dtype if dtype is None else precision_of(name, dtype))
        for name, tensor in tensors.items()
    }


def _save(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a file that appears whole: a process that mapped the one it replaces keeps that."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # as the umask has it; the library makes a file of 0600
        with naming(path):
            save_file(
                {name: _on_its_own(tensor) for name, tensor in tensors.items()},
                unfinished,
                metadata=metadata,
            )
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _on_its_own(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, as the only one in its storage."""
    tensor = tensor.contiguous().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_config(folder: Path, config: AnyModel) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config_json(config), indent=2) + "\n")


def check_new_folder(folder: Path) -> None:
    """`InputError` where a model folder cannot begin: something is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: choose a new --out")


def convert_weights(
    source: FoundModel,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    with_encoder: bool = False,
) -> FoundModel:
    """Write a model's weights as a model folder of safetensors; returns what it holds.

    `dtype` is half precision, or None for the precision that every tensor has. Without
    `with_encoder` the tokenizer's encoder is left out, which sampling does not use. A calibration
    goes along, under the name of the new files. Raises `InputError` for values that `dtype` cannot
    hold, an encoder that is asked for and not there, a calibration of other weights, and a folder
    that is not empty.
    """
    check_new_folder(folder)
    fit = None if source.calibration is None else source.read_calibration()
    folder = folder.resolve()
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        tokenizer = _tensors(source, "tokenizer", with_encoder)
        _save(unfinished / TOKENIZER_FILE, _converted(source.tokenizer, tokenizer, dtype))
        transformer = _tensors(source, "transformer")
        _save(unfinished / TRANSFORMER_FILE, _converted(source.transformer, transformer, dtype))
        _write_config(unfinished, source.config)
        if fit is not None:
            written = find_model(source.config.name, str(unfinished))
            assert source.calibrated_config is not None, "it has a calibration"
            written = replace(written, config=source.calibrated_config)
            target = unfinished / CALIBRATION_FILE
            save_proxy_fit(target, ProxyFit(fit["slope"], fit["offset"]), written)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return find_model(source.config.name, str(folder))


def _converted(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Tensors in another precision; `InputError` for what is not finite, here or in it."""
    stored = _stored(tensors, dtype)
    bad = [name for name, tensor in stored.items() if not torch.isfinite(tensor).all()]
    damaged = [name for name in bad if not torch.isfinite(tensors[name]).all()]
    if damaged:
        raise InputError(_damage(path, damaged, "numbers that are not finite"))
    if bad and dtype is not None:
        raise InputError(f"{path} {_overflow(bad, dtype)}: convert with --precision bfloat16")
    return stored
