"""What the type of a configuration's field can be marked with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metavar:
    """How `--help` calls the value of a field, where its type does not say it."""

    text: str
