"""Everything besides the labels that decides a byte of a dataset, as one value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from pydantic import ConfigDict, Field

from depthvar.errors import InputError

FORMAT_VERSION = 1
IMAGE_FORMATS = ("png", "jpg", "webp")
NO_REFERENCE_SCALE = -1

JsonScalar = str | int | float | bool | None
PositiveInt = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class ImageCompute:
    """What one image costs, guided (both streams): known from the depth plan, equal for all images.

    FLOPs count a multiply-add as two. `depth_per_scale` is the mean number of blocks a token of
    each scale passes. `full_*` is the same model at full depth.
    """

    __pydantic_config__ = STRICT

    token_layers: PositiveInt
    full_token_layers: PositiveInt
    transformer_flops: float
    decoder_flops: float
    full_transformer_flops: float
    depth_per_scale: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("token_layers", "full_token_layers"):
            object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("transformer_flops", "decoder_flops", "full_transformer_flops"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "depth_per_scale", tuple(map(float, self.depth_per_scale)))

    @property
    def token_layers_ratio(self) -> float:
        """Token-layers spent, as a share of full depth."""
        return self.token_layers / self.full_token_layers

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the whole image (transformer and decoder), as a share of full depth."""
        full = self.full_transformer_flops + self.decoder_flops
        return (self.transformer_flops + self.decoder_flops) / full


@dataclass(frozen=True)
class JobSettings:
    """Everything besides the labels that decides a byte of the dataset.

    `policy` holds the fields of the depth policy, `preset` and `reference_scale` among them.
    Errors: `InputError` for values that cannot work.
    """

    __pydantic_config__ = STRICT

    model: str
    weights_sha256: Sha256
    class_names: tuple[str, ...]
    image_side: PositiveInt
    image_channels: int
    policy: Mapping[str, JsonScalar | tuple[JsonScalar, ...]]
    cfg: float
    top_k: int
    top_p: float
    precision: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    samples_per_shard: PositiveInt
    batch_size: PositiveInt
    image_format: str
    compute: ImageCompute
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        # One spelling for equal values, so that a plan equals itself after a trip through JSON.
        policy = {
            name: tuple(value) if isinstance(value, list | tuple) else value
            for name, value in sorted(self.policy.items())
        }
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "cfg", float(self.cfg))
        object.__setattr__(self, "top_p", float(self.top_p))
        for name in ("samples_per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"got {name} {getattr(self, name)}, wanted 1 or more")
        if not re.fullmatch("[0-9a-f]{64}", self.weights_sha256):
            raise InputError(f"got the hash {self.weights_sha256!r}, wanted 64 hex digits")
        if self.image_format not in IMAGE_FORMATS:
            raise InputError(
                f"got the image format {self.image_format!r}, wanted one of "
                f"{', '.join(IMAGE_FORMATS)}"
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"got seed {self.seed}, wanted 0 or more and below 2**63")
        if self.format_version != FORMAT_VERSION:
            raise InputError(
                f"got a plan of format {self.format_version}, wanted {FORMAT_VERSION}: "
                "use the release that wrote it"
            )
        if self.image_channels not in (1, 3):
            raise InputError(f"got {self.image_channels} image channels, wanted 1 or 3")
        if "preset" not in self.policy or "reference_scale" not in self.policy:
            raise InputError("got a policy without preset or reference_scale, wanted both")

    @property
    def preset(self) -> str:
        """The name of the depth policy's preset."""
        return str(self.policy["preset"])

    @property
    def reference_scale(self) -> int:
        """R of the depth policy, or -1 where it has none."""
        scale = self.policy["reference_scale"]
        return scale if isinstance(scale, int) else NO_REFERENCE_SCALE

    @cached_property
    def policy_json(self) -> str:
        """Every field of the depth policy as canonical JSON."""
        return canonical_json(self.policy).decode()


def canonical_json(value: object) -> bytes:
    """The one spelling of a value that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
