"""A T5 of a few thousand random numbers with a tokenizer of a few words, as files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WIDTH = 32
_WORDS = ("a", "photo", "of", "the", "red", "fox", "cat", "in", "snow")


def write_tiny_t5(folder: Path, *, whole: bool = True, width: int = WIDTH) -> Path:
    """A T5 of two blocks, or its encoder alone, with its tokenizer."""
    import torch
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

    torch.manual_seed(0)
    pieces = [f"\u2581{word}" for word in _WORDS]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -1.0) for p in pieces)]
    vocabulary += [("\u2581", -2.0), *((letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz,.")]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    config = T5Config(
        vocab_size=64,
        d_model=width,
        d_kv=8,
        d_ff=80,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    (T5ForConditionalGeneration if whole else T5EncoderModel)(config).save_pretrained(folder)
    return folder


def write_t5_names(folder: Path, *, num_blocks: int = 2, **config: object) -> Path:
    """Files that look like a T5's, made without `transformers`: nothing can be loaded of them."""
    folder.mkdir(exist_ok=True)
    told = {"model_type": "t5", "d_model": WIDTH, "num_layers": 2, **config}
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "tokenizer.json").write_text("{}")
    wo = "layer.1.DenseReluDense.wo.weight"
    tensors = {f"encoder.block.{i}.{wo}": np.zeros((WIDTH, 80)) for i in range(num_blocks)}
    tensors |= {"shared.weight": np.zeros((64, WIDTH)), "decoder.x": np.zeros(1000)}
    tensors["encoder.final_layer_norm.weight"] = np.zeros(WIDTH)
    save_file(tensors, folder / "model.safetensors")
    return folder
