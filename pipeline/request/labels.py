"""Which class each sample has: a pure function of the counts, never a list of all samples.

The order interleaves the classes so that every shard is a fair mixture. Classes with the same
count form a group and take turns by class id; a group of m samples puts its k-th one at the time
(k + u) / m, and all groups are merged by time. With equal counts this is plain round robin. The
phase u differs from group to group, or else many small classes would meet at the same times (every
class with one sample at 1/2) and fill whole shards.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from depthvar.errors import InputError, shown
from depthvar.host.names import comparable, comparable_in_any_case
from pipeline.request.text_file import errors_of, read_text

MAX_SAMPLES = 10**12  # keys have twelve digits
_GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2
_ID_COLUMNS = ("class_id", "id")
_NAME_COLUMNS = ("class_name", "name")
_CLASS_COLUMNS = ("class", "label", *_ID_COLUMNS, *_NAME_COLUMNS)
_COUNT_COLUMNS = ("count", "counts", "images", "n", "number", "per_class", "samples")
_NUMBERS = re.compile(r"\s*(?P<first>[0-9]{1,9})\s*(-\s*(?P<last>[0-9]{1,9})\s*)?")
_WANTED_COUNT = f"wanted a whole number from 0 to {MAX_SAMPLES}"
_FEW = 5


@dataclass(frozen=True)
class LabelCounts:
    """How many samples of which class: ids strictly increasing, counts positive.

    Errors: `InputError` for anything else.
    """

    class_ids: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.class_ids or len(self.class_ids) != len(self.counts):
            raise InputError(
                f"got {len(self.class_ids)} classes and {len(self.counts)} counts, "
                "wanted at least one class and one count for each"
            )
        pairs = zip(self.class_ids, self.class_ids[1:], strict=False)
        if self.class_ids[0] < 0 or any(a >= b for a, b in pairs):
            raise InputError("got class ids out of order, wanted each once and increasing from 0")
        for class_id, count in zip(self.class_ids, self.counts, strict=True):
            if count < 1:
                raise InputError(f"got {count} samples of class {class_id}, wanted 1 or more")
        if self.total > MAX_SAMPLES:
            raise InputError(
                f"got {self.total} samples, wanted at most {MAX_SAMPLES}: split the dataset"
            )

    @staticmethod
    def from_mapping(counts: Mapping[int, int]) -> LabelCounts:
        """Counts by class id, in any order."""
        ids = tuple(sorted(counts))
        return LabelCounts(ids, tuple(counts[class_id] for class_id in ids))

    @cached_property
    def total(self) -> int:
        """The number of samples of all classes."""
        return sum(self.counts)

    def as_mapping(self) -> dict[int, int]:
        """Class id -> number of samples."""
        return dict(zip(self.class_ids, self.counts, strict=True))

    def labels(self, start: int, stop: int) -> np.ndarray:
        """The int64 class ids of the positions start ... stop - 1.

        Time and memory grow with classes + (stop - start), not with the total.
        """
        assert 0 <= start <= stop <= self.total, f"[{start}, {stop}) of {self.total} samples"
        if start == stop:
            return np.empty(0, dtype=np.int64)
        groups = self._groups
        # At time t each group has sent within 1 of m * t samples, all together within G of
        # N * t: from these times on, the window needs at most 4 G samples more than it holds.
        margin = len(groups) + 2  # two for rounding
        first = [g.sent_before((start - margin) / self.total) for g in groups]
        last = [g.sent_before((stop + margin) / self.total) for g in groups]
        skipped = start - sum(first)
        assert skipped >= 0
        assert sum(last) >= stop
        steps = [np.arange(a, b, dtype=np.int64) for a, b in zip(first, last, strict=True)]
        times = np.concatenate([g.times(k) for g, k in zip(groups, steps, strict=True)])
        ids = np.concatenate([g.labels(k) for g, k in zip(groups, steps, strict=True)])
        order = np.lexsort((ids, times))
        window: np.ndarray = ids[order[skipped : skipped + stop - start]]
        return window

    @cached_property
    def _groups(self) -> tuple[_Group, ...]:
        ids, counts = np.array(self.class_ids, np.int64), np.array(self.counts, np.int64)
        distinct = np.unique(counts)[::-1]
        return tuple(
            _Group(ids[counts == count], int(count) * int((counts == count).sum()), _phase(rank))
            for rank, count in enumerate(distinct)
        )


@dataclass(frozen=True, eq=False)
class _Group:
    """Classes with equal counts, taking turns: `size` samples in all."""

    class_ids: np.ndarray
    size: int
    phase: float

    def times(self, steps: np.ndarray) -> np.ndarray:
        """When the k-th samples come, in (0, 1); increasing in k in float64 up to 1e12 samples."""
        return (steps + self.phase) / self.size

    def labels(self, steps: np.ndarray) -> np.ndarray:
        """The class ids of the k-th samples."""
        ids: np.ndarray = self.class_ids[steps % len(self.class_ids)]
        return ids

    def sent_before(self, time: float) -> int:
        """How many samples have a time below `time`; rounding may move one at that very time."""
        return min(max(math.ceil(self.size * time - self.phase), 0), self.size)


def _phase(rank: int) -> float:
    """In (0, 1). Quadratic in the rank: a linear one resonates with counts such as 1, 2, 3, ..."""
    return (0.5 + rank * rank * _GOLDEN) % 1.0


def parse_classes(
    text: str, class_names: Sequence[str], other_names: Sequence[Sequence[str]] = ()
) -> tuple[int, ...]:
    """The class ids, increasing, that a selection names.

    A selection is "all", or a list of classes and ranges of ids (`0-9`) with commas between them;
    what holds a comma or ends in a space stands in double quotes, or alone. `ClassIndex` says what
    a class is called.
    Errors: `InputError` for an unknown or ambiguous class, an id outside the model, a class twice.
    """
    found = ClassIndex(class_names, other_names).selected(text)
    if not found:
        raise InputError(
            'got no classes, wanted ids, ranges or names such as "0-4,seven", or "all"'
        )
    class_id, mentions = Counter(found).most_common(1)[0]
    if mentions > 1:
        raise InputError(
            f"got class {class_id} more than once in {shown(text)}: name each class once "
            "(a labels file gives classes different counts)"
        )
    return tuple(sorted(found))


def quoted(item: str) -> str:
    """One class or range as an item of a selection that has others beside it."""
    if item == item.strip() and not set(item) & set(',"\n\r'):
        return item
    return '"' + item.replace('"', '""') + '"'


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
        note(f"{file} names {many} more than once, whose counts add up: {_few(added_up)}")
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


class _AmbiguityError(InputError):
    """A text that may be several classes."""


class ClassIndex:
    """The classes of a model by everything that may stand for them.

    A class is given by its id or by a name; `id:2` and `name:2` say which. Names are compared as
    `depthvar.host.names` has it: its own name first, then its other names (a WordNet id, synonyms),
    then both in any case. A number that is the id of one class and the name of another is refused,
    and so is one that another class is called with more or fewer zeros in front (`01`); a name may
    begin with zeros, an id as a name does not.
    """

    def __init__(
        self, class_names: Sequence[str], other_names: Sequence[Sequence[str]] = ()
    ) -> None:
        self._class_names = class_names
        self._named: dict[str, list[int]] = {}
        self._also_named: dict[str, list[int]] = {}
        self._in_any_case: dict[str, list[int]] = {}
        self._numbered: dict[int, list[int]] = {}
        self._decided_before: dict[str, int] = {}
        for i, name in enumerate(class_names):
            others = other_names[i] if other_names else ()
            self._named.setdefault(comparable(name), []).append(i)
            for other in dict.fromkeys(map(comparable, others)):
                self._also_named.setdefault(other, []).append(i)
            for folded in dict.fromkeys(map(comparable_in_any_case, (name, *others))):
                self._in_any_case.setdefault(folded, []).append(i)
            if re.fullmatch(r"[0-9]{1,18}", name):
                self._numbered.setdefault(int(name), []).append(i)

    def ids_named(self, name: str) -> tuple[int, ...]:
        """The classes of a name, () for none. A number is a name like any other."""
        return self._exactly_named(name) or self._named_in_any_case(name)

    def class_id(self, text: str) -> int:
        """The id of the one class that a text stands for.

        Errors: `InputError` for an unknown or ambiguous class.
        """
        if text not in self._decided_before:  # a file may have a line for every sample
            self._decided_before[text] = self._decided(text, ranges=False)[0]
        return self._decided_before[text]

    def selected(self, text: str) -> list[int]:
        """The ids that a selection (see `parse_classes`) names, in its order."""
        try:
            cells = next(csv.reader([text], skipinitialspace=True, strict=True), [])
        except csv.Error as error:
            if self._called_as_a_whole(text):
                return [self.class_id(text)]
            raise InputError(
                f"got the classes {shown(text)}, which do not parse: {error}"
            ) from error
        if [cell.strip() for cell in cells] == [text.strip()]:
            return list(self._decided(text, ranges=True))
        whole = self._called_as_a_whole(text)
        try:
            listed = [i for cell in cells for i in self._of_cell(cell)]
        except InputError as error:
            if not whole or isinstance(error, _AmbiguityError):
                raise
            listed = []
        if not whole:
            return listed
        if listed and set(listed) != set(whole):
            raise self._ambiguous(text, [*((i,) for i in whole), tuple(listed)])
        return [self.class_id(text)]

    def _of_cell(self, cell: str) -> Sequence[int]:
        """A cell that holds commas is a name, or an item of a YAML list that is a list itself."""
        return self.selected(cell) if "," in cell else self._decided(cell, ranges=True)

    def _called_as_a_whole(self, text: str) -> tuple[int, ...]:
        return self.ids_named(text) or self.ids_named(text.lstrip().removeprefix("name:"))

    def _exactly_named(self, name: str) -> tuple[int, ...]:
        for known in (self._named, self._also_named):
            for form in (name, name.strip()):
                if found := known.get(comparable(form)):
                    return tuple(found)
        return ()

    def _named_in_any_case(self, name: str) -> tuple[int, ...]:
        return tuple(self._in_any_case.get(comparable_in_any_case(name.strip()), ()))

    def _decided(self, text: str, *, ranges: bool) -> tuple[int, ...]:
        readings = self._readings(text, ranges=ranges)
        if not readings:
            raise self._unknown(text, ranges=ranges)
        if len(readings) > 1:
            raise self._ambiguous(text, readings)
        return readings[0]

    def _readings(self, text: str, *, ranges: bool) -> list[tuple[int, ...]]:
        """The classes that a text may stand for, every different reading once."""
        bare = text.strip()
        called = [(i,) for i in self._exactly_named(text)]
        readings: list[tuple[int, ...]] = []
        if bare.startswith("id:"):
            readings += self._of_numbers(bare.removeprefix("id:"), ranges=ranges)
        elif bare.startswith("name:"):
            readings += [(i,) for i in self.ids_named(text.lstrip().removeprefix("name:"))]
        elif bare == "all" and ranges:
            readings.append(tuple(range(len(self._class_names))))
        elif not (called and bare.startswith("0") and bare.isdigit() and bare != "0"):
            for ids in self._of_numbers(bare, ranges=ranges):
                readings += [ids, *self._named_as_numbers(ids)]
        readings += called
        readings = readings or [(i,) for i in self._named_in_any_case(text)]
        return list(dict.fromkeys(readings))

    def _of_numbers(self, text: str, *, ranges: bool) -> list[tuple[int, ...]]:
        """The ids of a number or a range, if all of them are ids of the model."""
        bounds = _NUMBERS.fullmatch(text)
        if bounds is None or (bounds["last"] and not ranges):
            return []
        first, last = int(bounds["first"]), int(bounds["last"] or bounds["first"])
        return [tuple(range(first, last + 1))] if first <= last < len(self._class_names) else []

    def _named_as_numbers(self, ids: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Other classes whose names are the numbers that some ids are, if there are any."""
        named = {i: self._named.get(str(i)) or self._numbered.get(i) for i in ids}
        if all(found in (None, [i]) for i, found in named.items()):
            return []
        other = sorted(i for found in named.values() for i in found or ())
        return [(i,) for i in other] if len(ids) == 1 else [tuple(other)]

    def _ambiguous(self, text: str, readings: Sequence[tuple[int, ...]]) -> _AmbiguityError:
        separator = "; " if any(len(ids) > 1 for ids in readings) else ", "
        write = [
            f"{self._spelling(text, ids)} for {_few(shown(self._class_names[i]) for i in ids)}"
            for ids in readings
        ]
        return _AmbiguityError(
            f"got {shown(text)}, which may be the classes {separator.join(map(_run, readings))}: "
            f"write {' or '.join(write)}"
        )

    def _spelling(self, text: str, ids: tuple[int, ...]) -> str:
        """Something to write that stands for these classes alone."""
        if not _is_run(ids):
            return _few((self._spelling(self._class_names[i], (i,)) for i in ids), ",")
        by_id = f"id:{_run(ids)}"
        forms = [f"name:{text.strip()}", by_id, f"name:{self._class_names[ids[0]]}"]
        works = (
            form
            for form in forms
            if quoted(form) == form and self._readings(form, ranges=True) == [ids]
        )
        return next(works, by_id)

    def _unknown(self, text: str, *, ranges: bool) -> InputError:
        last = len(self._class_names) - 1
        bare = text.strip()
        bounds = _NUMBERS.fullmatch(bare.removeprefix("id:"))
        if bounds is not None and bounds["last"]:
            if not ranges:
                return InputError(f"got the range {shown(bare)}, wanted a class")
            if int(bounds["first"]) > int(bounds["last"]):
                return InputError(f"got the range {bare}, wanted the smaller id first")
            outside = next(b for b in bounds.group("first", "last") if int(b) > last)
            return InputError(
                f"got class {shown(outside)} in the range {bare}, wanted an id from 0 to {last} "
                "of this model: ranges are of ids"
            )
        if re.fullmatch(r"(id:)?\s*[+-]?[0-9]+", bare):
            return InputError(
                f"got class {shown(bare)}, wanted an id from 0 to {last} of this model"
            )
        near = difflib.get_close_matches(bare[:60], self._class_names, n=1)
        example = near[0] if near else self._class_names[0]
        return InputError(
            f"got the unknown class {shown(bare)}, wanted an id from 0 to {last} or a name "
            f"such as {shown(example)}"
        )


def _is_run(ids: tuple[int, ...]) -> bool:
    return ids == tuple(range(ids[0], ids[-1] + 1))


def _run(ids: tuple[int, ...]) -> str:
    if not _is_run(ids):
        return _few(map(str, ids))
    return str(ids[0]) if len(ids) == 1 else f"{ids[0]}-{ids[-1]}"


def _few(texts: Iterator[str], separator: str = ", ") -> str:
    """The first texts, and dots where there are more."""
    first = list(islice(texts, _FEW + 1))
    return separator.join(first[:_FEW] + ["..."] * (len(first) > _FEW))
