from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from depthvar.errors import InputError
from depthvar.memory import CUDA_BYTES, HEAP_SLACK, LIBRARY_BYTES, PROCESS_BYTES
from pipeline.request.generation import Device, GenerateConfig
from pipeline.run.schedule import (
    Assignment,
    InHand,
    Machine,
    ShardQueue,
    WorkerShape,
    available_cores,
    available_memory,
    gpu_memory,
    num_slots,
    require_fit,
    require_slots,
    takes_more,
    worker_room,
    worker_shape,
)


def test_shards_come_once_each_in_order():
    queue = ShardQueue([4, 7, 9], max_attempts=3)
    assert [queue.take(), queue.take(), queue.take(), queue.take()] == [
        Assignment(4, 1),
        Assignment(7, 1),
        Assignment(9, 1),
        None,
    ]
    assert not queue.finished
    for shard_id in (9, 4, 7):
        queue.done(shard_id)
    assert queue.finished
    assert queue.set_aside == ()


def test_a_failing_shard_is_set_aside_after_exactly_max_attempts_and_the_others_go_first():
    queue = ShardQueue([0, 1, 2], max_attempts=3)
    started = []
    while (assignment := queue.take()) is not None:
        started.append((assignment.shard_id, assignment.attempt))
        if assignment.shard_id == 0:
            queue.failed(0)
        else:
            queue.done(assignment.shard_id)
    assert started == [(0, 1), (1, 1), (2, 1), (0, 2), (0, 3)]
    assert queue.finished
    assert queue.set_aside == (0,)


def test_a_lost_worker_costs_no_attempt_and_its_shard_is_next():
    queue = ShardQueue([0, 1], max_attempts=1)
    for attempt in range(1, 50):
        assert queue.take() == Assignment(0, attempt)
        queue.lost(0)
        assert queue.num_open == 2
    assert queue.failures(0) == 0
    assert queue.set_aside == ()


def test_a_refund_brings_a_shard_back_that_was_set_aside():
    queue = ShardQueue([3], max_attempts=1)
    queue.take()
    assert queue.failed(3)
    assert queue.finished
    queue.refund(3)
    assert queue.set_aside == ()
    assert queue.failures(3) == 0
    assert queue.take() == Assignment(3, 2)


def test_a_refund_takes_one_charge_back_and_starts_no_shard_twice():
    queue = ShardQueue([3], max_attempts=4)
    for _ in range(2):
        queue.take()
        assert not queue.failed(3)
    queue.refund(3)
    assert queue.failures(3) == 1
    for _ in range(2):
        queue.refund(3)
    assert queue.failures(3) == 0, "never below"
    assert queue.take() == Assignment(3, 3)
    assert queue.take() is None


def test_shards_set_aside_are_told_in_order():
    queue = ShardQueue([8, 1, 0], max_attempts=1)
    while (assignment := queue.take()) is not None:
        queue.failed(assignment.shard_id)
    assert queue.set_aside == (0, 1, 8)


def test_no_shard_is_ever_lost_or_doubled_whatever_happens():
    for seed in range(200):
        rng = random.Random(seed)
        shards = list(range(rng.randrange(1, 12)))
        queue = ShardQueue(shards, max_attempts=rng.randrange(1, 4))
        running: list[int] = []
        done: list[int] = []
        while not queue.finished:
            if rng.random() < 0.5 and (assignment := queue.take()) is not None:
                assert assignment.shard_id not in running + done
                running.append(assignment.shard_id)
            elif running:
                shard_id = running.pop(rng.randrange(len(running)))
                outcome = rng.choice(["done", "failed", "lost"])
                getattr(queue, outcome)(shard_id)
                if outcome == "done":
                    done.append(shard_id)
        assert sorted([*done, *queue.set_aside]) == shards


def test_two_shards_whose_worker_died_are_each_made_alone_at_no_charge():
    queue = ShardQueue([4, 7, 9], max_attempts=1)
    queue.take()
    queue.take()
    for shard_id in (7, 4):
        queue.lost(shard_id, alone=True)
    assert queue.take(beside_another=True) is None, "not even the one that no one suspects"
    assert queue.take() == Assignment(4, 2, alone=True)
    assert queue.take() == Assignment(7, 2, alone=True)
    assert queue.take(beside_another=True) == Assignment(9, 1)
    assert queue.failures(4) == queue.failures(7) == 0


def test_a_worker_gets_its_next_shard_once_the_one_before_is_sampled():
    sampling, sampled = InHand(Assignment(1, 1)), InHand(Assignment(0, 1), is_sampled=True)
    alone = InHand(Assignment(0, 2, alone=True), is_sampled=True)
    assert takes_more([])
    assert takes_more([sampled])
    assert not takes_more([sampling])
    assert not takes_more([sampled, sampling])
    assert not takes_more([sampled, sampled])
    assert not takes_more([alone])


def test_a_gpu_worker_takes_its_share_of_the_cpus_and_a_cpu_worker_its_threads():
    gpu_node, cpu_node = Machine(9, 2), Machine(6, 0)

    def shape(*machines: Machine, device: Device, encode: int | None = None) -> WorkerShape:
        told = {"device": device, "threads_per_worker": 3, "encode_threads": encode}
        return worker_shape(GenerateConfig(out="out", **told), machines)

    assert shape(gpu_node, cpu_node, device="auto") == WorkerShape(4, 1)
    assert shape(gpu_node, Machine(1, 2), device="auto") == WorkerShape(0, 1)
    assert shape(Machine(5, 1), device="auto") == WorkerShape(5, 1)
    assert shape(gpu_node, device="auto", encode=6) == WorkerShape(6, 1)
    assert shape(cpu_node, device="auto") == WorkerShape(3, 0)
    assert shape(gpu_node, device="cpu") == WorkerShape(3, 0)
    assert shape(cpu_node, device="cpu", encode=2) == WorkerShape(3, 0)
    assert shape(cpu_node, device="cpu", encode=5) == WorkerShape(5, 0)
    assert shape(cpu_node, device="cuda") == WorkerShape(0, 1)


def test_in_one_process_sampling_takes_one_cpu_and_encoding_what_is_left():
    def shape(**options: Any) -> WorkerShape:
        wanted = {"out": "out", "device": "cpu", "threads_per_worker": 3, "encode_threads": 5}
        return worker_shape(GenerateConfig(**{**wanted, **options}), [Machine(8, 0)])

    assert shape(workers=0) == WorkerShape(1, 0)
    assert shape(workers=1) == shape() == WorkerShape(5, 0)
    assert shape(encode_threads=None) == WorkerShape(3, 0)


def test_slots_do_not_span_machines():
    assert num_slots([Machine(5, 0), Machine(5, 0)], WorkerShape(3, 0)) == 2
    assert num_slots([Machine(1, 4), Machine(64, 0)], WorkerShape(0, 1)) == 4
    assert num_slots([Machine(9, 4), Machine(64, 0), Machine(3, 1)], WorkerShape(4, 1)) == 2


def test_more_workers_than_the_machine_has_room_for_are_refused():
    require_slots(2, 2, WorkerShape(1, 0))
    require_slots(None, 2, WorkerShape(1, 0))
    with pytest.raises(InputError, match=r"--workers is 3 .* at most 2"):
        require_slots(3, 2, WorkerShape(1, 0))
    with pytest.raises(InputError, match="no GPU worker fits here with 1 GPU, wanted"):
        require_slots(None, 0, WorkerShape(0, 1))
    with pytest.raises(InputError, match="no CPU worker fits here with 2 CPUs, wanted"):
        require_slots(None, 0, WorkerShape(2, 0))
    with pytest.raises(InputError, match="--workers is 9 with 2 GPUs and 1 CPU each"):
        require_slots(9, 2, WorkerShape(1, 2))


def test_a_worker_that_fits_on_no_node_of_a_cluster_nor_on_one_it_may_start_is_refused():
    head, gpus = Machine(0, 0), Machine(1, 2)
    require_fit([head, Machine(3, 0)], [], WorkerShape(3, 0))
    require_fit([head], [gpus], WorkerShape(0, 1))
    with pytest.raises(InputError, match=r"takes 4 CPUs.*largest of its 2 nodes has 3.*no autosc"):
        require_fit([head, Machine(3, 0)], [], WorkerShape(4, 0))
    with pytest.raises(InputError, match=r"takes 1 GPU.* its 1 nodes has 0 GPUs and no node"):
        require_fit([head], [Machine(64, 0)], WorkerShape(0, 1))
    with pytest.raises(InputError, match=r"1 GPU and 9 CPUs.*has 2 GPUs and 8 CPUs.*--encode-thr"):
        require_fit([Machine(8, 2)], [], WorkerShape(9, 1))
    with pytest.raises(InputError, match=r"0 nodes has 0 CPUs.* autoscaler: lower --threads-per"):
        require_fit([], [], WorkerShape(1, 0))
    with pytest.raises(InputError, match=r"0 nodes has 0 GPUs.* autoscaler: choose --device cpu"):
        require_fit([], [], WorkerShape(0, 1))


def test_available_cores_is_at_least_one():
    assert available_cores() >= 1


def test_a_worker_has_its_share_of_the_tightest_machine():
    small, large, unknown = Machine(4, 0, 8 * 10**9), Machine(64, 0, 10**12), Machine(8, 0)
    shape = WorkerShape(2, 0)
    shared = 8 * 10**9 - LIBRARY_BYTES
    alone, beside_another = (
        pytest.approx((shared // sharing - PROCESS_BYTES) / (1 + HEAP_SLACK), abs=1)
        for sharing in (1, 2)
    )
    assert worker_room([small, large, unknown], shape, None) == beside_another
    assert worker_room([small], shape, 1) == alone
    assert worker_room([small], shape, 99) == beside_another
    assert worker_room([Machine(4, 0, 1000)], shape, None) == 0
    assert worker_room([unknown, Machine(1, 0, 1000)], shape, None) is None
    with_gpu = Machine(4, 0, 8 * 10**9, gpu_memory=1000)
    assert worker_room([with_gpu], shape, 1) == alone, "it uses no GPU"


def test_a_gpu_worker_has_its_gpu_whatever_the_machine_holds():
    node = Machine(1, 2, memory=1000, gpu_memory=24 * 10**9)
    shape, cpu_node = WorkerShape(0, 1), Machine(4, 0, memory=1000, gpu_memory=1000)
    assert worker_room([node, Machine(1, 1), cpu_node], shape, 7) == 24 * 10**9 - CUDA_BYTES
    assert worker_room([replace(node, gpu_memory=1000)], shape, None) == 0
    assert worker_room([Machine(1, 1, memory=10**12)], shape, None) is None


def test_the_memory_of_this_process_is_the_least_that_a_control_group_leaves(tmp_path: Path):
    membership, groups = tmp_path / "cgroup", tmp_path / "groups"
    (groups / "slice" / "job").mkdir(parents=True)
    membership.write_text("0::/slice/job\n")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory(groups, membership) == physical
    (groups / "slice" / "job" / "memory.max").write_text("max\n")
    (tmp_path / "memory.max").write_text("3\n")  # of no group
    (groups / "slice" / "memory.max").write_text("5000\n")
    assert available_memory(groups, membership) == 5000
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("4000\n")
    assert available_memory(groups, membership) == 4000
    assert available_memory(groups, tmp_path / "none") == 4000


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("250000 100000", 2), ("max 100000", 3), ("900000 100000", 3), ("50000 100000", 1), (None, 3)],
)
def test_cores_are_those_of_the_affinity_mask_as_far_as_the_quota_goes(quota, cores, monkeypatch):
    def read(path: Path) -> str:
        assert path == Path("/sys/fs/cgroup/cpu.max")
        if quota is None:
            raise FileNotFoundError
        return f"{quota}\n"

    monkeypatch.setattr(
        os, "sched_getaffinity", lambda pid: {1, 4, 5} if pid == 0 else {1}, raising=False
    )
    monkeypatch.setattr(Path, "read_text", read)
    assert available_cores() == cores


@pytest.mark.parametrize(("count", "cores"), [(6, 6), (None, 1)])
def test_without_an_affinity_mask_every_core_counts(count, cores, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    for quota in ("max 100000", "2000000 100000"):
        monkeypatch.setattr(Path, "read_text", lambda path, quota=quota: quota)
        assert available_cores() == cores


@pytest.mark.parametrize(
    ("program", "visible", "memory"),
    [
        ("echo 81559; echo 24576", None, 24576 * 2**20),
        ("echo 81559; echo 24576", "0", 81559 * 2**20),
        ("echo 81559; echo 24576", "0,1", 24576 * 2**20),
        ("echo 81559; echo 24576", "", None),
        ("true", None, None),
        ("echo '[N/A]'", None, None),
        ("echo 24576; exit 9", None, None),
        (None, None, None),
    ],
)
def test_the_memory_of_gpus_is_that_of_the_smallest(
    program, visible, memory, tmp_path: Path, monkeypatch
):
    if program is not None:
        wanted = "--query-gpu=memory.total --format=csv,noheader,nounits"
        file = tmp_path / "nvidia-smi"
        file.write_text(f'#!/bin/sh\n[ "$*" = "{wanted}" ] || exit 1\n{program}\n')
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_memory() == memory
