"""The one way in: a YAML file and flags become a validated, frozen configuration.

`load_config` serves every job: flags come from the fields of a pydantic model, a YAML file may set
the same fields, flags win, unknown keys are refused.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import sys
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from depthvar.errors import InputError
from depthvar.paths import checked_job_file
from pipeline.request.marks import HelpGroup, Metavar
from pipeline.request.paths import PATH_ERROR
from pipeline.request.yaml_file import Unquoted, fields_from, parse_yaml, read_yaml

_HELP_ALL = "--help-all"


@dataclass(frozen=True)
class Positional:
    """Marks a field that may be given without its flag."""


@dataclass(frozen=True)
class FileOnly:
    """Marks a field that is too deep for a flag: it comes from the YAML file alone."""


class JobConfig(BaseModel):
    """Base of every job's configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    help_groups: ClassVar[tuple[HelpGroup, ...]] = ()


ConfigT = TypeVar("ConfigT", bound=JobConfig)


def load_config(
    model: type[ConfigT], argv: Sequence[str] | None, *, prog: str, description: str
) -> ConfigT:
    """Read flags and the YAML file they name into `model`; flags win over the file.

    Raises `InputError` with one line per mistake. `--help` prints what most need and exits with
    code 0; `--help-all` prints every flag.
    """
    words = sys.argv[1:] if argv is None else argv
    shows_all = _HELP_ALL in words
    flags = vars(_parser(model, prog, description, shows_all).parse_args(words))
    flags = {key: value for key, value in flags.items() if value is not None}
    yaml_path = flags.pop("config", None)
    from_file = {} if yaml_path is None else _read_config(_config_path(yaml_path), model)
    values = {**from_file, **_parsed_flags(model, flags)}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = _error_lines(error, model, given_as_flags=set(flags), yaml_path=yaml_path)
        raise InputError("\n".join(lines)) from None


def _config_path(text: str) -> Path:
    try:
        return Path(checked_job_file(text))
    except InputError as error:
        raise InputError(f"--config: {error}") from None


class _Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `InputError`s."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if found := re.fullmatch(r"argument (--\S+): expected .*argument", message):
            hint = f" (one that begins with a dash as {found[1]}=-VALUE)"
        raise InputError(f"{message}{hint}: see `{self.prog} --help`")


class _FlagOrPosition(argparse.Action):
    """Stores a value that may come by position or by flag; an absent position stores nothing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if values is None:
            return
        earlier = getattr(namespace, self.dest, None)
        if earlier is not None and earlier != values:
            parser.error(f"{self.dest} is given twice, {earlier!r} and {values!r}")
        setattr(namespace, self.dest, values)


def _parser(
    model: type[JobConfig], prog: str, description: str, shows_all: bool
) -> argparse.ArgumentParser:
    """Build a parser with one kebab-case flag per field; values stay text for pydantic to check."""
    fields = {k: f for k, f in model.model_fields.items() if not _is_marked(f, FileOnly)}
    hidden = set() if shows_all else {name for group in model.help_groups for name in group.more}
    is_short = not shows_all and any(
        name in hidden or "\n" in (field.description or "") for name, field in fields.items()
    )
    parser = _Parser(
        prog=prog,
        usage=_usage(model, prog),
        description=description,
        epilog=f"{prog} {_HELP_ALL} shows every flag in full." if is_short else None,
        allow_abbrev=False,
        add_help=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=28),
    )
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    parser.add_argument(_HELP_ALL, action="help", help=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same keys as below")
    section_of: dict[str, argparse._ArgumentGroup] = {}
    for group in model.help_groups:
        section = parser.add_argument_group(group.heading)
        section_of |= dict.fromkeys((*group.fields, *group.more), section)
    others = [name for name in fields if name not in section_of]
    for name in (*sorted(others, key=lambda name: not fields[name].is_required()), *section_of):
        text = argparse.SUPPRESS if name in hidden else _help(fields[name], is_whole=shows_all)
        _add_field(section_of.get(name, parser), name, fields[name], text)
    return parser


def _is_marked(field: FieldInfo, mark: type) -> bool:
    return any(isinstance(one, mark) for one in field.metadata)


def _usage(model: type[BaseModel], prog: str) -> str:
    """What may come by position and what must be given; all flags stand below it."""
    words = [prog]
    for name, field in model.model_fields.items():
        if _is_marked(field, Positional):
            words.append(name.upper() if field.is_required() else f"[{name.upper()}]")
        elif field.is_required() and not _is_marked(field, FileOnly):
            words.append(f"{_flag(name)} {_metavar(name, field.annotation, field.metadata)}")
    return " ".join([*words, "[flags]"])


def _add_field(parser: argparse._ActionsContainer, name: str, field: FieldInfo, text: str) -> None:
    flag = _flag(name)
    metavar = _metavar(name, field.annotation, field.metadata)
    kind = typing.get_origin(field.annotation) or field.annotation
    if _is_marked(field, Positional):
        parser.add_argument(
            name, nargs="?", action=_FlagOrPosition, metavar=name.upper(), help=text
        )
        parser.add_argument(
            flag, dest=name, action=_FlagOrPosition, metavar="VALUE", help=argparse.SUPPRESS
        )
    elif kind is bool:
        parser.add_argument(
            flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=text
        )
    elif kind is dict:
        parser.add_argument(
            flag, dest=name, nargs="+", action="extend", metavar="KEY=VALUE", help=text
        )
    elif kind in (list, tuple):
        parser.add_argument(flag, dest=name, nargs="+", metavar=metavar, help=text)
    else:
        parser.add_argument(flag, dest=name, metavar=metavar, help=text)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(name: str, wanted: Any, marks: Sequence[object] = ()) -> str:
    """How `--help` calls a value of a type: as its marks say, as its kind, or as the field."""
    for mark in marks:
        if isinstance(mark, Metavar):
            return mark.text
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin is Annotated:
        return _metavar(name, parts[0], parts[1:])
    if parts:  # of a list, or of what may also be None
        return _metavar(name, parts[0])
    return {int: "N", float: "X", Path: "PATH"}.get(wanted, name.upper())


def _help(field: FieldInfo, *, is_whole: bool) -> str:
    """Description and default; what stands below the first line is for `--help-all`.

    A field without a fixed default says its own; that a flag is off, or none, needs no word.
    """
    text, _, more = (field.description or "").replace("%", "%%").partition("\n")
    default = field.get_default(call_default_factory=True)
    if field.is_required():
        text += " (required)"
    elif "(default:" not in text and default is not None and default is not False:
        text += f" (default: {'yes' if default is True else default})"
    return f"{text}; {more}" if more and is_whole else text


def _parsed_flags(model: type[BaseModel], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the `key=value` words of dictionary flags into dictionaries."""
    parsed = dict(flags)
    for name, words in flags.items():
        if typing.get_origin(model.model_fields[name].annotation) is dict:
            pairs = [_key_value(_flag(name), word) for word in words]
            repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
            if repeated:
                raise InputError(f"{_flag(name)}: got {repeated[0]} twice: keep one of them")
            parsed |= fields_from({name: dict(pairs)}, model)
    return parsed


def _key_value(flag: str, word: str) -> tuple[str, object]:
    key, equals, value = word.partition("=")
    if not key or not equals:
        raise InputError(f"{flag}: got {word!r}, wanted key=value: e.g. {flag} rotation=false")
    try:
        parsed = parse_yaml(value, word)
    except InputError:
        return key, value
    return key, Unquoted.at(f"{flag} {key}", parsed) if isinstance(parsed, Unquoted) else parsed


def _read_config(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """The values of a YAML file; `InputError` if it is no mapping of known keys."""
    content = read_yaml(path, "--config")
    if content is None:
        return {}
    if not isinstance(content, dict):
        got = "a list" if isinstance(content, list) else "text"
        raise InputError(f"{path} holds {got}, wanted lines `key: value`")
    unknown = [key for key in content if key not in model.model_fields]
    if unknown:
        raise InputError("\n".join(_unknown_key(key, model, path) for key in unknown))
    return fields_from(content, model)


def _unknown_key(key: str, model: type[BaseModel], path: Path) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), model.model_fields, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(model.model_fields)}"
    return f"unknown key {key!r} in {path}: {hint}"


def _error_lines(
    error: ValidationError,
    model: type[BaseModel],
    *,
    given_as_flags: Iterable[str],
    yaml_path: str | None,
) -> list[str]:
    """One line per field in error; several types tried for one field give one line."""
    lines: dict[str, str] = {}
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        where = f"{name} in {yaml_path}" if name not in given_as_flags else _flag(name)
        lines.setdefault(name, _error_line(item, name, where, model))
    return list(lines.values())


def _error_line(item: Mapping[str, Any], name: str, where: str, model: type[BaseModel]) -> str:
    if item["type"] == PATH_ERROR:
        return f"{where}: {item['msg']}"
    wanted = str(item["msg"]).removeprefix("Value error, ")
    if not name:
        return wanted
    if item["type"] == "missing":
        return f"{_flag(name)} is missing, wanted a value: give {_flag(name)} or set {name} in YAML"
    wanted = wanted.removeprefix("Input should be ")
    field = model.model_fields[name]
    todo = "change it"
    if not field.is_required():
        default = field.get_default(call_default_factory=True)
        todo += " or leave it out" + ("" if default is None else f" for {default!r}")
    return f"{where}: got {item['input']!r}, wanted {wanted}: {todo}"
