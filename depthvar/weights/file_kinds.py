"""What a file is that was given as weights and holds none: by its first bytes, for the error."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

SAVE_THE_STATE = (
    'save the state dict alone where it was made: torch.save(model.state_dict(), "weights.pth")'
)
_FETCH = "fetch the weights themselves, and compare the size with that of their page"
_UNPACK = "unpack it first"
_OTHER_LIBRARY = "it belongs to another library; give weights of VAR as torch saves them"

_HEAD_BYTES = 4096


@dataclass(frozen=True)
class FileKind:
    """A kind of file by name, and what to do to have weights."""

    what: str
    to_do: str


_LFS_POINTER = FileKind(
    "a Git LFS pointer, which stands for the weights",
    "run `git lfs pull` in its repository, or fetch the file by its download link",
)
_ANNEX_POINTER = FileKind(
    "a git-annex pointer, which stands for the weights", "run `git annex get` on it"
)
_PAGE = FileKind(
    "a web page or an error message of a server", "fetch the weights by their download link"
)
_SHARD_INDEX = FileKind(
    "the index of weights in several safetensors files",
    "join them: read each with safetensors.torch.load_file, write all with save_file",
)
_JSON = FileKind("JSON", _FETCH)
_TEXT = FileKind("text", _FETCH)
_PICKLE = FileKind("a pickle that torch.save did not write", SAVE_THE_STATE)
_SCRIPT = FileKind(
    "a TorchScript archive, which is a program",
    'take its tensors: torch.save(torch.jit.load(path).state_dict(), "weights.pth")',
)
_EXPORTED = FileKind("a program of torch.export", SAVE_THE_STATE)
_UNPACKED = FileKind(
    "a folder that a torch checkpoint was unpacked into, as some browsers do",
    "fetch it again and keep it packed",
)
_DISTRIBUTED = FileKind(
    "a folder with a distributed checkpoint",
    "join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth",
)

# (where, bytes, kind)
_MAGIC = (
    (0, b"version https://git-lfs.github.com/spec/", _LFS_POINTER),
    (0, b"\x1f\x8b", FileKind("compressed by gzip", _UNPACK)),
    (0, b"\xfd7zXZ\x00", FileKind("compressed by xz", _UNPACK)),
    (0, b"BZh", FileKind("compressed by bzip2", _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", FileKind("compressed by zstd", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", FileKind("a 7-Zip archive", _UNPACK)),
    (0, b"Rar!", FileKind("a RAR archive", _UNPACK)),
    (257, b"ustar", FileKind("a tar archive", _UNPACK)),
    (0, b"GGUF", FileKind("a GGUF file", _OTHER_LIBRARY)),
    (0, b"\x89HDF", FileKind("an HDF5 file, as of Keras", _OTHER_LIBRARY)),
    (0, b"\x93NUMPY", FileKind("a NumPy array", _OTHER_LIBRARY)),
    (4, b"TFL3", FileKind("a TensorFlow Lite model", _OTHER_LIBRARY)),
)
_SUFFIXES = {
    ".onnx": FileKind("an ONNX model", _OTHER_LIBRARY),
    ".pb": FileKind("a TensorFlow graph", _OTHER_LIBRARY),
    ".index": FileKind("a part of a TensorFlow checkpoint", _OTHER_LIBRARY),
    ".meta": FileKind("a part of a TensorFlow checkpoint", _OTHER_LIBRARY),
    ".msgpack": FileKind("a Flax checkpoint", _OTHER_LIBRARY),
}
# The number of its format and the name of what wrote it are the first fields of an ONNX model.
_ONNX = re.compile(rb"\x08[\x01-\x14]\x12.(?:pytorch|onnx|tf2onnx|keras2onnx|skl2onnx)", re.DOTALL)
_LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


def kind_of(path: Path) -> FileKind | None:
    """What a file or folder is if it can be no weights; None if it looks like weights, damaged."""
    if path.is_dir():
        return _kind_of_folder(path)
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return FileKind("empty (0 bytes)", "fetch it again")
    for begin, magic, kind in _MAGIC:
        if head[begin : begin + len(magic)] == magic:
            return kind
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if re.match(rb"\x80[\x00-\x05]", head) and head[: len(_LEGACY_TORCH)] != _LEGACY_TORCH:
        return _PICKLE
    if _ONNX.match(head):
        return _SUFFIXES[".onnx"]
    if path.suffix in _SUFFIXES or ".data-0000" in path.name:
        return _SUFFIXES.get(path.suffix, _SUFFIXES[".index"])
    return _kind_of_text(head, path)


def _kind_of_text(head: bytes, path: Path) -> FileKind | None:
    # A character may be cut at the end of what was read.
    text = head.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")
    is_text = len(text.encode()) >= len(head) - 64 and not re.search(r"[\x00-\x08\x0e-\x1f]", text)
    if not is_text:
        return None
    if text.startswith("<"):
        return _PAGE
    if "/annex/objects/" in text:
        return _ANNEX_POINTER
    if text.startswith(("{", "[")):
        is_index = '"weight_map"' in text or path.name.endswith(".index.json")
        return _SHARD_INDEX if is_index else _JSON
    return _TEXT


def _kind_of_zip(path: Path) -> FileKind | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    last_parts = {name.rsplit("/", 1)[-1] for name in names}
    if "constants.pkl" in last_parts:
        return _SCRIPT
    if {"archive_format", "serialized_exported_program.json"} & last_parts:
        return _EXPORTED
    if "data.pkl" in last_parts:
        return None
    held = ", ".join(sorted(names)[:4]) or "nothing"
    return FileKind(f"a zip archive of {held}", f"{_UNPACK}, and give the weights that it holds")


def _kind_of_folder(path: Path) -> FileKind | None:
    names = {entry.name for entry in path.iterdir()}
    if "data.pkl" in names or (path / path.stem / "data.pkl").is_file():
        return _UNPACKED
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return _DISTRIBUTED
    if "saved_model.pb" in names or "checkpoint" in names:
        return FileKind("a folder of TensorFlow", _OTHER_LIBRARY)
    return None
