from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg

from pipeline.research.quality import metrics
from pipeline.research.quality.metrics import (
    Moments,
    frechet_distance,
    frechet_from_moments,
    inception_score,
    moments,
    precision_recall,
)


def random_covariance(rng: np.random.Generator, size: int, rank: int | None = None) -> np.ndarray:
    factor = rng.normal(size=(size, rank or size + 3))
    return factor @ factor.T / factor.shape[1]


def random_moments(seed: int, size: int = 17, rank: int | None = None) -> Moments:
    rng = np.random.default_rng(seed)
    return Moments(rng.normal(size=size), random_covariance(rng, size, rank))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torch-fidelity's modules by name; its formulas do without the torchvision it imports."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    before = {name for name in sys.modules if name.split(".")[0] == "torch_fidelity"}
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        stub = ModuleType(f"torchvision{name}")
        for unused in ("CIFAR10", "STL10", "CIFAR100"):
            setattr(stub, unused, object)
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    yield lambda name: importlib.import_module(f"torch_fidelity.{name}")
    for name in list(sys.modules):
        if name.split(".")[0] == "torch_fidelity" and name not in before:
            del sys.modules[name]


def test_gaussians_with_independent_channels_have_the_textbook_distance():
    a = Moments(np.array([1.0, -2.0, 0.5]), np.diag([4.0, 0.25, 9.0]))
    b = Moments(np.array([0.0, 1.0, 0.5]), np.diag([1.0, 1.0, 4.0]))
    apart, spread = 1 + 9 + 0, (2 - 1) ** 2 + (0.5 - 1) ** 2 + (3 - 2) ** 2
    assert frechet_from_moments(a, b) == pytest.approx(apart + spread, rel=1e-12)


def test_the_distance_equals_that_with_a_matrix_root():
    for seed in range(5):
        a, b = random_moments(seed), random_moments(seed + 50)
        root = scipy.linalg.sqrtm(a.covariance_FF @ b.covariance_FF)
        wanted = ((a.mean_F - b.mean_F) ** 2).sum() + np.trace(
            a.covariance_FF + b.covariance_FF - 2 * np.real(root)
        )
        assert frechet_from_moments(a, b) == pytest.approx(wanted, rel=1e-9)
        assert frechet_from_moments(b, a) == pytest.approx(wanted, rel=1e-9)


def test_the_distance_equals_the_librarys(library: Any):
    a, b = random_moments(1), random_moments(2)
    stats = [{"mu": m.mean_F, "sigma": m.covariance_FF} for m in (a, b)]
    wanted = library("metric_fid").fid_statistics_to_metric(*stats, verbose=False)
    assert frechet_from_moments(a, b) == pytest.approx(*wanted.values(), rel=1e-9)


def test_fewer_images_than_features_do_no_harm():
    rng = np.random.default_rng(3)
    a_NF, b_NF = rng.normal(size=(30, 64)), rng.normal(size=(41, 64)) * 1.5
    a_NF[:, 7] = b_NF[:, 7] = 0.25  # a channel that never changes
    # tr (A B)^(1/2) is the nuclear norm of the product of the centred sets.
    product = (a_NF - a_NF.mean(0)) @ (b_NF - b_NF.mean(0)).T / np.sqrt(29 * 40)
    wanted = ((a_NF.mean(0) - b_NF.mean(0)) ** 2).sum()
    wanted += a_NF.var(0, ddof=1).sum() + b_NF.var(0, ddof=1).sum()
    wanted -= 2 * np.linalg.svd(product, compute_uv=False).sum()
    assert frechet_distance(a_NF, b_NF) == pytest.approx(wanted, rel=1e-9)


def test_a_set_has_no_distance_to_itself_whatever_its_rank_and_scale():
    rng = np.random.default_rng(4)
    for shape in ((400, 20), (10, 200)):
        for scale in (1e-4, 1.0, 1e4):
            features_NF = (rng.normal(size=shape) * scale).astype(np.float32)
            assert 0 <= frechet_distance(features_NF, features_NF) <= 1e-9 * scale**2 * shape[1]


def test_samples_of_known_gaussians_come_near_their_distance():
    rng = np.random.default_rng(5)
    covariance = np.array([[2.0, 0.6], [0.6, 1.0]])
    a_NF = rng.multivariate_normal([0, 0], covariance, size=200_000)
    b_NF = rng.multivariate_normal([1, -1], 4 * covariance, size=200_000)
    # A and 4A commute: |mean|^2 + tr (A + 4A - 2 * 2A) = 2 + tr A
    assert frechet_distance(a_NF, b_NF) == pytest.approx(2 + 3, rel=0.02)


def test_moments_are_numpys():
    features_NF = np.random.default_rng(6).normal(size=(37, 5)).astype(np.float32)
    found = moments(features_NF)
    assert np.allclose(found.mean_F, features_NF.mean(0, dtype=np.float64), rtol=1e-12)
    assert np.allclose(found.covariance_FF, np.cov(features_NF.T.astype(np.float64)), rtol=1e-12)


def plain_precision_recall(
    real_NF: np.ndarray, made_NF: np.ndarray, neighbours: int
) -> tuple[float, float]:
    """The definition, image by image."""

    def radii(features: np.ndarray) -> list[float]:
        return [
            sorted(np.linalg.norm(a - b) for j, b in enumerate(features) if j != i)[neighbours - 1]
            for i, a in enumerate(features)
        ]

    def share(points: np.ndarray, manifold: np.ndarray) -> float:
        balls = list(zip(manifold, radii(manifold), strict=True))
        return float(np.mean([any(np.linalg.norm(p - c) <= r for c, r in balls) for p in points]))

    return share(made_NF, real_NF), share(real_NF, made_NF)


@pytest.mark.parametrize(("neighbours", "rows_at_once"), [(1, 7), (3, 1000), (5, 1)])
def test_precision_and_recall_follow_their_definition(
    neighbours: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(neighbours)
    real_NF = rng.normal(size=(43, 4)) + 100
    made_NF = rng.normal(size=(29, 4)) * 1.2 + 101
    monkeypatch.setattr(metrics, "_CHUNK_MIB", rows_at_once * 43 * 8 / 2**20)
    found = precision_recall(real_NF, made_NF, neighbours=neighbours)
    wanted = plain_precision_recall(real_NF, made_NF, neighbours)
    assert found == pytest.approx(wanted, abs=1e-12)
    assert 0 < wanted[0] < 1
    assert 0 < wanted[1] < 1


def test_precision_and_recall_equal_the_librarys(library: Any):
    import torch

    rng = np.random.default_rng(8)
    real_NF, made_NF = rng.normal(size=(90, 6)), rng.normal(size=(70, 6)) * 0.7 + 0.3
    wanted = library("metric_prc").calculate_precision_recall_full(
        torch.from_numpy(made_NF), torch.from_numpy(real_NF), 3
    )
    assert precision_recall(real_NF, made_NF, neighbours=3) == pytest.approx(wanted, abs=1e-6)


def test_collapsed_images_are_precise_and_recall_little():
    rng = np.random.default_rng(9)
    real_NF, made_NF = rng.normal(size=(200, 16)) * 3, rng.normal(size=(150, 16)) * 0.1
    precision, recall = precision_recall(real_NF, made_NF)
    assert precision == 1.0
    assert recall < 0.1


def test_the_inception_score_has_its_bounds():
    assert inception_score(np.full((40, 10), 0.1), splits=3) == pytest.approx((1.0, 0.0))
    sure = np.eye(10)[np.arange(40) % 10]
    assert inception_score(sure, splits=4) == pytest.approx((10.0, 0.0))


def test_the_inception_score_of_two_splits_is_their_mean_and_deviation():
    one_class = np.tile([[1.0, 0.0]], (6, 1))
    two_classes = np.tile([[1.0, 0.0], [0.0, 1.0]], (3, 1))
    found = inception_score(np.concatenate([one_class, two_classes]), splits=2)
    assert found == pytest.approx((1.5, 0.5))


def test_the_inception_score_equals_the_librarys(library: Any):
    import torch

    logits = torch.randn(103, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = library("metric_isc").isc_features_to_metric(logits, splits=4, shuffle=False)
    found = inception_score(logits.softmax(1).numpy(), splits=4)
    assert found == pytest.approx(tuple(wanted.values()), rel=1e-9)


def test_what_is_no_feature_matrix_is_refused():
    good = np.zeros((8, 3))
    with pytest.raises(ValueError, match="at least 2 rows"):
        frechet_distance(good, good[:1])
    with pytest.raises(ValueError, match="at least 4 rows"):
        precision_recall(good, good[:3], neighbours=3)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(good, good * np.nan)
    with pytest.raises(ValueError, match="3 and 2 features"):
        frechet_distance(good, good[:, :2])
