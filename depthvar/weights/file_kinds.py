"""What a file is that was given as weights and holds none, and what to do: for the error."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import NamedTuple

SAVE_THE_STATE = (
    'save the state dict alone where it was made: torch.save(model.state_dict(), "weights.pth")'
)
_FETCH = "fetch the weights themselves, by their download link, and compare the size"


class FileKind(NamedTuple):
    """A kind of file by name, and what to do to have weights."""

    what: str
    to_do: str


_EMPTY = FileKind("empty (0 bytes)", "fetch it again")
_PACKED = FileKind(
    "a compressed file or an archive (gzip, xz, bzip2, zstd, 7-Zip, RAR, tar)", "unpack it first"
)
_FOREIGN = FileKind(
    "a file of another library (ONNX, TensorFlow, Keras, Flax, GGUF, NumPy)",
    "give weights of VAR as torch saves them",
)
_PICKLE = FileKind("a pickle that torch.save did not write", SAVE_THE_STATE)
_PROGRAM = FileKind(
    "a program (TorchScript or torch.export), which is not run",
    f"{SAVE_THE_STATE}; of TorchScript that is torch.jit.load(path).state_dict()",
)
_UNPACKED = FileKind(
    "a folder that a torch checkpoint was unpacked into, as some browsers do",
    "fetch it again and keep it packed",
)
_DISTRIBUTED = FileKind(
    "a folder with a distributed checkpoint",
    "join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth",
)
_BINARY = (  # by its first bytes
    (rb"\Z", _EMPTY),
    (rb"\x1f\x8b|\xfd7zXZ\x00|BZh|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!|.{257}ustar", _PACKED),
    # An ONNX model begins with the number of its format and the name of what wrote it.
    (
        rb"GGUF|\x89HDF|\x93NUMPY|.{4}TFL3|\x08[\x01-\x14]\x12.(?:pytorch|\w*onnx)",
        _FOREIGN,
    ),
    (rb"\x80[\x00-\x05](?!\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19)", _PICKLE),  # not torch's older form
)
_TEXT = (  # by anything in its first lines
    (
        r"\Aversion https://git-lfs\.github\.com/spec/",
        FileKind(
            "a Git LFS pointer, which stands for the weights",
            "run `git lfs pull` in its repository, or fetch the file by its download link",
        ),
    ),
    (
        "/annex/objects/",
        FileKind("a git-annex pointer, which stands for the weights", "run `git annex get` on it"),
    ),
    (
        '"weight_map"',
        FileKind(
            "the index of weights in several safetensors files",
            "join them: read each with safetensors.torch.load_file, write all with save_file",
        ),
    ),
    (r"\A<", FileKind("a web page or an error message of a server", _FETCH)),
    ("", FileKind("text", _FETCH)),
)
_FOREIGN_NAMES = re.compile(r".*\.(onnx|pb|index|meta|msgpack|data-0000.*)")


def kind_of(path: Path) -> FileKind | None:
    """What a file or folder is if it can be no weights; None if it looks like weights, damaged."""
    if path.is_dir():
        return _kind_of_folder({entry.name for entry in path.iterdir()}, path)
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    for begin, kind in _BINARY:
        if re.match(begin, head, re.DOTALL):
            return kind
    if _FOREIGN_NAMES.fullmatch(path.name):
        return _FOREIGN
    # A character may be cut at the end of what was read.
    text = head.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")
    if len(text.encode()) < len(head) - 64 or re.search(r"[\x00-\x08\x0e-\x1f]", text):
        return None
    return next(kind for held, kind in _TEXT if re.search(held, text))


def _kind_of_zip(path: Path) -> FileKind | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
    last_parts = {name.rsplit("/", 1)[-1] for name in names}
    if last_parts & {"constants.pkl", "archive_format", "serialized_exported_program.json"}:
        return _PROGRAM
    if "data.pkl" in last_parts:
        return None
    return FileKind(f"a zip archive of {', '.join(names[:4]) or 'nothing'}", _PACKED.to_do)


def _kind_of_folder(names: set[str], path: Path) -> FileKind | None:
    if "data.pkl" in names or (path / path.stem / "data.pkl").is_file():
        return _UNPACKED
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return _DISTRIBUTED
    if "saved_model.pb" in names or "checkpoint" in names:
        return _FOREIGN
    return None
