"""How long policies take, compared on one machine within one run.

Shape legend: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from depthvar.checkpoint import LoadedModel
from depthvar.policy import DepthPolicy
from depthvar.sampling import Sampler


@dataclass(frozen=True)
class Lap:
    """One batch of a policy: wall seconds per image in the transformer and in the decoder.

    peak_bytes: most memory of the GPU in use during the batch, weights included; 0 on a CPU.
    """

    sampling_s: float
    decoding_s: float
    peak_bytes: int

    @property
    def image_s(self) -> float:
        """Seconds per image of both."""
        return self.sampling_s + self.decoding_s


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
    machine: compare them within a round. `after_batch` hears how many batches were sampled.
    """
    samplers = {
        name: Sampler(model, policy, model.config.sampling) for name, policy in policies.items()
    }
    laps: dict[str, list[Lap]] = {name: [] for name in samplers}
    for number in range(-1, rounds):
        for name, sampler in samplers.items():
            lap = _lap(sampler, model.device, max(number, 0), batch_size)
            if number >= 0:
                laps[name].append(lap)
            if after_batch:
                after_batch(1)
    return laps


def _lap(sampler: Sampler, device: torch.device, seed: int, batch_size: int) -> Lap:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    labels = [i % sampler.config.num_classes for i in range(batch_size)]
    batch = sampler(labels, seed=seed, indices=range(batch_size))
    return Lap(
        batch.sampling_s / batch_size,
        batch.decoding_s / batch_size,
        torch.cuda.max_memory_allocated(device) if on_gpu else 0,
    )
