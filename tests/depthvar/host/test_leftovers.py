import pytest

from depthvar.host.leftovers import is_leftover, leftover_kind

LEFTOVERS = (
    ".DS_Store",
    "._cat.png",
    "Thumbs.db",
    "THUMBS.DB",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "Desktop.ini",
    "__MACOSX",
    ".ipynb_checkpoints",
    "lost+found",
    ".git",
    ".svn",
    ".hg",
    "$RECYCLE.BIN",
    "@eaDir",
    "#recycle",
    ".Trash-1000",
    ".nfs000000001",
    "cat.png~",
    ".cat.png.swp",
    ".directory",
    ".thumbnails",
    "__pycache__",
    ".cache",
    ".dvc",
    ".gitkeep",
    ".Spotlight-V100",
    ".fseventsd",
    ".AppleDouble",
    "~$cats.png",
    "#cats#",
    "x.tmp",
    "x.part",
    "x.crdownload",
    "FOUND.000",
    ".tmp-1234-00000.tar.part",
)


@pytest.mark.parametrize("name", [*LEFTOVERS, "Icon\r", "System Volume Information"])
def test_what_systems_and_editors_leave_is_passed_over(name):
    assert is_leftover(name)


@pytest.mark.parametrize(
    "name", ["cat", "0", "cat.png", "a.b", "lost", "tmp", "part", "icon", "git"]
)
def test_other_names_are_data(name):
    assert not is_leftover(name)


def test_leftovers_are_counted_by_name_or_by_kind():
    names = (".DS_Store", "._a", "._b", "Thumbs.db", "a~", ".git", "cat")
    kinds = [leftover_kind(name) for name in names]
    assert kinds == [".DS_Store", "._*", "._*", "Thumbs.db", "*~", ".*", None]
