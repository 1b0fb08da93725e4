"""The one error type for what a user can cause, and what to do about the system's own errors."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Input that cannot work: the message says what was got, what was wanted and what to do."""


def shown(value: object) -> str:
    """A value as it stands in a message, cut off after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_PERMISSIONS = "change the permissions of {nearest}, or choose another"
_NETWORK = "check the network and the address"
_ADVICE = {
    errno.ENOSPC: "free space on {disk}: it is full (`df -h` and `df -i` tell)",
    errno.EDQUOT: "free space on {disk}, or have your quota there raised: it is used up",
    errno.EFBIG: "raise the limit of a file's size (`ulimit -f`), or choose another place",
    errno.EROFS: "have {disk} mounted writable, or choose another place: it is read-only",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ENOENT: "check that {place} is written right and exists",
    errno.ENOTDIR: "check {place}: a part of it is a file where a folder is wanted",
    errno.EISDIR: "name a file: {place} is a folder",
    errno.EEXIST: "choose another name: {place} exists",
    errno.ENOTEMPTY: "choose another name, or empty the folder: {place} holds something",
    errno.ELOOP: "mend the symbolic links in {place}: they lead in a circle",
    errno.ENAMETOOLONG: "choose a shorter name than {place}",
    errno.EINVAL: "choose a name and a place that the file system of {disk} takes",
    errno.EILSEQ: "choose a name and a place that the file system of {disk} takes",
    errno.EMFILE: "raise the limit of open files with `ulimit -n 65536`, or use fewer workers",
    errno.ENFILE: "close other programs: this machine has as many files open as it allows",
    errno.ENOMEM: "free memory, or use fewer workers or a smaller batch",
    errno.EIO: "check {disk}: it or its connection is failing (`dmesg` tells), or choose another",
    errno.EBUSY: "wait until no other program uses {place}, or choose another",
    errno.ETXTBSY: "wait until no other program uses {place}, or choose another",
    errno.ESTALE: "mount {disk} again: the file server no longer knows {place}",
    errno.ENOTCONN: "mount {disk} again: its connection is gone",
    errno.ENODEV: "mount {disk} again: its device is gone",
    errno.ENXIO: "mount {disk} again: its device is gone",
    errno.ENOLCK: "choose a place whose file system has locks: {disk} has none",
    errno.ENOTSUP: "choose another place: the file system of {disk} cannot do this",
    errno.ENOSYS: "choose another place: the file system of {disk} cannot do this",
    errno.ETIMEDOUT: _NETWORK,
    errno.ECONNREFUSED: _NETWORK,
    errno.ECONNRESET: _NETWORK,
    errno.ECONNABORTED: _NETWORK,
    errno.ENETUNREACH: _NETWORK,
    errno.ENETDOWN: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
    errno.EHOSTDOWN: _NETWORK,
}
"""What to do by `errno`: `place` is the path, `nearest` what exists of it, `disk` its mount."""

_STORE_ADVICE = (
    (
        re.compile(
            r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ACCESS_KEY|SIGNATURE"
            r"|EXPIRED|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|Authoriz|Authenti|[Cc]redential"
            r"|(?i:HTTP status|status ?code:?) ?40[13]\b"
        ),
        "check the store's credentials and what they may do there",
    ),
    (
        re.compile(
            r"NO_SUCH_BUCKET|NoSuchBucket|ContainerNotFound|bucket.*(?:not exist|NOT_FOUND)"
        ),
        "make the bucket, or correct its name",
    ),
    (
        re.compile(r"PermanentRedirect|(?i:HTTP status|status ?code:?) ?30[0-9]\b|[Rr]egion"),
        "give the bucket's region in AWS_REGION or as ?region=",
    ),
    (
        re.compile(
            r"NETWORK_CONNECTION|curlCode|SLOW_DOWN|THROTTLING|UNAVAILABLE|TIMEOUT|ServerBusy"
            r"|INTERNAL_FAILURE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|[Tt]imed? ?out"
            r"|[Cc]onnection|(?i:HTTP status|status ?code:?) ?(?:408|429|5[0-9][0-9])\b"
        ),
        "check the connection to the store and its endpoint, and wait until it answers",
    ),
)
"""What to do by the message of a store's error, which has no `errno`."""


def advice(error: OSError, place: str | os.PathLike[str] | None = None) -> str:
    """What a user can do about an error of the system or of a store, as an imperative clause.

    `place` is what was read or written; without it, what the error names.
    """
    if error.errno in _ADVICE:
        named = place or error.filename2 or error.filename
        if named is None or isinstance(named, int):
            fields = {"place": "the path", "nearest": "the folder", "disk": "its disk"}
        elif "://" in (path := os.fsdecode(named)):
            fields = dict.fromkeys(("place", "nearest", "disk"), path)
        else:
            fields = {"place": path, "nearest": _nearest(path), "disk": _mount_of(path)}
        return _ADVICE[error.errno].format(**fields)
    for pattern, what_to_do in _STORE_ADVICE:
        if pattern.search(str(error)):
            return what_to_do
    return "check the place that could not be read or written"


@contextmanager
def naming(place: str | os.PathLike[str]) -> Iterator[None]:
    """Name `place` in errors of the system that name no file, as of writing to an open one.

    A library's own error that comes of one becomes an `OSError` again.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(place)
        raise
    except Exception as error:
        system = system_error(f"{error} {error.__context__}", place)
        if system is None:
            raise
        raise system from error


def system_error(told: str, place: str | os.PathLike[str]) -> OSError | None:
    """The error of the system that the text of another error tells of, None where it does not."""
    found = re.search(r"\[Errno (\d+)\]|\bos error (\d+)\b", told)
    if found is None:
        return None
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number), os.fspath(place))


def _nearest(path: str) -> str:
    """The path, or the folder above it that exists."""
    found = Path(path).absolute()
    while not os.path.lexists(found):
        found = found.parent
    return str(found)


def _mount_of(path: str) -> str:
    """Where the file system is mounted that holds a path, or would hold it."""
    found = Path(os.path.realpath(path))
    while not os.path.ismount(found):
        found = found.parent
    return str(found)
