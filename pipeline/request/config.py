"""The one way in: a YAML file and flags become a validated, frozen configuration.

`load_config` serves every job: flags come from the fields of a pydantic model, a YAML file may set
the same fields, flags win, unknown keys are refused.
"""

from __future__ import annotations

import argparse
import difflib
import re
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from depthvar.errors import InputError
from depthvar.paths import checked_job_file
from depthvar.policy import DEFAULT_PRESET, DepthPolicy
from pipeline.request.marks import Metavar
from pipeline.request.paths import PATH_ERROR, LocalPath, Location, ModelName, Weights
from pipeline.request.yaml_file import FieldsOf, Unquoted, fields_from, parse_yaml, read_yaml

Device = Literal["auto", "cpu", "cuda"]
ImageFormat = Literal["png", "jpg", "webp"]
Precision = Literal["float32", "bfloat16", "float16"]
Scalar = bool | int | float | str | None
PolicyOptions = Annotated[dict[str, Scalar], FieldsOf(DepthPolicy)]


@dataclass(frozen=True)
class Positional:
    """Marks a field that may be given without its flag."""


@dataclass(frozen=True)
class FileOnly:
    """Marks a field that is too deep for a flag: it comes from the YAML file alone."""


class JobConfig(BaseModel):
    """Base of every job's configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class GenerateConfig(JobConfig):
    """What `depthvar generate` and `depthvar plan` can be told."""

    out: Location = Field(description="output folder or URI (s3://, gs://, abfs://)")
    model: ModelName = Field("digits", description="model to sample from, by name, folder or file")
    weights: Weights | None = Field(
        None,
        description="weights as a folder, file, URI or Hugging Face repository"
        " (default: those that come with the model, or the public ones)",
    )
    classes: str = Field(
        "all",
        description="classes by id, range of ids, name or WordNet id: all, 3, 0-9, 1,4,7-9, seven;"
        " id:3 and name:3 where 3 is the id of one and the name of another",
    )
    per_class: int = Field(100, gt=0, description="samples of each class")
    labels_file: Annotated[LocalPath, Metavar("FILE")] | None = Field(
        None,
        description="file of lines `class[,count]` in place of --classes and --per-class"
        " (default: none)",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="job seed: with its index it fixes a sample")
    policy: str = Field(DEFAULT_PRESET, description="depth policy by preset name")
    reference_scale: int | None = Field(
        None,
        description="last scale at full depth, from 0: the budget (default: the policy's own)",
    )
    policy_options: PolicyOptions = Field(
        default_factory=dict,
        description="fields of the policy to change, as key=value (default: none)",
    )
    cfg: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="guidance strength, 0 for none (default: the model's own)",
    )
    top_k: int | None = Field(
        None, ge=0, description="codes kept before top-p, 0 for all (default: the model's own)"
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="probability mass kept, in (0, 1] (default: the model's own)"
    )
    precision: Precision = Field("float32", description="number type of the model")
    samples_per_shard: int = Field(1000, gt=0, description="images of one tar file")
    batch_size: int = Field(50, gt=0, description="images sampled at once")
    image_format: ImageFormat = Field("png", description="image encoding")
    workers: int | None = Field(
        None,
        ge=0,
        description="workers, 0 for this process without Ray (default: one per GPU, else per core)",
    )
    threads_per_worker: int = Field(
        1, gt=0, description="CPU threads of one worker; another number may change the last bit"
    )
    device: Device = Field("auto", description="where the model runs")
    address: str | None = Field(
        None,
        description="Ray cluster to join from one of its nodes, HOST:6379 or auto, or `local`"
        " (default: $RAY_ADDRESS, else Ray on this machine)",
    )
    scratch: LocalPath | None = Field(
        None, description="folder where shards are built (default: the system's temporary folder)"
    )
    max_attempts: int = Field(3, gt=0, description="failures after which a shard is set aside")
    retry_failed: bool = Field(
        False, description="try the shards again that an earlier run set aside"
    )
    extend: bool = Field(
        False, description="add samples to a dataset that is planned with fewer: it can only grow"
    )
    contact_sheet: int = Field(
        10, ge=0, description="images per class on the contact sheet, 0 for no sheet"
    )

    @field_validator("classes", mode="before")
    @classmethod
    def _classes_from_yaml(cls, value: object) -> object:
        """Accept `classes: 3` and `classes: [1, seven]` from YAML."""
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, list) and all(type(item) in (str, int) for item in value):
            from pipeline.request.labels import quoted  # brings NumPy: flags need not wait for it

            return ",".join(quoted(str(item)) for item in value)
        return value

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> GenerateConfig:
        """A labels file already says classes and counts."""
        doubled = sorted({"classes", "per_class"} & self.model_fields_set)
        if self.labels_file is not None and doubled:
            raise ValueError(
                f"labels_file was given together with {' and '.join(doubled)}, wanted one source"
                " of labels: drop one of them"
            )
        return self


class VerifyConfig(JobConfig):
    """What `depthvar verify` can be told."""

    out: Annotated[Location, Positional()] = Field(description="dataset to check")
    deep: bool = Field(
        False, description="also hash every file, read every tar and compare it with its Parquet"
    )
    repair: bool = Field(
        False, description="unmark the shards found bad, so that generate makes them again"
    )
    regenerate: int = Field(
        0, ge=0, description="images to sample again and to compare pixel for pixel, 0 for none"
    )
    weights: Weights | None = Field(
        None, description="weights file or folder for --regenerate (default: the model's own)"
    )
    device: Device = Field("auto", description="where --regenerate runs")


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(
    model: type[ConfigT], argv: Sequence[str] | None, *, prog: str, description: str
) -> ConfigT:
    """Read flags and the YAML file they name into `model`; flags win over the file.

    Raises `InputError` with one line per mistake. `--help` prints and exits with code 0.
    """
    flags = vars(_parser(model, prog, description).parse_args(argv))
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


def _parser(model: type[BaseModel], prog: str, description: str) -> argparse.ArgumentParser:
    """Build a parser with one kebab-case flag per field; values stay text for pydantic to check."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same keys as below")
    for name, field in model.model_fields.items():
        if not any(isinstance(mark, FileOnly) for mark in field.metadata):
            _add_field(parser, name, field)
    return parser


def _add_field(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    flag = _flag(name)
    metavar = _metavar(name, field.annotation, field.metadata)
    text = _help(field).replace("%", "%%")
    kind = typing.get_origin(field.annotation) or field.annotation
    if any(isinstance(mark, Positional) for mark in field.metadata):
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


def _help(field: FieldInfo) -> str:
    """Description and default; a field without a fixed default says its own."""
    text = field.description or ""
    if field.is_required():
        return f"{text} (required)"
    if "(default:" in text:
        return text
    return f"{text} (default: {field.get_default(call_default_factory=True)})"


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
