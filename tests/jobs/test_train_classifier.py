"""jobs.train_classifier: from a dataset's shards to a table and a file of numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from depthvar.errors import InputError
from jobs.train_classifier import main
from pipeline.request.job_plan import JobPlan
from pipeline.research.quality import downstream
from tests.fake_shards import fake_digits, make_plan, write_images

QUICK = ["--steps", "25", "--batch-size", "16", "--loader-workers", "0"]
CLASSES = (0, 1, 3)


def colour_plan(**changes: Any) -> JobPlan:
    """48 RGB images of three classes in six shards."""
    settings: dict[str, Any] = {"image_size": (8, 8), "image_channels": 3, "samples_per_shard": 8}
    return make_plan(dict.fromkeys(CLASSES, 16), **{**settings, **changes})


def write_colours(folder: Path, plan: JobPlan, *, shift: int = 0) -> str:
    """Noise in red, green or blue: the class, or that `shift` places further on."""
    labels = np.concatenate([plan.shard(i).labels for i in range(plan.num_shards)])
    rng = np.random.default_rng(plan.seed)
    images = rng.integers(0, 100, (len(labels), 8, 8, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, :, (CLASSES.index(label) + shift) % 3] += 150
    return str(write_images(folder, plan, images).storage)


@pytest.fixture(scope="module")
def train_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_colours(tmp_path_factory.mktemp("train") / "data", colour_plan())


@pytest.fixture(scope="module")
def tested_on(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_colours(tmp_path_factory.mktemp("test") / "data", colour_plan(seed=6))


def test_a_classifier_learns_the_labels_of_the_shards(
    train_set: str, tested_on: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "numbers.json"
    flags = ["--test", tested_on, "--samples", "16", "48", "--runs", "2", "--json", str(path)]
    assert main([train_set, *flags, *QUICK]) == 0
    numbers = json.loads(path.read_text())
    few, all_ = numbers["rows"]
    assert [(row["samples"], row["real"]) for row in (few, all_)] == [(16, 0), (48, 0)]
    assert all_["accuracy"] > 0.9
    assert all_["accuracy"] == pytest.approx(np.mean(all_["accuracies"]))
    assert all_["accuracy_std"] == pytest.approx(np.std(all_["accuracies"], ddof=1))
    assert (numbers["test_images"], numbers["steps"], numbers["runs"]) == (48, 25, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"]
    shown = capsys.readouterr().out.splitlines()
    assert f"48 images of 3 classes in 6 shards of {train_set}" in shown[0]
    assert "policy depthvar, 34.0% of the token-layers" in shown[0]
    assert shown[1] == f"test      48 images of {tested_on}"
    table = [line for line in shown if line.startswith("| ")]
    assert [line.split(" | ")[:2] for line in table[1:]] == [["| 16", "0"], ["| 48", "0"]]
    assert f"{all_['accuracy']:.1%} +- " in table[2]


def test_wrong_labels_in_the_shards_give_a_wrong_classifier(tested_on: str, tmp_path: Path):
    path, wrong = tmp_path / "numbers.json", tmp_path / "data"
    write_colours(wrong, colour_plan(), shift=1)
    flags = ["--test", tested_on, "--runs", "1", "--json", str(path)]
    assert main([str(wrong), *flags, *QUICK]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["accuracy"] < 0.4
    assert row["accuracy_std"] is None


def test_real_digits_alone_need_no_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(downstream, "digit_arrays", fake_digits)
    path, weights = tmp_path / "numbers.json", tmp_path / "model.safetensors"
    flags = ["--real", "20", "--runs", "1", "--steps", "10", "--batch-size", "10"]
    assert main([*flags, "--json", str(path), "--model-out", str(weights)]) == 0
    numbers = json.loads(path.read_text())
    assert numbers["dataset"] is None
    assert numbers["test_images"] == 50
    assert [(row["samples"], row["real"]) for row in numbers["rows"]] == [(0, 20)]
    assert load_file(weights)["head.weight"].shape[0] == 10
    assert "test      50 real held-out digits" in capsys.readouterr().out


def test_an_unfinished_dataset_says_so(
    tested_on: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "data"
    write_colours(out, colour_plan())
    (out / "commits" / "00004.json").unlink()
    assert main([str(out), "--test", tested_on, "--runs", "1", *QUICK]) == 0
    assert "not finished: 40 of 48 images are committed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--test", "digits"], "got --test digits for"),
        (["--samples", "49"], "got --samples 49, wanted at most 48"),
        (["--samples", "0"], "--samples: got '0'"),
        (["--batch-size", "64"], "got 48 images to train a classifier on, wanted at least 64"),
        (["--loader-workers", "7"], "got 6 shards for 1 ranks x 7 loader workers"),
        (
            ["--model-out", "no/x.safetensors", "--runs", "1"],
            "--model-out: .* whose folder does not exist",
        ),
        (["--model-out", "x.safetensors"], "got --model-out with several trainings"),
        (["--json", "no/x.json"], "whose folder does not exist"),
    ],
)
def test_mistakes_are_said_before_the_training(train_set: str, tested_on: str, flags, message):
    with pytest.raises(InputError, match=message):
        main([train_set, "--test", tested_on, *QUICK, *flags])


def test_a_damaged_shard_is_a_clear_error(tested_on: str, tmp_path: Path):
    out = tmp_path / "data"
    write_colours(out, colour_plan())
    tar = out / "train" / "00001.tar"
    tar.write_bytes(bytes(512) + tar.read_bytes()[512:])
    with pytest.raises(InputError, match=r"train/00001\.tar: .*run verify --deep"):
        main([str(out), "--test", tested_on, *QUICK])
