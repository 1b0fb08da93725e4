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
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from depthvar.config import (
    CONFIG_FILE,
    KNOWN_MODELS,
    MODELS,
    TEXT_MODELS,
    AnyModel,
    folder_of,
    is_model_path,
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

INDEX_SUFFIX = ".safetensors.index.json"

PUBLISHED_REPO = "FoundationVision/var"
PUBLISHED_TEXT_REPO = "FoundationVision/Infinity"
_PUBLISHED_SUFFIXES = (".safetensors", ".pth")
_TOKENIZER_LIKE = re.compile(r"vae|vq|tokenizer", re.IGNORECASE)
_HUB_SCHEME = "hf://"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


_TEXT_FILES = {
    "infinity-2b": (("infinity_2b_reg.pth",), ("infinity_vae_d32reg.pth",)),
    "infinity-8b": (
        (f"infinity_8b_weights/model{INDEX_SUFFIX}", f"model{INDEX_SUFFIX}"),
        ("infinity_vae_d56_f8_14_patchify.pth", "../infinity_vae_d56_f8_14_patchify.pth"),
    ),
}


def _is_published(model: str) -> bool:
    return model in TEXT_MODELS or (model in MODELS and model.startswith("var-d"))


def file_names(model: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a model's transformer and tokenizer files may be called, the first choice first."""
    if model in _TEXT_FILES:
        transformers, tokenizers = _TEXT_FILES[model]
        return (*transformers, TRANSFORMER_FILE), (*tokenizers, TOKENIZER_FILE)
    if not _is_published(model):
        return (TRANSFORMER_FILE,), (TOKENIZER_FILE,)
    stem = model.replace("-", "_").removesuffix("_512")
    return (
        (*(stem + suffix for suffix in _PUBLISHED_SUFFIXES), TRANSFORMER_FILE),
        (*("vae_ch160v4096z32" + suffix for suffix in _PUBLISHED_SUFFIXES), TOKENIZER_FILE),
    )


def choose_files(
    model: str, names: Collection[str], transformer: str | None = None
) -> tuple[str, ...]:
    """Which of the files in a folder belong to a model: all that a copy of it needs.

    `transformer` names that file where its name is none of the usual ones. () where a part is
    missing.
    """
    transformers, tokenizers = file_names(model)
    wanted = (transformers if transformer is None else (transformer,), tokenizers)
    parts = [next((name for name in usual if name in names), None) for usual in wanted]
    chosen = tuple(name for name in parts if name is not None)
    if len(chosen) < 2:
        chosen = () if model in KNOWN_MODELS else _of_an_own_model(names, transformer)
    if not chosen:
        return ()
    beside = os.path.dirname(chosen[0])
    others = [os.path.join(beside, CALIBRATION_FILE), CONFIG_FILE, CLASSES_FILE]
    if chosen[0].endswith(INDEX_SUFFIX):
        others += (n for n in weights_among(names) if os.path.dirname(n) == beside)
    return tuple(dict.fromkeys([*chosen, *(name for name in others if name in names)]))


def folders_within(model: str) -> tuple[str, ...]:
    """The folders in a model's folder that files of it may be in."""
    folders = {os.path.dirname(name) for names in file_names(model) for name in names}
    return tuple(sorted(folders - {"", ".."}))


def _of_an_own_model(names: Collection[str], transformer: str | None) -> tuple[str, ...]:
    """By their names alone, the files that can be a user's transformer and tokenizer."""
    weights = weights_among(names)
    tokenizers = [name for name in weights if _TOKENIZER_LIKE.search(name)]
    if transformer is None and len(weights) <= 2:
        return tuple(weights)
    others = [transformer] if transformer else [n for n in weights if n not in tokenizers]
    return (*others, *tokenizers) if len(others) == 1 and others[0] in names else ()


def weights_among(names: Iterable[str]) -> list[str]:
    """The files among others that can hold a part of a model, by their suffix."""
    return sorted(n for n in names if n.endswith(WEIGHTS_SUFFIXES) and n != CALIBRATION_FILE)


def find_place(name: str, weights: str | None) -> str | None:
    """The local folder or file of a model, None for the package.

    Fetches a Hugging Face repository into its cache: the public one of a published model if no
    weights are given. Raises `InputError` for a path that does not exist, a URI, a repository that
    cannot be fetched, and a folder around a model folder.
    """
    place = _fetched(name, weights)
    if place is None and is_model_path(name):
        place = name
    if place is not None and stored_config(folder_of(place)) is None:
        _check_not_above_a_model(folder_of(place))
    return place


def _fetched(model: str, weights: str | None) -> str | None:
    if weights is None and _is_published(model):
        repo = PUBLISHED_TEXT_REPO if model in TEXT_MODELS else PUBLISHED_REPO
        return from_hub(f"{_HUB_SCHEME}{repo}", _patterns(model))
    if weights is None or Path(weights).exists():
        return weights
    fetched = from_hub(weights, _patterns(model))
    if fetched is not None:
        return fetched
    if "://" in weights:
        raise InputError(
            f"got weights at {weights.partition('://')[0]}://, wanted a local path or a Hugging "
            "Face repository: fetch the files first (the jobs do it themselves)"
        )
    raise InputError(f"{weights} does not exist, wanted a folder or a file: check --weights")


def is_repository(weights: str) -> bool:
    """Whether `--weights` reads as `owner/repository`, and as nothing that is on this machine.

    A folder that exists up to its last part is a path with a mistake, no repository.
    """
    return bool(_HUB_NAME.fullmatch(weights)) and not os.path.exists(os.path.dirname(weights))


def _patterns(model: str) -> list[str]:
    """The files of a repository that a model may need."""
    wanted = [*(name for names in file_names(model) for name in names), CALIBRATION_FILE]
    wanted.append(CONFIG_FILE)
    wanted += [f"{os.path.dirname(name)}/*" for name in wanted if name.endswith(INDEX_SUFFIX)][:1]
    if model not in KNOWN_MODELS:
        wanted += [CLASSES_FILE, *(f"*{suffix}" for suffix in WEIGHTS_SUFFIXES)]
    return wanted


def from_hub(place: str, wanted: Sequence[str]) -> str | None:
    """A Hugging Face repository's files of such names, fetched into its cache; the folder there.

    None where `place` is none, as `owner/repository` or `hf://owner/repository[@revision]`. Raises
    `InputError` where it cannot be fetched.
    """
    if not (place.startswith(_HUB_SCHEME) or is_repository(place)):
        return None
    repo, _, revision = place.removeprefix(_HUB_SCHEME).partition("@")
    if not _HUB_NAME.fullmatch(repo):
        raise InputError(f"got {place}, wanted hf://owner/repository[@revision]: correct it")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{repo} is no local path, and fetching it from Hugging Face needs huggingface_hub: "
            "pip install huggingface_hub, or give a folder that holds the files"
        ) from None
    try:
        return str(snapshot_download(repo, revision=revision or None, allow_patterns=list(wanted)))
    except Exception as error:  # the client's errors (HTTP, offline, cache) share no base
        lines = str(error).splitlines() or [type(error).__name__]
        at = f" at {revision}" if revision else ""
        raise InputError(
            f"{repo}{at} cannot be fetched from Hugging Face ({lines[0]}): check the name and the "
            "connection, or give a local folder that holds the files"
        ) from error


def _check_not_above_a_model(folder: Path) -> None:
    """`InputError` for the folder of a training run, and for another around model folders."""
    models = [str(path.parent) for path in sorted(folder.glob(f"*/{TRANSFORMER_FILE}"))]
    if models:
        raise InputError(
            f"{folder} is no model but holds {', '.join(models[:4])}: pass --model {models[0]}"
        )
    if (folder / RECIPE_FILE).is_file():
        raise InputError(
            f"{folder} holds a run of depthvar train-model that has not finished: run it again, "
            f"then pass --model {folder / 'model'}"
        )


def files_in(config: AnyModel, place: str | None) -> tuple[Path, Path]:
    """A known model's transformer and tokenizer, by their usual names.

    `place` is a folder, or the transformer in one; None for the package. Raises `InputError` for
    what is not there.
    """
    folder = BUNDLED / config.name if place is None else folder_of(place)
    if not folder.is_dir():
        raise InputError(
            f"model {config.name} comes without weights and none were given: pass --weights with "
            "the folder that holds them"
        )
    transformers, tokenizers = file_names(config.name)
    if place is not None and Path(place).is_file() and Path(place).name != CONFIG_FILE:
        transformers = (Path(place).name,)
    return (
        _choice(config, folder, "transformer", transformers),
        _choice(config, folder, "tokenizer", tokenizers),
    )


def _choice(config: AnyModel, folder: Path, part: str, wanted: tuple[str, ...]) -> Path:
    for path in (folder / name for name in wanted):
        if path.is_file():
            return path
        if path.is_dir() or path.is_symlink():
            kind = "folder" if path.is_dir() else "broken link"
            raise InputError(f"{path} is a {kind}, wanted a file: fetch it again")
    kind_of_folder = kind_of(folder)
    if kind_of_folder is not None:
        raise InputError(f"{folder} is {kind_of_folder.what}, wanted {kind_of_folder.to_do}")
    names = [path.name for path in folder.iterdir()]
    fitting = [
        model for model in KNOWN_MODELS if _is_published(model) and choose_files(model, names)
    ]
    raise InputError(
        f"{folder} holds {', '.join(weights_among(names)) or 'no weights'}, wanted the {part} of "
        f"{config.name} as {' or '.join(wanted)}: "
        + (f"use --model {' or '.join(fitting)}" if fitting else "check --model and --weights")
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, or of all that an index names; read once while size and time stay.

    Raises `InputError` where a file of the Hugging Face cache is not the one its name stands for.
    """
    if path.name.endswith(INDEX_SUFFIX):
        hashes = [_sha256_of_file(path), *map(_sha256_of_file, shards_of(path))]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()
    return _sha256_of_file(path)


def shards_of(index: Path) -> list[Path]:
    """The files that an index of safetensors names, which lie beside it.

    Raises `InputError` for an index that is none, and for files that are missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of weights ({error}): fetch it again") from error
    missing = [n for n in names if Path(n).name != n or not index.with_name(n).is_file()]
    if missing or not names:
        raise InputError(
            f"{index} names {', '.join(map(str, missing[:4])) or 'no files'}, wanted files beside "
            "it: fetch them too"
        )
    return [index.with_name(name) for name in names]


def _sha256_of_file(path: Path) -> str:
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
