import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from depthvar.config import ModelConfig, model_config, scenes_model_config
from depthvar.errors import InputError
from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.settings import SamplingSettings
from depthvar.training.data import REAL_SETS, ImageSet, digits
from depthvar.training.loop import Process, train
from depthvar.training.recipe import (
    Augmentation,
    Recipe,
    Schedule,
    TokenizerRecipe,
    TransformerRecipe,
)
from depthvar.training.run import _claim, train_model
from depthvar.weights.checkpoint import load_model
from depthvar.weights.find import find_model
from tests.file_modes import assert_as_the_umask_has_it, current_umask
from tests.killed_jobs import assert_no_process_outlives

ALONE = Process(0, 1, torch.device("cpu"), Path())
BLANK = ImageSet(torch.zeros(2, 1, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
SHORT = Schedule(steps=6, batch=8, learning_rate=1e-2, warmup_steps=2, save_every=3)


def _fit_line(folder: Path, schedule: Schedule, *, after_step=None) -> nn.Module:
    """The averaged model; what the trained one was stands in the folder."""
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    true = torch.tensor([1.0, -2.0, 0.5])

    def loss_of_batch(images, labels, step, generator):
        x = torch.randn(16, 3, generator=generator)
        loss = (model(x)[:, 0] - x @ true).square().mean()
        return loss, {"loss": loss.item()}

    folder.mkdir(exist_ok=True)
    train(
        "line",
        model,
        loss_of_batch,
        BLANK,
        Augmentation(),
        schedule,
        replace(ALONE, folder=folder),
        seed=1,
        after_step=after_step,
    )
    return model


class StoppedError(Exception):
    pass


def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(tmp_path):
    schedule = replace(SHORT, steps=40)
    whole = _fit_line(tmp_path / "whole", schedule)

    def stop(step, generator):
        if step == 20:
            raise StoppedError

    with pytest.raises(StoppedError):
        _fit_line(tmp_path / "cut", schedule, after_step=stop)
    assert torch.load(tmp_path / "cut" / "line.pt", weights_only=True)["step"] == 18
    resumed = _fit_line(tmp_path / "cut", schedule)
    for average, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(average, other)
    ends = [torch.load(tmp_path / run / "line.pt", weights_only=True) for run in ("whole", "cut")]
    for name, weight in ends[0]["model"].items():
        assert torch.equal(weight, ends[1]["model"][name])


def test_training_fits_what_it_is_given(tmp_path):
    schedule = replace(SHORT, steps=400, learning_rate=0.05, weight_decay=0.0, ema_decay=0.9)
    model = _fit_line(tmp_path, schedule)
    torch.testing.assert_close(model.weight[0], torch.tensor([1.0, -2.0, 0.5]), atol=0.02, rtol=0)
    rows = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 400
    assert rows[-1]["loss"] < rows[0]["loss"] / 100


def test_the_rate_warms_up_and_then_falls():
    schedule = Schedule(steps=100, batch=1, learning_rate=1.0, warmup_steps=10)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 0.03


def _small_set() -> ImageSet:
    whole = digits("train")
    return ImageSet(whole.images_NCHW[::40], whole.labels_N[::40], whole.class_names)


def _shallow(config: ModelConfig) -> ModelConfig:
    """With two blocks: stages, processes and files are those of any number."""
    return replace(config, transformer=replace(config.transformer, num_blocks=2))


def _recipe() -> Recipe:
    """Two steps of each stage, so that one begins from averaged gradients, and one of tuning."""
    two = replace(SHORT, steps=2, batch=4)
    one = replace(two, steps=1)
    return Recipe(
        tokenizer=TokenizerRecipe(schedule=two, tuning=one),
        transformer=TransformerRecipe(schedule=two, tuning=one),
        calibration_samples=10,
    )


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a run share the imports of the test."""
    start = partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", start)


@pytest.mark.usefixtures("forked")
def test_two_processes_train_a_model_that_samples_with_every_part(tmp_path):
    config, data = _shallow(replace(model_config("digits"), name="shallow")), _small_set()
    held_out = ImageSet(data.images_NCHW[::5], data.labels_N[::5], data.class_names)
    folder = train_model(config, data, held_out, _recipe(), tmp_path, processes=2, threads=1)
    assert_as_the_umask_has_it(tmp_path, current_umask())
    model = load_model(find_model(str(folder)))
    batch = Sampler(model, make_policy("depthvar"), SamplingSettings(1.0, 0, 1.0))(
        [3, 4], seed=0, indices=[0, 1]
    )
    assert batch.images_BHWC.shape == (2, 32, 32, 1)
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["training_images"] == 100
    assert facts["held_out_reconstruction_mse"] > 0
    _assert_other_runs_are_refused(tmp_path, config, data)


def _assert_other_runs_are_refused(run: Path, config: ModelConfig, data: ImageSet) -> None:
    """Each names what differs from the run that is in the folder."""
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    inverted = replace(data, images_NCHW=255 - data.images_NCHW)
    fewer = ImageSet(data.images_NCHW[1:], data.labels_N[1:], data.class_names)
    other = replace(_recipe(), seed=5, tokenizer_from="digits")
    for images, recipe, differences in (
        (data, other, r'recipe.seed \(5, was 0\), recipe.tokenizer_from \("digits", was null\)'),
        (inverted, _recipe(), "pixels"),
        (fewer, _recipe(), r"images \(99, was 100\), pixels"),
    ):
        with pytest.raises(InputError, match=f"holds a run that differs in {differences}: train"):
            train_model(config, images, images, recipe, run, processes=2, threads=1)
    recipe_file = run / "recipe.json"
    for content in ("", "{", "[]"):
        recipe_file.write_text(content)
        with pytest.raises(InputError, match=r"recipe\.json"):
            train_model(config, data, data, _recipe(), run, processes=2, threads=1)
    recipe_file.write_bytes(before[recipe_file])
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_run_begun_before_pixels_were_hashed_goes_on(tmp_path):
    _claim(tmp_path, model_config("digits"), BLANK, _recipe())
    path = tmp_path / "recipe.json"
    older = {k: v for k, v in json.loads(path.read_text()).items() if k != "pixels"}
    path.write_text(json.dumps(older))
    _claim(tmp_path, model_config("digits"), BLANK, _recipe())
    assert json.loads(path.read_text()) == older


def test_a_folder_of_other_things_is_not_trained_in(tmp_path):
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "lost+found").mkdir()
    _claim(tmp_path, model_config("digits"), BLANK, _recipe())
    (tmp_path / "recipe.json").rename(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"holds 'plan\.json' and no recipe\.json"):
        _claim(tmp_path, model_config("digits"), BLANK, _recipe())


@pytest.mark.usefixtures("forked")
def test_a_tokenizer_starts_from_that_of_another_model_at_other_sides(tmp_path):
    data = REAL_SETS["digit-scenes"]("held-out")
    few = ImageSet(data.images_NCHW[:20], data.labels_N[:20], data.class_names)
    still = replace(SHORT, steps=1, learning_rate=0.0)
    recipe = replace(
        _recipe(),
        tokenizer=TokenizerRecipe(schedule=still, tuning=still),
        transformer=TransformerRecipe(schedule=still, tuning=still),
        tokenizer_from="digits",
        precision="float32",
    )
    config = _shallow(scenes_model_config())
    folder = train_model(config, few, None, recipe, tmp_path, processes=1, threads=1)
    ours, theirs = (
        load_model(find_model(name), with_encoder=True).tokenizer
        for name in (str(folder), "digits")
    )
    assert ours.config.sides == (1, 2, 3, 4, 6, 8, 12)
    for part in ("encoder", "decoder"):
        state = getattr(theirs, part).state_dict()
        for name, value in getattr(ours, part).state_dict().items():
            torch.testing.assert_close(value, state[name], msg=name)


def test_a_tokenizer_of_other_widths_is_no_start(tmp_path):
    recipe = replace(_recipe(), tokenizer_from="var-d16")
    with pytest.raises(InputError, match=r"tokenizer of 'var-d16' is .* save for the sides"):
        train_model(
            scenes_model_config(), _small_set(), None, recipe, tmp_path, processes=1, threads=1
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_products_are_in_the_precision_of_the_run(precision):
    with replace(ALONE, precision=precision).autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == precision


def test_processes_average_their_gradients(tmp_path):
    arguments = (str(tmp_path / "store"),)  # forked: these need no start of their own
    torch.multiprocessing.start_processes(_average_ranks, arguments, nprocs=2, start_method="fork")


def _average_ranks(rank: int, store: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    a, b = torch.full((2, 3), float(rank)), torch.full((5,), 10.0 * rank)
    Process(rank, 2, torch.device("cpu"), Path()).average([a, b])
    assert torch.equal(a, torch.full((2, 3), 0.5))
    assert torch.equal(b, torch.full((5,), 5.0))
    torch.distributed.destroy_process_group()


def test_no_process_of_a_training_outlives_it(tmp_path):
    """Orphans would write the state that the resumed run goes on from."""
    argv = [f"--out={tmp_path / 'run'}", "--precision=float32", "--tokenizer-steps=500"]
    assert_no_process_outlives(["jobs.train_model", *argv, "--batch-size=4"], of=500)
