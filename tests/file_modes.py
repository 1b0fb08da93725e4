"""The permissions of what a job wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Another umask for a while."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def assert_as_the_umask_has_it(folder: Path, mask: int) -> None:
    """Every file below a folder may be read and written by whom the umask lets, and no others."""
    written = list(folder.rglob("*"))
    assert any(path.is_file() for path in written)
    for path in written:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert oct(path.stat().st_mode & 0o777) == oct(wanted), path
