"""A file with one class a line, and how many samples of each: text, a table or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from depthvar.errors import InputError, shown
from pipeline.request.classes import ClassIndex, few
from pipeline.request.labels import MAX_SAMPLES, LabelCounts
from pipeline.request.text_file import errors_of, read_text

_ID_COLUMNS = ("class_id", "id")
_NAME_COLUMNS = ("class_name", "name")
_CLASS_COLUMNS = ("class", "label", *_ID_COLUMNS, *_NAME_COLUMNS)
_COUNT_COLUMNS = ("count", "counts", "images", "n", "number", "per_class", "samples")
_WANTED_COUNT = f"wanted a whole number from 0 to {MAX_SAMPLES}"


def read_labels_file(
    path: str | os.PathLike[str],
    class_names: Sequence[str],
    other_names: Sequence[Sequence[str]] = (),
    *,
    note: Callable[[str], object] = lambda line: None,
) -> LabelCounts:
    """Counts from a file with one class a line; repeated classes add up, and `note` is told so.

    `.jsonl` and `.ndjson`: a class id, a class name, or `{"class": id or name, "count": n}`.
    Anything else: `class` or `class,count` with commas or tabs, quoted as in CSV. The first row may
    name its columns, in either order; `class_id` and `class_name` then say how the classes are
    given. A line without a count stands for one sample, a count of 0 for none. Blank lines and
    those that begin with `#` are passed over. UTF-8. `ClassIndex` says what a class is called.
    Errors: `InputError` that names the file and the line.
    """
    file = Path(path)
    index = ClassIndex(class_names, other_names)
    is_json = file.suffix.lower() in (".jsonl", ".ndjson")
    rows = _json_rows if is_json else _csv_rows
    counts: dict[int, int] = {}
    lines_of: Counter[int] = Counter()
    for class_id, count in rows(file, read_text(file, "the labels file"), index):
        counts[class_id] = counts.get(class_id, 0) + count
        lines_of[class_id] += 1
    if not counts:
        raise InputError(f"{file} names no class: write one class a line, as class or class,count")
    if not any(counts.values()):
        raise InputError(f"{file} has the count 0 for every class, wanted at least one sample")
    if repeated := [class_id for class_id in sorted(counts) if lines_of[class_id] > 1]:
        many = "1 class" if len(repeated) == 1 else f"{len(repeated):,} classes"
        added_up = (
            f"{shown(class_names[i])} {counts[i]:,} from {lines_of[i]:,} lines" for i in repeated
        )
        note(f"{file} names {many} more than once, whose counts add up: {few(added_up)}")
    with errors_of(f"{file}"):
        return LabelCounts.from_mapping({i: count for i, count in counts.items() if count})


Row = tuple[int, int]
"""A class id and a count."""


def _json_rows(file: Path, text: str, index: ClassIndex) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not _is_blank_or_comment(line):
            with errors_of(f"{file}, line {number}"):
                name, count = _from_json_line(line)
                row = index.class_id(name), count
            yield row


def _csv_rows(file: Path, text: str, index: ClassIndex) -> Iterator[Row]:
    """Classes and counts of the rows after the header, if there is one."""
    columns = _Columns()
    for position, (number, cells) in enumerate(_csv_records(file, text, index)):
        with errors_of(f"{file}, line {number}"):
            if not _is_header(cells, index):
                yield columns.row(cells, index)
            elif position == 0:
                columns = _Columns.of_header(cells)
            else:
                raise InputError(
                    f"got the header {shown(','.join(cells))}, wanted it before all classes "
                    "alone: remove the line"
                )


def _is_blank_or_comment(line: str) -> bool:
    return line.strip() == "" or line.lstrip().startswith("#")


def _csv_records(file: Path, text: str, index: ClassIndex) -> Iterator[tuple[int, list[str]]]:
    """The cells of every record, with the number of the line that it begins in.

    A line that holds a tab, outside of quotes, has its cells between tabs.
    """
    lines = io.StringIO(text, newline=None)
    number = 1
    for line in lines:
        first = number
        number += 1
        if _is_blank_or_comment(line):
            name = re.split(r"[,\t]", line.strip(), maxsplit=1)[0].strip()
            if name and index.ids_named(name):
                raise InputError(
                    f"{file}, line {first}: got {shown(name)}, a comment or the class of that "
                    "name: put the class in double quotes, or word the comment otherwise"
                )
            continue
        has_tab = "\t" in re.sub(r'"[^"]*("|$)', "", line.strip())
        reader = csv.reader(
            chain([line], lines),
            delimiter="\t" if has_tab else ",",
            skipinitialspace=True,
            strict=True,
        )
        try:
            cells = next(reader)
        except csv.Error as error:
            raise InputError(
                f"{file}, line {first}: got {shown(line.strip())}, which is not CSV: {error}"
            ) from error
        number = first + reader.line_num
        if any(cell.strip() for cell in cells):
            yield first, cells


def _is_header(cells: list[str], index: ClassIndex) -> bool:
    """Whether a row names columns: one of them that of the classes, and no cell is a count.

    A class may be called as a column is.
    """
    names = [cell.strip().lower() for cell in cells]
    others = [name for name in names if name not in _CLASS_COLUMNS]
    if len(others) == len(names):
        return False
    if others and all(name in _COUNT_COLUMNS for name in others):
        return True
    is_class = any(index.ids_named(name) for name in names)
    return not is_class and not any(character.isdigit() for character in "".join(others))


@dataclass(frozen=True)
class _Columns:
    """Where the class and the count stand in a row, and what the header calls the classes."""

    class_at: int = 0
    called: str = "class"

    @staticmethod
    def of_header(cells: list[str]) -> _Columns:
        names = [cell.strip().lower() for cell in cells]
        at = [i for i, name in enumerate(names) if name in _CLASS_COLUMNS]
        if len(names) > 2 or len(at) > 1:
            raise InputError(
                f"got the header {shown(','.join(cells))}, wanted class or class,count"
            )
        return _Columns(at[0], names[at[0]])

    def row(self, cells: list[str], index: ClassIndex) -> Row:
        if len(cells) > 2:
            raise InputError(
                f"got {len(cells)} columns, wanted class or class,count "
                "(a name that holds a comma stands in double quotes)"
            )
        if self.class_at >= len(cells):
            raise InputError(f"got {shown(cells[0])}, wanted count,class as the header says")
        count = cells[1 - self.class_at].strip() if len(cells) == 2 else "1"
        return index.class_id(self._explicit(cells[self.class_at], index)), count_of(count)

    def _explicit(self, name: str, index: ClassIndex) -> str:
        """The class as it reads in a column of ids, or of names."""
        if self.called in _ID_COLUMNS and re.fullmatch(r"[0-9]+", name.strip()):
            return f"id:{name.strip()}"
        if self.called in _NAME_COLUMNS and index.ids_named(name):
            return f"name:{name}"
        return name


def count_of(text: str) -> int:
    """A number of samples as it is written. Errors: `InputError`."""
    if not re.fullmatch(r"[0-9]{1,13}", text) or int(text) > MAX_SAMPLES:
        raise InputError(f"got the count {shown(text)}, {_WANTED_COUNT}")
    return int(text)


def json_value(line: str) -> Any:
    """The value of a line of JSON. Errors: `InputError`, also for a key that stands twice."""
    try:
        return json.loads(line, object_pairs_hook=_record)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"got {shown(line)}, which is not JSON") from error


def _from_json_line(line: str) -> tuple[str, int]:
    value = json_value(line)
    record = value if isinstance(value, dict) else {"class": value}
    name, count = record.get("class"), record.get("count", 1)
    if not set(record) <= {"class", "count"} or not (type(name) is int or isinstance(name, str)):
        raise InputError(
            f'got {shown(line)}, wanted a class id, a name, or {{"class": ..., "count": ...}}'
        )
    if type(count) is not int or not 0 <= count <= MAX_SAMPLES:
        raise InputError(f"got the count {shown(count)}, {_WANTED_COUNT}")
    return str(name), count


def _record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; `InputError` for a key that stands twice in it."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise InputError(f"got the keys {', '.join(key for key, _ in pairs)}, wanted each once")
    return record
