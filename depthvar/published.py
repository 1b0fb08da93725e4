"""VAR sampling as it was published: the loop that ours is measured against, and nothing else runs.

Written anew from the architecture, plainly, and kept as wasteful as the original: weights in
float32 that autocast casts at every use, AdaLN once per scale and block, a cache that grows by
concatenation, a sort of all codes, an eager decoder in torch's default layout. A model is a mapping
of tensors by their published names.

Shape legend: B images, G stream rows (2B: conditional then unconditional), T tokens of a scale, M
tokens so far, C width, H heads, D head channels, V codes, Z code channels, h w sides of a map.

Source: Tian et al., arXiv 2404.02905, and what the public code of it computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.config import TokenizerConfig
from depthvar.sampling import SampleBatch
from depthvar.settings import SamplingSettings
from depthvar.weights.checkpoint import LoadedModel

State = Mapping[str, Tensor]


class PublishedSampler:
    """The published loop, at full depth, over the weights of a float32 or float64 model.

    dtype: what autocast computes in; that of the weights means no autocast.
    draw: guided logits (B, T, V) of the next scale -> its tokens (B, T).
    """

    def __init__(
        self,
        model: LoadedModel,
        dtype: torch.dtype,
        draw: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config = model.config
        self._settings = model.config.sampling
        self._transformer = dict(model.transformer.named_parameters())
        self._tokenizer = {
            name: parameter.contiguous() for name, parameter in model.tokenizer.named_parameters()
        }
        self._draw = draw or (lambda logits_BTV: draw_published(logits_BTV, self._settings))
        self._device, self._dtype, self._wide = model.device, dtype, model.dtype

    def __call__(self, labels: Sequence[int], *, seed: int, indices: Sequence[int]) -> SampleBatch:
        """One image per label, of torch's own random numbers; nothing is recorded of the scales."""
        torch.manual_seed(seed)
        begun = time.perf_counter()
        feature_map_BZhw = self.feature_map(labels)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        sampled_at = time.perf_counter()
        images_BHWC = self.images(feature_map_BZhw).cpu().numpy()
        decoded_at = time.perf_counter()
        config, batch = self.config, len(labels)
        nothing = np.zeros((batch, len(config.sides)), np.float32)
        depths_BN = np.full((batch, config.transformer.num_tokens), config.num_blocks, np.uint8)
        return SampleBatch(
            images_BHWC=images_BHWC,
            mean_change_BS=nothing,
            mean_log_prob_BS=nothing,
            depths_BN=depths_BN,
            sampling_s=sampled_at - begun,
            decoding_s=decoded_at - sampled_at,
        )

    @torch.inference_mode()
    def feature_map(self, labels: Sequence[int]) -> Tensor:
        """The feature map (B, Z, h, w) after all scales."""
        with self._autocast():
            return self._sampled(torch.tensor(labels, device=self._device))

    @torch.inference_mode()
    def images(self, feature_map_BZhw: Tensor) -> Tensor:
        """Pixels (B, H, W, C), uint8."""
        with self._autocast():
            images_BCHW = decode(self._tokenizer, self.config.tokenizer, feature_map_BZhw).float()
        return ((images_BCHW + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

    def _autocast(self) -> torch.autocast:
        narrow = self._dtype != self._wide
        dtype = self._dtype if narrow else torch.bfloat16
        return torch.autocast(self._device.type, dtype=dtype, enabled=narrow)

    def _sampled(self, labels_B: Tensor) -> Tensor:
        config, weights = self.config, self._transformer
        is_guided = self._settings.streams == 2
        if is_guided:
            unconditional_B = torch.full_like(labels_B, config.num_classes)
            labels_B = torch.cat([labels_B, unconditional_B])
        class_GC = F.embedding(labels_B, weights["class_emb.weight"])
        codebook_VZ = self._tokenizer["quantize.embedding.weight"]
        batch, side = len(labels_B) // self._settings.streams, config.sides[-1]
        feature_map_BZhw = codebook_VZ.new_zeros(batch, codebook_VZ.shape[1], side, side)
        cache: dict[int, tuple[Tensor, Tensor]] = {}
        for scale in range(len(config.sides)):
            x_GTC = self._embedded(scale, feature_map_BZhw, class_GC)
            for block in range(config.num_blocks):
                x_GTC = self._block(block, x_GTC, class_GC, cache)
            logits_BTV = self._logits(x_GTC, class_GC)
            if is_guided:
                strength = self._settings.cfg * scale / max(1, len(config.sides) - 1)
                conditional_BTV, unconditional_BTV = logits_BTV.chunk(2)
                logits_BTV = (1 + strength) * conditional_BTV - strength * unconditional_BTV
            codes_BTZ = F.embedding(self._draw(logits_BTV), codebook_VZ)
            feature_map_BZhw = feature_map_BZhw + feature_of_codes(
                self._tokenizer, config.tokenizer, scale, codes_BTZ
            )
        return feature_map_BZhw

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weights = self._transformer
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def _embedded(self, scale: int, feature_map_BZhw: Tensor, class_GC: Tensor) -> Tensor:
        weights, sides = self._transformer, self.config.sides
        begin = sum(side**2 for side in sides[:scale])
        positions_1TC = weights["pos_1LC"][:, begin : begin + sides[scale] ** 2]
        where_1TC = weights["lvl_embed.weight"][scale] + positions_1TC
        if scale == 0:
            return class_GC[:, None] + weights["pos_start"] + where_1TC
        embedded_BTC = self._linear("word_embed", at_side(feature_map_BZhw, sides[scale]))
        return (embedded_BTC + where_1TC).repeat(len(class_GC) // len(embedded_BTC), 1, 1)

    def _modulation(self, block: int, class_GC: Tensor) -> tuple[Tensor, ...]:
        shape, own = self.config.transformer, f"blocks.{block}."
        name = "shared_ada_lin.1" if shape.shared_adaln else f"{own}ada_lin.1"
        six_G16C = self._linear(name, F.silu(class_GC)).view(-1, 1, 6, shape.width)
        if shape.shared_adaln:
            six_G16C = six_G16C + self._transformer[f"{own}ada_gss"]
        return six_G16C.unbind(2)

    def _normed(self, x_GTC: Tensor, scale_G1C: Tensor, shift_G1C: Tensor) -> Tensor:
        normed_GTC = F.layer_norm(x_GTC, x_GTC.shape[-1:], eps=self.config.transformer.norm_eps)
        return normed_GTC.mul(scale_G1C.add(1)).add(shift_G1C)

    def _block(
        self, block: int, x_GTC: Tensor, class_GC: Tensor, cache: dict[int, tuple[Tensor, Tensor]]
    ) -> Tensor:
        name = f"blocks.{block}"
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self._modulation(block, class_GC)
        attended_GTC = self._attended(block, self._normed(x_GTC, scale1, shift1), cache)
        x_GTC = x_GTC + attended_GTC.mul(gamma1)
        hidden = self._linear(f"{name}.ffn.fc1", self._normed(x_GTC, scale2, shift2))
        fed_GTC = self._linear(f"{name}.ffn.fc2", F.gelu(hidden, approximate="tanh"))
        return x_GTC + fed_GTC.mul(gamma2)

    def _attended(
        self, block: int, x_GTC: Tensor, cache: dict[int, tuple[Tensor, Tensor]]
    ) -> Tensor:
        weights, name = self._transformer, f"blocks.{block}.attn"
        q_bias, v_bias = weights[f"{name}.q_bias"], weights[f"{name}.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = F.linear(x_GTC, weights[f"{name}.mat_qkv.weight"], bias)
        heads = qkv.view(*x_GTC.shape[:2], 3, self.config.transformer.num_heads, -1)
        q_GHTD, k_GHMD, v_GHMD = heads.permute(2, 0, 3, 1, 4).unbind(0)
        log_scale = weights[f"{name}.scale_mul_1H11"].clamp(max=math.log(100))
        q_GHTD = F.normalize(q_GHTD, dim=-1).mul(log_scale.exp())
        k_GHMD = F.normalize(k_GHMD, dim=-1)
        if block in cache:
            k_GHMD, v_GHMD = (
                torch.cat(pair, dim=2) for pair in zip(cache[block], (k_GHMD, v_GHMD), strict=True)
            )
        cache[block] = k_GHMD, v_GHMD
        out_GHTD = F.scaled_dot_product_attention(q_GHTD, k_GHMD, v_GHMD, scale=1.0)
        return self._linear(f"{name}.proj", out_GHTD.transpose(1, 2).reshape(x_GTC.shape))

    def _logits(self, x_GTC: Tensor, class_GC: Tensor) -> Tensor:
        two_G12C = self._linear("head_nm.ada_lin.1", F.silu(class_GC))
        scale_G1C, shift_G1C = two_G12C.view(len(class_GC), 1, 2, -1).unbind(2)
        logits_GTV = self._linear("head", self._normed(x_GTC, scale_G1C, shift_G1C))
        return logits_GTV.to(self._wide)


def draw_published(logits_BTV: Tensor, settings: SamplingSettings) -> Tensor:
    """Tokens (B, T) of the codes that top-k, then top-p leave, by torch's own random numbers."""
    if 0 < settings.top_k < logits_BTV.shape[2]:
        kth_BT1 = logits_BTV.topk(settings.top_k, sorted=False).values.amin(2, keepdim=True)
        logits_BTV = logits_BTV.masked_fill(logits_BTV < kth_BT1, -torch.inf)
    ascending_BTV, codes_BTV = logits_BTV.sort(dim=2, stable=True)
    dropped_BTV = ascending_BTV.softmax(2).cumsum(2) <= 1 - settings.top_p
    dropped_BTV[:, :, -1] = False
    dropped_BTV = dropped_BTV.scatter(2, codes_BTV, dropped_BTV)
    probs_BTV = logits_BTV.masked_fill(dropped_BTV, -torch.inf).softmax(2)
    return probs_BTV.flatten(0, 1).multinomial(1).view(logits_BTV.shape[:2])


# The tokenizer.


def feature_of_codes(
    state: State, config: TokenizerConfig, scale: int, codes_BTZ: Tensor
) -> Tensor:
    """What the code vectors of a scale add to the feature map (B, Z, h, w)."""
    side, last = config.sides[scale], config.latent_side
    h_BZhw = codes_BTZ.transpose(1, 2).reshape(len(codes_BTZ), -1, side, side)
    if scale != len(config.sides) - 1:
        h_BZhw = F.interpolate(h_BZhw, (last, last), mode="bicubic")
    smooth_BZhw = conv(
        state, f"quantize.quant_resi.qresi_ls.{config.phi_of_scale[scale]}", h_BZhw, padding=1
    )
    return 0.5 * h_BZhw + 0.5 * smooth_BZhw


def at_side(feature_map_BZhw: Tensor, side: int) -> Tensor:
    """The feature map area-averaged to a side, as tokens (B, T, Z)."""
    return F.interpolate(feature_map_BZhw, (side, side), mode="area").flatten(2).transpose(1, 2)


def conv(state: State, name: str, x_BCHW: Tensor, *, padding: int = 0, stride: int = 1) -> Tensor:
    """The convolution of this name."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.conv2d(x_BCHW, weight, bias, padding=padding, stride=stride)


def level(state: State, config: TokenizerConfig, name: str, x_BCHW: Tensor) -> Tensor:
    """All residual blocks of a resolution, each with its attention where there is one."""
    index = 0
    while f"{name}.block.{index}.conv1.weight" in state:
        x_BCHW = _res_block(state, config, f"{name}.block.{index}", x_BCHW)
        if f"{name}.attn.{index}.qkv.weight" in state:
            x_BCHW = _attention(state, config, f"{name}.attn.{index}", x_BCHW)
        index += 1
    return x_BCHW


def middle(state: State, config: TokenizerConfig, name: str, x_BCHW: Tensor) -> Tensor:
    """The blocks at the coarsest resolution, between the levels and the latent."""
    x_BCHW = _res_block(state, config, f"{name}.mid.block_1", x_BCHW)
    x_BCHW = _attention(state, config, f"{name}.mid.attn_1", x_BCHW)
    return _res_block(state, config, f"{name}.mid.block_2", x_BCHW)


def norm_out(state: State, config: TokenizerConfig, name: str, x_BCHW: Tensor) -> Tensor:
    """The last norm, activation and convolution of encoder or decoder."""
    activated_BCHW = F.silu(_group_norm(state, config, f"{name}.norm_out", x_BCHW))
    return conv(state, f"{name}.conv_out", activated_BCHW, padding=1)


def decode(state: State, config: TokenizerConfig, feature_map_BZhw: Tensor) -> Tensor:
    """Feature map to images (B, channels, H, W) in [-1, 1]."""
    x_BCHW = conv(state, "post_quant_conv", feature_map_BZhw, padding=1)
    x_BCHW = conv(state, "decoder.conv_in", x_BCHW, padding=1)
    x_BCHW = middle(state, config, "decoder", x_BCHW)
    for i in reversed(range(len(config.multipliers))):
        x_BCHW = level(state, config, f"decoder.up.{i}", x_BCHW)
        if i > 0:
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2, mode="nearest")
            x_BCHW = conv(state, f"decoder.up.{i}.upsample.conv", x_BCHW, padding=1)
    return norm_out(state, config, "decoder", x_BCHW).clamp(-1, 1)


def _group_norm(state: State, config: TokenizerConfig, name: str, x_BCHW: Tensor) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.group_norm(x_BCHW, config.norm_groups, weight, bias, eps=1e-6)


def _res_block(state: State, config: TokenizerConfig, name: str, x_BCHW: Tensor) -> Tensor:
    h_BCHW = x_BCHW
    for i in (1, 2):
        h_BCHW = F.silu(_group_norm(state, config, f"{name}.norm{i}", h_BCHW))
        h_BCHW = conv(state, f"{name}.conv{i}", h_BCHW, padding=1)
    if f"{name}.nin_shortcut.weight" in state:
        x_BCHW = conv(state, f"{name}.nin_shortcut", x_BCHW)
    return x_BCHW + h_BCHW


def _attention(state: State, config: TokenizerConfig, name: str, x_BCHW: Tensor) -> Tensor:
    qkv = conv(state, f"{name}.qkv", _group_norm(state, config, f"{name}.norm", x_BCHW))
    q_BCT, k_BCT, v_BCT = qkv.flatten(2).chunk(3, dim=1)
    scores_BTT = torch.bmm(q_BCT.transpose(1, 2), k_BCT) * x_BCHW.shape[1] ** -0.5
    out_BCT = torch.bmm(v_BCT, scores_BTT.softmax(2).transpose(1, 2))
    return x_BCHW + conv(state, f"{name}.proj_out", out_BCT.reshape(x_BCHW.shape))
