"""Types for the fields of a configuration that hold a path: each is checked where it comes in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from depthvar.errors import InputError
from depthvar.paths import (
    checked_job_file,
    checked_location,
    checked_model,
    checked_path,
    checked_weights,
    is_uri,
)
from pipeline.request.marks import Metavar
from pipeline.store_uri import StoreUri

PATH_ERROR = "path"
"""The type of pydantic's errors that come from here: their message says all."""


def path_field(check: Callable[[str], str], *names: str) -> BeforeValidator:
    """A validator that gives texts to `check`, save for some names that stand for no path."""

    def checked(value: object) -> object:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str) or text in names:
            return value
        try:
            return check(text)
        except InputError as error:
            raise PydanticCustomError(PATH_ERROR, "{text}", {"text": str(error)}) from error

    return BeforeValidator(checked)


def dataset_location(text: str) -> str:
    """A local path or the URI of a store, with a key that stores keep. Errors: `InputError`."""
    return _with_kept_key(checked_location(text))


def _with_kept_key(place: str) -> str:
    if is_uri(place) and not place.startswith("hf://"):
        StoreUri.parse(place)
    return place


def _kept(path: str) -> str:
    first = Path(path).parts[0]
    # `Path` drops the `./` that tells a folder of such a name from a home and from a URI.
    return os.path.abspath(path) if first.startswith("~") or ":" in first else path


LocalPath = Annotated[Path, path_field(lambda text: _kept(checked_path(text)))]
"""A file or a folder of this machine."""
JobFile = Annotated[Path, path_field(lambda text: _kept(checked_job_file(text))), Metavar("FILE")]
"""A file that the driver reads when it starts: it may come with a submitted job."""
Location = Annotated[str, path_field(dataset_location), Metavar("PATH")]
"""A dataset: a local folder or the URI of a store."""
Weights = Annotated[
    str, path_field(lambda text: _with_kept_key(checked_weights(text))), Metavar("PATH")
]
"""A local file or folder, the URI of a store, or a Hugging Face repository."""
ModelName = Annotated[str, path_field(checked_model), Metavar("MODEL")]
"""A known model, or the local folder or file of one."""
