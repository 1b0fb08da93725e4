"""The pointwise regions by Triton's kernels, each of them one operation of torch's.

What an operation only writes are its keyword arguments, as torch's own have `out=`: so recordings,
tensors without values and `counting` see what it reads and writes.

Shape legend: that of `pointwise`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from depthvar import triton_kernels as kernels
from depthvar.pointwise import Change, Pointwise

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs the kernels on the host, which is how they are tested without a GPU."""
_LIBRARY = torch.library.Library("depthvar", "DEF")
_TILE = 4096
"""Values of a map that a program holds at once."""
_MOST_PARTS = 128
"""Chunks that a map's pixels are cut into: as many programs for an image."""


def _operation(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function that writes into its arguments an operation `depthvar::` of torch's."""

    def registered(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        _LIBRARY.define(f"{name}{schema} -> ()")
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, key)
        _LIBRARY.impl(name, lambda *args, **kwargs: None, "Meta")
        operation: Callable[..., None] = getattr(torch.ops.depthvar, name)
        return operation

    return registered


@_operation(
    "(Tensor x, Tensor? branch, Tensor? gate, Tensor? base, Tensor scale, Tensor shift, float eps,"
    " *, Tensor(a!)? added, Tensor(b!) normed)"
)
def modulate(
    x_GTC: Tensor,
    branch_GTC: Tensor | None,
    gate_G1C: Tensor | None,
    base_GTC: Tensor | None,
    scale_G1C: Tensor,
    shift_G1C: Tensor,
    eps: float,
    *,
    added: Tensor | None,
    normed: Tensor,
) -> None:
    """Launch `kernels.modulate` over the tokens."""
    rows, count, width = x_GTC.shape
    _require(x_GTC, gate_G1C, scale_G1C, shift_G1C)
    _require(branch_GTC, base_GTC, added, normed, dense=True)
    kernels.modulate[(rows * count,)](
        x_GTC,
        *x_GTC.stride()[:2],
        branch_GTC,
        gate_G1C,
        _row_stride(gate_G1C, rows),
        base_GTC,
        scale_G1C,
        _row_stride(scale_G1C, rows),
        shift_G1C,
        _row_stride(shift_G1C, rows),
        added,
        normed,
        count,
        eps,
        **_of_width(width, x_GTC.dtype),
    )


@_operation(
    "(Tensor(a!) x, Tensor(b!) total, Tensor base, Tensor? branch, Tensor? gate,"
    " Tensor? compensation, *, Tensor(c!)? kept)"
)
def add_change(
    x_GKC: Tensor,
    total_GK: Tensor,
    base_GKC: Tensor,
    branch_GKC: Tensor | None,
    gate_G1C: Tensor | None,
    compensation_K1: Tensor | None,
    *,
    kept: Tensor | None,
) -> None:
    """Launch `kernels.add_change` over the tokens."""
    rows, count, width = x_GKC.shape
    _require(x_GKC, total_GK, gate_G1C, kept)
    _require(base_GKC, branch_GKC, compensation_K1, dense=True)
    kernels.add_change[(rows * count,)](
        x_GKC,
        *x_GKC.stride()[:2],
        total_GK,
        total_GK.stride(0),
        base_GKC,
        branch_GKC,
        gate_G1C,
        _row_stride(gate_G1C, rows),
        compensation_K1,
        kept,
        *((0, 0) if kept is None else kept.stride()[:2]),
        count,
        **_of_width(width, x_GKC.dtype),
    )


@_operation(
    "(Tensor queries, Tensor keys, Tensor values, Tensor scale, Tensor? rotations, *,"
    " Tensor(a!) out_queries, Tensor(b!) out_keys, Tensor(c!) out_values)"
)
def put_heads(
    q_GHKD: Tensor,
    k_GHKD: Tensor,
    v_GHKD: Tensor,
    scale_1H11: Tensor,
    rotations_GKD: Tensor | None,
    *,
    out_queries: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
) -> None:
    """Launch `kernels.put_heads` over the tokens."""
    rows, num_heads, count, head_dim = q_GHKD.shape
    assert q_GHKD.stride() == k_GHKD.stride() == v_GHKD.stride()
    assert out_keys.stride() == out_values.stride()
    _require(q_GHKD, rotations_GKD, out_keys)
    _require(scale_1H11, out_queries, dense=True)
    kernels.put_heads[(rows * count,)](
        q_GHKD,
        k_GHKD,
        v_GHKD,
        *q_GHKD.stride()[:3],
        scale_1H11,
        rotations_GKD,
        *((0, 0) if rotations_GKD is None else rotations_GKD.stride()[:2]),
        out_queries,
        out_keys,
        out_values,
        *out_keys.stride()[:3],
        count,
        num_heads,
        head_dim,
        triton.next_power_of_2(num_heads),
        triton.next_power_of_2(head_dim),
        _wide(q_GHKD.dtype),
    )


@_operation("(Tensor x, int num_groups, *, Tensor(a!) moments)")
def group_moments(x_BNIJ: Tensor, num_groups: int, *, moments: Tensor) -> None:
    """Launch `kernels.group_moments` over images and their chunks."""
    chunk = _chunk(x_BNIJ)
    kernels.group_moments[moments.shape[:2]](
        _channels_last(x_BNIJ),
        moments,
        x_BNIJ.shape[2:].numel(),
        chunk,
        **_of_groups(x_BNIJ, num_groups),
    )


@_operation(
    "(Tensor x, Tensor moments, Tensor weight, Tensor bias, float eps, bool silu, *,"
    " Tensor(a!) normed)"
)
def group_normalise(
    x_BNIJ: Tensor,
    moments_BPG2: Tensor,
    weight_N: Tensor,
    bias_N: Tensor,
    eps: float,
    silu: bool,
    *,
    normed: Tensor,
) -> None:
    """Launch `kernels.group_normalise` over images and their chunks."""
    batch, num_parts, num_groups, _ = moments_BPG2.shape
    kernels.group_normalise[(batch, num_parts)](
        _channels_last(x_BNIJ),
        moments_BPG2,
        weight_N,
        bias_N,
        normed,
        x_BNIJ.shape[2:].numel(),
        _chunk(x_BNIJ),
        num_parts,
        block_parts=triton.next_power_of_2(num_parts),
        eps=eps,
        silu=silu,
        **_of_groups(x_BNIJ, num_groups),
    )


class TritonPointwise(Pointwise):
    """The siblings, on a GPU or, where Triton interprets its kernels, on a CPU."""

    def runs_on(self, device: torch.device) -> bool:
        """Whether a device can run it."""
        return (device.type == "cuda") != INTERPRETED

    def modulated(
        self,
        x_GTC: Tensor,
        scale_G1C: Tensor,
        shift_G1C: Tensor,
        *,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Layer norm with conditional scale and shift (AdaLN), rounded once, to `dtype`."""
        normed = _dense_like(x_GTC, dtype)
        modulate(x_GTC, None, None, None, scale_G1C, shift_G1C, eps, added=None, normed=normed)
        return normed

    def added_and_modulated(
        self,
        x_GTC: Tensor,
        branch_GTC: Tensor,
        gate_G1C: Tensor | None,
        base_GTC: Tensor | None,
        scale_G1C: Tensor,
        shift_G1C: Tensor,
        *,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """`added = base + branch * gate`, and `x + added` as `modulated` gives it."""
        added, normed = _dense_like(x_GTC, x_GTC.dtype), _dense_like(x_GTC, dtype)
        terms = (branch_GTC, gate_G1C, base_GTC)
        modulate(x_GTC, *terms, scale_G1C, shift_G1C, eps, added=added, normed=normed)
        return added, normed

    def gated_sum(self, base_GKC: Tensor, branch_GKC: Tensor, gate_G1C: Tensor) -> Change:
        """Its parts: they are added where they meet the stream."""
        return Change(base_GKC, branch_GKC, gate_G1C)

    def add(
        self, x_GTC: Tensor, total_GT: Tensor, changes: Sequence[Change], *, keep: bool
    ) -> Tensor | None:
        """Add changes to the first tokens, and their sizes to the sums of those."""
        counts = [change.base_GKC.shape[1] for change in changes]
        kept_GTC = None
        if keep and changes:
            kept_GTC = x_GTC.new_empty(len(x_GTC), sum(counts), x_GTC.shape[2])
        ends = accumulate(counts)
        for change, count, end in zip(changes, counts, ends, strict=True):
            part = slice(end - count, end)
            add_change(
                x_GTC[:, part],
                total_GT[:, part],
                change.base_GKC,
                change.branch_GKC,
                change.gate_G1C,
                change.compensation_K1,
                kept=None if kept_GTC is None else kept_GTC[:, part],
            )
        return kept_GTC

    def put_heads(
        self,
        q_GHKD: Tensor,
        k_GHKD: Tensor,
        v_GHKD: Tensor,
        scale_1H11: Tensor,
        rotations_GKD: Tensor | None,
        keys_GHKD: Tensor,
        values_GHKD: Tensor,
    ) -> Tensor:
        """Queries at the length of a scale; put keys of length 1, and values."""
        rows, num_heads, count, head_dim = q_GHKD.shape
        out_GKHD = q_GHKD.new_empty(rows, count, num_heads, head_dim)
        put_heads(
            q_GHKD,
            k_GHKD,
            v_GHKD,
            scale_1H11,
            rotations_GKD,
            out_queries=out_GKHD,
            out_keys=keys_GHKD,
            out_values=values_GHKD,
        )
        return out_GKHD.transpose(1, 2)

    def linear_gelu(self, layer: nn.Linear, x_GKC: Tensor) -> Tensor:
        """Tanh GELU of a linear layer; in half precision taken as the product is written.

        What approximates it there is the library's business, and float32 stays float32. On a CPU
        torch's operation takes the exact GELU.
        """
        if x_GKC.is_cpu or x_GKC.itemsize > 2:
            return super().linear_gelu(layer, x_GKC)
        flat_NF = torch._addmm_activation(
            layer.bias, x_GKC.flatten(0, 1), layer.weight.t(), use_gelu=True
        )
        return flat_NF.view(*x_GKC.shape[:2], -1)

    def group_norm(self, norm: nn.GroupNorm, x_BNIJ: Tensor, *, silu: bool) -> Tensor:
        """Group norm, and SiLU of it if told so; channels-last, as the decoder's maps are."""
        num_pixels = x_BNIJ.shape[2:].numel()
        moments_BPG2 = torch.empty(
            len(x_BNIJ),
            triton.cdiv(num_pixels, _chunk(x_BNIJ)),
            norm.num_groups,
            2,
            dtype=torch.promote_types(x_BNIJ.dtype, torch.float32),
            device=x_BNIJ.device,
        )
        group_moments(x_BNIJ, norm.num_groups, moments=moments_BPG2)
        normed = torch.empty_like(x_BNIJ, memory_format=torch.channels_last)
        group_normalise(x_BNIJ, moments_BPG2, norm.weight, norm.bias, norm.eps, silu, normed=normed)
        return normed


TRITON = TritonPointwise()


def _dense_like(x_GTC: Tensor, dtype: torch.dtype) -> Tensor:
    return x_GTC.new_empty(x_GTC.shape, dtype=dtype)


def _require(*tensors: Tensor | None, dense: bool = False) -> None:
    """What the kernels count on: channels side by side, or the whole tensor in order."""
    for tensor in tensors:
        if tensor is not None:
            assert tensor.is_contiguous() if dense else tensor.stride(-1) == 1


def _row_stride(vectors: Tensor | None, rows: int) -> int:
    """Stride from a row's vector to the next one's: of (G, 1, C), or of one (C) for all."""
    return 0 if vectors is None else vectors.expand(rows, 1, -1).stride(0)


def _channels_last(x_BNIJ: Tensor) -> Tensor:
    """The map itself where it is so, as those of channels-last convolutions are on a GPU."""
    return x_BNIJ.contiguous(memory_format=torch.channels_last)


def _chunk(x_BNIJ: Tensor) -> int:
    """Pixels of a map that one program takes."""
    num_channels, num_pixels = x_BNIJ.shape[1], x_BNIJ.shape[2:].numel()
    chunk: int = max(triton.cdiv(num_pixels, _MOST_PARTS), triton.cdiv(_TILE, num_channels))
    return chunk


def _wide(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _of_width(width: int, dtype: torch.dtype) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {
        "width": width,
        "block": block,
        "wide": _wide(dtype),
        "num_warps": 8 if block > 2048 else 4,
    }


def _of_groups(x_BNIJ: Tensor, num_groups: int) -> dict[str, Any]:
    group_width = x_BNIJ.shape[1] // num_groups
    block_groups, block_width = map(triton.next_power_of_2, (num_groups, group_width))
    return {
        "num_groups": num_groups,
        "group_width": group_width,
        "block_pixels": max(1, _TILE // (block_groups * block_width)),
        "block_groups": block_groups,
        "block_width": block_width,
        "wide": _wide(x_BNIJ.dtype),
        "num_warps": 8,
    }
