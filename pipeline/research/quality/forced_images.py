"""What real images cost a model under a depth policy, without sampling: losses, divergences.

Every image is given to the model as its tokens (teacher forcing) without guidance, as in training,
so policies are compared image by image on the same tokens. That tells apart what samples of the
same number cannot.

Shape legend: N images of a set, B of a batch, T tokens of a scale, V codes, S scales, H W sides,
C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.draw import draw_tokens
from depthvar.engine import ScaleTrace, parent_positions
from depthvar.policy import DepthPolicy
from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.settings import SamplingSettings
from depthvar.training.data import to_float
from depthvar.weights.checkpoint import LoadedModel

NOISE_SEED = 0
"""The seed of what a policy draws on the way through an image: a random ranking, say."""
BATCH = 50
_SETTINGS = SamplingSettings(cfg=0.0, top_k=0, top_p=1.0)
_DEEP_SHARE = 3
"""One token of this many at 2D and the others at D/2 run as many blocks as all of them at D."""


@dataclass(frozen=True)
class Headroom:
    """What depth per token could gain over one depth for all, at a scale.

    Costs are divergences from full depth (Kullback-Leibler, nats a token). uniform: every token at
    `depth` blocks. mixed: a third of each image's tokens at twice, the others at half of it, by
    how the third is chosen; "oracle" takes the tokens that gain most. neediest_quarter: share of
    the whole gain from half to twice the depth that falls to the quarter of tokens with most.
    """

    scale: int
    depth: int
    uniform: float
    mixed: Mapping[str, float]
    neediest_quarter: float


@dataclass(frozen=True)
class _ScaleRun:
    """A scale of a batch: logits (B, T, V) and the change of every token (B, T)."""

    logits_BTV: Tensor
    change_BT: Tensor


class ForcedImages:
    """Real images as the tokens that a model is made to take, scale by scale."""

    @torch.inference_mode()
    def __init__(self, model: LoadedModel, images_NHWC: np.ndarray, labels_N: np.ndarray) -> None:
        """The model must have its encoder; images are uint8, labels int64."""
        parts = []
        for batch_BHWC in torch.from_numpy(images_NHWC).split(BATCH):
            images_BCHW = to_float(batch_BHWC.permute(0, 3, 1, 2)).to(model.device, model.dtype)
            tokens, _, _ = model.tokenizer.tokenize(model.tokenizer.encode(images_BCHW))
            parts.append(tokens)
        self._model = model
        self._labels_N = labels_N
        self.tokens = [torch.cat(of_scale) for of_scale in zip(*parts, strict=True)]

    def __len__(self) -> int:
        return len(self._labels_N)

    def losses(self, policy: DepthPolicy) -> np.ndarray:
        """Cross-entropy of every image in nats, summed over the tokens of each scale: (N, S).

        It is what `depthvar.training.transformer` minimises. The policy must skip no scale.
        """
        sampler = Sampler(self._model, policy, _SETTINGS)
        assert len(sampler.plan.scales) == len(self.tokens)
        losses = []
        for indices in self._batches(len(self)):
            of_scales = [
                F.cross_entropy(run.logits_BTV.mT, tokens_BT, reduction="none").sum(dim=1)
                for run, tokens_BT in zip(
                    self._run(sampler, indices), self._forced(indices), strict=True
                )
            ]
            losses.append(torch.stack(of_scales, dim=1).double().cpu().numpy())
        return np.concatenate(losses)

    @torch.inference_mode()
    def headroom(
        self,
        reference_scale: int,
        *,
        num_images: int,
        after_batch: Callable[[int], object] = lambda count: None,
    ) -> list[Headroom]:
        """Of the first `num_images`, at every scale after `reference_scale` and every power of two.

        Depths are powers of two, whose bit-reversed blocks are evenly spaced. The cost of a mix is
        put together from runs in which all tokens have one depth: it is spared what a real mix
        loses because skipped tokens make no keys and values.
        """
        config = self._model.config
        depths = [1 << i for i in range(config.num_blocks.bit_length())]
        samplers = {
            depth: Sampler(self._model, _at_depth(depth, reference_scale), _SETTINGS)
            for depth in depths
        }
        whole = Sampler(self._model, make_policy("full"), _SETTINGS)
        scales = range(reference_scale + 1, len(config.sides))
        costs: dict[int, dict[int, list[Tensor]]] = {i: {d: [] for d in depths} for i in scales}
        signals: dict[int, dict[str, list[Tensor]]] = {i: {} for i in scales}
        for indices in self._batches(num_images):
            full = self._run(whole, indices)
            for i in scales:
                for name, values_BT in self._signals(i, full[i - 1]).items():
                    signals[i].setdefault(name, []).append(values_BT)
            for depth, sampler in samplers.items():
                run = self._run(sampler, indices)
                for i in scales:
                    costs[i][depth].append(_divergence(full[i].logits_BTV, run[i].logits_BTV))
            after_batch(len(indices))
        return [
            _headroom(
                i,
                depth,
                [torch.cat(costs[i][d]) for d in (depth // 2, depth, 2 * depth)],
                {name: torch.cat(values) for name, values in signals[i].items()},
            )
            for i in scales
            for depth in depths[1:-1]
        ]

    def _batches(self, count: int) -> Iterator[range]:
        for start in range(0, count, BATCH):
            yield range(start, min(start + BATCH, count))

    def _forced(self, indices: range) -> list[Tensor]:
        return [tokens_NT[indices.start : indices.stop] for tokens_NT in self.tokens]

    def _run(self, sampler: Sampler, indices: range) -> list[_ScaleRun]:
        """Run a policy on some images: what it gives at every scale."""
        scales: list[_ScaleRun] = []

        def note(scale: int, logits_BTV: Tensor, trace: ScaleTrace) -> None:
            scales.append(_ScaleRun(logits_BTV, trace.change_BT))

        sampler.tokens(
            self._labels_N[indices.start : indices.stop].tolist(),
            seed=NOISE_SEED,
            indices=indices,
            on_scale=note,
            forced=self._forced(indices),
        )
        return scales

    def _signals(self, scale: int, previous: _ScaleRun) -> dict[str, Tensor]:
        """What the tokens of a scale can be ranked by: of the scale before, up-sampled (B, T)."""
        grids = self._model.config.grids
        nowhere_BT = torch.zeros_like(previous.change_BT)
        drawn = draw_tokens(previous.logits_BTV, nowhere_BT, _SETTINGS)
        of_previous = {
            "change": previous.change_BT,
            "entropy": drawn.entropy(),
            "spread": drawn.spread(self._model.tokenizer.quantize.embedding.weight),
        }
        parents_T = parent_positions(grids[scale], grids[scale - 1], nowhere_BT.device)
        return {name: values_BT[:, parents_T] for name, values_BT in of_previous.items()}


def _at_depth(depth: int, reference_scale: int) -> DepthPolicy:
    """Every token after the reference scale at one depth."""
    return DepthPolicy(
        reference_scale=reference_scale, allocation="least", min_depth=depth, compensation=True
    )


def _divergence(full_BTV: Tensor, other_BTV: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a distribution from that of full depth (B, T), in nats."""
    log_full_BTV = full_BTV.log_softmax(2)
    apart_BTV = log_full_BTV.exp() * (log_full_BTV - other_BTV.log_softmax(2))
    divergence_BT: Tensor = apart_BTV.sum(dim=2)
    return divergence_BT


def _headroom(
    scale: int, depth: int, costs: list[Tensor], signals: Mapping[str, Tensor]
) -> Headroom:
    """From the cost (N, T) of every token at half the depth, at it and at twice of it."""
    half_NT, at_depth_NT, twice_NT = costs
    gain_NT = half_NT - twice_NT
    num_deep = gain_NT.shape[1] // _DEEP_SHARE
    mixed = {
        name: float(half_NT.mean() - _gain_of_top(gain_NT, signal_NT, num_deep))
        for name, signal_NT in (("oracle", gain_NT), *signals.items())
    }
    mixed["at random"] = float(half_NT.mean() - gain_NT.mean() * num_deep / gain_NT.shape[1])
    quarter = _gain_of_top(gain_NT, gain_NT, gain_NT.shape[1] // 4)
    return Headroom(scale, depth, float(at_depth_NT.mean()), mixed, float(quarter / gain_NT.mean()))


def _gain_of_top(gain_NT: Tensor, signal_NT: Tensor, count: int) -> Tensor:
    """What the `count` tokens of each image with the highest signal gain, in nats per token of all.

    A scalar.
    """
    top_NK = signal_NT.topk(count, dim=1).indices
    return gain_NT.gather(1, top_NK).sum() / gain_NT.numel()
