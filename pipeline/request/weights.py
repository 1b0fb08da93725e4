"""Weights that a URI names, fetched once per machine into a local cache.

A cache entry is a folder named by the URI and by the names, sizes and times of its files: it
appears whole, together with the SHA-256 that every file had when it came over the network. New
files under the same URI make a new entry; old entries may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from depthvar.errors import InputError, advice
from depthvar.paths import checked_path, checked_weights, is_uri
from depthvar.text.encoder_files import WANTED_ENCODER, encoder_files
from depthvar.weights.files import (
    INDEX_SUFFIX,
    WEIGHTS_SUFFIXES,
    choose_files,
    folders_within,
    sha256_of,
)
from pipeline.storage import Storage

if TYPE_CHECKING:
    from depthvar.weights.find import FoundModel

CACHE_VARIABLE = "DEPTHVAR_CACHE"
_HASHES = "sha256.json"
_COPY_BYTES = 8 * 2**20


def default_cache() -> Path:
    """`$DEPTHVAR_CACHE`, else `depthvar` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        try:
            return Path(checked_path(named))
        except InputError as error:
            raise InputError(f"{CACHE_VARIABLE}: {error}") from error
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthvar"


def fetch_model(model: str, weights: str | None, *, cache: Path | None = None) -> FoundModel:
    """Find a model as `depthvar.weights.find` does, whose weights may be at a URI too.

    They are fetched into `cache`, by default `default_cache()`.
    Errors: `InputError` for files that are missing, do not fit or cannot be fetched.
    """
    from depthvar.weights.find import find_model  # brings torch: flags need not wait for it

    return find_model(model, local_weights(model, weights, cache=cache))


def local_weights(model: str, weights: str | None, *, cache: Path | None = None) -> str | None:
    """A copy on this machine of weights at a URI; everything else comes back as it is."""
    checked = None if weights is None else checked_weights(weights)
    if checked is None or not is_uri(checked) or checked.startswith("hf://"):
        return checked
    storage = Storage.open(checked)
    file = None
    if storage.root.endswith(
        (*WEIGHTS_SUFFIXES, INDEX_SUFFIX)
    ):  # what else the model needs lies beside it
        folder, _, file = storage.root.rpartition("/")
        storage = replace(storage, root=folder)
    entry = _local_copy(
        storage,
        lambda names: choose_files(model, names, file),
        f"the transformer and the tokenizer of {model}: check --weights, which may name the"
        " transformer's file",
        cache,
        folders_within(model),
    )
    return str(entry if file is None else entry / file)


def local_encoder(place: str, *, cache: Path | None = None) -> str:
    """A copy on this machine of a text encoder at a URI; everything else comes back as it is."""
    if not is_uri(place) or place.startswith("hf://"):
        return place
    return str(_local_copy(Storage.open(place), encoder_files, WANTED_ENCODER, cache))


def _local_copy(
    storage: Storage,
    choose: Callable[[Collection[str]], tuple[str, ...]],
    wanted: str,
    cache: Path | None,
    inner: Collection[str] = (),
) -> Path:
    """The cache entry of the files that `choose` takes of a folder in a store, and of `inner` ones.

    A file of an inner folder is named by its path.
    """
    cache = cache or default_cache()
    try:
        return _fetched(storage, choose, wanted, cache, inner)
    except OSError as error:
        place = str(storage) if isinstance(error, FileNotFoundError) else cache
        reason = " ".join(str(error).split())
        raise InputError(
            f"the weights at {storage} cannot be fetched ({reason}): "
            f"{advice(error, place)}, then run it again"
        ) from error


def _fetched(
    storage: Storage,
    choose: Callable[[Collection[str]], tuple[str, ...]],
    wanted: str,
    cache: Path,
    inner: Collection[str],
) -> Path:
    listing = storage.list("")
    for folder in inner:
        listing |= {f"{folder}/{name}": size for name, size in storage.list(folder).items()}
    names = choose(listing)
    if not names:
        held = ", ".join(sorted(listing)[:8]) or "no files"
        raise InputError(f"{storage} holds {held}, wanted {wanted}")
    infos = storage.filesystem.get_file_info([f"{storage.root}/{name}" for name in names])
    facts = sorted((n, i.size, i.mtime_ns) for n, i in zip(names, infos, strict=True))
    state = [str(storage), *facts]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    entry = cache / "weights" / key
    entry.parent.mkdir(parents=True, exist_ok=True)
    with open(entry.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time; the lock dies with its process
        if not _is_sound(entry):
            _download(storage, {name: listing[name] for name in names}, entry)
    return entry


def _is_sound(entry: Path) -> bool:
    """Whether an entry is there and its files still have their hashes.

    The hashes are those that the weights' identity needs anyway: a process takes them once.
    """
    try:
        hashes = json.loads((entry / _HASHES).read_text())
        return bool(hashes) and all(sha256_of(entry / n) == h for n, h in hashes.items())
    except (OSError, ValueError):
        return False


def _download(storage: Storage, sizes: dict[str, int], entry: Path) -> None:
    """Fetch files into a new entry, in place of a damaged one."""
    unfinished = entry.with_suffix(".tmp")
    for leftover in (unfinished, entry):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()
    hashes, total = {}, sum(sizes.values())
    with tqdm(total=total, desc="fetch weights", unit="B", unit_scale=True, leave=False) as bar:
        for name, size in sizes.items():
            digest = hashlib.sha256()
            (unfinished / name).parent.mkdir(exist_ok=True)
            with storage.open_input(name) as source, open(unfinished / name, "xb") as target:
                while block := source.read(_COPY_BYTES):
                    digest.update(block)
                    target.write(block)
                    bar.update(len(block))
            hashes[name] = digest.hexdigest()
            if (unfinished / name).stat().st_size != size:
                raise OSError(f"{name} ended early, wanted {size:,} bytes")
    (unfinished / _HASHES).write_text(json.dumps(hashes))
    unfinished.rename(entry)
