"""Infinity sampling with per-token depth, written out plainly: slow, dense, one sample at a time.

Nothing here comes from the modules under test; a model is a mapping of tensors by their published
names. Every row attends to its own text, of its own length, without padding. Depth, masks and
proxies are those of `reference_depthvar.DenseDepth`.

Shape legend: G streams of one sample (conditional, then unconditional), T tokens of a scale, N
tokens of a text, C width, E channels of a text's states, H heads, D head channels, Z bits.

Source: arXiv 2412.04431 and its public checkpoints; arXiv 2604.17286 (depth).
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.infinity_config import InfinityConfig
from depthvar.policy import DepthPolicy
from depthvar.settings import SamplingSettings
from tests.reference_depthvar import (
    DenseDepth,
    Grid,
    State,
    covering_token,
    gelu_tanh,
    masked_attention,
    normed,
    silu,
)


@cache
def turns_of(config: InfinityConfig, grid: Grid) -> Tensor:
    """e^(i angle) of every token of a grid and pair of a head's channels, complex128."""
    angles = angles_of(config, grid)
    return torch.tensor(
        [[cmath.exp(1j * a) for a in of_token] for of_token in angles], dtype=torch.complex128
    )


def angles_of(config: InfinityConfig, grid: Grid) -> list[list[float]]:
    """The angle by which every pair of a head's channels turns, for every token of a grid."""
    along = [
        [
            int((Decimal(i) * whole / length).quantize(Decimal(1), ROUND_HALF_EVEN))
            for i in range(length)
        ]
        for length, whole in zip(grid, config.rotary_grid, strict=True)
    ]
    half = config.width // config.num_heads // 4
    frequencies = [10000 ** (-2 * m / (2 * half)) for m in range(half)]
    return [
        [y * f for f in frequencies] + [x * f for f in frequencies]
        for y in along[0]
        for x in along[1]
    ]


def turn(x_GHTD: Tensor, turns: Tensor) -> Tensor:
    """Pair (2m, 2m + 1) of a token's channels as a complex number, times its turn."""
    pairs = torch.view_as_complex(x_GHTD.reshape(*x_GHTD.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turns.to(pairs.dtype)).flatten(-2)


def attention(q_HTD: Tensor, k_HND: Tensor, v_HND: Tensor) -> Tensor:
    """Softmax attention of one row, softmax scale 1 / sqrt(D)."""
    scores = torch.einsum("htd,hnd->htn", q_HTD, k_HND) / math.sqrt(q_HTD.shape[-1])
    return torch.einsum("htn,hnd->htd", torch.softmax(scores, -1), v_HND)


def split(x_TC: Tensor, heads: int) -> Tensor:
    """(T, C) to (H, T, D)."""
    return x_TC.reshape(len(x_TC), heads, -1).transpose(0, 1)


@dataclass
class InfinityBlocks:
    """The transformer for one sample; `texts` are its rows' states, each (N, E)."""

    state: State
    config: InfinityConfig
    texts: list[Tensor]
    scale: int = 0

    def __post_init__(self) -> None:
        self.normed_texts = []
        for states_NE in self.texts:
            size = ((states_NE**2).mean(-1, keepdim=True) + 1e-6).sqrt()
            self.normed_texts.append(states_NE / size * self.state["text_norm.weight"])
        self.pooled_GC = torch.stack([self.pool(text) for text in self.normed_texts])
        self.projected_texts = [
            self.linear("text_proj_for_ca.2", gelu_tanh(self.linear("text_proj_for_ca.0", text_NE)))
            for text_NE in self.normed_texts
        ]
        self.modulations = [self.modulation(block) for block in range(self.config.num_blocks)]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x W^T + b."""
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def text_keys_values(self, name: str, text_NE: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one row's text, each (H, N, D)."""
        keys, values = (text_NE @ self.state[f"{name}.mat_kv.weight"].T).chunk(2, dim=1)
        return split(keys, heads), split(values + self.state[f"{name}.v_bias"], heads)

    def pool(self, text_NE: Tensor) -> Tensor:
        """One learned query over a text (C)."""
        name, heads = "text_proj_for_sos.ca", self.config.pool_heads
        keys, values = self.text_keys_values(name, text_NE, heads)
        query_H1D = self.state[f"{name}.mat_q"][0][:, None]
        pooled = attention(query_H1D, keys, values).transpose(0, 1).reshape(1, -1)
        return self.linear(f"{name}.proj", pooled)[0]

    def name(self, block: int) -> str:
        """The published prefix of a block's tensors."""
        each = self.config.num_blocks // self.config.num_chunks
        return f"block_chunks.{block // each}.module.{block % each}"

    def modulation(self, block: int) -> list[Tensor]:
        """gamma1, gamma2, scale1, scale2, shift1, shift2, each (G, 1, C)."""
        six = self.linear("shared_ada_lin.1", silu(self.pooled_GC)).reshape(
            -1, 6, self.config.width
        )
        six = six + self.state[f"{self.name(block)}.ada_gss"][0]
        return [six[:, i : i + 1] for i in range(6)]

    def projections(self, block: int, x_GTC: Tensor) -> list[Tensor]:
        """q, k, v (G, H, T, D): normalised, scaled, then turned."""
        name = f"{self.name(block)}.sa"
        _, _, scale1, _, shift1, _ = self.modulations[block]
        h = normed(x_GTC, 1e-6) * (1 + scale1) + shift1
        weights = self.state[f"{name}.mat_qkv.weight"].reshape(3, self.config.width, -1)
        biases = (self.state[f"{name}.q_bias"], 0.0, self.state[f"{name}.v_bias"])
        q, k, v = (
            torch.stack([split(row @ w.T + b, self.config.num_heads) for row in h])
            for w, b in zip(weights, biases, strict=True)
        )
        q = q / (q**2).sum(-1, keepdim=True).sqrt()
        k = k / (k**2).sum(-1, keepdim=True).sqrt()
        q = q * torch.exp(torch.clamp(self.state[f"{name}.scale_mul_1H11"], max=math.log(100)))
        turns = turns_of(self.config, self.config.grids[self.scale])
        return [turn(q, turns), turn(k, turns), v]

    def output(
        self,
        block: int,
        x_GTC: Tensor,
        q_GHTD: Tensor,
        keys_GHMD: Tensor,
        values_GHMD: Tensor,
        kept_GM: Tensor,
    ) -> Tensor:
        """Self-attention, cross-attention, feed-forward."""
        name, width = self.name(block), self.config.width
        gamma1, gamma2, _, scale2, _, shift2 = self.modulations[block]
        attended = masked_attention(q_GHTD, keys_GHMD, values_GHMD, kept_GM)
        attended = attended.permute(0, 2, 1, 3).reshape(x_GTC.shape)
        x_GTC = x_GTC + self.linear(f"{name}.sa.proj", attended) * gamma1
        weight, bias = (self.state[f"{name}.ca_norm.{part}"] for part in ("weight", "bias"))
        rows = []
        for row_TC, text_NC in zip(
            normed(x_GTC, 1e-6) * weight + bias, self.projected_texts, strict=True
        ):
            queries = split(self.linear(f"{name}.ca.mat_q", row_TC), self.config.num_heads)
            keys, values = self.text_keys_values(f"{name}.ca", text_NC, self.config.num_heads)
            looked = attention(queries, keys, values).transpose(0, 1).reshape(-1, width)
            rows.append(self.linear(f"{name}.ca.proj", looked))
        x_GTC = x_GTC + torch.stack(rows)
        h = normed(x_GTC, 1e-6) * (1 + scale2) + shift2
        hidden = gelu_tanh(self.linear(f"{name}.ffn.fc1", h))
        return x_GTC + self.linear(f"{name}.ffn.fc2", hidden) * gamma2

    def embed(self, codes_TZ: Tensor | None) -> Tensor:
        """Input of the scale (G, T, C)."""
        level_C = self.state["lvl_embed.weight"][self.scale]
        if codes_TZ is None:
            return self.pooled_GC[:, None] + self.state["pos_start"] + level_C
        embedded_TC = self.linear("word_embed", codes_TZ) + level_C
        return torch.stack([embedded_TC] * len(self.texts))

    def logits(self, x_GTC: Tensor) -> Tensor:
        """AdaLN, then the head: (G, T, 2 Z)."""
        two = self.linear("head_nm.ada_lin.1", silu(self.pooled_GC))
        scale, shift = two.reshape(-1, 2, self.config.width).unbind(1)
        return self.linear("head", normed(x_GTC, 1e-6) * (1 + scale[:, None]) + shift[:, None])


def draw_bit(zero: float, one: float, uniform: float, top_p: float) -> tuple[int, float, float]:
    """The bit, its log-probability and the probability of a one, from two logits."""
    p_one = 1 / (1 + math.exp(zero - one))
    if 1 - p_one <= 1 - top_p + 1e-15:
        p_one = 1.0
    elif p_one <= 1 - top_p + 1e-15:
        p_one = 0.0
    bit = int(uniform >= 1 - p_one)
    return bit, math.log(p_one if bit else 1 - p_one), p_one


def along(length: int, wanted: int, dtype: torch.dtype) -> Tensor:
    """Linear interpolation of `length` values at `wanted` places, as a matrix."""
    matrix = torch.zeros(wanted, length, dtype=dtype)
    for i in range(wanted):
        place = max(0.0, (i + 0.5) * length / wanted - 0.5)
        low = min(int(place), length - 1)
        high, share = min(low + 1, length - 1), place - int(place)
        matrix[i, low] += 1 - share
        matrix[i, high] += share
    return matrix


def resize(map_ZHW: Tensor, grid: Grid) -> Tensor:
    """Bilinear, without anti-aliasing, pixel centres aligned."""
    rows, columns = (
        along(length, wanted, map_ZHW.dtype)
        for length, wanted in zip(map_ZHW.shape[1:], grid, strict=True)
    )
    return torch.einsum("ah,zhw,bw->zab", rows, map_ZHW, columns)


def to_map(codes_TZ: Tensor, grid: Grid, patch: int) -> Tensor:
    """Tokens to a map: code d is channel d // p^2, row d % p^2 // p, column d % p of its cells."""
    channels = codes_TZ.shape[1] // patch**2
    result = codes_TZ.new_zeros(channels, grid[0] * patch, grid[1] * patch)
    for t, code in enumerate(codes_TZ):
        row, column = divmod(t, grid[1])
        for d, value in enumerate(code):
            channel, within = divmod(d, patch**2)
            result[channel, row * patch + within // patch, column * patch + within % patch] = value
    return result


def to_tokens(map_ZHW: Tensor, grid: Grid, patch: int) -> Tensor:
    """The inverse of `to_map`."""
    tokens = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            cells = map_ZHW[
                :,
                row * patch : (row + 1) * patch,
                column * patch : (column + 1) * patch,
            ]
            tokens.append(cells.reshape(-1))
    return torch.stack(tokens)


@dataclass
class SampledScale:
    """One scale of one sample."""

    hidden_GTC: Tensor
    logits_TV: Tensor
    bits_TZ: list[list[int]]
    log_prob_T: list[float]
    change_T: Tensor


def sample(
    state: State,
    config: InfinityConfig,
    policy: DepthPolicy,
    settings: SamplingSettings,
    states_NE: Tensor,
    uniforms_U: list[float],
    random_N: list[float],
    fit: tuple[Tensor, Tensor] | None = None,
) -> tuple[list[SampledScale], Tensor]:
    """One sample: its scales and the final feature map (Z, H, W).

    `fit` is (slope, offset), each (S, L, C).
    """
    texts = [states_NE]
    if settings.cfg != 1:
        texts.append(state["cfg_uncond"][: len(states_NE)])
    blocks = InfinityBlocks(state, config, texts)
    grids = config.grids[: len(config.grids) - policy.skip_last_scales]
    dense = DenseDepth(blocks, grids, config.num_blocks, policy, *(fit or (None, None)))
    patch = config.patch
    full = config.grids[-1][0] * patch, config.grids[-1][1] * patch
    magnitude = 1 / math.sqrt(config.bits // patch**2)
    f_hat_ZHW = states_NE.new_zeros(config.bits // patch**2, *full)
    scales: list[SampledScale] = []
    begin, ones_TZ = 0, [[0.0]]
    for i, grid in enumerate(grids):
        count = grid[0] * grid[1]
        blocks.scale = i
        codes_TZ = None
        if i:
            codes_TZ = to_tokens(resize(f_hat_ZHW, (grid[0] * patch, grid[1] * patch)), grid, patch)
        given_T = random_N[begin : begin + count]
        if i and policy.ranking in ("entropy", "log-probability", "spread"):
            signals = [
                {
                    "entropy": -math.fsum(
                        q * math.log(q) for p in ones for q in (p, 1 - p) if q > 0
                    ),
                    "log-probability": -log_prob,
                    "spread": math.fsum(4 * p * (1 - p) * magnitude**2 for p in ones),
                }[policy.ranking]
                for ones, log_prob in zip(ones_TZ, scales[-1].log_prob_T, strict=True)
            ]
            signal = torch.tensor(signals, dtype=torch.float32).tolist()
            given_T = [signal[cover] for cover in covering_token(grid, grids[i - 1])]
        is_guided = policy.guided_scales is None or i < policy.guided_scales
        dense.streams_seen = None if is_guided else 1
        result = dense.run_scale(blocks.embed(codes_TZ), given_T)
        logits_GTV = blocks.logits(result.hidden_GTC)
        logits_TV = logits_GTV[0]
        if settings.cfg != 1:
            if is_guided:
                difference_TV = logits_GTV[0] - logits_GTV[1]
            else:
                difference_TV = difference_TV[covering_token(grid, grids[i - 1])]
                difference_TV = difference_TV * policy.kept_guidance
            logits_TV = logits_GTV[0] + (settings.cfg - 1) * difference_TV
        logits_TV = logits_TV / settings.temperature
        numbers = uniforms_U[begin * config.bits : (begin + count) * config.bits]
        drawn = [
            [
                draw_bit(*row[2 * d : 2 * d + 2], numbers[t * config.bits + d], settings.top_p)
                for d in range(config.bits)
            ]
            for t, row in enumerate(logits_TV.tolist())
        ]
        ones_TZ = [[p for _, _, p in of_token] for of_token in drawn]
        bits_TZ = [[bit for bit, _, _ in of_token] for of_token in drawn]
        codes = torch.tensor(bits_TZ, dtype=states_NE.dtype) * 2 - 1
        expected = torch.tensor(ones_TZ, dtype=states_NE.dtype) * 2 - 1
        weight_T1 = result.code_weights_T[:, None]
        if policy.blending == "score":
            codes = weight_T1 * codes
        if policy.blending in ("mean", "pruned"):
            codes = weight_T1 * codes + (1 - weight_T1) * expected
        f_hat_ZHW = f_hat_ZHW + resize(to_map(codes * magnitude, grid, patch), full)
        hidden_GTC, change_T = result.seen(dense.streams_seen)
        scales.append(
            SampledScale(
                hidden_GTC,
                logits_TV,
                bits_TZ,
                [math.fsum(log for _, log, _ in of_token) for of_token in drawn],
                change_T,
            )
        )
        begin += count
    return scales, f_hat_ZHW


def decode(state: State, config: InfinityConfig, map_BZHW: Tensor) -> Tensor:
    """Feature map to images in [-1, 1], by the published layers' names within `decoder`."""
    shape = config.decoder

    def conv(name: str, x: Tensor, padding: int = 1) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return silu(F.group_norm(x, shape.norm_groups, weight, bias, eps=1e-6))

    def block(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", norm(f"{name}.norm1", x))
        h = conv(f"{name}.conv2", norm(f"{name}.norm2", h))
        has_shortcut = f"{name}.nin_shortcut.weight" in state
        return h + (conv(f"{name}.nin_shortcut", x, padding=0) if has_shortcut else x)

    x = conv("decoder.conv_in", map_BZHW)
    x = block("decoder.mid.block_2", block("decoder.mid.block_1", x))
    for level in reversed(range(len(shape.multipliers))):
        for i in range(shape.num_res_blocks + 1):
            x = block(f"decoder.up.{level}.block.{i}", x)
        if level:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = conv(f"decoder.up.{level}.upsample.conv", x)
    return conv("decoder.conv_out", norm("decoder.norm_out", x)).clamp(-1, 1)
