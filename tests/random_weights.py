"""Weights of the small architecture, random but fixed: real sampling without a trained model."""

from __future__ import annotations

from pathlib import Path

import torch

from depthvar.checkpoint import save_model
from depthvar.config import model_config
from depthvar.tokenizer import Tokenizer
from depthvar.transformer import Transformer


def write_random_weights(folder: Path, model: str = "digits") -> Path:
    """Write a model folder that `--weights` takes; the same bytes every time."""
    config = model_config(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = Transformer(config.transformer), Tokenizer(config.tokenizer)
        for parameter in (p for part in parts for p in part.parameters()):
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    save_model(folder, config, *parts)
    return folder


if __name__ == "__main__":
    import sys

    write_random_weights(Path(sys.argv[1]))
