"""When two names are the same: however an editor, a shell or a disk has written their letters."""

from __future__ import annotations

import unicodedata


def comparable(name: str) -> str:
    """The form in which names are compared: composed letters (Unicode NFC).

    macOS decomposes the letters of a file name: `é` becomes `e` and an accent of its own.
    """
    return unicodedata.normalize("NFC", name)


def comparable_in_any_case(name: str) -> str:
    """The form in which names are compared where case does not count.

    Canonical caseless matching, Unicode Standard 3.13, D145.
    """
    folded = unicodedata.normalize("NFD", name).casefold()
    return unicodedata.normalize("NFD", folded)
