"""The calibration job: what it writes, and where it does not write."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from depthvar.errors import InputError
from depthvar.policy import make_policy
from depthvar.sampling import Sampler
from depthvar.weights.checkpoint import load_model, save_model
from depthvar.weights.files import BUNDLED, CALIBRATION_FILE
from depthvar.weights.find import find_model
from jobs.calibrate import main
from tests.file_modes import assert_as_the_umask_has_it, umask
from tests.tiny_models import tiny_model

FEW = ("--samples", "2", "--batch-size", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model(0)
    save_model(
        tmp_path / "own", model.config, model.transformer, model.tokenizer, dtype=torch.float32
    )
    return tmp_path / "own"


def can_use_its_calibration(model: str) -> bool:
    loaded = load_model(find_model(model))
    sampler = Sampler(loaded, make_policy("depthvar", reference_scale=1, proxy="calibrated"),
                      loaded.config.sampling)  # fmt: skip
    return bool((sampler([1], seed=0, indices=[0]).images_BHWC >= 0).all())


def test_the_calibration_goes_beside_weights_of_the_users_own(folder: Path, capsys):
    with umask(0o002):
        assert main(["--model", str(folder), *FEW]) == 0
    assert f"sample with it by --model {folder}\n" in capsys.readouterr().out
    assert can_use_its_calibration(str(folder))
    assert oct((folder / CALIBRATION_FILE).stat().st_mode & 0o777) == "0o664"
    with pytest.raises(InputError, match="pass --overwrite"):
        main(["--model", str(folder), *FEW])
    assert main(["--model", str(folder), *FEW, "--overwrite"]) == 0


@pytest.mark.parametrize("place", ["package", "link"])
def test_nothing_is_written_into_the_package(place: str, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in BUNDLED.rglob("*")}
    (tmp_path / "link").symlink_to(BUNDLED / "digits")
    flags = [] if place == "package" else ["--model", str(tmp_path / "link")]
    with pytest.raises(InputError, match=r"wanted a folder of your own .*: give --out"):
        main([*flags, *FEW, "--overwrite"])
    assert {path: path.stat().st_mtime_ns for path in BUNDLED.rglob("*")} == before


def test_out_becomes_a_model_folder_with_the_calibration(folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "calibrated"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with umask(0o002):
        assert main(["--model", str(folder), "--out", str(out), *FEW]) == 0
    assert f"sample with it by --model {out}\n" in capsys.readouterr().out
    assert can_use_its_calibration(str(out))
    assert_as_the_umask_has_it(out, 0o002)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    source, copy = load_model(find_model(str(folder))), load_model(find_model(str(out)))
    for name, tensor in source.transformer.state_dict().items():
        assert torch.equal(copy.transformer.state_dict()[name], tensor), name
    assert copy.config == source.config
    assert find_model(str(out)).calibration == out / CALIBRATION_FILE


def test_an_output_that_is_not_empty_is_refused_before_any_work(folder: Path, tmp_path: Path):
    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign)
    for out in (foreign, foreign / "config.json", folder):
        with pytest.raises(InputError, match="exists and is not empty"):
            main(["--model", str(folder), "--out", str(out)])
