"""Class names as names of folders, wherever the folder is copied to, and back.

What no folder can be called, or would be passed over for, is written as in URLs: `AC/DC` becomes
`AC%2FDC`. Of names that some file systems take for one (`Cat` and `cat`) the later ones, and names
that are too long, end in `%~` and the class id.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from urllib.parse import unquote

from depthvar.host.leftovers import is_leftover
from depthvar.host.names import comparable, comparable_in_any_case

_MAX_BYTES = 240  # file systems take 255
# Separators and what Windows forbids; a percent sign only where it would be read as an escape.
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]|%(?=[0-9A-Fa-f]{2}|~)')
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?", re.I | re.S)
_MARK = re.compile(r"%~[0-9]+$")


def folder_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """A folder for each class, by class id: no two are equal on any file system."""
    taken: set[str] = set()
    folders = []
    for class_id, name in enumerate(class_names):
        pieces = _pieces(name)
        folder = "".join(pieces)
        key = comparable_in_any_case(folder)
        if not folder or key in taken or len(folder.encode()) > _MAX_BYTES:
            folder = _marked(pieces, class_id)
        taken.add(key)
        folders.append(folder)
    return tuple(folders)


def class_names_of(folders: Sequence[str]) -> tuple[str, ...]:
    """The class of each folder: its name, unless `folder_names` would write another just so.

    Of a name that was too long only the start is left; folders of one class name keep their own.
    """
    names = [_class_name(folder) for folder in folders]
    uses = Counter(map(comparable, names))
    return tuple(
        name if uses[comparable(name)] == 1 else folder
        for name, folder in zip(names, folders, strict=True)
    )


def _class_name(folder: str) -> str:
    plain = _MARK.sub("", folder)
    name = unquote(plain)
    return name if "".join(_pieces(name)) == plain else folder


def _pieces(name: str) -> list[str]:
    """The characters of a name, escaped where they have to be."""
    pieces = [_escaped(c) if _FORBIDDEN.match(name, i) else c for i, c in enumerate(name)]
    if name and (name[0] in " ." or _DEVICE.fullmatch(name) or is_leftover(name)):
        pieces[0] = _escaped(name[0])
    if name and (name[-1] in " ." or is_leftover("".join(pieces))):
        pieces[-1] = _escaped(name[-1])
    return pieces


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())


def _marked(pieces: Sequence[str], class_id: int) -> str:
    """As much of a name as there is room for, and the class id."""
    mark = f"%~{class_id}"
    kept, room = "", _MAX_BYTES - len(mark)
    for piece in pieces:
        room -= len(piece.encode())
        if room < 0:
            break
        kept += piece
    return kept + mark
