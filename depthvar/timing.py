"""How long policies take, compared on one machine within one run, and how far off they come.

Shape legend: B images of a batch, N of a set, H W sides, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from depthvar.policy import DepthPolicy
from depthvar.sampling import SampleBatch, Sampler
from depthvar.weights.checkpoint import LoadedModel


@dataclass(frozen=True)
class Lap:
    """One batch of a policy: wall seconds per image in the transformer and in the decoder.

    peak_bytes: most memory of the GPU in use during the batch, weights included; 0 on a CPU.
    distance: `pixel_distance` to the images that the first policy made of the same noise.
    """

    sampling_s: float
    decoding_s: float
    peak_bytes: int
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


def time_policies(
    model: LoadedModel,
    policies: Mapping[str, DepthPolicy],
    *,
    rounds: int,
    batch_size: int,
    after_batch: Callable[[int], object] | None = None,
) -> dict[str, list[Lap]]:
    """A lap of every policy in every round, after one batch each that is not counted.

    In a round every policy samples one batch, one after the other, so that all meet the same
    machine, and the same noise: compare them within a round. `after_batch` hears how many batches
    were sampled.
    """
    samplers = {
        name: Sampler(model, policy, model.config.sampling) for name, policy in policies.items()
    }
    laps: dict[str, list[Lap]] = {name: [] for name in samplers}
    for number in range(-1, rounds):
        first: SampleBatch | None = None
        for name, sampler in samplers.items():
            batch, peak_bytes = _sample(sampler, model.device, max(number, 0), batch_size)
            first = first or batch
            if number >= 0:
                lap = Lap(
                    batch.sampling_s / batch_size,
                    batch.decoding_s / batch_size,
                    peak_bytes,
                    pixel_distance(batch.images_BHWC, first.images_BHWC),
                )
                laps[name].append(lap)
            if after_batch:
                after_batch(1)
    return laps


def _sample(
    sampler: Sampler, device: torch.device, seed: int, batch_size: int
) -> tuple[SampleBatch, int]:
    """A batch, and the most GPU memory in use while it was made."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    labels = [i % sampler.config.num_classes for i in range(batch_size)]
    batch = sampler(labels, seed=seed, indices=range(batch_size))
    return batch, torch.cuda.max_memory_allocated(device) if on_gpu else 0
