"""Where a model's weights are: finding, fetching and hashing the files. Opens none of them.

A model folder has our own names, or those of the published checkpoints:

    config.json  transformer.safetensors  tokenizer.safetensors  [calibration.safetensors]
    var_d16.pth (..., var_d36.pth)  vae_ch160v4096z32.pth  [calibration.safetensors]

What `--weights` may be: a local folder, a transformer file with the tokenizer beside it, or a
Hugging Face repository (`owner/repo` or `hf://owner/repo[@revision]`). Nothing is fetched unless a
repository is named.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from depthvar.config import CONFIG_FILE, ModelConfig, is_model_folder, model_config
from depthvar.errors import InputError

BUNDLED = Path(__file__).parent / "models"
TRANSFORMER_FILE = "transformer.safetensors"
TOKENIZER_FILE = "tokenizer.safetensors"
CALIBRATION_FILE = "calibration.safetensors"

PUBLISHED_REPO = "FoundationVision/var"
_PUBLISHED_TRANSFORMERS = {
    "var-d16": "var_d16",
    "var-d20": "var_d20",
    "var-d24": "var_d24",
    "var-d30": "var_d30",
    "var-d36-512": "var_d36",
}
_PUBLISHED_TOKENIZER = "vae_ch160v4096z32"
_PUBLISHED_SUFFIXES = (".safetensors", ".pth")

_HUB_SCHEME = "hf://"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class WeightsFiles:
    """The files of a model; the calibration is None where there is none."""

    transformer: Path
    tokenizer: Path
    calibration: Path | None


def transformer_names(model: str) -> tuple[str, ...]:
    """What a model's transformer file may be called, the first choice first."""
    stem = _PUBLISHED_TRANSFORMERS.get(model)
    published = () if stem is None else tuple(stem + suffix for suffix in _PUBLISHED_SUFFIXES)
    return (*published, TRANSFORMER_FILE)


def tokenizer_names(model: str) -> tuple[str, ...]:
    """What a model's tokenizer file may be called, the first choice first."""
    if model not in _PUBLISHED_TRANSFORMERS:
        return (TOKENIZER_FILE,)
    published = tuple(_PUBLISHED_TOKENIZER + suffix for suffix in _PUBLISHED_SUFFIXES)
    return (*published, TOKENIZER_FILE)


def choose_files(
    model: str, names: Collection[str], transformer: str | None = None
) -> tuple[str, ...]:
    """Which of the files in a folder belong to a model: all that a copy of it needs.

    `transformer` names that file where its name is none of the usual ones. () where a part is
    missing.
    """
    transformers = transformer_names(model) if transformer is None else (transformer,)
    parts = [
        [name for name in candidates if name in names][:1]
        for candidates in (transformers, tokenizer_names(model))
    ]
    if not all(parts):
        return ()
    others = [name for name in (CALIBRATION_FILE, CONFIG_FILE) if name in names]
    return (*parts[0], *parts[1], *others)


def local_weights(model: str, weights: str | None) -> str | None:
    """A local folder or file for `--weights`; fetches a Hugging Face repository into its cache.

    None stands for the weights that come with the model, and for the public repository of a
    published one. Raises `InputError` for a path that does not exist, a URI, and a repository that
    cannot be fetched.
    """
    if weights is None and model in _PUBLISHED_TRANSFORMERS:
        return _from_hub(model, PUBLISHED_REPO, None)
    if weights is None or Path(weights).exists():
        return weights
    if weights.startswith(_HUB_SCHEME):
        repo, _, revision = weights.removeprefix(_HUB_SCHEME).partition("@")
        if not _HUB_NAME.fullmatch(repo):
            raise InputError(f"got {weights}, wanted hf://owner/repository[@revision]: correct it")
        return _from_hub(model, repo, revision or None)
    if "://" in weights:
        scheme = weights.partition("://")[0]
        raise InputError(
            f"got weights at {scheme}://, wanted a local path or a Hugging Face repository: fetch "
            "the files first (the jobs do it themselves)"
        )
    if is_repository(weights):
        return _from_hub(model, weights, None)
    raise InputError(f"{weights} does not exist, wanted a folder or a file: check --weights")


def is_repository(weights: str) -> bool:
    """Whether `--weights` reads as `owner/repository`, and as nothing that is on this machine.

    A folder that exists up to its last part is a path with a mistake, no repository.
    """
    return bool(_HUB_NAME.fullmatch(weights)) and not os.path.exists(os.path.dirname(weights))


def _from_hub(model: str, repo: str, revision: str | None) -> str:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{repo} is no local path, and fetching it from Hugging Face needs huggingface_hub: "
            "pip install huggingface_hub, or give a folder that holds the files"
        ) from None
    wanted = [*transformer_names(model), *tokenizer_names(model), CALIBRATION_FILE, CONFIG_FILE]
    try:
        return str(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client's errors (HTTP, offline, cache) share no base
        lines = str(error).splitlines() or [type(error).__name__]
        at = "" if revision is None else f" at {revision}"
        raise InputError(
            f"{repo}{at} cannot be fetched from Hugging Face ({lines[0]}): check the name and the "
            "connection, or give a local folder that holds the files"
        ) from error


def find_weights(name: str, weights: str | None) -> tuple[ModelConfig, WeightsFiles]:
    """A model's configuration and files. Raises `InputError` for whatever is not there."""
    place = local_weights(name, weights)
    if place is None and is_model_folder(name):
        place = name
    config = model_config(name, place)
    return config, _files_in(config, place)


def _files_in(config: ModelConfig, place: str | None) -> WeightsFiles:
    transformer: Path | None = None
    folder = BUNDLED / config.name if place is None else Path(place)
    if place is None and not folder.is_dir():
        raise InputError(
            f"model {config.name} comes without weights and none were given: pass --weights with "
            "the folder that holds them"
        )
    if folder.is_file():
        transformer, folder = folder, folder.parent
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if transformer is None:
        transformer = _choice(config, folder, names, "transformer", transformer_names(config.name))
    tokenizer = _choice(config, folder, names, "tokenizer", tokenizer_names(config.name))
    calibration = folder / CALIBRATION_FILE if CALIBRATION_FILE in names else None
    return WeightsFiles(transformer, tokenizer, calibration)


def _choice(
    config: ModelConfig, folder: Path, names: Collection[str], part: str, wanted: tuple[str, ...]
) -> Path:
    for name in wanted:
        if name in names:
            return folder / name
    held = sorted(name for name in names if name.endswith((*_PUBLISHED_SUFFIXES, ".pt", ".bin")))
    fitting = [model for model in _PUBLISHED_TRANSFORMERS if choose_files(model, names)]
    raise InputError(
        f"{folder} holds {', '.join(held) or 'no weights'}, wanted the {part} of {config.name} as "
        f"{' or '.join(wanted)}: "
        + (f"use --model {' or '.join(fitting)}" if fitting else "check --model and --weights")
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file; read once per process while its size and time stay the same.

    Raises `InputError` where a file of the Hugging Face cache is not the one its name stands for.
    """
    real = path.resolve()
    state = real.stat()
    found = _hashed(str(real), state.st_size, state.st_mtime_ns)
    # The cache names the blob of a large file by its SHA-256.
    if real.parent.name == "blobs" and _SHA256.fullmatch(real.name) and real.name != found:
        raise InputError(f"{real} is damaged (its SHA-256 is {found}): delete it, fetch it again")
    return found


@lru_cache(maxsize=64)
def _hashed(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
