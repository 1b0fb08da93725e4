"""Infinity's transformer, with the parameter names of the published checkpoints.

Shape legend: B images, G stream rows (2B guided: conditional then unconditional), T tokens of a
scale, K active tokens, N tokens of a text (the longest of the rows), C width, E channels of the
text's states, H heads, D head channels, V outputs, Z bits of a token, M = 3C rows of the fused
queries, keys and values.

Source: Han et al., arXiv 2412.04431, and the public `infinity_2b_reg.pth`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from depthvar.errors import InputError
from depthvar.infinity_config import InfinityConfig
from depthvar.layers import (
    Attend,
    Attention,
    AttentionConstants,
    FeedForward,
    HeadNorm,
    at_least_float32,
    first_rows,
    heads,
    tree_of_tensors,
    unrounded,
)
from depthvar.pointwise import Change, Layer

_ROTARY_BASE = 10000.0
_PADDED_TO = 32
"""Tokens that padded texts are a multiple of."""


@tree_of_tensors
@dataclass(frozen=True)
class TextKeys:
    """Keys and values of the rows' texts at one block (G, H, N, D), and which are padding.

    `is_text_G11N` is None where no row is padded.
    """

    keys_GHND: Tensor
    values_GHND: Tensor
    is_text_G11N: Tensor | None


@tree_of_tensors
@dataclass(frozen=True)
class BlockCondition:
    """What a block knows of its rows' texts: AdaLN vectors (G, 1, C), keys and values, constants.

    Normed inputs are multiplied by `scale`, which is one more than the linear gives.
    """

    gamma1: Tensor
    gamma2: Tensor
    scale1: Tensor
    scale2: Tensor
    shift1: Tensor
    shift2: Tensor
    text: TextKeys
    attention: AttentionConstants


@tree_of_tensors
@dataclass(frozen=True)
class TextCondition:
    """What no scale and no token changes, computed once per batch and distinct text."""

    start_G1C: Tensor
    blocks: tuple[BlockCondition, ...]
    head: tuple[Tensor, Tensor]


def _attend_to_text(q_GHKD: Tensor, text: TextKeys) -> Tensor:
    """Attention over a row's own text, softmax scale 1 / sqrt(D); heads joined (G, K, C)."""
    out_GHKD = F.scaled_dot_product_attention(
        q_GHKD, text.keys_GHND, text.values_GHND, attn_mask=text.is_text_G11N
    )
    return out_GHKD.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    """Attention of tokens over their row's text."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def keys_values(self, text_GNC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of texts, each (G, H, N, D)."""
        return _text_keys_values(self.mat_kv, self.v_bias, text_GNC, self.num_heads)

    def forward(self, x_GKC: Tensor, text: TextKeys) -> Tensor:
        """(G, K, C) to the same shape."""
        attended_GKC = _attend_to_text(heads(self.mat_q(x_GKC), self.num_heads), text)
        projected: Tensor = self.proj(attended_GKC)
        return projected


def _text_keys_values(
    mat_kv: nn.Linear, v_bias: Tensor, text_GNE: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    bias = torch.cat([torch.zeros_like(v_bias), v_bias])
    k_GNC, v_GNC = F.linear(text_GNE, mat_kv.weight, bias).chunk(2, dim=2)
    return heads(k_GNC, num_heads), heads(v_GNC, num_heads)


class Block(Layer):
    """Self-attention, cross-attention to the text and feed-forward; the first and last by AdaLN."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.sa = Attention(config.width, config.num_heads, turns=True)
        self.ca = CrossAttention(config)
        self.ca_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.ffn = FeedForward(config.width, config.mlp_width)
        self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.width))

    def condition(
        self, shared_G16C: Tensor, text_GNC: Tensor, is_text_G11N: Tensor | None
    ) -> BlockCondition:
        """What the block makes of the rows' texts."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (shared_G16C + self.ada_gss).unbind(2)
        return BlockCondition(
            gamma1,
            gamma2,
            scale1 + 1,
            scale2 + 1,
            shift1,
            shift2,
            TextKeys(*self.ca.keys_values(text_GNC), is_text_G11N),
            self.sa.constants(),
        )

    def _normed(self, x_GKC: Tensor, scale_G1C: Tensor, shift_G1C: Tensor) -> Tensor:
        dtype = self.ffn.fc1.weight.dtype
        return self.pointwise.modulated(x_GKC, scale_G1C, shift_G1C, eps=self.norm_eps, dtype=dtype)

    def keys_values(self, x_GKC: Tensor, given: BlockCondition) -> tuple[Tensor, Tensor]:
        """Keys and values that tokens with this block input would have, each (G, H, K, D)."""
        normed_GKC = self._normed(x_GKC, given.scale1, given.shift1)
        return self.sa.keys_values(normed_GKC, given.attention)

    def forward(self, x_GKC: Tensor, given: BlockCondition, attend: Attend) -> Change:
        """What the block adds to the residual stream, at least float32."""
        eps, dtype = self.norm_eps, self.ffn.fc1.weight.dtype
        normed_GKC = self._normed(x_GKC, given.scale1, given.shift1)
        attended_GKC, normed_GKC = self.pointwise.added_and_modulated(
            x_GKC,
            self.sa(normed_GKC, given.attention, attend),
            given.gamma1,
            None,
            self.ca_norm.weight,
            self.ca_norm.bias,
            eps=eps,
            dtype=dtype,
        )
        attended_GKC, normed_GKC = self.pointwise.added_and_modulated(
            x_GKC,
            self.ca(normed_GKC, given.text),
            None,
            attended_GKC,
            given.scale2,
            given.shift2,
            eps=eps,
            dtype=dtype,
        )
        return self.pointwise.gated_sum(attended_GKC, self.ffn(normed_GKC), given.gamma2)


class Chunk(nn.Module):
    """Blocks under the names that the published code shards them by."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        num_blocks = config.num_blocks // config.num_chunks
        self.module = nn.ModuleList(Block(config) for _ in range(num_blocks))


class TextPool(nn.Module):
    """One learned query over a text's states: the vector that begins an image."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.pool_heads
        self.mat_q = nn.Parameter(torch.zeros(1, self.num_heads, width // self.num_heads))
        self.mat_kv = nn.Linear(config.text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, text_GNE: Tensor, is_text_G11N: Tensor | None) -> Tensor:
        """(G, N, E) to (G, C)."""
        keys, values = _text_keys_values(self.mat_kv, self.v_bias, text_GNE, self.num_heads)
        query_GH1D = self.mat_q[:, :, None].expand(len(text_GNE), -1, -1, -1)
        pooled_G1C = _attend_to_text(query_GH1D, TextKeys(keys, values, is_text_G11N))
        pooled: Tensor = self.proj(pooled_G1C)[:, 0]
        return pooled


class _Pooling(nn.Module):
    """A name of the published code around the pool."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ca = TextPool(config)


class _TextNorm(nn.Module):
    """Root mean square norm with a learned weight."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, states_GNE: Tensor) -> Tensor:
        """(G, N, E) to the same shape, the norm taken in at least float32."""
        return F.rms_norm(states_GNE, states_GNE.shape[-1:], eps=self.eps) * self.weight


class InfinityTransformer(nn.Module):
    """Text condition, embeddings, blocks and head; how the blocks are run is the caller's."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cfg_uncond = nn.Parameter(torch.zeros(config.max_text_tokens, config.text_width))
        self.text_norm = _TextNorm(config.text_width, config.norm_eps)
        self.text_proj_for_sos = _Pooling(config)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_width, width),
            nn.GELU(approximate="tanh"),
            nn.Linear(width, width),
        )
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.lvl_embed = nn.Embedding(config.num_levels, width)
        self.word_embed = nn.Linear(config.bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.block_chunks = nn.ModuleList(Chunk(config) for _ in range(config.num_chunks))
        self.head_nm = HeadNorm(width, config.norm_eps)
        self.head = nn.Linear(width, 2 * config.bits)

    @cached_property
    def ordered_blocks(self) -> tuple[Block, ...]:
        """The blocks of all chunks."""
        blocks = (module for module in self.block_chunks.modules() if isinstance(module, Block))
        return tuple(blocks)

    def condition(
        self, given: Sequence[Tensor | npt.NDArray[np.float32]] | TextCondition, streams: int
    ) -> TextCondition:
        """What the texts change, from the states of a text encoder, each (1 to 512, E).

        With two streams unconditional rows follow, each of the length of its own text. A text that
        several images share is worked on once. A condition is given back as it is. `InputError` for
        states of another shape.
        """
        if isinstance(given, TextCondition):
            return given
        distinct = list({id(states): states for states in given}.values())
        place = {id(states): i for i, states in enumerate(distinct)}
        texts = [self._checked(states) for states in distinct]
        if streams == 2:
            texts += [self.cfg_uncond[: len(states)] for states in distinct]
        rows = [place[id(states)] for states in given]
        rows += [len(distinct) + row for row in rows] if streams == 2 else []
        device = self.pos_start.device
        rows_G = torch.tensor(rows, device=device)
        lengths = [len(states) for states in texts]
        dtype = torch.promote_types(self.pos_start.dtype, torch.float32)
        states_GNE = pad_sequence([states.to(dtype) for states in texts], batch_first=True)
        is_text_G11N = None
        if min(lengths) < max(lengths):
            ends_G1 = torch.tensor(lengths, device=device)[:, None]
            is_text_GN = torch.arange(max(lengths), device=device) < ends_G1
            is_text_G11N = is_text_GN[:, None, None]
        return self._condition(states_GNE, is_text_G11N, rows_G)

    def _checked(self, given_NE: Tensor | npt.NDArray[np.float32]) -> Tensor:
        config, states_NE = self.config, torch.as_tensor(given_NE)
        shape = tuple(states_NE.shape)
        if (
            len(shape) != 2
            or shape[1] != config.text_width
            or not (1 <= shape[0] <= config.max_text_tokens)
        ):
            raise InputError(
                f"the states of a text have the shape {shape}, wanted (1 to "
                f"{config.max_text_tokens}, {config.text_width}) for {config.name}: give those of "
                "its text encoder"
            )
        return states_NE.to(self.pos_start.device)

    def _condition(
        self, states_GNE: Tensor, is_text_G11N: Tensor | None, rows_G: Tensor
    ) -> TextCondition:
        dtype = self.pos_start.dtype
        text_GNE = self.text_norm(states_GNE).to(dtype)
        pooled_GC = self.text_proj_for_sos.ca(text_GNE, is_text_G11N)
        text_GNC = self.text_proj_for_ca(text_GNE)

        def vectors(linear: nn.Module, count: int) -> Tensor:
            out_GC = at_least_float32(linear(pooled_GC))
            return out_GC.view(len(out_GC), 1, count, -1)

        def of_rows(given: BlockCondition) -> BlockCondition:
            chosen = {
                name: getattr(given, name).index_select(0, rows_G)
                for name in ("gamma1", "gamma2", "scale1", "scale2", "shift1", "shift2")
            }
            is_text = given.text.is_text_G11N
            text = TextKeys(
                given.text.keys_GHND.index_select(0, rows_G),
                given.text.values_GHND.index_select(0, rows_G),
                None if is_text is None else is_text.index_select(0, rows_G),
            )
            return BlockCondition(**chosen, text=text, attention=given.attention)

        shared_G16C = vectors(self.shared_ada_lin, 6)
        blocks = tuple(
            of_rows(block.condition(shared_G16C, text_GNC, is_text_G11N))
            for block in self.ordered_blocks
        )
        scale, shift = vectors(self.head_nm.ada_lin, 2).index_select(0, rows_G).unbind(2)
        start_G1C = pooled_GC.index_select(0, rows_G).unsqueeze(1)
        return TextCondition(start_G1C, blocks, (scale + 1, shift))

    def tensors_of(
        self, given: Sequence[Tensor | npt.NDArray[np.float32]], streams: int
    ) -> TextCondition:
        """The condition of the texts, which are padded to one of a few lengths."""
        condition = self.condition(given, streams)
        text = condition.blocks[0].text
        rows, _, length, _ = text.keys_GHND.shape
        more = -length % _PADDED_TO
        is_text_G11N = text.is_text_G11N
        if is_text_G11N is None:
            is_text_G11N = text.keys_GHND.new_ones(rows, 1, 1, length, dtype=torch.bool)
        is_text_G11N = F.pad(is_text_G11N, (0, more))

        def of_block(given: BlockCondition) -> BlockCondition:
            keys, values = (
                F.pad(kept_GHND, (0, 0, 0, more))
                for kept_GHND in (given.text.keys_GHND, given.text.values_GHND)
            )
            return replace(given, text=TextKeys(keys, values, is_text_G11N))

        return replace(condition, blocks=tuple(map(of_block, condition.blocks)))

    def first_rows(self, condition: TextCondition, count: int) -> TextCondition:
        """The condition of the first rows alone, as views."""
        scale_G1C, shift_G1C = condition.head
        return replace(
            first_rows(condition, count),
            blocks=tuple(
                replace(first_rows(block, count), text=first_rows(block.text, count))
                for block in condition.blocks
            ),
            head=(scale_G1C[:count], shift_G1C[:count]),
        )

    def rotations(self, scale: int) -> Tensor:
        """Cosines, then sines, of the D / 2 angles of every token of a scale (T, D), float64.

        Half of a head turns by the row, half by the column, both spread over the finest grid.
        """
        grid, full = self.config.grids[scale], self.config.rotary_grid
        rows, columns = (
            torch.tensor([round(Fraction(i * whole, length)) for i in range(length)])
            for length, whole in zip(grid, full, strict=True)
        )
        num_angles = self.config.head_dim // 4
        frequencies_A = _ROTARY_BASE ** -(torch.arange(num_angles).double() / num_angles)
        angles_hwA = torch.cat(
            [
                (rows[:, None, None] * frequencies_A).expand(-1, len(columns), -1),
                (columns[None, :, None] * frequencies_A).expand(len(rows), -1, -1),
            ],
            dim=2,
        )
        angles_TA = angles_hwA.flatten(0, 1)
        return torch.cat([angles_TA.cos(), angles_TA.sin()], dim=1)

    def embed(self, scale: int, codes_GTZ: Tensor | None, condition: TextCondition) -> Tensor:
        """Input of a scale (G, T, C), at least float32: where the residual stream begins.

        `codes_GTZ` is the feature map at the grid of the scale, None at scale 0.
        """
        level_C = at_least_float32(self.lvl_embed.weight[scale])
        if codes_GTZ is None:
            return condition.start_G1C + self.pos_start + level_C
        return at_least_float32(self.word_embed(codes_GTZ)) + level_C

    def run_block(
        self, block: int, x_GKC: Tensor, condition: TextCondition, attend: Attend
    ) -> Change:
        """What one block adds to the residual stream of some tokens."""
        change: Change = self.ordered_blocks[block](x_GKC, condition.blocks[block], attend)
        return change

    def keys_values(
        self, block: int, x_GKC: Tensor, condition: TextCondition
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens that the block does not compute, each (G, H, K, D)."""
        return self.ordered_blocks[block].keys_values(x_GKC, condition.blocks[block])

    def logits(self, x_GTC: Tensor, condition: TextCondition) -> Tensor:
        """Two logits of every bit (G, T, V), side by side, at least float32."""
        return unrounded(self.head, self.head_nm(x_GTC, *condition.head))
