"""What a text that names classes stands for: their ids, by every name that a class has."""

from __future__ import annotations

import csv
import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from depthvar.errors import InputError, shown
from depthvar.host.names import comparable, comparable_in_any_case

_NUMBERS = re.compile(r"\s*(?P<first>[0-9]{1,9})\s*(-\s*(?P<last>[0-9]{1,9})\s*)?")
_FEW = 5


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
            f"{self._spelling(text, ids)} for {few(shown(self._class_names[i]) for i in ids)}"
            for ids in readings
        ]
        return _AmbiguityError(
            f"got {shown(text)}, which may be the classes {separator.join(map(_run, readings))}: "
            f"write {' or '.join(write)}"
        )

    def _spelling(self, text: str, ids: tuple[int, ...]) -> str:
        """Something to write that stands for these classes alone."""
        if not _is_run(ids):
            return few((self._spelling(self._class_names[i], (i,)) for i in ids), ",")
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
        return few(map(str, ids))
    return str(ids[0]) if len(ids) == 1 else f"{ids[0]}-{ids[-1]}"


def few(texts: Iterator[str], separator: str = ", ") -> str:
    """The first texts, and dots where there are more."""
    first = list(islice(texts, _FEW + 1))
    return separator.join(first[:_FEW] + ["..."] * (len(first) > _FEW))
