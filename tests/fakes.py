"""A sampler with no model behind it: fast, deterministic, and with faults on request."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthvar.config import AnyModel, model_config
from depthvar.cost import Cost, image_cost
from depthvar.infinity_config import BitDecoderConfig, InfinityConfig
from depthvar.plan import DepthPlan
from pipeline.request.job_plan import JobPlan
from pipeline.run.worker import Workplace
from tests.fault_hook import FAULTS_VARIABLE

# The variable names a JSON file, read at every batch: Ray's workers and children see it too:
#   batch_s: seconds that a batch takes   slow_from: global index that this begins with, default 0
#   gate: folder; batches from the index gate_from on wait there, see `wait_at_gate` and `open_gate`
#   poison: global index whose batch always raises
#   crash: index whose batch always kills its process
#   crash_once: file; whoever finds it first removes it and kills its own process
#   load_error: loading the model fails with this text
#   loads: file that gains one line per load of the model
#   gpus: file that gains a line `node GPU-ids` per load of the model
#   segfault, memory, gpu_memory, nan: index whose batch ends its process, asks for more memory than
#     there is, is refused memory by torch, has a signal that is no number
#   hog: index whose batch takes hog_bytes of memory, bit by bit
#   environment: number added to every pixel, as another environment's last bits would


STAND_INS = Path(__file__).parent / "stand_ins"


def without_torch() -> str:
    """A PYTHONPATH for processes that only need the fake sampler: torch stays out of them."""
    return os.pathsep.join(filter(None, [str(STAND_INS), os.environ.get("PYTHONPATH")]))


def set_faults(path: Path, **faults: object) -> None:
    """Replace the faults in force; none without arguments."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(faults))
    temporary.replace(path)


def wait_at_gate(gate: Path, num_workers: int) -> list[str]:
    """Wait until so many processes wait at a gate; their process ids."""
    deadline_s = time.monotonic() + 120
    while len(waiting := sorted(f.name for f in gate.glob("[0-9]*"))) < num_workers:
        assert time.monotonic() < deadline_s, f"{waiting} wait at the gate"
        time.sleep(0.02)
    return waiting


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def open_gate(gate: Path) -> None:
    (gate / "open").touch()


def _pass_gate(gate: Path) -> None:
    gate.mkdir(exist_ok=True)
    (gate / str(os.getpid())).touch()
    while not (gate / "open").exists():
        time.sleep(0.02)


def faults_in_force() -> dict[str, Any]:
    path = os.environ.get(FAULTS_VARIABLE)
    return json.loads(Path(path).read_text()) if path else {}


@dataclass(frozen=True)
class FakeBatch:
    images_BHWC: np.ndarray
    mean_change_BS: np.ndarray
    mean_log_prob_BS: np.ndarray
    sampling_s: float
    decoding_s: float


TEXT_MODEL = InfinityConfig(
    name="fake-text",
    grids=model_config("digits").grids,
    rotary_grid=(8, 8),
    num_blocks=16,
    width=48,
    num_heads=3,
    bits=6,
    text_width=4,
    pool_heads=3,
    decoder=BitDecoderConfig(base_width=8, multipliers=(1, 2, 4), norm_groups=8),
)
"""A model that is asked in words, as far as the pipeline can tell: images of 32x32 pixels."""


def fake_image(given: Any, seed: int, index: int, side: int, channels: int) -> np.ndarray:
    """A function of (given, seed, index): noise around a grey that names the class or states."""
    label = given if isinstance(given, int) else zlib.crc32(np.asarray(given).tobytes()) % 10
    noise = np.random.Generator(np.random.Philox(key=[seed, index]))
    pixels = noise.integers(0, 40, size=(side, side, channels), dtype=np.uint8)
    return (pixels + np.uint8(20 * label)).astype(np.uint8)


class FakeSampler:
    def __init__(self, config: AnyModel, plan: DepthPlan) -> None:
        self.config = config
        self.plan = plan
        self.cost: Cost = image_cost(config, plan)

    def __call__(self, given: Sequence[Any], *, seed: int, indices: Sequence[int]) -> FakeBatch:
        faults = faults_in_force()
        _act_out(faults, indices)
        channels = self.config.image_channels
        images = [
            fake_image(asked, seed, index, self.config.image_size[0], channels)
            for asked, index in zip(given, indices, strict=True)
        ]
        shape = (len(images), len(self.config.grids))
        change = float("nan") if faults.get("nan") in indices else 0.25
        return FakeBatch(
            images_BHWC=np.stack(images) + np.uint8(faults.get("environment", 0)),
            mean_change_BS=np.full(shape, change, dtype=np.float32),
            mean_log_prob_BS=np.full(shape, -1.5, dtype=np.float32),
            sampling_s=0.01,
            decoding_s=0.005,
        )


def fake_sampler(plan: JobPlan, place: Workplace, device: str) -> FakeSampler:
    faults = faults_in_force()
    if "loads" in faults:
        with open(faults["loads"], "a") as stream:
            stream.write(f"{os.getpid()}\n")
    if "gpus" in faults:
        with open(faults["gpus"], "a") as stream:
            stream.write(f"{os.getppid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    if "load_error" in faults:
        raise RuntimeError(faults["load_error"])
    config = model_config(plan.model) if plan.prompts is None else TEXT_MODEL
    depth = DepthPlan.build(config.grids, config.num_blocks, plan.runnable_policy)
    return FakeSampler(config, depth)


def _act_out(faults: dict[str, Any], indices: Sequence[int]) -> None:
    if indices[0] >= faults.get("slow_from", 0):
        time.sleep(faults.get("batch_s", 0))
    if "gate" in faults and indices[0] >= faults.get("gate_from", 0):
        _pass_gate(Path(faults["gate"]))
    if faults.get("poison") in indices:
        raise ValueError(f"poison at {faults['poison']}")
    if faults.get("crash") in indices:
        os.kill(os.getpid(), signal.SIGKILL)
    if faults.get("segfault") in indices:
        signal.raise_signal(signal.SIGSEGV)  # in this thread, which goes no further
    if faults.get("memory") in indices:
        bytearray(2**60)
    if faults.get("gpu_memory") in indices:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if faults.get("hog") in indices:
        held = []
        for _ in range(faults["hog_bytes"] >> 24):
            held.append(b"x" * 2**24)
            time.sleep(0.01)  # the monitor looks every tenth of a second
    once = faults.get("crash_once")
    if once is not None:
        with contextlib.suppress(FileNotFoundError):
            Path(once).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
