"""YAML as people mean it: text is what stands in the file, and nothing is said twice.

YAML 1.1 takes `no` for false, `010` for 8 and `1:30` for 90, and of two equal keys the last one.
Here every scalar stays text until `as_field` reads it for a field of some type.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel

from depthvar.errors import InputError
from pipeline.request.text_file import read_text

_TAG = "tag:yaml.org,2002:"
_UNQUOTED = "unquoted"
_LEFT_TO_FIELD = (_UNQUOTED, *(f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float")))
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {
    form: value
    for value, words in ((True, ("true", "yes", "on")), (False, ("false", "no", "off")))
    for word in words
    for form in (word, word.capitalize(), word.upper())
}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*|0b_*[01][01_]*|0x_*[0-9a-fA-F][0-9a-fA-F_]*)")
_FRACTION = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_NOT_FINITE = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_MAX_DIGITS = 100
_MAX_VALUES = 100_000  # of a few lines aliases make any number


class Unquoted(str):
    """A scalar without quotes, and where it stands: text, a number, a truth value or null."""

    __slots__ = ("where",)
    where: str

    @classmethod
    def at(cls, where: str, text: str) -> Unquoted:
        """The text of a scalar that stands at a place."""
        scalar = cls(text)
        scalar.where = where
        return scalar


@dataclass(frozen=True)
class FieldsOf:
    """Marks a dictionary whose keys are fields of a dataclass: its values are read as of these."""

    kind: type


def read_yaml(path: Path, what: str) -> object:
    """The content of a YAML file, None for an empty one; `what` it is begins some errors.

    Mappings have text for keys; scalars are text, `Unquoted` where they stand without quotes.
    Errors: `InputError` for what cannot be read or is no YAML, several documents, repeated keys,
    keys that are no text, tags, aliases that hold themselves, and more values than any job has,
    aliases written out: with file and line.
    """
    return parse_yaml(read_text(path, what), str(path))


def parse_yaml(text: str, name: str) -> object:
    """As `read_yaml`, of text that errors call by a name."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _value(node, name, (), iter(range(_MAX_VALUES)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        hint = ": indent with spaces" if "'\\t'" in problem else ""
        where = name if mark is None else f"{name}, line {mark.line + 1}"
        raise InputError(f"{where}: no valid YAML: {' '.join(problem.split())}{hint}") from None
    except yaml.reader.ReaderError as error:
        line = len(re.findall("\r\n|\r|\n", text[: error.position])) + 1
        raise InputError(
            f"{name}, line {line}: no valid YAML: the character {chr(error.character)!r}"
        ) from None
    except (ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: no valid YAML: {error}") from None


class _Loader(yaml.BaseLoader):
    """Makes nodes, and remembers of a scalar whether it stands without quotes."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _UNQUOTED if implicit[0] else f"{_TAG}str"
        return f"{_TAG}map" if kind is yaml.MappingNode else f"{_TAG}seq"


def _value(
    node: yaml.Node, name: str, within: tuple[yaml.Node, ...], allowance: Iterator[int]
) -> Any:
    """What a node holds; `within` are the nodes around it, `allowance` gives one for each value."""
    if next(allowance, None) is None:
        raise InputError(
            f"{_place(node, name)}: the file holds more than {_MAX_VALUES:,} values, those of "
            "aliases counted wherever they stand: write it without them"
        )
    if any(node is outer for outer in within):
        raise InputError(f"{_place(node, name)}: an alias stands within what it is an alias of")
    within = (*within, node)
    if isinstance(node, yaml.ScalarNode) and node.tag in _LEFT_TO_FIELD:
        return Unquoted.at(_place(node, name), node.value)
    if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}str":
        return str(node.value)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_value(item, name, within, allowance) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        return _mapping(node, name, within, allowance)
    raise InputError(f"{_place(node, name)}: got the tag {node.tag!r}, wanted none: leave it out")


def _mapping(
    node: yaml.MappingNode, name: str, within: tuple[yaml.Node, ...], allowance: Iterator[int]
) -> dict[str, Any]:
    """Keys and values; those that `<<` merges come first and are overridden."""
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = _value(key_node, name, within, allowance)
        if not isinstance(key, str) or key == "":
            raise InputError(f"{_place(key_node, name)}: a key is no text, wanted `key: value`")
        line = key_node.start_mark.line + 1
        if key in lines:
            raise InputError(
                f"{_place(key_node, name)}: the key {str(key)!r} stands in line {lines[key]} too: "
                "keep one of them"
            )
        lines[key] = line
        value = _value(value_node, name, within, allowance)
        if key == "<<" and isinstance(key, Unquoted):
            merged = _merged(value, _place(key_node, name))
        else:
            own[str(key)] = value
    return {**merged, **own}


def _merged(value: object, where: str) -> dict[str, Any]:
    sources = value if isinstance(value, list) else [value]
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        if not isinstance(source, dict):
            raise InputError(f"{where}: `<<` merges something else than keys with values")
        merged.update(source)
    return merged


def _place(node: yaml.Node, name: str) -> str:
    return f"{name}, line {node.start_mark.line + 1}"


def as_field(value: object, wanted: Any, marks: Sequence[object] = ()) -> Any:
    """A value of `read_yaml` as pydantic takes it for a field of the type `wanted`.

    Text that has no quotes stays as it stands where the field takes text, but for null where it
    takes that too; else it is a number, a truth value or null, as in YAML 1.1. Errors: `InputError`
    for a number with a zero in front, which YAML readers disagree on.
    """
    if typing.get_origin(wanted) is Annotated:
        inner, *more = typing.get_args(wanted)
        return as_field(value, inner, (*marks, *more))
    choices = _choices(wanted)
    if isinstance(value, Unquoted):
        return _scalar(value, choices)
    if isinstance(value, list):
        items = [typing.get_args(kind)[0] for kind in choices if typing.get_origin(kind) is list]
        return [as_field(item, items[0] if items else wanted) for item in value]
    if isinstance(value, dict):
        return {key: as_field(item, *_of_key(key, choices, marks)) for key, item in value.items()}
    return value


def _choices(wanted: Any) -> list[Any]:
    """The types of a union, or the one type."""
    if typing.get_origin(wanted) is Annotated:
        return _choices(typing.get_args(wanted)[0])
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return [choice for part in typing.get_args(wanted) for choice in _choices(part)]
    return [wanted]


def _of_key(key: str, choices: Sequence[Any], marks: Sequence[object]) -> tuple[Any, list[object]]:
    """Type and marks of a value of a mapping."""
    fields = [typing.get_type_hints(mark.kind) for mark in marks if isinstance(mark, FieldsOf)]
    if fields and key in fields[0]:
        return fields[0][key], []
    for kind in choices:
        if typing.get_origin(kind) is dict:
            return typing.get_args(kind)[1], []
        if isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields:
            field = kind.model_fields[key]
            return field.annotation, field.metadata
    return str, []


def _scalar(text: Unquoted, choices: Sequence[Any]) -> bool | int | float | str | None:
    if text == "" or (text in _NULLS and types.NoneType in choices):
        return None
    if any(map(_takes_text, choices)):
        return str(text)
    return _number_or_word(text)


def _takes_text(kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(kind))
    return isinstance(kind, type) and issubclass(kind, str | Path)


def _number_or_word(text: Unquoted) -> bool | int | float | str | None:
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if text.lower() in _NOT_FINITE:
        return _NOT_FINITE[text.lower()]
    if len(text) > _MAX_DIGITS:
        return str(text)
    if _WHOLE.fullmatch(text):
        return int(text.replace("_", ""), 0)
    if re.fullmatch(r"[-+]?0[0-9_]+", text):
        raise InputError(
            f"{text.where}: got {text}, wanted a number without a zero in front, which is "
            "octal to some readers of YAML: correct it"
        )
    if _FRACTION.fullmatch(text):
        return float(text.replace("_", ""))
    return str(text)


def fields_from(content: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """The values of a mapping as the fields of a model take them."""
    return {key: as_field(value, *_of_key(key, [model], ())) for key, value in content.items()}
