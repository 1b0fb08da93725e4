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
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from depthvar.errors import InputError

MAX_SAMPLES = 10**12  # keys have twelve digits
_GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2
_HEADER_CELLS = ("class", "class_id", "class_name", "label")


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

    A selection is "all", or a list of ids (`3`), ranges (`0-9`) and names (`seven`) with commas
    between them; a name that holds a comma stands in double quotes, or alone. `other_names` holds
    what each class may also be called: a WordNet id (`n01440764`), synonyms.
    Errors: `InputError` for an unknown or ambiguous class, an id outside the model, a class twice.
    """
    if text.strip() == "all":
        return tuple(range(len(class_names)))
    try:
        cells = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise InputError(f"got the classes {_short(text)}, which do not parse: {error}") from error
    if len(cells) > 1 and text.strip() in class_names:
        cells = [text]
    index = _ClassIndex(class_names, other_names)
    found: list[int] = []
    for cell in cells:
        bounds = re.fullmatch(r"\s*([0-9]{1,9})\s*-\s*([0-9]{1,9})\s*", cell)
        if bounds is None:
            found.append(index.class_id(cell))
            continue
        first, last = (index.class_id(bound) for bound in bounds.groups())
        if first > last:
            raise InputError(f"got the range {cell.strip()}, wanted the smaller id first")
        found.extend(range(first, last + 1))
    if not found:
        raise InputError(
            'got no classes, wanted ids, ranges or names such as "0-4,seven", or "all"'
        )
    class_id, mentions = Counter(found).most_common(1)[0]
    if mentions > 1:
        raise InputError(
            f"got class {class_id} more than once in {_short(text)}: name each class once "
            "(a labels file gives classes different counts)"
        )
    return tuple(sorted(found))


def read_labels_file(
    path: str | os.PathLike[str],
    class_names: Sequence[str],
    other_names: Sequence[Sequence[str]] = (),
) -> LabelCounts:
    """Counts from a file with one class a line; repeated classes add up.

    `.jsonl` and `.ndjson`: a class id, a class name, or `{"class": id or name, "count": n}`.
    Anything else: `class` or `class,count`, quoted as in CSV, with or without a header line.
    A line without a count stands for one sample. UTF-8.
    Errors: `InputError` that names the file and the line.
    """
    file = Path(path)
    is_json = file.suffix.lower() in (".jsonl", ".ndjson")
    index = _ClassIndex(class_names, other_names)
    counts: dict[int, int] = {}
    for number, line in _numbered_lines(file):
        try:
            if is_json:
                name, count = _from_json_line(line)
            else:
                cells = _cells(line)
                if number == 1 and _is_header(cells, class_names):
                    continue
                name, count = _from_cells(cells)
            class_id = index.class_id(name)
        except InputError as error:
            raise InputError(f"{file}, line {number}: {error}") from error
        counts[class_id] = counts.get(class_id, 0) + count
    if not counts:
        raise InputError(f"{file} names no class: write one class a line, as class or class,count")
    return LabelCounts.from_mapping(counts)


def _numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, counted from 1."""
    try:
        with file.open(encoding="utf-8-sig", newline=None) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"got the labels file {file}, which cannot be read: {reason}") from error


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise InputError(f"got {_short(line)}, which is not CSV: {error}") from error


def _is_header(cells: list[str], class_names: Sequence[str]) -> bool:
    return cells[0].strip().lower() in _HEADER_CELLS and cells[0].strip() not in class_names


def _from_cells(cells: list[str]) -> tuple[str, int]:
    if len(cells) > 2:
        raise InputError(
            f"got {len(cells)} columns, wanted class or class,count "
            "(a name that holds a comma stands in double quotes)"
        )
    count = cells[1].strip() if len(cells) == 2 else "1"
    if not re.fullmatch(r"[0-9]{1,13}", count) or int(count) < 1:
        raise InputError(f"got the count {_short(count)}, wanted a whole number of 1 or more")
    return cells[0], int(count)


def _from_json_line(line: str) -> tuple[str, int]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"got {_short(line)}, which is not JSON") from error
    record = value if isinstance(value, dict) else {"class": value}
    name, count = record.get("class"), record.get("count", 1)
    if not set(record) <= {"class", "count"} or not (type(name) is int or isinstance(name, str)):
        raise InputError(
            f'got {_short(line)}, wanted a class id, a name, or {{"class": ..., "count": ...}}'
        )
    if type(count) is not int or not 1 <= count <= MAX_SAMPLES:
        raise InputError(f"got the count {_short(count)}, wanted a whole number of 1 or more")
    return str(name), count


class _ClassIndex:
    """The classes by every name they have."""

    def __init__(self, class_names: Sequence[str], other_names: Sequence[Sequence[str]]) -> None:
        self._class_names = class_names
        self._named: dict[str, list[int]] = {}
        self._also_named: dict[str, list[int]] = {}
        self._in_any_case: dict[str, list[int]] = {}
        for i, name in enumerate(class_names):
            others = other_names[i] if other_names else ()
            self._named.setdefault(name, []).append(i)
            for other in dict.fromkeys(others):
                self._also_named.setdefault(other, []).append(i)
            for folded in dict.fromkeys(known.casefold() for known in (name, *others)):
                self._in_any_case.setdefault(folded, []).append(i)

    def class_id(self, text: str) -> int:
        """The id that a number or a name stands for. A number is always an id."""
        name = text.strip()
        last = len(self._class_names) - 1
        if re.fullmatch(r"-?[0-9]+", name):
            if len(name) < 10 and 0 <= int(name) <= last:
                return int(name)
            raise InputError(
                f"got class {_short(name)}, wanted an id from 0 to {last} of this model"
            )
        found = (
            self._named.get(name)
            or self._also_named.get(name)
            or self._in_any_case.get(name.casefold())
        )
        if found is None:
            near = difflib.get_close_matches(name[:60], self._class_names, n=1)
            example = near[0] if near else self._class_names[0]
            raise InputError(
                f"got the unknown class {_short(name)}, wanted an id from 0 to {last} or a name "
                f"such as {_short(example)}"
            )
        if len(found) > 1:
            ids = ", ".join(map(str, found))
            raise InputError(
                f"got {_short(name)}, the name of the classes {ids}: name one by its id"
            )
        return found[0]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
