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

from depthvar.errors import InputError
from pipeline.request.generation import GenerateConfig
from pipeline.run import ray_crew
from pipeline.run.driver import generate
from pipeline.shards.manifest import CommitRecord
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fakes import open_gate, set_faults, wait_at_gate
from tests.fault_hook import FAULTS_VARIABLE

NUM_SHARDS = 10
HEAD = {
    "num_cpus": 0,
    "include_dashboard": False,
    "_system_config": {"worker_niceness": 0},  # no slower than the test itself
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A head without resources. Tests hold batches at a gate while they change the cluster."""
    faults = tmp_path / "faults.json"
    set_faults(faults)
    os.environ[FAULTS_VARIABLE] = str(faults)
    nodes = Cluster(initialize_head=True, head_node_args=HEAD)
    yield nodes
    ray.shutdown()
    nodes.shutdown()
    del os.environ[FAULTS_VARIABLE]


@pytest.fixture
def start(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Callable[[], int]]:
    """Run a job of 10 shards in a thread; the function that waits for its exit code."""
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
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
    files = (tmp_path / "out" / "commits").glob("0*.json")
    found = [CommitRecord.from_json(f.read_bytes()) for f in sorted(files)]
    return [record for record in found if record is not None]


def worker_names(tmp_path: Path) -> dict[int, str]:
    return {record.shard_id: record.worker for record in records(tmp_path)}


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_what_no_node_can_run_is_refused_at_once_before_anything_is_written(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    cluster.add_node(num_cpus=2)
    out = tmp_path / "out"

    def refusal(**changes: Any) -> str:
        wanted = GenerateConfig(out=str(out), per_class=4, address=cluster.address, **changes)
        with pytest.raises(InputError) as caught:
            generate(wanted, sampler_factory=FAKE_SAMPLER)
        assert not out.exists()
        return str(caught.value)

    said = refusal(device="cuda")
    assert "a worker takes 1 GPU" in said
    assert "the largest of its 2 nodes has 0 and it has no autoscaler: choose --device cpu" in said
    said = refusal(threads_per_worker=3)
    assert "a worker takes 3 CPUs" in said
    assert "the largest of its 2 nodes has 2 and it has no autoscaler: lower --threads-per" in said
    monkeypatch.setattr("ray.__version__", "2.0.0")
    assert "a cluster of Ray 2." in refusal()
    assert "and this process has Ray 2.0.0: install the cluster's version" in refusal()
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {"ab" * 28})
    assert "a cluster that this machine is no node of" in refusal()


def test_a_job_says_what_it_waits_for_until_there_is_room(
    cluster: Cluster, start: Callable[..., Callable[[], int]], tmp_path: Path, capsys
):
    cluster.add_node(num_cpus=1)
    other: Any = ray.remote(Busy).options(num_cpus=1).remote()
    ray.get(other.answer.remote())
    begun_s = time.monotonic()
    wait = start(device="cpu")
    said = ""
    while "waiting for a worker to start: it takes 1 CPU, 0 of 1 CPUs in the cluster" not in said:
        said += capsys.readouterr().err
        assert time.monotonic() - begun_s < 20
        time.sleep(0.1)
    ray.kill(other)
    assert wait() == 0
    assert len(records(tmp_path)) == NUM_SHARDS


class Busy:
    """Another job's worker."""

    def answer(self) -> bool:
        return True


def drains_seen(monkeypatch: pytest.MonkeyPatch, told: Callable[[], frozenset[str]]) -> list[int]:
    """Let the driver hear of draining nodes from `told`; gains an element whenever it heard of one.

    It asks twice each time it looks at the nodes, the second time for the workers it has.
    """
    seen: list[int] = []

    def asked() -> frozenset[str]:
        nodes = told()
        seen.extend([1] if nodes else [])
        return nodes

    monkeypatch.setattr(ray_crew, "draining_nodes", asked)
    return seen


def test_a_node_that_dies_costs_no_attempt_and_one_that_joins_gets_work(
    cluster: Cluster, start: Callable[..., Callable[[], int]], tmp_path: Path, capsys
):
    gate = tmp_path / "gate"
    set_faults(tmp_path / "faults.json", gate=str(gate), gate_from=24)  # the last four shards
    first = cluster.add_node(num_cpus=1, num_gpus=1)
    cluster.add_node(num_cpus=1, num_gpus=1)
    wait = start(workers=3)  # one more than there is room for: it must not hold up the others
    before = wait_at_gate(gate, 2)
    assert len(records(tmp_path)) == 6
    cluster.remove_node(first, allow_graceful=False)
    cluster.add_node(num_cpus=1, num_gpus=1)
    (joined,) = set(wait_at_gate(gate, 3)) - set(before)
    open_gate(gate)
    assert wait() == 0, "with one attempt per shard a charge would have set the shard aside"
    assert len(records(tmp_path)) == NUM_SHARDS
    assert not (tmp_path / "out" / "commits" / "failures.jsonl").exists()
    assert joined in {name.rpartition(":")[2] for name in worker_names(tmp_path).values()}
    assert "room for 2 now" in capsys.readouterr().err


def drain_at_work(
    cluster: Cluster,
    start: Callable[..., Callable[[], int]],
    tmp_path: Path,
    seen: list[int],
    drain: Callable[[Any], object],
) -> None:
    """A job whose first node drains in the middle of its fourth shard finishes on another node."""
    gate = tmp_path / "gate"
    set_faults(tmp_path / "faults.json", gate=str(gate), gate_from=12)
    first = cluster.add_node(num_cpus=1, num_gpus=1)
    wait = start()
    (old,) = wait_at_gate(gate, 1)
    drain(first)
    cluster.add_node(num_cpus=1, num_gpus=1)
    wait_for(lambda: len(seen) >= 2)
    open_gate(gate)
    assert wait() == 0
    by_old = [i for i, name in worker_names(tmp_path).items() if name.endswith(f":{old}")]
    assert by_old == [0, 1, 2, 3], "it finishes the shard it has, and gets no other"
    assert not (tmp_path / "out" / "commits" / "failures.jsonl").exists()


def test_a_draining_node_gets_no_new_shards(
    cluster: Cluster,
    start: Callable[..., Callable[[], int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    draining: set[str] = set()
    seen = drains_seen(monkeypatch, lambda: frozenset(draining))
    drain_at_work(cluster, start, tmp_path, seen, lambda node: draining.add(node.node_id))


def test_every_worker_of_a_node_has_a_gpu_of_its_own(
    cluster: Cluster, start: Callable[..., Callable[[], int]], tmp_path: Path
):
    gate = tmp_path / "gate"
    set_faults(tmp_path / "faults.json", gate=str(gate), gpus=str(tmp_path / "gpus"))
    cluster.add_node(num_cpus=2, num_gpus=2)
    wait = start()
    wait_at_gate(gate, 2)
    open_gate(gate)
    assert wait() == 0
    ids = [line.split()[1] for line in (tmp_path / "gpus").read_text().splitlines()]
    assert sorted(ids) == ["0", "1"]
    assert len(set(worker_names(tmp_path).values())) == 2


def test_a_node_that_ray_drains_gets_no_new_shards_and_charges_nothing(
    cluster: Cluster,
    start: Callable[..., Callable[[], int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def drain(node: Any) -> None:
        words = "drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot"
        argv = [*words.split(), "--address", cluster.address, "--node-id", node.node_id]
        command = [sys.executable, "-m", "ray.scripts.scripts", *argv]
        told = subprocess.run(
            [*command, "--deadline-remaining-seconds", "300"], capture_output=True, text=True
        )
        assert told.returncode == 0, told.stderr

    seen = drains_seen(monkeypatch, ray_crew.draining_nodes)
    drain_at_work(cluster, start, tmp_path, seen, drain)
