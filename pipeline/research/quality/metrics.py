"""How close two sets of images are, from their features: pure functions of NumPy arrays.

Shape legend: N images of a set, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


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


def precision_recall(
    real_NF: np.ndarray,
    generated_NF: np.ndarray,
    *,
    neighbours: int = 3,
    chunk: int = 1000,
    real_reach_N: np.ndarray | None = None,
) -> tuple[float, float]:
    """Precision and recall of generated features, each in [0, 1].

    Precision is the share of generated features within the real manifold, recall the share of real
    ones within the generated manifold. A manifold is the union of balls around a set's features,
    each reaching to its `neighbours`-th nearest other one. `chunk` rows of distances are held at a
    time. `real_reach_N` is what `reach` gives for the real features, for those who compare with
    them often. Source: Kynkaanniemi et al., "Improved Precision and Recall Metric" (arXiv
    1904.06991).
    """
    real_NF = _checked(real_NF, at_least=neighbours + 1)
    generated_NF = _checked(generated_NF, at_least=neighbours + 1)
    centre_F = real_NF.mean(axis=0)  # distances keep their digits near the origin
    real_NF -= centre_F
    generated_NF -= centre_F
    if real_reach_N is None:
        real_reach_N = _reach(real_NF, neighbours, chunk)
    precision = _share_inside(generated_NF, real_NF, real_reach_N, chunk)
    generated_reach_N = _reach(generated_NF, neighbours, chunk)
    return precision, _share_inside(real_NF, generated_NF, generated_reach_N, chunk)


def reach(features_NF: np.ndarray, *, neighbours: int = 3, chunk: int = 1000) -> np.ndarray:
    """Squared distance of every feature to its `neighbours`-th nearest other one (N,)."""
    features_NF = _checked(features_NF, at_least=neighbours + 1)
    return _reach(features_NF - features_NF.mean(axis=0), neighbours, chunk)


def inception_score(probabilities_NK: np.ndarray, *, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation of exp E[KL(p(y|x) || p(y))] over consecutive splits.

    `splits` of equal size up to one image; every split should hold a fair mixture of the classes.
    Source: Salimans et al., "Improved Techniques for Training GANs" (arXiv 1606.03498).
    """
    probabilities_NK = _checked(probabilities_NK, at_least=splits)
    edges = [i * len(probabilities_NK) // splits for i in range(splits + 1)]
    scores = [_split_score(probabilities_NK[start:stop]) for start, stop in pairwise(edges)]
    return float(np.mean(scores)), float(np.std(scores))


def _split_score(probabilities_NK: np.ndarray) -> float:
    share_K = probabilities_NK.mean(axis=0)
    tiny = np.finfo(np.float64).tiny  # 0 log 0 = 0
    logs_NK = np.log(np.maximum(probabilities_NK, tiny)) - np.log(np.maximum(share_K, tiny))
    return float(np.exp((probabilities_NK * logs_NK).sum(axis=1).mean()))


def _root(covariance_FF: np.ndarray) -> np.ndarray:
    """The symmetric root of a covariance."""
    values_F, vectors_FF = np.linalg.eigh((covariance_FF + covariance_FF.T) / 2)
    noise = values_F.max(initial=0.0) * len(values_F) * np.finfo(np.float64).eps
    roots_F = np.sqrt(np.where(values_F > noise, values_F, 0.0))
    root_FF: np.ndarray = (vectors_FF * roots_F) @ vectors_FF.T
    return root_FF


def _reach(features_NF: np.ndarray, neighbours: int, chunk: int) -> np.ndarray:
    reach_N = np.empty(len(features_NF))
    for start, squares in _squared_distances(features_NF, features_NF, chunk):
        rows = np.arange(len(squares))
        squares[rows, start + rows] = np.inf  # a feature is no neighbour of itself
        kth = np.partition(squares, neighbours - 1, axis=1)[:, neighbours - 1]
        reach_N[start : start + len(squares)] = kth
    return reach_N


def _share_inside(
    points_NF: np.ndarray, manifold_NF: np.ndarray, reach_N: np.ndarray, chunk: int
) -> float:
    """Share of the points that lie in a ball of the manifold."""
    inside = 0
    for _, squares in _squared_distances(points_NF, manifold_NF, chunk):
        inside += int((squares <= reach_N).any(axis=1).sum())
    return inside / len(points_NF)


def _squared_distances(
    rows_NF: np.ndarray, columns_NF: np.ndarray, chunk: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Squared distances of some rows to all columns, with the number of the first row."""
    squares_N = (columns_NF**2).sum(axis=1)
    for start in range(0, len(rows_NF), chunk):
        part = rows_NF[start : start + chunk]
        distances = part @ columns_NF.T
        distances *= -2
        distances += squares_N
        distances += (part**2).sum(axis=1)[:, None]
        yield start, np.maximum(distances, 0, out=distances)


def _checked(values_NF: np.ndarray, *, at_least: int) -> np.ndarray:
    """Finite rows as float64, a copy."""
    if values_NF.ndim != 2 or len(values_NF) < at_least:
        raise ValueError(f"got an array {values_NF.shape}, wanted at least {at_least} rows")
    values_NF = values_NF.astype(np.float64)
    if not np.isfinite(values_NF).all():
        raise ValueError("got features that are not finite, wanted numbers")
    return values_NF
