"""Several nodes with GPUs that are only numbers: nodes that die, drain and join."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2

from depthvar.config import MODELS
from depthvar.errors import InputError
from depthvar.memory import CUDA_BYTES, memory_need
from depthvar.plan import DepthPlan
from pipeline.request.generation import GenerateConfig
from pipeline.request.job_plan import JobPlan
from pipeline.run import cluster, ray_crew
from pipeline.run.driver import generate
from pipeline.shards.manifest import CommitRecord
from pipeline.storage import Storage
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fakes import open_gate, set_faults, wait_at_gate, wait_for, without_torch
from tests.fault_hook import FAULTS_VARIABLE
from tests.small_ray import small_head, without_metrics

NUM_SHARDS = 10
HEAD = {
    "num_cpus": 2,
    "_system_config": {
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 10,
    },
}


ONE_GPU = {"num_cpus": 1, "num_gpus": 1}


class Nodes:
    """A head with two CPUs for all tests of the file, and the nodes that a test asks for.

    `faults` is the file of its workers' faults. Tests hold batches at a gate while they change the
    cluster.
    """

    def __init__(self, faults: Path) -> None:
        self.faults = faults
        self.cluster = small_head(**HEAD)
        self.alive: list[tuple[dict[str, int], Any]] = []

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def become(self, *wanted: dict[str, int]) -> None:
        """Have exactly these nodes beside the head: those that are there stay, others go."""
        missing = list(wanted)
        for resources, node in list(self.alive):
            if resources in missing:
                missing.remove(resources)
            else:
                self.remove(node)
        for resources in missing:
            self.add(**resources)

    def add(self, **resources: int) -> Any:
        try:
            node = self.cluster.add_node(**resources)
        except Exception as error:  # Ray gives it half a minute, and says so by nothing narrower
            if "timed out during startup" not in str(error):
                raise
            node = self.cluster.add_node(**resources)
        self.alive.append((resources, node))
        return node

    def remove(self, node: Any, *, allow_graceful: bool = True) -> None:
        self.alive = [(resources, other) for resources, other in self.alive if other is not node]
        self.cluster.remove_node(node, allow_graceful=allow_graceful)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    faults = tmp_path_factory.mktemp("faults") / "faults.json"
    set_faults(faults)
    nvidia_smi = faults.with_name("nvidia-smi")
    nvidia_smi.write_text("#!/bin/sh\necho 24576\necho 700\n")
    nvidia_smi.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(nvidia_smi.parent), prepend=os.pathsep)
        patch.setenv(FAULTS_VARIABLE, str(faults))
        patch.setenv("PYTHONPATH", without_torch())
        with without_metrics():
            nodes = Nodes(faults)
            yield nodes
            ray.shutdown()
            nodes.cluster.shutdown()


@pytest.fixture
def nodes(started: Nodes, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    monkeypatch.setattr(cluster, "_PROBE_S", 60.0)
    monkeypatch.setattr(cluster, "_ASK_S", 150.0)
    set_faults(started.faults)
    return started


@pytest.fixture
def start(nodes: Nodes, tmp_path: Path) -> Callable[..., Callable[[], int]]:
    """Run a job of 10 shards in a thread; the function that waits for its exit code."""
    if not ray.is_initialized():
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")

    def start(**changes: Any) -> Callable[[], int]:
        config = GenerateConfig(
            out=str(tmp_path / "out"),
            per_class=4,
            samples_per_shard=4,
            batch_size=1,
            address=nodes.address,
            max_attempts=1,
            contact_sheet=0,
            **changes,
        )
        codes: list[int] = []
        thread = threading.Thread(
            target=lambda: codes.append(generate(config, sampler_factory=FAKE_SAMPLER))
        )
        thread.start()

        def wait() -> int:
            thread.join(timeout=120)
            assert not thread.is_alive(), "the job did not end"
            return codes[0]

        return wait

    return start


def records(tmp_path: Path) -> list[CommitRecord]:
    files = (tmp_path / "out" / "commits").glob("0*.json")
    found = [CommitRecord.from_json(f.read_bytes()) for f in sorted(files)]
    return [record for record in found if record is not None]


def worker_names(tmp_path: Path) -> dict[int, str]:
    return {record.shard_id: record.worker for record in records(tmp_path)}


def test_what_no_node_can_run_is_refused_at_once_before_anything_is_written(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nodes.become()
    out = tmp_path / "out"

    def refusal(**changes: Any) -> str:
        wanted = GenerateConfig(out=str(out), per_class=4, address=nodes.address, **changes)
        with pytest.raises(InputError) as caught:
            generate(wanted, sampler_factory=FAKE_SAMPLER)
        assert not out.exists()
        return str(caught.value)

    said = refusal(device="cuda")
    assert "a worker takes 1 GPU" in said
    assert "the largest of its 1 nodes has 0 GPUs and it has no autoscaler: choose --device" in said
    said = refusal(threads_per_worker=3)
    assert "a worker takes 3 CPUs" in said
    assert "the largest of its 1 nodes has 2 CPUs and it has no autoscaler: lower --threads" in said
    with monkeypatch.context() as patch:
        patch.setattr("ray.__version__", "2.0.0")
        assert "a cluster of Ray 2." in refusal()
        assert "and this process has Ray 2.0.0: install the cluster's version" in refusal()
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {"ab" * 28})
    assert "a cluster that this machine is no node of" in refusal()


def test_precision_and_batch_suit_what_the_nodes_tell_of_their_gpus(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    nodes.become(ONE_GPU)
    planned: list[JobPlan] = []

    def refuse(storage: Storage, plan: JobPlan, **_: object) -> JobPlan:
        planned.append(plan)
        raise InputError("no plan today")

    monkeypatch.setattr("pipeline.run.driver.open_plan", refuse)
    asked = {"out": str(tmp_path / "out"), "per_class": 100, "address": nodes.address}
    wide: dict[str, Any] = {"precision": "float32"}
    for changes in (wide, {**wide, "kernels": "plain"}, {**wide, "batch_size": 50}, {}):
        with pytest.raises(InputError, match="no plan today"):
            generate(GenerateConfig(**asked, **changes), sampler_factory=FAKE_SAMPLER)
    recorded, plain, given, _ = (plan.batch_size for plan in planned)
    assert [plan.precision for plan in planned] == ["float32"] * 3 + ["float16"]
    digits = MODELS["digits"]
    depth = DepthPlan.build(digits.grids, digits.num_blocks, planned[0].runnable_policy)

    def takes(batch: int, times: int) -> int:
        need = memory_need(digits, depth, batch_size=batch, streams=2, precision="float32")
        return need.weights + times * (need.peak - need.weights)

    room = 700 * 2**20 - CUDA_BYTES
    assert takes(recorded, 2) <= room < takes(recorded + 1, 2)
    assert room > takes(50, 1)
    assert (plain, given) == (50, 50)


def test_a_job_says_what_it_waits_for_until_there_is_room(
    nodes: Nodes, start: Callable[..., Callable[[], int]], tmp_path: Path, capsys
):
    nodes.become()
    other: Any = ray.remote(Busy).options(num_cpus=2).remote()
    ray.get(other.answer.remote())
    begun_s = time.monotonic()
    wait = start(device="cpu")
    said = ""
    while "waiting for a worker to start: it takes 1 CPU, 0 of 2 CPUs in the cluster" not in said:
        said += capsys.readouterr().err
        assert time.monotonic() - begun_s < 150
        time.sleep(0.1)
    ray.kill(other)
    assert wait() == 0
    assert len(records(tmp_path)) == NUM_SHARDS


class Busy:
    """Another job's worker."""

    def answer(self) -> bool:
        return True


def test_every_worker_of_a_node_has_a_gpu_of_its_own(
    nodes: Nodes, start: Callable[..., Callable[[], int]], tmp_path: Path
):
    gate = tmp_path / "gate"
    set_faults(nodes.faults, gate=str(gate), gpus=str(tmp_path / "gpus"))
    nodes.become({"num_cpus": 2, "num_gpus": 2})
    wait = start()
    wait_at_gate(gate, 2)
    open_gate(gate)
    assert wait() == 0
    ids = [line.split()[1] for line in (tmp_path / "gpus").read_text().splitlines()]
    assert sorted(ids) == ["0", "1"]
    assert len(set(worker_names(tmp_path).values())) == 2


def test_a_node_that_dies_costs_no_attempt_and_one_that_joins_gets_work(
    nodes: Nodes, start: Callable[..., Callable[[], int]], tmp_path: Path, capsys
):
    gate = tmp_path / "gate"
    set_faults(nodes.faults, gate=str(gate), gate_from=24)  # the last four shards
    nodes.become(ONE_GPU, ONE_GPU)
    wait = start(workers=3)  # one more than there is room for: it must not hold up the others
    before = wait_at_gate(gate, 2)
    wait_for(lambda: len(records(tmp_path)) == 6)
    nodes.remove(nodes.alive[0][1], allow_graceful=False)
    nodes.add(**ONE_GPU)
    (joined,) = set(wait_at_gate(gate, 3)) - set(before)
    open_gate(gate)
    assert wait() == 0, "with one attempt per shard a charge would have set the shard aside"
    assert len(records(tmp_path)) == NUM_SHARDS
    assert not (tmp_path / "out" / "commits" / "failures.jsonl").exists()
    assert joined in {name.rpartition(":")[2] for name in worker_names(tmp_path).values()}
    assert "room for 2 now" in capsys.readouterr().err


def test_a_node_that_ray_drains_gets_no_new_shards_and_charges_nothing(
    nodes: Nodes,
    start: Callable[..., Callable[[], int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Its worker finishes the shard it is in the middle of, and another node makes the rest."""
    seen = drains_seen(monkeypatch)
    gate = tmp_path / "gate"
    set_faults(nodes.faults, gate=str(gate), gate_from=12)
    nodes.become(ONE_GPU)
    wait = start()
    (old,) = wait_at_gate(gate, 1)
    drain(nodes.alive[0][1], nodes.address)
    nodes.add(**ONE_GPU)
    wait_for(lambda: len(seen) >= 2)
    open_gate(gate)
    assert wait() == 0
    by_old = [i for i, name in worker_names(tmp_path).items() if name.endswith(f":{old}")]
    assert by_old == [0, 1, 2, 3], "it finishes the shard it has, and gets no other"
    assert not (tmp_path / "out" / "commits" / "failures.jsonl").exists()


def drain(node: Any, address: str) -> None:
    """Tell Ray that a node goes away within five minutes, as `ray drain-node` does."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(1000 * (time.time() + 300))
    gcs = GcsClient(address=address)
    accepted, why = gcs.drain_node(node.node_id, reason, "spot", deadline_ms)
    assert accepted, why


def drains_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gains an element whenever the driver has heard of a draining node.

    It asks twice each time it looks at the nodes, the second time for the workers it has.
    """
    seen: list[int] = []
    told = ray_crew.draining_nodes

    def asked() -> frozenset[str]:
        found = told()
        seen.extend([1] if found else [])
        return found

    monkeypatch.setattr(ray_crew, "draining_nodes", asked)
    return seen
