"""The part of `tests.chaos` that kills workers, drivers and whole nodes of jobs on Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pipeline.faults import POINTS
from tests import fake_job
from tests.fakes import set_faults
from tests.fault_hook import FAULTS_VARIABLE, ITS_NODE, WHOEVER, arm, armed, disarm
from tests.small_ray import small_head

WORKER_POINTS = tuple(p for p in POINTS if not p.startswith(("plan", "indexes")))
DRIVER_POINTS = tuple(p for p in POINTS if p not in WORKER_POINTS)
JOB_LIMIT_S = 600.0
AT_WORK_S = 1.5  # kills at random times fall into so many seconds after the job got to work
SLOW_BATCH_S = 0.2  # of jobs that are hit at random times: 9 batches for each of two workers
# A node that was killed is found dead within seconds, not a quarter of a minute.
SYSTEM = {
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 4,
    "worker_niceness": 0,  # workers run like their driver, also on a busy machine
}
NODE = {"num_cpus": 1, "num_gpus": 1}

# Drivers are forked from a process that has imported everything and holds no connection.
_DRIVERS = multiprocessing.get_context("forkserver")
_DRIVERS.set_forkserver_preload(["tests.chaos_ray", "jobs.verify", "pandas", "PIL.PngImagePlugin"])

Attack = Callable[[Path, int], tuple[int, set[str]]]


@dataclass
class RayNodes:
    """A head without resources and two nodes with room for one worker each, for all jobs.

    Its processes read their faults in the folder `control`. Dead nodes are replaced.
    """

    control: Path
    flags: list[str]
    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def started(cls, control: Path, flags: list[str]) -> Iterator[RayNodes]:
        """Start the cluster, and end its processes at last; `flags` are those of every job."""
        set_faults(control / "faults.json")
        os.environ[FAULTS_VARIABLE] = str(control / "faults.json")
        cluster = small_head(num_cpus=0, _system_config=SYSTEM)
        try:
            yield cls(control, flags, cluster, [cluster.add_node(**NODE) for _ in range(2)])
        finally:
            cluster.shutdown()

    def job(self, folder: Path) -> BaseProcess:
        """Start a job on the cluster, in a process group of its own."""
        argv = [f"--out={folder / 'out'}", f"--scratch={folder / 'scratch'}", *self.flags]
        argv += [f"--address={self.cluster.address}", "--workers=2", "--max-attempts=50"]
        job = _DRIVERS.Process(target=_drive, args=(argv, folder / "log", self.control))
        job.start()
        return job

    def finish(self, job: BaseProcess) -> int:
        """Wait for a job, putting new nodes in the place of dead ones; its exit code.

        The process group of a job that hangs is ended.
        """
        deadline_s = time.monotonic() + JOB_LIMIT_S
        while job.is_alive():
            self.restock()
            if time.monotonic() > deadline_s:
                os.killpg(job.pid, signal.SIGKILL)
            job.join(0.05)
        self.restock()
        return job.exitcode

    def run(self, folder: Path) -> int:
        """Run the job of a folder without faults; its exit code."""
        disarm(self.control)
        set_faults(self.control / "faults.json")
        return self.finish(self.job(folder))

    def restock(self) -> None:
        for node in [n for n in self.nodes if not n.any_processes_alive() or raylet_is_dead(n)]:
            self.nodes.remove(node)
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(**NODE))

    def workers_of(self, job: BaseProcess) -> list[int]:
        """The living workers of a job that was slowed down, once there is one; none if it ends."""
        loads = self.control / "loads"
        while job.is_alive():
            pids = [int(line) for line in loads.read_text().split()] if loads.exists() else []
            if alive := [pid for pid in pids if is_worker(pid)]:
                return alive
            time.sleep(0.02)
        return []

    def slow_job(self, folder: Path, pause_s: float) -> BaseProcess:
        """A job that was slowed down, this long after its first worker began."""
        loads = self.control / "loads"
        loads.unlink(missing_ok=True)
        set_faults(self.control / "faults.json", batch_s=SLOW_BATCH_S, loads=str(loads))
        job = self.job(folder)
        self.workers_of(job)
        time.sleep(pause_s)
        return job


def _drive(argv: list[str], log: Path, control: Path) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ[FAULTS_VARIABLE] = str(control / "faults.json")
    sys.exit(fake_job.main(argv))


def raylet_is_dead(node: Any) -> bool:
    return any(name == "raylet" for name, _ in node.dead_processes())


def is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::RayWorker")
    return False


def at_points(nodes: RayNodes, points: tuple[str, ...], victim: str) -> Attack:
    """Kill whoever gets to each of these points, or its whole node, in one job that goes on."""

    def attack(folder: Path, most: int) -> tuple[int, set[str]]:
        chosen = points[:most]
        for point in chosen:
            arm(nodes.control, point, victim=victim)
        nodes.finish(nodes.job(folder))
        left = {name.split("-", 1)[1].rpartition("-")[0] for name in armed(nodes.control)}
        return len(set(chosen) - left), set(chosen) - left

    return attack


def driver_at(nodes: RayNodes, point: str) -> Attack:
    """Kill the driver at a point of its own, or while a worker is at this point."""

    def attack(folder: Path, most: int) -> tuple[int, set[str]]:
        if point in DRIVER_POINTS:
            arm(nodes.control, point)
            job = nodes.job(folder)
        else:
            job = nodes.job(folder)
            arm(nodes.control, point, passes=1, victim=str(job.pid))
        is_hit = nodes.finish(job) == -signal.SIGKILL
        return int(is_hit), {point} if is_hit else set()

    return attack


def worker_after(nodes: RayNodes, rng: random.Random) -> Attack:
    """Kill one of the workers after some time."""

    def attack(folder: Path, most: int) -> tuple[int, set[str]]:
        job = nodes.slow_job(folder, rng.uniform(0.0, AT_WORK_S))
        victims = nodes.workers_of(job)
        if victims:
            os.kill(rng.choice(victims), signal.SIGKILL)
        nodes.finish(job)
        return int(bool(victims)), set()

    return attack


def driver_after(nodes: RayNodes, rng: random.Random) -> Attack:
    """Kill the driver some time after its workers began."""

    def attack(folder: Path, most: int) -> tuple[int, set[str]]:
        job = nodes.slow_job(folder, rng.uniform(0.0, AT_WORK_S))
        job.kill()
        return int(nodes.finish(job) == -signal.SIGKILL), set()

    return attack


def node_after(nodes: RayNodes, rng: random.Random) -> Attack:
    """Kill all processes of a node some time after its worker began."""

    def attack(folder: Path, most: int) -> tuple[int, set[str]]:
        job = nodes.slow_job(folder, rng.uniform(0.0, AT_WORK_S))
        is_running = job.is_alive()
        node = nodes.nodes.pop(rng.randrange(2))
        nodes.cluster.remove_node(node, allow_graceful=False)
        nodes.nodes.append(nodes.cluster.add_node(**NODE))
        nodes.finish(job)
        return int(is_running), set()

    return attack


def kills_on_ray(nodes: RayNodes, rng: random.Random) -> Iterator[tuple[str, Attack]]:
    """Endless rounds of 44 kills: all points for workers, drivers and nodes, and random times.

    An attack takes the most kills that are wanted of it.
    """
    fives = [WORKER_POINTS[:5], WORKER_POINTS[5:]]
    pairs = [WORKER_POINTS[n : n + 2] for n in range(0, len(WORKER_POINTS), 2)]
    worker, driver, node = "worker on Ray", "driver on Ray", "node on Ray"
    while True:
        at = [(f"{worker}, at fault points", at_points(nodes, p, WHOEVER)) for p in fives]
        at += [(f"{driver}, at fault points", driver_at(nodes, p)) for p in POINTS]
        at += [(f"{node}, at fault points", at_points(nodes, p, ITS_NODE)) for p in pairs]
        at += [(f"{worker}, at random times", worker_after(nodes, rng))] * 4
        at += [(f"{driver}, at random times", driver_after(nodes, rng))] * 4
        at += [(f"{node}, at random times", node_after(nodes, rng))] * 2
        yield from rng.sample(at, len(at))
