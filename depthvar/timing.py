"""How long samplers take, compared on one machine within one run, and how far off they come.

Shape legend: B images of a batch, N of a set, T tokens of a scale, V logits of a token, U uniform
numbers, H W sides, C channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.config import AnyModel
from depthvar.counting import any_given
from depthvar.policy import DepthPolicy
from depthvar.published import PublishedSampler, draw_published
from depthvar.recording import pointwise_of, recorder
from depthvar.sampling import SampleBatch, Sampler
from depthvar.settings import Kernels
from depthvar.weights.checkpoint import AnyLoaded, LoadedModel


class MakesImages(Protocol):
    """A sampler, as `Sampler` is called."""

    def __call__(self, given: Any, /, *, seed: int, indices: Sequence[int]) -> SampleBatch:
        """One image of each thing given."""
        ...


@dataclass(frozen=True)
class Contender:
    """A sampler to be timed, made when its turn comes.

    draw: its draw alone, of guided logits (B, T, V). counts: the tokens of its scales.
    """

    make: Callable[[], MakesImages]
    draw: Callable[[Tensor], object]
    counts: tuple[int, ...]

    @classmethod
    def of_policy(
        cls, model: AnyLoaded, policy: DepthPolicy, kernels: Kernels = "plain"
    ) -> Contender:
        """Our sampler under a policy, at the model's own settings; errors as `recorder`."""
        record, pointwise = recorder(kernels, model.device), pointwise_of(kernels)
        settings, codec = model.config.sampling, model.tokenizer.quantize

        def draw(logits_BTV: Tensor) -> object:
            batch, count = logits_BTV.shape[:2]
            uniforms_BU = logits_BTV.new_full((batch, count * codec.draws_per_token), 0.5)
            return codec.draw(logits_BTV, uniforms_BU, settings)

        grids = model.config.grids[: len(model.config.grids) - policy.skip_last_scales]
        return cls(
            partial(Sampler, model, policy, settings, record=record, pointwise=pointwise),
            draw,
            tuple(map(math.prod, grids)),
        )

    @classmethod
    def as_published(cls, model: LoadedModel, dtype: torch.dtype) -> Contender:
        """The published loop over float32 weights, with autocast to `dtype`."""
        settings = model.config.sampling
        return cls(
            partial(PublishedSampler, model, dtype),
            lambda logits_BTV: draw_published(logits_BTV, settings),
            tuple(map(math.prod, model.config.grids)),
        )


@dataclass(frozen=True)
class Lap:
    """One batch of a contender: wall seconds per image to the feature map and in the decoder.

    drawing_s: of `sampling_s`, seconds per image in the draw, measured by itself on as many logits:
        on a GPU with its launches, which a captured sampler does not pay.
    added_bytes: most memory of the GPU that the contender took in its first batch, above what was
        in use before it was made; 0 on a CPU.
    distance: `pixel_distance` to the images that the first contender made of the same noise.
    """

    sampling_s: float
    drawing_s: float
    decoding_s: float
    added_bytes: int
    distance: float

    @property
    def image_s(self) -> float:
        """Seconds per image of both."""
        return self.sampling_s + self.decoding_s


def pixel_distance(images_NHWC: np.ndarray, others_NHWC: np.ndarray) -> float:
    """Mean squared difference of pixels in [-1, 1] between images (uint8) of the same noise.

    Where the second ones are those of full depth, and there are more of them, it is what a policy
    changes; it needs no real images and no other network.
    """
    apart = images_NHWC.astype(np.float32) - others_NHWC[: len(images_NHWC)]
    return float(np.square(apart / 127.5).mean())


def time_contenders(
    contenders: Mapping[str, Contender],
    config: AnyModel,
    device: torch.device,
    *,
    rounds: int,
    batch_size: int,
    after_batch: Callable[[int], object] | None = None,
) -> dict[str, list[Lap]]:
    """A lap of every contender in every round, after one batch each that is not counted.

    In a round every contender samples one batch, one after the other, so that all meet the same
    machine, and the same noise: compare them within a round. `after_batch` hears how many batches
    were sampled.
    """
    logits = torch.randn(batch_size * math.prod(config.grids[-1]), config.num_logits)
    drawn_from = logits.to(device)
    given = any_given(config, batch_size, device)
    samplers: dict[str, MakesImages] = {}
    added_bytes: dict[str, int] = {}
    laps: dict[str, list[Lap]] = {name: [] for name in contenders}
    for number in range(-1, rounds):
        first: SampleBatch | None = None
        for name, contender in contenders.items():
            if number < 0:
                before = _begin_memory(device)
                samplers[name] = contender.make()
            batch = samplers[name](given, seed=max(number, 0), indices=range(batch_size))
            if number < 0:
                added_bytes[name] = _most_memory(device) - before
            drawing_s = _drawing_s(contender, drawn_from, batch_size)
            first = first or batch
            if number >= 0:
                lap = Lap(
                    batch.sampling_s / batch_size,
                    drawing_s / batch_size,
                    batch.decoding_s / batch_size,
                    added_bytes[name],
                    pixel_distance(batch.images_BHWC, first.images_BHWC),
                )
                laps[name].append(lap)
            if after_batch:
                after_batch(1)
    return laps


def time_policies(
    model: AnyLoaded,
    policies: Mapping[str, DepthPolicy],
    *,
    rounds: int,
    batch_size: int,
    after_batch: Callable[[int], object] | None = None,
) -> dict[str, list[Lap]]:
    """`time_contenders` of our sampler under some policies."""
    return time_contenders(
        {name: Contender.of_policy(model, policy) for name, policy in policies.items()},
        model.config,
        model.device,
        rounds=rounds,
        batch_size=batch_size,
        after_batch=after_batch,
    )


def equal_tokens(model: AnyLoaded, wide: AnyLoaded, policy: DepthPolicy, num_images: int) -> float:
    """Share of tokens that two precisions of a model draw alike, teacher-forced by the second.

    Every scale sees the second one's tokens of the scales before it, so that only the arithmetic
    within a scale differs.
    """
    given = any_given(model.config, num_images, model.device)
    ours, theirs = (Sampler(m, policy, m.config.sampling) for m in (model, wide))
    wanted = theirs.tokens(given, seed=0, indices=range(num_images)).tokens
    drawn = ours.tokens(given, seed=0, indices=range(num_images), forced=wanted).tokens
    equal = [(a == b).float() for a, b in zip(drawn, wanted, strict=True)]
    return float(torch.cat(equal, dim=1).mean())


def product_rate(device: torch.device, dtype: torch.dtype, *, side: int, rounds: int = 8) -> float:
    """Operations per second of a large linear layer without bias: the best round."""
    inputs, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(rounds + 1):  # the first is not counted
        _wait(device)
        begun = time.perf_counter()
        F.linear(inputs, weight)
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / min(seconds[1:])


@torch.inference_mode()
def _drawing_s(contender: Contender, logits_NV: Tensor, batch_size: int) -> float:
    """Seconds of all draws of a batch, on logits at random."""
    _wait(logits_NV.device)
    begun = time.perf_counter()
    for count in contender.counts:
        logits_BTV = logits_NV[: batch_size * count].view(batch_size, count, -1)
        contender.draw(logits_BTV)
    _wait(logits_NV.device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _begin_memory(device: torch.device) -> int:
    """GPU memory in use, from which the most is counted anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _most_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
