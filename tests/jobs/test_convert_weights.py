from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from depthvar.config import model_config
from depthvar.engine import ProxyFit
from depthvar.errors import InputError
from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.settings import SamplingSettings
from depthvar.weights.checkpoint import load_model, save_model, save_proxy_fit
from depthvar.weights.files import CALIBRATION_FILE, TOKENIZER_FILE, TRANSFORMER_FILE
from depthvar.weights.find import find_model
from jobs.convert_weights import main
from tests.file_modes import assert_as_the_umask_has_it, umask
from tests.published_weights import BUFFERS, random_tensors, small_transformer_shapes
from tests.random_weights import write_random_weights


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 model folder with a calibration."""
    folder = write_random_weights(tmp_path_factory.mktemp("wide"))
    model = load_model(find_model("digits", str(folder)), with_encoder=True)
    save_model(folder, model.config, model.transformer, model.tokenizer, dtype=torch.float32)
    shape = (len(model.config.sides), model.config.num_blocks, model.config.transformer.width)
    fit = ProxyFit(torch.full(shape, 0.25), torch.full(shape, -1.0))
    save_proxy_fit(folder / CALIBRATION_FILE, fit, find_model("digits", str(folder)))
    return folder


def convert(model: str, weights: Path, out: Path, *flags: str) -> int:
    return main(["--model", model, "--weights", str(weights), "--out", str(out), *flags])


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_every_tensor_is_rounded_but_those_that_run_in_float32(wide: Path, tmp_path, precision):
    dtype = getattr(torch, precision)
    out = tmp_path / "out"
    with umask(0o002):
        assert convert("digits", wide, out, "--precision", precision, "--keep-encoder") == 0
    assert_as_the_umask_has_it(out, 0o002)
    for file in (TRANSFORMER_FILE, TOKENIZER_FILE):
        before, after = load_file(wide / file), load_file(tmp_path / "out" / file)
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            stays = name.startswith("quantize.") or name.endswith("scale_mul_1H11")
            assert tensor.dtype == (torch.float32 if stays else dtype)
            assert torch.equal(tensor, before[name].to(tensor.dtype)), name


def test_a_converted_model_samples_what_rounded_weights_sample(wide: Path, tmp_path: Path, capsys):
    assert convert("digits", wide, tmp_path / "out") == 0
    assert "transformer: " in capsys.readouterr().out
    tokens = []
    for folder in (wide, tmp_path / "out"):
        model = load_model(find_model("digits", str(folder)), dtype=torch.float16)
        sampler = Sampler(model, make_policy("full"), SamplingSettings(1.0, 0, 0.9))
        tokens.append(torch.cat(sampler.tokens([3, 4], seed=0, indices=[0, 1]).tokens, dim=1))
    assert torch.equal(*tokens)


def test_a_calibration_goes_along_and_belongs_to_the_new_files(wide: Path, tmp_path: Path):
    convert("digits", wide, tmp_path / "out")
    before, after = (load_model(find_model("digits", str(f))) for f in (wide, tmp_path / "out"))
    assert after.found.sha256 != before.found.sha256
    assert before.proxy_fit is not None
    assert after.proxy_fit is not None
    assert torch.equal(after.proxy_fit.slope_SLC, before.proxy_fit.slope_SLC)


def test_the_encoder_is_left_out_unless_asked_for(wide: Path, tmp_path: Path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    convert("digits", wide, whole, "--keep-encoder")
    convert("digits", wide, half)
    with safe_open(half / TOKENIZER_FILE, framework="pt") as file:
        assert not any(name.startswith(("encoder.", "quant_conv.")) for name in file.keys())  # noqa: SIM118
    images = [
        Sampler(load_model(find_model("digits", str(f))), make_policy("full"), SamplingSettings())(
            [1], seed=0, indices=[0]
        ).images_BHWC
        for f in (whole, half)
    ]
    assert (images[0] == images[1]).all()
    load_model(find_model("digits", str(whole)), with_encoder=True)
    with pytest.raises(InputError, match="holds no encoder, wanted one"):
        load_model(find_model("digits", str(half)), with_encoder=True)
    with pytest.raises(InputError, match="holds no encoder, wanted one"):
        convert("digits", half, tmp_path / "again", "--keep-encoder")
    assert not (tmp_path / "again").exists()


def test_published_names_become_a_model_folder(wide: Path, tmp_path, monkeypatch):
    """At the small size; `tests.measure_loading` does it with d16."""
    config = model_config("digits")
    tensors = random_tensors(small_transformer_shapes(config))
    torch.save(tensors, tmp_path / "mine.pth")
    shutil.copy(wide / TOKENIZER_FILE, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert convert("digits", Path("mine.pth"), Path("half")) == 0
    names = sorted(path.name for path in (tmp_path / "half").iterdir())
    assert names == ["config.json", TOKENIZER_FILE, TRANSFORMER_FILE]
    converted = load_file(tmp_path / "half" / TRANSFORMER_FILE)
    assert converted.keys() == {name for name in tensors if not name.endswith(BUFFERS)}
    find_model("digits", "half")
    with pytest.raises(InputError, match="holds the model 'digits', wanted 'var-d20'"):
        find_model("var-d20", "half")


def test_a_folder_that_is_not_empty_is_refused(wide: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    for out in (tmp_path / "out", wide):
        with pytest.raises(InputError, match="exists and is not empty"):
            convert("digits", wide, out)
    with pytest.raises(InputError, match=r"--out \S+, but \S+mine\.txt is a file: choose a folder"):
        convert("digits", wide, tmp_path / "out" / "mine.txt")
    (tmp_path / "out" / "mine.txt").unlink()
    assert convert("digits", wide, tmp_path / "out") == 0


def test_values_that_do_not_fit_are_refused_and_leave_nothing(wide: Path, tmp_path: Path):
    model = load_model(find_model("digits", str(wide)), with_encoder=True)
    model.transformer.head.bias[3] = 1e6
    large = tmp_path / "large"
    save_model(large, model.config, model.transformer, model.tokenizer, dtype=torch.float32)
    with pytest.raises(InputError, match=r"values in head.bias that .*float16 cannot hold"):
        convert("digits", large, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    assert convert("digits", large, tmp_path / "out", "--precision", "bfloat16") == 0
    model.transformer.head.bias[3] = torch.nan
    save_model(large, model.config, model.transformer, model.tokenizer, dtype=torch.float32)
    with pytest.raises(InputError, match=r"numbers that are not finite in head.bias: it is damag"):
        convert("digits", large, tmp_path / "again", "--precision", "bfloat16")


def test_a_model_of_the_users_own_keeps_its_name(tmp_path: Path):
    source = write_random_weights(tmp_path / "run" / "model")
    model = load_model(find_model(str(source)), with_encoder=True)
    config = dataclasses.replace(model.config, name="shoes")
    save_model(source, config, model.transformer, model.tokenizer)
    assert main(["--model", str(source), "--out", str(tmp_path / "out")]) == 0
    assert model_config(str(tmp_path / "out")).name == "shoes"
    assert load_model(find_model("shoes", str(tmp_path / "out"))).config == config
