import weakref

import numpy as np
import pytest
import torch

from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.settings import SamplingSettings
from depthvar.training import calibration
from depthvar.training.calibration import CALIBRATION_SEED, ProxyRegression, calibrate
from depthvar.weights.checkpoint import load_model
from depthvar.weights.find import find_model
from tests.random_weights import write_random_weights
from tests.reference_depthvar import covering_token
from tests.tiny_models import TEXT_GUIDED, text_states, tiny_text_model


def test_the_fit_is_the_least_squares_line_of_every_channel():
    generator = torch.Generator().manual_seed(0)
    width, blocks = 3, 2
    regression = ProxyRegression(num_scales=2, num_blocks=blocks, width=width)
    seen = [[] for _ in range(blocks)]
    for _ in range(4):
        earlier = [torch.randn(2, 5, width, generator=generator) for _ in range(blocks)]
        later = [3 * x + 1 + torch.randn(x.shape, generator=generator) for x in earlier]
        for block in range(blocks):
            regression.add(1, block, earlier[block], later[block])
            seen[block].append((earlier[block].reshape(-1, width), later[block].reshape(-1, width)))
    fit, explained = regression.fit(), regression.explained_energy()
    for block in range(blocks):
        x, y = (torch.cat(parts).double().numpy() for parts in zip(*seen[block], strict=True))
        residual = total = 0.0
        for channel in range(width):
            slope, offset = np.polyfit(x[:, channel], y[:, channel], 1)
            np.testing.assert_allclose(fit.slope_SLC[1, block, channel], slope, rtol=1e-5)
            np.testing.assert_allclose(fit.offset_SLC[1, block, channel], offset, rtol=1e-4)
            error = y[:, channel] - slope * x[:, channel] - offset
            residual += float((error**2).sum())
            total += float((y[:, channel] ** 2).sum())
        np.testing.assert_allclose(explained[1, block], 1 - residual / total, rtol=1e-6)


def test_the_fit_of_a_text_model_is_that_of_the_changes_its_blocks_make(
    monkeypatch: pytest.MonkeyPatch,
):
    """Of images that are higher than wide, in two batches, summed 7 tokens at once."""
    model, texts, recorded = tiny_text_model(1), text_states((5, 2, 4)), []
    noted, alive = [], []
    config, run_block = model.config, model.transformer.run_block

    def record(*args):
        change = run_block(*args)
        recorded.append(change.whole())
        return change

    with monkeypatch.context() as patch:
        patch.setattr(model.transformer, "run_block", record)
        sampler = Sampler(model, make_policy("full"), TEXT_GUIDED)
        for first in (0, 2):
            indices = range(first, min(first + 2, 3))
            sampler.tokens(texts[first : first + 2], seed=CALIBRATION_SEED, indices=indices)

    def note_alive(*args):
        change = run_block(*args)
        noted.append(weakref.ref(change.whole()))
        alive.append(sum(ref() is not None for ref in noted))
        return change

    monkeypatch.setattr(model.transformer, "run_block", note_alive)
    monkeypatch.setattr(calibration, "_CHUNK_VALUES", 7 * config.width)
    fit, _ = calibrate(model, TEXT_GUIDED, texts, batch_size=2)
    assert max(alive) == config.num_blocks, "of every block one change is held"
    by_batch = np.split(np.arange(len(recorded)), 2)
    for scale in range(1, len(config.grids)):
        cover = covering_token(config.grids[scale], config.grids[scale - 1])
        for block in range(config.num_blocks):
            here = [recorded[batch[scale * config.num_blocks + block]] for batch in by_batch]
            before = [
                recorded[batch[(scale - 1) * config.num_blocks + block]] for batch in by_batch
            ]
            y, x = (
                np.concatenate([change.flatten(0, 1).numpy() for change in changes])
                for changes in (here, [change[:, cover] for change in before])
            )
            for channel in range(config.width):
                line = np.polyfit(x[:, channel], y[:, channel], 1)
                found = [part[scale, block, channel] for part in (fit.slope_SLC, fit.offset_SLC)]
                np.testing.assert_allclose(found, line, rtol=1e-5, atol=1e-6)


def test_a_scale_never_seen_predicts_no_change():
    fit = ProxyRegression(num_scales=2, num_blocks=1, width=2).fit()
    assert not fit.slope_SLC.any()
    assert not fit.offset_SLC.any()


def test_calibration_explains_more_than_nothing_and_repeats_exactly(tmp_path):
    model = load_model(find_model("digits", str(write_random_weights(tmp_path))))
    runs = [
        calibrate(model, SamplingSettings(1.0, 0, 1.0), range(6), batch_size=3) for _ in range(2)
    ]
    (fit, explained), (again, _) = runs
    assert torch.equal(fit.slope_SLC, again.slope_SLC)
    assert fit.slope_SLC[1:].abs().sum() > 0
    assert (explained[1:] >= 0).all()
