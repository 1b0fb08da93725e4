"""A training run from images to a model folder: both stages, calibration, pictures, card."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessRaisedException

from depthvar.config import ModelConfig, TokenizerConfig, model_config
from depthvar.errors import InputError, system_error
from depthvar.host.leftovers import is_leftover
from depthvar.host.processes import end_with_parent
from depthvar.host.streams import outlive_readers
from depthvar.strict_json import read_json
from depthvar.training.calibration import calibrate
from depthvar.training.data import ImageSet, to_float
from depthvar.training.loop import Process, save_state
from depthvar.training.recipe import Recipe
from depthvar.training.tokenizer import train_tokenizer
from depthvar.training.transformer import train_transformer
from depthvar.var.tokenizer import Tokenizer
from depthvar.var.transformer import Transformer, initialise
from depthvar.weights.checkpoint import load_model, save_model, save_proxy_fit
from depthvar.weights.files import CALIBRATION_FILE, RECIPE_FILE
from depthvar.weights.find import find_model

_TRAINED = "trained.pt"
_LONGEST_VALUES = 60  # characters of a difference that is spelled out


def train_model(
    config: ModelConfig,
    train_set: ImageSet,
    held_out: ImageSet | None,
    recipe: Recipe,
    folder: Path,
    *,
    processes: int,
    threads: int,
    data_facts: Mapping[str, Any] | None = None,
) -> Path:
    """Train, or go on training, in `folder`; returns the finished model folder `folder/model`.

    The state after every few hundred steps is kept, and the same command goes on from it.
    `data_facts` are JSON values about the data for the finished model's `facts.json`.
    `InputError` if the folder holds a run of another recipe, model or data, or anything else.
    """
    if recipe.tokenizer_from is not None:
        _check_start(config.tokenizer, recipe.tokenizer_from)
    _claim(folder, config, train_set, recipe)
    if not (folder / _TRAINED).exists():
        _run_stages(config, train_set, recipe, folder, processes=processes, threads=threads)
    tokenizer, transformer = Tokenizer(config.tokenizer), Transformer(config.transformer)
    trained = torch.load(folder / _TRAINED, map_location="cpu", weights_only=True)
    tokenizer.load_state_dict(trained["tokenizer"])
    transformer.load_state_dict(trained["transformer"])
    model_folder = folder / "model"
    save_model(model_folder, config, transformer, tokenizer)
    (model_folder / CALIBRATION_FILE).unlink(missing_ok=True)
    model = load_model(find_model(str(model_folder)))
    labels = [i % config.num_classes for i in range(recipe.calibration_samples)]
    fit, explained_SL = calibrate(model, config.sampling, labels, batch_size=50)
    save_proxy_fit(model_folder / CALIBRATION_FILE, fit, model.found)
    facts = {
        "training_images": len(train_set),
        "proxy_energy_explained_per_scale": [round(v, 3) for v in explained_SL.mean(1).tolist()],
        "recipe": asdict(recipe),
        **(data_facts or {}),
    }
    if held_out is not None:
        facts["held_out_images"] = len(held_out)
        facts["held_out_reconstruction_mse"] = round(reconstruction_error(tokenizer, held_out), 5)
    (model_folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    return model_folder


@torch.inference_mode()
def reconstruction_error(tokenizer: Tokenizer, data: ImageSet) -> float:
    """Mean squared error of tokenized and decoded images, in pixel values of [-1, 1]."""
    total = 0.0
    for images_BCHW in data.images_NCHW.split(100):
        target = to_float(images_BCHW)
        _, _, feature_map = tokenizer.tokenize(tokenizer.encode(target))
        total += float((tokenizer.decode(feature_map) - target).square().mean()) * len(target)
    return total / len(data)


def _check_start(config: TokenizerConfig, name: str) -> None:
    """`InputError` unless a tokenizer can start from that of a model: only the sides may differ."""
    known = model_config(name)
    if not isinstance(known, ModelConfig):
        raise InputError(f"{name} is asked in words, wanted a model of classes: choose another")
    start = known.tokenizer
    at_our_sides = replace(start, sides=config.sides, phi_of_scale=config.phi_of_scale)
    if at_our_sides != config or start.num_phis != config.num_phis:
        raise InputError(
            f"the tokenizer of {name!r} is {start}, wanted {config} save for the sides: start from "
            "another model, or from none"
        )


def check_run_folder(folder: Path) -> None:
    """`InputError` unless a run can begin in `folder` or one is there; writes nothing."""
    if (folder / RECIPE_FILE).is_file():
        return
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise InputError(f"{folder} is no folder, wanted one for the run: choose another --out")
        return
    foreign = sorted(path.name for path in folder.iterdir() if not is_leftover(path.name))
    if foreign:
        raise InputError(
            f"{folder} holds {foreign[0]!r} and no {RECIPE_FILE}, so it is no training run: choose "
            "an empty or new --out"
        )


def _claim(folder: Path, config: ModelConfig, data: ImageSet, recipe: Recipe) -> None:
    """Write down what this run is, or compare with what is written down."""
    check_run_folder(folder)
    wanted: dict[str, Any] = json.loads(
        json.dumps(
            {
                "model": asdict(config),
                "images": len(data),
                "pixels": _digest(data),
                "recipe": asdict(recipe),
            }
        )
    )
    path = folder / RECIPE_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{RECIPE_FILE}"
        unfinished.write_text(json.dumps(wanted, indent=2) + "\n")
        unfinished.replace(path)
        return
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} describes no training run: choose another --out")
    if "pixels" not in found:  # a run begun by an earlier release
        del wanted["pixels"]
    differing = _differences(found, wanted)
    if differing:
        raise InputError(
            f"{folder} holds a run that differs in {', '.join(differing)}: train with the "
            "settings and pictures it began with, or choose another --out"
        )


def _digest(data: ImageSet) -> str:
    """SHA-256 of all pixels and labels."""
    digest = hashlib.sha256(data.images_NCHW.contiguous().numpy().tobytes())
    digest.update(data.labels_N.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """`recipe.seed (5, was 0)` for every value that is not the one written down."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        inner = f"{name}." if name else ""
        return [
            difference
            for key in sorted({*found, *wanted})
            for difference in _differences(found.get(key), wanted.get(key), f"{inner}{key}")
        ]
    if found == wanted:
        return []
    values = f"{json.dumps(wanted)}, was {json.dumps(found)}"
    return [f"{name} ({values})" if len(values) <= _LONGEST_VALUES else name]


def _run_stages(
    config: ModelConfig,
    data: ImageSet,
    recipe: Recipe,
    folder: Path,
    *,
    processes: int,
    threads: int,
) -> None:
    try:
        mp.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _train_in_process,
            (processes, _free_port(), config, data, recipe, folder, threads),
            nprocs=processes,
        )
    except ProcessRaisedException as error:  # it holds the process's traceback as text
        system = system_error(str(error).rstrip().splitlines()[-1], folder)
        if system is None:
            raise
        raise system from error


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
    end_with_parent()
    outlive_readers()
    torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if world > 1:
        backend, address = "nccl" if on_gpu else "gloo", f"tcp://127.0.0.1:{port}"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world)
    process = Process(rank, world, device, folder, getattr(torch, recipe.precision))
    how, seed = recipe.augmentation, recipe.seed
    tokenizer = _new_tokenizer(config, recipe).to(device)
    train_tokenizer(tokenizer, data, recipe.tokenizer, how, process, seed=seed)
    transformer = Transformer(config.transformer)
    initialise(transformer, torch.Generator().manual_seed(seed))
    transformer.to(device)
    train_transformer(transformer, tokenizer, data, recipe.transformer, how, process, seed=seed + 2)
    if rank == 0:
        states = {"tokenizer": tokenizer.state_dict(), "transformer": transformer.state_dict()}
        save_state(folder / _TRAINED, states)
    if world > 1:
        dist.destroy_process_group()


def _new_tokenizer(config: ModelConfig, recipe: Recipe) -> Tokenizer:
    """The tokenizer to train: random, or as it is in the model that the recipe names."""
    torch.manual_seed(recipe.seed)
    tokenizer = Tokenizer(config.tokenizer)
    if recipe.tokenizer_from is None:
        tokenizer.quantize.embedding.weight.data.normal_(
            0, 0.2, generator=torch.Generator().manual_seed(recipe.seed)
        )
        return tokenizer
    start = load_model(find_model(recipe.tokenizer_from), with_encoder=True)
    tokenizer.load_state_dict(start.tokenizer.state_dict())
    return tokenizer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
