"""Weights of the small architecture, random but fixed: real sampling without a trained model."""

from __future__ import annotations

from pathlib import Path

from depthvar.config import model_config
from depthvar.weights.checkpoint import random_model, save_model


def write_random_weights(folder: Path, model: str = "digits") -> Path:
    """Write a model folder that `--weights` takes; the same bytes every time."""
    made = random_model(model_config(model), with_encoder=True)
    save_model(folder, made.config, made.transformer, made.tokenizer)
    return folder


if __name__ == "__main__":
    import sys

    write_random_weights(Path(sys.argv[1]))
