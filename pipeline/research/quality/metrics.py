"""How close two sets of images are, from their features: pure functions of NumPy arrays.

Shape legend: N images of a set, B of a chunk, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_CHUNK_MIB = 256
"""Memory for the distances that are held at a time."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (F,) and covariance (F, F) of features, float64; the covariance divides by N - 1."""

    mean_F: np.ndarray
    covariance_FF: np.ndarray


def moments(features_NF: np.ndarray) -> Moments:
    """Mean and covariance of at least two feature vectors."""
    features_NF = _checked(features_NF, at_least=2)
    mean_F = features_NF.mean(axis=0)
    centred_NF = features_NF - mean_F
    return Moments(mean_F, centred_NF.T @ centred_NF / (len(features_NF) - 1))


def frechet_distance(features_a_NF: np.ndarray, features_b_NF: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians fitted to two sets of features.

    Biased upwards for small sets: compare only numbers from equally many images.
    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (arXiv 1706.08500).
    """
    return frechet_from_moments(moments(features_a_NF), moments(features_b_NF))


def frechet_from_moments(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), the closed form for two Gaussians.

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2). The symmetric roots come
    from eigenvalues with rounding noise set to zero, so that covariances without full rank (fewer
    images than features, features that never change) do no harm.
    """
    if a.mean_F.shape != b.mean_F.shape:
        raise ValueError(f"got {a.mean_F.size} and {b.mean_F.size} features, wanted as many")
    roots_FF = _root(a.covariance_FF) @ _root(b.covariance_FF)
    overlap = np.linalg.svd(roots_FF, compute_uv=False).sum()
    apart = float(((a.mean_F - b.mean_F) ** 2).sum())
    spread = np.trace(a.covariance_FF) + np.trace(b.covariance_FF) - 2 * overlap
    return max(0.0, apart + float(spread))


class Manifold:
    """The union of balls around a set's features, each reaching to a near other feature.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric" (arXiv 1904.06991).
    """

    def __init__(self, features_NF: np.ndarray, *, neighbours: int = 3) -> None:
        """A ball ends at the `neighbours`-th nearest other feature."""
        features_NF = _checked(features_NF, at_least=neighbours + 1)
        self._centre_F = features_NF.mean(axis=0)  # distances keep their digits near the origin
        self._features_NF = features_NF - self._centre_F
        self._squared_radii_N = _map_distances(
            self._features_NF,
            self._features_NF,
            lambda squares_BN: np.partition(squares_BN, neighbours)[:, neighbours],  # 0 is itself
        )

    def share_inside(self, features_NF: np.ndarray) -> float:
        """Share of other features that lie in a ball, in [0, 1]."""
        is_inside_N = _map_distances(
            _checked(features_NF, at_least=1) - self._centre_F,
            self._features_NF,
            lambda squares_BN: (squares_BN <= self._squared_radii_N).any(axis=1),
        )
        return float(is_inside_N.mean())


def precision_recall(
    real_NF: np.ndarray, generated_NF: np.ndarray, *, neighbours: int = 3
) -> tuple[float, float]:
    """Precision and recall of generated features, each in [0, 1].

    Precision is the share of generated features within the real manifold, recall the share of real
    ones within the generated manifold.
    """
    real = Manifold(real_NF, neighbours=neighbours)
    generated = Manifold(generated_NF, neighbours=neighbours)
    return real.share_inside(generated_NF), generated.share_inside(real_NF)


def inception_score(probabilities_NK: np.ndarray, *, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation of exp E[KL(p(y|x) || p(y))] over consecutive splits.

    `splits` of equal size up to one image; every split should hold a fair mixture of the classes.
    Source: Salimans et al., "Improved Techniques for Training GANs" (arXiv 1606.03498).
    """
    from scipy.special import rel_entr

    probabilities_NK = _checked(probabilities_NK, at_least=splits)
    edges = [i * len(probabilities_NK) // splits for i in range(1, splits)]
    scores = [
        np.exp(rel_entr(part_NK, part_NK.mean(axis=0)).sum(axis=1).mean())
        for part_NK in np.split(probabilities_NK, edges)
    ]
    return float(np.mean(scores)), float(np.std(scores))


def _root(covariance_FF: np.ndarray) -> np.ndarray:
    """The symmetric root of a covariance."""
    values_F, vectors_FF = np.linalg.eigh((covariance_FF + covariance_FF.T) / 2)
    noise = values_F.max(initial=0.0) * len(values_F) * np.finfo(np.float64).eps
    roots_F = np.sqrt(np.where(values_F > noise, values_F, 0.0))
    root_FF: np.ndarray = (vectors_FF * roots_F) @ vectors_FF.T
    return root_FF


def _map_distances(
    rows_NF: np.ndarray, columns_NF: np.ndarray, function: Callable[[np.ndarray], Any]
) -> np.ndarray:
    """What a function makes of the squared distances of every row to all columns, in chunks."""
    from sklearn.metrics import pairwise_distances_chunked

    chunks = pairwise_distances_chunked(
        rows_NF,
        columns_NF,
        reduce_func=lambda squares_BN, _: function(squares_BN),
        working_memory=_CHUNK_MIB,
        squared=True,
    )
    return np.concatenate(list(chunks))


def _checked(values_NF: np.ndarray, *, at_least: int) -> np.ndarray:
    """Finite rows as float64, a copy."""
    if values_NF.ndim != 2 or len(values_NF) < at_least:
        raise ValueError(f"got an array {values_NF.shape}, wanted at least {at_least} rows")
    values_NF = values_NF.astype(np.float64)
    if not np.isfinite(values_NF).all():
        raise ValueError("got features that are not finite, wanted numbers")
    return values_NF
