"""The public checkpoints as their page describes them: names and shapes written out by hand.

Kept apart from the modules, so that a test of one against the other can fail.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from depthvar.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
PUBLISHED = {
    "var-d16": (16, SIDES_256, False),
    "var-d20": (20, SIDES_256, False),
    "var-d24": (24, SIDES_256, False),
    "var-d30": (30, SIDES_256, False),
    "var-d36-512": (36, SIDES_512, True),
}
FILES = {
    "var-d16": "var_d16.pth",
    "var-d20": "var_d20.pth",
    "var-d24": "var_d24.pth",
    "var-d30": "var_d30.pth",
    "var-d36-512": "var_d36.pth",
}
TOKENIZER_FILE = "vae_ch160v4096z32.pth"
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


def transformer_shapes(model: str) -> Shapes:
    depth, sides, shared = PUBLISHED[model]
    return _transformer(depth, 64 * depth, depth, sides, 1000, 4096, 32, shared)


def small_transformer_shapes(config: ModelConfig) -> Shapes:
    t = config.transformer
    return _transformer(
        t.num_blocks, t.width, t.num_heads, t.sides, t.num_classes, t.codebook_size,
        t.code_channels, t.shared_adaln,
    )  # fmt: skip


def _transformer(
    depth: int, c: int, heads: int, sides: tuple[int, ...], classes: int, v: int, z: int,
    shared: bool,
) -> Shapes:  # fmt: skip
    tokens = sum(side * side for side in sides)
    shapes: Shapes = {
        "pos_start": (1, 1, c),
        "pos_1LC": (1, tokens, c),
        "lvl_1L": (1, tokens),
        "attn_bias_for_masking": (1, 1, tokens, tokens),
        "word_embed.weight": (c, z),
        "word_embed.bias": (c,),
        "class_emb.weight": (classes + 1, c),
        "lvl_embed.weight": (len(sides), c),
        "head_nm.ada_lin.1.weight": (2 * c, c),
        "head_nm.ada_lin.1.bias": (2 * c,),
        "head.weight": (v, c),
        "head.bias": (v,),
    }
    if shared:
        shapes |= {"shared_ada_lin.1.weight": (6 * c, c), "shared_ada_lin.1.bias": (6 * c,)}
    for i in range(depth):
        block: Shapes = {
            "attn.scale_mul_1H11": (1, heads, 1, 1),
            "attn.q_bias": (c,),
            "attn.v_bias": (c,),
            "attn.zero_k_bias": (c,),
            "attn.mat_qkv.weight": (3 * c, c),
            "attn.proj.weight": (c, c),
            "attn.proj.bias": (c,),
            "ffn.fc1.weight": (4 * c, c),
            "ffn.fc1.bias": (4 * c,),
            "ffn.fc2.weight": (c, 4 * c),
            "ffn.fc2.bias": (c,),
        }
        if shared:
            block["ada_gss"] = (1, 1, 6, c)
        else:
            block |= {"ada_lin.1.weight": (6 * c, c), "ada_lin.1.bias": (6 * c,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def tokenizer_shapes() -> Shapes:
    shapes: Shapes = {
        "quantize.embedding.weight": (4096, 32),
        "quantize.ema_vocab_hit_SV": (10, 4096),
        **_conv("quant_conv", 32, 32),
        **_conv("post_quant_conv", 32, 32),
    }
    for i in range(4):
        shapes |= _conv(f"quantize.quant_resi.qresi_ls.{i}", 32, 32)
    return shapes | _decoder() | _encoder()


def _decoder() -> Shapes:
    """up.4 (640) to up.0 (160), three residual blocks each; the resolution doubles after 4 to 1."""
    shapes = _conv("decoder.conv_in", 640, 32) | _middle("decoder")
    widths = {4: (640, 640), 3: (640, 320), 2: (320, 320), 1: (320, 160), 0: (160, 160)}
    for level, (before, width) in widths.items():
        for j in range(3):
            name = f"decoder.up.{level}.block.{j}"
            shapes |= _residual(name, before if j == 0 else width, width)
            if level == 4:
                shapes |= _attention(f"decoder.up.4.attn.{j}")
        if level:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width)
    return shapes | _norm("decoder.norm_out", 160) | _conv("decoder.conv_out", 3, 160)


def _encoder() -> Shapes:
    shapes = _conv("encoder.conv_in", 160, 3) | _middle("encoder")
    widths = ((160, 160), (160, 160), (160, 320), (320, 320), (320, 640))
    for level, (before, width) in enumerate(widths):
        for j in range(2):
            name = f"encoder.down.{level}.block.{j}"
            shapes |= _residual(name, before if j == 0 else width, width)
            if level == 4:
                shapes |= _attention(f"encoder.down.4.attn.{j}")
        if level < 4:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
    return shapes | _norm("encoder.norm_out", 640) | _conv("encoder.conv_out", 32, 640)


def _middle(half: str) -> Shapes:
    return {
        **_residual(f"{half}.mid.block_1", 640, 640),
        **_attention(f"{half}.mid.attn_1"),
        **_residual(f"{half}.mid.block_2", 640, 640),
    }


def _conv(name: str, out: int, into: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _residual(name: str, before: int, width: int) -> Shapes:
    shapes = {
        **_norm(f"{name}.norm1", before),
        **_conv(f"{name}.conv1", width, before),
        **_norm(f"{name}.norm2", width),
        **_conv(f"{name}.conv2", width, width),
    }
    return shapes if before == width else shapes | _conv(f"{name}.nin_shortcut", width, before, 1)


def _attention(name: str) -> Shapes:
    return {
        **_norm(f"{name}.norm", 640),
        **_conv(f"{name}.qkv", 1920, 640, 1),
        **_conv(f"{name}.proj_out", 640, 640, 1),
    }


def meta(shapes: Shapes) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, device="meta", dtype=torch.int64 if name == "lvl_1L" else None)
        for name, shape in shapes.items()
    }


def random_tensors(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Small random values, the same every time.

    All are cut from one block: fast at any size, and a file of them is as small as the largest.
    """
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    noise = block.repeat(-(-largest // len(block)) + 1)  # a tensor may begin anywhere in one
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        start, size = 977 * i % len(block), torch.Size(shape).numel()
        tensors[name] = noise[start : start + size].view(shape)
        if name == "lvl_1L":
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith("scale_mul_1H11"):
            tensors[name] = tensors[name] + 1.386
        elif ".norm" in name and name.endswith(".weight"):
            tensors[name] = tensors[name] + 1
    return tensors


def write_published(
    folder: Path, model: str, dtype: torch.dtype = torch.float32, *, full_size: bool = False
) -> Path:
    """A folder with random weights under a published model's real names; `--weights` takes it.

    `full_size` gives every tensor bytes of its own: files as large as the published ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file, shapes in (
        (FILES[model], transformer_shapes(model)),
        (TOKENIZER_FILE, tokenizer_shapes()),
    ):
        tensors = random_tensors(shapes, dtype)
        if full_size:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        torch.save(tensors, folder / file)
    return folder


if __name__ == "__main__":
    import sys

    write_published(Path(sys.argv[1]), sys.argv[2], full_size=True)
