"""The worker: loads the model once, then makes one shard after another. Knows no Ray.

The only bridge between the pipeline and the sampler. Images stay inside the worker: what leaves it
are small progress records, and files that are published whole.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from depthvar.config import ModelConfig
from depthvar.cost import Cost
from depthvar.errors import InputError, naming
from depthvar.plan import DepthPlan
from pipeline.faults import reach
from pipeline.request.generation import Device
from pipeline.request.job_plan import JobPlan, ShardPlan
from pipeline.request.weights import fetch_model
from pipeline.shards.manifest import CommitRecord, publish_shard
from pipeline.shards.writer import ShardWriter
from pipeline.storage import Storage

if TYPE_CHECKING:
    from depthvar.sampling import SampleBatch

_RECORDED_PACKAGES = ("torch", "numpy", "pillow", "pyarrow", "webdataset", "depthvar")
_SCRATCH_PREFIX = "depthvar-"
_LOCK_NAME = "lock"
LOAD_SAMPLER = "pipeline.run.worker:load_sampler"
"""The factory of the one real sampler."""


class SamplerLike(Protocol):
    """What the worker needs of `depthvar.sampling.Sampler`."""

    config: ModelConfig
    plan: DepthPlan
    cost: Cost

    def __call__(self, labels: Sequence[int], *, seed: int, indices: Sequence[int]) -> SampleBatch:
        """Sample one image per label; `indices` are their global indices."""


@dataclass(frozen=True)
class Workplace:
    """What a worker is told beside the plan: where things are, and what it may use.

    `out` and `weights` must mean the same on every machine. `sampler_factory` names a function
    `module:function` that takes the plan, this and a torch device's name.
    """

    out: str
    weights: str | None = None
    scratch: str | None = None
    device: Device = "auto"
    threads: int = 1
    sampler_factory: str = LOAD_SAMPLER


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs; `environment` holds what may decide a last bit."""

    host: str
    pid: int
    device: str
    threads: int
    environment: dict[str, str]

    @property
    def name(self) -> str:
        """`host:pid`."""
        return f"{self.host}:{self.pid}"

    @property
    def made_with(self) -> dict[str, str]:
        """As `CommitRecord.made_with` of a shard that this worker makes."""
        return {**self.environment, "device": self.device, "threads": str(self.threads)}


@dataclass(frozen=True)
class Progress:
    """One micro-batch of a shard was sampled."""

    shard_id: int
    num_images: int


@dataclass(frozen=True)
class ShardDone:
    """A shard is committed; `num_bytes` of tar and Parquet."""

    shard_id: int
    num_bytes: int
    elapsed_s: float


class ShardStopped(Exception):  # noqa: N818 - an orderly stop, not an error
    """The worker was asked to stop; nothing of the shard it was making is left."""


def load_sampler(plan: JobPlan, place: Workplace, device: str) -> SamplerLike:
    """Load the plan's model and build its sampler, the threads fixed first.

    Raises `InputError` for weights that are missing, damaged, or not those that were planned.
    """
    import torch

    from depthvar.sampling import Sampler
    from depthvar.weights.checkpoint import load_model

    policy = plan.runnable_policy
    torch.set_num_threads(place.threads)
    found = fetch_model(plan.model, place.weights)
    if found.sha256 != plan.weights_sha256:
        raise InputError(
            f"the weights on {socket.gethostname()} have SHA-256 {found.sha256}, the plan has"
            f" {plan.weights_sha256}: give every machine the same file"
        )
    model = load_model(found, device=device, dtype=getattr(torch, plan.precision))
    return Sampler(model, policy, plan.sampling)


class Resampler:
    """Samples micro-batches of a plan, without writing anything."""

    def __init__(self, plan: JobPlan, place: Workplace) -> None:
        """Load the model; its errors pass through."""
        self._plan = plan
        device = _resolve_device(place.device)
        self._sampler = _imported(place.sampler_factory)(plan, place, device)
        assert self._sampler.plan.token_layers == plan.compute.token_layers
        self.info = WorkerInfo(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=_device_name(device),
            threads=place.threads,
            environment=_environment(),
        )

    def sample(self, shard: ShardPlan, start: int, stop: int) -> SampleBatch:
        """One micro-batch of a shard, the global indices start ... stop - 1."""
        labels = shard.labels[start - shard.start : stop - shard.start].tolist()
        return self._sampler(labels, seed=self._plan.seed, indices=range(start, stop))


class Worker(Resampler):
    """Makes shards of one plan. Several workers, here or elsewhere, may share one output."""

    def __init__(self, plan: JobPlan, place: Workplace) -> None:
        """Load the model; its errors pass through."""
        storage = Storage.open(place.out)
        super().__init__(plan, place)
        self._storage = storage
        self._scratch = Scratch.claim(place.scratch, plan.fingerprint)

    def run_shard(
        self, shard_id: int, attempt: int, *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Progress | ShardDone]:
        """Make and commit one shard; yields after every micro-batch and at the end.

        Asks `should_stop` before every micro-batch and raises `ShardStopped` when told to. Whatever
        is raised, nothing half-made stays behind, in scratch or in the output.
        """
        started_s = time.monotonic()
        shard = self._plan.shard(shard_id)
        with ShardWriter(self._plan, shard, self._scratch.folder) as writer:
            for start, stop in shard.micro_batches:
                if should_stop():
                    raise ShardStopped(f"shard {shard_id} was stopped before sample {start}")
                batch = self.sample(shard, start, stop)
                with naming(self._scratch.folder):
                    writer.add(batch, start)
                reach("batch-sampled")
                yield Progress(shard_id, stop - start)
            with naming(self._scratch.folder):
                built = writer.finish()
            reach("shard-built")
            record = CommitRecord.of(
                self._plan,
                built,
                attempt=attempt,
                worker=self.info.name,
                device=self.info.device,
                threads=self.info.threads,
                environment=self.info.environment,
            )
            publish_shard(self._storage, self._plan, built, record)
        num_bytes = built.files.tar.size + built.files.parquet.size
        yield ShardDone(shard_id, num_bytes, time.monotonic() - started_s)

    def close(self) -> None:
        """Remove this worker's scratch folder; the worker makes no shard after it."""
        self._scratch.remove()


@dataclass(frozen=True)
class Scratch:
    """A folder of this process alone, held by a lock that dies with the process."""

    folder: Path
    lock: int

    @classmethod
    def claim(cls, root: str | None, fingerprint: str) -> Scratch:
        """Make a fresh folder under `root`, and sweep those that killed workers of this job left.

        `root` defaults to the system's temporary folder.
        """
        base = Path(root or tempfile.gettempdir())
        base.mkdir(parents=True, exist_ok=True)
        prefix = f"{_SCRATCH_PREFIX}{fingerprint[:12]}-"
        for leftover in base.glob(f"{prefix}*"):
            _sweep(leftover)
        # Locked before it gets the name that others sweep.
        unnamed = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=base))
        lock = os.open(unnamed / _LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return cls(unnamed.rename(base / unnamed.name.removeprefix(".")), lock)

    def remove(self) -> None:
        """Delete the folder and let go of the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            os.close(self.lock)


def _sweep(folder: Path) -> None:
    """Delete a scratch folder whose owner is gone: nobody holds its lock any more."""
    try:
        lock = os.open(folder / _LOCK_NAME, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return
    finally:
        os.close(lock)


def _imported(path: str) -> Callable[[JobPlan, Workplace, str], SamplerLike]:
    module, _, name = path.partition(":")
    factory: Callable[[JobPlan, Workplace, str], SamplerLike]
    factory = getattr(importlib.import_module(module), name)
    return factory


def _resolve_device(wanted: Device) -> str:
    """`auto` is the GPU that torch sees, else the CPU."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(wanted: Device) -> None:
    """Refuse `cuda`, with `InputError`, on a machine where torch cannot use it."""
    if wanted != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            f"got --device cuda, but torch {torch.__version__} finds no GPU it can use here:"
            " install a torch with CUDA and its driver, or choose --device cpu"
        )


def _device_name(device: str) -> str:
    """`cpu`, or the GPU's own name: what a difference in the last bit would depend on."""
    if device == "cpu":
        return "cpu"
    import torch

    return str(torch.cuda.get_device_name(device))


def _environment() -> dict[str, str]:
    """Versions of what computes and encodes, and the processor's kind."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
