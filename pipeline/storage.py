"""Where a dataset lives: a local folder or an object store, behind one contract.

A file becomes visible whole or not at all. On a local disk that is a temporary name in the target
folder, fsync, `os.replace`, fsync of the folder. On an object store (S3, GCS, Azure through
`pyarrow.fs`) it is one whole-file upload: a rename there is a copy and a delete, so none is used.
A request that a store refuses for the moment is made again here, and nowhere else.
"""

from __future__ import annotations

import io
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar, cast
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import pyarrow as pa
from pyarrow import fs

from depthvar.errors import InputError, naming
from depthvar.host.leftovers import is_leftover
from depthvar.paths import check_output_folder, checked_location, is_uri
from pipeline.faults import reach
from pipeline.store_uri import StoreUri

TEMP_PREFIX = ".tmp-"
_COPY_BYTES = 8 * 2**20
_MAX_TRIES = 8
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0
# What a store says of a request that may work a moment later: S3's error names, Google's status
# names, HTTP 408, 429 and 5xx of all three, and connections that broke.
_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING"
    r"|REQUEST_TIMEOUT|REQUEST_TIME_TOO_SKEWED|curlCode"
    r"|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED"
    r"|(?i:http (?:status|code|response code):? ?|HTTP[/ ]|status ?code:? ?)(?:408|429|5[0-9][0-9])"
    r"|ServerBusy|OperationTimedOut|InternalError|[Cc]onnection (?:reset|refused|aborted|closed)"
)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Storage:
    """One dataset folder. Names are relative, with `/` between the parts."""

    uri: str = field(repr=False)  # can hold credentials
    filesystem: fs.FileSystem
    root: str
    is_local: bool

    @staticmethod
    def open(uri: str | os.PathLike[str]) -> Storage:
        """Resolve a plain path, `file://` or store URI without touching what it points to.

        What follows the bucket is the key, byte for byte (see `StoreUri`). Errors: `InputError`
        for what `checked_location` refuses and for a malformed URI.
        """
        text = checked_location(os.fspath(uri))
        if not is_uri(text):
            return Storage(text, fs.LocalFileSystem(), os.path.abspath(text), is_local=True)
        parts = StoreUri.parse(text)
        try:
            filesystem, base = fs.FileSystem.from_uri(_with_environment(parts.base))
        except (pa.ArrowException, ValueError, OSError) as error:  # OSError: no answer for a region
            reason = " ".join(_without_secrets(str(error), parts).split())
            raise InputError(f"got {parts}, which cannot be opened: {reason}") from error
        root = "/".join(part for part in (base.strip("/"), parts.key) if part)
        if not root:
            raise InputError(f"got {parts} without a bucket: name a bucket and a folder")
        return Storage(text, filesystem, root, is_local=False)

    def __str__(self) -> str:
        return self.uri if self.is_local else str(StoreUri.parse(self.uri))

    def list(self, folder: str) -> dict[str, int]:
        """File name -> size in bytes, as of `list_with_times`."""
        return {name: size for name, (size, _) in self.list_with_times(folder).items()}

    def list_with_times(self, folder: str) -> dict[str, tuple[int, int | None]]:
        """File name -> size in bytes and time of writing, in ns since 1970 where it is known.

        From one listing; empty for a folder that does not exist. Temporary names are left out: they
        belong to a publication that is not finished.
        """
        return {
            info.base_name: (int(info.size), info.mtime_ns)
            for info in self._entries(folder)
            if info.type == fs.FileType.File and not info.base_name.startswith(TEMP_PREFIX)
        }

    def list_folders(self, folder: str) -> tuple[str, ...]:
        """The names of the folders directly inside a folder."""
        found = self._entries(folder)
        return tuple(sorted(e.base_name for e in found if e.type == fs.FileType.Directory))

    def is_empty(self) -> bool:
        """Whether nothing but temporary names and what systems leave is in the dataset folder."""
        return all(is_leftover(entry.base_name) for entry in self._entries(""))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is no such file."""
        info = self._asking(lambda: self.filesystem.get_file_info(self._path(name)))
        return int(info.size) if info.type == fs.FileType.File else None

    def list_older(self, folder: str, age: timedelta) -> tuple[str, ...]:
        """The files of a folder, temporary names included, that are older than `age`."""
        latest = datetime.now(UTC) - age
        return tuple(
            entry.base_name
            for entry in self._entries(folder)
            if entry.type == fs.FileType.File and entry.mtime is not None and entry.mtime < latest
        )

    def times(self, folder: str) -> dict[str, datetime]:
        """File name -> when the file was written, as far as that is known, from one listing."""
        return {e.base_name: e.mtime for e in self._entries(folder) if e.mtime is not None}

    def remove(self, name: str) -> None:
        """Delete a file. Errors: `FileNotFoundError`, `OSError`."""
        self._asking(lambda: self.filesystem.delete_file(self._path(name)))

    def read(self, name: str) -> bytes:
        """The whole file. Errors: `FileNotFoundError`."""
        with self.open_input(name) as stream:
            return stream.read()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Some bytes of a file, fewer where it ends. Errors: `FileNotFoundError`."""
        path = self._path(name)

        def get() -> bytes:
            with self.filesystem.open_input_file(path) as file:
                return cast(bytes, file.read_at(length, start))

        return self._asking(get)

    def open_input(self, name: str) -> IO[bytes]:
        """A readable binary stream from the start. Errors: `FileNotFoundError`."""
        if self.is_local:
            return open(self._path(name), "rb")
        path = self._path(name)
        file = self._asking(lambda: self.filesystem.open_input_file(path))
        return io.BufferedReader(_StoreReader(file, self._asking), _COPY_BYTES)

    def check_writable(self) -> None:
        """Find out without writing whether a local folder could be made and written.

        Errors: `InputError`. A store answers only when it is written to.
        """
        if not self.is_local:
            return
        check_output_folder(Path(self.root), f"the output {self}")

    def publish_file(self, local: Path, name: str) -> None:
        """Make a copy of `local` visible as `name`, replacing what is there. Errors: `OSError`."""
        with open(local, "rb") as source:
            if self.is_local:
                with self._replacing(name) as target:
                    while block := source.read(_COPY_BYTES):
                        target.write(block)
                return
            self._upload(pa.memory_map(str(local)).read_buffer(), name)

    def publish_bytes(self, data: bytes, name: str) -> None:
        """Make `data` visible as `name`, replacing what is there. Errors: `OSError`."""
        if not self.is_local:
            self._upload(data, name)
            return
        with self._replacing(name) as target:
            target.write(data)

    def create(self, data: bytes, name: str) -> bool:
        """Publish `data` unless `name` exists; False where it does. Errors: `OSError`.

        Exclusive on a local disk. On a store two writers at the same moment can both be told
        True: read the name again to learn whose data stayed.
        """
        if not self.is_local:
            if self.size(name) is not None:
                return False
            self._upload(data, name)
            return True
        target = Path(self._path(name))
        _make_folder(target.parent)
        temp = target.parent / _temp_name(target.name)
        try:
            _write_durably(temp, data)
            try:
                os.link(temp, target)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                if target.exists():
                    return False
                os.replace(temp, target)
        finally:
            temp.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return True

    def _entries(self, folder: str) -> tuple[Any, ...]:
        path = self._path(folder) if folder else self.root
        selector = fs.FileSelector(path, recursive=False, allow_not_found=True)
        try:
            return tuple(self._asking(lambda: self.filesystem.get_file_info(selector)))
        except NotADirectoryError as error:
            raise InputError(f"got {self}, but {path} is not a folder: choose a folder") from error

    def _path(self, name: str) -> str:
        parts = PurePosixPath(name).parts
        assert parts, "a name inside the dataset, not the dataset itself"
        assert not {"/", ".."} & set(parts), f"{name!r} leaves the dataset"
        return "/".join((self.root.rstrip("/"), *parts))

    @contextmanager
    def _replacing(self, name: str) -> Iterator[IO[bytes]]:
        """A temporary file in the folder of `name` that takes its place on a clean exit."""
        target = Path(self._path(name))
        _make_folder(target.parent)
        temp = target.parent / _temp_name(target.name)
        try:
            with naming(target), open(temp, "xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            reach("file-staged")
            os.replace(temp, target)
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                temp.unlink(missing_ok=True)
            raise
        reach("file-replaced")
        _sync_folder(target.parent)

    def _upload(self, data: bytes | pa.Buffer, name: str) -> None:
        path = self._path(name)

        def put() -> None:
            with self.filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(data)

        self._asking(put)
        stored, wanted = self.size(name), len(memoryview(data))
        if stored != wanted:
            raise OSError(f"uploaded {wanted} bytes to {name}, the store has {stored}")

    def _asking(self, request: Callable[[], Answer]) -> Answer:
        """The answer to a request that may be repeated; a store gets several tries.

        Only errors named in `_TRANSIENT` are tried again, with pauses that double.
        """
        pause_s = _FIRST_PAUSE_S
        for _ in range(_MAX_TRIES - 1):
            try:
                return request()
            except OSError as error:
                if self.is_local or not is_transient(error):
                    raise
            time.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return request()


def is_transient(error: OSError) -> bool:
    """Whether a store's error may be gone a moment later."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    return isinstance(error, ConnectionError | TimeoutError) or bool(_TRANSIENT.search(str(error)))


class _StoreReader(io.RawIOBase):
    """An object read in ranges, each of them tried again where the store fails for the moment."""

    def __init__(self, file: pa.NativeFile, asking: Callable[[Callable[[], bytes]], bytes]) -> None:
        self._file, self._asking, self._position = file, asking, 0
        self._size = int(asking(file.size))

    def readable(self) -> bool:
        """As of a file opened for reading."""
        return True

    def readinto(self, target: Any) -> int:
        """Fill `target` from the current position; the bytes read, 0 at the end."""
        wanted = min(len(target), self._size - self._position)
        if wanted <= 0:
            return 0
        data = self._asking(lambda: cast(bytes, self._file.read_at(wanted, self._position)))
        target[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Let go of the object; safe at any time, also twice."""
        if not self.closed:
            with suppress(OSError):
                self._file.close()
        super().close()


def _with_environment(uri: str) -> str:
    """An S3 URI with what the environment says of its endpoint and region, as AWS tools read it.

    What the URI says itself stays. Credentials are found by the store's own client.
    """
    parts = urlsplit(uri)
    if parts.scheme.lower() != "s3":
        return uri
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and "endpoint_override" not in options:
        found = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        options["endpoint_override"] = found.netloc
        options.setdefault("scheme", found.scheme)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region:
        options.setdefault("region", region)
    elif "endpoint_override" in options:
        options.setdefault("region", "us-east-1")  # whoever serves S3 elsewhere takes any
    return parts._replace(query=urlencode(options, quote_via=quote)).geturl()


def _without_secrets(message: str, uri: StoreUri) -> str:
    """An error's text without the URI's user, password and options."""
    user = uri.authority.rpartition("@")[0]
    for secret in (_with_environment(uri.base), uri.base, user, user.rpartition(":")[2]):
        message = message.replace(secret, "...") if secret else message
    return message.replace(uri.options, "...") if uri.options else message


def _temp_name(name: str) -> str:
    """A name that no reader takes for a shard, not even one that looks for `*.tar`."""
    return f"{TEMP_PREFIX}{uuid.uuid4().hex}-{name[:100]}.part"


def _write_durably(path: Path, data: bytes) -> None:
    with naming(path), open(path, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, each entry durable in the folder above it."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
