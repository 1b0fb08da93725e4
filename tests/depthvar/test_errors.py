from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from depthvar.errors import InputError, advice, naming
from depthvar.training.loop import save_state
from jobs._entry import run_job

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (errno.ENOSPC, "free space on /: it is full"),
        (errno.EDQUOT, "have your quota there raised"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "have / mounted writable"),
        (errno.EACCES, "change the permissions of {folder}, or choose another"),
        (errno.EPERM, "change the permissions of {folder}, or choose another"),
        (errno.ENOENT, "check that {file} is written right and exists"),
        (errno.ENOTDIR, "a part of it is a file"),
        (errno.EISDIR, "name a file: {file} is a folder"),
        (errno.EEXIST, "choose another name"),
        (errno.ENOTEMPTY, "choose another name"),
        (errno.EMFILE, "raise the limit of open files with `ulimit -n"),
        (errno.ENFILE, "close other programs"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.ELOOP, "symbolic links"),
        (errno.EIO, "check /: it or its connection is failing"),
        (errno.ESTALE, "mount / again"),
        (errno.ENOTCONN, "mount / again"),
        (errno.ENOMEM, "free memory"),
        (errno.EBUSY, "wait until no other program uses"),
        (errno.ECONNREFUSED, "check the network"),
        (errno.ETIMEDOUT, "check the network"),
        (errno.EILSEQ, "choose a name and a place that the file system of / takes"),
    ],
)
def test_advice_follows_the_errno(tmp_path, monkeypatch, number: int, wanted: str):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == "/")
    file = tmp_path / "none" / "file"
    wanted = wanted.format(file=file, folder=tmp_path)
    assert wanted in advice(OSError(number, os.strerror(number), str(file)))
    assert wanted in advice(OSError(number, os.strerror(number)), file)
    assert "None" not in advice(OSError(number, os.strerror(number))), "no path is known"
    assert "s3://b" in (said := advice(OSError(number, "x"), "s3://b/x")) or "{" not in said


def test_the_mount_that_is_full_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) in ("/", str(tmp_path)))
    error = OSError(errno.ENOSPC, "No space left on device")
    assert f"free space on {tmp_path}: " in advice(error, tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("AWS Error ACCESS_DENIED during PutObject operation", "credentials"),
        ("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation", "credentials"),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject", "credentials"),
        ("google::cloud::Status(UNAUTHENTICATED: no)", "credentials"),
        ("AuthenticationFailed: Server failed to authenticate", "credentials"),
        ("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation", "make the bucket"),
        ("ContainerNotFound: the container is not there", "make the bucket"),
        ("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation", "AWS_REGION"),
        ("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7", "connection"),
        ("AWS Error SLOW_DOWN during PutObject operation", "connection"),
        ("ServerBusy, status code: 503", "connection"),
        ("uploaded 5 bytes to x, the store has 3", "check the place"),
    ],
)
def test_advice_for_a_store_follows_its_message(message: str, wanted: str):
    assert wanted in advice(OSError(message), "s3://bucket/x")


def test_an_error_of_writing_names_what_was_written():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as caught:  # noqa: SIM117
        with naming("/dev/full"), open("/dev/full", "wb", buffering=0) as stream:
            stream.write(b"x")
    assert advice(caught.value).startswith("free space on /")
    store = OSError("AWS Error SLOW_DOWN")
    with pytest.raises(OSError, match=r"^AWS Error SLOW_DOWN$"), naming("/some/place"):
        raise store
    assert store.filename is None


def test_an_error_of_a_library_that_comes_of_the_system_is_the_systems(tmp_path: Path):
    def fails(error: Exception) -> Exception:
        with pytest.raises(Exception, match=r".") as caught, naming("/some/place"):
            raise error
        return caught.value

    full = fails(RuntimeError("Error while serializing: I/O error: No space (os error 28)"))
    assert isinstance(full, OSError)
    assert (full.errno, full.filename) == (errno.ENOSPC, "/some/place")
    other = RuntimeError("no errors os error")
    assert fails(other) is other
    (tmp_path / "state.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_state(tmp_path / "state.pt", {"a": torch.zeros(9)})
    assert caught.value.errno == errno.ENOSPC


def test_a_state_is_there_whole_or_not_at_all(tmp_path: Path):
    save_state(tmp_path / "state.pt", {"a": torch.ones(3)})
    assert torch.load(tmp_path / "state.pt", weights_only=True)["a"].tolist() == [1, 1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def exits(error: Exception, capsys: pytest.CaptureFixture[str]) -> tuple[object, list[str]]:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_job(main)
    return caught.value.code, capsys.readouterr().err.splitlines()


def test_a_job_ends_with_the_advice_of_its_error(capsys: pytest.CaptureFixture[str]):
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/some/file")
    code, lines = exits(error, capsys)
    assert code == 1
    happened, to_do = lines
    assert happened == "error: OSError: [Errno 24] Too many open files: '/some/file'"
    assert to_do == (
        "nothing that was committed is lost: raise the limit of open files with `ulimit -n 65536`, "
        "or use fewer workers, then run the same command again"
    )
    assert exits(InputError("got a"), capsys) == (2, ["error: got a"])


def test_no_message_names_an_extra_of_a_package_that_no_registry_has():
    files = [
        f for folder in ("depthvar", "pipeline", "jobs") for f in (ROOT / folder).rglob("*.py")
    ]
    for file in [*files, ROOT / "README.md"]:
        assert "depthvar[" not in file.read_text(), file
