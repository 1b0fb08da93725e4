"""VAR sampling and per-token depth, written out plainly: slow, dense, one sample at a time.

Nothing here comes from the modules under test, and the tokenizer's layers from the plain published
loop; a model is a mapping of tensors by their published names. Every token is computed at every
block in raster order and a boolean mask then decides whether it takes what was computed. Where the
published method leaves room, this follows the documented meaning of the policy's fields:

- "up-sampled" means: taken from the token of the coarser scale that covers the finer token's
  centre, the later one when the centre lies on a border;
- the rotation moves percentiles by a whole number of tokens, the nearest, and by nothing at the
  first adaptive scale;
- compensation multiplies what a block adds to a token, both of its branches together;
- after the guided scales the unconditional stream is computed like all else, and nothing looks at
  it: neither the ranking, nor what is recorded, nor the logits.

Shape legend: G streams of one sample (conditional, then unconditional), T tokens of a scale, M
tokens so far, C width, H heads, D head channels, V codes, Z code channels, N tokens of an image.

Sources: arXiv 2404.02905 (VAR), arXiv 2604.17286 (DepthVAR).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar import published
from depthvar.config import ModelConfig, TokenizerConfig
from depthvar.policy import DepthPolicy
from depthvar.settings import SamplingSettings

State = dict[str, Tensor]


# Depth of every token.


Grid = tuple[int, int]


def covering_token(grid: Grid, coarse: Grid) -> list[int]:
    """For every token of a map, the token of the coarse map that covers its centre."""
    rows, columns = (
        [math.floor((i + Fraction(1, 2)) * Fraction(short, length)) for i in range(length)]
        for length, short in zip(grid, coarse, strict=True)
    )
    return [row * coarse[1] + column for row in rows for column in columns]


def squares(sides: Sequence[int]) -> tuple[Grid, ...]:
    """The grids of square maps."""
    return tuple((side, side) for side in sides)


def ranks(values_T: list[float]) -> list[int]:
    """How many tokens rank below each token; of equal ones the earlier is lower."""
    return [
        sum((other, j) < (value, i) for j, other in enumerate(values_T))
        for i, value in enumerate(values_T)
    ]


def power_with_mean(percentiles: list[float], mean: float) -> float:
    """The p for which percentile ** p has the given mean over the tokens."""

    def excess(p: float) -> float:
        return math.fsum(q**p for q in percentiles) / len(percentiles) - mean

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


def scores_and_depths_of_scale(
    policy: DepthPolicy,
    grids: tuple[Grid, ...],
    scale: int,
    num_blocks: int,
    ranking_T: list[float],
) -> tuple[list[float], list[int]]:
    """Depth score S and depth D of every token: budget, rank, rotation, G, least depth, floor."""
    counts = [rows * columns for rows, columns in grids]
    count, reference = counts[scale], policy.reference_scale
    if reference is None or scale <= reference:
        return [1.0] * count, [num_blocks] * count
    spends = [min(counts[reference], later) for later in counts[reference + 1 :]]
    mean = spends[scale - reference - 1] / count
    if policy.mean_depths:
        later = policy.mean_depths + (1.0,) * len(counts)
        mean = later[scale - reference - 1]
    if policy.allocation == "equal":
        mean = sum(spends) / sum(counts[reference + 1 :])
    if policy.allocation == "coarse-first":
        left, tokens = sum(spends), sum(counts[reference + 1 :])
        share = policy.kept_depth if policy.kept_depth * tokens > left else left / tokens
        for earlier in counts[reference + 1 : scale]:
            left -= min(left, share * earlier)
        mean = min(left / count, share)
    if policy.allocation == "least" or mean == 0.0:
        return [policy.min_depth / num_blocks] * count, [policy.min_depth] * count
    if mean == 1.0:
        return [1.0] * count, [num_blocks] * count
    turn = policy.rotation * (scale - reference - 1)
    offset = round((turn - math.floor(turn)) * count)
    all_percentiles = [(rank + 0.5) / count for rank in range(count)]
    reach = policy.steepness * min(mean, 1 - mean)
    power = power_with_mean(all_percentiles, mean) if policy.schedule == "power" else 0.0
    kept = policy.kept_depth if policy.kept_depth > mean else mean
    num_kept = round(mean / kept * count)
    shallow = 1.0
    while shallow > mean:
        shallow /= 2
    scores, depths = [], []
    for rank in ranks(ranking_T):
        rotated = (rank + offset) % count
        percentile = all_percentiles[rotated]
        score = {
            "constant": mean,
            "linear": mean + reach * (2 * percentile - 1),
            "cosine": mean - reach * math.cos(math.pi * percentile),
            "power": percentile**power,
            "octaves": shallow
            * (2 if rotated >= count - round((mean - shallow) / shallow * count) else 1),
            "step": kept if rotated >= count - num_kept else 0.0,
        }[policy.schedule]
        score = max(score, policy.min_depth / num_blocks)
        scores.append(score)
        extra = percentile if policy.dither else 0.0
        depths.append(min(num_blocks, math.floor(score * num_blocks + extra + 1e-9)))
    return scores, depths


def order_of_blocks(policy: DepthPolicy, num_blocks: int) -> list[int]:
    """The sequence whose first d blocks a token of depth d runs."""
    if policy.block_order == "first":
        return list(range(num_blocks))
    if policy.block_order in ("ends", "last-ends"):
        left, sequence = list(range(num_blocks)), []
        takes_first = policy.block_order == "ends"
        while left:
            sequence.append(left.pop(0 if takes_first else -1))
            takes_first = not takes_first
        return sequence
    bits = 0
    while 2**bits < num_blocks:
        bits += 1

    def mirrored(block: int) -> int:
        return sum(((block >> i) & 1) << (bits - 1 - i) for i in range(bits))

    return sorted(range(num_blocks), key=mirrored)


# One scale through all blocks.


class DenseBlocks(Protocol):
    """A transformer of one sample, its class or text included."""

    def projections(self, block: int, x_GTC: Tensor) -> list[Tensor]:
        """Query, key and value (G, H, T, D) of every token."""
        ...

    def output(
        self,
        block: int,
        x_GTC: Tensor,
        q_GHTD: Tensor,
        keys_GHMD: Tensor,
        values_GHMD: Tensor,
        kept_GM: Tensor,
    ) -> Tensor:
        """The stream of every token after a block that may look where `kept_GM` is True."""
        ...


@dataclass
class ScaleResult:
    """A scale in raster order: output, change at every block, depths and masks of every stream."""

    grid: Grid
    hidden_GTC: Tensor
    changes: list[Tensor]
    change_GT: Tensor
    code_weights_T: Tensor
    depths: list[list[int]]
    active: list[list[list[bool]]]

    def seen(self, streams: int | None) -> tuple[Tensor, Tensor]:
        """Output of the first streams (all: None), and their change, summed: (G, T, C), (T,)."""
        return self.hidden_GTC[:streams], self.change_GT[:streams].sum(0)


@dataclass
class DenseDepth:
    """Runs the scales of one sample under a policy, remembering keys and values of every block."""

    blocks: DenseBlocks
    grids: tuple[Grid, ...]
    num_blocks: int
    policy: DepthPolicy
    slope_SLC: Tensor | None = None
    offset_SLC: Tensor | None = None
    streams_seen: int | None = None  # all
    memory: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)
    scales: list[ScaleResult] = field(default_factory=list)

    def run_scale(self, x_GTC: Tensor, given_T: list[float]) -> ScaleResult:
        """The next scale, from its input in raster order; `given_T` ranks where no stream does."""
        scale, policy = len(self.scales), self.policy
        previous = self.scales[-1] if self.scales else None
        grid = self.grids[scale]
        cover = covering_token(grid, previous.grid) if previous else []
        scores, depths = zip(
            *(
                scores_and_depths_of_scale(policy, self.grids, scale, self.num_blocks, ranking_T)
                for ranking_T in self.rankings(x_GTC, given_T, cover)
            ),
            strict=True,
        )
        adaptive = min(map(min, depths)) < self.num_blocks
        place = {b: i for i, b in enumerate(order_of_blocks(policy, self.num_blocks))}
        factor_GT1 = torch.ones(len(depths), math.prod(grid), 1, dtype=x_GTC.dtype)
        if policy.compensation:
            for g, depths_T in enumerate(depths):
                for t, depth in enumerate(depths_T):
                    factor_GT1[g, t] = min(4 / 3, math.sqrt(self.num_blocks / max(depth, 1)))
        changes, masks = [], []
        for block in range(self.num_blocks):
            active_GT = torch.tensor([[place[block] < d for d in depths_T] for depths_T in depths])
            makes_keys_GT = active_GT | (policy.skipped_keys_values == "proxy")
            q, k, v = self.blocks.projections(block, x_GTC)
            seen = self.remember(block, k, v, makes_keys_GT)
            computed = self.blocks.output(block, x_GTC, q, *seen) - x_GTC
            change = computed * factor_GT1
            proxy = torch.zeros_like(x_GTC)
            if adaptive and policy.proxy in ("raw", "calibrated"):
                proxy = previous.changes[block][:, cover]
                if policy.proxy == "calibrated":
                    proxy = proxy * self.slope_SLC[scale, block] + self.offset_SLC[scale, block]
            change = torch.where(active_GT[:, :, None], change, proxy)
            x_GTC = x_GTC + change
            changes.append(change)
            masks.append(active_GT.tolist())
        if adaptive and policy.proxy == "output":
            untouched_GT = torch.tensor(depths) == 0
            restored = previous.hidden_GTC[:, cover]
            x_GTC = torch.where(untouched_GT[:, :, None], restored, x_GTC)
        change_GT = sum(change.abs().mean(2) for change in changes)
        weights = [
            [float(depth > 0) for depth in depths_T] if policy.blending == "pruned" else scores_T
            for scores_T, depths_T in zip(scores, depths, strict=True)
        ]
        weights_T = torch.tensor(weights[: self.streams_seen], dtype=x_GTC.dtype).mean(0)
        if policy.blending == "none":
            weights_T = torch.ones_like(weights_T)
        result = ScaleResult(grid, x_GTC, changes, change_GT, weights_T, list(depths), masks)
        self.scales.append(result)
        return result

    def rankings(self, x_GTC: Tensor, given_T: list[float], cover: list[int]) -> list[list[float]]:
        """What the tokens of every stream are ranked by; they share it unless ranked apart."""
        streams = x_GTC.shape[0]
        if self.policy.ranking == "distance":
            mean_G1C = x_GTC.sum(1, keepdim=True) / x_GTC.shape[1]
            own_GT = ((x_GTC - mean_G1C) ** 2).sum(2)
        elif self.policy.ranking == "change":
            own_GT = self.scales[-1].change_GT[:, cover] if self.scales else x_GTC[:, :, 0] * 0
        else:
            return [given_T] * streams
        if not self.policy.separate_ranking:
            own_GT = own_GT[: self.streams_seen].sum(0, keepdim=True).expand(streams, -1)
        return own_GT.tolist()

    def remember(
        self, block: int, k_GHTD: Tensor, v_GHTD: Tensor, makes_keys_GT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of all tokens so far, and which of them were ever made."""
        entries = self.memory.setdefault(block, [])
        entries.append((k_GHTD, v_GHTD, makes_keys_GT))
        keys, values, kept = zip(*entries, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2), torch.cat(kept, 1)


def masked_attention(q_GHTD: Tensor, keys: Tensor, values: Tensor, kept_GM: Tensor) -> Tensor:
    """Softmax attention, softmax scale 1, over the tokens that have keys."""
    scores = torch.einsum("ghtd,ghmd->ghtm", q_GHTD, keys)
    scores = scores.masked_fill(~kept_GM[:, None, None], -math.inf)
    return torch.einsum("ghtm,ghmd->ghtd", torch.softmax(scores, -1), values)


# The published transformer.


def normed(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@dataclass
class VarBlocks:
    """The blocks of a VAR transformer for one sample; `class_GC` are its class embeddings."""

    state: State
    config: ModelConfig
    class_GC: Tensor

    def __post_init__(self) -> None:
        num_blocks = self.config.transformer.num_blocks
        self.modulations = [self.modulation(block) for block in range(num_blocks)]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x W^T + b."""
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def modulation(self, block: int) -> list[Tensor]:
        """gamma1, gamma2, scale1, scale2, shift1, shift2, each (G, 1, C)."""
        width = self.config.transformer.width
        if self.config.transformer.shared_adaln:
            six = self.linear("shared_ada_lin.1", silu(self.class_GC)).reshape(-1, 6, width)
            six = six + self.state[f"blocks.{block}.ada_gss"].reshape(1, 6, width)
        else:
            six = self.linear(f"blocks.{block}.ada_lin.1", silu(self.class_GC))
            six = six.reshape(-1, 6, width)
        return [six[:, i : i + 1] for i in range(6)]

    def projections(self, block: int, x_GTC: Tensor) -> list[Tensor]:
        """q, k, v (G, H, T, D) of every token; q and k normalised, q scaled."""
        name, shape = f"blocks.{block}.attn", self.config.transformer
        _, _, scale1, _, shift1, _ = self.modulations[block]
        h = normed(x_GTC, shape.norm_eps) * (1 + scale1) + shift1
        weights = self.state[f"{name}.mat_qkv.weight"].reshape(3, shape.width, shape.width)
        biases = (self.state[f"{name}.q_bias"], 0.0, self.state[f"{name}.v_bias"])
        q, k, v = (
            (h @ weight.T + bias)
            .reshape(*x_GTC.shape[:2], shape.num_heads, shape.width // shape.num_heads)
            .permute(0, 2, 1, 3)
            for weight, bias in zip(weights, biases, strict=True)
        )
        q = q / (q**2).sum(-1, keepdim=True).sqrt()
        k = k / (k**2).sum(-1, keepdim=True).sqrt()
        log_scale = self.state[f"{name}.scale_mul_1H11"]
        return [q * torch.exp(torch.clamp(log_scale, max=math.log(100))), k, v]

    def output(
        self,
        block: int,
        x_GTC: Tensor,
        q_GHTD: Tensor,
        keys_GHMD: Tensor,
        values_GHMD: Tensor,
        kept_GM: Tensor,
    ) -> Tensor:
        """AdaLN attention, then AdaLN feed-forward."""
        name = f"blocks.{block}"
        gamma1, gamma2, _, scale2, _, shift2 = self.modulations[block]
        attended = masked_attention(q_GHTD, keys_GHMD, values_GHMD, kept_GM)
        attended = attended.permute(0, 2, 1, 3).reshape(x_GTC.shape)
        x_GTC = x_GTC + self.linear(f"{name}.attn.proj", attended) * gamma1
        h = normed(x_GTC, self.config.transformer.norm_eps) * (1 + scale2) + shift2
        hidden = gelu_tanh(self.linear(f"{name}.ffn.fc1", h))
        return x_GTC + self.linear(f"{name}.ffn.fc2", hidden) * gamma2

    def embed(self, scale: int, codes_TZ: Tensor | None) -> Tensor:
        """Input of a scale (G, T, C) from the feature map at its side (none at scale 0)."""
        sides = self.config.sides
        begin = sum(side**2 for side in sides[:scale])
        end = begin + sides[scale] ** 2
        where = self.state["lvl_embed.weight"][scale] + self.state["pos_1LC"][0, begin:end]
        if codes_TZ is None:
            return self.class_GC[:, None] + self.state["pos_start"] + where
        embedded_TC = self.linear("word_embed", codes_TZ) + where
        return torch.stack([embedded_TC] * len(self.class_GC))

    def logits(self, x_GTC: Tensor) -> Tensor:
        """AdaLN before the head, then the head: (G, T, V)."""
        two = self.linear("head_nm.ada_lin.1", silu(self.class_GC))
        scale, shift = two.reshape(-1, 2, self.config.transformer.width).unbind(1)
        h = normed(x_GTC, self.config.transformer.norm_eps)
        return self.linear("head", h * (1 + scale[:, None]) + shift[:, None])


def teacher_forced_logits(
    state: State, config: ModelConfig, labels_B: list[int], codes_BNZ: Tensor
) -> Tensor:
    """Full-depth logits (B, N, V) given the inputs of the scales after the first."""
    rows = []
    for label, codes_NZ in zip(labels_B, codes_BNZ, strict=True):
        blocks = VarBlocks(state, config, state["class_emb.weight"][[label]])
        dense = DenseDepth(blocks, config.grids, config.num_blocks, DepthPolicy())
        logits, begin = [], 0
        for scale, side in enumerate(config.sides):
            codes_TZ = codes_NZ[begin : begin + side**2] if scale else None
            begin += side**2 if scale else 0
            hidden = dense.run_scale(blocks.embed(scale, codes_TZ), []).hidden_GTC
            logits.append(blocks.logits(hidden)[0])
        rows.append(torch.cat(logits))
    return torch.stack(rows)


# Drawing.


@dataclass
class Draw:
    """A drawn code, its log-probability, and the truncated distribution over all codes."""

    code: int
    log_prob: float
    probs_V: list[float]


def draw(logits_V: list[float], uniform: float, settings: SamplingSettings) -> Draw:
    """Top-k, top-p, then the inverse of the distribution function over ascending (logit, code)."""
    num_codes = len(logits_V)
    survivors = sorted(range(num_codes), key=lambda code: (logits_V[code], code))
    if 0 < settings.top_k < num_codes:
        kth = sorted(logits_V, reverse=True)[settings.top_k - 1]
        survivors = [code for code in survivors if logits_V[code] >= kth]
    best = max(logits_V)
    weights = [math.exp(logits_V[code] - best) for code in survivors]
    probs = [weight / math.fsum(weights) for weight in weights]
    first, cumulative = 0, 0.0
    for i, prob in enumerate(probs[:-1]):
        cumulative += prob
        if cumulative <= 1 - settings.top_p:
            first = i + 1
    kept, total = survivors[first:], math.fsum(probs[first:])
    by_code = [0.0] * num_codes
    for code, prob in zip(kept, probs[first:], strict=True):
        by_code[code] = prob / total
    chosen, cumulative = kept[-1], 0.0
    for code in kept:
        cumulative += by_code[code]
        if cumulative > uniform:
            chosen = code
            break
    return Draw(chosen, math.log(by_code[chosen]), by_code)


# The published tokenizer: its layers stand in `depthvar.published`, from decoding on.


def encode(state: State, config: TokenizerConfig, images_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1] to the continuous latent map (B, Z, h, w)."""
    x = published.conv(state, "encoder.conv_in", images_BCHW, padding=1)
    for i in range(len(config.multipliers)):
        x = published.level(state, config, f"encoder.down.{i}", x)
        if i < len(config.multipliers) - 1:
            right_and_bottom = F.pad(x, (0, 1, 0, 1))
            name = f"encoder.down.{i}.downsample.conv"
            x = published.conv(state, name, right_and_bottom, stride=2)
    x = published.middle(state, config, "encoder", x)
    x = published.norm_out(state, config, "encoder", x)
    return published.conv(state, "quant_conv", x, padding=1)


# Sampling.


def uncertainty(ranking: str, drawn: Draw, codebook_VZ: Tensor) -> float:
    """Entropy of a token's distribution, surprise at what was drawn, or variance of its code."""
    if ranking == "entropy":
        return -math.fsum(p * math.log(p) for p in drawn.probs_V if p > 0)
    if ranking == "log-probability":
        return -drawn.log_prob
    probs_V1 = torch.tensor(drawn.probs_V, dtype=codebook_VZ.dtype)[:, None]
    mean_Z = (probs_V1 * codebook_VZ).sum(0)
    return float((probs_V1 * (codebook_VZ - mean_Z) ** 2).sum())


@dataclass
class SampledScale:
    """One scale of a batch: hidden (G, T, C) with all conditional rows first, guided logits."""

    hidden_GTC: Tensor
    logits_BTV: Tensor
    tokens_BT: Tensor
    log_prob_BT: Tensor
    change_BT: Tensor
    depths: list[list[int]]


@dataclass
class Sampled:
    """A batch: its scales and the final feature map."""

    scales: list[SampledScale]
    feature_map_BZHW: Tensor


def sample(
    states: tuple[State, State],
    config: ModelConfig,
    policy: DepthPolicy,
    settings: SamplingSettings,
    labels_B: list[int],
    uniforms_BN: Tensor,
    ranking_BN: Tensor,
    fit: tuple[Tensor, Tensor] | None = None,
) -> Sampled:
    """Every sample on its own, then put side by side; `fit` is (slope, offset), each (S, L, C)."""
    each = [
        _sample_one(states, config, policy, settings, label, uniforms, random_N, fit)
        for label, uniforms, random_N in zip(
            labels_B, uniforms_BN.tolist(), ranking_BN.tolist(), strict=True
        )
    ]
    scales = []
    for parts in zip(*(scales for scales, _ in each), strict=True):
        hidden = torch.stack([part.hidden_GTC for part in parts], dim=1).flatten(0, 1)
        scales.append(
            SampledScale(
                hidden,
                *(
                    torch.cat([getattr(part, name) for part in parts])
                    for name in ("logits_BTV", "tokens_BT", "log_prob_BT", "change_BT")
                ),
                [depths for part in parts for depths in part.depths],
            )
        )
    return Sampled(scales, torch.stack([feature_map for _, feature_map in each]))


def _sample_one(
    states: tuple[State, State],
    config: ModelConfig,
    policy: DepthPolicy,
    settings: SamplingSettings,
    label: int,
    uniforms_N: list[float],
    random_N: list[float],
    fit: tuple[Tensor, Tensor] | None,
) -> tuple[list[SampledScale], Tensor]:
    transformer, tokenizer = states
    labels = [label, config.num_classes] if settings.cfg > 0 else [label]
    blocks = VarBlocks(transformer, config, transformer["class_emb.weight"][labels])
    sides = config.sides[: len(config.sides) - policy.skip_last_scales]
    dense = DenseDepth(blocks, squares(sides), config.num_blocks, policy, *(fit or (None, None)))
    codebook_VZ = tokenizer["quantize.embedding.weight"]
    last = config.sides[-1]
    f_hat_ZHW = codebook_VZ.new_zeros(codebook_VZ.shape[1], last, last)
    scales, begin, draws = [], 0, []
    for i, side in enumerate(sides):
        end = begin + side**2
        x_GTC = blocks.embed(i, published.at_side(f_hat_ZHW[None], side)[0] if i else None)
        given_T = random_N[begin:end]
        if i and policy.ranking in ("entropy", "log-probability", "spread"):
            exact = [uncertainty(policy.ranking, drawn, codebook_VZ) for drawn in draws]
            signal = torch.tensor(exact, dtype=torch.float32).tolist()
            given_T = [
                signal[cover] for cover in covering_token(*squares((side, config.sides[i - 1])))
            ]
        is_guided = policy.guided_scales is None or i < policy.guided_scales
        dense.streams_seen = None if is_guided else 1
        result = dense.run_scale(x_GTC, given_T)
        logits_GTV = blocks.logits(result.hidden_GTC)
        logits_TV = logits_GTV[0]
        if settings.cfg > 0:
            t = settings.cfg * i / (len(config.sides) - 1)
            if is_guided:
                difference_TV = logits_GTV[0] - logits_GTV[1]
            else:
                cover = covering_token(*squares((side, config.sides[i - 1])))
                difference_TV = policy.kept_guidance * difference_TV[cover]
            logits_TV = logits_GTV[0] + t * difference_TV
        draws = [
            draw(logits_V, uniform, settings)
            for logits_V, uniform in zip(logits_TV.tolist(), uniforms_N[begin:end], strict=True)
        ]
        codes_TZ = codebook_VZ[[d.code for d in draws]]
        weight_T1 = result.code_weights_T[:, None]
        if policy.blending == "score":
            codes_TZ = weight_T1 * codes_TZ
        if policy.blending in ("mean", "pruned"):
            probs_TV = torch.tensor([d.probs_V for d in draws], dtype=codebook_VZ.dtype)
            codes_TZ = weight_T1 * codes_TZ + (1 - weight_T1) * (probs_TV @ codebook_VZ)
        added_BZHW = published.feature_of_codes(tokenizer, config.tokenizer, i, codes_TZ[None])
        f_hat_ZHW = f_hat_ZHW + added_BZHW[0]
        hidden_GTC, change_T = result.seen(dense.streams_seen)
        scales.append(
            SampledScale(
                hidden_GTC,
                logits_TV[None],
                torch.tensor([[d.code for d in draws]]),
                torch.tensor([[d.log_prob for d in draws]], dtype=logits_TV.dtype),
                change_T[None],
                result.depths[: dense.streams_seen],
            )
        )
        begin = end
    return scales, f_hat_ZHW
