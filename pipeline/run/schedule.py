"""Who makes which shard next, as plain values: no Ray, no clock, no files."""

from __future__ import annotations

import os
import subprocess
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from depthvar.errors import InputError
from depthvar.memory import CUDA_BYTES, HEAP_SLACK, LIBRARY_BYTES, PROCESS_BYTES
from pipeline.request.generation import GenerateConfig


@dataclass(frozen=True)
class Assignment:
    """A shard handed to a worker; `attempt` counts every start of it in this run, from 1.

    `alone`: the worker gets no other shard beside it.
    """

    shard_id: int
    attempt: int
    alone: bool = False


SHARDS_IN_HAND = 2
"""The most that one worker has: one that it samples, and one that it commits meanwhile."""


@dataclass(eq=False)
class InHand:
    """A shard that a worker is making; once `is_sampled`, its sampler is free for another."""

    assignment: Assignment
    is_sampled: bool = False


def takes_more(in_hand: Sequence[InHand]) -> bool:
    """Whether a worker with these shards can begin another one at once.

    So no shard ever waits behind another in a worker's hands while a worker is free, and a worker
    that goes away has none to give back that it has not begun.
    """
    is_free = all(shard.is_sampled and not shard.assignment.alone for shard in in_hand)
    return is_free and len(in_hand) < SHARDS_IN_HAND


class ShardQueue:
    """Every missing shard is waiting, running, done or set aside; the driver reports what happens.

    Only failures are charged: a shard is set aside after `max_attempts` of them. A shard whose
    worker was lost with its node goes back to the front at no charge. So do both shards of a worker
    that died making two, for either may be the cause: from then on each is made alone.
    """

    def __init__(self, missing: Iterable[int], max_attempts: int) -> None:
        assert max_attempts > 0
        self._waiting = deque(missing)
        self._max_attempts = max_attempts
        self._running: set[int] = set()
        self._alone: set[int] = set()
        self._set_aside: set[int] = set()
        self._starts: dict[int, int] = {}
        self._retries = 0
        self._failures: dict[int, int] = {}

    def take(self, *, beside_another: bool = False) -> Assignment | None:
        """Return the next shard to make, now running; None when none is waiting.

        `beside_another`: the worker is making a shard, and one that is made alone is not for it.
        """
        if not self._waiting or (beside_another and self._waiting[0] in self._alone):
            return None
        shard_id = self._waiting.popleft()
        self._running.add(shard_id)
        self._starts[shard_id] = self._starts.get(shard_id, 0) + 1
        self._retries += self._starts[shard_id] > 1
        return Assignment(shard_id, self._starts[shard_id], shard_id in self._alone)

    def done(self, shard_id: int) -> None:
        """Record a running shard as committed."""
        self._running.remove(shard_id)

    def lost(self, shard_id: int, *, alone: bool = False) -> None:
        """Put a running shard back in front: its worker went away through no fault of its own.

        `alone`: or through one that cannot be told from another shard's.
        """
        self._running.remove(shard_id)
        if alone:
            self._alone.add(shard_id)
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
    def num_waiting(self) -> int:
        """Shards that no worker has."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Shards that a worker has."""
        return len(self._running)

    @property
    def num_open(self) -> int:
        """Shards that are not done and not set aside."""
        return self.num_waiting + self.num_running

    @property
    def num_retries(self) -> int:
        """How often a shard was begun again."""
        return self._retries

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
    """What one worker asks Ray for: the CPUs of its threads, and a GPU where it has one."""

    num_cpus: int
    num_gpus: int

    @property
    def noun(self) -> str:
        """`GPU` or `CPU`."""
        return "GPU" if self.num_gpus else "CPU"

    @property
    def each(self) -> str:
        """What a worker takes: `1 GPU and 3 CPUs` or `4 CPUs`."""
        counts = {"GPU": self.num_gpus, "CPU": self.num_cpus}
        parts = [f"{n} {noun}" + ("s" if n > 1 else "") for noun, n in counts.items() if n]
        return " and ".join(parts)

    def of(self, machine: Machine) -> float:
        """How much of its kind a machine has."""
        return machine.num_gpus if self.num_gpus else machine.num_cpus


def worker_shape(config: GenerateConfig, machines: Iterable[Machine]) -> WorkerShape:
    """One GPU per worker where there are GPUs, with CPUs for its encoders, else CPUs alone.

    A GPU worker takes as many CPUs as it has encoders, by default the smallest share that a GPU
    has of its machine's. A CPU worker's encoders run on the CPUs that it samples on. In one process
    all that sampling leaves is theirs.
    """
    threads, encoders = config.threads_per_worker, config.encode_threads
    if config.workers == 0:
        threads, encoders = 1, None
    shares = [int(m.num_cpus // m.num_gpus) for m in machines if m.num_gpus >= 1]
    if config.device == "cuda" or (config.device == "auto" and shares):
        return WorkerShape(encoders or min(shares, default=0), 1)
    return WorkerShape(max(threads, encoders or 0), 0)


def num_slots(machines: Iterable[Machine], shape: WorkerShape) -> int:
    """Workers of this shape that fit on the machines at once."""
    wants = [("num_gpus", shape.num_gpus), ("num_cpus", shape.num_cpus)]
    return sum(min(int(getattr(m, name) // n) for name, n in wants if n) for m in machines)


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
            share = (machine.memory - LIBRARY_BYTES) // sharing - PROCESS_BYTES
            rooms.append(int(share / (1 + HEAP_SLACK)))
    return max(0, min(rooms)) if rooms else None


def require_slots(workers: int | None, slots: int, shape: WorkerShape) -> None:
    """Refuse a worker count that this machine cannot place.

    Raises `InputError` when `workers` exceeds the slots or there is no slot at all.
    """
    if slots == 0:
        raise InputError(
            f"no {shape.noun} worker fits here with {shape.each}, wanted room for one:"
            " lower --threads-per-worker or --encode-threads, choose --device cpu, or join a"
            " cluster with --address"
        )
    if workers is not None and workers > slots:
        raise InputError(
            f"--workers is {workers} with {shape.each} each, wanted at most {slots} on this"
            f" machine: use --workers {slots} or join a cluster with --address"
        )


def require_fit(
    machines: Sequence[Machine], node_types: Sequence[Machine], shape: WorkerShape
) -> None:
    """Refuse workers that fit on no node of a cluster nor on any that it may start.

    Raises `InputError`: such a job would wait without end.
    """
    if any(num_slots([machine], shape) for machine in (*machines, *node_types)):
        return
    largest = max(machines, key=shape.of, default=Machine(0, 0))
    amounts = [f"{largest.num_gpus:g} GPUs"] if shape.num_gpus else []
    amounts += [f"{largest.num_cpus:g} CPUs"] if shape.num_cpus else []
    has = f"the largest of its {len(machines)} nodes has {' and '.join(amounts)}"
    grows = "no node type of its autoscaler has more" if node_types else "it has no autoscaler"
    advice = "lower --threads-per-worker or --encode-threads"
    if shape.num_gpus:
        advice = "choose --device cpu or lower --encode-threads"
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
    return min(gpu_memories(), default=None)


def gpu_memories() -> tuple[int, ...]:
    """Bytes of each NVIDIA GPU of this machine that a process may see."""
    found, visible = all_gpu_memories(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else found[: len([name for name in visible.split(",") if name])]


def all_gpu_memories() -> tuple[int, ...]:
    """The same of each that the machine has."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return tuple(int(line) * 2**20 for line in told.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
