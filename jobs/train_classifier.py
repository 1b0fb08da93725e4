"""Train a classifier on a dataset, test it on others: `depthvar train-classifier OUT`.

It trains from the shards alone; --real adds real digits, and no OUT leaves only these. Several
numbers after --samples and --real give a table, a row for each pair. Every row takes the same
number of steps, whatever its number of images.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field
from tqdm import tqdm

from depthvar.errors import InputError, naming
from depthvar.host.rate import rate_text
from depthvar.paths import check_output_file
from jobs._entry import EXIT_DONE, run_job
from jobs._report import ReportConfig, check_report, write_report
from pipeline.request.flags import Positional, load_config
from pipeline.request.marks import Metavar
from pipeline.request.paths import LocalPath, Location, dataset_location, path_field

if TYPE_CHECKING:
    from pipeline.research.quality.downstream import TestSet, TrainingSet
    from pipeline.research.quality.features import Classifier, ClassifierRecipe
    from pipeline.shards.committed import Dataset

_COLUMNS = ("synthetic", "real", "test accuracy", "seconds per run", "images/s")


class TrainClassifierConfig(ReportConfig):
    """What `depthvar train-classifier` can be told."""

    out: Annotated[Location | None, Positional()] = Field(
        None, description="dataset to train on (default: none, real digits alone)"
    )
    test: Annotated[str, path_field(dataset_location, "digits"), Metavar("PATH")] = Field(
        "digits",
        description="what to test on: `digits` (1,000 real held-out ones), a dataset of the same"
        " classes, or a folder <class name>/<image files>; held in memory",
    )
    background: Annotated[str, Metavar("COLOUR")] = Field(
        "white", description="what shows where pictures of a --test folder are transparent"
    )
    skip_unreadable: bool = Field(
        False, description="go on without the pictures of a --test folder that cannot be read"
    )
    samples: list[Annotated[int, Field(gt=0)]] = Field(
        default_factory=list,
        description="use this many images from the start of the dataset; several numbers give"
        " several rows (default: all)",
    )
    real: list[Annotated[int, Field(ge=0)]] = Field(
        [0],
        min_length=1,
        description="add this many of the 4,000 real training digits; several give several rows"
        " (default: 0)",
    )
    runs: int = Field(3, gt=0, description="trainings of each row, with seeds of their own")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the first run; the next adds one")
    steps: int = Field(800, ge=10, description="steps of one training")
    batch_size: int = Field(100, gt=1, description="images of one step")
    loader_workers: int | None = Field(
        None,
        ge=0,
        description="processes that read shards, 0 for none beside the training (default: 2, or 1"
        " for a single shard)",
    )
    threads: int = Field(1, gt=0, description="CPU threads; another number may change the last bit")
    model_out: LocalPath | None = Field(
        None,
        description="write the classifier of a single run to this new .safetensors file"
        " (default: none)",
    )


@dataclass(frozen=True)
class Row:
    """What the trainings on one set gave: accuracies by run, and the seconds of all together."""

    training_set: TrainingSet
    accuracies: tuple[float, ...]
    elapsed_s: float
    images_per_s: float

    def to_json(self) -> dict[str, Any]:
        """One flat object; the deviation of a single run is null."""
        return {
            "samples": self.training_set.num_samples,
            "real": self.training_set.num_real,
            "loader_workers": self.training_set.num_workers,
            "accuracy": float(np.mean(self.accuracies)),
            "accuracy_std": self.deviation,
            "accuracies": list(self.accuracies),
            "elapsed_s": self.elapsed_s,
            "images_per_s": self.images_per_s,
        }

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the runs, None for a single run."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else None

    def text(self) -> str:
        """A line of the table."""
        spread = "" if self.deviation is None else f" +- {100 * self.deviation:.1f}"
        cells = (
            f"{self.training_set.num_samples:,}",
            f"{self.training_set.num_real:,}",
            f"{np.mean(self.accuracies):.1%}{spread}",
            f"{self.elapsed_s / len(self.accuracies):.1f}",
            rate_text(self.images_per_s),
        )
        return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per row when it is done, and write the JSON file after each; exit code 0."""
    config = load_config(
        TrainClassifierConfig, argv, prog="depthvar train-classifier", description=__doc__ or ""
    )
    check_report(config)
    _check_model_out(config)
    import torch

    from depthvar.training.pictures import Background
    from pipeline.dataset.loader import open_dataset
    from pipeline.research.quality.downstream import open_test_set, training_sets
    from pipeline.research.quality.features import ClassifierRecipe, to_safetensors
    from pipeline.shards.samples import ShardError

    torch.set_num_threads(config.threads)
    background = Background.of(config.background)
    recipe = ClassifierRecipe(steps=config.steps, batch=config.batch_size)
    dataset = None if config.out is None else open_dataset(config.out)
    try:
        test_set = open_test_set(
            config.test,
            dataset,
            background=background,
            skip_unreadable=config.skip_unreadable,
        )
        sets = training_sets(
            dataset,
            test_set,
            samples=config.samples,
            real=config.real,
            num_workers=config.loader_workers,
            recipe=recipe,
        )
        print(_heading(config, dataset, test_set))
        rows: list[Row] = []
        total = len(sets) * config.runs * config.steps
        with tqdm(total=total, unit="step", desc="train", file=sys.stderr) as bar:
            for training_set in sets:
                row, model = _row(training_set, test_set, recipe, config, bar)
                tqdm.write(row.text(), file=sys.stdout)
                rows.append(row)
                write_report(config, _numbers(config, dataset, test_set, rows))
    except ShardError as error:
        raise InputError(str(error)) from error
    if config.model_out is not None:
        with naming(config.model_out):
            config.model_out.write_bytes(to_safetensors(model))
    return EXIT_DONE


def _check_model_out(config: TrainClassifierConfig) -> None:
    path = config.model_out
    if path is None:
        return
    if config.runs * max(1, len(config.samples)) * len(config.real) > 1:
        raise InputError(
            "got --model-out with several trainings, wanted one: give --runs 1 and one number each "
            "for --samples and --real"
        )
    check_output_file(path, "--model-out", is_new=True)


def _row(
    training_set: TrainingSet,
    test_set: TestSet,
    recipe: ClassifierRecipe,
    config: TrainClassifierConfig,
    bar: tqdm[Any],
) -> tuple[Row, Classifier]:
    """The numbers of all runs on one set, and the classifier of the last run."""
    from pipeline.research.quality.downstream import train_on
    from pipeline.research.quality.features import accuracy

    started, accuracies = time.perf_counter(), []
    for run in range(config.runs):
        model = train_on(training_set, recipe, seed=config.seed + run, after_step=bar.update)
        accuracies.append(accuracy(model, test_set.images_NHWC, test_set.labels_N))
    elapsed_s = time.perf_counter() - started
    rate = config.runs * recipe.steps * recipe.batch / elapsed_s
    return Row(training_set, tuple(accuracies), elapsed_s, rate), model


def _heading(config: TrainClassifierConfig, dataset: Dataset | None, test_set: TestSet) -> str:
    """What is trained on and tested on, and the head of the table."""
    lines = [f"test      {len(test_set.labels_N):,} {test_set.name}"]
    if test_set.reading is not None:
        lines += [f"          {line}" for line in test_set.reading.text().splitlines()]
    if dataset is None:
        lines.insert(0, "train on  real training digits")
    else:
        plan = dataset.plan
        share = plan.compute.token_layers_ratio
        lines.insert(
            0,
            f"train on  {dataset.num_samples:,} images of {plan.subjects_told} "
            f"in {len(dataset.records):,} shards of {dataset.storage}, policy "
            f"{plan.policy.preset}, {share:.1%} of the token-layers",
        )
        if dataset.num_missing:
            lines.append(
                f"note      not finished: {dataset.num_samples:,} of {plan.num_samples:,} images "
                "are committed, only these are trained on"
            )
    lines.append(
        f"recipe    {config.steps:,} steps of {config.batch_size} images; runs: {config.runs}, "
        f"first seed: {config.seed}, threads: {config.threads}"
    )
    head = "| " + " | ".join(_COLUMNS) + " |"
    return "\n".join([*lines, "", head, "|---" * len(_COLUMNS) + "|"])


def _numbers(
    config: TrainClassifierConfig, dataset: Dataset | None, test_set: TestSet, rows: Sequence[Row]
) -> dict[str, Any]:
    """What the JSON file holds: the settings, then the rows that are done."""
    plan = None if dataset is None else dataset.plan
    return {
        "dataset": None if dataset is None else str(dataset.storage),
        "fingerprint": None if dataset is None else dataset.plan.fingerprint,
        "policy": None if plan is None else plan.policy.preset,
        "token_layers_ratio": None if plan is None else plan.compute.token_layers_ratio,
        "test": test_set.name,
        "test_images": len(test_set.labels_N),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "runs": config.runs,
        "seed": config.seed,
        "threads": config.threads,
        "rows": [row.to_json() for row in rows],
    }


if __name__ == "__main__":
    run_job(main)
