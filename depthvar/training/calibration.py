"""Calibrated proxies: a least-squares fit made on the model's own full-depth samples.

The change a block makes at one scale predicts, up-sampled, the change it makes at the next only in
part: codes of different scales differ in size. Per scale, block and channel, a slope and an offset
in closed form mend the size. No data is needed and no weight changes.

Shape legend: G stream rows, T tokens of a scale, C width, S scales, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from tqdm import tqdm

from depthvar.engine import ProxyFit, ScaleTrace, parent_positions
from depthvar.policy import make_policy
from depthvar.sampling import Sampler
from depthvar.settings import SamplingSettings
from depthvar.weights.checkpoint import LoadedModel

CALIBRATION_SEED = 0xCA1
"""Calibration samples have a seed of their own, so that they are nobody's data."""


class ProxyRegression:
    """Running sums of a straight-line fit per scale, block and channel, in float64."""

    def __init__(self, num_scales: int, num_blocks: int, width: int) -> None:
        self._sums_5SLC = torch.zeros(5, num_scales, num_blocks, width, dtype=torch.float64)
        self._counts_S = torch.zeros(num_scales, dtype=torch.float64)

    def add(self, scale: int, earlier: Sequence[Tensor], later: Sequence[Tensor]) -> None:
        """Add up-sampled changes of the scale before and the true changes, (G, T, C) per block."""
        self._counts_S[scale] += later[0].shape[0] * later[0].shape[1]
        for block, (earlier_GTC, later_GTC) in enumerate(zip(earlier, later, strict=True)):
            x, y = earlier_GTC.double().flatten(0, 1), later_GTC.double().flatten(0, 1)
            products = (x, y, x * x, x * y, y * y)
            self._sums_5SLC[:, scale, block] += torch.stack([p.sum(0) for p in products]).cpu()

    def fit(self) -> ProxyFit:
        """The fitted lines; scales never seen get slope 0 and offset 0."""
        means = self._sums_5SLC / self._counts_S.clamp(min=1)[:, None, None]
        x, y, xx, xy, _ = means
        variance, covariance = xx - x * x, xy - x * y
        slope = torch.where(variance > 1e-12, covariance / variance.clamp(min=1e-12), 0.0)
        return ProxyFit(slope.float(), (y - slope * x).float())

    def explained_energy(self) -> Tensor:
        """Share of the true changes' energy that the fit explains, per scale and block (S, L)."""
        means = self._sums_5SLC / self._counts_S.clamp(min=1)[:, None, None]
        x, y, xx, xy, yy = means
        covariance = xy - x * y
        residual = yy - y * y - covariance**2 / (xx - x * x).clamp(min=1e-12)
        unexplained_SL: Tensor = residual.sum(2) / yy.sum(2).clamp(min=1e-12)
        return 1 - unexplained_SL


def calibrate(
    model: LoadedModel, settings: SamplingSettings, *, num_samples: int, batch_size: int
) -> tuple[ProxyFit, Tensor]:
    """Fit proxies on full-depth samples, the classes in turn.

    Returns the fit and the share of energy it explains, per scale and block (S, L).
    """
    config = model.config
    sampler = Sampler(model, make_policy("full"), settings)
    regression = ProxyRegression(len(config.sides), config.num_blocks, config.transformer.width)
    earlier: list[Tensor] = []
    later: list[Tensor] = []

    def note(block: nn.Module, given: object, change_GTC: Tensor) -> None:
        later.append(change_GTC)

    def on_scale(scale: int, logits_BTV: Tensor, trace: ScaleTrace) -> None:
        if scale:
            parents_T = parent_positions(
                config.grids[scale], config.grids[scale - 1], logits_BTV.device
            )
            regression.add(scale, [change_GTC[:, parents_T] for change_GTC in earlier], later)
        earlier[:] = later
        later.clear()

    with ExitStack() as noting, tqdm(total=num_samples, desc="calibrate", unit="image") as bar:
        for block in model.transformer.typed_blocks():
            noting.callback(block.register_forward_hook(note).remove)
        for start in range(0, num_samples, batch_size):
            indices = range(start, min(start + batch_size, num_samples))
            sampler.tokens(
                [i % config.num_classes for i in indices],
                seed=CALIBRATION_SEED,
                indices=indices,
                on_scale=on_scale,
            )
            bar.update(len(indices))
    return regression.fit(), regression.explained_energy()
