"""One process without Ray: the next shard is begun before the one before is committed."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.request.generation import GenerateConfig
from pipeline.request.job_plan import JobPlan
from pipeline.run.driver import generate
from pipeline.shards.manifest import BuiltShard, CommitRecord, publish_shard
from pipeline.shards.writer import ShardWriter
from pipeline.storage import Storage
from tests.fake_job import FAKE_SAMPLER, fake_weights

NUM_SHARDS = 5


class Overlap:
    """Publishing shard 0 fails, the first time, after shard 1 is begun and before it ends."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.begun, self.failed = threading.Event(), threading.Event()
        self.published: list[int] = []

    def act_out(self, faults: object, indices: range) -> None:
        if indices[0] == 4:  # the first batch of shard 1
            self.begun.set()
        if indices[0] == 6:  # its second and last one
            assert self.failed.wait(60)

    def publish(
        self, storage: Storage, plan: JobPlan, built: BuiltShard, record: CommitRecord
    ) -> None:
        if built.shard_id == 0 and not self.failed.is_set():
            assert self.begun.wait(60), "shard 1 waits for the commit of shard 0"
            self.failed.set()
            raise self.error
        publish_shard(storage, plan, built, record)
        self.published.append(built.shard_id)


def run(out: Path, **changes: Any) -> int:
    """20 images in 5 shards of 4, batches of 2."""
    settings = {"per_class": 2, "samples_per_shard": 4, "batch_size": 2, "contact_sheet": 0}
    config = GenerateConfig(out=str(out), workers=0, device="cpu", **{**settings, **changes})
    return generate(config, sampler_factory=FAKE_SAMPLER)


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> Any:
    def patch(error: Exception) -> Overlap:
        overlap = Overlap(error)
        monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
        monkeypatch.setattr("tests.fakes._act_out", overlap.act_out)
        monkeypatch.setattr("pipeline.run.worker.publish_shard", overlap.publish)
        return overlap

    return patch


def test_a_worker_has_an_encoder_for_each_of_its_cpus_or_as_many_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told: list[int] = []

    class Writer(ShardWriter):
        def __init__(self, *arguments: Any, threads: int) -> None:
            told.append(threads)
            super().__init__(*arguments, threads=threads)

    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    monkeypatch.setattr("pipeline.run.cluster.available_cores", lambda: 3)
    monkeypatch.setattr("pipeline.run.worker.ShardWriter", Writer)
    assert run(tmp_path / "a", per_class=1) == 0
    assert run(tmp_path / "b", per_class=1, encode_threads=2) == 0
    assert told == [3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize(
    ("error", "cause"),
    [(RuntimeError("no luck"), "shard"), (OSError("no room"), "storage")],
)
def test_a_shard_that_cannot_be_published_is_charged_while_the_next_one_goes_on(
    error: Exception, cause: str, overlapping: Any, tmp_path: Path
):
    out, overlap = tmp_path / "out", overlapping(error)
    assert run(out) == 0
    (entry,) = map(json.loads, (out / "commits" / "failures.jsonl").read_text().splitlines())
    assert (entry["shard_id"], entry["attempt"], entry["cause"]) == (0, 1, cause)
    assert entry["error"] == f"{type(error).__name__}: {error}"
    assert "in publish" in entry["traceback"]
    assert sorted(overlap.published) == list(range(NUM_SHARDS))
    assert overlap.published[0] == 1
    records = [json.loads(f.read_text()) for f in sorted((out / "commits").glob("0*.json"))]
    assert [record["attempt"] for record in records] == [2, 1, 1, 1, 1]


def test_a_job_that_gives_up_drops_what_it_samples_and_hears_the_rest_out(
    overlapping: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr("pipeline.run.ledger._MAX_STORAGE_FAILURES", 1)
    overlap = overlapping(OSError("no room"))
    assert run(tmp_path / "out") == 1
    assert "1 shards in a row could not be stored" in capsys.readouterr().err
    assert overlap.published in ([], [1]), "no further one was begun"
