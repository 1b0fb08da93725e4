"""JSON to frozen dataclasses and nothing else: every field once, of its own type."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any, TypeVar

from depthvar.errors import InputError, advice, shown

DataT = TypeVar("DataT")

_JSON_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def read_json(path: Path) -> Any:
    """The value in a JSON file; `InputError` if it is unreadable or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        todo = advice(error, path)
        raise InputError(f"{path} cannot be read ({error.strerror}): {todo}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): write it again") from error


def from_json(kind: type[DataT], value: object, where: str) -> DataT:
    """A dataclass from a parsed JSON object; `where` begins every error.

    Fields may be bool, int, float, str, tuples of these and dataclasses of these. `InputError` for
    unknown, missing and mistyped keys; the dataclass's own checks pass through.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where} is {shown(value)}, wanted an object")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(typing.cast(Any, kind))]
    problems = [f"missing {name}" for name in names if name not in value]
    problems += [f"unknown {shown(key)}" for key in value if key not in names]
    if problems:
        raise InputError(f"{where}: {', '.join(problems)}: wanted the keys {', '.join(names)}")
    return kind(**{name: _typed(hints[name], value[name], f"{where}: {name}") for name in names})


def _typed(hint: Any, value: object, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast("type[Any]", hint), value, where)
    if typing.get_origin(hint) is tuple:
        item, dots = typing.get_args(hint)
        assert dots is Ellipsis, "a field is a scalar, a tuple of any length or a dataclass"
        if not isinstance(value, list):
            raise InputError(f"{where} is {shown(value)}, wanted a list")
        return tuple(_typed(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))
    # bool is an int to Python, and an int is a good float.
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{where} is {shown(value)}, wanted {_JSON_NAMES[hint]}")
    return value
