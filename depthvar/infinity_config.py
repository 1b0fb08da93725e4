"""What an Infinity model is, in numbers: text to image, tokens of independent bits.

Source: Han et al., "Infinity: Scaling Bitwise AutoRegressive Modeling" (arXiv 2412.04431); its
public checkpoints and schedules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from depthvar.errors import InputError
from depthvar.settings import DecoderShape, Grid, SamplingSettings, require, require_positive

_MLP_RATIO, _MLP_MULTIPLE = 4, 256

# The grids of the 13 scales at about a million pixels, by the image's height over its width.
_SQUARE = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
_PORTRAITS = (
    "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
)
_NUM_SCALES = (13, 12, 10, 7)
"""Scales of the published schedules of 1M, 0.60M, 0.25M and 0.06M pixels."""


_SAMPLING = SamplingSettings(cfg=4.0, top_k=0, top_p=0.97, temperature=0.5, guidance="constant")


@dataclass(frozen=True)
class BitDecoderConfig:
    """Shape of the image decoder: residual levels without attention, level 0 at full size."""

    base_width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        require_positive(self, "base_width", "norm_groups")
        require(
            len(self.multipliers) > 0
            and all(
                m >= 1 and self.base_width * m % self.norm_groups == 0 for m in self.multipliers
            ),
            f"base_width {self.base_width} times each of {self.multipliers} does not divide into "
            f"{self.norm_groups} groups",
        )

    @property
    def downsampling(self) -> int:
        """Pixels of one cell of the feature map along a side."""
        return 1 << (len(self.multipliers) - 1)


@dataclass(frozen=True)
class InfinityConfig:
    """One text-to-image model at one size of image; the names follow the published code.

    grids: rows and columns of every scale. rotary_grid: the grid that the scales' positions are
    spread over, the last of the schedule of a million pixels. bits: of one token. patch: a token
    stands for patch x patch cells of the feature map. text_width: channels of the text encoder's
    states. Errors: `InputError` for a shape that cannot be built.
    """

    name: str
    grids: tuple[Grid, ...]
    rotary_grid: Grid
    num_blocks: int
    width: int
    num_heads: int
    bits: int
    patch: int = 1
    text_width: int = 2048
    pool_heads: int = 16
    num_chunks: int = 8
    num_levels: int = 15
    max_text_tokens: int = 512
    norm_eps: float = 1e-6
    decoder: BitDecoderConfig = field(default_factory=BitDecoderConfig)
    sampling: SamplingSettings = _SAMPLING

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        require_positive(self, "num_blocks", "width", "num_heads", "bits", "patch")
        require_positive(self, "text_width", "pool_heads", "num_chunks", "max_text_tokens")
        areas = [math.prod(grid) for grid in self.grids]
        require(
            self.grids[:1] == ((1, 1),) and areas == sorted(areas),
            f"the grids are {self.grids}, wanted 1x1 first and none smaller than the one before",
        )
        require(
            len(self.grids) <= self.num_levels,
            f"{len(self.grids)} scales have {self.num_levels} level embeddings",
        )
        require(
            self.width % self.num_heads == 0 and self.head_dim % 4 == 0,
            f"width {self.width} does not divide among {self.num_heads} heads of channels in fours",
        )
        require(
            self.width % self.pool_heads == 0,
            f"width {self.width} does not divide among {self.pool_heads} heads of the text pool",
        )
        require(
            self.num_blocks % self.num_chunks == 0,
            f"{self.num_blocks} blocks do not divide into {self.num_chunks} chunks",
        )
        require(
            self.bits % self.patch**2 == 0,
            f"{self.bits} bits do not divide among {self.patch}x{self.patch} cells",
        )

    @property
    def is_text(self) -> bool:
        """Whether images are asked for in words."""
        return True

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Hidden channels of a feed-forward."""
        return -(-_MLP_RATIO * self.width // _MLP_MULTIPLE) * _MLP_MULTIPLE

    @property
    def num_tokens(self) -> int:
        """Tokens of one image over all scales."""
        return sum(map(math.prod, self.grids))

    @property
    def usual_reference_scale(self) -> int:
        """The finest scale with at most a quarter of the last one's tokens.

        Scale 9 of the 13 of a million pixels, where the paper reports 1.7x without loss.
        """
        most = math.prod(self.grids[-1]) // 4
        fitting = (i for i, grid in enumerate(self.grids) if math.prod(grid) <= most)
        return max(fitting, default=0)

    @property
    def num_logits(self) -> int:
        """Numbers that a token is drawn from: two for every bit."""
        return 2 * self.bits

    @property
    def map_channels(self) -> int:
        """Channels of the feature map."""
        return self.bits // self.patch**2

    @property
    def map_size(self) -> Grid:
        """Rows and columns of the feature map."""
        rows, columns = self.grids[-1]
        return rows * self.patch, columns * self.patch

    @property
    def image_size(self) -> Grid:
        """Height and width of the image in pixels."""
        rows, columns = self.map_size
        return rows * self.decoder.downsampling, columns * self.decoder.downsampling

    @property
    def image_channels(self) -> int:
        """RGB."""
        return 3

    @property
    def decoder_shape(self) -> DecoderShape:
        """Shape of the image decoder."""
        return DecoderShape(
            code_channels=self.map_channels,
            image_channels=self.image_channels,
            base_width=self.decoder.base_width,
            multipliers=self.decoder.multipliers,
            num_res_blocks=self.decoder.num_res_blocks,
            norm_groups=self.decoder.norm_groups,
            has_attention=False,
        )

    def of_size(self, image_size: Grid) -> InfinityConfig:
        """The same model for images of another height and width.

        `InputError` for one that is in no published schedule: the error names those that are.
        """
        if image_size == self.image_size:
            return self
        scale = self.patch * self.decoder.downsampling
        sizes = _sizes(scale)
        if image_size not in sizes:
            height, width = image_size
            near = sorted(sizes, key=lambda size: _distance(size, image_size))[:6]
            raise InputError(
                f"{self.name} makes no images of {width}x{height} pixels (width x height), wanted "
                "a size of its schedule: the nearest are " + ", ".join(f"{w}x{h}" for h, w in near)
            )
        grids = sizes[image_size]
        return replace(self, grids=grids[0], rotary_grid=grids[1])


def _distance(size: Grid, wanted: Grid) -> float:
    return max(abs(math.log(ours / theirs)) for ours, theirs in zip(size, wanted, strict=True))


def _schedules() -> tuple[tuple[Grid, ...], ...]:
    """The grids of every published shape of image at a million pixels: square, high, wide."""
    high = tuple(
        tuple((int(rows), int(columns)) for rows, columns in (g.split("x") for g in line.split()))
        for line in _PORTRAITS
    )
    wide = tuple(tuple((columns, rows) for rows, columns in grids) for grids in high)
    return (tuple((side, side) for side in _SQUARE), *high, *wide)


def _sizes(scale: int) -> Mapping[Grid, tuple[tuple[Grid, ...], Grid]]:
    """By height and width: the grids, and the one that positions are spread over."""
    return {
        (grids[n - 1][0] * scale, grids[n - 1][1] * scale): (grids[:n], grids[-1])
        for grids in _schedules()
        for n in _NUM_SCALES
    }


_GRIDS = _schedules()[0]

INFINITY_2B = InfinityConfig(
    name="infinity-2b",
    grids=_GRIDS,
    rotary_grid=_GRIDS[-1],
    num_blocks=32,
    width=2048,
    num_heads=16,
    bits=32,
)
INFINITY_8B = InfinityConfig(
    name="infinity-8b",
    grids=_GRIDS,
    rotary_grid=_GRIDS[-1],
    num_blocks=40,
    width=3584,
    num_heads=28,
    bits=56,
    patch=2,
    decoder=BitDecoderConfig(multipliers=(1, 2, 4, 4)),
    sampling=replace(_SAMPLING, cfg=3.0, temperature=1.0),
)
