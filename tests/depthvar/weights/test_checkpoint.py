from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from depthvar.config import CONFIG_FILE, model_config
from depthvar.engine import ProxyFit, ScaleTrace
from depthvar.errors import InputError
from depthvar.layers import Attention
from depthvar.pointwise import unit
from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.settings import SamplingSettings
from depthvar.weights import files as weights_files
from depthvar.weights.checkpoint import (
    LoadedModel,
    load_model,
    save_model,
    save_proxy_fit,
)
from depthvar.weights.files import CALIBRATION_FILE, TRANSFORMER_FILE
from depthvar.weights.find import find_model
from depthvar.weights.tensor_files import read_file
from tests.published_weights import (
    BUFFERS,
    TOKENIZER_FILE,
    random_tensors,
    small_transformer_shapes,
    transformer_shapes,
    write_published,
)
from tests.random_weights import write_random_weights

HALVES = (torch.bfloat16, torch.float16)
STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Largest relative error of one rounding to nearest."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_weights(tmp_path_factory.mktemp("digits"))


def load(folder: Path, **how: Any) -> LoadedModel:
    return load_model(find_model("digits", str(folder)), **how)


def states(model: LoadedModel) -> dict[str, Tensor]:
    return {**model.transformer.state_dict(), **model.tokenizer.state_dict()}


def with_calibration(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    config = model_config("digits")
    shape = (len(config.sides), config.num_blocks, config.transformer.width)
    fit = ProxyFit(torch.full(shape, 0.5), torch.zeros(shape))
    save_proxy_fit(target / CALIBRATION_FILE, fit, find_model("digits", str(target)))
    return target


def test_a_model_folder_is_loaded_whole(digits: Path):
    model = load(digits, with_encoder=True)
    stored = {
        **read_file(digits / "transformer.safetensors").tensors,
        **read_file(digits / "tokenizer.safetensors").tensors,
    }
    loaded = states(model)
    assert loaded.keys() == stored.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float()), name
    assert not any(p.requires_grad for p in model.transformer.parameters())
    assert model.device == torch.device("cpu")


def test_a_folder_is_a_model_of_its_own(digits: Path):
    by_folder, by_name = load_model(find_model(str(digits))), load(digits)
    assert by_folder.config == by_name.config
    assert by_folder.config.name == "digits"
    assert by_folder.found == by_name.found


def test_published_names_with_their_buffers_load_at_small_size(digits: Path, tmp_path: Path):
    config = model_config("digits")
    tensors = random_tensors(small_transformer_shapes(config))
    torch.save(tensors, tmp_path / "mine.pth")
    tokenizer = read_file(digits / "tokenizer.safetensors").tensors
    tokenizer["quantize.ema_vocab_hit_SV"] = torch.zeros(10, 512)
    save_file(tokenizer, tmp_path / "tokenizer.safetensors")
    model = load(tmp_path / "mine.pth", dtype=torch.float64)
    loaded = model.transformer.state_dict()
    assert loaded.keys() == {name for name in tensors if not name.endswith(BUFFERS)}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, tensors[name].double()), name


def test_d16_loads_from_its_published_files_and_samples(tmp_path: Path):
    folder = write_published(tmp_path, "var-d16", torch.bfloat16)
    model = load_model(find_model("var-d16", str(folder)), dtype=torch.bfloat16)
    tensors = random_tensors(transformer_shapes("var-d16"), torch.bfloat16)
    loaded = model.transformer.state_dict()
    assert loaded.keys() == {name for name in tensors if not name.endswith(BUFFERS)}
    for name in ("pos_1LC", "blocks.15.ada_lin.1.weight", "head.bias", "class_emb.weight"):
        assert torch.equal(loaded[name], tensors[name]), name
    sampler = Sampler(model, make_policy("skip-scales", skip_last_scales=8), SamplingSettings())
    tokens = sampler.tokens([3], seed=0, indices=[0]).tokens
    assert [t.shape for t in tokens] == [(1, 1), (1, 4)]
    with pytest.raises(InputError, match=r"var_d16.pth holds the transformer of var-d16, wanted"):
        find_model("var-d20", str(folder / "var_d16.pth"))
    with pytest.raises(InputError, match="holds a tokenizer, wanted the transformer of var-d16"):
        find_model("var-d16", str(folder / TOKENIZER_FILE))
    with pytest.raises(
        InputError, match=r"wanted the tokenizer of digits as .*: use --model var-d16$"
    ):
        load(folder / "var_d16.pth")


def test_a_damaged_file_is_told_before_anything_is_loaded(digits: Path, tmp_path: Path):
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    path = folder / TRANSFORMER_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{path}.*is truncated"):
        find_model("digits", str(folder))


def test_the_identity_covers_every_file(digits: Path, tmp_path: Path):
    bare = find_model("digits", str(digits))
    whole = find_model("digits", str(with_calibration(digits, tmp_path / "a")))
    assert bare.sha256 == bare.model_sha256 == whole.model_sha256
    assert whole.sha256 != bare.sha256
    assert find_model("digits", str(with_calibration(digits, tmp_path / "b"))) != whole
    assert find_model("digits", str(tmp_path / "b")).sha256 == whole.sha256
    path = tmp_path / "a" / "tokenizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (tmp_path / "a" / CALIBRATION_FILE).unlink()
    assert find_model("digits", str(tmp_path / "a")).sha256 != bare.sha256


def test_the_files_are_hashed_once_and_only_when_it_is_asked_for(
    digits: Path, monkeypatch: pytest.MonkeyPatch
):
    weights_files._hashed.cache_clear()
    found = find_model("digits", str(digits))
    assert load_model(found).found is found
    assert weights_files._hashed.cache_info().misses == 0
    assert found.sha256 == find_model("digits", str(digits)).sha256
    assert weights_files._hashed.cache_info().misses == 2
    monkeypatch.delattr(weights_files, "_hashed")
    assert len(found.sha256) == 64


def test_a_calibration_of_other_weights_is_told(digits: Path, tmp_path: Path):
    folder = with_calibration(digits, tmp_path / "model")
    assert load(folder).proxy_fit is not None
    path = folder / TRANSFORMER_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for use in (lambda found: found.sha256, load_model):
        with pytest.raises(InputError, match=f"{CALIBRATION_FILE} was made from other weights"):
            use(find_model("digits", str(folder)))


def test_replacing_the_files_leaves_a_loaded_model_alone(tmp_path: Path):
    folder = write_random_weights(tmp_path / "model")
    model = load(folder, dtype=torch.float16)
    before = {name: tensor.clone() for name, tensor in states(model).items()}
    shutil.copytree(folder, tmp_path / "other")
    other = load(tmp_path / "other", with_encoder=True)
    for parameter in other.transformer.parameters():
        parameter.data.zero_()
    save_model(folder, other.config, other.transformer, other.tokenizer)
    assert not load(folder).transformer.head.weight.any()
    for name, tensor in states(model).items():
        assert torch.equal(tensor, before[name]), name
    assert sorted(path.name for path in folder.iterdir()) == [
        CONFIG_FILE, "tokenizer.safetensors", TRANSFORMER_FILE,
    ]  # fmt: skip


def test_the_stored_configuration_is_that_of_the_model(digits: Path):
    content = json.loads((digits / CONFIG_FILE).read_text())
    assert content["format"] == "depthvar-model/1"
    assert model_config(str(digits)) == model_config("digits")


def test_without_asking_there_is_no_encoder(digits: Path):
    names = states(load(digits)).keys()
    assert not any(name.startswith(("encoder.", "quant_conv.")) for name in names)


# Precision. The rules stand at the top of depthvar/weights/checkpoint.py.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_full_precision_every_weight_has_it(digits: Path, dtype: torch.dtype):
    assert {t.dtype for t in states(load(digits, dtype=dtype)).values()} == {dtype}


@pytest.mark.parametrize("dtype", HALVES)
def test_in_half_precision_codebook_phis_and_temperatures_stay_float32(digits: Path, dtype):
    wide = {
        name
        for name, tensor in states(load(digits, dtype=dtype)).items()
        if tensor.dtype == torch.float32
    }
    assert wide == {
        "quantize.embedding.weight",
        *(f"quantize.quant_resi.qresi_ls.{i}.{p}" for i in range(4) for p in ("weight", "bias")),
        *(f"blocks.{i}.attn.scale_mul_1H11" for i in range(16)),
    }


@pytest.mark.parametrize("dtype", HALVES)
def test_in_half_precision_stream_map_and_logits_are_float32_and_not_rounded(digits: Path, dtype):
    model = load(digits, dtype=dtype)
    seen: list[Tensor] = []
    hidden: list[Tensor] = []

    def keep(scale: int, logits_BTV: Tensor, trace: ScaleTrace) -> None:
        seen.append(logits_BTV)
        hidden.append(trace.hidden_GTC)

    sampled = Sampler(model, make_policy("full"), SamplingSettings(1.0, 0, 1.0)).tokens(
        [3, 4], seed=0, indices=[0, 1], on_scale=keep
    )
    for values in (sampled.feature_map_BZHW, *seen, *hidden):
        assert values.dtype == torch.float32
        assert (values.to(dtype).float() != values).float().mean() > 0.9
    assert len(seen) == len(model.config.sides)


@pytest.mark.parametrize("dtype", HALVES)
def test_in_half_precision_logits_differ_from_float32_by_their_inputs_alone(digits: Path, dtype):
    half = load(digits, dtype=dtype).transformer
    condition = half.condition(torch.tensor([1, 2]))
    generator = torch.Generator().manual_seed(0)
    x_GTC = torch.randn(2, 9, half.config.width, generator=generator).to(dtype)
    normed_GTC = half.head_nm(x_GTC, *condition.head)
    wanted = normed_GTC.double() @ half.head.weight.double().T + half.head.bias.double()
    torch.testing.assert_close(half.logits(x_GTC, condition).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("turns", [False, True])
def test_in_half_precision_queries_and_keys_are_rounded_once(digits: Path, dtype, turns):
    attention = load(digits, dtype=dtype).transformer.ordered_blocks[0].attn
    attention.turns = turns
    generator = torch.Generator().manual_seed(0)
    x_GKC = torch.randn(2, 50, 96, generator=generator).to(dtype)
    given: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        wide = torch.float32 if turns else dtype  # what turns them rounds them
        given.extend((unit(q, wide, scale), unit(k, wide)))
        return v

    with torch.inference_mode():
        attention(x_GKC, attention.constants(), attend)
        keys_GHKD, _ = attention.keys_values(x_GKC, attention.constants())
    projected = F.linear(x_GKC, attention.mat_qkv.weight, _bias(attention)).double()
    scales = attention.scale_mul_1H11.double().exp()
    for made, raw, scale in zip(given, projected.chunk(3, dim=2), (scales, 1.0), strict=False):
        raw_GHKD = raw.unflatten(2, (3, -1)).transpose(1, 2)
        wanted = raw_GHKD / raw_GHKD.norm(dim=-1, keepdim=True) * scale
        error = (made.to(dtype).double() - wanted).abs() / wanted.abs()
        assert error[wanted.abs() > 1e-3].max() <= STEP[dtype] * 1.01
    assert torch.equal(keys_GHKD, given[1])


def _bias(attention: Attention) -> Tensor:
    zeros = torch.zeros_like(attention.v_bias)
    return torch.cat([attention.q_bias, zeros, attention.v_bias])


def test_loading_a_model_forbids_products_and_convolutions_of_19_bits(digits: Path):
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = True
        load(digits)
        assert [flag.allow_tf32 for flag in flags] == [False, False]
    finally:
        for flag, allowed in zip(flags, before, strict=True):
            flag.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", HALVES)
def test_a_key_of_length_zero_is_no_nan(dtype: torch.dtype):
    attention = Attention(96, 3, turns=False).to(dtype)
    with torch.inference_mode():
        keys, _ = attention.keys_values(torch.zeros(1, 2, 96, dtype=dtype), attention.constants())
    assert not keys.any()


@pytest.mark.parametrize("dtype", HALVES)
def test_in_half_precision_norms_have_float32_statistics(dtype: torch.dtype):
    """A mean far from zero: statistics in half precision would be off by far more than a step."""
    generator = torch.Generator().manual_seed(0)
    x = (30 + torch.randn(4, 64, 5, 5, generator=generator)).to(dtype)
    group_norm = nn.GroupNorm(8, 64, eps=1e-6)
    pairs = [
        (group_norm.to(dtype)(x), group_norm.double()(x.double())),
        (F.layer_norm(x, (5,), eps=1e-6), F.layer_norm(x.double(), (5,), eps=1e-6)),
    ]
    for made, wanted in pairs:
        assert made.dtype == dtype
        error = (made.double() - wanted).abs() / wanted.abs().clamp(min=1)
        assert error.max() <= STEP[dtype] * 1.01


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_makes_finite_images(digits: Path, dtype: torch.dtype):
    sampler = Sampler(load(digits, dtype=dtype), make_policy("full"), SamplingSettings())
    images = sampler([0, 1, 2], seed=1, indices=[4, 5, 6]).images_BHWC
    assert images.shape == (3, 32, 32, 1)
