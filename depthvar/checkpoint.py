"""Weights: finding, checking, hashing and loading them.

A model folder holds a transformer file, a tokenizer file and, once made, a calibration:

    transformer.safetensors  tokenizer.safetensors  calibration.safetensors  config.json

or, for the published checkpoints, `var_d16.pth` (..., `var_d36.pth`) and `vae_ch160v4096z32.pth`.
Files are loaded without executing code, and every name and shape is compared with the model's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from depthvar.config import ModelConfig, model_config
from depthvar.engine import ProxyFit
from depthvar.errors import InputError
from depthvar.tokenizer import Tokenizer
from depthvar.transformer import Transformer

BUNDLED = Path(__file__).parent / "models"
TRANSFORMER_FILE = "transformer.safetensors"
TOKENIZER_FILE = "tokenizer.safetensors"
CALIBRATION_FILE = "calibration.safetensors"
CONFIG_FILE = "config.json"

_PUBLISHED_TOKENIZER = "vae_ch160v4096z32.pth"

_TRANSFORMER_BUFFERS = ("lvl_1L", "attn_bias_for_masking", ".attn.zero_k_bias")
_TOKENIZER_BUFFERS = ("quantize.ema_vocab_hit_SV",)

# What runs in the model's own precision; the quantizer always stays in float32.
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class WeightsIdentity:
    """The files of a model and one SHA-256 over all of them."""

    transformer: Path
    tokenizer: Path
    calibration: Path | None
    sha256: str


@dataclass(frozen=True)
class LoadedModel:
    """Weights on a device, in a precision; the quantizer stays at least float32."""

    config: ModelConfig
    transformer: Transformer
    tokenizer: Tokenizer
    proxy_fit: ProxyFit | None
    identity: WeightsIdentity

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.pos_start.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the transformer and the decoder."""
        return self.transformer.pos_start.dtype


def _transformer_file(config: ModelConfig, folder: Path) -> Path:
    published = folder / f"{config.name.removesuffix('-512').replace('var-', 'var_')}.pth"
    return published if published.exists() else folder / TRANSFORMER_FILE


def _tokenizer_file(folder: Path) -> Path:
    published = folder / _PUBLISHED_TOKENIZER
    return published if published.exists() else folder / TOKENIZER_FILE


def _find(config: ModelConfig, weights: str | None) -> tuple[Path, Path, Path]:
    """Paths of the transformer, the tokenizer and the calibration, which need not exist."""
    if weights is None:
        folder = BUNDLED / config.name
        if (Path(config.name) / CONFIG_FILE).exists():
            folder = Path(config.name)
        if not folder.is_dir():
            raise InputError(
                f"model {config.name} has no bundled weights and none were given: pass --weights "
                "with the folder that holds them"
            )
    else:
        folder = Path(weights)
    if folder.is_file():
        transformer, folder = folder, folder.parent
    else:
        transformer = _transformer_file(config, folder)
    tokenizer = _tokenizer_file(folder)
    for path in (transformer, tokenizer):
        if not path.is_file():
            raise InputError(
                f"{path} does not exist, wanted the weights of {config.name}: check --weights"
            )
    return transformer, tokenizer, folder / CALIBRATION_FILE


def read_tensors(path: Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or `.pth` file by name; on the meta device if `shapes_only`.

    Raises `InputError` for a truncated or unreadable file.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                if not shapes_only:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return {
                    name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                    for name in file.keys()  # noqa: SIM118
                }
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        size = path.stat().st_size if path.exists() else 0
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path} ({size:,} bytes) is no readable weights file ({reason}), wanted "
            "safetensors or a torch checkpoint: fetch it again"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError(f"{path} holds no flat mapping of tensors: fetch the published file")
    if shapes_only:
        return {name: tensor.to("meta") for name, tensor in state.items()}
    return dict(state)


def check_tensors(
    path: Path, module: nn.Module, tensors: Mapping[str, Tensor], droppable: tuple[str, ...]
) -> list[str]:
    """Names to load; `InputError` names all that are missing, unexpected or wrongly shaped."""
    wanted = module.state_dict()
    found = {name for name in tensors if not name.endswith(droppable)}
    problems = [f"missing {name}" for name in sorted(wanted.keys() - found)]
    problems += [f"unexpected {name}" for name in sorted(found - wanted.keys())]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in sorted(found & wanted.keys())
        if tensors[name].shape != wanted[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:6])
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise InputError(
            f"{path} does not fit the model: {shown}{more}: check --model and --weights"
        )
    return sorted(found)


def _meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _combined_sha256(paths: list[Path]) -> str:
    return hashlib.sha256("".join(_sha256(path) for path in paths).encode()).hexdigest()


def weights_identity(name: str, weights: str | None = None) -> WeightsIdentity:
    """Find a model's files, compare their names and shapes with the model, and hash them.

    Nothing is loaded. Raises `InputError` for missing, truncated and unfitting files.
    """
    config = model_config(name)
    transformer, tokenizer, calibration = _find(config, weights)
    parts = (
        (transformer, lambda: Transformer(config.transformer), _TRANSFORMER_BUFFERS),
        (tokenizer, lambda: Tokenizer(config.tokenizer), _TOKENIZER_BUFFERS),
    )
    for path, build, droppable in parts:
        check_tensors(path, _meta(build), read_tensors(path, shapes_only=True), droppable)
    files = [transformer, tokenizer] + ([calibration] if calibration.is_file() else [])
    return WeightsIdentity(
        transformer,
        tokenizer,
        calibration if calibration.is_file() else None,
        _combined_sha256(files),
    )


def _load_into(path: Path, module: nn.Module, droppable: tuple[str, ...]) -> None:
    tensors = read_tensors(path)
    names = check_tensors(path, module, tensors, droppable)
    module.load_state_dict({name: tensors[name] for name in names}, assign=True)


def load_model(
    name: str,
    weights: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Load a model for sampling. Raises `InputError` as `weights_identity` does."""
    config = model_config(name)
    identity = weights_identity(name, weights)
    with torch.device("meta"):
        transformer, tokenizer = Transformer(config.transformer), Tokenizer(config.tokenizer)
    _load_into(identity.transformer, transformer, _TRANSFORMER_BUFFERS)
    _load_into(identity.tokenizer, tokenizer, _TOKENIZER_BUFFERS)
    return assemble(config, transformer, tokenizer, identity, device=device, dtype=dtype)


def assemble(
    config: ModelConfig,
    transformer: Transformer,
    tokenizer: Tokenizer,
    identity: WeightsIdentity,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> LoadedModel:
    """Put loaded modules on a device in a precision, with the calibration if there is one."""
    transformer.to(device=device, dtype=dtype)
    tokenizer.to(device=device, dtype=dtype)
    tokenizer.quantize.to(dtype if dtype in _WIDE else torch.float32)
    tokenizer.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in (transformer, tokenizer):
        module.eval().requires_grad_(False)
    fit = None
    if identity.calibration is not None:
        fit = _load_proxy_fit(identity, config, device=device, dtype=dtype)
    return LoadedModel(config, transformer, tokenizer, fit, identity)


def _load_proxy_fit(
    identity: WeightsIdentity,
    config: ModelConfig,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> ProxyFit:
    path = identity.calibration
    assert path is not None
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        made_from = (file.metadata() or {}).get("weights_sha256")
    current = _combined_sha256([identity.transformer, identity.tokenizer])
    shape = (len(config.sides), config.num_blocks, config.transformer.width)
    fits = {name: tuple(t.shape) for name, t in tensors.items()} == {
        "slope": shape,
        "offset": shape,
    }
    if made_from != current or not fits:
        raise InputError(
            f"{path} was made from other weights than those beside it: run "
            "python -m jobs.calibrate again"
        )
    slope, offset = (tensors[n].to(device=device, dtype=dtype) for n in ("slope", "offset"))
    return ProxyFit(slope, offset)


def save_proxy_fit(path: Path, fit: ProxyFit, identity: WeightsIdentity) -> None:
    """Write a calibration that names the weights it belongs to."""
    weights_sha256 = _combined_sha256([identity.transformer, identity.tokenizer])
    save_file(
        {
            "slope": fit.slope_SLC.half().contiguous().cpu(),
            "offset": fit.offset_SLC.half().contiguous().cpu(),
        },
        path,
        metadata={"weights_sha256": weights_sha256},
    )


def save_model(
    folder: Path, config: ModelConfig, transformer: nn.Module, tokenizer: nn.Module
) -> None:
    """Write a model folder in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in ((TRANSFORMER_FILE, transformer), (TOKENIZER_FILE, tokenizer)):
        tensors = {n: t.detach().half().contiguous().cpu() for n, t in module.state_dict().items()}
        save_file(tensors, folder / name)
    (folder / CONFIG_FILE).write_text(json.dumps(_config_json(config), indent=2) + "\n")


def _config_json(config: ModelConfig) -> dict[str, Any]:
    return asdict(config)
