"""Stage two: the transformer, teacher-forced over all scales, with block LayerDrop.

Whole blocks are left out at random in training, so that the trained model bears what a depth policy
does to it (Fan et al., "Reducing Transformer Depth on Demand", arXiv 1909.11556).

Shape legend: B images, T tokens of an image, Z code channels, V codes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.training.data import ImageSet
from depthvar.training.loop import Process, train
from depthvar.training.recipe import Augmentation, Schedule, TransformerRecipe
from depthvar.var.tokenizer import Tokenizer
from depthvar.var.transformer import Transformer, block_causal_mask


def train_transformer(
    model: Transformer,
    tokenizer: Tokenizer,
    data: ImageSet,
    recipe: TransformerRecipe,
    how: Augmentation,
    process: Process,
    *,
    seed: int,
) -> None:
    """Train `model` on tokens made on the fly; it ends with the averaged weights."""
    mask_TT = block_causal_mask(model.config.sides).to(process.device)
    tokenizer.requires_grad_(False)

    def cycle(name: str, schedule: Schedule, how: Augmentation, ramp: float, seed: int) -> None:
        def loss_of_batch(
            images: Tensor, labels_B: Tensor, step: int, generator: torch.Generator
        ) -> tuple[Tensor, dict[str, float]]:
            with process.autocast():
                latent = tokenizer.encode(images)
            tokens, codes_BTZ, _ = tokenizer.tokenize(latent)
            target_BT = torch.cat(tokens, dim=1)
            dropped_B = torch.rand(len(labels_B), generator=generator) < recipe.label_drop
            labels_B = torch.where(dropped_B.to(process.device), model.config.num_classes, labels_B)
            reached = min(1.0, step / (ramp * schedule.steps)) if ramp else 1.0
            survives_L = torch.rand(model.config.num_blocks, generator=generator)
            kept = (survives_L >= recipe.layer_drop * reached).nonzero()[:, 0].tolist()
            with process.autocast():
                logits_BTV = model(labels_B, codes_BTZ, mask_TT, kept)
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten())
            return loss, {"loss": loss.item()}

        train(name, model, loss_of_batch, data, how, schedule, process, seed=seed)

    cycle("transformer", recipe.schedule, how, recipe.layer_drop_ramp, seed)
    sharper = replace(how, plain_share=recipe.tuning_plain_share)
    cycle("transformer-tuning", recipe.tuning, sharper, 0.0, seed + 1)
