"""A picture of a dataset: some images of each class or prompt, from the committed shards."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.dataset.loader import iterate_samples
from pipeline.dataset.report.survey import spread
from pipeline.shards.committed import Dataset
from pipeline.shards.manifest import CONTACT_SHEET_NAME

_MAX_SUBJECTS = 40
_MIN_SIDE, _MAX_SIDE = 64, 128  # pixels of one image on the sheet
_MARGIN, _GAP, _LABEL_GAP = 32, 6, 20
_FONT_PX, _LINE_PX = 18, 24
_LINE_CHARACTERS = 40
_PAPER, _INK = (255, 255, 255), (45, 45, 50)


def write_contact_sheet(dataset: Dataset, per_subject: int) -> None:
    """Publish `contact_sheet.png` at the dataset's root: a row per class or prompt, named so."""
    subjects = shown_subjects(list(dataset.plan.subject_counts))
    images = first_images(dataset, subjects, per_subject)
    rows = [(dataset.plan.subject_name(subject), images[subject]) for subject in subjects]
    buffer = io.BytesIO()
    draw_sheet(rows, per_subject).save(buffer, format="PNG", optimize=True)
    dataset.storage.publish_bytes(buffer.getvalue(), CONTACT_SHEET_NAME)


def shown_subjects(subjects: Sequence[int]) -> tuple[int, ...]:
    """All subjects of a plan, or an even choice of 40 where there are more."""
    return tuple(spread(subjects, _MAX_SUBJECTS))


def first_images(
    dataset: Dataset, subjects: Sequence[int], per_subject: int
) -> Mapping[int, list[np.ndarray]]:
    """The first images of each subject in key order, uint8 (height, width, channels) each.

    Stops reading as soon as every subject has what it can give.
    """
    plan = dataset.plan
    wanted = {subject: min(per_subject, plan.subject_counts[subject]) for subject in subjects}
    found: dict[int | None, list[np.ndarray]] = {subject: [] for subject in subjects}
    num_open = sum(wanted.values())
    for sample in iterate_samples(dataset):
        subject = plan.stored_subject(sample.label, sample.prompt)
        if subject in wanted and len(found[subject]) < wanted[subject]:
            found[subject].append(sample.image)
            num_open -= 1
            if num_open == 0:
                break
    return {subject: found[subject] for subject in subjects}


def draw_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], per_subject: int) -> Image.Image:
    """Draw labelled rows of equal images on white paper, with the same margin on all sides.

    Small images grow by a whole factor, pixel by pixel; large ones shrink smoothly. A long name has
    the lines that fit beside an image.
    """
    side = max(max(image.shape[:2]) for _, images in rows for image in images)
    shown = _shown_side(side)
    font = ImageFont.load_default(_FONT_PX)
    names = [_lines(name, shown // _LINE_PX) for name, _ in rows]
    label_width = max(round(font.getlength(line)) for lines in names for line in lines)
    num_columns = min(per_subject, max(len(images) for _, images in rows))
    left = _MARGIN + label_width + _LABEL_GAP
    step = shown + _GAP
    sheet = Image.new(
        "RGB",
        (left + num_columns * step - _GAP + _MARGIN, 2 * _MARGIN + len(rows) * step - _GAP),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    for row, (lines, (_, images)) in enumerate(zip(names, rows, strict=True)):
        top = _MARGIN + row * step
        middle, text = (left - _LABEL_GAP, top + shown / 2), "\n".join(lines)
        pen.text(middle, text, fill=_INK, font=font, anchor="rm", align="right")
        for column, pixels in enumerate(images[:num_columns]):
            sheet.paste(_resized(pixels, shown), (left + column * step, top))
    return sheet


def _lines(name: str, most: int) -> list[str]:
    if len(name) <= _LINE_CHARACTERS:
        return [name]
    return textwrap.wrap(name, _LINE_CHARACTERS, max_lines=most, placeholder=" ...")


def _shown_side(side: int) -> int:
    if side >= _MIN_SIDE:
        return min(side, _MAX_SIDE)
    return side * -(-_MIN_SIDE // side)


def _resized(pixels: np.ndarray, shown: int) -> Image.Image:
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    longest = max(image.size)
    kind = Image.Resampling.NEAREST if shown >= longest else Image.Resampling.LANCZOS
    width, height = (max(1, round(length * shown / longest)) for length in image.size)
    return image.resize((width, height), kind)
