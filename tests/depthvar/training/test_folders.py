"""Folders of the user's own pictures: which files become images of which class."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from depthvar.errors import InputError
from depthvar.training.data import ImageSet
from depthvar.training.folders import PictureFolder, ReadingReport
from depthvar.training.pictures import Background


def picture(path: Path, value: int | tuple[int, ...] = 100, *, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    value = (value,) * 3 if isinstance(value, int) else value
    Image.new(mode, (6, 4), value).save(path)


def read(folder: Path, **options) -> tuple[ImageSet, ReadingReport]:
    pictures = PictureFolder.open(folder, flag="--data")
    return pictures.read(**{"side": 4, "channels": 3, **options})


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two pictures each of an ant and a dog."""
    folder = tmp_path / "pets"
    for name, value in (("dog", 200), ("ant", 10)):
        picture(folder / name / "a.png", value)
        picture(folder / name / "b.png", value)
    return folder


def test_folders_become_classes_and_pictures_labelled_squares(tmp_path):
    stripes = np.zeros((20, 30, 3), dtype=np.uint8)
    stripes[:, 5:25] = 200
    picture(tmp_path / "ant" / "a.png", 10)
    (tmp_path / "dog").mkdir()
    Image.fromarray(stripes).save(tmp_path / "dog" / "wide.png")
    images, report = read(tmp_path, side=16)
    assert images.class_names == ("ant", "dog")
    assert images.images_NCHW.shape == (2, 3, 16, 16)
    assert images.images_NCHW.dtype == torch.uint8
    assert images.images_NCHW[0].unique().tolist() == [10]
    assert images.images_NCHW[1].unique().tolist() == [200], "only the middle square is kept"
    assert images.labels_N.tolist() == [0, 1]
    assert report.text() == "read 2 pictures of 2 classes"


def test_a_grey_set_has_the_luma_of_its_pictures(tmp_path):
    picture(tmp_path / "c" / "a.png", (255, 0, 0))
    picture(tmp_path / "c" / "b.png", (0, 0, 0, 0), mode="RGBA")
    images, _ = read(tmp_path, channels=1, background=Background.of("lime"))
    assert images.images_NCHW.shape == (2, 1, 4, 4)
    red, lime = (image.unique().tolist() for image in images.images_NCHW)
    assert red == [round(0.299 * 255)]
    assert lime == [round(0.587 * 255)]


FOLDERS = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", ".git", "$RECYCLE.BIN")
FILES = (".DS_Store", "._a.png", "Thumbs.db", "desktop.ini", "a.png~", ".nfs01", "Icon\r")


def test_what_systems_and_editors_leave_is_passed_over_and_counted(pets):
    wanted, _ = read(pets)
    for name in FOLDERS:
        picture(pets / name / "a.png")
        picture(pets / "dog" / name / "a.png")
    for name in FILES:
        for folder in (pets, pets / "ant"):
            (folder / name).write_bytes(b"junk")
    (pets / ".hidden.png").symlink_to("nowhere")
    images, report = read(pets)
    assert images.class_names == ("ant", "dog")
    assert torch.equal(images.images_NCHW, wanted.images_NCHW)
    assert torch.equal(images.labels_N, wanted.labels_N)
    counts = {"__MACOSX": 2, "@eaDir": 2, "lost+found": 2, "$RECYCLE.BIN": 2, ".*": 7}
    counts |= {".DS_Store": 2, "._*": 2, "Thumbs.db": 2, "desktop.ini": 2, "*~": 2, "Icon": 2}
    assert report.passed_over == counts
    assert "2 Thumbs.db" in report.text()


def test_what_people_keep_beside_pictures_is_passed_over_and_counted(pets):
    for name in ("README.txt", "labels.csv", "a.json", "b.JSON"):
        (pets / "dog" / name).write_text("words")
    picture(pets / "preview.png")
    (pets / "LICENSE").write_text("words")
    images, report = read(pets)
    assert len(images) == 4
    assert report.passed_over == {
        "*.txt": 1,
        "*.csv": 1,
        "*.json": 2,
        "beside the class folders": 2,
    }


def test_conversions_are_counted_by_kind(pets):
    picture(pets / "ant" / "c.png", (0, 0, 0, 0), mode="RGBA")
    picture(pets / "dog" / "c.png", (0, 0, 0, 99), mode="RGBA")
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(pets / "dog" / "d.png")
    images, report = read(pets, background=Background.of("#102030"))
    assert report.text() == (
        "read 7 pictures of 2 classes: 2 with transparency laid over #102030, 1 of more than 8 "
        "bits scaled to 8"
    )
    assert images.images_NCHW[2, :, 0, 0].tolist() == [16, 32, 48]
    assert images.images_NCHW[6].unique().tolist() == [128]
    assert report.facts()["converted"]["of more than 8 bits scaled to 8"] == 1


def spoil(pets: Path) -> list[str]:
    """Files that cannot be read, by name, in order."""
    (pets / "ant" / "empty.png").touch()
    (pets / "ant" / "gone.png").symlink_to("nowhere.png")
    (pets / "dog" / "cut.png").write_bytes((pets / "dog" / "a.png").read_bytes()[:50])
    os.mkfifo(pets / "dog" / "pipe")
    (pets / "dog" / "words.jpg").write_text("words")
    return ["ant/empty.png", "ant/gone.png", "dog/cut.png", "dog/pipe", "dog/words.jpg"]


def test_all_bad_files_are_listed_at_once(pets):
    bad = spoil(pets)
    with pytest.raises(InputError) as caught:
        read(pets)
    lines = str(caught.value).splitlines()
    for line, name in zip(lines, bad, strict=True):
        assert line.startswith(f"{pets / name} is no readable picture: ")
    assert lines[-1].endswith(": remove or repair, or give --skip-unreadable")


def test_one_bad_file_is_one_line_even_with_a_newline_in_its_name(pets):
    (pets / "dog" / "a\nb.png").touch()
    with pytest.raises(InputError) as caught:
        read(pets)
    (line,) = str(caught.value).splitlines()
    assert r"dog/a\nb.png' is no readable picture: the file is empty, 0 bytes: remove" in line


def test_of_many_bad_files_the_first_are_listed_and_all_counted(pets):
    for i in range(25):
        (pets / "dog" / f"bad{i:02}.png").touch()
    with pytest.raises(InputError) as caught:
        read(pets)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert "bad09.png" in lines[9]
    assert lines[10].startswith("and 15 more: remove or repair")


def test_unreadable_files_are_skipped_when_asked_and_listed(pets):
    wanted, _ = read(pets)
    bad = spoil(pets)
    images, report = read(pets, skip_unreadable=True)
    assert torch.equal(images.images_NCHW, wanted.images_NCHW)
    assert torch.equal(images.labels_N, wanted.labels_N)
    assert [line.partition(" is no")[0] for line in report.unreadable] == [
        str(pets / name) for name in bad
    ]
    assert "skipped 5 unreadable:" in report.text()
    assert len(report.facts()["unreadable"]) == 5


def test_classes_without_pictures_are_refused_by_name(pets):
    (pets / "bee").mkdir()
    (pets / "cow").mkdir()
    (pets / "cow" / ".DS_Store").touch()
    (pets / "cow" / "labels.csv").touch()
    with pytest.raises(InputError) as caught:
        read(pets)
    assert [line.partition(" holds")[0] for line in str(caught.value).splitlines()] == [
        f"the class folder {pets / name}" for name in ("bee", "cow")
    ]


def test_a_class_whose_pictures_are_all_skipped_is_refused_by_name(pets):
    (pets / "bee").mkdir()
    (pets / "bee" / "a.png").touch()
    with pytest.raises(InputError, match=r"pets/bee holds no readable picture"):
        read(pets, skip_unreadable=True)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (("train", "val"), "train"),
        (("a_test", "Training"), "Training"),
        (("images",), "images"),
        (("val", "x"), "val"),
        (("data/val", "data/train"), "data/train"),
        (("deep/down/train",), "deep/down/train"),
    ],
)
def test_nested_folders_are_named_for_what_they_are(made, wanted, tmp_path):
    for inner in made:
        picture(tmp_path / inner / "cat" / "a.png")
        picture(tmp_path / inner / "dog" / "a.png")
    (tmp_path / "annotations" / "notes").mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    (line,) = str(caught.value).splitlines()
    assert line.endswith(f"wanted --data {tmp_path / wanted}")
    assert len(read(tmp_path / wanted)[0]) == 2


def test_a_folder_inside_a_class_is_refused(pets):
    picture(pets / "dog" / "puppies" / "a.png")
    with pytest.raises(InputError, match=r"dog/puppies is a folder inside a class \(1 in all\)"):
        read(pets)
    (pets / "ant" / "loop").symlink_to(pets)
    with pytest.raises(InputError, match=r"ant/loop is a folder inside a class \(2 in all\)"):
        read(pets)


def test_class_folders_may_be_links(pets, tmp_path):
    (tmp_path / "links").mkdir()
    for name in ("ant", "dog"):
        (tmp_path / "links" / name).symlink_to(pets / name)
    assert torch.equal(read(tmp_path / "links")[0].images_NCHW, read(pets)[0].images_NCHW)


def test_what_is_no_folder_of_classes_is_refused(tmp_path):
    file, bare, dataset, loose = (tmp_path / name for name in ("file", "bare", "set", "loose"))
    file.touch()
    bare.mkdir()
    (bare / "lost+found").mkdir()
    dataset.mkdir()
    (dataset / "plan.json").touch()
    picture(loose / "a.png")
    for folder, reason in (
        (tmp_path / "absent", r"absent does not exist, wanted .*/<class name>/<picture files>"),
        (file, "is no folder"),
        (bare, "has no class folders"),
        (dataset, "is a dataset of this project.*depthvar export"),
        (loose, r"holds files \(.*a\.png first\) and no class folders"),
    ):
        with pytest.raises(InputError, match=reason):
            read(folder)


def test_a_class_behind_a_broken_link_is_not_lost_in_silence(pets):
    (pets / "cat").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"pets/cat cannot be read .* it may be a class"):
        read(pets, skip_unreadable=True)


def test_a_folder_that_cannot_be_listed_is_named(pets, monkeypatch):
    iterdir = Path.iterdir

    def refuse(path: Path):
        if path.name == "dog":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"cannot be listed \(Permission denied\): change"):
        read(pets)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"caf\xe9", r"is named b'caf\\xe9', which is no UTF-8: rename it"),
        (b"a\nb", r"is named 'a\\nb', with a control character"),
        (b"a\x1b[31m", "with a control character"),
        ("a\u2028b".encode(), "with a control character"),
    ],
)
def test_names_that_cannot_be_written_down_are_refused_in_one_line(name, reason, pets):
    (pets / os.fsdecode(name)).mkdir()
    with pytest.raises(InputError, match=reason) as caught:
        read(pets)
    assert len(str(caught.value).splitlines()) == 1
    str(caught.value).encode()


def test_two_folders_of_one_name_in_two_unicode_forms_are_refused(pets):
    for form in ("NFC", "NFD"):
        picture(pets / unicodedata.normalize(form, "café") / "a.png")
    with pytest.raises(InputError, match="two class folders 'café' that differ in their Unicode"):
        read(pets)
