from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

import pipeline.storage as storage_module
from depthvar.errors import InputError
from pipeline.storage import TEMP_PREFIX, Storage
from tests.fake_shards import object_store


@pytest.fixture(params=["disk", "store"])
def storage(request, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return Storage.open(str(tmp_path / "out"))
    return object_store()


def test_what_is_published_is_read_and_listed(storage, tmp_path):
    (tmp_path / "scratch.bin").write_bytes(b"abc" * 1000)
    storage.publish_file(tmp_path / "scratch.bin", "train/00000.tar")
    storage.publish_bytes(b"{}", "meta/00000.json")
    assert storage.list("train") == {"00000.tar": 3000}
    assert storage.list("meta") == {"00000.json": 2}
    assert storage.list("nowhere") == {}
    assert storage.read("train/00000.tar") == b"abc" * 1000
    assert storage.size("meta/00000.json") == 2
    assert storage.size("meta/00001.json") is None
    with storage.open_input("train/00000.tar") as stream:
        assert stream.read(5) == b"abcab"
    assert storage.read_range("train/00000.tar", 4, 3) == b"bca"
    assert storage.read_range("train/00000.tar", 2999, 9) == b"c"


def test_publishing_again_replaces(storage):
    storage.publish_bytes(b"old and long", "meta/a.json")
    storage.publish_bytes(b"new", "meta/a.json")
    assert storage.read("meta/a.json") == b"new"


def test_create_keeps_what_is_there(storage):
    assert storage.create(b"first", "plan.json")
    assert not storage.create(b"second", "plan.json")
    assert storage.read("plan.json") == b"first"


def test_an_empty_file_is_published(storage, tmp_path):
    storage.publish_bytes(b"", "meta/empty")
    assert storage.list("meta") == {"empty": 0}


def test_a_missing_file_is_a_file_not_found_error(storage):
    with pytest.raises(FileNotFoundError):
        storage.read("meta/none.json")
    with pytest.raises(FileNotFoundError):
        storage.read_range("meta/none.json", 0, 1)


def test_temporary_names_are_neither_listed_nor_content(tmp_path):
    storage = Storage.open(str(tmp_path))
    (tmp_path / f"{TEMP_PREFIX}x-plan.json").write_bytes(b"half")
    assert storage.list("") == {}
    assert storage.is_empty()


def test_a_folder_is_empty_whatever_systems_leave_in_it(tmp_path):
    storage = Storage.open(str(tmp_path))
    for name in ("lost+found", "System Volume Information", ".Trash-1000"):
        (tmp_path / name).mkdir()
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / name).touch()
    assert storage.is_empty()
    (tmp_path / "notes.txt").touch()
    assert not storage.is_empty()


@pytest.mark.parametrize("stored", [2, None])
def test_an_upload_that_did_not_arrive_whole_is_an_error(tmp_path, monkeypatch, stored):
    (tmp_path / "scratch.bin").write_bytes(b"abc")
    monkeypatch.setattr(Storage, "size", lambda storage, name: stored)
    told = f"uploaded 3 bytes to train/0.tar, the store has {stored}"
    with pytest.raises(OSError, match=told):
        object_store().publish_bytes(b"abc", "train/0.tar")
    with pytest.raises(OSError, match=told):
        object_store().publish_file(tmp_path / "scratch.bin", "train/0.tar")


def test_a_file_of_several_blocks_is_copied_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "_COPY_BYTES", 1000)
    (tmp_path / "scratch.bin").write_bytes(bytes(range(250)) * 9)
    storage = Storage.open(tmp_path / "out")
    storage.publish_file(tmp_path / "scratch.bin", "train/0.tar")
    assert storage.read("train/0.tar") == bytes(range(250)) * 9


def test_without_hard_links_create_still_keeps_what_is_there(tmp_path, monkeypatch):
    def no_links(source: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    storage = Storage.open(tmp_path)
    assert storage.create(b"first", "plan.json")
    assert not storage.create(b"second", "plan.json")
    assert storage.read("plan.json") == b"first"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_only_files_older_than_asked_are_called_old(tmp_path):
    storage = Storage.open(tmp_path)
    for name, age_s in (("old", 7200), ("young", 60)):
        storage.publish_bytes(b"", name)
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    assert storage.list_older("", timedelta(hours=1)) == ("old",)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "train").touch()
    with pytest.raises(InputError, match="train is not a folder: choose a folder"):
        Storage.open(tmp_path).list("train")


def test_a_failed_publication_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    storage = Storage.open(str(tmp_path))
    storage.publish_bytes(b"old", "meta/a.json")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.publish_bytes(b"new", "meta/a.json")
    assert os.listdir(tmp_path / "meta") == ["a.json"]
    assert (tmp_path / "meta" / "a.json").read_bytes() == b"old"


def test_file_and_folder_are_synced_around_the_replacement(tmp_path, monkeypatch):
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        steps.append(f"sync {kind}")
        fsync(descriptor)

    def noted_replace(source: str, target: str) -> None:
        steps.append("replace")
        assert os.path.dirname(source) == os.path.dirname(target)
        replace(source, target)

    (tmp_path / "meta").mkdir()
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    Storage.open(str(tmp_path)).publish_bytes(b"x", "meta/a.json")
    assert steps == ["sync file", "replace", "sync folder"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="wants a second file system")
def test_scratch_on_another_file_system_is_published(tmp_path):
    scratch = Path("/dev/shm") / f"scratch-{os.getpid()}"
    scratch.write_bytes(b"shard")
    try:
        assert scratch.stat().st_dev != tmp_path.stat().st_dev
        storage = Storage.open(str(tmp_path))
        storage.publish_file(scratch, "train/00000.tar")
        assert storage.read("train/00000.tar") == b"shard"
    finally:
        scratch.unlink()


def test_writers_of_one_name_at_the_same_time_leave_one_whole_file(tmp_path):
    storage = Storage.open(str(tmp_path))
    contents = [bytes([i]) * 50_000 for i in range(8)]
    threads = [
        threading.Thread(target=storage.publish_bytes, args=(c, "train/00000.tar"))
        for c in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read("train/00000.tar") in contents
    assert os.listdir(tmp_path / "train") == ["00000.tar"]


def test_only_one_of_many_creators_is_told_so(tmp_path):
    storage = Storage.open(str(tmp_path))
    won: list[int] = []
    threads = [
        threading.Thread(
            target=lambda i=i: storage.create(b"%d" % i, "plan.json") and won.append(i)
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [storage.read("plan.json")] == [b"%d" % i for i in won]


@pytest.mark.parametrize("uri", ["ftp://host/x", "http://host/x", "s3:///", "", "a\0b"])
def test_a_uri_nobody_serves_is_refused(uri):
    with pytest.raises(InputError):
        Storage.open(uri)


def test_a_file_uri_is_a_local_folder(tmp_path):
    storage = Storage.open(f"file://{tmp_path}/out")
    storage.publish_bytes(b"x", "a")
    assert (tmp_path / "out" / "a").read_bytes() == b"x"


def test_a_file_in_the_place_of_the_output_is_refused(tmp_path):
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(InputError, match="is a file"):
        Storage.open(str(tmp_path / "out")).check_writable()
    with pytest.raises(InputError, match="is a file"):
        Storage.open(str(tmp_path / "out" / "deeper")).check_writable()


def test_an_unwritable_folder_is_refused_without_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="not writable"):
        Storage.open(str(tmp_path / "out")).check_writable()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "train/../../x", ""])
def test_no_name_leaves_the_dataset(tmp_path, name):
    with pytest.raises(AssertionError):
        Storage.open(str(tmp_path)).publish_bytes(b"", name)


def test_credentials_in_a_uri_are_not_printed():
    storage = Storage.open("s3://key:secret@bucket/data?region=us-east-1&scheme=http")
    assert str(storage) == "s3://bucket/data"
    assert "secret" not in f"{storage} {storage!r}"
