"""What may stand where a path is wanted, in a flag or in YAML: one place for every path of a job.

`~` is expanded, and what would quietly become a folder of a strange name is refused: a URI with a
slash too few, a URI where only a local path serves, and, inside a submitted Ray job, whatever lies
in the temporary copy of the working directory that such a job runs in.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

from depthvar.config import MODELS
from depthvar.errors import InputError, advice
from depthvar.weights.files import is_repository

STORE_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
_SERVED = (*STORE_SCHEMES, "file")
_MEANT: Mapping[str, str | None] = {
    **{scheme: scheme for scheme in (*_SERVED, "hf")},
    **dict.fromkeys(("s3a", "s3n"), "s3"),
    **dict.fromkeys(("az", "adl", "wasb", "wasbs", "http", "https", "ftp", "sftp", "hdfs")),
}
"""Schemes that people write, and the one of ours that is meant where there is one."""

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_NEAR_URI = re.compile(r"""[\s'"]*([A-Za-z][A-Za-z0-9+.-]*)(?::([/\\]*)|//+)(.*)""", re.DOTALL)
_HUB_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")

_SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""A variable that Ray gives to the driver of a submitted job and to nothing else."""
_RAY_COPIES = ("runtime_resources", "working_dir_files")
"""The folders, one in the other, in which Ray keeps its copies of working directories."""


@contextlib.contextmanager
def checked_as_submitted() -> Iterator[None]:
    """Have paths checked meanwhile as they will be in a Ray job, before it is handed in."""
    os.environ[_SUBMITTED_JOB] = "{}"
    try:
        yield
    finally:
        del os.environ[_SUBMITTED_JOB]


def checked_location(text: str) -> str:
    """A local path ready to be opened, or the URI of a store as it is.

    `file://` becomes a plain path. Errors: `InputError` for everything else.
    """
    _check_characters(text)
    scheme = _scheme(text)
    if scheme is not None and scheme != "file":
        return text
    path = text if scheme is None else _path_of_file_uri(text)
    path = _expanded(path)
    if _is_temporary(path):
        raise InputError(
            f"got {text!r}, which in a Ray job lies in the temporary copy of the working "
            "directory, and Ray deletes that: give an absolute path that every node sees, or, "
            "where stores are taken, a URI such as s3://bucket/folder"
        )
    return path


def checked_path(text: str) -> str:
    """A local path ready to be opened. Errors: `InputError`, for URIs of stores too."""
    path = checked_location(text)
    if is_uri(path):
        raise InputError(
            f"got {without_secrets(text)}, wanted a path of this machine: stores are not taken here"
        )
    return path


def checked_job_file(text: str) -> str:
    """A local file that the driver reads when it starts: it may come with a submitted job.

    Errors: `InputError`.
    """
    _check_characters(text)
    return _expanded(text) if _scheme(text) is None else checked_path(text)


def checked_weights(text: str) -> str:
    """What `--weights` takes: a path, a URI, or a Hugging Face repository as it is written.

    Errors: `InputError`.
    """
    page = _HUB_PAGE.match(text)
    if page is not None:
        raise InputError(f"got {text}, wanted a repository by its name: write {page[1]}")
    if text.startswith("hf://") or is_repository(text):
        _check_characters(text)
        return text
    return checked_location(text)


def checked_model(text: str) -> str:
    """A model's name as it is written, or a local folder or file ready to be opened.

    Errors: `InputError`.
    """
    is_path = "/" in text or text.startswith(("~", ".")) or _is_near_uri(text)
    if text in MODELS or not (is_path or os.path.exists(text)):
        return text
    return checked_path(text)


def is_uri(text: str) -> bool:
    """Whether a text starts with a scheme and `://`."""
    return _URI.match(text) is not None


def without_secrets(text: str) -> str:
    """A text for messages, without what a URI can hold of user, password and signature."""
    text = re.sub(r"^([^:]*:[/\\]*)(?:[^/:@]+:[^@]*|[^/@]*)@", r"\1", text)
    return re.sub(r"(?<=[?&])([^=&?/]+)=[^&?]*", r"\1=...", text)


def check_output_folder(folder: Path, named: str) -> None:
    """Find out without writing whether a folder could be made and written.

    `named` is what the user wrote. Errors: `InputError`.
    """
    place = folder
    while not _is_there(place, named):
        place = place.parent
    if not os.path.isdir(place):
        kind = "a file" if os.path.exists(place) else "a broken symbolic link"
        raise InputError(f"got {named}, but {place} is {kind}: choose a folder")
    check_writable(place, named)


def check_output_file(file: Path, flag: str, *, is_new: bool = False) -> None:
    """Find out without writing whether a file could be written, in a folder that exists.

    With `is_new` nothing may be there yet. Errors: `InputError`.
    """
    is_there, folder = _is_there(file, f"{flag} {file}"), file.absolute().parent
    if os.path.isdir(file):
        raise InputError(f"{flag}: got {file}, which is a folder, wanted a file: add its name")
    if is_new and is_there:
        raise InputError(f"{flag}: got {file}, which exists, wanted a new file: choose another")
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise InputError(f"{flag}: got {file}, whose folder {what}: make the folder {folder}")
    check_writable(folder, f"{flag} {file}")


def check_input_file(file: Path, flag: str) -> None:
    """`InputError` unless a file, or a pipe, is there to be read."""
    if os.path.isdir(file):
        raise InputError(f"{flag}: got {file}, which is a folder, wanted a file: name the file")
    if not os.path.exists(file):
        raise InputError(f"{flag}: got {file}, which does not exist, wanted a file: correct it")


def _is_there(path: Path, named: str) -> bool:
    """Whether a path exists, or a link of that name. Errors: `InputError` where nobody can tell."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False
    except OSError as error:
        what_to_do = advice(error, path)
        raise InputError(f"got {named}: {error.strerror}: {what_to_do}") from error
    return True


def check_writable(folder: Path, named: str) -> None:
    """`InputError` unless files can be made in a folder; `named` is what the user wrote."""
    if os.access(folder, os.W_OK | os.X_OK):
        return
    is_read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    error = OSError(errno.EROFS if is_read_only else errno.EACCES, "", str(folder))
    raise InputError(f"got {named}, but {folder} is not writable: {advice(error)}")


def _check_characters(text: str) -> None:
    if not text.strip():
        raise InputError(f"got {text!r}, wanted a path: name one, or leave it out")
    strange = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs")), None)
    if strange is not None:
        kind = (
            "is not UTF-8" if unicodedata.category(strange) == "Cs" else "has a control character"
        )
        raise InputError(f"got {text!r}, which {kind}: rename it or write it without")


def _scheme(text: str) -> str | None:
    """The scheme of a URI, None for a plain path. Errors: `InputError` for what is neither."""
    uri = _URI.match(text)
    if uri is not None and uri[1] in _SERVED:
        return uri[1]
    shown = without_secrets(text)
    if _is_near_uri(text):
        raise _near_uri(text)
    if "://" in text:
        raise InputError(f"got {shown!r}, wanted a path or a URI: a URI starts with its scheme")
    if text.startswith("//"):
        path = shown.lstrip("/")
        raise InputError(f"got {shown!r}, wanted /{path} or s3://{path}: write one of them")
    if "\\" in text and not os.path.lexists(text):
        raise InputError(
            f"got {text} with a backslash: write / between folders and a space as it is"
        )
    return None


def _is_near_uri(text: str) -> bool:
    near = _NEAR_URI.match(text)
    return near is not None and (bool(near[2]) or near[1].lower() in _MEANT)


def _near_uri(text: str) -> InputError:
    """What is wrong with a URI that none of ours is, and what to write."""
    near = _NEAR_URI.match(text)
    assert near is not None
    name, rest, shown = near[1], near[3].rstrip(" '\""), without_secrets(text)
    if len(name) == 1:
        return InputError(
            f"got {shown!r}, a path of Windows, wanted one of this machine: change it"
        )
    meant = _MEANT.get(name.lower())
    if meant is None or text.startswith(f"{meant}://"):
        served = ", ".join(f"{scheme}://" for scheme in _SERVED)
        return InputError(
            f"got the scheme {name!r} of {shown}, wanted a plain path or one of {served}: choose "
            "one of these"
        )
    right = without_secrets(f"{meant}://{'/' if meant == 'file' else ''}{rest}")
    local = "" if "://" in text else f" (or ./{shown} for a local path)"
    return InputError(f"got {shown!r}, wanted {right}: write it so{local}")


def _path_of_file_uri(uri: str) -> str:
    """The path of `file:///path`, percent-decoded as `Path.as_uri` encodes."""
    rest = uri.removeprefix("file://")
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not path:
        raise InputError(f"got {uri!r}, wanted a path of this machine: write file:///folder")
    path = slash + unquote(path)
    _check_characters(path)
    return path


def _expanded(path: str) -> str:
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise InputError(
            f"got {path!r}, but there is no user {user[1:]!r}: correct it, or write ./{path} for a "
            "folder of that name"
        )
    return expanded


def _is_temporary(path: str) -> bool:
    if _SUBMITTED_JOB in os.environ and not os.path.isabs(path):
        return True
    parts = Path(os.path.realpath(path)).parts
    return _RAY_COPIES in pairwise(parts)
