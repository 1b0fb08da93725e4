from dataclasses import replace

from pipeline.console import mixture_lines, time_line
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
