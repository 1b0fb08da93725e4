"""Where a model's weights are: finding, fetching and hashing the files. Opens none of them.

A model folder has our own names, or those of the published checkpoints:

    config.json  transformer.safetensors  tokenizer.safetensors  [calibration.safetensors]
    var_d16.pth (..., var_d36.pth)  vae_ch160v4096z32.pth  [calibration.safetensors]

Those of a user's own VAR may have any (`own_model`). What `--weights` may be: a local folder, a
transformer file with the tokenizer in it or beside it, or a Hugging Face repository (`owner/repo`
or `hf://owner/repo[@revision]`). Nothing is fetched unless a repository is named.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from depthvar.config import (
    CONFIG_FILE,
    MODELS,
    ModelConfig,
    folder_of,
    is_model_path,
    model_config,
    stored_config,
)
from depthvar.errors import InputError
from depthvar.weights.file_kinds import kind_of

BUNDLED = Path(__file__).parents[1] / "models"
TRANSFORMER_FILE = "transformer.safetensors"
TOKENIZER_FILE = "tokenizer.safetensors"
CALIBRATION_FILE = "calibration.safetensors"
CLASSES_FILE = "classes.txt"
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
RECIPE_FILE = "recipe.json"

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

_TOKENIZER_LIKE = re.compile(r"vae|vq|tokenizer", re.IGNORECASE)

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
    chosen = (*parts[0], *parts[1]) if all(parts) else ()
    if not chosen and model not in MODELS:
        chosen = _of_an_own_model(names, transformer)
    others = [name for name in (CALIBRATION_FILE, CONFIG_FILE, CLASSES_FILE) if name in names]
    return (*chosen, *others) if chosen else ()


def _of_an_own_model(names: Collection[str], transformer: str | None) -> tuple[str, ...]:
    """By their names alone, the files that can be a user's transformer and tokenizer."""
    weights = sorted(n for n in names if n.endswith(WEIGHTS_SUFFIXES) and n != CALIBRATION_FILE)
    tokenizers = [name for name in weights if _TOKENIZER_LIKE.search(name)]
    if transformer is None and len(weights) <= 2:
        return tuple(weights)
    others = [transformer] if transformer else [n for n in weights if n not in tokenizers]
    return (*others, *tokenizers) if len(others) == 1 and others[0] in names else ()


def fetched_weights(model: str, weights: str | None) -> str | None:
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
    if model not in MODELS:
        wanted += [CLASSES_FILE, *(f"*{suffix}" for suffix in WEIGHTS_SUFFIXES)]
    try:
        return str(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client's errors (HTTP, offline, cache) share no base
        lines = str(error).splitlines() or [type(error).__name__]
        at = "" if revision is None else f" at {revision}"
        raise InputError(
            f"{repo}{at} cannot be fetched from Hugging Face ({lines[0]}): check the name and the "
            "connection, or give a local folder that holds the files"
        ) from error


def find_place(name: str, weights: str | None) -> str | None:
    """The local folder or file of a model, None for the package. Raises as that does."""
    place = fetched_weights(name, weights)
    if place is None and is_model_path(name):
        place = name
    if place is not None and stored_config(folder_of(place)) is None:
        _check_not_above_a_model(folder_of(place))
    return place


def _check_not_above_a_model(folder: Path) -> None:
    """`InputError` for the folder of a training run, and for another around model folders."""
    models = [path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}")) if _is_ours(path)]
    if models:
        raise InputError(
            f"{folder} is no model but holds {', '.join(map(str, models[:4]))}: pass --model "
            f"{models[0]}"
        )
    if (folder / RECIPE_FILE).is_file():
        raise InputError(
            f"{folder} holds a run of depthvar train-model that has not finished: run it again, "
            f"then pass --model {folder / 'model'}"
        )


def _is_ours(config: Path) -> bool:
    try:
        return stored_config(config.parent) is not None
    except InputError:
        return False


def find_weights(name: str, weights: str | None) -> tuple[ModelConfig, WeightsFiles]:
    """Configuration and files of a model that is known or has a `config.json`.

    Raises `InputError` for whatever is not there.
    """
    place = find_place(name, weights)
    config = model_config(name, place)
    return config, files_in(config, place)


def files_in(config: ModelConfig, place: str | None) -> WeightsFiles:
    """The files of a model in a folder, by their usual names; `place` may be the transformer's."""
    transformer: Path | None = None
    folder = BUNDLED / config.name if place is None else Path(place)
    if place is None and not folder.is_dir():
        raise InputError(
            f"model {config.name} comes without weights and none were given: pass --weights with "
            "the folder that holds them"
        )
    if folder.is_file():
        transformer = None if folder.name == CONFIG_FILE else folder
        folder = folder.parent
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if transformer is None:
        transformer = _choice(config, folder, names, "transformer", transformer_names(config.name))
    tokenizer = _choice(config, folder, names, "tokenizer", tokenizer_names(config.name))
    return WeightsFiles(transformer, tokenizer, calibration_in(folder))


def calibration_in(folder: Path) -> Path | None:
    """The calibration in a folder of weights, if there is one."""
    path = folder / CALIBRATION_FILE
    return path if path.is_file() else None


def _choice(
    config: ModelConfig, folder: Path, names: Collection[str], part: str, wanted: tuple[str, ...]
) -> Path:
    for name in wanted:
        if name in names:
            return folder / name
    for name in wanted:
        if (folder / name).is_dir() or (folder / name).is_symlink():
            kind = "folder" if (folder / name).is_dir() else "broken link"
            raise InputError(f"{folder / name} is a {kind}, wanted a file: fetch it again")
    kind_of_folder = kind_of(folder)
    if kind_of_folder is not None:
        raise InputError(f"{folder} is {kind_of_folder.what}, wanted {kind_of_folder.to_do}")
    held = sorted(name for name in names if name.endswith(WEIGHTS_SUFFIXES))
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
