"""What people write for a text model: class names, prompts and templates become `Prompts`.

All lines of a file that cannot be are told at once. Blank lines and those that begin with `# ` are
passed over.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from depthvar.errors import InputError, shown
from depthvar.host.names import comparable
from pipeline.request.labels import LabelCounts
from pipeline.request.labels_file import count_of, json_value
from pipeline.request.prompts import (
    ClassPrompts,
    Prompts,
    WrittenPrompts,
    check_template,
    check_text,
)
from pipeline.request.text_file import errors_of, read_text

_JSON_SUFFIXES, _TABLE_SUFFIXES = (".jsonl", ".ndjson"), (".csv", ".tsv")
_COLUMNS = ("prompt", "class", "count")
_MAX_BYTES = 32 * 2**20
_SHOWN_PROBLEMS = 5

Note = Callable[[str], object]
Line = tuple[int, str]
"""A line of a file, and its number from 1."""


@dataclass(frozen=True)
class Asked:
    """What a request asks of a model: its classes, what a text model is told, and the samples."""

    class_names: tuple[str, ...]
    prompts: Prompts | None
    counts: LabelCounts


def file_of_classes(class_names: str) -> Path | None:
    """The file that `--class-names` names; None where it lists the classes itself.

    Errors: `InputError` for what is called as a file is and is none.
    """
    path = Path(os.path.expanduser(class_names))
    if os.path.isfile(path):
        return path
    if path.suffix.lower() in (".txt", *_JSON_SUFFIXES, *_TABLE_SUFFIXES):
        raise InputError(f"--class-names: {class_names} is no file: check that it is written right")
    return None


def asked_classes(class_names: str, templates: Path | None, per_class: int, note: Note) -> Asked:
    """Classes that are named, as a list with commas or in a file, and said in templates.

    The list is quoted as CSV, and so are the lines of the file, `class` or
    `class<TAB>description`. `templates` holds one a line, with `{class}`, and `{description}` where
    every class has one. Errors: `InputError`.
    """
    file = file_of_classes(class_names)
    place = "--class-names" if file is None else f"{file}"
    described: dict[str, str] = {}
    known: set[str] = set()

    def add(name: str, description: str = "", *more: str) -> None:
        name, description = name.strip(), description.strip()
        if more:
            raise InputError(f"got {2 + len(more)} columns, wanted class<TAB>description")
        check_text(name, "class")
        if description:
            check_text(description, "description")
        if comparable(name) in known:
            raise InputError(f"got the class {shown(name)} again, wanted each once: remove it")
        known.add(comparable(name))
        described[name] = description

    if file is None:
        with errors_of(place):
            for name in _cells(class_names, ","):
                add(name)
    else:
        lines = _lines(file, "the file of classes")
        _take_each(file, lines, lambda line: add(*_cells(line, "\t")))
    if not described:
        raise InputError(f"{place} names no class, wanted at least one")
    names, descriptions = tuple(described), tuple(described.values())
    said = () if templates is None else _read_templates(templates)
    with errors_of(f"{templates or place}"):
        prompts = ClassPrompts(said, descriptions if any(descriptions) else ())
        if said and prompts.descriptions and not prompts.describes:
            note(f"no template of {templates} has {{description}}: the descriptions are not used")
        prompts.check_entries(names)
        for entry in range(len(names)):
            for wording in range(prompts.num_wordings):
                check_text(prompts.worded(entry, wording, names).text, "prompt")
        samples = LabelCounts.from_mapping(dict.fromkeys(range(len(names)), per_class))
    return Asked(names, prompts, samples)


def asked_prompts(file: Path, per_prompt: int, note: Note) -> Asked:
    """Prompts of a file; one without a count has `per_prompt` samples.

    `.jsonl` and `.ndjson`: a prompt, or `{"prompt": ..., "class": ..., "count": ...}`. Where the
    first line names such columns, with commas or tabs: a table, quoted as CSV. Else a prompt a
    line. All prompts have a class, or none has. A prompt that comes again adds up, and `note` is
    told so. Errors: `InputError`.
    """
    lines = _lines(file, "the prompts file")
    counts: dict[str, int] = {}
    classes: dict[str, str] = {}
    names: dict[str, str] = {}
    num_repeated = 0

    def add(row: dict[str, str]) -> None:
        nonlocal num_repeated
        text, name, count = (row.get(column, "").strip() for column in _COLUMNS)
        check_text(text, "prompt")
        if name:
            check_text(name, "class")
        if bool(name) != bool(next(iter(classes.values()), name)):
            raise InputError(
                f"got a prompt with{'' if name else 'out'} a class, wanted a class for every prompt"
                " or for none: correct it"
            )
        if classes.setdefault(text, comparable(name)) != comparable(name):
            raise InputError(f"got {shown(text)} again with another class: remove one of them")
        if name:
            names.setdefault(comparable(name), name)
        num_repeated += text in counts
        counts[text] = counts.get(text, 0) + (count_of(count) if count else per_prompt)

    if file.suffix.lower() in _JSON_SUFFIXES:
        _take_each(file, lines, lambda line: add(_json_row(line)))
    elif columns := _header(file, lines):
        delimiter = "\t" if "\t" in lines[0][1] else ","
        _take_each(file, lines[1:], lambda line: add(_table_row(columns, _cells(line, delimiter))))
    else:
        _take_each(file, lines, lambda line: add({"prompt": line}))
    if not counts:
        raise InputError(f"{file} holds no prompt: write one prompt a line")
    if not any(counts.values()):
        raise InputError(f"{file} has the count 0 for every prompt, wanted at least one sample")
    if num_repeated:
        note(f"{file} holds prompts again in {num_repeated:,} lines, whose counts add up")
    ids = {form: class_id for class_id, form in enumerate(names)}
    with errors_of(f"{file}"):
        return Asked(
            tuple(names.values()),
            WrittenPrompts(tuple(counts), tuple(ids[form] for form in classes.values() if form)),
            LabelCounts.from_mapping({i: n for i, n in enumerate(counts.values()) if n}),
        )


def _read_templates(file: Path) -> tuple[str, ...]:
    templates: dict[str, None] = {}

    def add(line: str) -> None:
        template = line.strip()
        check_template(template)
        if template in templates:
            raise InputError(f"got the template {shown(template)} again: remove it")
        templates[template] = None

    _take_each(file, _lines(file, "the templates file"), add)
    if not templates:
        raise InputError(f"{file} holds no template: write one a line, as a photo of a {{class}}")
    return tuple(templates)


def _lines(file: Path, what: str) -> list[Line]:
    """The lines that say something."""
    text = read_text(file, what, max_bytes=_MAX_BYTES)
    lines = enumerate(io.StringIO(text, newline=None), start=1)
    return [(i, line) for i, line in lines if line.strip() and not re.match(r"\s*#(\s|$)", line)]


def _take_each(file: Path, lines: Sequence[Line], take: Callable[[str], object]) -> None:
    """Errors: `InputError` with what `take` says of every line that it refuses."""
    problems = []
    for number, line in lines:
        try:
            take(line)
        except InputError as error:
            problems.append(f"{file}, line {number}: {error}")
    if len(problems) > _SHOWN_PROBLEMS:
        more = len(problems) - _SHOWN_PROBLEMS
        problems[_SHOWN_PROBLEMS:] = [f"{file}: and {more:,} more lines cannot be read"]
    if problems:
        raise InputError("\n".join(problems))


def _cells(line: str, delimiter: str) -> list[str]:
    reader = csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        return next(reader)
    except csv.Error as error:
        raise InputError(f"got {shown(line.strip())}, which is not CSV: {error}") from error


def _header(file: Path, lines: Sequence[Line]) -> list[str]:
    """The columns that the first line names; none where it is a prompt."""
    columns = (
        [cell.strip(' "\n').lower() for cell in re.split("[,\t]", lines[0][1])] if lines else []
    )
    if "prompt" in columns and len(set(columns)) == len(columns) and set(columns) <= {*_COLUMNS}:
        return columns
    if lines and ("prompt" in columns[:1] or file.suffix.lower() in _TABLE_SUFFIXES):
        raise InputError(
            f"{file}, line {lines[0][0]}: got the header {shown(lines[0][1].strip())}, wanted"
            " prompt, prompt,class or prompt,class,count, in any order"
        )
    return []


def _table_row(columns: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    if len(cells) > len(columns):
        raise InputError(
            f"got {len(cells)} columns, wanted {','.join(columns)} as the header says (what"
            " holds a comma stands in double quotes)"
        )
    return dict(zip(columns, cells, strict=False))


def _json_row(line: str) -> dict[str, str]:
    value = json_value(line)
    record = value if isinstance(value, dict) else {"prompt": value}
    is_text = all(isinstance(record.get(column, ""), str) for column in ("prompt", "class"))
    if not record.keys() <= set(_COLUMNS) or not is_text:
        raise InputError(
            f'got {shown(line.strip())}, wanted a text or {{"prompt": ..., "class": ..., "count":'
            " ...}"
        )
    return {column: str(cell) for column, cell in record.items()}
