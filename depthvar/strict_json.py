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

    Fields may be bool, int, float, str, literals, tuples and dataclasses of these. `InputError` for
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
        items = typing.get_args(hint)
        is_any_length = items[-1] is Ellipsis
        if not isinstance(value, list) or not (is_any_length or len(value) == len(items)):
            wanted = "a list" if is_any_length else f"a list of {len(items)}"
            raise InputError(f"{where} is {shown(value)}, wanted {wanted}")
        hints = items[:1] * len(value) if is_any_length else items
        return tuple(
            _typed(item, entry, f"{where}[{i}]")
            for i, (item, entry) in enumerate(zip(hints, value, strict=True))
        )
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            wanted = " or ".join(map(repr, typing.get_args(hint)))
            raise InputError(f"{where} is {shown(value)}, wanted {wanted}")
        return value
    # bool is an int to Python, and an int is a good float.
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{where} is {shown(value)}, wanted {_JSON_NAMES[hint]}")
    return value
