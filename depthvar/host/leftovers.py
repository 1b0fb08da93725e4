"""Names of what systems and editors leave in folders: nobody's data."""

from __future__ import annotations

from fnmatch import fnmatchcase

_PATTERNS = (
    ".ds_store",
    "._*",
    ".*",
    "thumbs.db",
    "ehthumbs*.db",
    "desktop.ini",
    "icon\r",
    "__macosx",
    "network trash folder",
    "temporary items",
    "$recycle.bin",
    "system volume information",
    "found.[0-9][0-9][0-9]",
    "lost+found",
    "@eadir",
    "@recycle",
    "@__thumb",
    "#recycle",
    "#snapshot",
    "~snapshot",
    "__pycache__",
    "*~",
    "~$*",
    "#*#",
    "*.swp",
    "*.swo",
    "*.tmp",
    "*.part",
    "*.crdownload",
)
"""In lower case, the special before the general. `.*` is all that is hidden."""


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is passed over wherever a folder is read."""
    return leftover_kind(name) is not None


def leftover_kind(name: str) -> str | None:
    """What to count a leftover under: its name, or `.*`, `*~` and the like; None for data."""
    lowered = name.lower()
    for pattern in _PATTERNS:
        if fnmatchcase(lowered, pattern):
            return pattern if "*" in pattern else name.strip()
    return None
