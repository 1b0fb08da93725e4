"""The multi-scale VQ tokenizer: encoder, residual quantizer over scales, decoder.

Shape legend: B images, Z code channels, C channels, H W sides of a map (h w of one scale), T tokens
of one scale, V codes.

Source: Tian et al., arXiv 2404.02905, section 3.2; parameter names of `vae_ch160v4096z32.pth`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from depthvar.config import TokenizerConfig
from depthvar.draw import Drawn, draw_tokens
from depthvar.pointwise import Layer
from depthvar.settings import DecoderShape, SamplingSettings


class GroupNorm(nn.GroupNorm):
    """Group norm that keeps its digits in every layout.

    On CPUs torch sums a whole channels-last map in one float32 chain, which costs the image two
    digits at 512x512. Half precision rounds more than that away, and is left to torch.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape and layout."""
        is_summed_badly = (
            x_BCHW.is_cpu and x_BCHW.dtype == torch.float32 and not x_BCHW.is_contiguous()
        )
        if not is_summed_badly:
            return super().forward(x_BCHW)
        batch, channels, height, width = x_BCHW.shape
        groups, size = self.num_groups, channels // self.num_groups * height * width
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)

        def grouped_mean(values_BHWC: Tensor) -> Tensor:
            sums_BC = values_BHWC.sum(dim=2).sum(dim=1, dtype=torch.float64)
            return sums_BC.view(batch, groups, -1).sum(dim=2, keepdim=True) / size

        mean = grouped_mean(x_BHWC)
        variance = (grouped_mean(x_BHWC.square()) - mean.square()).clamp(min=0)
        scale_BGN = self.weight.view(groups, -1) / (variance + self.eps).sqrt()
        shift_BGN = self.bias.view(groups, -1) - mean * scale_BGN
        shift, scale = (
            values_BGN.to(x_BCHW.dtype).view(batch, channels, 1, 1)
            for values_BGN in (shift_BGN, scale_BGN)
        )
        return torch.addcmul(shift, x_BCHW, scale)


def _norm(channels: int, shape: DecoderShape) -> GroupNorm:
    return GroupNorm(shape.norm_groups, channels, eps=1e-6)


class ResBlock(Layer):
    """Two 3x3 convolutions with group norm and swish, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, shape: DecoderShape) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, shape)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, shape)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_width = in_channels != out_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        h: Tensor = self.conv1(self.pointwise.group_norm(self.norm1, x_BCHW, silu=True))
        h = self.conv2(self.pointwise.group_norm(self.norm2, h, silu=True))
        skip: Tensor = self.nin_shortcut(x_BCHW) if self.changes_width else x_BCHW
        return skip + h


class SelfAttention(Layer):
    """Single-head attention over the positions of a feature map, softmax scale C^-0.5."""

    def __init__(self, channels: int, shape: DecoderShape) -> None:
        super().__init__()
        self.norm = _norm(channels, shape)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        normed_BCHW = self.pointwise.group_norm(self.norm, x_BCHW, silu=False)
        q, k, v = self.qkv(normed_BCHW).flatten(2).transpose(1, 2).chunk(3, dim=2)
        out_BTC = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        attended: Tensor = self.proj_out(out_BTC.transpose(1, 2).reshape(x_BCHW.shape))
        return x_BCHW + attended


class Downsample(nn.Module):
    """Stride-2 3x3 convolution; pads right and bottom, as the published encoder does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2)."""
        out: Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W)."""
        out: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))
        return out


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each at the coarsest, then a resize."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shape: DecoderShape,
        *,
        num_blocks: int,
        attention: bool,
        resize: tuple[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResBlock(a, b, shape) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(
            SelfAttention(out_channels, shape) for _ in range(num_blocks if attention else 0)
        )
        self.resize_name = resize[0] if resize else None
        if resize:
            self.add_module(*resize)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Blocks, attention, then the change of resolution."""
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        if self.resize_name:
            x_BCHW = self.get_submodule(self.resize_name)(x_BCHW)
        return x_BCHW


def _middle(channels: int, shape: DecoderShape) -> nn.ModuleDict:
    middle = nn.ModuleDict({"block_1": ResBlock(channels, channels, shape)})
    if shape.has_attention:
        middle["attn_1"] = SelfAttention(channels, shape)
    middle["block_2"] = ResBlock(channels, channels, shape)
    return middle


def _through(middle: nn.ModuleDict, x_BCHW: Tensor) -> Tensor:
    for module in middle.values():
        x_BCHW = module(x_BCHW)
    return x_BCHW


class Encoder(Layer):
    """Image to latent map: (B, image channels, H, W) to (B, Z, H/f, W/f)."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        widths = [shape.base_width * m for m in shape.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(shape.image_channels, shape.base_width, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)] if i else shape.base_width,
                widths[i],
                shape,
                num_blocks=shape.num_res_blocks,
                attention=i == last,
                resize=None if i == last else ("downsample", Downsample(widths[i])),
            )
            for i in range(len(widths))
        )
        self.mid = _middle(widths[-1], shape)
        self.norm_out = _norm(widths[-1], shape)
        self.conv_out = nn.Conv2d(widths[-1], shape.code_channels, 3, padding=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] to latents."""
        h = self.conv_in(images_BCHW)
        for level in self.down:
            h = level(h)
        normed = self.pointwise.group_norm(self.norm_out, _through(self.mid, h), silu=True)
        out: Tensor = self.conv_out(normed)
        return out


class Decoder(Layer):
    """Latent map to image: (B, Z, h, w) to (B, image channels, h*f, w*f)."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        widths = [shape.base_width * m for m in shape.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(shape.code_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], shape)
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                widths[i],
                shape,
                num_blocks=shape.num_res_blocks + 1,
                attention=i == last and shape.has_attention,
                resize=("upsample", Upsample(widths[i])) if i else None,
            )
            for i in range(len(widths))
        )
        self.norm_out = _norm(widths[0], shape)
        self.conv_out = nn.Conv2d(widths[0], shape.image_channels, 3, padding=1)

    def forward(self, latent_BZHW: Tensor) -> Tensor:
        """Latents to images, nominally in [-1, 1]; level 0 is the highest resolution."""
        h = _through(self.mid, self.conv_in(latent_BZHW))
        for level in reversed(list(self.up)):
            h = level(h)
        out: Tensor = self.conv_out(self.pointwise.group_norm(self.norm_out, h, silu=True))
        return out


class SharedPhis(nn.Module):
    """The 3x3 convolutions that smooth up-sampled codes: phi(h) = h/2 + conv(h)/2."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(
            nn.Conv2d(config.code_channels, config.code_channels, 3, padding=1)
            for _ in range(config.num_phis)
        )

    def forward(self, index: int, h_BZHW: Tensor) -> Tensor:
        """Apply phi number `index`."""
        return h_BZHW.lerp(self.qresi_ls[index](h_BZHW), 0.5)


class Quantizer(nn.Module):
    """Codebook and the residual feature map built up scale by scale."""

    draws_per_token = 1

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.code_channels)
        self.quant_resi = SharedPhis(config)

    def draw(self, logits_BTV: Tensor, uniforms_BT: Tensor, settings: SamplingSettings) -> Drawn:
        """Draw one code per token, see `draw.draw_tokens`."""
        return draw_tokens(logits_BTV, uniforms_BT, settings)

    def codes(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """The code vectors of tokens (B, T, Z)."""
        codes_BTZ: Tensor = self.embedding(tokens_BT)
        return codes_BTZ.to(dtype)

    def expected_codes(self, drawn: Drawn) -> Tensor:
        """Mean code vectors under the distributions (B, T, Z)."""
        return drawn.expected_codes(self.embedding.weight)

    def spread(self, drawn: Drawn) -> Tensor:
        """Variance of the code vectors, summed over their channels (B, T)."""
        return drawn.spread(self.embedding.weight)

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the feature map."""
        side = self.config.latent_side
        return self.config.code_channels, side, side

    def contribution(self, scale: int, codes_BTZ: Tensor) -> Tensor:
        """What the code vectors of a scale add to the feature map: (B, Z, H, W)."""
        side, last = self.config.sides[scale], self.config.latent_side
        h_BZhw = codes_BTZ.transpose(1, 2).reshape(len(codes_BTZ), -1, side, side)
        if side != last:
            h_BZhw = F.interpolate(h_BZhw, size=(last, last), mode="bicubic")
        out: Tensor = self.quant_resi(self.config.phi_of_scale[scale], h_BZhw)
        return out

    def input_of_scale(self, scale: int, feature_map_BZHW: Tensor) -> Tensor:
        """The feature map area-averaged to the side of a scale, as tokens (B, T, Z)."""
        side = self.config.sides[scale]
        return F.adaptive_avg_pool2d(feature_map_BZHW, side).flatten(2).transpose(1, 2)

    def nearest(self, vectors_BTZ: Tensor) -> Tensor:
        """Index of the nearest code by Euclidean distance (B, T)."""
        codes_VZ = self.embedding.weight
        scores = vectors_BTZ @ codes_VZ.t() - 0.5 * codes_VZ.square().sum(1)
        return scores.argmax(-1)


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder under the published names."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.code_channels
        self.config = config
        self.encoder = Encoder(config.decoder_shape)
        self.decoder = Decoder(config.decoder_shape)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 3, padding=1)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images in [-1, 1] to the continuous latent map (B, Z, H, W), at least float32."""
        latent: Tensor = self.quant_conv(self.encoder(images_BCHW))
        return latent if latent.dtype == torch.float64 else latent.float()

    def decode(self, feature_map_BZHW: Tensor) -> Tensor:
        """Feature map to images clamped to [-1, 1], in the decoder's precision; NaN stays NaN."""
        images: Tensor = self.decoder(self.post_quant_conv(feature_map_BZHW))
        # Clamped, an infinite pixel would pass for black or white.
        return images.masked_fill(images.isinf(), torch.nan).clamp(-1, 1)

    @torch.no_grad()
    def tokenize(self, latent_BZHW: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Quantize latents over the scales.

        Returns the tokens of every scale, each (B, T), the transformer inputs of scales 1.. as
        (B, T, Z) over all of them, and the final feature map (B, Z, H, W).
        """
        rest = latent_BZHW
        feature_map = torch.zeros_like(rest)
        tokens, inputs = [], []
        for scale in range(len(self.config.sides)):
            if scale:
                inputs.append(self.quantize.input_of_scale(scale, feature_map))
            tokens_BT = self.quantize.nearest(self.quantize.input_of_scale(scale, rest))
            added = self.quantize.contribution(scale, self.quantize.embedding(tokens_BT))
            feature_map = feature_map + added
            rest = rest - added
            tokens.append(tokens_BT)
        return tokens, torch.cat(inputs, dim=1), feature_map
