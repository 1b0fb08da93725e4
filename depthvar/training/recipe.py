"""How a model is trained, as values: no torch, so that flags can be made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Schedule:
    """Length and optimiser of one stage; the batch is per step over all processes."""

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.05
    ema_decay: float = 0.999
    save_every: int = 200

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to 2%."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Augmentation:
    """Ranges of a random affine map: degrees, relative zoom, shear and shift in pixels.

    `plain_share` of the images stay as they are: resampling blurs, and a model that never sees
    sharp images makes none.
    """

    degrees: float = 7.0
    zoom: float = 0.07
    shear: float = 0.1
    shift: float = 1.0
    flip: bool = False
    plain_share: float = 0.0


@dataclass(frozen=True)
class TokenizerRecipe:
    """How the tokenizer is trained.

    `schedule` is of all of it, `tuning` of the decoder alone, on `tuning_plain_share` unaltered
    images. `prefix_share` of each batch is decoded from fewer scales; `commitment` ties latents to
    their codes and `latent_decay` keeps their size bounded: else they run away from the codes.
    """

    schedule: Schedule = Schedule(steps=2500, batch=64, learning_rate=1e-3, warmup_steps=100)
    tuning: Schedule = Schedule(steps=1200, batch=64, learning_rate=1e-3, warmup_steps=50)
    tuning_plain_share: float = 0.75
    prefix_share: float = 0.4
    commitment: float = 1.0
    latent_decay: float = 0.05
    revive_every: int = 50


@dataclass(frozen=True)
class TransformerRecipe:
    """How the transformer is trained.

    `schedule` is of the first cycle, on altered images; `tuning` of a second one, on
    `tuning_plain_share` unaltered images. `layer_drop` is the probability that a block is left out
    of a step, reached linearly over the first `layer_drop_ramp` of the first cycle; `label_drop`
    trains the unconditional stream.
    """

    schedule: Schedule = Schedule(steps=4000, batch=64, learning_rate=1.5e-3, warmup_steps=150)
    tuning: Schedule = Schedule(steps=1200, batch=64, learning_rate=8e-4, warmup_steps=50)
    tuning_plain_share: float = 0.5
    layer_drop: float = 0.25
    layer_drop_ramp: float = 0.3
    label_drop: float = 0.1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides its data.

    `tokenizer_from` names the model, as `load_model` does, whose tokenizer the new one starts from;
    it may have other sides. `precision` is that of matrix products and convolutions, bfloat16 or
    float32. `calibration_samples` full-depth samples of the finished model fit its proxies.
    """

    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    transformer: TransformerRecipe = field(default_factory=TransformerRecipe)
    augmentation: Augmentation = field(default_factory=Augmentation)
    tokenizer_from: str | None = None
    precision: str = "bfloat16"
    calibration_samples: int = 400
    seed: int = 0
