from dataclasses import replace

import pytest

from pipeline.run.console import (
    class_line,
    dataset_summary,
    environment_changes,
    human_bytes,
    missing_summary,
    mixture_lines,
    ranges,
    run_summary,
    time_line,
)
from pipeline.shards.committed import committed_shards, environments
from pipeline.shards.manifest import read_commit
from pipeline.storage import Storage
from tests.fake_shards import make_plan, write_dataset


def test_the_time_per_image_is_that_of_the_recorded_batches(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    (tmp_path / "scratch").mkdir()
    plan = write_dataset(storage, make_plan(), tmp_path / "scratch")
    records = committed_shards(storage, plan)
    read = [read_commit(storage, plan, shard_id) for shard_id in records]
    batches = [batch for record in read for batch in record.batches]
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
    records[1] = replace(records[1], environment='{"torch": "3"}')
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
    earlier = environments(committed_shards(storage, plan).values())
    same = {"torch": "2", "device": "cpu", "threads": "1"}
    assert environment_changes(earlier, same) == []
    assert environment_changes(earlier, {**same, "torch": "3", "pillow": "11"}) == [
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


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([7], "7"),
        ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"),
        (range(0, 24, 2), "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22"),
        (range(0, 28, 2), "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, and 2 more ranges"),
    ],
)
def test_shards_are_named_by_ranges_of_which_twelve_are_shown(numbers, text):
    assert ranges(numbers) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e6, "1.5 MB"), (2e9, "2.0 GB"),
     (3456e9, "3.5 TB"), (1e16, "10000.0 TB")],
)  # fmt: skip
def test_bytes_are_told_in_decimal_units(num_bytes, text):
    assert human_bytes(num_bytes) == text


def test_the_summary_of_a_dataset_tells_images_bytes_compute_and_place(tmp_path):
    plan = write_dataset(Storage.open(tmp_path / "out"), make_plan(), tmp_path / "scratch")
    records = committed_shards(Storage.open(tmp_path / "out"), plan)
    tar_bytes = sum(file.stat().st_size for file in (tmp_path / "out" / "train").iterdir())
    row_bytes = sum(file.stat().st_size for file in (tmp_path / "out" / "meta").iterdir())
    lines = dataset_summary(plan, records, "WHERE").splitlines()
    assert lines[:3] == [
        "dataset   22 images of 3 classes in 3 of 3 shards",
        f"bytes     {tar_bytes / 1000:.1f} kB of images, {row_bytes / 1000:.1f} kB of rows",
        (
            "compute   0.003 GFLOP per image, full depth 0.007: transformer 0.002 of 0.006, decoder"
            " 0.001; 34.0% of the token-layers"
        ),
    ]
    assert lines[-1] == "where     WHERE"
    records[1] = replace(records[1], num_blank=2)
    del records[2]
    assert dataset_summary(plan, records, "WHERE").splitlines()[0] == (
        "dataset   18 images of 3 classes in 2 of 3 shards, 2 blank, 0 duplicates"
    )


def test_the_phases_of_an_image_are_told_each_with_its_own_time(tmp_path):
    plan = write_dataset(Storage.open(tmp_path / "out"), make_plan(), tmp_path / "scratch")
    record = committed_shards(Storage.open(tmp_path / "out"), plan)[0]
    took = {"sampling_s": 1.5, "decoding_s": 0.25, "encoding_s": 0.0125}
    assert time_line({0: replace(record, num_samples=10, **took)}) == (
        "per image and worker: transformer 150 ms, decoder 25 ms, encoding 1.25 ms beside them"
    )


def test_a_run_of_no_time_has_no_rate():
    assert run_summary(0, 0.0, 3.0, ["cpu", "cpu"]).endswith(
        "0 images/s on 2 x cpu (ready after 3.0 s)"
    )


def test_who_stopped_a_job_reads_first_that_nothing_is_lost_and_last_how_to_go_on():
    lines = summary(interrupted=True).splitlines()
    assert lines == [
        "stopped as asked, 6 of 9 shards are done: committed shards are safe",
        "missing: 3 shards: 2-4",
        "run the same command again to make the rest",
    ]
    assert "run the same command again" not in summary(set_aside=[2, 3, 4])


def test_a_long_class_name_is_cut():
    name = "a" * 38
    assert class_line(make_plan({0: 1}, class_names=(name,))).endswith(f" 0 '{name}'")
    assert class_line(make_plan({0: 1}, class_names=(name + "b",))).endswith(f" 0 '{'a' * 36}...")
