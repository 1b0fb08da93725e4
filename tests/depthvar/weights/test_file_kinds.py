"""What is given in place of weights is named for what it is, and never with advice to run it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from depthvar.errors import InputError
from depthvar.weights.file_kinds import kind_of
from depthvar.weights.find import find_model
from depthvar.weights.tensor_files import read_file

NAMES = ("w.pth", "w.safetensors")
WEIGHTS = {"a": torch.ones(300)}


def torch_bytes(content: object = WEIGHTS, **how: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tar_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("w.pth")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(2))
    return buffer.getvalue()


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
S3_ERROR = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
PARTS = zip_of({"weights.pth": b"x"})
PACKED = ("is a compressed file or an archive", "unpack it first")
FOREIGN = ("is a file of another library", "give weights of VAR")
FILES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty": (lambda: b"", "is empty (0 bytes)", "fetch it again"),
    "LFS pointer": (lambda: LFS, "is a Git LFS pointer", "git lfs pull"),
    "annex": (lambda: b"/annex/objects/SHA256E-s1--a.pth\n", "a git-annex pointer", "annex get"),
    "page": (lambda: b"\r\n<!DOCTYPE html>\n" + b"x" * 9000, "is a web page", "download link"),
    "html": (lambda: b"<html><body>403</body></html>", "is a web page", "download link"),
    "store's error": (lambda: S3_ERROR, "is a web page or an error message", "download link"),
    "JSON": (lambda: b'{"error": "Repository not found"}', "is text", "fetch the weights"),
    "index": (lambda: json.dumps(INDEX).encode(), "is the index of weights in", "save_file"),
    "text": (lambda: "Zugriff verweigert: é\n".encode() * 400, "is text", "fetch the weights"),
    "gzip": (lambda: gzip.compress(torch_bytes()), *PACKED),
    "xz": (lambda: lzma.compress(torch_bytes()), *PACKED),
    "bzip2": (lambda: bz2.compress(torch_bytes()), *PACKED),
    "zstd": (lambda: b"\x28\xb5\x2f\xfd" + b"\0" * 99, *PACKED),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + b"\0" * 99, *PACKED),
    "tar": (lambda: tar_of(torch_bytes()), *PACKED),
    "zip": (lambda: PARTS, "is a zip archive of weights.pth", "unpack it first"),
    "empty zip": (lambda: zip_of({}), "is a zip archive of nothing", "unpack it first"),
    "npz": (npz, "is a zip archive of a.npy", "unpack it first"),
    "npy": (npy, *FOREIGN),
    "TorchScript": (
        lambda: zip_of({"w/data.pkl": b"", "w/constants.pkl": b"", "w/code/m.py": b""}),
        "is a program (TorchScript or",
        "torch.jit.load(path).state_dict()",
    ),
    "exported": (
        lambda: zip_of({"w/archive_format": b"pt2"}),
        "is a program (TorchScript or torch.export)",
        "save the state dict",
    ),
    "GGUF": (lambda: b"GGUF\3\0\0\0" + b"\0" * 99, *FOREIGN),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + b"\0" * 99, *FOREIGN),
    "TFLite": (lambda: b"\x1c\0\0\0TFL3" + b"\0" * 99, *FOREIGN),
    "ONNX": (lambda: b"\x08\x08\x12\x07pytorch" + b"\0" * 99, *FOREIGN),
    "pickle": (lambda: pickle.dumps({"a": [1.5]}), "is a pickle", "state dict alone"),
    "old pickle": (lambda: pickle.dumps({"a": 1}, protocol=2), "is a pickle", "state dict alone"),
    "noise": (lambda: bytes(range(128, 256)) * 9, "is truncated or no file", "fetch it again"),
    "zeros": (lambda: b"\0" * 999, "is truncated or no file of weights", "fetch it again"),
    "start of a torch file": (lambda: torch_bytes()[:700], "is truncated or no", "fetch it again"),
    "start of an older one": (
        lambda: torch_bytes(_use_new_zipfile_serialization=False)[:300],
        "is truncated or no file of weights",
        "fetch it again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named(tmp_path: Path, kind: str, name: str):
    make, what, to_do = FILES[kind]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(InputError) as caught:
        read_file(path)
    told = str(caught.value)
    assert told.startswith(str(path))
    assert what in told
    assert to_do in told
    assert "\n" not in told
    for unsafe in ("weights_only", "trust", "safe_globals", "pickle_module"):
        assert unsafe not in told


@pytest.mark.parametrize("name", ["model.pb", "model.onnx", "x.index", "x.data-00000-of-00001"])
def test_files_of_other_libraries_are_named_by_their_names_too(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(bytes(range(128, 256)))
    with pytest.raises(
        InputError, match=r"is a file of another library \(ONNX, TensorFlow.* give weights of VAR"
    ):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (("data.pkl", "version", "data/0"), "that a torch checkpoint was unpacked into"),
        (("w/data.pkl", "w/version"), "that a torch checkpoint was unpacked into"),
        ((".metadata", "__0_0.distcp"), "with a distributed checkpoint, wanted .*dcp_to_torch"),
        (("saved_model.pb", "variables/x"), "a file of another library .*TensorFlow"),
    ],
)
def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path, files: tuple[str, ...], told: str):
    folder = tmp_path / "w.pth"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for call in (lambda: read_file(folder), lambda: find_model("var-d16", str(folder))):
        with pytest.raises(InputError, match=told):
            call()


@pytest.mark.parametrize("kind", ["folder", "broken link"])
def test_what_has_the_name_of_weights_and_is_no_file_is_told(tmp_path: Path, kind: str):
    path = tmp_path / "var_d16.pth"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=rf"var_d16.pth is a {kind}"):
        find_model("var-d16", str(tmp_path))


def test_weights_are_no_other_kind(tmp_path: Path):
    for is_zip in (True, False):
        path = tmp_path / "w.pth"
        path.write_bytes(torch_bytes(_use_new_zipfile_serialization=is_zip))
        assert kind_of(path) is None


class Runs:
    """A class whose pickle calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


@pytest.mark.parametrize(
    ("held", "named"),
    [
        (Runs(eval, "1"), "eval"),
        (Runs(subprocess.check_output, ["true"]), "commands.check_output"),
        (Runs(getattr, 1, "real"), "getattr"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_code_is_named_and_not_run(tmp_path: Path, held: object, named: str, is_zip: bool):
    path = tmp_path / "w.pth"
    path.write_bytes(torch_bytes({"a": held}, _use_new_zipfile_serialization=is_zip))
    with pytest.raises(InputError) as caught:
        read_file(path)
    assert f"refers to code ({named}), wanted tensors alone: it was not run" in str(caught.value)
    assert "torch.save(model.state_dict()" in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_functions_of_other_libraries_are_not_called(tmp_path: Path):
    """They are passed over, as what else a training script leaves in its checkpoint."""
    target = tmp_path / "called"
    path = tmp_path / "w.pth"
    path.write_bytes(torch_bytes({**WEIGHTS, "b": Runs(np.save, str(target), 1)}))
    assert read_file(path).tensors.keys() == {"a"}
    assert list(tmp_path.iterdir()) == [path]
