"""Infinity's tokenizer as far as sampling needs it: bit quantizer and image decoder.

The published names have an inner `.conv` or `.norm` that ours lack (`weights.tensor_files`).

Source: Han et al., arXiv 2412.04431; `infinity_vae_d32reg.pth`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from depthvar.infinity.quantizer import BitQuantizer
from depthvar.infinity_config import InfinityConfig
from depthvar.var.tokenizer import Decoder


class BitTokenizer(nn.Module):
    """Quantizer and decoder, without the encoder."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.quantize = BitQuantizer(config)
        self.decoder = Decoder(config.decoder_shape)

    def decode(self, feature_map_BZHW: Tensor) -> Tensor:
        """Feature map to images clamped to [-1, 1], in the decoder's precision; NaN stays NaN."""
        images: Tensor = self.decoder(feature_map_BZHW)
        return images.masked_fill(images.isinf(), torch.nan).clamp(-1, 1)
