"""What `--help` is told of a configuration's fields, beside their types."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metavar:
    """How `--help` calls the value of a field, where its type does not say it."""

    text: str


@dataclass(frozen=True)
class HelpGroup:
    """Fields that `--help` shows under a heading; `--help-all` shows those of `more` there too."""

    heading: str
    fields: tuple[str, ...]
    more: tuple[str, ...] = ()
