"""Both training stages in data-parallel processes, from images to a model folder."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from depthvar.config import ModelConfig
from depthvar.tokenizer import Tokenizer
from depthvar.training.data import Augmentation, ImageSet
from depthvar.training.loop import Process
from depthvar.training.tokenizer import TokenizerRecipe, train_tokenizer
from depthvar.training.transformer import TransformerRecipe, train_transformer
from depthvar.transformer import Transformer, initialise


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run besides its data."""

    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    transformer: TransformerRecipe = field(default_factory=TransformerRecipe)
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0


def _train_in_process(
    rank: int,
    world: int,
    port: int,
    config: ModelConfig,
    data: ImageSet,
    recipe: Recipe,
    folder: Path,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if world > 1:
        backend, address = "nccl" if on_gpu else "gloo", f"tcp://127.0.0.1:{port}"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world)
    process = Process(rank, world, device)
    torch.manual_seed(recipe.seed)
    tokenizer = Tokenizer(config.tokenizer).to(device)
    train_tokenizer(
        tokenizer, data, recipe.tokenizer, recipe.augmentation, process, folder, seed=recipe.seed
    )
    transformer = Transformer(config.transformer)
    initialise(transformer, torch.Generator().manual_seed(recipe.seed))
    train_transformer(
        transformer.to(device),
        tokenizer,
        data,
        recipe.transformer,
        recipe.augmentation,
        process,
        folder,
        seed=recipe.seed + 2,
    )
    if rank == 0:
        torch.save(
            {"tokenizer": tokenizer.state_dict(), "transformer": transformer.state_dict()},
            folder / "trained.pt",
        )
    if world > 1:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_training(
    config: ModelConfig,
    data: ImageSet,
    recipe: Recipe,
    folder: Path,
    *,
    processes: int,
    threads: int = 1,
) -> None:
    """Train tokenizer and transformer; state and logs go to `folder`, where a rerun resumes."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(  # type: ignore[no-untyped-call]
        _train_in_process,
        (processes, _free_port(), config, data, recipe, folder, threads),
        nprocs=processes,
    )
