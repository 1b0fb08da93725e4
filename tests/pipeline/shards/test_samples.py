"""Reading a shard's tar and Parquet: exactly what was written, or a `ShardError`."""

from __future__ import annotations

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.shards.samples import ShardError, TarSample, read_parquet, read_tar
from pipeline.shards.schema import SHARD_SCHEMA

A = [("0a.cls", b"7"), ("0a.json", b"{}"), ("0a.png", b"x")]
B = [("0b.cls", b"12"), ("0b.json", b"[]"), ("0b.png", b"")]


def read(
    members: list[tuple[str, bytes]],
    kind: bytes = tarfile.REGTYPE,
    captions: tuple[str, ...] = ("cls",),
) -> list[TarSample]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = (len(data), kind)
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return list(read_tar(buffer, "png", captions))


def test_whole_samples_in_order_are_read():
    assert read([*A, *reversed(B)]) == [
        TarSample("0a", 7, b"{}", b"x"),
        TarSample("0b", 12, b"[]", b""),
    ]
    assert read([]) == []


def test_a_depth_map_belongs_to_its_sample():
    with_map = TarSample("0a", 7, b"{}", b"x", b"map")
    assert read([A[0], ("0a.depth.npy", b"map"), *A[1:]]) == [with_map]
    with pytest.raises(ShardError, match=r"'0a\.depth\.npy' does not belong"):
        read([*A, ("0a.depth.npy", b"map")])


def test_a_prompt_is_read_where_samples_have_one_and_belongs_nowhere_else():
    prompt = ("0a.txt", "caf\u00e9".encode())
    named = TarSample("0a", 7, b"{}", b"x", prompt="caf\u00e9")
    assert read([*A, prompt], captions=("cls", "txt")) == [named]
    depths = ("0a.depth.npy", b"map")
    assert read([*A[1:], depths, prompt], captions=("txt",)) == [
        TarSample("0a", None, b"{}", b"x", b"map", "caf\u00e9")
    ]
    for members, captions, told in (
        ([*A, prompt], ("cls",), "'0a.txt' does not belong"),
        ([*A, prompt], ("txt",), "'0a.cls' does not belong"),
        (A, ("cls", "txt"), "cut off inside the sample 0a"),
        ([*A, ("0a.txt", b"\xe9")], ("cls", "txt"), "damaged"),
    ):
        with pytest.raises(ShardError, match=told):
            read(members, captions=captions)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([*B, *A], "'0a.cls' does not belong"),
        ([*A, *A], "'0a.cls' does not belong"),
        ([*A[:2], *B, A[2]], "'0b.cls' does not belong"),
        ([A[0], A[0], *A[1:]], "'0a.cls' does not belong"),
        ([*A[:2], ("0a.jpg", b"x")], "'0a.jpg' does not belong"),
        ([*A, *B[:2]], "cut off inside the sample 0b"),
        ([("0a.cls", b""), *A[1:]], "label of 0a is b'', wanted a number"),
        ([("0a.cls", b"-1"), *A[1:]], "label of 0a is b'-1', wanted a number"),
        ([("0a.cls", b"1234567890"), *A[1:]], "label of 0a is b'1234567890', wanted a number"),
    ],
)
def test_any_other_members_are_refused_by_name(members: list[tuple[str, bytes]], told: str):
    with pytest.raises(ShardError, match=told):
        read(members)


def test_a_member_that_is_no_file_is_refused():
    with pytest.raises(ShardError, match=r"'0a\.cls' does not belong"):
        read([("0a.cls", b"")], tarfile.DIRTYPE)


def test_rows_of_other_columns_are_refused():
    def parquet(table: pa.Table) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()

    empty = SHARD_SCHEMA.empty_table()
    assert read_parquet(parquet(empty)) == empty
    for other in (empty.drop_columns(["label"]), empty.append_column("x", pa.array([], pa.int8()))):
        with pytest.raises(ShardError, match="other columns than this release"):
            read_parquet(parquet(other))
