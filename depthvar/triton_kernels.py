"""Pointwise regions as Triton kernels: one pass, sums in the precision `wide`, one rounding.

Rows are read and written by their strides, so that the first slots of a scale are never copied;
channels stand side by side. A program takes one token, or some pixels of a map. Tensors that a
kernel is not to read or write are None. `block` is the least power of two that holds what it names.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def modulate(
    x,
    x_of_row,
    x_of_token,
    branch,
    gate,
    gate_of_row,
    base,
    scale,
    scale_of_row,
    shift,
    shift_of_row,
    added,
    normed,
    count,
    eps: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    """`added = base + branch * gate`, and the layer norm of `x + added`, scaled and shifted."""
    place = tl.program_id(0).to(tl.int64)
    row, token = place // count, place % count
    channels = tl.arange(0, block)
    inside = channels < width
    here = place * width + channels
    values = tl.load(x + row * x_of_row + token * x_of_token + channels, inside, 0).to(wide)
    if branch is not None:
        adding = tl.load(branch + here, inside, 0).to(wide)
        if gate is not None:
            adding *= tl.load(gate + row * gate_of_row + channels, inside, 0).to(wide)
        if base is not None:
            adding += tl.load(base + here, inside, 0).to(wide)
        tl.store(added + here, adding, inside)
        values += adding
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0)
    factor = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    scales = tl.load(scale + row * scale_of_row + channels, inside, 0).to(wide)
    shifts = tl.load(shift + row * shift_of_row + channels, inside, 0).to(wide)
    tl.store(normed + here, centred * factor * scales + shifts, inside)


@triton.jit(do_not_specialize=["count", "total_of_row"])
def add_change(
    x,
    x_of_row,
    x_of_token,
    total,
    total_of_row,
    base,
    branch,
    gate,
    gate_of_row,
    compensation,
    kept,
    kept_of_row,
    kept_of_token,
    count,
    width: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    """Add `(base + branch * gate) * compensation` to `x`, and the sum of its sizes to `total`."""
    place = tl.program_id(0).to(tl.int64)
    row, token = place // count, place % count
    channels = tl.arange(0, block)
    inside = channels < width
    here = place * width + channels
    change = tl.load(base + here, inside, 0).to(wide)
    if branch is not None:
        gates = tl.load(gate + row * gate_of_row + channels, inside, 0).to(wide)
        change += tl.load(branch + here, inside, 0).to(wide) * gates
    if compensation is not None:
        change *= tl.load(compensation + token).to(wide)
    stream = x + row * x_of_row + token * x_of_token + channels
    tl.store(stream, tl.load(stream, inside, 0).to(wide) + change, inside)
    sum_place = total + row * total_of_row + token
    tl.store(sum_place, tl.load(sum_place) + tl.sum(tl.abs(change), 0))
    if kept is not None:
        tl.store(kept + row * kept_of_row + token * kept_of_token + channels, change, inside)


@triton.jit
def _put(vectors, factors, cosines, sines, target, there, inside, turns: tl.constexpr):
    """Write vectors of heads by their factors, each pair of channels turned."""
    vectors *= factors[:, None]
    if turns:
        even, odd = tl.split(tl.reshape(vectors, (there.shape[0], there.shape[1] // 2, 2)))
        vectors = tl.interleave(even * cosines - odd * sines, even * sines + odd * cosines)
    tl.store(target + there, vectors, inside)


@triton.jit(do_not_specialize=["count"])
def put_heads(
    queries,
    keys,
    values,
    from_row,
    from_head,
    from_token,
    scale,
    rotations,
    turn_of_row,
    turn_of_token,
    out_queries,
    out_keys,
    out_values,
    to_row,
    to_head,
    to_token,
    count,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_heads: tl.constexpr,
    block_dim: tl.constexpr,
    wide: tl.constexpr,
):
    """Queries at the length of a scale, keys at length 1, both turned; keys and values put."""
    place = tl.program_id(0).to(tl.int64)
    row, token = place // count, place % count
    head, channel = tl.arange(0, block_heads), tl.arange(0, block_dim)
    inside = (head < num_heads)[:, None] & (channel < head_dim)[None, :]
    here = row * from_row + token * from_token + head[:, None] * from_head + channel[None, :]
    there = row * to_row + token * to_token + head[:, None] * to_head + channel[None, :]
    dense = (place * num_heads + head[:, None]) * head_dim + channel[None, :]
    turns: tl.constexpr = rotations is not None
    cosines, sines = 1.0, 0.0
    if turns:
        pair = tl.arange(0, block_dim // 2)
        of_token = rotations + row * turn_of_row + token * turn_of_token + pair
        is_pair = pair < head_dim // 2
        cosines = tl.load(of_token, is_pair, 1).to(wide)[None, :]
        sines = tl.load(of_token + head_dim // 2, is_pair, 0).to(wide)[None, :]
    q = tl.load(queries + here, inside, 0).to(wide)
    lengths = tl.maximum(tl.sqrt(tl.sum(q * q, 1)), 1e-12)
    scales = tl.load(scale + head, head < num_heads, 1).to(wide)
    _put(q, scales / lengths, cosines, sines, out_queries, dense, inside, turns)
    k = tl.load(keys + here, inside, 0).to(wide)
    lengths = tl.maximum(tl.sqrt(tl.sum(k * k, 1)), 1e-12)
    _put(k, 1 / lengths, cosines, sines, out_keys, there, inside, turns)
    tl.store(out_values + there, tl.load(values + here, inside, 0), inside)


@triton.jit(do_not_specialize=["num_pixels", "chunk"])
def group_moments(
    x,
    moments,
    num_pixels,
    chunk,
    num_groups: tl.constexpr,
    group_width: tl.constexpr,
    block_pixels: tl.constexpr,
    block_groups: tl.constexpr,
    block_width: tl.constexpr,
    wide: tl.constexpr,
):
    """Mean, and sum of squared distances from it, of every group over a chunk of a map's pixels.

    Merged tile by tile (Chan et al.): no digits are lost where the mean is large.
    """
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, channel = tl.arange(0, block_groups), tl.arange(0, block_width)
    columns = (group * group_width)[:, None] + channel[None, :]
    inside = (group < num_groups)[:, None] & (channel < group_width)[None, :]
    begin, end = part * chunk, tl.minimum((part + 1) * chunk, num_pixels)
    mean = tl.zeros((block_groups,), wide)
    squares = tl.zeros((block_groups,), wide)
    seen = tl.full([], 0, wide)
    for start in range(begin, end, block_pixels):
        pixel = start + tl.arange(0, block_pixels)
        here = (image * num_pixels + pixel)[:, None, None] * (num_groups * group_width)
        is_here = (pixel < end)[:, None, None] & inside[None, :, :]
        values = tl.load(x + here + columns[None, :, :], is_here, 0).to(wide)
        more = (tl.minimum(end - start, block_pixels) * group_width).to(wide)
        mean_here = tl.sum(tl.sum(values, 2), 0) / more
        centred = tl.where(is_here, values - mean_here[None, :, None], 0)
        shift = mean_here - mean
        mean += shift * (more / (seen + more))
        squares += tl.sum(tl.sum(centred * centred, 2), 0)
        squares += shift * shift * (seen * (more / (seen + more)))
        seen += more
    place = ((image * tl.num_programs(1) + part) * num_groups + group) * 2
    tl.store(moments + place, mean, group < num_groups)
    tl.store(moments + place + 1, squares, group < num_groups)


@triton.jit(do_not_specialize=["num_pixels", "chunk"])
def group_normalise(
    x,
    moments,
    weight,
    bias,
    normed,
    num_pixels,
    chunk,
    num_parts: tl.constexpr,
    num_groups: tl.constexpr,
    group_width: tl.constexpr,
    block_parts: tl.constexpr,
    block_pixels: tl.constexpr,
    block_groups: tl.constexpr,
    block_width: tl.constexpr,
    eps: tl.constexpr,
    silu: tl.constexpr,
    wide: tl.constexpr,
):
    """A chunk of a map's pixels by the moments of all chunks of the map, with SiLU if wanted."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group, channel = tl.arange(0, block_groups), tl.arange(0, block_width)
    parts = tl.arange(0, block_parts)
    place = ((image * num_parts + parts)[:, None] * num_groups + group[None, :]) * 2
    is_part = (parts < num_parts)[:, None] & (group < num_groups)[None, :]
    pixels_of_part = tl.minimum(num_pixels - parts * chunk, chunk)
    values_of_part = tl.where(parts < num_parts, pixels_of_part * group_width, 0).to(wide)[:, None]
    means = tl.load(moments + place, is_part, 0)
    size = tl.sum(values_of_part, 0)
    mean = tl.sum(means * values_of_part, 0) / size
    shift = tl.where(is_part, means - mean[None, :], 0)
    squares = tl.load(moments + place + 1, is_part, 0) + shift * shift * values_of_part
    factor = tl.rsqrt(tl.sum(squares, 0) / size + eps)
    columns = (group * group_width)[:, None] + channel[None, :]
    inside = (group < num_groups)[:, None] & (channel < group_width)[None, :]
    scales = tl.load(weight + columns, inside, 0).to(wide) * factor[:, None]
    shifts = tl.load(bias + columns, inside, 0).to(wide)
    end = tl.minimum((part + 1) * chunk, num_pixels)
    for start in range(part * chunk, end, block_pixels):
        pixel = start + tl.arange(0, block_pixels)
        here = (image * num_pixels + pixel)[:, None, None] * (num_groups * group_width)
        here += columns[None, :, :]
        is_here = (pixel < end)[:, None, None] & inside[None, :, :]
        values = tl.load(x + here, is_here, 0).to(wide)
        values = (values - mean[None, :, None]) * scales[None, :, :] + shifts[None, :, :]
        if silu:
            values = values / (1 + tl.exp(-values))
        tl.store(normed + here, values, is_here)
