from __future__ import annotations

import hashlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from depthvar.config import model_config
from depthvar.errors import InputError
from depthvar.weights import files as weights_files
from depthvar.weights.files import choose_files, file_names, files_in, find_place, sha256_of

PTH = ("var_d16.pth", "vae_ch160v4096z32.pth")
OURS = ("transformer.safetensors", "tokenizer.safetensors")


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def found_names(model: str, weights: Path | str | None) -> tuple[str, str]:
    place = find_place(model, None if weights is None else str(weights))
    transformer, tokenizer = files_in(model_config(model, place), place)
    return transformer.name, tokenizer.name


def test_a_folder_may_hold_published_files_or_ours(tmp_path: Path):
    everything = (*PTH, "var_d20.pth", "var_d36.pth", "README.md")
    assert found_names("var-d16", fill(tmp_path / "a", *everything)) == PTH
    assert found_names("var-d20", tmp_path / "a")[0] == "var_d20.pth"
    assert found_names("var-d36-512", tmp_path / "a")[0] == "var_d36.pth"
    assert found_names("var-d16", fill(tmp_path / "b", *OURS)) == OURS
    assert found_names("digits", fill(tmp_path / "b", "calibration.safetensors")) == OURS
    assert found_names("var-d30", fill(tmp_path / "c", "var_d30.safetensors", PTH[1])) == (
        "var_d30.safetensors",
        PTH[1],
    )


def test_a_file_is_the_transformer_with_the_tokenizer_beside_it(tmp_path: Path):
    fill(tmp_path, "mine.pth", *PTH)
    assert found_names("var-d16", tmp_path / "mine.pth") == ("mine.pth", PTH[1])


def test_what_is_missing_is_told_with_what_is_there(tmp_path: Path):
    fill(tmp_path / "a", "var_d20.pth", PTH[1])
    wanted = "holds .*var_d20.pth, wanted the transformer of var-d16 as var_d16.safetensors or"
    with pytest.raises(InputError, match=wanted):
        found_names("var-d16", str(tmp_path / "a"))
    fill(tmp_path / "b", "var_d16.pth")
    with pytest.raises(InputError, match=r"wanted the tokenizer of var-d16 as vae_ch160v4096z32"):
        found_names("var-d16", str(tmp_path / "b"))
    fill(tmp_path / "c")
    with pytest.raises(InputError, match="holds no weights, wanted the transformer of digits"):
        found_names("digits", str(tmp_path / "c"))


def test_published_models_need_the_hub_client_where_no_weights_are_given(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"FoundationVision/var .* needs huggingface_hub: pip"):
        found_names("var-d36-512", None)


def test_a_path_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "none"), "models/typo", "./a/b", "nothing", "a/b/c"):
        with pytest.raises(InputError, match="does not exist, wanted a folder or a file"):
            find_place("var-d16", path)
    with pytest.raises(InputError, match="fetch the files first"):
        find_place("var-d16", "s3://user:secret@bucket/weights")


def test_a_copy_of_a_model_needs_its_own_files_alone():
    names = {*PTH, "var_d20.pth", "README.md", "config.json", "calibration.safetensors"}
    assert choose_files("var-d16", names) == (*PTH, "calibration.safetensors", "config.json")
    assert choose_files("shoes", {*OURS, "facts.json"}) == OURS
    assert choose_files("var-d16", names, "mine.pth") == ()
    assert choose_files("var-d16", {*names, "mine.pth"}, "mine.pth")[0] == "mine.pth"
    assert choose_files("var-d16", {"var_d16.pth"}) == ()


@pytest.mark.parametrize(
    ("names", "transformer", "chosen"),
    [
        (("best.pth",), None, ("best.pth",)),
        (("a.pt", "vae.pth", "log.txt"), None, ("a.pt", "vae.pth")),
        (("last.pth", "my_vqvae.pth", "old_tokenizer.pth"), None,
         ("last.pth", "my_vqvae.pth", "old_tokenizer.pth")),
        (("best.pth", "last.pth", "vae.pth"), None, ()),
        (("best.pth", "last.pth", "vae.pth"), "last.pth", ("last.pth", "vae.pth")),
        (("best.pth", "last.pth"), "last.pth", ("last.pth",)),
        (("best.pth",), "typo.pth", ()),
        (("log.txt",), None, ()),
    ],
)  # fmt: skip
def test_a_copy_of_a_user_s_own_model_needs_what_can_be_its_files(names, transformer, chosen):
    """Told by names alone, before anything is fetched; settings beside them come along."""
    beside = ("calibration.safetensors", "config.json", "classes.txt")
    wanted = (*chosen, *beside) if chosen else ()
    assert choose_files("shoes", {*names, *beside}, transformer) == wanted


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A Hugging Face client that serves one folder and notes what it is asked for."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **asked: Any) -> str:
        calls.append({"repo": repo, **asked})
        if repo == "no/connection":
            raise ConnectionError("offline mode is enabled\nmore lines")
        return str(fill(tmp_path / "snapshot", *PTH))

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(fill(tmp_path / "here"))
    return calls


def test_a_repository_is_fetched_when_it_is_named(hub, tmp_path: Path):
    assert found_names("var-d16", None) == PTH
    assert found_names("var-d16", "FoundationVision/var") == PTH
    assert found_names("var-d16", "hf://FoundationVision/var@v1.0") == PTH
    assert [(call["repo"], call["revision"]) for call in hub] == [
        ("FoundationVision/var", None),
        ("FoundationVision/var", None),
        ("FoundationVision/var", "v1.0"),
    ]
    names = {name for names in file_names("var-d16") for name in names}
    for call in hub:
        assert set(call["allow_patterns"]) == names | {"calibration.safetensors", "config.json"}


def test_a_repository_of_a_user_s_own_model_is_fetched_with_files_of_any_name(hub):
    find_place("shoes", "me/shoes")
    assert {"*.pth", "*.safetensors", "classes.txt", "config.json"} <= set(hub[0]["allow_patterns"])


def test_nothing_is_fetched_for_a_local_path_or_for_a_bundled_model(hub, tmp_path: Path):
    fill(tmp_path / "here" / "FoundationVision" / "var", *PTH)
    assert found_names("var-d16", "FoundationVision/var") == PTH
    with pytest.raises(InputError, match="FoundationVision/other does not exist"):
        find_place("var-d16", "FoundationVision/other")
    found_names("digits", None)
    assert hub == []


def test_a_repository_that_cannot_be_fetched_is_told(hub):
    for weights in ("no/connection", "hf://no/connection"):
        with pytest.raises(InputError, match=r"cannot be fetched.*offline mode is enabled\)"):
            find_place("var-d16", weights)
    with pytest.raises(InputError, match="wanted hf://owner/repository"):
        find_place("var-d16", "hf://var")


def test_a_repository_without_the_client_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub,"):
        find_place("var-d16", "FoundationVision/var")


def test_a_damaged_file_of_the_hub_cache_is_told(tmp_path: Path):
    content = b"weights"
    right, wrong = hashlib.sha256(content).hexdigest(), "0" * 64
    for name in (right, wrong):
        fill(tmp_path / "blobs")
        (tmp_path / "blobs" / name).write_bytes(content)
        (tmp_path / f"to-{name[:4]}").symlink_to(tmp_path / "blobs" / name)
    assert sha256_of(tmp_path / f"to-{right[:4]}") == right
    with pytest.raises(InputError, match="is damaged"):
        sha256_of(tmp_path / "to-0000")


def test_a_file_is_hashed_once_while_it_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = fill(tmp_path, "w") / "w"
    read = []
    digest = hashlib.file_digest

    def noted(file: Any, kind: str) -> Any:
        read.append(file.name)
        return digest(file, kind)

    monkeypatch.setattr(weights_files.hashlib, "file_digest", noted)
    first = sha256_of(path)
    assert sha256_of(path) == first == hashlib.sha256(b"w").hexdigest()
    assert len(read) == 1
    path.write_bytes(b"v")
    os.utime(path, ns=(1, 1))
    assert sha256_of(path) == hashlib.sha256(b"v").hexdigest()
    assert len(read) == 2
