from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthvar.host.leftovers import is_leftover
from depthvar.host.names import comparable_in_any_case
from depthvar.imagenet import CLASS_NAMES
from depthvar.training.class_folders import class_names_of, folder_names

ODD = {
    "AC/DC": "AC%2FDC",
    "nul\0": "nul%00",
    "a\nb\x7f": "a%0Ab%7F",
    ".": "%2E",
    "..": "%2E%2E",
    "../up": "%2E.%2Fup",
    ".hidden": "%2Ehidden",
    " a": "%20a",
    "a ": "a%20",
    "a.": "a%2E",
    'a\\b:c*d?e"f<g>h|i': "a%5Cb%3Ac%2Ad%3Fe%22f%3Cg%3Eh%7Ci",
    "CON": "%43ON",
    "nul.txt": "%6Eul.txt",
    "Thumbs.db": "%54humbs.db",
    "__MACOSX": "%5F_MACOSX",
    "lost+found": "%6Cost+found",
    "a~": "%61%7E",
    "100%": "100%",
    "50% off": "50% off",
    "50%20off": "50%2520off",
    "a%~3": "a%25~3",
}
PLAIN = (
    "tench",
    "one, or uno",
    "-neg",
    "01",
    "café",
    "cafe\u0301",
    "日本",
    "a.b",
    "a%zz",
    "console",
)


def test_names_that_any_folder_can_have_stay():
    assert folder_names(CLASS_NAMES) == CLASS_NAMES
    for name in PLAIN:
        assert folder_names([name]) == (name,)
        assert class_names_of([name]) == (name,)


@pytest.mark.parametrize("name", ODD)
def test_other_names_are_escaped_and_read_back(name: str):
    assert folder_names([name]) == (ODD[name],)
    assert class_names_of([ODD[name]]) == (name,)


@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" .%~/2Ff3")), max_size=20))
def test_every_name_is_read_back_from_a_folder_that_can_be_made(name: str):
    (folder,) = folder_names([name])
    assert class_names_of([folder]) == (name,)
    assert not is_leftover(folder)
    assert folder.strip(" ") == folder.rstrip(".") == folder != ""
    assert not set(folder) & set('\0\n/\\:*?"<>|')


@given(st.lists(st.sampled_from(["", "a", "A", "ß", "SS", "é", "e\u0301", "a%~1", ".", "x" * 300])))
def test_no_two_classes_share_a_folder_on_any_system(names: list[str]):
    folders = folder_names(names)
    assert len({comparable_in_any_case(folder) for folder in folders}) == len(names)
    assert all(len(folder.encode()) <= 255 for folder in folders)


def test_names_that_some_systems_take_for_one_end_in_the_id():
    names = ("cat", "Cat", "dog", "caf\u00e9", "cafe\u0301")
    folders = folder_names(names)
    assert folders == ("cat", "Cat%~1", "dog", "caf\u00e9", "cafe\u0301%~4")
    assert class_names_of(folders[:3]) == names[:3]
    assert class_names_of(folder_names(["crane", "crane"])) == ("crane", "crane%~1")
    assert class_names_of(folder_names(["", "a"])) == ("", "a")


def test_a_name_that_is_too_long_is_cut_between_letters():
    (folder,) = folder_names(["é/" * 100])
    assert folder.endswith("%~0")
    assert len(folder.encode()) <= 240
    assert folder.removesuffix("%~0") == ("é%2F" * 100)[: len(folder) - 3]
    assert class_names_of([folder])[0].startswith("é/é/")


@pytest.mark.parametrize("folder", ["50%20off", "a%2fb", "%41", "%", "%~", "a%~b", "x%2F."])
def test_a_folder_that_no_class_would_have_keeps_its_own_name(folder: str):
    assert class_names_of([folder]) == (folder,)
