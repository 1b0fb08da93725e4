"""The worker: loads the model once, then makes shards, one beside the commit of another. No Ray.

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
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from depthvar.config import AnyModel
from depthvar.cost import Cost
from depthvar.errors import InputError, naming
from depthvar.plan import DepthPlan
from depthvar.settings import Kernels, resolved
from pipeline.faults import reach
from pipeline.request.generation import Device
from pipeline.request.job_plan import JobPlan, ShardPlan
from pipeline.request.weights import fetch_model
from pipeline.shards.manifest import CommitRecord, made_with, publish_shard, seconds_by_stage
from pipeline.shards.text_states import TextStates
from pipeline.shards.writer import ShardWriter
from pipeline.storage import Storage

if TYPE_CHECKING:
    from depthvar.sampling import SampleBatch

_RECORDED_PACKAGES = ("torch", "numpy", "pillow", "pyarrow", "webdataset", "depthvar")
_SCRATCH_PREFIX = "depthvar-"
_LOCK_NAME = "lock"
LOAD_SAMPLER = "pipeline.run.worker:load_sampler"
"""The factory of the one real sampler."""
StatesOf = Callable[[str], np.ndarray]
"""Gives the states of a prompt, float32 (tokens, width)."""


class SamplerLike(Protocol):
    """What the worker needs of `depthvar.sampling.Sampler`."""

    config: AnyModel
    plan: DepthPlan
    cost: Cost

    def __call__(
        self, given: Sequence[Any], /, *, seed: int, indices: Sequence[int]
    ) -> SampleBatch:
        """Sample one image of each label, or of each prompt's states, float32 (tokens, width).

        `indices` are their global indices.
        """


@dataclass(frozen=True)
class Workplace:
    """What a worker is told beside the plan: where things are, and what it may use.

    `out`, `weights` and `text_encoder` must mean the same on every machine; `text_states` is a file
    of the driver's. `sampler_factory` names a function
    `module:function` that takes the plan, this and a torch device's name.
    """

    out: str
    weights: str | None = None
    text_encoder: str | None = None
    text_states: str | None = None
    scratch: str | None = None
    device: Device = "auto"
    kernels: Kernels = "auto"
    threads: int = 1
    encode_threads: int = 1
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
        return made_with(self.environment, self.device, self.threads)


@dataclass(frozen=True)
class Progress:
    """One micro-batch of a shard was sampled; after the last one the sampler is free."""

    shard_id: int
    num_images: int
    is_last: bool = False


@dataclass(frozen=True)
class ShardDone:
    """A shard is committed; `num_bytes` of tar and Parquet.

    `seconds` by stage: sampling, decoding, encoding (of all threads) and publishing.
    """

    shard_id: int
    num_bytes: int
    seconds: Mapping[str, float]


class ShardStopped(Exception):  # noqa: N818 - an orderly stop, not an error
    """The worker was asked to stop; nothing of the shard it was making is left."""


def load_sampler(plan: JobPlan, place: Workplace, device: str) -> SamplerLike:
    """Load the plan's model and build its sampler, the threads fixed first.

    Raises `InputError` for weights that are missing, damaged, or not those that were planned.
    """
    import torch

    from depthvar.recording import pointwise_of, recorder
    from depthvar.sampling import Sampler
    from depthvar.weights.checkpoint import load_any

    policy = plan.runnable_policy
    torch.set_num_threads(place.threads)
    found = fetch_model(plan.model, place.weights)
    if found.sha256 != plan.weights_sha256:
        raise InputError(
            f"the weights on {socket.gethostname()} have SHA-256 {found.sha256}, the plan has"
            f" {plan.weights_sha256}: give every machine the same file"
        )
    found = replace(found, config=found.config.of_size(plan.image_size))
    record = recorder(place.kernels, torch.device(device))
    model = load_any(found, device=device, dtype=getattr(torch, plan.precision))
    pointwise = pointwise_of(place.kernels)
    return Sampler(model, policy, plan.sampling, record=record, pointwise=pointwise)


class Resampler:
    """Samples micro-batches of a plan, without writing anything."""

    def __init__(
        self, plan: JobPlan, place: Workplace, *, states_of: StatesOf | None = None
    ) -> None:
        """Load the model; its errors pass through.

        `states_of` gives the states of prompts, by default those in the output.
        """
        self._plan, self._states_of = plan, states_of
        if plan.text_encoder_sha256 is not None and states_of is None:
            self._states_of = TextStates(Storage.open(place.out), plan.text_encoder_sha256).of
        device = resolve_device(place.device)
        self._sampler = _imported(place.sampler_factory)(plan, place, device)
        assert self._sampler.plan.token_layers == plan.compute.token_layers
        self.info = WorkerInfo(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=_device_name(device),
            threads=place.threads,
            environment=_environment() | _kernels(place.kernels, device),
        )

    @property
    def config(self) -> AnyModel:
        """The model's sizes."""
        return self._sampler.config

    def sample(self, shard: ShardPlan, start: int, stop: int) -> SampleBatch:
        """One micro-batch of a shard, the global indices start ... stop - 1."""
        return self._sample(self._given(shard, start, stop), start, stop)

    def _sample(self, given: Sequence[Any], start: int, stop: int) -> SampleBatch:
        return self._sampler(given, seed=self._plan.seed, indices=range(start, stop))

    def _given(self, shard: ShardPlan, start: int, stop: int) -> Sequence[Any]:
        """What the samples of a micro-batch are made from: labels, or the states of prompts."""
        labels: list[int] = shard.labels[start - shard.start : stop - shard.start].tolist()
        if self._states_of is None:
            return labels
        import torch

        found = []
        for label, index in zip(labels, range(start, stop), strict=True):
            prompt = self._plan.prompt_of(label, index)
            assert prompt is not None, "a plan with a text encoder has prompts"
            found.append(torch.from_numpy(self._states_of(prompt.text)))
        return found


class Worker(Resampler):
    """Makes shards of one plan. Several workers, here or elsewhere, may share one output.

    `run_shard` may run in two threads at once: one shard is sampled while another is committed. All
    sampling happens in one thread, for what torch keeps by thread.
    """

    def __init__(self, plan: JobPlan, place: Workplace) -> None:
        """Load the model; its errors pass through."""
        self._storage = Storage.open(place.out)
        self._encode_threads = place.encode_threads
        self._sampling, self._committing = threading.Lock(), threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sample")
        with ExitStack() as on_error:
            on_error.callback(self._thread.shutdown)
            self._thread.submit(super().__init__, plan, place).result()
            self._scratch = Scratch.claim(place.scratch, plan.fingerprint)
            on_error.pop_all()

    def run_shard(
        self, shard_id: int, attempt: int, *, should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Progress | ShardDone]:
        """Make and commit one shard; yields after every micro-batch and at the end.

        Each micro-batch is taken in while the next one is sampled. With its last one the shard
        leaves the sampler to another: from there on it is being committed. It stays in the sampler
        until the shard before is committed, so that a worker never holds more than two, the
        scratch files of both and of each the images that a writer lets wait.

        Asks `should_stop` before every micro-batch and raises `ShardStopped` when told to. Whatever
        is raised, nothing half-made stays behind, in scratch or in the output.
        """
        shard, scratch = self._plan.shard(shard_id), self._scratch.folder
        with ExitStack() as stage:
            stage.enter_context(self._sampling)
            writer = ShardWriter(self._plan, shard, scratch, threads=self._encode_threads)
            with writer, closing(self._sampled(shard, should_stop)) as batches:
                for start, stop, batch in batches:
                    is_last = stop == shard.stop
                    if is_last:
                        self._committing.acquire()
                        stage.close()
                        stage.callback(self._committing.release)
                    yield Progress(shard_id, stop - start, is_last)
                    with naming(scratch):
                        writer.add(batch, start)
                    reach("batch-sampled")
                done = self._commit(writer, attempt)
        yield done

    def _commit(self, writer: ShardWriter, attempt: int) -> ShardDone:
        """Finish a shard and publish it."""
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
        begun_s = time.monotonic()
        publish_shard(self._storage, self._plan, built, record)
        return ShardDone(
            built.shard_id,
            built.files.tar.size + built.files.parquet.size,
            {**seconds_by_stage(built.batches), "publishing": time.monotonic() - begun_s},
        )

    def _sampled(
        self, shard: ShardPlan, should_stop: Callable[[], bool]
    ) -> Generator[tuple[int, int, SampleBatch]]:
        """(start, stop, batch) of the micro-batches in order, the next one always being sampled."""

        def ask(given: Sequence[Any], start: int, stop: int) -> Future[SampleBatch]:
            if should_stop():
                raise ShardStopped(f"shard {shard.shard_id} was stopped before sample {start}")
            return self._thread.submit(self._sample, given, start, stop)

        batches = shard.micro_batches
        ahead = ask(self._given(shard, *batches[0]), *batches[0])
        try:
            for (start, stop), following in zip_longest(batches, batches[1:]):
                given = self._given(shard, *following) if following else ()
                batch = ahead.result()
                if following:
                    ahead = ask(given, *following)
                yield start, stop, batch
        finally:
            wait([ahead])

    def close(self) -> None:
        """Remove this worker's scratch folder; the worker makes no shard after it."""
        self._thread.shutdown()
        self._scratch.remove()


@dataclass(frozen=True)
class Scratch:
    """A folder of this process alone, held by a lock that dies with the process."""

    folder: Path
    prefix: str
    lock: int

    @classmethod
    def claim(cls, root: str | None, fingerprint: str) -> Scratch:
        """Make a fresh folder under `root`, and sweep those that killed workers of this job left.

        `root` defaults to the system's temporary folder.
        """
        base = Path(root or tempfile.gettempdir())
        base.mkdir(parents=True, exist_ok=True)
        prefix = f"{_SCRATCH_PREFIX}{fingerprint[:12]}-"
        _sweep(base, prefix)
        # Locked before it gets the name that others sweep.
        unnamed = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=base))
        lock = os.open(unnamed / _LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return cls(unnamed.rename(base / unnamed.name.removeprefix(".")), prefix, lock)

    def remove(self) -> None:
        """Delete the folder, let go of the lock, and sweep once more.

        A worker that was killed just before this one started may have held its lock until now.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            os.close(self.lock)
        _sweep(self.folder.parent, self.prefix)


def _sweep(base: Path, prefix: str) -> None:
    """Delete the scratch folders whose owners are gone: nobody holds their locks any more."""
    for folder in base.glob(f"{prefix}*"):
        with suppress(OSError):
            lock = os.open(folder / _LOCK_NAME, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _imported(path: str) -> Callable[[JobPlan, Workplace, str], SamplerLike]:
    module, _, name = path.partition(":")
    factory: Callable[[JobPlan, Workplace, str], SamplerLike]
    factory = getattr(importlib.import_module(module), name)
    return factory


def resolve_device(wanted: Device) -> str:
    """`auto` is the GPU that torch sees, else the CPU."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(wanted: Device, kernels: Kernels) -> None:
    """Refuse a device and kernels, with `InputError`, on a machine where torch cannot use them."""
    if wanted != "cuda" and kernels in ("auto", "plain"):
        return
    import torch

    from depthvar.recording import recorder

    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"got --device cuda, but torch {torch.__version__} finds no GPU it can use here:"
            " install a torch with CUDA and its driver, or choose --device cpu"
        )
    recorder(kernels, torch.device(resolve_device(wanted)))


def _device_name(device: str) -> str:
    """`cpu`, or the GPU's own name: what a difference in the last bit would depend on."""
    if device == "cpu":
        return "cpu"
    import torch

    return str(torch.cuda.get_device_name(device))


def _kernels(wanted: Kernels, device: str) -> dict[str, str]:
    """Batches of a recording or of Triton's may differ from plain ones in the last bit."""
    kernels = resolved(wanted, on_gpu=device == "cuda")
    return {} if kernels == "plain" else {"kernels": kernels}


def _environment() -> dict[str, str]:
    """Versions of what computes and encodes, and the processor's kind."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
