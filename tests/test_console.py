from dataclasses import replace

import pytest

from pipeline.console import class_line, mixture_lines, time_line
from pipeline.manifest import committed_shards
from pipeline.storage import Storage
from tests.fake_shards import make_plan, write_dataset


def test_the_time_per_image_is_that_of_the_recorded_batches(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    (tmp_path / "scratch").mkdir()
    plan = write_dataset(storage, make_plan(), tmp_path / "scratch")
    records = committed_shards(storage, plan)
    batches = [batch for record in records.values() for batch in record.batches]
    images = sum(batch.stop - batch.start for batch in batches)
    per_image_ms = 1000 * sum(batch.sampling_s for batch in batches) / images
    shown = float(time_line(records).split("transformer ")[1].split(" ms")[0].replace(",", ""))
    assert images == plan.num_samples
    assert abs(shown - per_image_ms) <= 0.01 * per_image_ms + 0.5 * (per_image_ms >= 100)


def test_nothing_committed_has_no_time():
    assert time_line({}) == "nothing made yet"


def test_shards_of_other_library_versions_are_counted_and_named(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    (tmp_path / "scratch").mkdir()
    plan = write_dataset(storage, make_plan(), tmp_path / "scratch")
    records = committed_shards(storage, plan)
    assert mixture_lines(records.values()) == []
    records[1] = replace(records[1], environment={"torch": "3"})
    assert mixture_lines(records.values()) == ["torch: 2 in 2 shards (0, 2), 3 in 1 shard (1)"]


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({0: 5, 2: 5}, "classes   5 images each: 0 'a', 2 'ten\\nch'"),
        ({0: 5, 1: 1}, "classes   0 'a' x 5, 1 '2' x 1"),
        ({1: 1}, "classes   1 image each: 1 '2'"),
    ],
)
def test_every_class_is_shown_with_its_id_name_and_number_of_images(counts, line):
    assert class_line(make_plan(counts, class_names=("a", "2", "ten\nch"))) == line


def test_of_a_thousand_classes_the_first_and_the_last_are_shown():
    names = tuple(f"class {i}" for i in range(1000))
    line = class_line(make_plan({i: 1000 + i for i in range(1000)}, class_names=names))
    assert line.startswith("classes   0 'class 0' x 1,000, 1 'class 1' x 1,001, ")
    assert "4 'class 4' x 1,004, ... 990 more ..., 995 'class 995' x 1,995, " in line
    assert line.endswith("999 'class 999' x 1,999")
    assert len(line) < 400
