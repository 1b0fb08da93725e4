"""A picture of a dataset: some images of each class, read back from the committed shards."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.dataset.loader import Dataset, iterate_samples
from pipeline.dataset.report.survey import spread

CONTACT_SHEET_NAME = "contact_sheet.png"
_MAX_CLASSES = 40
_MIN_SIDE, _MAX_SIDE = 64, 128  # pixels of one image on the sheet
_MARGIN, _GAP, _LABEL_GAP = 32, 6, 20
_FONT_PX = 18
_PAPER, _INK = (255, 255, 255), (45, 45, 50)


def write_contact_sheet(dataset: Dataset, per_class: int) -> None:
    """Publish `contact_sheet.png` at the dataset's root: one row per class, its name before it."""
    class_ids = shown_classes(dataset.plan.total_counts.class_ids)
    names = dataset.plan.class_names
    images = first_images(dataset, class_ids, per_class)
    rows = [(names[class_id], images[class_id]) for class_id in class_ids]
    buffer = io.BytesIO()
    draw_sheet(rows, per_class).save(buffer, format="PNG", optimize=True)
    dataset.storage.publish_bytes(buffer.getvalue(), CONTACT_SHEET_NAME)


def shown_classes(class_ids: Sequence[int]) -> tuple[int, ...]:
    """All classes, or an even choice of 40 where there are more."""
    return tuple(spread(class_ids, _MAX_CLASSES))


def first_images(
    dataset: Dataset, class_ids: Sequence[int], per_class: int
) -> Mapping[int, list[np.ndarray]]:
    """The first images of each class in key order, uint8 (height, width, channels) each.

    Stops reading as soon as every class has what it can give.
    """
    counts = dataset.plan.total_counts.as_mapping()
    wanted = {class_id: min(per_class, counts[class_id]) for class_id in class_ids}
    found: dict[int, list[np.ndarray]] = {class_id: [] for class_id in class_ids}
    num_open = sum(wanted.values())
    for sample in iterate_samples(dataset):
        if len(found.get(sample.label, ())) < wanted.get(sample.label, 0):
            found[sample.label].append(sample.image)
            num_open -= 1
            if num_open == 0:
                break
    return found


def draw_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], per_class: int) -> Image.Image:
    """Draw labelled rows of equal images on white paper, with the same margin on all sides.

    Small images grow by a whole factor, pixel by pixel; large ones shrink smoothly.
    """
    side = max(image.shape[0] for _, images in rows for image in images)
    shown = _shown_side(side)
    font = ImageFont.load_default(_FONT_PX)
    label_width = max(round(font.getlength(name)) for name, _ in rows)
    num_columns = min(per_class, max(len(images) for _, images in rows))
    left = _MARGIN + label_width + _LABEL_GAP
    step = shown + _GAP
    sheet = Image.new(
        "RGB",
        (left + num_columns * step - _GAP + _MARGIN, 2 * _MARGIN + len(rows) * step - _GAP),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows):
        top = _MARGIN + row * step
        pen.text((left - _LABEL_GAP, top + shown / 2), name, fill=_INK, font=font, anchor="rm")
        for column, pixels in enumerate(images[:num_columns]):
            sheet.paste(_resized(pixels, shown), (left + column * step, top))
    return sheet


def _shown_side(side: int) -> int:
    if side >= _MIN_SIDE:
        return min(side, _MAX_SIDE)
    return side * -(-_MIN_SIDE // side)


def _resized(pixels: np.ndarray, shown: int) -> Image.Image:
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    kind = Image.Resampling.NEAREST if shown >= image.width else Image.Resampling.LANCZOS
    return image.resize((shown, shown), kind)
