from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.dataset.contact_sheet import (
    draw_sheet,
    first_images,
    shown_subjects,
    write_contact_sheet,
)
from pipeline.dataset.loader import iterate_samples, open_dataset
from pipeline.shards.manifest import CONTACT_SHEET_NAME
from pipeline.storage import Storage
from tests.fake_shards import make_plan, write_dataset


def grey(value: int, side: int, channels: int = 1) -> np.ndarray:
    return np.full((side, side, channels), value, dtype=np.uint8)


def ink_box(sheet: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom white margins, in pixels."""
    dark = np.asarray(sheet.convert("L")) < 250
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    height, width = dark.shape
    return columns[0], rows[0], width - 1 - columns[-1], height - 1 - rows[-1]


def test_the_margins_are_even_whatever_the_names():
    for names in (("one", "seventy-seven"), ("a", "b"), ("tench", "English springer spaniel")):
        rows = [(name, [grey(0, 32)] * 5) for name in names]
        left, top, right, bottom = ink_box(draw_sheet(rows, 5))
        assert top == right == bottom
        assert abs(left - right) <= 3, "text has a bearing of its own"


def test_small_images_grow_pixel_by_pixel_and_large_ones_shrink():
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 1), dtype=np.uint8)
    sheet = np.asarray(draw_sheet([("x", [noise])], 1).convert("L"))
    grown = noise[:, :, 0].repeat(3, axis=0).repeat(3, axis=1)
    assert (sheet[32:-32, -32 - 84 : -32] == grown).all()
    large = draw_sheet([("x", [grey(9, 512, 3)])], 1)
    assert large.height == 32 + 128 + 32


def test_rows_and_columns_are_in_order_and_no_wider_than_the_images():
    rows = [("a", [grey(0, 64), grey(50, 64)]), ("b", [grey(100, 64), grey(150, 64)])]
    sheet = np.asarray(draw_sheet(rows, 5).convert("L"))
    tops, lefts = (32 + 32, 32 + 70 + 32), (-32 - 70 - 32, -32 - 32)
    assert [sheet[top, left] for top in tops for left in lefts] == [0, 50, 100, 150]


def test_a_class_with_few_images_leaves_the_rest_of_its_row_white():
    sheet = np.asarray(draw_sheet([("a", [grey(0, 64)] * 3), ("b", [grey(0, 64)])], 3))
    assert (sheet[32 + 64 + 6 : -32, -32 - 64 :] == 255).all()


def test_at_most_forty_subjects_are_shown_evenly_chosen():
    assert shown_subjects(range(40)) == tuple(range(40))
    assert len(set(shown_subjects(range(41)))) == 40
    chosen = shown_subjects(range(7, 3007, 3))
    assert (chosen[0], chosen[-1]) == (7, 3004)
    assert set(np.diff(chosen)) == {3 * 25, 3 * 26}


def test_the_sheet_shows_the_first_images_of_each_class_read_back(tmp_path: Path):
    storage = Storage.open(tmp_path / "data")
    write_dataset(storage, make_plan(), tmp_path / "scratch")
    dataset = open_dataset(str(tmp_path / "data"))
    class_ids = dataset.plan.total_counts.class_ids
    found = first_images(dataset, class_ids, 2)
    for class_id in class_ids:
        wanted = [s.image for s in iterate_samples(dataset) if s.label == class_id][:2]
        assert len(found[class_id]) == len(wanted) > 0
        assert all((a == b).all() for a, b in zip(found[class_id], wanted, strict=True))
    write_contact_sheet(dataset, 2)
    first = storage.read(CONTACT_SHEET_NAME)
    names = dataset.plan.class_names
    wanted = draw_sheet([(names[class_id], found[class_id]) for class_id in class_ids], 2)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first))), np.asarray(wanted))
    write_contact_sheet(dataset, 2)
    assert storage.read(CONTACT_SHEET_NAME) == first
