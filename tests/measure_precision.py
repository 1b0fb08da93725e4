"""Agreement of half precision with float32: drawn tokens and guided logits, at full depth.

    python -m tests.measure_precision [MODEL] [IMAGES] [WEIGHTS]

Without WEIGHTS the bundled ones are used, or random ones under the published names. Labels,
settings and uniform numbers are the same in every precision. Teacher-forced: every scale sees the
float32 tokens of the scales before it, so that only the arithmetic differs. Free-running: every
precision goes on from its own tokens, and one that differs changes all that follow.

Shape legend: B images, T tokens of a scale, N tokens of an image, V codes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.weights.checkpoint import load_model
from depthvar.weights.files import BUNDLED
from depthvar.weights.find import find_model
from tests.published_weights import write_published

HALVES = ("bfloat16", "float16")
BATCH = 4


@dataclass(frozen=True)
class Drawn:
    """Tokens and guided logits of some images, per scale: (B, T) and (B, T, V)."""

    tokens: list[Tensor]
    logits: list[Tensor]


@dataclass(frozen=True)
class Agreement:
    """Half precision against float32: shares of equal tokens, differences of guided logits.

    forced: per scale, teacher-forced. forced_overall, free_overall: over all tokens of an image.
    """

    forced: tuple[float, ...]
    forced_overall: float
    free_overall: float
    mean_difference: float
    max_difference: float
    spread: float


def draw(sampler: Sampler, num_images: int, forced: Sequence[Tensor] | None = None) -> Drawn:
    """Tokens of images 0.. with seed 0; `forced` as `Sampler.tokens` has it."""
    tokens, logits = [], []
    for start in range(0, num_images, BATCH):
        indices = range(start, min(start + BATCH, num_images))
        kept: list[Tensor] = []
        sampled = sampler.tokens(
            [37 * i % sampler.config.num_classes for i in indices],
            seed=0,
            indices=indices,
            on_scale=lambda _, logits_BTV, __, kept=kept: kept.append(logits_BTV),
            forced=None if forced is None else [t[indices.start : indices.stop] for t in forced],
        )
        tokens.append(sampled.tokens)
        logits.append(kept)
    return Drawn(*([torch.cat(parts) for parts in zip(*x, strict=True)] for x in (tokens, logits)))


def agreement(wide: Drawn, forced: Drawn, free: Drawn) -> Agreement:
    """How half precision, teacher-forced and free-running, compares with float32."""

    def shares(half: Drawn) -> tuple[tuple[float, ...], float]:
        equal = [(a == b).float() for a, b in zip(wide.tokens, half.tokens, strict=True)]
        return tuple(e.mean().item() for e in equal), torch.cat(equal, dim=1).mean().item()

    wide_BNV, forced_BNV = (torch.cat(drawn.logits, dim=1) for drawn in (wide, forced))
    difference_BNV = (wide_BNV - forced_BNV).abs()
    return Agreement(
        *shares(forced),
        shares(free)[1],
        difference_BNV.mean().item(),
        difference_BNV.max().item(),
        wide_BNV.std(dim=2).mean().item(),
    )


def measure(model: str, weights: str | None, num_images: int) -> dict[str, Agreement]:
    """The agreement of every half precision."""

    def sampler(precision: str) -> Sampler:
        loaded = load_model(find_model(model, weights), dtype=getattr(torch, precision))
        return Sampler(loaded, make_policy("full"), loaded.config.sampling)

    wide = draw(sampler("float32"), num_images)
    found = {}
    for precision in HALVES:
        half = sampler(precision)
        free = draw(half, num_images)
        found[precision] = agreement(wide, draw(half, num_images, wide.tokens), free)
    return found


def main(model: str = "digits", num_images: str = "12", weights: str | None = None) -> None:
    """Print one line per precision, and the teacher-forced shares of every scale."""
    torch.set_num_threads(1)  # more wait for each other on a busy machine
    with tempfile.TemporaryDirectory() as scratch:
        if weights is None and not (BUNDLED / model).is_dir():
            weights = str(write_published(Path(scratch), model))
        found = measure(model, weights, int(num_images))
    print(f"{model}, {num_images} images; share of tokens equal to float32, logits' difference")
    for precision, a in found.items():
        print(
            f"{precision:9} teacher-forced {a.forced_overall:.3f}, free-running"
            f" {a.free_overall:.3f}; logits differ by {a.mean_difference:.4f} in the mean,"
            f" {a.max_difference:.3f} at most (their deviation is {a.spread:.2f})"
        )
        print(f"{'':9} by scale {' '.join(f'{share:.3f}' for share in a.forced)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
