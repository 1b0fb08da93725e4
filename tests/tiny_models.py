"""Small models with random weights in which every part matters, and policies that cover the fields.

Shape legend: S scales, L blocks, C width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from depthvar.config import AnyModel, ModelConfig, TokenizerConfig, TransformerConfig
from depthvar.engine import ProxyFit
from depthvar.errors import InputError
from depthvar.infinity.tokenizer import BitTokenizer
from depthvar.infinity.transformer import InfinityTransformer
from depthvar.infinity_config import BitDecoderConfig, InfinityConfig
from depthvar.policy import DepthPolicy
from depthvar.presets import make_policy
from depthvar.settings import SamplingSettings
from depthvar.var.tokenizer import Tokenizer
from depthvar.var.transformer import Transformer
from depthvar.weights.checkpoint import LoadedModel, LoadedTextModel, precision_of
from depthvar.weights.find import FoundModel

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
"""Largest absolute difference from the reference, for values of the order of one."""

GUIDED = SamplingSettings(cfg=1.7, top_k=17, top_p=0.9)
UNGUIDED = SamplingSettings(cfg=0.0, top_k=0, top_p=0.95)

# Odd sides, depths that are no power of two, and one model with a repeated side.
SHAPES: tuple[dict[str, Any], ...] = (
    {"sides": (1, 2, 3, 5), "num_blocks": 5, "width": 12, "num_heads": 3},
    {"sides": (1, 2, 4, 5), "num_blocks": 6, "width": 16, "num_heads": 2, "shared_adaln": True},
    {"sides": (1, 3, 4, 6), "num_blocks": 7, "width": 8, "num_heads": 1},
    {"sides": (1, 2, 3, 3, 4), "num_blocks": 8, "width": 12, "num_heads": 2},
)


def tiny_config(
    sides: tuple[int, ...] = (1, 2, 3, 5),
    num_blocks: int = 5,
    width: int = 12,
    num_heads: int = 3,
    *,
    shared_adaln: bool = False,
    image_channels: int = 3,
) -> ModelConfig:
    """A model of a few thousand weights: 5 classes, 29 codes of 6 channels, images 2x the map."""
    return ModelConfig(
        name="tiny",
        transformer=TransformerConfig(
            num_classes=5,
            sides=sides,
            num_blocks=num_blocks,
            width=width,
            num_heads=num_heads,
            codebook_size=29,
            code_channels=6,
            mlp_ratio=2,
            shared_adaln=shared_adaln,
        ),
        tokenizer=TokenizerConfig(
            sides=sides,
            phi_of_scale=tuple(i * 3 // len(sides) for i in range(len(sides))),
            codebook_size=29,
            code_channels=6,
            image_channels=image_channels,
            base_width=4,
            multipliers=(1, 2),
            num_res_blocks=1,
            norm_groups=2,
        ),
        class_names=("a", "b", "c", "d", "e"),
        sampling=GUIDED,
    )


@torch.no_grad()
def fill_with_noise(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights at which no term can be left out unnoticed."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("scale_mul_1H11"):
            noise = math.log(4) + 0.4 * noise
            noise[:, 0] = 5.0  # above ln 100, where the scale is clamped
        elif parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        elif name == "head.weight":
            noise *= 2 / math.sqrt(parameter.shape[1])
        elif name == "decoder.conv_out.weight":
            noise *= 0.4 / math.sqrt(parameter[0].numel())  # most pixels within [-1, 1]
        elif parameter.dim() == 1 or name.startswith("pos_") or "ada_gss" in name:
            noise *= 0.4
        elif name.startswith(("class_emb", "lvl_embed")) or name.endswith("embedding.weight"):
            noise *= 0.8
        else:
            noise /= math.sqrt(parameter[0].numel())
        parameter.copy_(noise)


def random_fit(config: AnyModel, dtype: torch.dtype) -> ProxyFit:
    """A calibration that scales and shifts every channel its own way."""
    shape = (len(config.grids), config.num_blocks, config.width)
    generator = torch.Generator().manual_seed(11)
    slope = 0.3 + 0.6 * torch.rand(shape, generator=generator, dtype=torch.float64)
    offset = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return ProxyFit(slope.to(dtype), offset.to(dtype))


@cache
def tiny_model(
    shape: int = 0, dtype: torch.dtype = torch.float64, *, image_channels: int = 3
) -> LoadedModel:
    """Model number `shape` of `SHAPES`; the same weights, rounded, in every precision."""
    config = tiny_config(**SHAPES[shape], image_channels=image_channels)
    generator = torch.Generator().manual_seed(shape)
    transformer, tokenizer = Transformer(config.transformer), Tokenizer(config.tokenizer)
    for module in (transformer, tokenizer):
        _fill_in(module, dtype, generator)
    return LoadedModel(
        found=FoundModel(config, Path("tiny"), Path("tiny"), None, ()),
        transformer=transformer,
        tokenizer=tokenizer,
        proxy_fit=random_fit(config, dtype),
    )


def states(model: LoadedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of transformer and tokenizer by their published names."""
    return model.transformer.state_dict(), model.tokenizer.state_dict()


POLICY_VALUES: dict[str, tuple[Any, ...]] = {
    "reference_scale": (0, 1, 2),
    "allocation": ("reference", "equal", "coarse-first", "least"),
    "schedule": ("constant", "linear", "power", "cosine", "octaves", "step"),
    "steepness": (0.3, 1.0),
    "kept_depth": (0.4, 1.0),
    "rotation": (0.0, 0.381966, 0.9),
    "ranking": ("change", "distance", "entropy", "log-probability", "spread", "random"),
    "separate_ranking": (False, True),
    "proxy": ("none", "raw", "calibrated", "output"),
    "blending": ("none", "score", "mean", "pruned"),
    "skipped_keys_values": ("none", "proxy"),
    "compensation": (False, True),
    "block_order": ("bit-reversal", "first", "ends"),
    "dither": (False, True),
    "min_depth": (0, 1),
    "skip_last_scales": (0, 1),
    "guided_scales": (None, 1, 3),
    "kept_guidance": (0.0, 0.7),
}


def _policy(values: dict[str, Any]) -> DepthPolicy | None:
    try:
        return DepthPolicy("covering", **values)
    except InputError:
        return None


@cache
def covering_policies() -> tuple[DepthPolicy, ...]:
    """Policies in which every two values of two fields that can meet do meet."""
    chance = random.Random(0)
    names = list(POLICY_VALUES)

    def pairs(values: dict[str, Any]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
        return set(combinations([(name, values[name]) for name in names], 2))

    def candidate() -> dict[str, Any]:
        while True:
            values = {name: chance.choice(POLICY_VALUES[name]) for name in names}
            if values["separate_ranking"] and values["ranking"] not in ("change", "distance"):
                values["separate_ranking"] = False
            if values["guided_scales"] is None:
                values["kept_guidance"] = 0.0
            if values["proxy"] == "output" or values["kept_depth"] < 1.0:
                values["schedule"] = "step"
            if _policy(values):
                return values

    pool = [(values, pairs(values)) for values in (candidate() for _ in range(1000))]
    missing = set().union(*(covered for _, covered in pool))
    chosen = []
    while missing:
        values, covered = max(pool, key=lambda entry: len(entry[1] & missing))
        missing -= covered
        chosen.append(_policy(values))
    return tuple(policy for policy in chosen if policy)


def without_guidance(policy: DepthPolicy) -> DepthPolicy:
    """The policy as samplers of one stream can run it."""
    return replace(policy, guided_scales=None, kept_guidance=0.0)


def tiny_policy(preset: str) -> DepthPolicy:
    """A preset as a tiny model can run it: from few scales and blocks not all may be left out."""
    policy = make_policy(preset)
    if policy.reference_scale is not None:
        policy = replace(policy, reference_scale=1)
    return replace(policy, skip_last_scales=0, min_depth=3) if policy.mean_depths else policy


def label_of(policy: DepthPolicy) -> str:
    """A short test id."""
    return (
        f"{policy.preset}-R{policy.reference_scale}-{policy.schedule}-{policy.kept_depth}-"
        f"{policy.ranking}-"
        f"{'apart-' if policy.separate_ranking else ''}"
        f"{policy.proxy}-{policy.blending}-kv_{policy.skipped_keys_values}-{policy.block_order}"
        f"{f'-guided_{policy.guided_scales}' if policy.guided_scales else ''}"
    )


# Grids of no one ratio, halves to round among the positions, chunks, and cells of patches.
TEXT_SHAPES: tuple[dict[str, Any], ...] = (
    {"grids": ((1, 1), (2, 2), (3, 3), (5, 5)), "rotary_grid": (7, 7), "bits": 12},
    {"grids": ((1, 1), (2, 1), (4, 3), (6, 4)), "rotary_grid": (9, 6), "bits": 16, "patch": 2},
)
TEXT_GUIDED = SamplingSettings(cfg=2.5, top_k=0, top_p=0.97, temperature=0.9, guidance="constant")
TEXT_UNGUIDED = SamplingSettings(cfg=1.0, top_k=0, top_p=1.0, guidance="constant")


def tiny_infinity(shape: int = 0, **changes: Any) -> InfinityConfig:
    """A model of texts of a few thousand weights: images 2x the feature map."""
    fields: dict[str, Any] = {
        "name": "tiny-infinity",
        "num_blocks": 6,
        "width": 16,
        "num_heads": 2,
        "text_width": 10,
        "pool_heads": 4,
        "num_chunks": 2,
        "num_levels": 6,
        "max_text_tokens": 9,
        "decoder": BitDecoderConfig(
            base_width=4, multipliers=(1, 2), num_res_blocks=1, norm_groups=2
        ),
        "sampling": TEXT_GUIDED,
    }
    return InfinityConfig(**{**fields, **TEXT_SHAPES[shape], **changes})


@cache
def tiny_text_model(shape: int = 0, dtype: torch.dtype = torch.float64) -> LoadedTextModel:
    """Model number `shape` of `TEXT_SHAPES`; the same weights, rounded, in every precision."""
    config = tiny_infinity(shape)
    generator = torch.Generator().manual_seed(shape)
    transformer, tokenizer = InfinityTransformer(config), BitTokenizer(config)
    for module in (transformer, tokenizer):
        _fill_in(module, dtype, generator)
    found = FoundModel(config, Path("tiny"), Path("tiny"), None, ())
    return LoadedTextModel(found, transformer, tokenizer, random_fit(config, dtype))


def text_states(lengths: Sequence[int], width: int = 10, seed: int = 3) -> list[Tensor]:
    """Noise in place of an encoder's states, each (length, width), float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, width, generator=generator, dtype=torch.float64) for length in lengths
    ]


def _fill_in(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> None:
    module.double()
    fill_with_noise(module, generator)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(precision_of(name, dtype))
    module.eval().requires_grad_(False)
