"""jobs.train_model: what is checked before a training, and what the training is given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from depthvar.errors import InputError
from jobs._entry import run_job
from jobs.train_model import main


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Ten ants and a single, transparent dog."""
    for name, count in (("ant", 10), ("dog", 1)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGBA", (4, 4), (i, i, i, 255 if name == "ant" else 0))
            image.save(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would be trained, in place of the training."""
    calls: list[tuple[Any, ...]] = []

    def record(model, train_set, held_out, recipe, folder, **options: Any) -> Path:
        calls.append((model, train_set, held_out, options["data_facts"]))
        return folder / "model"

    monkeypatch.setattr("depthvar.training.run.train_model", record)
    return calls


def exit_code(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["train_model", *argv])
    with pytest.raises(SystemExit) as ended:
        run_job(main)
    return int(ended.value.code or 0)


def test_a_class_of_one_picture_is_trained_on(pets, trained, tmp_path, capsys):
    assert main([f"--data={pets}", f"--out={tmp_path / 'run'}", "--background=#102030"]) == 0
    ((model, train_set, held_out, facts),) = trained
    assert (model.name, model.class_names) == ("pets", ("ant", "dog"))
    assert train_set.labels_N.tolist() == [0] * 9 + [1]
    assert held_out.labels_N.tolist() == [0]
    assert train_set.images_NCHW[-1, :, 0, 0].tolist() == [16, 32, 48]
    assert facts["data"]["converted"] == {"with transparency laid over #102030": 1}
    assert "read 11 pictures of 2 classes: 1 with transparency" in capsys.readouterr().out


def test_a_single_picture_is_trained_on_without_held_out_ones(trained, tmp_path):
    (tmp_path / "one" / "ant").mkdir(parents=True)
    Image.new("L", (4, 4), 7).save(tmp_path / "one" / "ant" / "a.png")
    assert main([f"--data={tmp_path / 'one'}", f"--out={tmp_path / 'run'}"]) == 0
    ((_, train_set, held_out, _),) = trained
    assert len(train_set) == 1
    assert held_out is None


def test_unreadable_pictures_stop_the_job_in_a_line_or_are_skipped(
    pets, trained, tmp_path, monkeypatch, capsys
):
    (pets / "ant" / "zero.png").touch()
    argv = [f"--data={pets}", f"--out={tmp_path / 'run'}"]
    assert exit_code(argv, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {pets}/ant/zero.png is no readable picture: the file is empty")
    assert line.endswith("give --skip-unreadable")
    assert not (tmp_path / "run").exists()
    assert not trained
    assert exit_code([*argv, "--skip-unreadable"], monkeypatch) == 0
    ((_, _, _, facts),) = trained
    (skipped,) = facts["data"]["unreadable"]
    assert skipped.startswith(f"{pets}/ant/zero.png")
    assert "skipped 1 unreadable:" in capsys.readouterr().out


def test_a_folder_of_other_things_is_no_output(pets, trained, tmp_path, monkeypatch, capsys):
    dataset, file, model = tmp_path / "dataset", tmp_path / "file", tmp_path / "model"
    for folder in (dataset, model):
        folder.mkdir()
    (dataset / "plan.json").touch()
    (model / "config.json").touch()
    file.write_text("mine")
    for out, reason in (
        (dataset, "holds 'plan.json' and no recipe.json, so it is no training run"),
        (model, "holds 'config.json' and no recipe.json, so it is no training run"),
        (pets, "holds 'ant' and no recipe.json, so it is no training run"),
        (file, "is a file"),
        (file / "below", "is a file"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert exit_code([f"--data={pets}", f"--out={out}"], monkeypatch) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert reason in line
        assert sorted(tmp_path.rglob("*")) == before
    assert not trained
    assert file.read_text() == "mine"


def test_an_empty_folder_is_an_output_whatever_systems_left_in_it(pets, trained, tmp_path):
    out = tmp_path / "disk"
    (out / "lost+found").mkdir(parents=True)
    (out / ".DS_Store").touch()
    assert main([f"--data={pets}", f"--out={out}"]) == 0
    assert len(trained) == 1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--background=nocolour"], "got the background 'nocolour'"),
        (["--image-channels=2"], "image_channels is 2, wanted 1 or 3"),
        (["--processes=3"], "batch_size is 64 and processes 3"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(flags, reason, pets, trained, tmp_path):
    with pytest.raises(InputError, match=reason):
        main([f"--data={pets}", f"--out={tmp_path / 'run'}", *flags])
    assert not (tmp_path / "run").exists()


def test_a_folder_whose_own_name_cannot_be_written_down_is_refused(
    pets, trained, tmp_path, monkeypatch
):
    monkeypatch.chdir(pets.rename(tmp_path / "a\nb"))
    with pytest.raises(InputError, match=r"the folder of --data is named 'a\\nb'"):
        main(["--data=.", f"--out={tmp_path / 'run'}"])
