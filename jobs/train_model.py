"""Train a small VAR model on the real digits or a folder of labelled images; rerun to resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from depthvar.config import (
    MODELS,
    ModelConfig,
    model_config,
    scenes_model_config,
    small_model_config,
)
from depthvar.errors import InputError
from depthvar.paths import checked_path
from depthvar.training.recipe import Augmentation, Recipe, TokenizerRecipe, TransformerRecipe
from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import JobConfig, load_config
from pipeline.request.marks import Metavar
from pipeline.request.paths import LocalPath, ModelName, path_field

if TYPE_CHECKING:
    from depthvar.training.data import ImageSet

_DEFAULT = Recipe()
_REAL_SETS = (MODELS["digits"].name, scenes_model_config().name)


class TrainModelConfig(JobConfig):
    """What `depthvar train-model` can be told; the defaults are the recipe of the bundled model."""

    out: LocalPath = Field(description="folder of the run; the finished model is in its model/")
    data: Annotated[str, path_field(checked_path, *_REAL_SETS), Metavar("PATH")] = Field(
        "digits",
        description="`digits`, `digit-scenes` (digits on a larger canvas), or a folder of "
        "<class name>/<image files>",
    )
    image_channels: int = Field(3, description="1 for grey or 3 for RGB; folders only")
    background: Annotated[str, Metavar("COLOUR")] = Field(
        "white",
        description="what shows where a picture is transparent, a colour by name or as '#rrggbb'; "
        "folders only",
    )
    skip_unreadable: bool = Field(
        False,
        description="go on without the pictures of a folder that cannot be read, and list them",
    )
    held_out_share: float = Field(
        0.1, gt=0, lt=1, description="share of a folder's images kept out of training"
    )
    tokenizer_steps: int = Field(_DEFAULT.tokenizer.schedule.steps, gt=0, description="steps")
    decoder_steps: int = Field(
        _DEFAULT.tokenizer.tuning.steps, gt=0, description="steps of tuning the decoder alone"
    )
    transformer_steps: int = Field(_DEFAULT.transformer.schedule.steps, gt=0, description="steps")
    transformer_tuning_steps: int = Field(
        _DEFAULT.transformer.tuning.steps, gt=0, description="steps of the second cycle"
    )
    batch_size: int = Field(64, gt=0, description="images per step, over all processes")
    learning_rate: float = Field(
        _DEFAULT.transformer.schedule.learning_rate, gt=0, description="of the transformer"
    )
    layer_drop: float = Field(
        _DEFAULT.transformer.layer_drop,
        ge=0,
        lt=1,
        description="probability that a block is left out of a training step",
    )
    tokenizer_from: ModelName | None = Field(
        None,
        description="model, by name or folder, whose tokenizer the new one starts from (default: "
        "random weights)",
    )
    precision: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="of matrix products and convolutions; float32 is the faster one on processors "
        "without bfloat16",
    )
    flip: bool = Field(False, description="mirror training images at random")
    calibration_samples: int = Field(
        _DEFAULT.calibration_samples, gt=0, description="samples that calibrate the proxies"
    )
    seed: int = Field(0, ge=0, description="seed of weights, batches and dropout")
    processes: int = Field(2, gt=0, description="data-parallel processes; on GPUs one each")
    threads: int = Field(1, gt=0, description="CPU threads of a process")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the model folder is finished."""
    job = load_config(
        TrainModelConfig, argv, prog="depthvar train-model", description=__doc__ or ""
    )
    if job.batch_size % job.processes:
        raise InputError(
            f"batch_size is {job.batch_size} and processes {job.processes}, wanted a multiple: "
            "change either"
        )
    from depthvar.training.run import check_run_folder, train_model
    from pipeline.storage import Storage

    Storage.open(job.out).check_writable()
    check_run_folder(job.out)
    data = _data(job)
    folder = train_model(
        data.model,
        data.train_set,
        data.held_out,
        _recipe(job),
        job.out,
        processes=job.processes,
        threads=job.threads,
        data_facts=data.facts,
    )
    print(f"model finished: sample from it with depthvar generate --model {folder} --out DIR")
    return EXIT_DONE


@dataclass(frozen=True)
class _Data:
    """What to train: a model of the images' classes; `facts` are for the finished model."""

    model: ModelConfig
    train_set: ImageSet
    held_out: ImageSet | None
    facts: dict[str, Any] = field(default_factory=dict)


def _data(job: TrainModelConfig) -> _Data:
    from depthvar.training.data import REAL_SETS
    from depthvar.training.folders import PictureFolder, checked_name
    from depthvar.training.pictures import Background

    if job.data in REAL_SETS:
        config = model_config("digits") if job.data == "digits" else scenes_model_config()
        return _Data(config, REAL_SETS[job.data]("train"), REAL_SETS[job.data]("held-out"))
    if job.image_channels not in (1, 3):
        raise InputError(f"image_channels is {job.image_channels}, wanted 1 or 3: correct it")
    background = Background.of(job.background)
    pictures = PictureFolder.open(Path(job.data), flag="--data")
    name = checked_name(pictures.path.resolve().name, "the folder of --data")
    config = small_model_config(
        f"my-{name}" if name in MODELS else name,
        pictures.class_names,
        image_channels=job.image_channels,
    )
    images, report = pictures.read(
        side=config.image_side,
        channels=job.image_channels,
        background=background,
        skip_unreadable=job.skip_unreadable,
    )
    print(report.text())
    train_set, held_out = images.split(job.held_out_share)
    return _Data(config, train_set, held_out if len(held_out) else None, {"data": report.facts()})


def _recipe(job: TrainModelConfig) -> Recipe:
    tokenizer, transformer = TokenizerRecipe(), TransformerRecipe()
    batch = job.batch_size
    return Recipe(
        tokenizer=replace(
            tokenizer,
            schedule=replace(tokenizer.schedule, steps=job.tokenizer_steps, batch=batch),
            tuning=replace(tokenizer.tuning, steps=job.decoder_steps, batch=batch),
        ),
        transformer=replace(
            transformer,
            schedule=replace(
                transformer.schedule,
                steps=job.transformer_steps,
                batch=batch,
                learning_rate=job.learning_rate,
            ),
            tuning=replace(transformer.tuning, steps=job.transformer_tuning_steps, batch=batch),
            layer_drop=job.layer_drop,
        ),
        augmentation=Augmentation(flip=job.flip),
        tokenizer_from=job.tokenizer_from,
        precision=job.precision,
        calibration_samples=job.calibration_samples,
        seed=job.seed,
    )


if __name__ == "__main__":
    run_job(main)
