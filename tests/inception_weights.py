"""Random Inception weights in the file format of the real ones."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
import torch

from pipeline.research.quality.inception import library_network

has_library = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed"
)


def write_inception(folder: Path) -> Path:
    """The library's own network with its own start, under the library's names."""
    network, empty = library_network(), io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        tensors = network("x", ["2048"], feature_extractor_weights_path=empty).state_dict()
    path = folder / "weights.pth"
    torch.save(tensors, path)
    return path
