"""`python -m tests.chaos [--kills 220] [--ray 44] [--seed 0]`: kill the job and lose nothing.

Kills (SIGKILL) processes, workers, drivers and nodes at every fault point and at random times.
After each the same job is run once more; then the dataset must be sound (`verify --deep`) and its
tars and Parquet the bytes of an undisturbed run. Prints one row per kind of fault and exits with
code 1 if anything is amiss. Ends only processes that it started.

Without Ray, driver and worker are one process, forked from this one. On Ray (`tests.chaos_ray`)
one small cluster serves all jobs, and one job may lose several workers or nodes before it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

os.environ["DEPTHVAR_FAULT"] = "tests.fault_hook:reach_point"  # read where pipeline is imported

with contextlib.suppress(ImportError):  # where a stand-in says so
    import pandas  # noqa: F401 - brought by pyarrow later: once here instead of in every child
import PIL.PngImagePlugin  # noqa: F401
from tqdm import tqdm

from jobs import verify
from pipeline.faults import POINTS
from pipeline.request.generation import GenerateConfig
from pipeline.run.driver import generate
from tests.chaos_ray import RayNodes, kills_on_ray
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fake_shards import data_files
from tests.fakes import set_faults
from tests.fault_hook import FAULTS_VARIABLE, arm, disarm

tqdm.monitor_interval = 0  # its thread could hold a lock at the moment of a fork
MEMORY = Path("/dev/shm")  # a kill loses nothing of it, and it is fast
NUM_SHARDS = 6
SETTINGS = {"per_class": 5, "samples_per_shard": 9, "batch_size": 4, "contact_sheet": 0}
ONCE_POINTS = tuple(p for p in POINTS if p.startswith(("plan", "indexes")))
PASSES = {"batch-sampled": 15, "file-staged": 20, "file-replaced": 20}  # else one per shard


@dataclass
class Row:
    """What one kind of fault did."""

    kills: int = 0
    points: set[str] = field(default_factory=set)
    lost: int = 0
    doubled: int = 0
    unsound: int = 0


@dataclass
class Chaos:
    """Counts per kind of fault, and the folder where everything happens."""

    folder: Path
    rng: random.Random
    bar: tqdm
    rows: dict[str, Row] = field(default_factory=dict)
    reference: dict[str, bytes] = field(default_factory=dict)
    run_s: float = 0.0

    @property
    def num_kills(self) -> int:
        return sum(row.kills for row in self.rows.values())

    def trial(
        self,
        name: str,
        attack: Callable[[Path], tuple[int, set[str]]],
        rerun: Callable[[Path], int],
    ) -> None:
        """Attack a fresh job, run it once more, and judge what is there.

        An attack gives the number of kills that hit, and the fault points where they did.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        set_faults(folder / "faults.json")
        kills, points = attack(folder)
        code = rerun(folder)
        row = self.rows.setdefault(name, Row())
        row.kills += kills
        row.points |= points
        lost, doubled = damage(folder)
        row.lost, row.doubled = row.lost + lost, row.doubled + doubled
        is_same = data_files(folder / "out") == self.reference
        if code != 0 or not is_same or ended(forked_verify(folder)) != 0:
            row.unsound += 1
            self.bar.write(f"{name} {points}: code {code}, same bytes {is_same}: see {folder}")
        else:
            shutil.rmtree(folder)
        self.bar.update(kills)


def damage(folder: Path) -> tuple[int, int]:
    """Samples of the undisturbed run that are not there, and those that are there twice."""
    keys: Counter[str] = Counter()
    for file in (folder / "out" / "train").glob("*.tar"):
        with tarfile.open(file) as tar:
            keys.update(n.partition(".")[0] for n in tar.getnames() if n.endswith(".cls"))
    wanted = 10 * SETTINGS["per_class"]
    return wanted - len(keys), sum(keys.values()) - len(keys)


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


def rerun_without_ray(folder: Path) -> int:
    disarm(folder)
    return ended(forked_job(folder))


def at_point(point: str, passes: int) -> Callable[[Path], tuple[int, set[str]]]:
    """Kill a job without Ray at a fault point."""

    def attack(folder: Path) -> tuple[int, set[str]]:
        arm(folder, point, passes)
        is_hit = ended(forked_job(folder)) == -signal.SIGKILL
        return int(is_hit), {point} if is_hit else set()

    return attack


def after(seconds: float) -> Callable[[Path], tuple[int, set[str]]]:
    """Kill a job without Ray after some time."""

    def attack(folder: Path) -> tuple[int, set[str]]:
        pid = forked_job(folder)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return int(ended(pid) == -signal.SIGKILL), set()

    return attack


def without_ray(chaos: Chaos, kills: int) -> None:
    """Six of ten kills at fault points in turn, the others at random times."""
    count = num_points = 0
    while chaos.num_kills < kills:
        if count % 10 < 6:
            point = POINTS[num_points % len(POINTS)]
            num_points += 1
            most = 1 if point in ONCE_POINTS else PASSES.get(point, NUM_SHARDS)
            attack = at_point(point, chaos.rng.randrange(most))
            chaos.trial("job without Ray, at fault points", attack, rerun_without_ray)
        else:
            attack = after(chaos.rng.uniform(0.0, chaos.run_s))
            chaos.trial("job without Ray, at random times", attack, rerun_without_ray)
        count += 1
        assert count < 3 * kills + 50, f"only {chaos.num_kills} of {count} kills hit"


def on_ray(chaos: Chaos, kills: int) -> None:
    """So many kills more, on one cluster."""
    wanted = chaos.num_kills + kills
    control = chaos.folder / "ray"
    control.mkdir()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    with RayNodes.started(control, flags) as nodes:
        for count, (name, attack) in enumerate(kills_on_ray(nodes, chaos.rng)):
            left = wanted - chaos.num_kills
            if not left:
                return
            assert count < 3 * kills + 50, f"only {kills - left} of {count} attacks hit"
            chaos.trial(name, lambda folder, a=attack, n=left: a(folder, n), nodes.run)


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
    assert damage(folder) == (0, 0)


def table(rows: dict[str, Row]) -> str:
    """Markdown, one row per kind of fault."""
    lines = ["| fault | points | kills | lost | doubled | unsound |", "|---|---|---|---|---|---|"]
    total = Row()
    for name, row in sorted(rows.items()):
        lines.append(
            f"| {name} | {len(row.points)} | {row.kills} | {row.lost} | {row.doubled}"
            f" | {row.unsound} |"
        )
        total.points |= row.points
        for part in ("kills", "lost", "doubled", "unsound"):
            setattr(total, part, getattr(total, part) + getattr(row, part))
    lines.append(
        f"| all | {len(total.points)} | {total.kills} | {total.lost} | {total.doubled}"
        f" | {total.unsound} |"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--ray", type=int, default=None, help="of them on Ray (default: a fifth)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ray_kills = options.kills // 5 if options.ray is None else options.ray
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=place))
    with (
        mock.patch("pipeline.request.job.fetch_model", fake_weights),
        tqdm(total=options.kills, unit="kill", file=sys.stderr) as bar,
    ):
        chaos = Chaos(folder, random.Random(options.seed), bar)
        prepare(chaos)
        without_ray(chaos, options.kills - ray_kills)
        if ray_kills:
            on_ray(chaos, ray_kills)
    print(table(chaos.rows))
    if any(row.lost or row.doubled or row.unsound for row in chaos.rows.values()):
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
