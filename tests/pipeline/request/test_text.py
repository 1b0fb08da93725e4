"""Where the states of prompts come from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from depthvar.errors import InputError
from depthvar.text.encoder_files import DEFAULT_ENCODER
from pipeline.request.text import find_text
from tests.fake_text import text_request
from tests.tiny_t5 import write_t5_names


def test_the_published_encoder_is_the_default_and_another_one_is_found_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_t5_names(tmp_path / "t5")
    asked: list[str] = []
    monkeypatch.setattr(
        "depthvar.text.encoder_files.from_hub", lambda place, _: asked.append(place)
    )
    assert find_text(str(folder), None).sha256
    assert asked == []
    with pytest.raises(InputError, match=f"{DEFAULT_ENCODER} does not exist"):
        find_text(None, None)
    assert asked == [DEFAULT_ENCODER]


def test_without_the_extra_nothing_is_fetched_and_states_from_a_file_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("depthvar.text.encoder_files.from_hub", None)
    with pytest.raises(InputError, match="needs transformers, which is not installed: pip install"):
        find_text(None, None)
    assert find_text(None, str(text_request(tmp_path).text_states)).sha256
