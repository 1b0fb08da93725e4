"""Comparing depth policies: many of them on the same noise, each measured against real images.

Shape legend: N images of a set, B of a batch, S scales, H W sides, C channels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from depthvar.policy import DepthPolicy
from depthvar.presets import make_policy
from depthvar.randomness import ranking_uniforms, token_uniforms
from depthvar.sampling import Sampler
from depthvar.weights.checkpoint import LoadedModel
from pipeline.research.quality.features import (
    Classifier,
    Readings,
    digit_features,
    from_safetensors,
    real_arrays,
)
from pipeline.research.quality.metrics import Manifold, frechet_distance
from pipeline.research.study.shared_scales import shared_scales, taken_over

POOR_SHARE = 0.05
"""A sample is poor when the probability of its label is among this share of lowest ones."""


@dataclass(frozen=True, eq=False)
class PolicySamples:
    """What one policy made of one seed.

    images_NHWC: uint8. labels_N: int64. mean_change_NS, mean_log_prob_NS: as in `SampleBatch`.
    """

    images_NHWC: np.ndarray
    labels_N: np.ndarray
    mean_change_NS: np.ndarray
    mean_log_prob_NS: np.ndarray


def sample_policies(
    model: LoadedModel,
    policies: Mapping[str, DepthPolicy],
    *,
    indices: range,
    seed: int,
    batch_size: int,
    after_batch: Callable[[int], object] | None = None,
) -> dict[str, PolicySamples]:
    """Images of every policy from the same noise, the classes in turn.

    Sample i of every policy is the one that the product makes for (seed, global index i, class i
    mod classes); what several policies run in full depth is drawn once for all of them.
    `after_batch` hears how many images were made.
    """
    config = model.config
    samplers = {name: Sampler(model, policy, config.sampling) for name, policy in policies.items()}
    shared = {name: shared_scales(sampler.plan) for name, sampler in samplers.items()}
    beginner = Sampler(model, make_policy("full"), config.sampling)
    made: dict[str, list[PolicySamples]] = {name: [] for name in policies}
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        labels_B = np.array([i % config.num_classes for i in batch])
        noise = [
            torch.from_numpy(uniforms(seed, batch, config.transformer.num_tokens)).to(model.device)
            for uniforms in (token_uniforms, ranking_uniforms)
        ]
        on_device_B = torch.from_numpy(labels_B).to(model.device)
        begun = beginner.begin(on_device_B)
        for name in sorted(shared, key=lambda name: shared[name]):
            sampler = samplers[name]
            while len(begun.tokens) < shared[name]:
                beginner.draw_scale(begun, *noise)
            state = taken_over(begun, sampler)
            while len(state.tokens) < len(sampler.plan.scales):
                sampler.draw_scale(state, *noise)
            sampled = sampler.finish(state)
            made[name].append(
                PolicySamples(
                    sampler.decode(sampled.feature_map_BZHW).cpu().numpy(),
                    labels_B,
                    sampled.mean_change_BS.float().cpu().numpy(),
                    sampled.mean_log_prob_BS.float().cpu().numpy(),
                )
            )
            if after_batch:
                after_batch(len(batch))
    return {name: joined(parts) for name, parts in made.items()}


def joined(parts: Sequence[PolicySamples]) -> PolicySamples:
    """Several sets of one policy in a row, as one."""
    return PolicySamples(
        **{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])}
    )


class Judge:
    """A feature network of real images and the real training images, read once."""

    def __init__(self, real_set: str, network: Classifier) -> None:
        images_NHWC, labels_N = real_arrays(real_set, "train")
        self._network = network
        self._real_NF = self._network.read(images_NHWC).features_NF
        self._real_spread = spread_within_classes(self._real_NF, labels_N)
        self._real = Manifold(self._real_NF)

    def read(self, samples: PolicySamples) -> Readings:
        """Features and probabilities of the images."""
        return self._network.read(samples.images_NHWC)

    def frechet(self, features_NF: np.ndarray) -> float:
        """Frechet distance to the real training images."""
        return frechet_distance(self._real_NF, features_NF)

    def measure(self, samples: PolicySamples) -> dict[str, float]:
        """Quality by name.

        label_accuracy: share read as their label. frechet_distance, precision, recall: against the
        real training images. diversity: variance of the features within a class, in that of the
        real images.
        """
        readings = self.read(samples)
        spread = spread_within_classes(readings.features_NF, samples.labels_N)
        return {
            "label_accuracy": float((readings.labels == samples.labels_N).mean()),
            "frechet_distance": self.frechet(readings.features_NF),
            "precision": self._real.share_inside(readings.features_NF),
            "recall": Manifold(readings.features_NF).share_inside(self._real_NF),
            "diversity": spread / self._real_spread,
        }

    def signals(self, samples: PolicySamples) -> dict[str, dict[str, float]]:
        """How well the recorded signals point out bad samples: AUROC by signal and verdict.

        Signals: -log-probability and change, of every scale and of all together. Verdicts: the
        image is read as another digit (`wrong`), or its label's probability is among the lowest
        (`poor`). 0.5 is chance. A verdict that no sample or every sample gets is left out.
        """
        readings = self.read(samples)
        confidence_N = readings.probabilities_NK[np.arange(len(samples.labels_N)), samples.labels_N]
        verdicts = {
            "wrong": readings.labels != samples.labels_N,
            "poor": confidence_N <= np.quantile(confidence_N, POOR_SHARE),
        }
        return {
            signal: {
                verdict: float(roc_auc_score(bad_N, values_N))
                for verdict, bad_N in verdicts.items()
                if 0 < bad_N.sum() < len(bad_N)
            }
            for signal, values_N in badness(samples).items()
        }


@lru_cache(maxsize=1)
def judge_of(real_set: str, features: bytes | None) -> Judge:
    """The judge against a set, made once in a process: reading the real images takes seconds.

    `features` is the safetensors file of a feature network; None stands for the shipped one.
    """
    network = digit_features() if features is None else from_safetensors(features)
    return Judge(real_set, network)


def badness(samples: PolicySamples) -> dict[str, np.ndarray]:
    """Recorded signals by name, each (N,): large is suspect."""
    signals: dict[str, np.ndarray] = {}
    recorded = {"surprise": -samples.mean_log_prob_NS, "change": samples.mean_change_NS}
    for name, values_NS in recorded.items():
        used = [i for i in range(values_NS.shape[1]) if values_NS[:, i].any()]
        signals[name] = values_NS[:, used].mean(axis=1)
        signals |= {f"{name} of scale {i}": values_NS[:, i] for i in used}
    return signals


def best_of_each_class(samples: PolicySamples, values_N: np.ndarray, drop: float) -> PolicySamples:
    """The samples without the share `drop` of each class that has the highest values."""
    kept: list[np.ndarray] = []
    for label in np.unique(samples.labels_N):
        of_class = np.flatnonzero(samples.labels_N == label)
        order = of_class[np.argsort(values_N[of_class], kind="stable")]
        kept.append(order[: round(len(order) * (1 - drop))])
    rows = np.sort(np.concatenate(kept))
    return PolicySamples(**{name: values[rows] for name, values in vars(samples).items()})


def spread_within_classes(features_NF: np.ndarray, labels_N: np.ndarray) -> float:
    """Variance of the features around their class mean, summed over features, mean of classes."""
    return float(
        np.mean([features_NF[labels_N == c].var(axis=0, ddof=1).sum() for c in np.unique(labels_N)])
    )
