"""A folder of the user's own pictures, `<class name>/<picture files>`, as a set of images."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from depthvar.errors import InputError, advice
from depthvar.host.leftovers import leftover_kind
from depthvar.host.names import comparable
from depthvar.training.class_folders import class_names_of
from depthvar.training.data import ImageSet
from depthvar.training.pictures import WHITE, Background, PictureError, read_picture

_SHOWN = 10  # of many
_DEPTH_OF_ADVICE = 3
_BAR_DELAY_S = 2.0
_SPLITS = {"--data": ("train", "training"), "--test": ("test", "val", "valid", "validation")}
_DATASET_PLAN = "plan.json"
# What people and tools keep beside pictures; anything else that is no picture is an error.
_SIDECARS = frozenset(
    {".txt", ".md", ".rst", ".log", ".html", ".htm", ".csv", ".tsv", ".json", ".jsonl", ".xml"}
    | {".yaml", ".yml", ".toml", ".ini", ".cfg", ".xmp", ".aae", ".md5", ".sha1", ".sha256"}
)


@dataclass(frozen=True)
class ReadingReport:
    """What became of the files of a folder.

    `conversions` and `passed_over` count by kind; `unreadable` are files that were skipped as
    asked, each with the reason.
    """

    num_pictures: int
    num_classes: int
    conversions: Mapping[str, int] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    def text(self) -> str:
        """One line of what was read and how; more where anything was passed over."""
        pictures = "picture" if self.num_pictures == 1 else "pictures"
        classes = "class" if self.num_classes == 1 else "classes"
        lines = [f"read {self.num_pictures:,} {pictures} of {self.num_classes:,} {classes}"]
        if self.conversions:
            lines[0] += f": {_counted(self.conversions)}"
        if self.passed_over:
            lines.append(f"passed over {_counted(self.passed_over)}")
        if self.unreadable:
            lines.append(f"skipped {len(self.unreadable):,} unreadable:")
            lines += [f"  {line}" for line in _first(self.unreadable)]
        return "\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """The same as JSON values, with every unreadable file."""
        return {
            "pictures": self.num_pictures,
            "converted": dict(self.conversions),
            "passed_over": dict(self.passed_over),
            "unreadable": list(self.unreadable),
        }


@dataclass(frozen=True)
class PictureFolder:
    """The files of every class, by the class folders' names in order; nothing is opened yet."""

    path: Path
    files: Mapping[str, tuple[Path, ...]]
    passed_over: Mapping[str, int]

    @staticmethod
    def open(folder: Path, *, flag: Literal["--data", "--test"]) -> PictureFolder:
        """List the classes of a folder that `flag` names, without what systems leave behind.

        Errors: `InputError` for a folder without classes, with classes inside classes or without
        files, with names that cannot be class names, and for what cannot be listed.
        """
        if not os.path.isdir(folder):
            what = "is no folder" if os.path.lexists(folder) else "does not exist"
            raise InputError(f"{shown(folder)} {what}, {_wanted(folder)}: check {flag}")
        passed_over: Counter[str] = Counter()
        top = _Listing.of(folder, passed_over)
        if top.broken:
            raise InputError(_lines(top.broken, "remove or mend it, for it may be a class"))
        if not top.folders:
            raise InputError(_no_classes(folder, top, flag))
        _check_names(top.folders)
        listings = {path.name: _Listing.of(path, passed_over) for path in top.folders}
        _check_nesting(folder, listings, flag)
        empty = [name for name, listing in listings.items() if not listing.files]
        _check_no_empty_class(folder, empty, "holds no picture files")
        if top.files:
            passed_over["beside the class folders"] += len(top.files)
        files = {name: tuple(listing.files) for name, listing in listings.items()}
        return PictureFolder(folder, files, dict(passed_over))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class of each folder, in the order of `files`: the place of a name is the label."""
        return class_names_of(tuple(self.files))

    def read(
        self,
        *,
        side: int,
        channels: int,
        background: Background = WHITE,
        skip_unreadable: bool = False,
    ) -> tuple[ImageSet, ReadingReport]:
        """Every picture as a viewer shows it, centre-cropped and resized to side x side.

        The set is held in memory as uint8; 1 channel is grey, 3 are RGB. Errors: `InputError` that
        names the files that cannot be read, unless they are to be skipped, and classes without any
        other.
        """
        images: list[Tensor] = []
        labels: list[int] = []
        unreadable: list[str] = []
        conversions: Counter[str] = Counter()
        for label, path in self._progress():
            try:
                picture = read_picture(path, background)
            except PictureError as error:
                unreadable.append(f"{shown(path)} is no readable picture: {error}")
                continue
            conversions.update(picture.conversions)
            images.append(_square(picture.image, side, channels))
            labels.append(label)
        if unreadable and not skip_unreadable:
            raise InputError(_lines(unreadable, "remove or repair, or give --skip-unreadable"))
        trained_on = set(labels)
        without = [name for i, name in enumerate(self.files) if i not in trained_on]
        _check_no_empty_class(self.path, without, "holds no readable picture")
        report = ReadingReport(
            num_pictures=len(images),
            num_classes=len(self.files),
            conversions=dict(conversions.most_common()),
            passed_over=self.passed_over,
            unreadable=tuple(unreadable),
        )
        return ImageSet(torch.stack(images), torch.tensor(labels), self.class_names), report

    def _progress(self) -> Iterator[tuple[int, Path]]:
        pairs = [(i, path) for i, paths in enumerate(self.files.values()) for path in paths]
        yield from tqdm(pairs, desc="read", unit="picture", delay=_BAR_DELAY_S)


@dataclass(frozen=True)
class _Listing:
    """What a folder holds besides leftovers, sorted; `broken` cannot be followed, with reasons."""

    folders: list[Path]
    files: list[Path]
    broken: list[str]

    @staticmethod
    def of(folder: Path, passed_over: Counter[str]) -> _Listing:
        """Count leftovers, and files that are no pictures by their name, into `passed_over`.

        In a class a broken link counts as a file, to be reported with the other unreadable ones.
        Errors: `InputError` for a folder that cannot be listed.
        """
        found = _Listing([], [], [])
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            raise InputError(
                f"{shown(folder)} cannot be listed ({error.strerror or error}): "
                f"{advice(error, shown(folder))}, or move it away"
            ) from error
        for path in paths:
            kind = leftover_kind(path.name)
            if kind is not None:
                passed_over[kind] += 1
                continue
            try:
                is_folder = stat.S_ISDIR(path.stat().st_mode)
            except OSError as error:
                found.broken.append(f"{shown(path)} cannot be read ({error.strerror or error})")
                found.files.append(path)
                continue
            if is_folder:
                found.folders.append(path)
            elif path.suffix.lower() in _SIDECARS:
                passed_over[f"*{path.suffix.lower()}"] += 1
            else:
                found.files.append(path)
        return found


def checked_name(name: str, what: str) -> str:
    """The name, where it can be written down as one line of text. Errors: `InputError`."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{what} is named {os.fsencode(name)!r}, which is no UTF-8: rename it"
        ) from None
    if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name):
        raise InputError(f"{what} is named {name!r}, with a control character: rename it")
    return name


def shown(path: Path) -> str:
    """A path as it is, or quoted where printing it would break a line or a terminal."""
    text = str(path)
    return text if text.isprintable() else repr(os.fsencode(path))[1:]


def _square(image: Image.Image, side: int, channels: int) -> Tensor:
    """The middle of a picture, uint8 (C, side, side)."""
    if channels == 1:
        image = image.convert("L")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    image = image.crop((left, top, left + short, top + short))
    pixels = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels.reshape(side, side, channels).copy()).permute(2, 0, 1)


def _check_names(folders: Iterable[Path]) -> None:
    earlier: dict[str, str] = {}
    for path in folders:
        name = checked_name(path.name, f"a class folder of {shown(path.parent)}")
        composed = comparable(name)
        if composed in earlier:
            raise InputError(
                f"{path.parent} has two class folders {composed!r} that differ in their Unicode "
                f"form alone ({earlier[composed].encode()!r} and {name.encode()!r}): put their "
                "pictures into one"
            )
        earlier[composed] = name


def _check_nesting(folder: Path, listings: Mapping[str, _Listing], flag: str) -> None:
    nested = [path for listing in listings.values() for path in listing.folders]
    if not nested:
        return
    if any(listing.files for listing in listings.values()):
        raise InputError(
            f"{shown(nested[0])} is a folder inside a class ({len(nested):,} in all), wanted "
            f"picture files alone in {folder}/<class name>: move its pictures up or it away"
        )
    better = _folder_of_classes(folder, _SPLITS[flag], _DEPTH_OF_ADVICE)
    names = ", ".join(repr(name) for name in _first(list(listings)))
    what_to_do = "move the pictures up" if better is None else f"wanted {flag} {shown(better)}"
    raise InputError(
        f"{shown(folder)} holds {names}, which hold folders and no pictures: {what_to_do}"
    )


def _folder_of_classes(folder: Path, preferred: Container[str], depth: int) -> Path | None:
    """A folder inside that holds folders with files in them, rather one of a preferred name."""
    inner = _Listing.of(folder, Counter()).folders
    inner.sort(key=lambda path: path.name.lower() not in preferred)
    for path in inner:
        if any(_Listing.of(one, Counter()).files for one in _Listing.of(path, Counter()).folders):
            return path
    if depth > 1:
        for path in inner:
            found = _folder_of_classes(path, preferred, depth - 1)
            if found is not None:
                return found
    return None


def _check_no_empty_class(folder: Path, names: list[str], what: str) -> None:
    if names:
        paths = [f"the class folder {folder / name} {what}" for name in names]
        raise InputError(_lines(paths, "fill or remove it, for a class without pictures is none"))


def _no_classes(folder: Path, top: _Listing, flag: str) -> str:
    if (folder / _DATASET_PLAN).is_file():
        return (
            f"{folder} is a dataset of this project, wanted a folder of pictures: copy it out with "
            "depthvar export --format png-folder"
        )
    if top.files:
        return (
            f"{shown(folder)} holds files ({shown(top.files[0])} first) and no class folders, "
            f"{_wanted(folder)}: make a folder for each class, or check {flag}"
        )
    return f"{shown(folder)} has no class folders, {_wanted(folder)}: check {flag}"


def _wanted(folder: Path) -> str:
    return f"wanted {shown(folder)}/<class name>/<picture files>"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def _first(lines: list[str] | tuple[str, ...]) -> list[str]:
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], *([f"and {more:,} more"] if more > 0 else [])]


def _lines(problems: list[str], what_to_do: str) -> str:
    """A line for each of the first problems; what to do stands in the last."""
    return "\n".join(_first(problems)) + f": {what_to_do}"
