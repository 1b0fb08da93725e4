"""What a text model is told: the prompts of a job as pure data.

A job counts samples per *entry*: a class, said in the words of a template, or a prompt that was
written by hand. Which prompt a sample has follows from the plan and its index alone.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pydantic import ConfigDict

from depthvar.errors import InputError, shown

MAX_PROMPTS = 100_000
"""Different prompts of one job: the plan holds them, and the states of each are stored."""
MAX_CHARACTERS = 4000
"""Of a prompt: ordinary text of that length has far more than the 512 tokens encoders take."""

_STRICT = ConfigDict(extra="forbid", strict=True)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Prompt:
    """What one sample was asked for.

    `template`: what the text was made from, None where it was written by hand. `class_id`: None
    where there are no classes.
    """

    text: str
    template: str | None
    class_id: int | None


@dataclass(frozen=True)
class ClassPrompts:
    """Prompts that say a class: the entries are the classes of the plan.

    A sample's template is drawn from `templates`. Without any the class is said alone, or followed
    by its description. `descriptions`: one for each class, "" for none; () where no class has one.
    Errors: `InputError` for templates and descriptions that cannot be.
    """

    __pydantic_config__ = _STRICT

    templates: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for template in self.templates:
            check_template(template)
        for description in filter(None, self.descriptions):
            check_text(description, "description")

    @property
    def describes(self) -> bool:
        """Whether a template says the description."""
        return any("{description}" in _fields(template) for template in self.templates)

    def check_entries(self, class_names: Sequence[str]) -> None:
        """Errors: `InputError` where the entries are not the classes of these names."""
        if len(self.descriptions) not in (0, len(class_names)):
            raise InputError(f"got {len(self.descriptions)} descriptions of {len(class_names)}")
        descriptions = self.descriptions or ("",) * len(class_names)
        bare = [name for name, told in zip(class_names, descriptions, strict=True) if not told]
        if bare and self.describes:
            raise InputError(
                f"got a template with {{description}}, and {len(bare):,} of {len(class_names):,} "
                f"classes without one, {shown(bare[0])} first: describe them, or leave it out"
            )
        if len(class_names) * max(1, len(self.templates)) > MAX_PROMPTS:
            raise InputError(
                f"got {len(class_names):,} classes in {len(self.templates):,} templates, wanted at "
                f"most {MAX_PROMPTS:,} different prompts: split the job"
            )

    def num_entries(self, class_names: Sequence[str]) -> int:
        """Entries that samples can be counted for."""
        return len(class_names)

    def first(
        self, num_entries: int, class_names: Sequence[str]
    ) -> tuple[tuple[str, ...], ClassPrompts]:
        """The first entries alone, and their classes' names."""
        told = self.descriptions[:num_entries]
        return tuple(class_names[:num_entries]), replace(self, descriptions=told * any(told))

    def class_of(self, entry: int) -> int | None:
        """The class id of an entry."""
        return entry

    @property
    def num_wordings(self) -> int:
        """In how many ways an entry may be said."""
        return max(1, len(self.templates))

    def worded(self, entry: int, wording: int, class_names: Sequence[str]) -> Prompt:
        """An entry, said in one of its ways."""
        description = self.descriptions[entry] if self.descriptions else ""
        if self.templates:
            template = self.templates[wording]
        else:
            template = "{class}, {description}" if description else "{class}"
        fields = {"class": class_names[entry], "description": description}
        return Prompt(template.format_map(fields), template, entry)


@dataclass(frozen=True)
class WrittenPrompts:
    """Prompts as they were written, the entries; with the class id of each, or () for no classes.

    Errors: `InputError` for prompts that cannot be.
    """

    __pydantic_config__ = _STRICT

    texts: tuple[str, ...]
    class_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for text in self.texts:
            check_text(text, "prompt")
        if len(set(self.texts)) < len(self.texts):
            raise InputError("got a prompt twice, wanted each once")
        if len(self.texts) > MAX_PROMPTS:
            raise InputError(
                f"got {len(self.texts):,} prompts, wanted at most {MAX_PROMPTS:,}: split the job"
            )

    def check_entries(self, class_names: Sequence[str]) -> None:
        """Errors: `InputError` where the classes are not those of these names."""
        wanted = len(self.texts) if class_names else 0
        if len(self.class_ids) != wanted or set(self.class_ids) != set(range(len(class_names))):
            raise InputError("got classes of prompts that are not those of the plan")

    def num_entries(self, class_names: Sequence[str]) -> int:
        """Entries that samples can be counted for."""
        return len(self.texts)

    def first(
        self, num_entries: int, class_names: Sequence[str]
    ) -> tuple[tuple[str, ...], WrittenPrompts]:
        """The first entries alone, and their classes' names."""
        ids = self.class_ids[:num_entries]
        names = tuple(class_names[: max(ids, default=-1) + 1])
        return names, WrittenPrompts(self.texts[:num_entries], ids)

    def class_of(self, entry: int) -> int | None:
        """The class id of an entry."""
        return self.class_ids[entry] if self.class_ids else None

    @property
    def num_wordings(self) -> int:
        """In how many ways an entry may be said."""
        return 1

    def worded(self, entry: int, wording: int, class_names: Sequence[str]) -> Prompt:
        """An entry, said in one of its ways."""
        return Prompt(self.texts[entry], None, self.class_of(entry))


Prompts = ClassPrompts | WrittenPrompts


def distinct_texts(
    prompts: Prompts, entries: Iterable[int], class_names: Sequence[str]
) -> Iterator[str]:
    """Every prompt that a sample of some entries may have, each once."""
    ways = range(prompts.num_wordings)
    yield from dict.fromkeys(
        prompts.worded(entry, way, class_names).text for entry in entries for way in ways
    )


def check_text(text: str, what: str) -> None:
    """Errors: `InputError` for a prompt, or a part of one, that no line of text can hold."""
    if not text.strip():
        raise InputError(f"got an empty {what}, wanted text")
    if found := _UNPRINTABLE.search(text):
        raise InputError(
            f"got the control character {found[0]!r} in the {what} {shown(text)}, wanted a line of"
            " text"
        )
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"got a {what} of {len(text):,} characters, {shown(text)}, wanted at most"
            f" {MAX_CHARACTERS:,}: shorten it"
        )


def check_template(template: str) -> None:
    """Errors: `InputError` for a template that does not say the class, or has other fields."""
    check_text(template, "template")
    got = f"got the template {shown(template)}"
    try:
        fields = _fields(template)
    except ValueError as error:
        raise InputError(f"{got}: {error}: double a brace that is meant as one") from error
    if unknown := [field for field in fields if field not in ("{class}", "{description}")]:
        raise InputError(
            f"{got} with {unknown[0]}, wanted {{class}} and perhaps {{description}}: double a brace"
            " that is meant as one"
        )
    if "{class}" not in fields:
        raise InputError(f"{got}, wanted {{class}} in it")


def _fields(template: str) -> list[str]:
    """What stands in braces. Errors: `ValueError` for braces without a partner."""
    return [
        f"{{{name}{'!' if conversion else ''}{conversion or ''}{':' if form else ''}{form}}}"
        for _, name, form, conversion in string.Formatter().parse(template)
        if name is not None
    ]
