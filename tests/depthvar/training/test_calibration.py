import numpy as np
import torch

from depthvar.settings import SamplingSettings
from depthvar.training.calibration import ProxyRegression, calibrate
from depthvar.weights.checkpoint import load_model
from depthvar.weights.find import find_model
from tests.random_weights import write_random_weights


def test_the_fit_is_the_least_squares_line_of_every_channel():
    generator = torch.Generator().manual_seed(0)
    width, blocks = 3, 2
    regression = ProxyRegression(num_scales=2, num_blocks=blocks, width=width)
    seen = [[] for _ in range(blocks)]
    for _ in range(4):
        earlier = [torch.randn(2, 5, width, generator=generator) for _ in range(blocks)]
        later = [3 * x + 1 + torch.randn(x.shape, generator=generator) for x in earlier]
        regression.add(1, earlier, later)
        for block in range(blocks):
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


def test_a_scale_never_seen_predicts_no_change():
    fit = ProxyRegression(num_scales=2, num_blocks=1, width=2).fit()
    assert not fit.slope_SLC.any()
    assert not fit.offset_SLC.any()


def test_calibration_explains_more_than_nothing_and_repeats_exactly(tmp_path):
    model = load_model(find_model("digits", str(write_random_weights(tmp_path))))
    runs = [
        calibrate(model, SamplingSettings(1.0, 0, 1.0), num_samples=6, batch_size=3)
        for _ in range(2)
    ]
    (fit, explained), (again, _) = runs
    assert torch.equal(fit.slope_SLC, again.slope_SLC)
    assert fit.slope_SLC[1:].abs().sum() > 0
    assert (explained[1:] >= 0).all()
