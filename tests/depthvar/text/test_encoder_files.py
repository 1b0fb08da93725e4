"""What a text encoder's folder must hold; nothing here loads one."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from fnmatch import fnmatch
from pathlib import Path

import pytest

from depthvar.errors import InputError
from depthvar.text.encoder_files import encoder_files, find_encoder, require_transformers
from tests.tiny_t5 import WIDTH, write_t5_names


def test_an_encoder_is_found_with_its_size_and_without_the_decoder(tmp_path: Path):
    found = find_encoder(str(write_t5_names(tmp_path / "t5")))
    wide, narrow = 2 * WIDTH * 80, 64 * WIDTH + WIDTH
    assert found.width == WIDTH
    assert found.num_bytes(half=False) == 4 * (wide + narrow)
    assert found.num_bytes(half=True) == 4 * wide + 2 * narrow


def test_its_identity_is_that_of_all_its_files(tmp_path: Path):
    folder = write_t5_names(tmp_path / "t5")
    first = find_encoder(str(folder)).sha256
    (folder / "README.md").write_text("plays no part")
    assert find_encoder(str(write_t5_names(tmp_path / "copy"))).sha256 == first
    assert find_encoder(str(folder)).sha256 == first
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert find_encoder(str(folder)).sha256 != first


def test_an_encoder_in_parts_is_read_by_its_index(tmp_path: Path):
    folder = write_t5_names(tmp_path / "t5")
    part = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": part}}))
    assert find_encoder(str(folder)).num_parameters == 2 * WIDTH * 80 + 64 * WIDTH + WIDTH
    (folder / part).rename(folder / "model.safetensors")
    with pytest.raises(InputError, match=f"names {part}, wanted files beside it: fetch them too"):
        find_encoder(str(folder))
    index.write_text("[]")
    with pytest.raises(InputError, match=r"index\.json is no index of weights"):
        find_encoder(str(folder))


def test_a_repository_is_fetched_without_what_no_encoder_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = {}

    def snapshot_download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return str(write_t5_names(tmp_path / "snapshot"))

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    assert find_encoder("google/flan-t5-xl").folder == tmp_path / "snapshot"
    assert (asked["repo"], asked["revision"]) == ("google/flan-t5-xl", None)
    find_encoder("hf://google/flan-t5-xl@main")
    assert asked["revision"] == "main"
    assert not any(fnmatch("pytorch_model.bin", wanted) for wanted in asked["allow_patterns"])


def test_the_files_of_an_encoder_are_told_from_others():
    names = ["config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json"]
    others = ["pytorch_model.bin", "generation_config.json", "spiece.model"]
    assert encoder_files([*others, *names]) == tuple(sorted(names))
    for name in names[:3]:
        assert encoder_files({*names} - {name}) == ()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama"}, "holds a model of type 'llama', wanted the encoder of a T5"),
        ({"model_type": None}, "holds a model of type None, wanted the encoder of a T5"),
        ({"num_blocks": 1}, "without the 2 encoder blocks of width 32 that its config.json tells"),
        ({"num_blocks": 0}, "without the 2 encoder blocks of width 32"),
        ({"d_model": 64}, "without the 2 encoder blocks of width 64"),
    ],
)
def test_what_is_no_encoder_is_refused(tmp_path: Path, config: dict, said: str):
    with pytest.raises(InputError, match=said):
        find_encoder(str(write_t5_names(tmp_path / "t5", **config)))


def test_a_folder_without_one_and_damaged_files_are_refused(tmp_path: Path):
    folder = write_t5_names(tmp_path / "t5")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read .*: fetch it again"):
        find_encoder(str(folder))
    weights.unlink()
    with pytest.raises(InputError, match=r"holds config\.json, tokenizer\.json, wanted a text enc"):
        find_encoder(str(folder))
    with pytest.raises(InputError, match="does not exist, wanted a folder: check --text-encoder"):
        find_encoder(str(tmp_path / "none"))


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs transformers, which is not installed: pip install"):
        require_transformers()
