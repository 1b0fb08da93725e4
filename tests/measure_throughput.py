"""How near the images/s of a dataset come to those of its sampler, format by format.

    python -m tests.measure_throughput [--rates 200 600] [--formats png jpg webp] [--shards 50]

The sampler is a stand-in that makes photographs of 256x256 at a fixed rate and sleeps meanwhile,
as a GPU would have it; everything else is `depthvar generate` in one process. Prints one row per
format and rate:

- CPU of an image: encoding it, and all else (hashing, tar, Parquet, reading back, publishing)
- cores that this takes at the rate, and those that the process may use: with fewer, the sampler
  has to wait, whatever overlaps
- images/s of the sampler alone (time in its calls) and of the dataset (from the first commit to
  the last), and their quotient
- memory of the process while the first fifth of the shards was made, and how much more later

The quotient means something on a machine that does nothing else; the CPU of an image nearly always.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
from sklearn.datasets import load_sample_images

from depthvar.config import ModelConfig, model_config
from depthvar.cost import Cost, image_cost
from depthvar.plan import DepthPlan
from pipeline.request.generation import DEFAULT_PNG_LEVEL, GenerateConfig
from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import read_plan
from pipeline.run.driver import generate
from pipeline.run.schedule import available_cores
from pipeline.run.worker import Workplace
from pipeline.shards.committed import committed_shards
from pipeline.shards.samples import encode_image
from pipeline.storage import Storage
from tests.fake_job import fake_weights
from tests.fakes import FakeBatch

MODEL = "var-d16"
SIDE = 256
RATE_VARIABLE = "STAND_IN_IMAGES_PER_S"
HEADINGS = (
    "format", "sampler makes", "encoding", "all else", "cores it takes", "cores here",
    "sampler alone", "dataset", "quotient", "memory", "more later",
)  # fmt: skip


@cache
def photographs() -> list[np.ndarray]:
    """Two photographs that come with scikit-learn, uint8 (427, 640, 3)."""
    return [np.asarray(image) for image in load_sample_images().images]


def photograph(index: int) -> np.ndarray:
    """A piece of one of them, of its own for each of 130,000 indices."""
    photo = photographs()[index % 2]
    top, left = index // 2 * 31 % (photo.shape[0] - SIDE), index // 2 * 17 % (photo.shape[1] - SIDE)
    return photo[top : top + SIDE, left : left + SIDE]


@dataclass(frozen=True)
class SleepingSampler:
    """Makes a batch at a fixed rate and needs no processor for it."""

    config: ModelConfig
    plan: DepthPlan
    cost: Cost
    images_per_s: float

    def __call__(self, labels: Sequence[int], *, seed: int, indices: Sequence[int]) -> FakeBatch:
        started = time.perf_counter()
        images_BHWC = np.stack([photograph(index) for index in indices])
        signals_BS = np.zeros((len(indices), len(self.config.sides)), dtype=np.float32)
        time.sleep(max(0.0, started + len(indices) / self.images_per_s - time.perf_counter()))
        took_s = time.perf_counter() - started
        return FakeBatch(images_BHWC, signals_BS, signals_BS, took_s, 0.0)


def sleeping_sampler(plan: JobPlan, place: Workplace, device: str) -> SleepingSampler:
    config = model_config(plan.model)
    depth = DepthPlan.build(config.sides, config.num_blocks, plan.runnable_policy)
    rate = float(os.environ[RATE_VARIABLE])
    return SleepingSampler(config, depth, image_cost(config, depth), rate)


@contextmanager
def memory_watched() -> Iterator[list[tuple[float, float]]]:
    """(seconds since 1970, MB that the process alone holds), every twentieth of a second."""
    seen: list[tuple[float, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            status = Path("/proc/self/status").read_text()
            kb = int(status.partition("RssAnon:")[2].split()[0])
            seen.append((time.time(), kb * 1.024e-3))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def encoding_ms(image_format: str, png_level: int, num_images: int = 40) -> float:
    """Processor time of encoding one image, in ms."""
    started = time.thread_time()
    for index in range(num_images):
        encode_image(photograph(index), image_format, png_level)
    return (time.thread_time() - started) / num_images * 1e3


def row(options: argparse.Namespace, image_format: str, rate: float) -> list[str]:
    """Make a dataset in a temporary folder and tell how it went."""
    level = options.png_level if image_format == "png" else DEFAULT_PNG_LEVEL
    alone_ms = encoding_ms(image_format, level)
    os.environ[RATE_VARIABLE] = str(rate)
    num_images = options.shards * options.samples_per_shard
    with tempfile.TemporaryDirectory() as folder, memory_watched() as memory:
        labels = Path(folder, "labels")
        labels.write_text(f"0,{num_images}\n")
        config = GenerateConfig(
            out=f"{folder}/out",
            scratch=f"{folder}/scratch",
            model=MODEL,
            labels_file=labels,
            image_format=image_format,
            png_level=level,
            samples_per_shard=options.samples_per_shard,
            batch_size=options.batch_size,
            encode_threads=options.encode_threads,
            workers=0,
            device="cpu",
            contact_sheet=0,
        )
        started = time.process_time()
        with open(f"{folder}/log", "w") as log, redirect_stderr(log), redirect_stdout(log):
            code = generate(config, sampler_factory="tests.measure_throughput:sleeping_sampler")
        cpu_ms = (time.process_time() - started) / num_images * 1e3
        assert code == 0, Path(folder, "log").read_text()
        storage = Storage.open(config.out)
        plan = read_plan(storage)
        assert plan is not None
        records = list(committed_shards(storage, plan).values())
    at_s = sorted(datetime.fromisoformat(r.committed_at).timestamp() for r in records)
    own = num_images / sum(r.sampling_s for r in records)
    made = (num_images - options.samples_per_shard) / (at_s[-1] - at_s[0])
    is_early = at_s[len(at_s) // 5]
    early = max(mb for time_s, mb in memory if time_s <= is_early)
    late = max(mb for time_s, mb in memory if time_s > is_early)
    return [
        image_format if image_format != "png" else f"png, level {level}",
        f"{rate:g}/s",
        f"{alone_ms:.2f} ms",
        f"{cpu_ms - alone_ms:.2f} ms",
        f"{cpu_ms * rate / 1e3:.2f}",
        str(available_cores()),
        f"{own:.1f}/s",
        f"{made:.1f}/s",
        f"{made / own:.3f}",
        f"{early:.0f} MB",
        f"{late - early:+.0f} MB",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[200.0, 600.0])
    parser.add_argument("--formats", nargs="+", default=["png", "jpg", "webp"])
    parser.add_argument("--shards", type=int, default=50)
    parser.add_argument("--samples-per-shard", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--png-level", type=int, default=DEFAULT_PNG_LEVEL)
    parser.add_argument("--encode-threads", type=int, default=None)
    options = parser.parse_args(argv)
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}", flush=True)
    with mock.patch("pipeline.request.job.fetch_model", fake_weights):
        for image_format in options.formats:
            for rate in options.rates:
                print(f"| {' | '.join(row(options, image_format, rate))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
