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


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@dataclass
class _TrainingState:
    """What a training goes on from: weights, their moving average, the optimiser, steps done."""

    path: Path
    model: nn.Module
    optimiser: torch.optim.Optimizer
    average: dict[str, Tensor]
    step: int = 0

    @classmethod
    def begin(
        cls, model: nn.Module, schedule: Schedule, path: Path, device: torch.device
    ) -> _TrainingState:
        """The state at `path`, or that of the first step where there is none."""
        average = {key: value.detach().clone() for key, value in model.state_dict().items()}
        state = cls(path, model, _optimiser(_trained(model), schedule), average)
        if path.exists():
            stored = torch.load(path, map_location=device, weights_only=True)
            model.load_state_dict(stored["model"])
            state.optimiser.load_state_dict(stored["optimiser"])
            state.average, state.step = stored["average"], stored["step"]
        return state

    def descend(self, loss: Tensor, schedule: Schedule, process: Process) -> None:
        """Change the weights by the gradients of a loss, averaged over the processes."""
        parameters = _trained(self.model)
        for group in self.optimiser.param_groups:
            group["lr"] = schedule.rate(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        process.average(_gradients(parameters))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimiser.step()

    @torch.no_grad()
    def end_step(self, schedule: Schedule) -> None:
        """Move the average towards the weights; early on it forgets its beginning faster."""
        self.step += 1
        decay = min(schedule.ema_decay, self.step / (self.step + 9))
        for key, value in self.model.state_dict().items():
            self.average[key].lerp_(value, 1 - decay)

    def save(self) -> None:
        """Write the file that `begin` reads. Errors: `OSError`."""
        stored = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        save_state(self.path, stored)


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
    state = _TrainingState.begin(model, schedule, process.folder / f"{name}.pt", process.device)
    first = process.rank == 0
    log = (process.folder / f"{name}.jsonl").open("a") if first else nullcontext()
    bar = tqdm(total=schedule.steps, initial=state.step, desc=name, unit="step", disable=not first)
    begun = time.monotonic()
    with log as log_file, bar:
        while (step := state.step) < schedule.steps:
            generator = torch.Generator().manual_seed(
                (seed * 1_000_003 + step) * process.world + process.rank
            )
            size = schedule.batch // process.world
            images, labels = random_batch(data, size, how, generator, process.device)
            loss, numbers = loss_of_batch(images, labels, step, generator)
            state.descend(loss, schedule, process)
            if after_step:
                after_step(step, generator)
            state.end_step(schedule)
            bar.update()
            is_last = state.step == schedule.steps
            if log_file and (state.step % 20 == 0 or is_last):
                bar.set_postfix({key: f"{value:.4g}" for key, value in numbers.items()})
                row = {"step": state.step, "elapsed_s": round(time.monotonic() - begun, 1)}
                log_file.write(json.dumps({**row, **numbers}) + "\n")
                log_file.flush()
            if first and (state.step % schedule.save_every == 0 or is_last):
                state.save()
    model.load_state_dict(state.average)
