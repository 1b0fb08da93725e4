"""The one error type for what a user can cause."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot work: the message says what was got, what was wanted and what to do."""
