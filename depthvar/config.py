"""What a model is, in numbers: the transformer, the tokenizer, the classes and the usual sampling.

Sources: Tian et al., "Visual Autoregressive Modeling" (arXiv 2404.02905) and its public checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from depthvar.errors import InputError

_SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_SIDES_DIGITS = (1, 2, 3, 4, 5, 6, 8)

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn.

    `cfg` is the guidance strength at the last scale (0 = no guidance), `top_k` the number of codes
    kept before `top_p` (0 = all), `top_p` the probability mass kept, in (0, 1].
    """

    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled, as `InputError`."""
        if not 0.0 <= self.cfg < float("inf"):
            raise InputError(f"cfg is {self.cfg}, wanted a finite number >= 0: choose e.g. 1.5")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}, wanted >= 0: use 0 to keep every code")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p}, wanted 0 < top_p <= 1: use 1 to keep all")

    @property
    def streams(self) -> int:
        """Streams of one sample: conditional, and unconditional when there is guidance."""
        return 2 if self.cfg > 0 else 1


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the next-scale transformer; the names follow the published checkpoints."""

    num_classes: int
    sides: tuple[int, ...]
    num_blocks: int
    width: int
    num_heads: int
    codebook_size: int
    code_channels: int
    mlp_ratio: int = 4
    shared_adaln: bool = False
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Tokens of one image over all scales."""
        return sum(side * side for side in self.sides)


@dataclass(frozen=True)
class TokenizerConfig:
    """Shape of the multi-scale VQ tokenizer (a VQGAN encoder and decoder around a residual code).

    `phi_of_scale` names, for each scale, which of the shared 3x3 residual convolutions smooths the
    up-sampled codes.
    """

    sides: tuple[int, ...]
    phi_of_scale: tuple[int, ...]
    codebook_size: int = 4096
    code_channels: int = 32
    image_channels: int = 3
    base_width: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32

    @property
    def num_phis(self) -> int:
        """Number of shared residual convolutions."""
        return max(self.phi_of_scale) + 1

    @property
    def downsampling(self) -> int:
        """Pixels of one latent cell along a side."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def latent_side(self) -> int:
        """Side of the feature map: the last scale's."""
        return self.sides[-1]


@dataclass(frozen=True)
class ModelConfig:
    """One model: transformer and tokenizer that belong together, class names, usual sampling."""

    name: str
    transformer: TransformerConfig
    tokenizer: TokenizerConfig
    class_names: tuple[str, ...]
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        """The two halves must agree."""
        assert self.transformer.sides == self.tokenizer.sides
        assert self.transformer.codebook_size == self.tokenizer.codebook_size
        assert self.transformer.code_channels == self.tokenizer.code_channels
        assert len(self.tokenizer.phi_of_scale) == len(self.sides)
        assert len(self.class_names) == self.num_classes

    @property
    def num_classes(self) -> int:
        """Classes the model can be asked for."""
        return self.transformer.num_classes

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the token map of every scale, coarse to fine."""
        return self.transformer.sides

    @property
    def num_blocks(self) -> int:
        """Transformer blocks."""
        return self.transformer.num_blocks

    @property
    def image_side(self) -> int:
        """Side of the image in pixels."""
        return self.tokenizer.latent_side * self.tokenizer.downsampling

    @property
    def image_channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.tokenizer.image_channels


def small_model_config(
    name: str, class_names: tuple[str, ...], *, image_channels: int
) -> ModelConfig:
    """The 32x32 architecture of the bundled model, for any classes and either grey or RGB."""
    return ModelConfig(
        name=name,
        transformer=TransformerConfig(
            num_classes=len(class_names),
            sides=_SIDES_DIGITS,
            num_blocks=16,
            width=96,
            num_heads=3,
            codebook_size=512,
            code_channels=16,
        ),
        tokenizer=TokenizerConfig(
            sides=_SIDES_DIGITS,
            phi_of_scale=(0, 0, 1, 1, 2, 2, 3),
            codebook_size=512,
            code_channels=16,
            image_channels=image_channels,
            base_width=16,
            multipliers=(1, 2, 4),
            num_res_blocks=1,
            norm_groups=8,
        ),
        class_names=class_names,
        sampling=SamplingSettings(cfg=1.0, top_k=0, top_p=0.98),
    )


def _published(name: str, depth: int, sides: tuple[int, ...], *, shared_adaln: bool) -> ModelConfig:
    """A published ImageNet model of depth d: width 64d, d heads."""
    return ModelConfig(
        name=name,
        transformer=TransformerConfig(
            num_classes=1000,
            sides=sides,
            num_blocks=depth,
            width=64 * depth,
            num_heads=depth,
            codebook_size=4096,
            code_channels=32,
            shared_adaln=shared_adaln,
        ),
        tokenizer=TokenizerConfig(sides=sides, phi_of_scale=(0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),
        class_names=tuple(f"class {i}" for i in range(1000)),
    )


_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

MODELS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        small_model_config("digits", _DIGIT_NAMES, image_channels=1),
        _published("var-d16", 16, _SIDES_256, shared_adaln=False),
        _published("var-d20", 20, _SIDES_256, shared_adaln=False),
        _published("var-d24", 24, _SIDES_256, shared_adaln=False),
        _published("var-d30", 30, _SIDES_256, shared_adaln=False),
        _published("var-d36-512", 36, _SIDES_512, shared_adaln=True),
    )
}


def model_config(name: str) -> ModelConfig:
    """The configuration of a named model; `InputError` lists the known names."""
    if name not in MODELS:
        raise InputError(
            f"unknown model {name!r}, wanted one of {', '.join(MODELS)}: check --model"
        )
    return MODELS[name]
