"""The loop as published against the dense reference, and its draws.

Shape legend: B images, T tokens of a scale, N tokens of an image, V codes.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from depthvar.presets import make_policy
from depthvar.published import PublishedSampler, draw_published
from depthvar.settings import SamplingSettings
from tests import reference_depthvar as reference
from tests.gpu_check import published_logits
from tests.tiny_models import GUIDED, TOLERANCE, UNGUIDED, states, tiny_model

LABELS = [1, 4, 0]


@pytest.mark.parametrize("how", [GUIDED, UNGUIDED])
@pytest.mark.parametrize("shape", [0, 1])  # one with AdaLN per block, one with a shared one
def test_logits_are_the_reference_s_scale_by_scale(shape, how):
    model = tiny_model(shape)
    config = replace(model.config, sampling=how)
    uniforms_BN = torch.rand(len(LABELS), config.transformer.num_tokens, dtype=torch.float64)
    want = reference.sample(
        states(model), config, make_policy("full"), how, LABELS, uniforms_BN, uniforms_BN
    )
    with_settings = replace(model, found=replace(model.found, config=config))
    tokens = [scale.tokens_BT for scale in want.scales]
    logits = published_logits(with_settings, torch.float64, LABELS, tokens)
    for got, scale in zip(logits, want.scales, strict=True):
        torch.testing.assert_close(got, scale.logits_BTV, rtol=0, atol=TOLERANCE[torch.float64])


def test_images_come_of_the_feature_map_and_the_seed():
    model = tiny_model(0, torch.float32)
    sampler = PublishedSampler(model, torch.bfloat16)
    one, again, other = (
        sampler(LABELS, seed=seed, indices=range(3)).images_BHWC for seed in (5, 5, 6)
    )
    assert one.shape == (3, 10, 10, 3)
    assert (one == again).all()
    assert (one != other).any()


def test_half_precision_is_autocast_over_wide_weights():
    """Logits near float32's, and not those."""
    model = tiny_model(0, torch.float32)
    tokens = [torch.zeros(3, side * side, dtype=torch.int64) for side in model.config.sides]
    wide, narrow = (
        torch.cat(published_logits(model, dtype, LABELS, tokens), dim=1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    apart = ((wide - narrow).abs().mean() / wide.std()).item()
    assert 1e-4 < apart < 0.05
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.6), (4, 0.7), (1, 1.0)])
def test_draws_are_of_what_top_k_and_top_p_leave(top_k, top_p):
    how = SamplingSettings(cfg=1.0, top_k=top_k, top_p=top_p)
    logits_V = [0.3, 2.0, -1.0, 1.4, 0.9, 1.7]
    torch.manual_seed(0)
    drawn = draw_published(torch.tensor(logits_V).expand(1, 20_000, 6), how)
    shares = torch.bincount(drawn[0], minlength=6) / 20_000
    wanted = torch.tensor(reference.draw(logits_V, 0.5, how).probs_V)
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.015)
    assert ((shares > 0) == (wanted > 0)).all()
