from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.run import keeping
from pipeline.run.keeping import SummaryKeeper
from pipeline.run.progress import Tally
from pipeline.run.schedule import ShardQueue
from pipeline.shards import committed
from pipeline.shards.committed import committed_shards
from pipeline.shards.manifest import SUMMARIES_NAME
from pipeline.storage import Storage
from tests.fake_shards import make_plan
from tests.measure_scale import files_read, many_shards


def test_summaries_are_written_as_a_run_begins_and_with_every_twentieth_more(monkeypatch):
    plan, kept = make_plan(), []
    monkeypatch.setattr(keeping, "FEWEST_KEPT", 10)
    monkeypatch.setattr(keeping, "keep_summaries", lambda *_: kept.append(tally.shards))
    tally = Tally(plan, ShardQueue([], 1), shards_before=400)
    keeper = SummaryKeeper(Storage.open("nowhere"), plan)
    for tally.shards in range(64):
        with keeper:  # waits for what was begun
            keeper.show(tally)
    assert kept == [0, 21, 43], "20 of 400 are too few where there are 420, 21 are not"


def test_of_few_shards_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(keeping, "keep_summaries", None)
    tally = Tally(make_plan(), ShardQueue([], 1), shards_before=900, shards=99)
    with SummaryKeeper(Storage.open("nowhere"), make_plan()) as keeper:
        keeper.show(tally)


def test_whoever_resumes_a_killed_run_reads_no_record_that_was_kept(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(keeping, "FEWEST_KEPT", 2)
    monkeypatch.setattr(committed, "FEWEST_KEPT", 2)
    plan, storage = many_shards(tmp_path / "out", 4, num_missing=1), Storage.open(tmp_path / "out")
    with SummaryKeeper(storage, plan) as keeper:
        keeper.show(Tally(plan, ShardQueue([3], 1), shards_before=3))
    with files_read() as names:
        assert list(committed_shards(storage, plan)) == [0, 1, 2]
    assert names == [SUMMARIES_NAME]


def test_a_storage_that_does_not_answer_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("timed out")

    monkeypatch.setattr(keeping, "keep_summaries", fail)
    errors: list[object] = []
    monkeypatch.setattr(keeping.threading, "excepthook", errors.append)
    with SummaryKeeper(Storage.open("nowhere"), make_plan()) as keeper:
        keeper.show(Tally(make_plan(), ShardQueue([], 1), shards_before=2_000))
    assert errors == []
