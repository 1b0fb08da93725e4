"""The next-scale transformer of VAR, with the parameter names of the published checkpoints.

Shape legend: B images, G stream rows (2B guided: conditional then unconditional), T tokens of a
scale or of a whole image, K active tokens, C width, H heads, D head channels, V codes, Z code
channels, S scales, M = 3C rows of the fused queries, keys and values.

Source: Tian et al., arXiv 2404.02905, and the public `var_d*.pth` files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from depthvar.config import TransformerConfig
from depthvar.layers import (
    Attend,
    Attention,
    AttentionConstants,
    FeedForward,
    HeadNorm,
    at_least_float32,
    first_rows,
    unrounded,
)
from depthvar.pointwise import Change, Layer, unit


@dataclass(frozen=True)
class BlockCondition:
    """The AdaLN vectors of a block, each (G, 1, C) and at least float32, and its constants.

    Normed inputs are multiplied by `scale`, which is one more than the linear gives.
    """

    gamma1: Tensor
    gamma2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor
    attention: AttentionConstants


@dataclass(frozen=True)
class Condition:
    """What no scale and no token changes, computed once per batch.

    `start_G1C` is the class embedding that begins scale 0, and `head` the (scale, shift) before the
    output layer, as those of the blocks.
    """

    start_G1C: Tensor
    blocks: tuple[BlockCondition, ...]
    head: tuple[Tensor, Tensor]


class Block(Layer):
    """Attention and feed-forward, each modulated by six class-dependent vectors (AdaLN)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.attn = Attention(config.width, config.num_heads, turns=False)
        self.ffn = FeedForward(config.width, config.mlp_ratio * config.width)
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def _normed(self, x_GKC: Tensor, scale_G1C: Tensor, shift_G1C: Tensor) -> Tensor:
        dtype = self.ffn.fc1.weight.dtype
        return self.pointwise.modulated(x_GKC, scale_G1C, shift_G1C, eps=self.norm_eps, dtype=dtype)

    def keys_values(self, x_GKC: Tensor, given: BlockCondition) -> tuple[Tensor, Tensor]:
        """Keys and values that tokens with this block input would have, each (G, H, K, D)."""
        normed_GKC = self._normed(x_GKC, given.scale1, given.shift1)
        return self.attn.keys_values(normed_GKC, given.attention)

    def forward(self, x_GKC: Tensor, given: BlockCondition, attend: Attend) -> Change:
        """What the block adds to the residual stream, at least float32."""
        normed_GKC = self._normed(x_GKC, given.scale1, given.shift1)
        attended_GKC, normed_GKC = self.pointwise.added_and_modulated(
            x_GKC,
            self.attn(normed_GKC, given.attention, attend),
            given.gamma1,
            None,
            given.scale2,
            given.shift2,
            eps=self.norm_eps,
            dtype=self.ffn.fc1.weight.dtype,
        )
        return self.pointwise.gated_sum(attended_GKC, self.ffn(normed_GKC), given.gamma2)


class Transformer(nn.Module):
    """Embeddings, blocks and head; how the blocks are run is the caller's business."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.word_embed = nn.Linear(config.code_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.lvl_embed = nn.Embedding(len(config.sides), width)
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.head_nm = HeadNorm(config.width, config.norm_eps)
        self.head = nn.Linear(width, config.codebook_size)

    @property
    def ordered_blocks(self) -> tuple[Block, ...]:
        """The blocks, as what they are."""
        return tuple(block for block in self.blocks if isinstance(block, Block))

    def condition(self, labels: Sequence[int] | Tensor, streams: int = 1) -> Condition:
        """Class-dependent vectors of one label or more; with two streams, unconditional ones too.

        The label `num_classes` stands for "unconditional".
        """
        labels_G = torch.as_tensor(labels, device=self.pos_start.device)
        if streams == 2:
            labels_G = torch.cat([labels_G, torch.full_like(labels_G, self.config.num_classes)])
        embedded_GC = self.class_emb(labels_G)

        def vectors(linear: nn.Module, count: int) -> Tensor:
            out_GC = at_least_float32(linear(embedded_GC))
            return out_GC.view(len(out_GC), 1, count, -1)

        def of_block(block: Block) -> BlockCondition:
            six = vectors(block.ada_lin, 6) if shared is None else shared + block.ada_gss
            gamma1, gamma2, scale1, scale2, shift1, shift2 = six.unbind(2)
            constants = block.attn.constants()
            return BlockCondition(gamma1, gamma2, scale1 + 1, scale2 + 1, shift1, shift2, constants)

        shared = vectors(self.shared_ada_lin, 6) if self.config.shared_adaln else None
        blocks = tuple(map(of_block, self.ordered_blocks))
        scale, shift = vectors(self.head_nm.ada_lin, 2).unbind(2)
        return Condition(embedded_GC.unsqueeze(1), blocks, (scale + 1, shift))

    def tensors_of(self, labels: Sequence[int] | Tensor, streams: int) -> Tensor:
        """The labels on the device."""
        return torch.as_tensor(labels, device=self.pos_start.device)

    def first_rows(self, condition: Condition, count: int) -> Condition:
        """The condition of the first rows alone, as views."""
        scale_G1C, shift_G1C = condition.head
        return replace(
            first_rows(condition, count),
            blocks=tuple(first_rows(block, count) for block in condition.blocks),
            head=(scale_G1C[:count], shift_G1C[:count]),
        )

    def _positions(self, scale: int) -> Tensor:
        """Position and level embedding of a scale (1, T, C)."""
        sides = self.config.sides
        begin = sum(side * side for side in sides[:scale])
        positions_1TC = self.pos_1LC[:, begin : begin + sides[scale] ** 2]
        return self.lvl_embed.weight[scale] + at_least_float32(positions_1TC)

    def embed(self, scale: int, codes_GTZ: Tensor | None, condition: Condition) -> Tensor:
        """Input of a scale (G, T, C), at least float32: where the residual stream begins.

        `codes_GTZ` is the feature map at the side of the scale, None at scale 0.
        """
        if codes_GTZ is None:
            return condition.start_G1C + self.pos_start + self._positions(scale)
        return at_least_float32(self.word_embed(codes_GTZ)) + self._positions(scale)

    def rotations(self, scale: int) -> None:
        """None: positions are embedded, and turn nothing."""

    def run_block(self, block: int, x_GKC: Tensor, condition: Condition, attend: Attend) -> Change:
        """What one block adds to the residual stream of some tokens."""
        change: Change = self.blocks[block](x_GKC, condition.blocks[block], attend)
        return change

    def keys_values(self, block: int, x_GKC: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens that the block does not compute, each (G, H, K, D)."""
        return self.ordered_blocks[block].keys_values(x_GKC, condition.blocks[block])

    def logits(self, x_GTC: Tensor, condition: Condition) -> Tensor:
        """Logits over the codebook (G, T, V), at least float32."""
        return unrounded(self.head, self.head_nm(x_GTC, *condition.head))

    def forward(
        self, labels_B: Tensor, codes_BTZ: Tensor, mask_TT: Tensor, kept_blocks: list[int]
    ) -> Tensor:
        """Teacher-forced logits (B, T, V) of all scales at once, for training.

        `codes_BTZ` holds the inputs of the scales after the first, `mask_TT` is True where a token
        (row) may look, `kept_blocks` are the blocks that run (block LayerDrop leaves some out).
        """
        condition = self.condition(labels_B)
        scales, begin = [self.embed(0, None, condition)], 0
        for scale, side in enumerate(self.config.sides[1:], start=1):
            scales.append(self.embed(scale, codes_BTZ[:, begin : begin + side * side], condition))
            begin += side * side
        x_BTC = torch.cat(scales, dim=1)

        bias_TT = torch.zeros_like(mask_TT, dtype=x_BTC.dtype).masked_fill(~mask_TT, -torch.inf)

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
            q, k = unit(q, v.dtype, scale), unit(k, v.dtype)
            # At this length plain products train several times faster than the fused kernel on CPU.
            return (q @ k.mT + bias_TT.to(v.dtype)).softmax(-1) @ v

        for block in kept_blocks:
            x_BTC = x_BTC + self.run_block(block, x_BTC, condition, attend).whole()
        return self.logits(x_BTC, condition)


def block_causal_mask(sides: tuple[int, ...]) -> Tensor:
    """(T, T) bool: a token sees every token of its own and of earlier scales."""
    level_T = torch.repeat_interleave(
        torch.arange(len(sides)), torch.tensor([side * side for side in sides])
    )
    return level_T[:, None] >= level_T[None, :]


@torch.no_grad()
def initialise(model: Transformer, generator: torch.Generator) -> None:
    """Weights for training from scratch: GPT-2-style scaled residual branches, AdaLN near identity.

    The published recipe starts its AdaLN gammas near zero, which wants far more steps than a small
    model gets.
    """
    std = math.sqrt(1 / (3 * model.config.width))
    residual_std = std / math.sqrt(2 * model.config.num_blocks)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_mul_1H11"):
            continue
        if parameter.dim() < 2 or name.endswith(".bias"):
            parameter.zero_()
        elif name.endswith(("attn.proj.weight", "ffn.fc2.weight")):
            parameter.normal_(0, residual_std, generator=generator)
        else:
            small = 0.02 if name == "head.weight" or "ada_lin" in name else 1.0
            parameter.normal_(0, std * small, generator=generator)
    width = model.config.width
    for block in model.ordered_blocks:
        if model.config.shared_adaln:
            block.ada_gss.zero_()
            block.ada_gss[:, :, :2] = 1
        else:
            linear = block.ada_lin[1]
            assert isinstance(linear, nn.Linear)
            linear.bias[: 2 * width] = 1
