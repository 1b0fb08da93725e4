"""Who makes which shard next, as plain values: no Ray, no clock, no files."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from depthvar.errors import InputError
from depthvar.memory import CUDA_BYTES, LIBRARY_BYTES, PROCESS_BYTES

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Assignment:
    """A shard handed to a worker; `attempt` counts every start of it in this run, from 1."""

    shard_id: int
    attempt: int


class ShardQueue:
    """Every missing shard is waiting, running, done or set aside; the driver reports what happens.

    Only failures are charged: a shard is set aside after `max_attempts` of them. A shard whose
    worker was lost with its node goes back to the front at no charge.
    """

    def __init__(self, missing: Iterable[int], max_attempts: int) -> None:
        assert max_attempts > 0
        self._waiting = deque(missing)
        self._max_attempts = max_attempts
        self._running: set[int] = set()
        self._set_aside: set[int] = set()
        self._starts: dict[int, int] = {}
        self._failures: dict[int, int] = {}

    def take(self) -> Assignment | None:
        """Return the next shard to make, now running; None when none is waiting."""
        if not self._waiting:
            return None
        shard_id = self._waiting.popleft()
        self._running.add(shard_id)
        self._starts[shard_id] = self._starts.get(shard_id, 0) + 1
        return Assignment(shard_id, self._starts[shard_id])

    def done(self, shard_id: int) -> None:
        """Record a running shard as committed."""
        self._running.remove(shard_id)

    def lost(self, shard_id: int) -> None:
        """Put a running shard back in front: its worker went away through no fault of its own."""
        self._running.remove(shard_id)
        self._waiting.appendleft(shard_id)

    def failed(self, shard_id: int) -> bool:
        """Charge a running shard with a failure; True if that sets it aside."""
        self._running.remove(shard_id)
        self._failures[shard_id] = self.failures(shard_id) + 1
        if self._failures[shard_id] >= self._max_attempts:
            self._set_aside.add(shard_id)
            return True
        self._waiting.append(shard_id)
        return False

    def refund(self, shard_id: int) -> None:
        """Take one charge back: the failure turned out to be the loss of a node."""
        self._failures[shard_id] = max(0, self.failures(shard_id) - 1)
        if shard_id in self._set_aside:
            self._set_aside.remove(shard_id)
            self._waiting.append(shard_id)

    def failures(self, shard_id: int) -> int:
        """Charged failures of a shard."""
        return self._failures.get(shard_id, 0)

    @property
    def num_open(self) -> int:
        """Shards that still need a worker: waiting or running."""
        return len(self._waiting) + len(self._running)

    @property
    def finished(self) -> bool:
        """True when nothing is waiting or running; shards set aside do not hold the job up."""
        return self.num_open == 0

    @property
    def set_aside(self) -> tuple[int, ...]:
        """Shards given up after too many failures, in order."""
        return tuple(sorted(self._set_aside))


@dataclass(frozen=True)
class Machine:
    """What one node offers to workers; bytes of memory, of it and of each GPU, if they are known.

    A GPU's are those of the smallest one.
    """

    num_cpus: float
    num_gpus: float
    memory: int | None = None
    gpu_memory: int | None = None


@dataclass(frozen=True)
class WorkerShape:
    """What one worker asks Ray for: a GPU, or its threads' share of the cores."""

    num_cpus: int
    num_gpus: int

    @property
    def noun(self) -> str:
        """`GPU` or `CPU`."""
        return "GPU" if self.num_gpus else "CPU"

    @property
    def each(self) -> str:
        """What a worker takes: `1 GPU` or `4 CPUs`."""
        count = self.num_gpus or self.num_cpus
        return f"{count} {self.noun}" + ("s" if count > 1 else "")

    def of(self, machine: Machine) -> float:
        """How much of its kind a machine has."""
        return machine.num_gpus if self.num_gpus else machine.num_cpus


def worker_shape(
    machines: Iterable[Machine], *, device: Device, threads_per_worker: int
) -> WorkerShape:
    """One GPU per worker where there are GPUs, else its threads' share of the cores.

    A GPU worker asks for no cores: the GPU is what it must not share.
    """
    on_gpu = device == "cuda" or (device == "auto" and any(m.num_gpus >= 1 for m in machines))
    return WorkerShape(0, 1) if on_gpu else WorkerShape(threads_per_worker, 0)


def num_slots(machines: Iterable[Machine], shape: WorkerShape) -> int:
    """Workers of this shape that fit on the machines at once."""
    if shape.num_gpus:
        return sum(int(m.num_gpus // shape.num_gpus) for m in machines)
    return sum(int(m.num_cpus // shape.num_cpus) for m in machines)


def worker_room(machines: Iterable[Machine], shape: WorkerShape, workers: int | None) -> int | None:
    """Bytes that the tensors of one worker may take where they have least; None if nobody knows.

    On CPUs the machine's memory is shared by the workers on it, at most `workers`.
    """
    rooms = []
    for machine in machines:
        slots = num_slots([machine], shape)
        if shape.num_gpus and slots and machine.gpu_memory:
            rooms.append(machine.gpu_memory - CUDA_BYTES)
        elif not shape.num_gpus and slots and machine.memory:
            sharing = min(slots, workers or slots)
            rooms.append((machine.memory - LIBRARY_BYTES) // sharing - PROCESS_BYTES)
    return max(0, min(rooms)) if rooms else None


def require_slots(workers: int | None, slots: int, shape: WorkerShape) -> None:
    """Refuse a worker count that this machine cannot place.

    Raises `InputError` when `workers` exceeds the slots or there is no slot at all.
    """
    each = "1 GPU each" if shape.num_gpus else f"{shape.num_cpus} thread(s) each"
    if slots == 0:
        raise InputError(
            f"no {shape.noun} worker fits here with {each}, wanted room for one:"
            " lower --threads-per-worker, choose --device cpu, or join a cluster with --address"
        )
    if workers is not None and workers > slots:
        raise InputError(
            f"--workers is {workers} with {each}, wanted at most {slots} on this machine:"
            f" use --workers {slots} or join a cluster with --address"
        )


def require_fit(
    machines: Sequence[Machine], node_types: Sequence[Machine], shape: WorkerShape
) -> None:
    """Refuse workers that fit on no node of a cluster nor on any that it may start.

    Raises `InputError`: such a job would wait without end.
    """
    if any(num_slots([machine], shape) for machine in (*machines, *node_types)):
        return
    has = (
        f"the largest of its {len(machines)} nodes has {max(map(shape.of, machines), default=0):g}"
    )
    grows = "no node type of its autoscaler has more" if node_types else "it has no autoscaler"
    advice = "choose --device cpu" if shape.num_gpus else "lower --threads-per-worker"
    raise InputError(
        f"a worker takes {shape.each}, wanted a cluster with a node that has so many, {has} and"
        f" {grows}: {advice}, or let such a node join first"
    )


def available_cores() -> int:
    """Cores this process may use: its affinity mask, and the control group's quota rounded down."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        share = int(quota) // int(period)
    except (OSError, ValueError):
        return cores or 1
    return max(1, min(cores or 1, share))


def available_memory(
    cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Bytes this process may use: the machine's, or the least that a control group leaves it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_memory_limit(cgroups / "memory" / "memory.limit_in_bytes")]  # version 1
    try:
        own = cgroups / membership.read_text().partition("0::/")[2].strip()
    except OSError:
        own = cgroups
    for folder in (own, *own.parents):
        if folder.is_relative_to(cgroups):
            limits.append(_memory_limit(folder / "memory.max"))
    return min([physical, *(limit for limit in limits if limit is not None)])


def _memory_limit(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such group, or `max`
        return None


def gpu_memory() -> int | None:
    """Bytes of this machine's smallest NVIDIA GPU; None without one. Starts no CUDA context."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return min(int(line) for line in told.stdout.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
