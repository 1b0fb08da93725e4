"""Several nodes with GPUs that are only numbers: nodes that die, drain and join."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline import driver
from pipeline.config import GenerateConfig
from pipeline.driver import generate
from pipeline.manifest import CommitRecord
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fakes import FAULTS_VARIABLE, set_faults

NUM_SHARDS = 10


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A head without resources; slow batches, so that there is time for things to happen."""
    faults = tmp_path / "faults.json"
    set_faults(faults, batch_s=0.2)
    os.environ[FAULTS_VARIABLE] = str(faults)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    yield nodes
    ray.shutdown()
    nodes.shutdown()
    del os.environ[FAULTS_VARIABLE]


@pytest.fixture
def start(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Callable[[], int]]:
    """Run a job of 10 shards in a thread; the function that waits for its exit code."""
    monkeypatch.setattr("pipeline.config.identify_weights", fake_weights)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")

    def start(**changes: Any) -> Callable[[], int]:
        config = GenerateConfig(
            out=str(tmp_path / "out"),
            per_class=4,
            samples_per_shard=4,
            batch_size=1,
            address=cluster.address,
            max_attempts=1,
            **changes,
        )
        codes: list[int] = []
        thread = threading.Thread(
            target=lambda: codes.append(generate(config, sampler_factory=FAKE_SAMPLER))
        )
        thread.start()

        def wait() -> int:
            thread.join(timeout=120)
            return codes[0]

        return wait

    return start


def records(tmp_path: Path) -> list[CommitRecord]:
    files = (tmp_path / "out" / "meta").glob("0*.json")
    found = [CommitRecord.from_json(f.read_bytes()) for f in sorted(files)]
    return [record for record in found if record is not None]


def wait_for(tmp_path: Path, num_shards: int) -> None:
    deadline_s = time.monotonic() + 60
    while len(records(tmp_path)) < num_shards:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_node_that_dies_costs_no_attempt_and_one_that_joins_gets_work(
    cluster: Cluster, start: Callable[..., Callable[[], int]], tmp_path: Path, capsys
):
    first = cluster.add_node(num_cpus=1, num_gpus=1)
    cluster.add_node(num_cpus=1, num_gpus=1)
    wait = start(workers=3)  # one more than there is room for: it must not hold up the others
    wait_for(tmp_path, 2)
    before = {record.worker for record in records(tmp_path)}
    cluster.remove_node(first, allow_graceful=False)
    cluster.add_node(num_cpus=1, num_gpus=1)
    assert wait() == 0, "with one attempt per shard a charge would have set the shard aside"
    assert len(records(tmp_path)) == NUM_SHARDS
    assert not (tmp_path / "out" / "meta" / "failures.jsonl").exists()
    assert {record.worker for record in records(tmp_path)} - before
    said = capsys.readouterr().err
    assert "room for 2 now" in said


def test_a_draining_node_gets_no_new_shards(
    cluster: Cluster,
    start: Callable[..., Callable[[], int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    draining: set[str] = set()
    monkeypatch.setattr(driver, "_draining_nodes", lambda: frozenset(draining))
    hired: list[tuple[str, str]] = []
    welcome = driver.RayCrew._welcome
    monkeypatch.setattr(
        driver.RayCrew, "_welcome", lambda self, *a: (hired.append(a[0].name), welcome(self, *a))
    )
    first = cluster.add_node(num_cpus=1, num_gpus=1)
    wait = start()
    wait_for(tmp_path, 2)
    (old,) = {record.worker for record in records(tmp_path)}
    draining.add(first.node_id)
    cluster.add_node(num_cpus=1, num_gpus=1)
    assert wait() == 0
    by_old = [record.shard_id for record in records(tmp_path) if record.worker == old]
    assert len(by_old) <= 4
    assert len(hired) >= 2


def test_every_worker_of_a_node_has_a_gpu_of_its_own(
    cluster: Cluster, start: Callable[..., Callable[[], int]], tmp_path: Path
):
    set_faults(tmp_path / "faults.json", batch_s=0.1, gpus=str(tmp_path / "gpus"))
    cluster.add_node(num_cpus=2, num_gpus=2)
    assert start()() == 0
    ids = [line.split()[1] for line in (tmp_path / "gpus").read_text().splitlines()]
    assert sorted(ids) == ["0", "1"]
    assert len({record.worker for record in records(tmp_path)}) == 2


def test_a_node_that_ray_drains_gets_no_new_shards_and_charges_nothing(
    cluster: Cluster, start: Callable[..., Callable[[], int]], tmp_path: Path
):
    first = cluster.add_node(num_cpus=1, num_gpus=1)
    wait = start()
    wait_for(tmp_path, 2)
    (old,) = {record.worker for record in records(tmp_path)}
    drain = "drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot"
    argv = [*drain.split(), "--address", cluster.address, "--node-id", first.node_id]
    command = [sys.executable, "-m", "ray.scripts.scripts", *argv]
    told = subprocess.run(
        [*command, "--deadline-remaining-seconds", "300"], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    drained_at = len(records(tmp_path))
    cluster.add_node(num_cpus=1, num_gpus=1)
    assert wait() == 0
    by_old = [record.shard_id for record in records(tmp_path) if record.worker == old]
    assert len(by_old) <= drained_at + 3
    assert len(by_old) < NUM_SHARDS
    assert not (tmp_path / "out" / "meta" / "failures.jsonl").exists()
