"""Calibrated proxies: a least-squares fit made on the model's own full-depth samples.

The change a block makes at one scale predicts, up-sampled, the change it makes at the next only in
part: codes of different scales differ in size. Per scale, block and channel, a slope and an offset
in closed form mend the size. No data is needed and no weight changes.

Shape legend: G stream rows, T tokens of a scale, C width, S scales, L blocks.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

from depthvar.engine import ProxyFit, ScaleTrace, parent_positions
from depthvar.pointwise import Change
from depthvar.presets import make_policy
from depthvar.sampling import Given, Sampler
from depthvar.settings import SamplingSettings
from depthvar.weights.checkpoint import AnyLoaded

CALIBRATION_SEED = 0xCA1
"""Calibration samples have a seed of their own, so that they are nobody's data."""
_CHUNK_VALUES = 2**22  # of a change that are float64 at once


class ProxyRegression:
    """Running sums of a straight-line fit per scale, block and channel, in float64."""

    def __init__(
        self, num_scales: int, num_blocks: int, width: int, device: torch.device | str = "cpu"
    ) -> None:
        shape = (5, num_scales, num_blocks, width)
        self._sums_5SLC = torch.zeros(shape, dtype=torch.float64, device=device)
        self._counts_SL = torch.zeros(num_scales, num_blocks, dtype=torch.float64)

    def add(self, scale: int, block: int, earlier_GTC: Tensor, later_GTC: Tensor) -> None:
        """Add a block's up-sampled change of the scale before, and its true change."""
        self._counts_SL[scale, block] += later_GTC.shape[:2].numel()
        rows = max(1, _CHUNK_VALUES // later_GTC.shape[2])
        chunks = (change_GTC.flatten(0, 1).split(rows) for change_GTC in (earlier_GTC, later_GTC))
        for earlier_NC, later_NC in zip(*chunks, strict=True):
            x, y = earlier_NC.double(), later_NC.double()
            sums = [x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0), (y * y).sum(0)]
            self._sums_5SLC[:, scale, block] += torch.stack(sums)

    def fit(self) -> ProxyFit:
        """The fitted lines; scales never seen get slope 0 and offset 0."""
        x, y, xx, xy, _ = self._means()
        variance, covariance = xx - x * x, xy - x * y
        slope = torch.where(variance > 1e-12, covariance / variance.clamp(min=1e-12), 0.0)
        return ProxyFit(slope.float(), (y - slope * x).float())

    def explained_energy(self) -> Tensor:
        """Share of the true changes' energy that the fit explains, per scale and block (S, L)."""
        x, y, xx, xy, yy = self._means()
        covariance = xy - x * y
        residual = yy - y * y - covariance**2 / (xx - x * x).clamp(min=1e-12)
        unexplained_SL: Tensor = residual.sum(2) / yy.sum(2).clamp(min=1e-12)
        return 1 - unexplained_SL

    def _means(self) -> Tensor:
        return self._sums_5SLC.cpu() / self._counts_SL.clamp(min=1)[:, :, None]


def calibrate(
    model: AnyLoaded,
    settings: SamplingSettings,
    given: Given,
    *,
    batch_size: int,
) -> tuple[ProxyFit, Tensor]:
    """Fit proxies on a full-depth sample of each label, or of each text's states, that is given.

    Of every block one change is held, that of the scale before. Returns the fit and the share of
    energy it explains, per scale and block (S, L).
    """
    grids, blocks = model.config.grids, model.transformer.ordered_blocks
    sampler = Sampler(model, make_policy("full"), settings)
    regression = ProxyRegression(len(grids), len(blocks), model.config.width, model.device)
    parents = [parent_positions(*pair[::-1], model.device) for pair in pairwise(grids)]
    held: list[Tensor | None] = [None] * len(blocks)
    scale = 0

    def note(block: int, module: nn.Module, of_block: object, change: Change) -> None:
        earlier_GTC, change_GTC = held[block], change.whole()
        if earlier_GTC is not None:
            regression.add(scale, block, earlier_GTC[:, parents[scale - 1]], change_GTC)
        held[block] = change_GTC if scale < len(grids) - 1 else None

    def on_scale(done: int, logits_BTV: Tensor, trace: ScaleTrace) -> None:
        nonlocal scale
        scale = (done + 1) % len(grids)

    with ExitStack() as noting, tqdm(total=len(given), desc="calibrate", unit="image") as bar:
        for number, block in enumerate(blocks):
            noting.callback(block.register_forward_hook(partial(note, number)).remove)
        for start in range(0, len(given), batch_size):
            batch = given[start : start + batch_size]
            indices = range(start, start + len(batch))
            sampler.tokens(batch, seed=CALIBRATION_SEED, indices=indices, on_scale=on_scale)
            bar.update(len(batch))
    return regression.fit(), regression.explained_energy()
