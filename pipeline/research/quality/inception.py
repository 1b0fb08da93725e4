"""The Inception network of FID and Inception Score, from torch-fidelity and the user's weights.

torch-fidelity reproduces the TensorFlow graph that the field's numbers come from (resizing
included), so its features fit reference statistics made by OpenAI's evaluator. Nothing is ever
downloaded here.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from depthvar.errors import InputError
from depthvar.weights.tensor_files import read_file
from pipeline.research.quality.features import Readings

NUM_FEATURES = 2048
_PACKAGE = "torch_fidelity"
_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases"
_FIRST, _LAST = "Conv2d_1a_3x3.conv.weight", "fc.weight"


class InceptionNetwork:
    """The pooled features and the classes of uint8 RGB images of any size."""

    def __init__(self, weights: Path, *, device: str = "auto") -> None:
        """`device` is auto, cpu or cuda.

        Errors: `InputError` for a missing library, file or GPU, and for a file of something else.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("got --device cuda, but torch finds no GPU here: use --device cpu")
        if not weights.is_file():
            raise InputError(f"{weights} is no file, wanted {_WEIGHTS}: check --inception-weights")
        network = library_network()
        tensors = read_file(weights).tensors
        if _FIRST not in tensors or tensors.get(_LAST, torch.empty(0)).shape != (1008, 2048):
            raise InputError(
                f"{weights} holds no Inception network for FID, wanted {_WEIGHTS}: other Inception "
                "weights give other numbers"
            )
        # The library would unpickle whatever the file holds; it gets our copy of the tensors.
        copy = io.BytesIO()
        torch.save(tensors, copy)
        copy.seek(0)
        try:
            self._network: nn.Module = network(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=copy,
            ).to(device)
        except RuntimeError as error:  # names or shapes of the tensors
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{weights} does not fit, wanted {_WEIGHTS}: {reason}") from error
        self._device = device

    @torch.inference_mode()
    def read(self, images_NHWC: np.ndarray) -> Readings:
        """Features (N, 2048) and probabilities (N, 1008) of one batch of uint8 RGB images."""
        images = torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2)
        with torch.backends.cudnn.flags(allow_tf32=False):
            features, logits = self._network(images.to(self._device))
        # Without the bias, as the original score and OpenAI's evaluator have it.
        return Readings(features.cpu().numpy(), logits.softmax(1).cpu().numpy())


def library_network() -> Any:
    """torch-fidelity's Inception class.

    Only its own module is run: the package as a whole also imports torchvision, for networks that
    are not used here, and torchvision exists for fewer builds of torch.
    """
    name = f"{_PACKAGE}.feature_extractor_inceptionv3"
    if _PACKAGE in sys.modules:
        return importlib.import_module(name).FeatureExtractorInceptionV3
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise InputError(
            "FID needs torch-fidelity, which is not installed: pip install 'torch-fidelity<0.5'"
        )
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(name).FeatureExtractorInceptionV3
    finally:
        for loaded in [m for m in sys.modules if m.split(".")[0] == _PACKAGE]:
            del sys.modules[loaded]
