"""The training loop that both stages share: data parallel, resumable, with a progress bar.

A step's data and dropout depend on (seed, step, rank) alone, so a run that was stopped and resumed
takes the same steps as one that was not. What a loss function counts besides is its own business:
the tokenizer's counts of used codes start anew.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from depthvar.errors import naming
from depthvar.training.data import ImageSet, random_batch
from depthvar.training.recipe import Augmentation, Schedule

LossFunction = Callable[[Tensor, Tensor, int, torch.Generator], tuple[Tensor, dict[str, float]]]
"""(images, labels, step, random stream of this step and process) -> (loss, numbers to log)."""


@dataclass(frozen=True)
class Process:
    """One of the data-parallel processes of a training run, and the run's folder."""

    rank: int
    world: int
    device: torch.device
    folder: Path
    precision: torch.dtype = torch.bfloat16

    def average(self, tensors: list[Tensor]) -> None:
        """Average over the processes, in place."""
        if self.world == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        begin = 0
        for tensor in tensors:
            tensor.copy_(flat[begin : begin + tensor.numel()].view_as(tensor))
            begin += tensor.numel()

    def autocast(self) -> Any:
        """Matrix products and convolutions in the precision of the run."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a file that appears whole. Errors: `OSError`."""
    temporary = path.with_suffix(".tmp")
    with naming(path), open(temporary, "wb") as stream:
        torch.save(state, stream)
    os.replace(temporary, path)


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients, zero where a dropped block got none: every process averages the same list."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _optimiser(parameters: list[nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW that decays matrices and convolutions, not biases and scales."""
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters if p.dim() > 1],
            "weight_decay": schedule.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() <= 1]},
    ]
    return torch.optim.AdamW(
        groups, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


@torch.no_grad()
def _move_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for key, value in model.state_dict().items():
        average[key].lerp_(value, 1 - decay)


def train(
    name: str,
    model: nn.Module,
    loss_of_batch: LossFunction,
    data: ImageSet,
    how: Augmentation,
    schedule: Schedule,
    process: Process,
    *,
    seed: int,
    after_step: Callable[[int, torch.Generator], None] | None = None,
) -> None:
    """Train `model` in place; it ends with the exponential moving average of its weights.

    Progress goes to `name.jsonl` in the run's folder, the resumable state to `name.pt`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = _optimiser(parameters, schedule)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    state_path, start = process.folder / f"{name}.pt", 0
    if state_path.exists():
        state = torch.load(state_path, map_location=process.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average, start = state["average"], state["step"]
    first = process.rank == 0
    log = (process.folder / f"{name}.jsonl").open("a") if first else nullcontext()
    bar = tqdm(total=schedule.steps, initial=start, desc=name, unit="step", disable=not first)
    begun = time.monotonic()
    with log as log_file, bar:
        for step in range(start, schedule.steps):
            generator = torch.Generator().manual_seed(
                (seed * 1_000_003 + step) * process.world + process.rank
            )
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate(step)
            size = schedule.batch // process.world
            images, labels = random_batch(data, size, how, generator, process.device)
            loss, numbers = loss_of_batch(images, labels, step, generator)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            process.average(_gradients(parameters))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            if after_step:
                after_step(step, generator)
            _move_average(average, model, min(schedule.ema_decay, (step + 1) / (step + 10)))
            bar.update()
            if log_file and (step % 20 == 19 or step + 1 == schedule.steps):
                bar.set_postfix({key: f"{value:.4g}" for key, value in numbers.items()})
                row = {"step": step + 1, "elapsed_s": round(time.monotonic() - begun, 1), **numbers}
                log_file.write(json.dumps(row) + "\n")
                log_file.flush()
            if first and ((step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps):
                saved = {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "average": average,
                    "step": step + 1,
                }
                save_state(state_path, saved)
    model.load_state_dict(average)
