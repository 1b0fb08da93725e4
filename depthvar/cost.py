"""Floating-point operations by arithmetic, from a model's shape and a depth plan.

A multiply-add counts as two operations. Elementwise work (norms, activations, proxies) is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from depthvar.config import AnyModel, ModelConfig, TokenizerConfig
from depthvar.infinity_config import InfinityConfig
from depthvar.plan import DepthPlan
from depthvar.settings import DecoderShape, Grid

TEXT_TOKENS = 64
"""Tokens of a text for which costs are told."""


@dataclass(frozen=True)
class Cost:
    """Operations per image: the transformer over its streams, and the image decoder."""

    transformer_flops: float
    decoder_flops: float

    @property
    def total_flops(self) -> float:
        """Transformer and decoder together."""
        return self.transformer_flops + self.decoder_flops


def image_cost(config: AnyModel, plan: DepthPlan, *, streams: int = 2) -> Cost:
    """Operations one image takes under a plan; guided sampling begins with two streams.

    Those of texts of `TEXT_TOKENS` where the model is asked in words; their encoder is not counted.
    """
    if isinstance(config, InfinityConfig):
        transformer = _text_transformer_flops(config, plan, streams)
        return Cost(transformer, _decoder_flops(config.decoder_shape, config.map_size))
    return Cost(transformer_flops(config, plan, streams), decoder_flops(config.tokenizer))


def _text_transformer_flops(config: InfinityConfig, plan: DepthPlan, streams: int) -> float:
    """Blocks, embeddings, AdaLN, head, and what is made of the texts, of one image."""
    width, text = config.width, TEXT_TOKENS
    per_active_token = 2 * (6 * width**2 + 2 * width * config.mlp_width) + 4 * width * text
    of_scales = _blocks_flops(plan, width, per_active_token)
    for i, scale in enumerate(plan.scales):
        of_scales[i] += scale.count * 2 * width * 2 * config.bits
        of_scales[i] += scale.count * 2 * width * config.bits if i else 0
    of_text = 2 * (6 + 2) * width**2
    of_text += 2 * text * width * (config.text_width + width)
    of_text += 2 * text * 2 * width * config.text_width + 4 * text * width + 2 * width**2
    of_text += plan.num_blocks * 2 * text * 2 * width**2
    return float(streams * of_text + plan.over_streams(of_scales, streams))


def _blocks_flops(plan: DepthPlan, width: int, per_active_token: int) -> list[int]:
    """The blocks of every scale, of one stream: products, attention, keys and values."""
    of_scales = []
    cached = [0] * plan.num_blocks
    for i, scale in enumerate(plan.scales):
        flops = 0
        for block, active in enumerate(scale.prefix):
            kept = plan.cached_tokens(i, block)
            cached[block] += kept
            flops += active * (per_active_token + 4 * width * cached[block])
            flops += (kept - active) * 2 * 2 * width**2
        of_scales.append(flops)
    return of_scales


def transformer_flops(config: ModelConfig, plan: DepthPlan, streams: int) -> float:
    """Blocks, embeddings, AdaLN, head, expected codes and their spreads of one image."""
    shape = config.transformer
    width = shape.width
    per_active_token = 2 * (4 + 2 * shape.mlp_ratio) * width**2
    of_scales = _blocks_flops(plan, width, per_active_token)
    for i, scale in enumerate(plan.scales):
        of_scales[i] += scale.count * 2 * width * shape.codebook_size
        if i:  # the first scale starts from the class, not from codes
            of_scales[i] += scale.count * 2 * width * shape.code_channels
    num_adaln = 1 if shape.shared_adaln else plan.num_blocks
    of_class = 2 * 6 * width**2 * num_adaln + 2 * 2 * width**2
    expected_codes = 0
    if plan.policy.uses_expected_codes:
        tokens = sum(scale.count for scale in plan.scales if scale.adaptive)
        expected_codes = 2 * tokens * shape.codebook_size * shape.code_channels
    spreads = 0
    if plan.policy.ranking == "spread":
        pairs = pairwise(plan.scales)
        tokens = sum(before.count for before, scale in pairs if scale.adaptive)
        spreads = 2 * tokens * shape.codebook_size * (shape.code_channels + 1)
    of_streams = streams * of_class + plan.over_streams(of_scales, streams)
    return float(of_streams + expected_codes + spreads)


def decoder_flops(config: TokenizerConfig) -> float:
    """Convolutions and attention from the feature map to the pixels of one image."""
    channels, side = config.code_channels, config.latent_side
    after_quantizing = 2 * channels**2 * 3**2 * side**2
    return after_quantizing + _decoder_flops(config.decoder_shape, (side, side))


def _decoder_flops(shape: DecoderShape, map_size: Grid) -> float:
    widths = [shape.base_width * m for m in shape.multipliers]
    last = len(widths) - 1
    pixels = math.prod(map_size)

    def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
        return 2 * inputs * outputs * kernel**2 * pixels

    def res_block(inputs: int, outputs: int) -> int:
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    def attention(channels: int) -> int:
        if not shape.has_attention:
            return 0
        return 4 * conv(channels, channels, 1) + 4 * pixels**2 * channels

    flops = conv(shape.code_channels, widths[-1])
    flops += 2 * res_block(widths[-1], widths[-1]) + attention(widths[-1])
    for level in range(last, -1, -1):
        flops += res_block(widths[min(level + 1, last)], widths[level])
        flops += shape.num_res_blocks * res_block(widths[level], widths[level])
        if level == last:
            flops += (shape.num_res_blocks + 1) * attention(widths[level])
        if level:
            pixels *= 4
            flops += conv(widths[level], widths[level])
    return float(flops + conv(widths[0], shape.image_channels))
