"""Memory of a batch by arithmetic: weights, cache, and what sampling and decoding hold at once.

Counts the tensors that are alive together at the widest moment of each phase. What a process on a
CPU holds besides, its own memory and the libraries' files, are measured constants; a CUDA context
is not counted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from depthvar.config import AnyModel, TokenizerConfig
from depthvar.cost import TEXT_TOKENS
from depthvar.infinity_config import InfinityConfig
from depthvar.plan import DepthPlan
from depthvar.settings import DecoderShape, Grid

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WIDE = 4

# Alive at once, in units of one value per token and channel. In the stream's precision: of all
# tokens the embedded input and the slots, of the active ones the stream after
# attention and the change. In the model's: attention's output, and of the feed-forward the
# norm and two hidden layers.
_STREAMS_OF_ALL = 2
_STREAMS_OF_ACTIVE = 2
# Alive at once, in units of one float32 per token and code: while logits are guided those of two
# streams, both as weighted, and what is left; while codes are drawn from all of them (top-k needs
# less) the logits, as sorted, their places and sums.
_WHILE_GUIDED = 5.0
_WHILE_DRAWN = 4.3
# Feature maps of the highest resolution alive at once in a residual block of the decoder: its
# input in two layouts, the normed and the activated map, the convolution's input and result.
_MAPS_IN_A_RES_BLOCK = 6
# Enough for a GPU to be busy; the maps of a whole large batch would not fit into most.
_PIXELS_DECODED_AT_ONCE = 2**20


PROCESS_BYTES = 195_000_000
"""Bytes of a worker's process on a CPU besides its tensors and files (Python 3.11, torch 2.13)."""
LIBRARY_BYTES = 325_000_000
"""Resident bytes of mapped library files, at most: the kernel may map as little as half of it."""
HEAP_SLACK = 0.25
"""Of a CPU worker's tensors, what the C library's heaps hold unused beside them, at most about.

Freed blocks of up to 32 MB wait there; how well the next ones fit is a matter of the processor's
kernels and of the threads' timing. Measured with the digits: 0.03 to 0.15 up to batch 30, 0.12 to
0.32 at batch 100, 0.18 at 200 and 400.
"""
CUDA_BYTES = 500_000_000
"""Bytes of a GPU that its driver, a CUDA context and the libraries' kernels take, about."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one worker on its device, for a batch size."""

    weights: int
    cache: int
    sampling: int
    decoding: int

    @property
    def peak(self) -> int:
        """Most bytes held at once: the cache is given back before the images are decoded."""
        return self.weights + max(self.cache + self.sampling, self.decoding)

    @property
    def recorded_peak(self) -> int:
        """The same where batches are recorded: each new shape runs once beside what is recorded."""
        return self.weights + 2 * (self.peak - self.weights)

    @property
    def process_peak(self) -> int:
        """Most bytes that a worker's process on a CPU is resident with; weights leave no slack."""
        slack = int(HEAP_SLACK * (self.peak - self.weights))
        return self.peak + slack + PROCESS_BYTES + LIBRARY_BYTES


def memory_need(
    config: AnyModel, plan: DepthPlan, *, batch_size: int, streams: int, precision: str
) -> MemoryNeed:
    """What one worker needs to sample `batch_size` images at once, of texts of `TEXT_TOKENS`."""
    size = _BYTES[precision]
    return MemoryNeed(
        weights=_weight_bytes(config, size),
        cache=2 * batch_size * streams * config.width * sum(plan.cache_lengths) * size,
        sampling=_sampling_bytes(config, plan, batch_size, streams, size),
        decoding=_decoding_bytes(config.decoder_shape, config.image_size, batch_size, size),
    )


def largest_batch(
    config: AnyModel,
    plan: DepthPlan,
    room: int,
    *,
    at_most: int,
    streams: int,
    precision: str,
    is_recorded: bool = False,
) -> int:
    """The largest batch size up to `at_most` whose peak fits in `room` bytes; 0 if none does.

    `is_recorded`: as of `MemoryNeed.recorded_peak`.
    """

    def peak(batch_size: int) -> int:
        need = memory_need(
            config, plan, batch_size=batch_size, streams=streams, precision=precision
        )
        return need.recorded_peak if is_recorded else need.peak

    return bisect_right(range(1, at_most + 1), room, key=peak)


def images_decoded_at_once(image_size: Grid) -> int:
    """How many images of a batch the decoder takes at a time."""
    return max(1, _PIXELS_DECODED_AT_ONCE // math.prod(image_size))


def transformer_parameters(config: AnyModel) -> int:
    """Parameters of the transformer."""
    if isinstance(config, InfinityConfig):
        return _text_transformer_parameters(config)
    shape = config.transformer
    width, blocks = shape.width, shape.num_blocks
    attention = 4 * width**2 + 3 * width + shape.num_heads
    feed_forward = 2 * shape.mlp_ratio * width**2 + (shape.mlp_ratio + 1) * width
    adaln = 6 * width**2 + 6 * width
    modulation = adaln + blocks * 6 * width if shape.shared_adaln else blocks * adaln
    embeddings = (1 + shape.num_tokens + len(shape.sides) + shape.num_classes + 1) * width
    head = 2 * width**2 + 2 * width + shape.codebook_size * (width + 1)
    word = (shape.code_channels + 1) * width
    return blocks * (attention + feed_forward) + modulation + embeddings + head + word


def _text_transformer_parameters(config: InfinityConfig) -> int:
    width, text = config.width, config.text_width
    self_attention = 4 * width**2 + 3 * width + config.num_heads
    cross_attention = 4 * width**2 + 3 * width
    feed_forward = 2 * width * config.mlp_width + config.mlp_width + width
    block = self_attention + cross_attention + feed_forward + (2 + 6) * width
    pool = width + 2 * width * text + width + width**2 + width
    texts = config.max_text_tokens * text + text + width * (text + 1) + width * (width + 1)
    adaln = 6 * width**2 + 6 * width
    embeddings = (1 + config.num_levels + config.bits + 1) * width
    head = 2 * width**2 + 2 * width + 2 * config.bits * (width + 1)
    return config.num_blocks * block + pool + texts + adaln + embeddings + head


def _weight_bytes(config: AnyModel, size: int) -> int:
    if isinstance(config, InfinityConfig):
        wide = (config.max_text_tokens + 1) * config.text_width
        narrow = transformer_parameters(config) - wide + _decoder_parameters(config.decoder_shape)
        return narrow * size + wide * max(size, _WIDE)
    shape = config.tokenizer
    phis = shape.num_phis * (9 * shape.code_channels**2 + shape.code_channels)
    quantizer = shape.codebook_size * shape.code_channels + phis
    narrow = transformer_parameters(config) + decoder_parameters(shape)
    return narrow * size + quantizer * _WIDE


def decoder_parameters(config: TokenizerConfig) -> int:
    """Parameters from the feature map to the pixels, without the quantizer."""
    after_quantizing = (9 * config.code_channels + 1) * config.code_channels
    return after_quantizing + _decoder_parameters(config.decoder_shape)


def _decoder_parameters(shape: DecoderShape) -> int:
    widths = [shape.base_width * m for m in shape.multipliers]
    last = len(widths) - 1

    def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
        return inputs * outputs * kernel**2 + outputs

    def res_block(inputs: int, outputs: int) -> int:
        norms = 2 * inputs + 2 * outputs
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return norms + conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    def attention(channels: int) -> int:
        if not shape.has_attention:
            return 0
        return 2 * channels + conv(channels, 3 * channels, 1) + conv(channels, channels, 1)

    total = conv(shape.code_channels, widths[-1])
    total += 2 * res_block(widths[-1], widths[-1]) + attention(widths[-1])
    for level in range(last, -1, -1):
        total += res_block(widths[min(level + 1, last)], widths[level])
        total += shape.num_res_blocks * res_block(widths[level], widths[level])
        total += (shape.num_res_blocks + 1) * attention(widths[level]) if level == last else 0
        total += conv(widths[level], widths[level]) if level else 0
    return total + 2 * widths[0] + conv(widths[0], shape.image_channels)


def _sampling_bytes(
    config: AnyModel, plan: DepthPlan, batch_size: int, streams: int, size: int
) -> int:
    """The widest moment over the scales: their blocks, or the draw of their tokens."""
    blocks, wide = plan.num_blocks, max(size, _WIDE)
    vectors = batch_size * streams * config.width
    if isinstance(config, InfinityConfig):
        # Keys and values of the texts, the feature map, a scale's input of it, and all bits.
        held = 2 * TEXT_TOKENS * blocks * vectors * size
        held += 2 * batch_size * config.bits * math.prod(config.grids[-1]) * wide
        held += batch_size * config.bits * config.num_tokens
        hidden = config.mlp_width
        turned = 4  # in the stream's precision the queries and keys, as they were and turned
    else:
        held, turned = 0, 0
        hidden = 4 * config.width
    held += 6 * blocks * vectors * wide  # of AdaLN
    kept = [
        scale.count * sum(plan.keeps_change(i, block) for block in range(blocks))
        for i, scale in enumerate(plan.scales)
    ]
    branches = 1 + 1 + 2 * hidden / config.width
    moments = []
    logits = earlier = 0.0
    for i, (scale, running) in enumerate(zip(plan.scales, plan.streams(streams), strict=True)):
        branch, stream = (batch_size * running * config.width * each for each in (size, wide))
        held_over = earlier + (logits if plan.keeps_difference(i - 1) else 0)
        active = max(scale.prefix)
        tokens = _STREAMS_OF_ALL * scale.count + _STREAMS_OF_ACTIVE * active
        block = (tokens + kept[i]) * stream + active * round(branches * branch)
        attention = (_STREAMS_OF_ALL * scale.count + active + kept[i]) * stream
        attention += active * (3 * branch + turned * stream)
        logits = float(_WIDE * batch_size * scale.count * config.num_logits)
        draw = (_WHILE_DRAWN + plan.keeps_difference(i)) * logits
        draw = draw if running == 1 else max(draw, _WHILE_GUIDED * logits)
        moments += [held_over + block, draw + (kept[i] + 2 * scale.count) * stream]
        moments += [held_over + attention] if turned else []
        earlier = float(kept[i] * stream)
    return held + round(max(moments))


def _decoding_bytes(shape: DecoderShape, image_size: Grid, batch_size: int, size: int) -> int:
    widest = shape.base_width * shape.multipliers[0] * math.prod(image_size)
    at_once = min(batch_size, images_decoded_at_once(image_size))
    return _MAPS_IN_A_RES_BLOCK * at_once * widest * size
