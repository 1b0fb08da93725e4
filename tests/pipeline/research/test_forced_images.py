"""Losses and divergences of real images, against the plain forward pass and small sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from depthvar.policy import DepthPolicy
from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.settings import SamplingSettings
from depthvar.training.data import to_float
from depthvar.var.transformer import block_causal_mask
from pipeline.research.quality.forced_images import ForcedImages, _gain_of_top, _headroom
from tests.tiny_models import tiny_model


def test_the_loss_of_a_real_image_is_what_training_minimises():
    model = tiny_model(0)
    generator = np.random.default_rng(0)
    side, classes = model.config.image_side, model.config.num_classes
    images = generator.integers(0, 256, (7, side, side, 3), dtype=np.uint8)
    labels = np.arange(7) % classes
    forced = ForcedImages(model, images, labels)
    losses_NS = forced.losses(make_policy("full"))
    pixels = to_float(torch.from_numpy(images).permute(0, 3, 1, 2)).double()
    expected_tokens, codes, _ = model.tokenizer.tokenize(model.tokenizer.encode(pixels))
    assert all(map(torch.equal, forced.tokens, expected_tokens))
    mask = block_causal_mask(model.config.sides)
    blocks = list(range(model.config.num_blocks))
    logits = model.transformer(torch.from_numpy(labels), codes, mask, blocks)
    losses_NT = F.cross_entropy(logits.mT, torch.cat(expected_tokens, dim=1), reduction="none")
    counts = [side * side for side in model.config.sides]
    expected = [of_scale.sum(dim=1) for of_scale in losses_NT.split(counts, dim=1)]
    np.testing.assert_allclose(losses_NS, torch.stack(expected, dim=1), rtol=1e-9)


def test_the_loss_of_a_shallow_policy_differs_after_its_reference_scale_alone():
    model = tiny_model(1)
    images = np.random.default_rng(1).integers(0, 256, (3, 10, 10, 3), dtype=np.uint8)
    forced = ForcedImages(model, images, np.array([0, 1, 2]))
    full, shallow = (
        forced.losses(policy)
        for policy in (make_policy("full"), make_policy("uniform", reference_scale=1))
    )
    assert (full[:, :2] == shallow[:, :2]).all()
    assert (full[:, 2:] != shallow[:, 2:]).all()


def test_headroom_is_the_divergence_of_tokens_that_all_have_one_depth():
    model = tiny_model(3)
    images = np.random.default_rng(2).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    forced = ForcedImages(model, images, np.array([0, 1, 2, 3]))
    counted: list[int] = []
    found = forced.headroom(1, num_images=3, after_batch=counted.append)
    assert counted == [3]
    assert [(h.scale, h.depth) for h in found] == [(i, d) for i in (2, 3, 4) for d in (2, 4)]
    plain = SamplingSettings(cfg=0.0, top_k=0, top_p=1.0)

    def log_probs(policy: DepthPolicy) -> list[torch.Tensor]:
        scales: list[torch.Tensor] = []
        Sampler(model, policy, plain).tokens(
            [0, 1, 2],
            seed=5,
            indices=range(3),
            forced=[tokens_NT[:3] for tokens_NT in forced.tokens],
            on_scale=lambda scale, logits, trace: scales.append(logits.log_softmax(2)),
        )
        return scales

    full = log_probs(DepthPolicy())
    for headroom in found:
        shallow = log_probs(
            DepthPolicy(
                reference_scale=1, allocation="least", min_depth=headroom.depth, compensation=True
            )
        )
        apart = F.kl_div(
            shallow[headroom.scale], full[headroom.scale], log_target=True, reduction="none"
        )
        assert headroom.uniform == pytest.approx(float(apart.sum(2).mean()), rel=1e-9)
        assert headroom.mixed["oracle"] == min(headroom.mixed.values())
        assert set(headroom.mixed) == {"oracle", "at random", "change", "entropy", "spread"}


def test_a_mix_runs_no_more_blocks_than_uniform_depth():
    half = torch.tensor([[6.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0]])
    twice = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    signal = torch.tensor([[0.0, 9.0, 1.0, 8.0, 0.0, 0.0, 0.0]])
    found = _headroom(5, 2, [half, torch.full_like(half, 0.5), twice], {"signal": signal})
    assert found.uniform == 0.5
    assert found.mixed["oracle"] == pytest.approx((15 - 6 - 3) / 7), "two of seven tokens deep"
    assert found.mixed["signal"] == pytest.approx((15 - 0 - 3) / 7)
    assert found.mixed["at random"] == pytest.approx((15 - 10 * 2 / 7) / 7)
    assert found.neediest_quarter == pytest.approx(6 / 10)


def test_the_top_is_taken_within_each_image():
    gain = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    assert float(_gain_of_top(gain, gain, 1)) == pytest.approx(22 / 4)
