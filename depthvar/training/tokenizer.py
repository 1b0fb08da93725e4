"""Stage one: the tokenizer.

Trained plainly, a small tokenizer puts everything into its last scale. Two things prevent it:
a part of each batch is decoded from a random prefix of the scales, and codes that go unused are
moved onto residual vectors of the batch. At the end the decoder alone is tuned to the final codes.

Shape legend: B images, Z code channels, H W sides, T tokens of one scale, S scales.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.config import TokenizerConfig
from depthvar.training.data import ImageSet
from depthvar.training.loop import Process, train
from depthvar.training.recipe import Augmentation, TokenizerRecipe
from depthvar.var.tokenizer import Tokenizer


class Usage:
    """How often every code was chosen of late, and vectors that unused codes can move to."""

    def __init__(self, config: TokenizerConfig, device: torch.device) -> None:
        self.counts_V = torch.zeros(config.codebook_size, device=device)
        self.seen_NZ = torch.zeros(0, config.code_channels, device=device)
        self.step_counts_V = torch.zeros_like(self.counts_V)

    def see(self, tokens: list[Tensor], vectors: list[Tensor]) -> None:
        """Note the codes (B, T) chosen at each scale for the vectors (B, T, Z) of this step."""
        tokens_N = torch.cat([t.flatten() for t in tokens])
        self.step_counts_V.copy_(torch.bincount(tokens_N, minlength=len(self.counts_V)))
        self.seen_NZ = torch.cat([v[:, :4].flatten(0, 1) for v in vectors]).detach()

    def perplexity(self) -> float:
        """exp of the entropy of the recent use."""
        share_V = self.counts_V / self.counts_V.sum().clamp(min=1e-9)
        return float(torch.special.entr(share_V).sum().exp())


def quantize(model: Tokenizer, latent_BZHW: Tensor, usage: Usage) -> tuple[list[Tensor], Tensor]:
    """Feature maps after every scale (with gradients to codes and phis) and the codebook loss."""
    feature_map = torch.zeros_like(latent_BZHW)
    target = latent_BZHW.detach()
    maps, tokens, vectors = [], [], []
    loss = torch.zeros((), device=latent_BZHW.device)
    quantizer = model.quantize
    for scale in range(len(model.config.sides)):
        rest_BTZ = quantizer.input_of_scale(scale, target - feature_map.detach())
        tokens_BT = quantizer.nearest(rest_BTZ)
        feature_map = feature_map + quantizer.contribution(scale, quantizer.embedding(tokens_BT))
        loss = loss + F.mse_loss(feature_map, target)
        maps.append(feature_map)
        tokens.append(tokens_BT)
        vectors.append(rest_BTZ)
    usage.see(tokens, vectors)
    return maps, loss / len(maps)


def _prefix(maps: list[Tensor], share: float, generator: torch.Generator) -> Tensor:
    """The full feature map for most images, the map of a random prefix of scales for the others."""
    stacked_SBZHW = torch.stack(maps)
    count, size = stacked_SBZHW.shape[:2]
    last = torch.full((size,), count - 1)
    drawn = torch.randint(0, count - 1, (size,), generator=generator)
    scale_B = torch.where(torch.rand(size, generator=generator) < share, drawn, last)
    return stacked_SBZHW[scale_B.to(stacked_SBZHW.device), torch.arange(size)]


def _reconstruction_loss(images: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(images, target) + F.mse_loss(images, target)


@torch.no_grad()
def _track_codes(
    model: Tokenizer, usage: Usage, process: Process, generator: torch.Generator, *, revive: bool
) -> None:
    """Move the codes that went unused of late onto residual vectors of the batch."""
    process.average([usage.step_counts_V])
    usage.counts_V.lerp_(usage.step_counts_V, 0.03)
    unused = (usage.counts_V < 1e-2).nonzero()[:, 0]
    if not revive or len(unused) == 0:
        return
    codes_VZ = model.quantize.embedding.weight
    chosen = torch.randint(len(usage.seen_NZ), (len(unused),), generator=generator)
    fresh_NZ = usage.seen_NZ[chosen.to(usage.seen_NZ.device)]
    if process.world > 1:
        torch.distributed.broadcast(fresh_NZ, 0)
    codes_VZ[unused] = fresh_NZ.to(codes_VZ.dtype)


def train_tokenizer(
    model: Tokenizer,
    data: ImageSet,
    recipe: TokenizerRecipe,
    how: Augmentation,
    process: Process,
    *,
    seed: int,
) -> None:
    """Train all of `model`, then its decoder alone; `model` ends with the averaged weights."""
    usage = Usage(model.config, process.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_of_batch(
        target: Tensor, labels: Tensor, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        with process.autocast():
            latent = model.encode(target)
        maps, code_loss = quantize(model, latent, usage)
        commit = F.mse_loss(latent, maps[-1].detach())
        quantized = _prefix(maps, recipe.prefix_share, generator).detach()
        decoded_from = quantized + (latent - latent.detach())
        with process.autocast():
            images = model.decoder(model.post_quant_conv(decoded_from))
        pixel_loss = _reconstruction_loss(images.float(), target)
        size_loss = recipe.latent_decay * latent.square().mean()
        loss = pixel_loss + code_loss + recipe.commitment * commit + size_loss
        return loss, {"pixel_loss": pixel_loss.item(), "perplexity": usage.perplexity()}

    def after_step(step: int, generator: torch.Generator) -> None:
        early = step < recipe.schedule.steps * 0.8
        revive = early and step % recipe.revive_every == 0
        _track_codes(model, usage, process, generator, revive=revive)

    arguments = data, how, recipe.schedule, process
    train("tokenizer", model, loss_of_batch, *arguments, seed=seed, after_step=after_step)
    _tune_decoder(model, data, recipe, how, process, seed=seed + 1)


def _tune_decoder(
    model: Tokenizer,
    data: ImageSet,
    recipe: TokenizerRecipe,
    how: Augmentation,
    process: Process,
    *,
    seed: int,
) -> None:
    """Fit the decoder to the final codes, which stay as they are, on mostly unaltered images."""
    sharp = replace(how, plain_share=recipe.tuning_plain_share)
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)
    model.post_quant_conv.requires_grad_(True)

    def decoder_loss(
        target: Tensor, labels: Tensor, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad(), process.autocast():
            latent = model.encode(target)
        _, _, feature_map = model.tokenize(latent)
        with process.autocast():
            images = model.decoder(model.post_quant_conv(feature_map))
        loss = _reconstruction_loss(images.float(), target)
        return loss, {"pixel_loss": loss.item()}

    train("decoder", model, decoder_loss, data, sharp, recipe.tuning, process, seed=seed)
