"""Weights at a URI; the store is a local folder behind the interface of an object store."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from pyarrow import fs

import pipeline.request.weights
from depthvar.config import TEXT_MODELS
from depthvar.errors import InputError
from depthvar.weights.files import files_in, shards_of
from pipeline.request.weights import default_cache, fetch_model, local_encoder, local_weights
from pipeline.storage import Storage

URI = "s3://bucket/weights"
PTH = ("var_d16.pth", "vae_ch160v4096z32.pth")


class Store:
    """Opens every URI in a folder, notes what is read, and can cut files short."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.reads: list[str] = []
        self.cut_short = False

    def open(self, uri: str) -> Storage:
        store, path = self, str(self.root / uri.removeprefix("s3://"))

        class Noted(Storage):
            def open_input(self, name: str):  # type: ignore[no-untyped-def]
                store.reads.append(name)
                stream = super().open_input(name)
                if store.cut_short:
                    stream.read(3)
                return stream

        return Noted(uri, fs.LocalFileSystem(), path, is_local=False)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    folder = tmp_path / "store" / "bucket" / "weights"
    folder.mkdir(parents=True)
    for name in (*PTH, "var_d30.pth", "README.md"):
        (folder / name).write_bytes(name.encode() * 1000)
    store = Store(tmp_path / "store")
    monkeypatch.setattr(pipeline.request.weights.Storage, "open", store.open)
    monkeypatch.setenv("DEPTHVAR_CACHE", str(tmp_path / "cache"))
    return store


def test_the_models_files_are_fetched_once(store: Store):
    first = local_weights("var-d16", URI)
    assert first is not None
    assert sorted(path.name for path in Path(first).iterdir()) == ["sha256.json", *sorted(PTH)]
    assert (Path(first) / PTH[0]).read_bytes() == PTH[0].encode() * 1000
    assert local_weights("var-d16", URI) == first
    assert store.reads == list(PTH)


def test_a_user_s_own_model_is_fetched_by_its_file(store: Store):
    (store.root / "bucket" / "weights" / "best.pt").write_bytes(b"x")
    (store.root / "bucket" / "weights" / "classes.txt").write_bytes(b"boot")
    found = Path(str(local_weights("shoes", f"{URI}/best.pt")))
    held = {path.name for path in found.parent.iterdir()}
    assert held == {"best.pt", PTH[1], "classes.txt", "sha256.json"}
    with pytest.raises(InputError, match=r"check --weights, which may name the transformer's file"):
        local_weights("shoes", URI)


def test_a_text_encoder_is_fetched_once_by_its_files(store: Store):
    folder = store.root / "bucket" / "weights"
    names = ("config.json", "model.safetensors", "tokenizer.json")
    for name in (*names, "pytorch_model.bin"):
        (folder / name).write_bytes(name.encode())
    found = local_encoder(URI)
    assert {path.name for path in Path(found).iterdir()} == {*names, "sha256.json"}
    assert local_encoder(URI) == found
    assert store.reads == list(names)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"wanted a text encoder .*: check --text-encoder"):
        local_encoder(URI)
    for local in ("google/flan-t5-xl", "hf://me/t5", str(folder)):
        assert local_encoder(local) == local


def test_an_index_is_fetched_with_the_files_beside_it(store: Store):
    folder = store.root / "bucket" / "weights"
    inner = folder / "infinity_8b_weights"
    inner.mkdir()
    shards = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in (*shards, "calibration.safetensors", "README.md"):
        (inner / name).write_bytes(name.encode())
    (folder / "infinity_vae_d56_f8_14_patchify.pth").write_bytes(b"vae")
    entry = str(local_weights("infinity-8b", URI))
    transformer, tokenizer = files_in(TEXT_MODELS["infinity-8b"], entry)
    assert tokenizer.read_bytes() == b"vae"
    assert [path.read_bytes().decode() for path in shards_of(transformer)] == shards
    held = {path.name for path in transformer.parent.iterdir()}
    assert held == {*shards, transformer.name, "calibration.safetensors"}
    assert local_weights("infinity-8b", URI) == entry
    (inner / tokenizer.name).write_bytes(b"vae")
    file = Path(str(local_weights("infinity-8b", f"{URI}/{inner.name}/{transformer.name}")))
    assert [path.name for path in shards_of(file)] == shards


def test_one_file_is_fetched_with_what_lies_beside_it(store: Store):
    found = local_weights("var-d16", f"{URI}/var_d30.pth")
    assert found is not None
    assert Path(found).name == "var_d30.pth"
    assert (Path(found).parent / PTH[1]).is_file()


def test_new_files_under_the_same_uri_are_fetched(store: Store):
    first = local_weights("var-d16", URI)
    path = store.root / "bucket" / "weights" / PTH[0]
    path.write_bytes(b"new" * 1000)
    os.utime(path, ns=(7, 7))
    second = local_weights("var-d16", URI)
    assert second != first
    assert (Path(str(second)) / PTH[0]).read_bytes() == b"new" * 1000


def test_a_damaged_copy_is_fetched_again(store: Store):
    entry = Path(str(local_weights("var-d16", URI)))
    damaged = entry / PTH[0]
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    os.utime(damaged, ns=(7, 7))
    assert local_weights("var-d16", URI) == str(entry)
    assert damaged.read_bytes() == PTH[0].encode() * 1000


def test_a_transfer_that_ends_early_leaves_nothing_that_looks_whole(store: Store):
    store.cut_short = True
    with pytest.raises(InputError, match=r"cannot be fetched \(var_d16.pth ended early"):
        local_weights("var-d16", URI)
    store.cut_short = False
    assert (Path(str(local_weights("var-d16", URI))) / PTH[0]).stat().st_size == 11_000


def test_weights_of_another_model_are_told_without_fetching(store: Store):
    with pytest.raises(
        InputError, match=r"holds README.md, vae.*wanted the transformer and the tokenizer of shoes"
    ):
        local_weights("shoes", URI)
    with pytest.raises(InputError, match="holds no files"):
        local_weights("var-d16", "s3://bucket/typo")
    assert store.reads == []


def test_local_paths_and_no_path_come_back_as_they_are(tmp_path: Path):
    assert local_weights("digits", None) is None
    assert local_weights("digits", str(tmp_path)) == str(tmp_path)
    assert local_weights("digits", tmp_path.as_uri()) == str(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        fetch_model("digits", str(tmp_path / "none"))


def test_secrets_in_a_uri_are_not_told(store: Store):
    with pytest.raises(InputError) as caught:
        local_weights("shoes", "s3://key:secret@bucket/typo?token=secret")
    assert "secret" not in str(caught.value)


def _fetch(root: Path, cache: Path, log: Path) -> None:
    store = Store(root)
    pipeline.request.weights.Storage = replace_open(store)  # type: ignore[misc, assignment]
    found = local_weights("var-d16", URI, cache=cache)
    log.write_text(json.dumps({"found": found, "reads": store.reads}))


def replace_open(store: Store) -> type[Storage]:
    class Opened(Storage):
        open = staticmethod(store.open)

    return Opened


def test_processes_that_start_together_fetch_once(store: Store, tmp_path: Path):
    logs = [tmp_path / f"{i}.json" for i in range(3)]
    context = multiprocessing.get_context("fork")
    runs = [
        context.Process(target=_fetch, args=(store.root, tmp_path / "shared", log)) for log in logs
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    found = [json.loads(log.read_text()) for log in logs]
    assert len({one["found"] for one in found}) == 1
    assert sorted(len(one["reads"]) for one in found) == [0, 0, 2]


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DEPTHVAR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "depthvar"
    monkeypatch.setenv("DEPTHVAR_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"
