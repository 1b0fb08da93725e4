from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from pipeline.dataset.report.progress import Timeline, stage_seconds, worker_lines
from pipeline.shards.committed import ShardSummary
from pipeline.shards.manifest import FileEntry, ShardFiles

START = datetime(2026, 1, 2, tzinfo=UTC)


def record(
    shard_id: int, committed_s: float, making_s: float, *, worker: str = "a:1", images: int = 60
) -> ShardSummary:
    """A shard that took `making_s` and was committed so long after the start."""
    entry = FileEntry("x", 1, "ab" * 32)
    return ShardSummary(
        shard_id=shard_id,
        fingerprint="ab" * 32,
        num_samples=images,
        num_blank=0,
        num_duplicates=0,
        files=ShardFiles(entry, entry),
        attempt=1,
        worker=worker,
        device="cpu",
        threads=1,
        environment="{}",
        committed_at=(START + timedelta(seconds=committed_s)).isoformat(),
        sampling_s=0.75 * making_s,
        decoding_s=0.25 * making_s,
        encoding_s=0.1 * making_s,
    )


def test_a_shards_images_are_spread_over_the_time_it_took():
    """Two workers at 60 images in 60 s and in 30 s: 1/s, from the half on 3/s."""
    timeline = Timeline.of([record(0, 60, 60), record(1, 60, 30, worker="b:1")])
    assert timeline.edges_s[[0, 30, 60]].tolist() == [0, 30, 60]
    np.testing.assert_allclose(timeline.rate[:30], 1)
    np.testing.assert_allclose(timeline.rate[30:], 3)
    assert (timeline.started, timeline.ended) == (START, START + timedelta(seconds=60))
    assert timeline.pauses == []


def test_long_pauses_are_cut_out_and_short_ones_stay():
    """60 s of work, 30 s of nothing, 60 s of work, a day of nothing, 60 s of work."""
    records = [record(0, 60, 60), record(1, 150, 60), record(2, 150 + 86400 + 60, 60)]
    timeline = Timeline.of(records)
    assert timeline.working_s == pytest.approx(210)
    assert timeline.pauses == [(pytest.approx(150), pytest.approx(86400))]
    mass = timeline.rate * np.diff(timeline.edges_s)
    assert mass.sum() == pytest.approx(180)
    between = (timeline.edges_s[:-1] > 60) & (timeline.edges_s[1:] < 90)
    assert between.any()
    np.testing.assert_allclose(timeline.rate[between], 0, atol=1e-9)
    assert timeline.place(START + timedelta(seconds=100)) == pytest.approx(100)
    assert timeline.place(START + timedelta(hours=3)) == pytest.approx(150)
    assert timeline.place(START + timedelta(seconds=150 + 86400 + 10)) == pytest.approx(160)


def test_workers_stand_in_the_order_of_their_first_commits():
    records = [
        record(0, 100, 20, worker="late:2"),
        record(1, 50, 30, worker="early:1"),
        record(2, 120, 30, worker="early:1", images=30),
    ]
    early, late = worker_lines(records)
    assert (early.name, early.num_shards, early.num_images) == ("early:1", 2, 90)
    assert early.images_per_s == pytest.approx(90 / 60)
    assert early.last_commit.startswith("2026-01-02T00:02:00")
    assert (late.name, late.images_per_s) == ("late:2", pytest.approx(3))


def test_stages_are_means_over_the_images():
    stages = stage_seconds([record(0, 60, 60), record(1, 90, 30, images=30)])
    assert stages == pytest.approx({"sampling": 0.75, "decoding": 0.25, "encoding": 0.1})
