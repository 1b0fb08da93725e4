"""What a model is, in numbers: the transformer, the tokenizer, the classes and the usual sampling.

Source: Tian et al., "Visual Autoregressive Modeling" (arXiv 2404.02905); its public checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from depthvar import imagenet
from depthvar.errors import InputError
from depthvar.host.names import comparable
from depthvar.infinity_config import INFINITY_2B, INFINITY_8B, InfinityConfig
from depthvar.settings import DecoderShape, Grid, SamplingSettings, require, require_positive
from depthvar.strict_json import from_json, read_json

CONFIG_FILE = "config.json"
CONFIG_FORMAT = "depthvar-model/1"
TEXT_CONFIG_FORMAT = "depthvar-infinity/1"

_SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_SIDES_DIGITS = (1, 2, 3, 4, 5, 6, 8)
_SIDES_SCENES = (1, 2, 3, 4, 6, 8, 12)

_FORMER_SAMPLING: Mapping[str, object] = {"temperature": 1.0, "guidance": "ramp"}
"""How models sample whose `config.json` does not say."""


def _require_sides(sides: tuple[int, ...]) -> None:
    require(
        sides[:1] == (1,) and list(sides) == sorted(sides),
        f"the sides are {sides}, wanted 1 first and none smaller than the one before",
    )


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the next-scale transformer; the names follow the published checkpoints.

    Errors: `InputError` for a shape that cannot be built.
    """

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

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        require_positive(self, "num_classes", "num_blocks", "width", "num_heads")
        require_positive(self, "codebook_size", "code_channels", "mlp_ratio")
        _require_sides(self.sides)
        require(
            self.width % self.num_heads == 0,
            f"width {self.width} does not divide among {self.num_heads} heads",
        )
        require(
            self.norm_eps > 0 and math.isfinite(self.norm_eps),
            f"norm_eps is {self.norm_eps}, wanted a number > 0",
        )

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
    up-sampled codes. Errors: `InputError` for a shape that cannot be built.
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

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        require_positive(self, "codebook_size", "code_channels")
        require_positive(self, "base_width", "num_res_blocks", "norm_groups")
        _require_sides(self.sides)
        require(
            len(self.phi_of_scale) == len(self.sides) and min(self.phi_of_scale) >= 0,
            f"phi_of_scale is {self.phi_of_scale}, wanted an index from 0 for each of the "
            f"{len(self.sides)} scales",
        )
        require(
            self.image_channels in (1, 3),
            f"image_channels is {self.image_channels}, wanted 1 for grey or 3 for RGB",
        )
        require(
            len(self.multipliers) > 0
            and min(self.multipliers) >= 1
            and all(self.base_width * m % self.norm_groups == 0 for m in self.multipliers),
            f"base_width {self.base_width} times each of {self.multipliers} does not divide into "
            f"{self.norm_groups} groups",
        )

    @property
    def num_phis(self) -> int:
        """Number of shared residual convolutions."""
        return max(self.phi_of_scale) + 1

    @property
    def downsampling(self) -> int:
        """Pixels of one latent cell along a side."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def decoder_shape(self) -> DecoderShape:
        """Shape of the decoder, which the encoder mirrors."""
        return DecoderShape(
            code_channels=self.code_channels,
            image_channels=self.image_channels,
            base_width=self.base_width,
            multipliers=self.multipliers,
            num_res_blocks=self.num_res_blocks,
            norm_groups=self.norm_groups,
            has_attention=True,
        )

    @property
    def latent_side(self) -> int:
        """Side of the feature map: the last scale's."""
        return self.sides[-1]


@dataclass(frozen=True)
class ModelConfig:
    """One model: transformer and tokenizer that belong together, class names, usual sampling.

    Errors: `InputError` for halves that disagree.
    """

    name: str
    transformer: TransformerConfig
    tokenizer: TokenizerConfig
    class_names: tuple[str, ...]
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        """The two halves must agree."""
        for name in ("sides", "codebook_size", "code_channels"):
            ours, theirs = getattr(self.transformer, name), getattr(self.tokenizer, name)
            require(ours == theirs, f"the transformer's {name} {ours}, the tokenizer's {theirs}")
        require(
            len(self.class_names) == self.num_classes,
            f"{len(self.class_names)} class names for {self.num_classes} classes",
        )
        require(
            self.name.isprintable() and self.name.strip() != "",
            f"its name is {self.name!r}, wanted printable text",
        )

    @property
    def num_logits(self) -> int:
        """Numbers that a token is drawn from: one for every code."""
        return self.transformer.codebook_size

    @property
    def num_classes(self) -> int:
        """Classes the model can be asked for."""
        return self.transformer.num_classes

    @property
    def wordnet_ids(self) -> tuple[str, ...] | None:
        """WordNet id of every class where the classes are those of ImageNet-1k, else None."""
        return imagenet.WORDNET_IDS if self.class_names == imagenet.CLASS_NAMES else None

    @property
    def other_names(self) -> tuple[tuple[str, ...], ...]:
        """What each class may also be called: its WordNet id and synonyms; () where none are known.

        A synonym may belong to several classes.
        """
        if self.wordnet_ids is None:
            return ()
        return tuple((i, *imagenet.LEMMAS[i][1:]) for i in self.wordnet_ids)

    @property
    def is_text(self) -> bool:
        """Whether images are asked for in words."""
        return False

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the token map of every scale, coarse to fine."""
        return self.transformer.sides

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of the tokens of every scale, coarse to fine."""
        return tuple((side, side) for side in self.sides)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image over all scales."""
        return self.transformer.num_tokens

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.transformer.width

    @property
    def num_heads(self) -> int:
        """Heads of the attention."""
        return self.transformer.num_heads

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.transformer.head_dim

    @property
    def num_blocks(self) -> int:
        """Transformer blocks."""
        return self.transformer.num_blocks

    @property
    def decoder_shape(self) -> DecoderShape:
        """Shape of the image decoder."""
        return self.tokenizer.decoder_shape

    @property
    def map_size(self) -> Grid:
        """Rows and columns of the feature map."""
        return self.grids[-1]

    @property
    def image_side(self) -> int:
        """Side of the image in pixels."""
        return self.tokenizer.latent_side * self.tokenizer.downsampling

    @property
    def image_size(self) -> Grid:
        """Height and width of the image in pixels."""
        return self.image_side, self.image_side

    @property
    def image_channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.tokenizer.image_channels

    def of_size(self, image_size: Grid) -> ModelConfig:
        """This model; `InputError` for another size of image than its own."""
        if image_size != self.image_size:
            height, width = image_size
            raise InputError(
                f"{self.name} makes images of {self.image_side}x{self.image_side} pixels, got "
                f"{width}x{height}: leave --image-size out, or choose a model of that size"
            )
        return self


def small_model_config(
    name: str,
    class_names: tuple[str, ...],
    *,
    image_channels: int,
    sides: tuple[int, ...] = _SIDES_DIGITS,
    num_blocks: int = 16,
    width: int = 96,
) -> ModelConfig:
    """The architecture of the bundled model, for any classes and either grey or RGB.

    Images have four pixels a side for each token of the last of the seven `sides`; heads have 32
    channels.
    """
    return ModelConfig(
        name=name,
        transformer=TransformerConfig(
            num_classes=len(class_names),
            sides=sides,
            num_blocks=num_blocks,
            width=width,
            num_heads=width // 32,
            codebook_size=512,
            code_channels=16,
        ),
        tokenizer=TokenizerConfig(
            sides=sides,
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
        sampling=SamplingSettings(cfg=2.0, top_k=0, top_p=0.98),
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
        class_names=imagenet.CLASS_NAMES,
    )


def scenes_model_config() -> ModelConfig:
    """A model of `training.data.digit_scenes`: 48x48 grey, 12x12 tokens at the last scale."""
    return small_model_config(
        "digit-scenes",
        _DIGIT_NAMES,
        image_channels=1,
        sides=_SIDES_SCENES,
        num_blocks=12,
        width=64,
    )


_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

AnyModel = ModelConfig | InfinityConfig

MODELS: Mapping[str, ModelConfig] = MappingProxyType(
    {
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
)
"""The known models of classes."""
TEXT_MODELS: Mapping[str, InfinityConfig] = MappingProxyType(
    {config.name: config for config in (INFINITY_2B, INFINITY_8B)}
)
"""The known models of text."""
KNOWN_MODELS: Mapping[str, AnyModel] = MappingProxyType({**MODELS, **TEXT_MODELS})
IMAGE_SIZE = r"^[1-9]\d{0,4}(x[1-9]\d{0,4})?$"
"""How a size of images is written: `SIDE` or `WIDTHxHEIGHT`."""


def of_written_size(model: AnyModel, image_size: str | None) -> AnyModel:
    """The model for images of a size that is written so; `InputError` for one that it lacks."""
    if image_size is None:
        return model
    width, _, height = image_size.partition("x")
    return model.of_size((int(height or width), int(width)))


def real_set_of(class_names: tuple[str, ...], image_side: int, image_channels: int) -> str | None:
    """Name of the set of real images (`training.data.REAL_SETS`) that such images compare with."""
    for model in (MODELS["digits"], scenes_model_config()):
        if (class_names, image_side, image_channels) == (
            model.class_names,
            model.image_side,
            model.image_channels,
        ):
            return model.name
    return None


def model_config(name: str, weights: str | None = None) -> AnyModel:
    """The configuration of a model: a known name, or a folder that holds a `config.json`.

    `weights` is a local folder or a file in one; where that folder holds a `config.json`, it
    decides, and must be of the model `name`. Raises `InputError` for an unknown model, a
    `config.json` that does not parse, and weights of another model.
    """
    place = name if weights is None and is_model_path(name) else weights
    stored = None if place is None else stored_config(folder_of(place))
    if stored is not None:
        is_other = comparable(name) != comparable(stored.name)
        if is_other and not _is_same_folder(name, place):
            raise InputError(
                f"{weights} holds the model {stored.name!r}, wanted {name!r}: pass --model "
                f"{folder_of(str(weights))}, or the weights of {name!r}"
            )
        return stored
    if model_name(name) in KNOWN_MODELS:
        return KNOWN_MODELS[model_name(name)]
    raise InputError(
        f"unknown model {name!r}, wanted one of {', '.join(KNOWN_MODELS)}, or the folder or file "
        "of a model: check --model"
    )


def is_model_path(name: str) -> bool:
    """Whether a model's name is none of the known ones but a folder or file that is there."""
    return name not in KNOWN_MODELS and Path(name).exists()


def model_name(name: str) -> str:
    """What a model is called: its path's last part without the suffix of a file, or its name."""
    if not is_model_path(name):
        return name
    path = Path(name).resolve()
    return path.name if path.is_dir() else path.stem


def folder_of(weights: str) -> Path:
    """The folder that weights are in."""
    path = Path(weights)
    return path if path.is_dir() else path.parent


def _is_same_folder(name: str, weights: str | None) -> bool:
    return (
        weights is not None
        and is_model_path(name)
        and folder_of(name).resolve() == folder_of(weights).resolve()
    )


def stored_config(folder: Path) -> AnyModel | None:
    """The model that a folder's `config.json` describes; None without one, or with a foreign one.

    Raises `InputError` for unknown, missing and mistyped keys, for sizes that do not fit, and for
    the name of a known model of other sizes.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or "format" not in content:
        return None
    kinds: Mapping[object, type[AnyModel]] = {
        CONFIG_FORMAT: ModelConfig,
        TEXT_CONFIG_FORMAT: InfinityConfig,
    }
    kind = kinds.get(content["format"])
    if kind is None:
        raise InputError(
            f"{path} has the format {content['format']!r}, wanted {CONFIG_FORMAT!r}: use the "
            "release that wrote it"
        )
    fields = {key: value for key, value in content.items() if key != "format"}
    if isinstance(fields.get("sampling"), dict):
        fields["sampling"] = {**_FORMER_SAMPLING, **fields["sampling"]}
    try:
        stored = from_json(kind, fields, str(path))
    except InputError as error:
        raise InputError(error if str(path) in str(error) else f"{path}: {error}") from None
    known = KNOWN_MODELS.get(stored.name, stored)
    for part, wanted, found in _parts(known, stored):
        differing = [
            f"{k} {found.get(k)} ({wanted[k]})" for k in wanted if found.get(k) != wanted[k]
        ]
        if differing:
            raise InputError(
                f"{path} calls its model {stored.name!r} and gives another {part} than that of "
                f"{stored.name}, {', '.join(differing)}: give it a name of its own"
            )
    return stored


def _parts(
    known: AnyModel, stored: AnyModel
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(what, fields of a known model, fields of a stored one), of all that is its architecture."""
    if isinstance(known, ModelConfig):
        for part in ("transformer", "tokenizer"):
            found = getattr(stored, part, None)
            yield part, asdict(getattr(known, part)), {} if found is None else asdict(found)
    else:
        own = {"name", "sampling", "grids", "rotary_grid"}
        wanted, found = (
            {k: v for k, v in asdict(c).items() if k not in own} for c in (known, stored)
        )
        yield "architecture", wanted, found


def config_json(config: AnyModel) -> dict[str, Any]:
    """What `stored_config` reads, as JSON values."""
    kind = CONFIG_FORMAT if isinstance(config, ModelConfig) else TEXT_CONFIG_FORMAT
    fields = asdict(config)
    for name, value in _FORMER_SAMPLING.items():
        if fields["sampling"][name] == value:
            del fields["sampling"][name]
    return {"format": kind, **fields}
