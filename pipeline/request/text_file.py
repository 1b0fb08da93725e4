"""Text that people write: UTF-8, or an error that says what else the file looks like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from depthvar.errors import InputError, advice

_OTHER_FILES = (  # by their first bytes; UTF-32 begins as UTF-16 does
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"PK\x03\x04", "an Excel or zip file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"PAR1", "a Parquet file"),
)
_LINE_END = re.compile(rb"\r\n|\r|\n")


@contextmanager
def errors_of(place: str) -> Iterator[None]:
    """Begin the message of an `InputError` with its place."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def read_text(path: Path, what: str, *, max_bytes: int | None = None) -> str:
    """The text of a file, without a byte order mark; `what` it is begins every error.

    Errors: `InputError` for a file that cannot be read, is larger than wanted or no UTF-8 text.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(-1 if max_bytes is None else max_bytes + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        todo = advice(error, path)
        raise InputError(f"{what} {path} cannot be read: {reason}: {todo}") from None
    if max_bytes is not None and len(data) > max_bytes:
        raise InputError(
            f"{what} {path} is larger than {max_bytes >> 20} MiB, wanted at most that: split the"
            " job into several"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} {_not_text(data, error.start)}") from None
    if "\0" in text:
        raise InputError(f"{what} {path} {_not_text(data, data.index(0))}")
    return text


def _not_text(data: bytes, position: int) -> str:
    """What a file is that is no UTF-8 at a position, and what to do."""
    for start, name in _OTHER_FILES:
        if data.startswith(start):
            return f"looks like {name}, not UTF-8 text: save it as UTF-8 text"
    line = len(_LINE_END.findall(data[:position])) + 1
    if data[position] == 0:
        return (
            f"holds a NUL byte in line {line}, as UTF-16 and binary files do, not UTF-8 text: "
            "save it as UTF-8 text"
        )
    byte = f"{data[position]:#04x}"
    return f"holds the byte {byte} in line {line}, which is not UTF-8: save it as UTF-8 text"
