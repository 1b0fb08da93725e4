"""`python -m tests.chaos [--kills 200] [--seed 0]`: kill the job everywhere, and lose nothing.

Kills (SIGKILL) workers, drivers and nodes at every fault point and at random times. After each the
job is run once more; then the dataset must be sound (`verify --deep`) and its tars and Parquet the
bytes of an undisturbed run. Prints one row per fault and exits with code 1 if anything is amiss.

Most kills hit a process without Ray, forked from this one, where driver and worker are the same;
the last part runs on Ray. Ends only processes that it started.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

os.environ["DEPTHVAR_FAULT"] = "tests.fault_hook:reach_point"  # read where pipeline is imported

import pandas  # noqa: F401 - brought by pyarrow later: once here instead of in every child
import PIL.PngImagePlugin  # noqa: F401
from tqdm import tqdm

from jobs import verify
from pipeline.config import GenerateConfig
from pipeline.driver import generate
from pipeline.faults import POINTS
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fakes import set_faults
from tests.fault_hook import FAULTS_VARIABLE, arm, armed

tqdm.monitor_interval = 0  # its thread could hold a lock at the moment of a fork
ROOT = Path(__file__).parent.parent
MEMORY = Path("/dev/shm")  # a kill loses nothing of it, and it is fast
NUM_SHARDS = 6
SETTINGS = {"per_class": 5, "samples_per_shard": 9, "batch_size": 4, "contact_sheet": 0}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
WORKER_POINTS = tuple(p for p in POINTS if not p.startswith(("plan", "indexes")))
ONCE_POINTS = tuple(p for p in POINTS if p not in WORKER_POINTS)
PASSES = {"batch-sampled": 15, "file-staged": 20, "file-replaced": 20}  # else one per shard
JOB_LIMIT_S = 180.0


@dataclass
class Row:
    """What one kind of fault did."""

    kills: int = 0
    lost: int = 0
    doubled: int = 0
    unsound: int = 0


@dataclass
class Chaos:
    """Counts per fault, and the folder where everything happens."""

    folder: Path
    rng: random.Random
    bar: tqdm
    rows: dict[str, Row] = field(default_factory=dict)
    reference: dict[str, bytes] = field(default_factory=dict)
    run_s: float = 0.0

    def trial(self, name: str, attack: Callable[[Path], int]) -> None:
        """Attack a fresh job, run it once more, and judge what is there."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        set_faults(folder / "faults.json")
        kills = attack(folder)
        for leftover in [*folder.glob("kill-*"), *folder.glob("pass-*")]:
            leftover.unlink()
        set_faults(folder / "faults.json")
        code = ended(forked_job(folder))
        row = self.rows.setdefault(name, Row())
        row.kills += kills
        lost, doubled = self.damage(folder)
        row.lost, row.doubled = row.lost + lost, row.doubled + doubled
        is_same = data_files(folder / "out") == self.reference
        if code != 0 or not is_same or ended(forked_verify(folder)) != 0:
            row.unsound += 1
            self.bar.write(f"{name}: code {code}, same bytes {is_same}: see {folder}")
        else:
            shutil.rmtree(folder)
        self.bar.update(kills)

    def damage(self, folder: Path) -> tuple[int, int]:
        """Samples of the undisturbed run that are not there, and those that are there twice."""
        keys: Counter[str] = Counter()
        for file in (folder / "out" / "train").glob("*.tar"):
            with tarfile.open(file) as tar:
                keys.update(n.partition(".")[0] for n in tar.getnames() if n.endswith(".cls"))
        wanted = 10 * SETTINGS["per_class"]
        return wanted - len(keys), sum(keys.values()) - len(keys)


def data_files(out: Path) -> dict[str, bytes]:
    files = [*out.glob("train/*.tar"), *out.glob("meta/*.parquet")]
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(files)}


def forked(folder: Path, log: str, call: Callable[[], int]) -> int:
    """Run a function in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        descriptor = os.open(folder / log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ[FAULTS_VARIABLE] = str(folder / "faults.json")
        code = call()
        sys.stdout.flush()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def forked_job(folder: Path) -> int:
    config = GenerateConfig(
        out=str(folder / "out"), scratch=folder / "scratch", workers=0, device="cpu", **SETTINGS
    )
    return forked(folder, "log", lambda: generate(config, sampler_factory=FAKE_SAMPLER))


def forked_verify(folder: Path) -> int:
    return forked(folder, "verify", lambda: verify.main([str(folder / "out"), "--deep"]))


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_point(point: str, passes: int) -> Callable[[Path], int]:
    """Kill a job without Ray at a fault point."""

    def attack(folder: Path) -> int:
        arm(folder, point, passes)
        return int(ended(forked_job(folder)) == -signal.SIGKILL)

    return attack


def after(seconds: float) -> Callable[[Path], int]:
    """Kill a job without Ray after some time."""

    def attack(folder: Path) -> int:
        pid = forked_job(folder)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return int(ended(pid) == -signal.SIGKILL)

    return attack


def without_ray(chaos: Chaos, kills: int) -> None:
    """Six of ten kills at fault points in turn, the others at random times."""
    count = num_points = 0
    while (done := sum(row.kills for row in chaos.rows.values())) < kills:
        if count % 10 < 6:
            point = POINTS[num_points % len(POINTS)]
            num_points += 1
            most = 1 if point in ONCE_POINTS else PASSES.get(point, NUM_SHARDS)
            attack = at_point(point, chaos.rng.randrange(most))
            chaos.trial(f"process, {point}", attack)
        else:
            attack = after(chaos.rng.uniform(0.0, chaos.run_s))
            chaos.trial("process, at a random time", attack)
        count += 1
        assert count < 3 * kills + 50, f"only {done} of {count} kills hit"


def ray_job(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """A job on Ray in a process group of its own."""
    argv = [f"--out={folder / 'out'}", f"--scratch={folder / 'scratch'}", "--max-attempts=50"]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.fake_job", *argv, *FLAGS, *more],
            cwd=ROOT,
            env={**os.environ, FAULTS_VARIABLE: str(folder / "faults.json")},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finish(job: subprocess.Popen[bytes]) -> None:
    """Wait for a job; end the process group of one that hangs."""
    try:
        job.wait(timeout=JOB_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def kill_workers(points: list[str]) -> Callable[[Path], int]:
    """Kill one worker after the other at these points of one job on Ray, which goes on."""

    def attack(folder: Path) -> int:
        for point in points:
            arm(folder, point)
        finish(ray_job(folder, "--workers=2", "--device=cpu"))
        return len(points) - len(armed(folder))

    return attack


def kill_driver(point: str) -> Callable[[Path], int]:
    """Kill the driver of a job on Ray while a worker is at this point."""

    def attack(folder: Path) -> int:
        job = ray_job(folder, "--workers=2", "--device=cpu")
        arm(folder, point, passes=1, victim=job.pid)
        finish(job)
        return int(job.returncode == -signal.SIGKILL)

    return attack


def kill_nodes(count: int) -> Callable[[Path], int]:
    """Kill nodes of a small cluster in the middle of a job, each replaced by another."""

    def attack(folder: Path) -> int:
        from ray.cluster_utils import Cluster

        os.environ[FAULTS_VARIABLE] = str(folder / "faults.json")
        set_faults(folder / "faults.json", batch_s=0.3)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
        killed = 0
        try:
            nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
            job = ray_job(folder, f"--address={cluster.address}", "--workers=2")
            for number in range(count):
                if not has_shards(folder, number + 1, job):
                    break
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
                killed += 1
                nodes.append(cluster.add_node(num_cpus=1, num_gpus=1))
            finish(job)
        finally:
            cluster.shutdown()
        return killed

    return attack


def has_shards(folder: Path, count: int, job: subprocess.Popen[bytes]) -> bool:
    """Wait until so many shards are committed; False if the job ends before."""
    while len(list(folder.glob("out/meta/0*.json"))) < count:
        if job.poll() is not None:
            return False
        time.sleep(0.05)
    return True


def on_ray(kills: int) -> Iterator[tuple[str, Callable[[Path], int]]]:
    """Trials on Ray, for about so many kills."""
    half = len(WORKER_POINTS) // 2
    driver_points = ("batch-sampled", "shard-built", "tar-published", "parquet-published")
    for number in range(max(1, kills // 9)):
        points = WORKER_POINTS[:half] if number % 2 else WORKER_POINTS[half:]
        yield "worker on Ray, at fault points", kill_workers(list(points))
        if number < 4:
            yield "driver on Ray, at fault points", kill_driver(driver_points[number])
        if number % 2 == 0:
            yield "node (all its processes)", kill_nodes(2)


def prepare(chaos: Chaos) -> None:
    """The undisturbed run: its bytes and how long it takes."""
    folder = chaos.folder / "undisturbed"
    folder.mkdir()
    set_faults(folder / "faults.json")
    started_s = time.monotonic()
    code = ended(forked_job(folder))
    chaos.run_s = time.monotonic() - started_s
    chaos.reference = data_files(folder / "out")
    assert code == 0, (folder / "log").read_text()
    assert len(chaos.reference) == 2 * NUM_SHARDS
    assert ended(forked_verify(folder)) == 0, (folder / "verify").read_text()
    assert chaos.damage(folder) == (0, 0)


def table(rows: dict[str, Row]) -> str:
    """Markdown, one row per fault."""
    lines = ["| fault | kills | lost | doubled | unsound |", "|---|---|---|---|---|"]
    total = Row()
    for name, row in sorted(rows.items()):
        lines.append(f"| {name} | {row.kills} | {row.lost} | {row.doubled} | {row.unsound} |")
        for part in ("kills", "lost", "doubled", "unsound"):
            setattr(total, part, getattr(total, part) + getattr(row, part))
    lines.append(f"| all | {total.kills} | {total.lost} | {total.doubled} | {total.unsound} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", type=int, default=None, help="of them on Ray (default: a fifth)")
    options = parser.parse_args()
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    ray_kills = options.kills // 5 if options.ray is None else options.ray
    with (
        tempfile.TemporaryDirectory(prefix="chaos-", dir=place) as folder,
        mock.patch("pipeline.config.identify_weights", fake_weights),
        tqdm(total=options.kills, unit="kill", file=sys.stderr) as bar,
    ):
        chaos = Chaos(Path(folder), random.Random(options.seed), bar)
        prepare(chaos)
        without_ray(chaos, options.kills - ray_kills)
        for name, attack in on_ray(ray_kills) if ray_kills else ():
            chaos.trial(name, attack)
    print(table(chaos.rows))
    return int(any(row.lost or row.doubled or row.unsound for row in chaos.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
