"""What models of every kind are told and made of: grids of tokens, and how tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthvar.errors import InputError

Grid = tuple[int, int]
"""Rows and columns of a map: of a scale's tokens, or of an image's pixels."""
Guidance = Literal["ramp", "constant"]
Kernels = Literal["auto", "plain", "graph", "triton"]
"""How a batch is run: operation by operation, as one recording, or as one whose pointwise regions
are Triton's kernels; `auto` is `graph` on a GPU."""


def resolved(kernels: Kernels, *, on_gpu: bool) -> Kernels:
    """What `auto` is on a GPU or off it; others as they are."""
    if kernels == "auto":
        return "graph" if on_gpu else "plain"
    return kernels


def records(kernels: Kernels, *, on_gpu: bool) -> bool:
    """Whether batches are recorded, as only a GPU can."""
    return on_gpu and kernels != "plain"


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn.

    cfg: strength of classifier-free guidance, as each kind of model publishes it (`guidance`).
    top_k: codes kept before `top_p` (0 = all). top_p: probability mass kept, in (0, 1].
    temperature: what guided logits are divided by. guidance: `ramp` grows from nothing at the first
    scale to `(1 + cfg) conditional - cfg unconditional` at the last (VAR); `constant` is
    `cfg conditional + (1 - cfg) unconditional` at every scale (Infinity).
    """

    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96
    temperature: float = 1.0
    guidance: Guidance = "ramp"

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled, as `InputError`."""
        if not 0.0 <= self.cfg < float("inf"):
            raise InputError(f"cfg is {self.cfg}, wanted a finite number >= 0: choose e.g. 1.5")
        if self.guidance == "constant" and self.cfg < 1.0:
            raise InputError(
                f"cfg is {self.cfg}, wanted >= 1 for this model: 1 is no guidance, 3 or 4 usual"
            )
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}, wanted >= 0: use 0 to keep every code")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p}, wanted 0 < top_p <= 1: use 1 to keep all")
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(
                f"temperature is {self.temperature}, wanted a finite number > 0: use 1 for none"
            )

    @property
    def streams(self) -> int:
        """Streams of one sample: conditional, and unconditional when there is guidance."""
        return 2 if self.cfg > (1.0 if self.guidance == "constant" else 0.0) else 1

    def strength(self, scale: int, num_scales: int) -> float:
        """The s of `(1 + s) conditional - s unconditional` at a scale of the model's."""
        if self.guidance == "constant":
            return self.cfg - 1
        return self.cfg * scale / max(1, num_scales - 1)


@dataclass(frozen=True)
class DecoderShape:
    """Shape of a convolutional image decoder; its highest level, 0, is that of the image."""

    code_channels: int
    image_channels: int
    base_width: int
    multipliers: tuple[int, ...]
    num_res_blocks: int
    norm_groups: int
    has_attention: bool


def require(is_true: bool, problem: str) -> None:
    """`InputError` for a model that cannot be built."""
    if not is_true:
        raise InputError(f"no such model can be built: {problem}")


def require_positive(config: object, *names: str) -> None:
    """The same where one of the fields of these names is below 1."""
    for name in names:
        size = getattr(config, name)
        require(size >= 1, f"{name} is {size}, wanted 1 or more")
