from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from depthvar.errors import InputError
from pipeline.research.quality.inception import NUM_FEATURES, InceptionNetwork, library_network
from tests.inception_weights import has_library, write_inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("inception"))


@has_library
def test_features_and_probabilities_are_those_of_the_librarys_network(weights: Path):
    library = library_network()("x", ["2048", "logits"], feature_extractor_weights_path=weights)
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    features, logits = library(torch.from_numpy(images).permute(0, 3, 1, 2))
    readings = InceptionNetwork(weights, device="cpu").read(images)
    assert readings.features_NF.shape == (2, NUM_FEATURES)
    assert np.allclose(readings.features_NF, features.numpy(), rtol=1e-4, atol=1e-5)
    assert isinstance(library.fc, nn.Linear)
    wanted = (logits - library.fc.bias).softmax(1)  # the score's probabilities have no bias
    assert np.allclose(readings.probabilities_NK, wanted.numpy(), rtol=1e-4, atol=1e-6)


@has_library
def test_torchvision_is_not_needed_and_no_half_import_stays(weights: Path):
    before = set(sys.modules)
    InceptionNetwork(weights, device="cpu")
    new = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not new & {"torchvision", "torch_fidelity"}


@has_library
def test_files_of_something_else_are_refused(weights: Path, tmp_path: Path):
    tensors = torch.load(weights, weights_only=True)
    other = tmp_path / "torchvision.safetensors"
    save_file({"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, other)
    with pytest.raises(InputError, match=r"torchvision.safetensors holds no Inception network"):
        InceptionNetwork(other)
    partial = tmp_path / "partial.pth"
    del tensors["Mixed_6b.branch7x7_2.conv.weight"]
    torch.save(tensors, partial)
    with pytest.raises(InputError, match=r"partial.pth does not fit.*Mixed_6b.branch7x7_2"):
        InceptionNetwork(partial)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cut.pth .* is truncated"):
        InceptionNetwork(cut)


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("import sys; sys.attacked = True",))


@has_library
def test_weights_run_no_code(tmp_path: Path):
    path = tmp_path / "evil.pth"
    torch.save({"fc.weight": Attack()}, path)
    with pytest.raises(InputError, match="refers to code"):
        InceptionNetwork(path)
    assert not hasattr(sys, "attacked")


def test_a_missing_file_library_or_gpu_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"no.pth is no file, wanted weights-inception"):
        InceptionNetwork(tmp_path / "no.pth")
    path = tmp_path / "some.pth"
    torch.save({}, path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="finds no GPU"):
        InceptionNetwork(path, device="cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'torch-fidelity<0\.5'"):
        InceptionNetwork(path)
