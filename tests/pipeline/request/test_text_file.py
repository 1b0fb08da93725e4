from __future__ import annotations

from pathlib import Path

import pytest

from depthvar.errors import InputError
from pipeline.request.text_file import read_text


def test_text_is_read_without_its_byte_order_mark_and_with_its_line_ends(tmp_path: Path):
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nx\r")
    assert read_text(tmp_path / "t", "the file") == "caf\u00e9\r\nx\r"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("a\n".encode("utf-16"), "looks like UTF-16, not UTF-8 text"),
        ("a\n".encode("utf-32"), "looks like UTF-32, not UTF-8 text"),
        (b"\x1f\x8b\x08\xff", "looks like a gzip file, not UTF-8 text"),
        (b"PAR1\0\0", "looks like a Parquet file, not UTF-8 text"),
        (b"a\r\nb\rc\nd\xe9", "holds the byte 0xe9 in line 4, which is not UTF-8"),
        (b"a\n\0", "holds a NUL byte in line 2"),
    ],
)
def test_what_is_no_text_is_named_for_what_it_looks_like(tmp_path: Path, data: bytes, told: str):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_text(tmp_path / "t", "the file")
    assert str(caught.value).startswith(f"the file {tmp_path / 't'} {told}")
    assert "save it as UTF-8" in str(caught.value)


def test_a_file_that_is_too_large_is_not_read_to_its_end(tmp_path: Path):
    (tmp_path / "t").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(InputError, match="is larger than 1 MiB, wanted at most that: split"):
        read_text(tmp_path / "t", "the file", max_bytes=2**20)
    assert len(read_text(tmp_path / "t", "the file", max_bytes=2**21)) == 2**20 + 1


@pytest.mark.parametrize(("name", "reason"), [("none", "No such file"), (".", "Is a directory")])
def test_what_cannot_be_read_is_an_input_error(tmp_path: Path, name: str, reason: str):
    with pytest.raises(InputError, match=f"cannot be read: {reason}.*: (check that|name a file)"):
        read_text(tmp_path / name, "the file")
