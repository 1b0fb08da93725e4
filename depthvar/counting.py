"""What an image takes, counted and not timed: operations that run, and bytes of their operands.

Every machine counts the same, so it is a guard against waste that needs no timer. On a GPU an
operation is about one kernel, which costs its launch, some microseconds, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from depthvar.config import AnyModel
from depthvar.cost import TEXT_TOKENS
from depthvar.infinity_config import InfinityConfig
from depthvar.pointwise import PLAIN, Pointwise
from depthvar.policy import DepthPolicy
from depthvar.sampling import Given, Sampler
from depthvar.weights.checkpoint import AnyLoaded, assemble
from depthvar.weights.find import FoundModel, blank_part
from depthvar.weights.tensor_files import PARTS

_aten = torch.ops.aten
_ONE_KERNEL = {
    _aten.scaled_dot_product_attention.default,
    _aten.upsample_bicubic2d.vec,
    _aten.upsample_bilinear2d.vec,
    _aten.upsample_nearest2d.vec,
}
"""Composed of others by torch's word, but run as one where there is a kernel for it."""
_NO_KERNEL = {
    _aten._unsafe_view.default,
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
}
"""Make a tensor without reading or writing one."""
_OVERWRITES = {_aten.copy_.default, _aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default}
"""Give their first operand without reading it."""


@dataclass(frozen=True)
class Work:
    """Operations that are not views, and the bytes of the tensors that they take and give."""

    operations: int
    operand_bytes: int


@dataclass(frozen=True)
class BatchWork:
    """The work of a batch: from what is given to the feature map, and from there to the pixels."""

    sampling: Work
    decoding: Work


class OperationCounter(TorchDispatchMode):
    """Counts what runs within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self.operand_bytes = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _ONE_KERNEL and is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if not (func.is_view or func in _NO_KERNEL or _copies_onto_itself(func, args)):
            self.operations += 1
            self.operand_bytes += sum(map(_bytes, _read_and_written(func, args, kwargs, result)))
        return result


@cache
def is_composite(operation: torch._ops.OpOverload) -> bool:
    """Whether an operation is made of others, which are counted in its place."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), key)


def _copies_onto_itself(operation: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """The end of `x[:, :k] += y`, which torch leaves out."""
    if operation is not _aten.copy_.default:
        return False
    target, source = args[:2]
    return bool(
        target.untyped_storage()._cdata == source.untyped_storage()._cdata
        and target.storage_offset() == source.storage_offset()
        and target.stride() == source.stride()
    )


def _read_and_written(
    operation: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> list[Tensor]:
    """The tensors that an operation reads, and those that it writes: once each.

    It reads what it changes in place, and does not read what it is to write its results into, which
    torch gives as keywords.
    """
    written = {id(leaf): leaf for leaf in tree_leaves(result)}
    read: list[Any] = []
    for i, argument in enumerate(operation._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.is_write:
            written[id(value)] = value
        if not (argument.is_out or (argument.is_write and operation in _OVERWRITES)):
            read.append(value)
    leaves = (*tree_leaves(read), *written.values())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's own elements: those that an expanded one repeats count once."""
    own = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(own).numel() * tensor.itemsize if tensor.numel() else 0


def blank_model(config: AnyModel, *, dtype: torch.dtype) -> AnyLoaded:
    """A model whose tensors have shapes and no storage: what it does can be counted anywhere."""
    found = FoundModel(config, Path("blank"), Path("blank"), None, ())
    parts = (blank_part(config, part) for part in PARTS)
    return assemble(found, *parts, device="meta", dtype=dtype)


def any_given(config: AnyModel, count: int, device: torch.device) -> Given:
    """What to ask a model for where any will do: its classes in turn, or a text of noise each."""
    if not isinstance(config, InfinityConfig):
        return [i % config.num_classes for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    shape = (count, min(TEXT_TOKENS, config.max_text_tokens), config.text_width)
    return list(torch.randn(shape, generator=generator).to(device))


def work_of_batch(
    model: AnyLoaded, policy: DepthPolicy, batch_size: int, pointwise: Pointwise = PLAIN
) -> BatchWork:
    """What the sampler does for a batch on the device of the model, operation by operation."""
    config, codec = model.config, model.tokenizer.quantize
    sampler = Sampler(model, policy, config.sampling, pointwise=pointwise)
    given = any_given(config, batch_size, model.device)
    with torch.device(model.device):
        ranking_BN = torch.full((batch_size, config.num_tokens), 0.5, dtype=torch.float64)
        uniforms_BU = ranking_BN.repeat(1, codec.draws_per_token)
        feature_map_BZHW = torch.zeros((batch_size, *codec.map_shape), dtype=model.dtype)
    sampling = _counted(lambda: sampler.tokens_from_uniforms(given, uniforms_BU, ranking_BN))
    return BatchWork(sampling, _counted(lambda: sampler.model.tokenizer.decode(feature_map_BZHW)))


def _counted(run: Callable[[], object]) -> Work:
    with torch.inference_mode(), OperationCounter() as counter:
        run()
    return Work(counter.operations, counter.operand_bytes)
