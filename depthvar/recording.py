"""A batch as one recording: what runs on the device, without the host between the kernels.

A full-depth batch of var-d30 launches some ten thousand kernels, which at small batches takes the
host longer than the GPU. Nothing that is sampled decides what is launched, so a batch can be
recorded once for every shape of its inputs and replayed for every other one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from depthvar.errors import InputError
from depthvar.pointwise import PLAIN, Pointwise
from depthvar.settings import Kernels, records

Outputs = tuple[Tensor, ...]
Replay = Callable[[], Outputs]
Record = Callable[[Callable[..., Outputs], tuple[Any, ...]], Replay]
"""Makes, of a function and inputs that stay where they are, what runs it again on their values.

The outputs hold until the next replay of anything that was recorded with it.
"""


def recorder(kernels: Kernels, device: torch.device) -> Record | None:
    """What records a batch on a device as `kernels` say; None where each operation is launched.

    `InputError` for a recording on a device that has none, and for kernels that it cannot run.
    """
    on_gpu = device.type == "cuda"
    if kernels == "graph" and not on_gpu:
        raise InputError(
            f"got --kernels graph for a model on {device.type}, wanted a GPU, whose graphs it "
            "records: use --kernels plain"
        )
    if not pointwise_of(kernels).runs_on(device):
        raise InputError(
            f"got --kernels {kernels} for a model on {device.type}, wanted a GPU, or a CPU and "
            "TRITON_INTERPRET=1, which is for tests: use --kernels plain"
        )
    return CudaGraphs() if records(kernels, on_gpu=on_gpu) else None


def pointwise_of(kernels: Kernels) -> Pointwise:
    """What lies between the products as `kernels` say. `InputError` where Triton is missing."""
    if kernels != "triton":
        return PLAIN
    try:
        from depthvar.triton_pointwise import TRITON
    except ImportError as error:
        raise InputError(
            f"got --kernels triton, but Triton cannot be imported here ({error}): torch with CUDA "
            "brings it on Linux, elsewhere use --kernels graph or plain"
        ) from error
    return TRITON


class CudaGraphs:
    """Records CUDA graphs, all in one pool of memory: replay one after the other, in one thread."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[..., Outputs], inputs: tuple[Any, ...]) -> Replay:
        """Run the function once to let libraries choose their kernels, then record it."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads encode images meanwhile: what they do is no part of the recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = function(*inputs)

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


@dataclass(frozen=True)
class _Take:
    """One recording: its own inputs, and what they must look like to be filled."""

    structure: TreeSpec
    inputs: list[Any]
    replay: Replay

    def fits(self, structure: TreeSpec, given: list[Any]) -> bool:
        """Whether inputs have the shapes and types that were recorded."""
        return structure == self.structure and all(map(_alike, given, self.inputs))


class Recorded:
    """A function of tensors, and of what is built of tensors, recorded once per shapes."""

    def __init__(self, function: Callable[..., Outputs], record: Record) -> None:
        self._function = function
        self._record = record
        self._takes: list[_Take] = []

    def __call__(self, *given: Any) -> Outputs:
        """What the function returns; it holds until the next call."""
        leaves, structure = tree_flatten(given)
        for take in self._takes:
            if take.fits(structure, leaves):
                break
        else:
            own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            replay = self._record(self._function, tree_unflatten(own, structure))
            take = _Take(structure, own, replay)
            self._takes.append(take)
        for kept, leaf in zip(take.inputs, leaves, strict=True):
            if isinstance(leaf, Tensor):
                kept.copy_(leaf)
        return take.replay()


def _alike(given: Any, kept: Any) -> bool:
    if not isinstance(given, Tensor):
        return bool(given == kept)
    return isinstance(kept, Tensor) and (given.shape, given.dtype) == (kept.shape, kept.dtype)
