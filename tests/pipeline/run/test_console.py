from dataclasses import replace

import pytest

from pipeline.run.console import (
    class_line,
    environment_changes,
    missing_summary,
    mixture_lines,
    run_summary,
    time_line,
)
from pipeline.shards.manifest import committed_shards
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


def test_what_a_run_changes_of_the_environment_is_named_with_the_shards_made_before(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    (tmp_path / "scratch").mkdir()
    plan = write_dataset(storage, make_plan(), tmp_path / "scratch")
    records = committed_shards(storage, plan).values()
    same = {"torch": "2", "device": "cpu", "threads": "1"}
    assert environment_changes(records, same) == []
    assert environment_changes(records, {**same, "torch": "3", "pillow": "11"}) == [
        "pillow: none in 3 shards (0-2), this run has 11",
        "torch: 2 in 3 shards (0-2), this run has 3",
    ]


def test_a_slow_run_has_a_rate():
    assert ", 0.0208 images/s on 1 x cpu" in run_summary(1, 48.0, 3.0, ["cpu"])


def summary(**changes) -> str:
    how = {"num_shards": 9, "interrupted": False, **changes}
    return missing_summary([2, 3, 4], how.pop("set_aside", []), "LEDGER", **how)


def test_what_could_not_be_stored_wants_no_flag_to_be_tried_again():
    text = summary(unstored=[3])
    assert "could not be stored: 3: see LEDGER" in text
    assert "run the same command again" in text
    assert "--retry-failed" not in text
    assert "set aside" not in text
    assert "--retry-failed" in summary(set_aside=[2], unstored=[3])


def test_what_ran_out_of_memory_is_told_what_another_batch_needs():
    text = summary(set_aside=[2, 3, 4], too_large_batch=50)
    assert "if memory ran out at --batch-size 50: fewer --workers" in text
    assert "a smaller batch needs another --out" in text
    assert "delete what is here" not in text
    assert "delete what is here" in summary(num_shards=3, set_aside=[2, 3], too_large_batch=50)
