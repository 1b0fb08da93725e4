"""The calibration job: what it writes, and where it does not write."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from depthvar.errors import InputError
from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.text.states import write_states
from depthvar.weights.checkpoint import (
    convert_weights,
    load_any,
    load_model,
    random_model,
    save_model,
)
from depthvar.weights.files import BUNDLED, CALIBRATION_FILE
from depthvar.weights.find import find_model
from jobs import generate
from jobs.calibrate import main
from pipeline.dataset.loader import iterate_samples, open_dataset
from tests.file_modes import assert_as_the_umask_has_it, umask
from tests.tiny_models import text_states, tiny_infinity, tiny_model, tiny_text_model

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


PROMPTS = ("a red fox", "a tabby cat", "two cranes")


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Flags of three prompts and a file with their states."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    states = dict(zip(PROMPTS, (s.float() for s in text_states((5, 2, 4))), strict=True))
    write_states(tmp_path / "states.safetensors", states)
    return [f"--prompts={tmp_path / 'prompts.txt'}", f"--text-states={tmp_path}/states.safetensors"]


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    model = tiny_text_model(0, torch.float32)
    folder = tmp_path / "tiny-infinity"
    save_model(folder, model.config, model.transformer, model.tokenizer, dtype=torch.float32)
    return folder


def test_a_text_model_without_a_calibration_is_told_the_command_that_makes_one(
    text_folder: Path, words: list[str], tmp_path: Path, capsys
):
    job = [f"--model={text_folder}", *words, "--per-class=2", "--workers=0", "--device=cpu"]
    job += ["--reference-scale=1", "--policy-options", "proxy=calibrated", "--contact-sheet=0"]
    with pytest.raises(
        InputError, match="tiny-infinity has no calibration for images of 10x10"
    ) as e:
        generate.main([*job, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    named = shlex.split(str(e.value).split("`")[1])
    assert named[:2] == ["depthvar", "calibrate"]
    given = [word.replace("FILE", str(tmp_path / "prompts.txt")) for word in named[2:]]
    assert main([*given, words[1], "--samples=5"]) == 0
    told = capsys.readouterr()
    assert "scale 3 (5x5): " in told.out
    assert "calibrate: 100%" in told.err
    assert generate.main([*job, f"--out={tmp_path / 'out'}"]) == 0
    calibrated = load_any(find_model(str(text_folder)))
    policy = make_policy("depthvar-paper", reference_scale=1, proxy="calibrated")
    sampler = Sampler(calibrated, policy, calibrated.config.sampling)
    raw = Sampler(calibrated, make_policy("depthvar-paper", reference_scale=1), sampler.settings)
    samples = list(iterate_samples(open_dataset(str(tmp_path / "out"))))
    states = dict(zip(PROMPTS, (s.float() for s in text_states((5, 2, 4))), strict=True))
    asked = [states[str(sample.prompt)] for sample in samples]
    images = sampler(asked, seed=0, indices=range(6)).images_BHWC
    assert (images == [sample.image for sample in samples]).all()
    assert (images != raw(asked, seed=0, indices=range(6)).images_BHWC).any()


def test_a_calibration_is_for_the_size_of_image_it_was_made_on(words: list[str], tmp_path: Path):
    config = tiny_infinity(0, num_levels=15).of_size((32, 32))
    made, folder = random_model(config), tmp_path / "tiny-infinity"
    save_model(folder, config, made.transformer, made.tokenizer, dtype=torch.float32)
    size = ["--image-size=24x42", "--precision=bfloat16", "--batch-size=2", "--samples=2"]
    assert main([f"--model={folder}", *words, *size]) == 0
    found = find_model(str(folder))
    assert load_any(found).proxy_fit is None
    with pytest.raises(
        InputError, match=r"no calibration for images of 32x32: .* --image-size 32x32"
    ):
        found.require_calibration(found.config, "depthvar-paper")
    for there in (found, convert_weights(found, tmp_path / "moved", dtype=None)):
        sized = replace(there, config=there.config.of_size((42, 24)))
        sized.require_calibration(sized.config, "depthvar-paper")
        assert load_any(sized).proxy_fit is not None


def test_a_calibration_of_other_weights_is_refused(
    text_folder: Path, words: list[str], tmp_path: Path
):
    assert main([f"--model={text_folder}", *words, "--samples=1"]) == 0
    with pytest.raises(InputError, match="pass --overwrite"):
        main([f"--model={text_folder}", *words, "--samples=1"])
    model = tiny_text_model(0, torch.float32)
    state = {**model.transformer.state_dict()}
    state["pos_start"] = state["pos_start"] + 1
    save_file(state, text_folder / "transformer.safetensors")
    with pytest.raises(InputError, match="made from other weights than those beside it"):
        _ = find_model(str(text_folder)).sha256
    assert main([f"--model={text_folder}", *words, "--samples=1", "--overwrite"]) == 0
    assert load_any(find_model(str(text_folder))).proxy_fit is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "got no classes and no prompts, but tiny-infinity makes images from text: give"),
        (["--prompts=none.txt"], "none.txt"),
        (["--class-names=fox", "--image-size=512"], "makes no images of 512x512 pixels"),
        (["--class-names=fox", "--text-states=none"], "which cannot be read as safetensors"),
    ],
    ids=["no words", "no file", "size", "no states"],
)
def test_what_a_text_model_cannot_be_calibrated_on_is_one_line(text_folder, flags, message):
    before = sorted(text_folder.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        main([f"--model={text_folder}", *flags])
    assert "\n" not in str(caught.value)
    assert sorted(text_folder.iterdir()) == before


def test_a_model_of_classes_is_calibrated_without_words(folder: Path, words: list[str]):
    with pytest.raises(InputError, match=r"got --prompts, but .* knows its own classes alone"):
        main(["--model", str(folder), *words[:1], *FEW])
