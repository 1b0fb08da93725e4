from __future__ import annotations

import dataclasses
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from depthvar.config import MODELS, ModelConfig, model_config
from depthvar.errors import InputError
from depthvar.weights.find import blank_part, check_fit
from depthvar.weights.tensor_files import PARTS, Part, WeightsFile, read_file
from tests.published_weights import (
    BUFFERS,
    PUBLISHED,
    meta,
    small_transformer_shapes,
    tokenizer_shapes,
    transformer_shapes,
)

FILE = Path("weights.pth")
D16 = model_config("var-d16")
PARAMETERS = {  # billions, as published
    "var-d16": 0.310,
    "var-d20": 0.601,
    "var-d24": 1.033,
    "var-d30": 2.010,
    "var-d36-512": 2.354,
}


def check(config: ModelConfig, part: Part, header: dict[str, Tensor]) -> None:
    check_fit(WeightsFile(FILE, header, {}), config, part)


def shapes_of(config: ModelConfig, part: Part) -> dict[str, tuple[int, ...]]:
    module = blank_part(config, part, with_encoder=True)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def problem(config: ModelConfig, part: Part, header: dict[str, Tensor]) -> str:
    with pytest.raises(InputError) as caught:
        check(config, part, header)
    assert "\n" not in str(caught.value)
    assert str(FILE) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_published_names_and_shapes_fit_with_their_buffers(model: str):
    config = model_config(model)
    header = meta(transformer_shapes(model))
    check(config, "transformer", header)
    check(config, "tokenizer", meta(tokenizer_shapes()))
    wanted = {n: s for n, s in transformer_shapes(model).items() if not n.endswith(BUFFERS)}
    assert shapes_of(config, "transformer") == wanted
    count = sum(torch.Size(shape).numel() for shape in wanted.values())
    assert round(count / 1e9, 3) == PARAMETERS[model]


def test_the_published_tokenizer_has_its_published_size():
    shapes = {n: s for n, s in tokenizer_shapes().items() if not n.endswith(BUFFERS)}
    assert shapes_of(D16, "tokenizer") == shapes
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(sizes.values()) == pytest.approx(108.9e6, rel=1e-3)
    decoder = sum(size for name, size in sizes.items() if name.startswith("decoder."))
    assert decoder == pytest.approx(64.65e6, rel=1e-3)


def test_exactly_the_published_buffers_are_dropped():
    for part, shapes, count in (
        ("transformer", transformer_shapes("var-d16"), 2 + 16),
        ("tokenizer", tokenizer_shapes(), 1),
    ):
        dropped = set(shapes) - set(WeightsFile(FILE, meta(shapes), {}).parameters(part))
        assert dropped == {name for name in shapes if name.endswith(BUFFERS)}
        assert len(dropped) == count
    almost = meta(transformer_shapes("var-d16"))
    almost["other.lvl_1L"] = almost["lvl_1L"]
    almost["blocks.3.zero_k_bias"] = almost["blocks.3.attn.q_bias"]
    told = problem(D16, "transformer", almost)
    assert 'Unexpected key(s) in state_dict: "other.lvl_1L", "blocks.3.zero_k_bias"' in told


def test_files_without_the_buffers_fit_too():
    shapes = {n: s for n, s in transformer_shapes("var-d16").items() if not n.endswith(BUFFERS)}
    check(D16, "transformer", meta(shapes))


@pytest.mark.parametrize(("held", "wanted"), list(pairwise([*PUBLISHED, next(iter(PUBLISHED))])))
def test_the_wrong_depth_is_told_with_the_model_that_fits(held: str, wanted: str):
    told = problem(model_config(wanted), "transformer", meta(transformer_shapes(held)))
    assert f"holds the transformer of {held}, wanted that of {wanted}: use --model {held}" in told


def test_the_wrong_resolution_is_told():
    transformer = dataclasses.replace(D16.transformer, sides=PUBLISHED["var-d36-512"][1])
    tokenizer = dataclasses.replace(D16.tokenizer, sides=transformer.sides)
    at_512 = dataclasses.replace(D16, name="d16-512", transformer=transformer, tokenizer=tokenizer)
    told = problem(at_512, "transformer", meta(transformer_shapes("var-d16")))
    assert "holds the transformer of var-d16, wanted that of d16-512" in told
    told = problem(D16, "transformer", meta(small_transformer_shapes(at_512)))
    assert "no known model" in told
    assert "pos_1LC: copying a param with shape torch.Size([1, 2240, 1024])" in told


def test_the_two_parts_are_told_apart():
    told = problem(D16, "transformer", meta(tokenizer_shapes()))
    assert "holds a tokenizer, wanted the transformer of var-d16" in told
    told = problem(D16, "tokenizer", meta(transformer_shapes("var-d16")))
    assert "holds a transformer, wanted the tokenizer of var-d16" in told
    calibration = {"slope": torch.empty(1), "offset": torch.empty(1)}
    assert "holds a calibration" in problem(D16, "transformer", calibration)
    foreign = {"layer1.0.conv1.weight": torch.empty(1)}
    assert "first tensors: layer1.0.conv1.weight" in problem(D16, "transformer", foreign)
    assert "nothing" in problem(D16, "transformer", {})
    told = problem(model_config("digits"), "tokenizer", meta(tokenizer_shapes()))
    assert "holds the tokenizer of var-d16" in told


def test_what_is_off_is_told_by_its_first_names_is_told():
    header = meta(transformer_shapes("var-d16"))
    for i in (0, 1, 2, 7):
        del header[f"blocks.{i}.attn.q_bias"]
    del header["pos_start"]
    header["head.scale"] = torch.empty(3, device="meta")
    header["word_embed.bias"] = torch.empty(7, device="meta")
    header["head.bias"] = torch.empty(4096, device="meta", dtype=torch.int8)
    told = problem(D16, "transformer", header)
    for part in (
        "holds a transformer of no known model, wanted that of var-d16 (",
        '(s) in state_dict: "pos_start", "blocks.0.attn.q_bias", "blocks.1.attn.q_bias", ...;',
        'Unexpected key(s) in state_dict: "head.scale";',
        "size mismatch for word_embed.bias: copying a param with shape torch.Size([7]) from ",
        "the shape in current model is torch.Size([1024])",
        'the parameter named "head.bias"',
        "Only Tensors of floating point",
        "or use --model weights.pth for a VAR of your own",
    ):
        assert part in told


def test_a_tokenizer_may_lack_its_whole_encoder_and_no_part_of_it():
    header = meta(tokenizer_shapes())
    without = {n: t for n, t in header.items() if not n.startswith(("encoder.", "quant_conv."))}
    check(D16, "tokenizer", without)
    whole = WeightsFile(FILE, header, {})
    assert set(whole.parameters("tokenizer", with_encoder=False)) < set(without)
    part = {**without, "quant_conv.bias": header["quant_conv.bias"]}
    assert 'Missing key(s) in state_dict: "encoder.conv_in.weight"' in problem(
        D16, "tokenizer", part
    )


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("is_safetensors", [True, False])
def test_what_a_file_is_is_told_by_its_bytes(tmp_path: Path, name: str, is_safetensors: bool):
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.ones((), dtype=torch.int64),
    }
    path = tmp_path / name
    (save_file if is_safetensors else torch.save)(tensors, path)
    read = read_file(path).tensors
    assert read.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)


def test_the_older_kind_of_checkpoint_is_read(tmp_path: Path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_file(path).tensors["a"], torch.ones(3))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_file_is_told(tmp_path: Path, name: str, share: float):
    path = tmp_path / name
    tensors = {f"t{i}": torch.randn(200) for i in range(40)}
    if name.endswith(".pth"):
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r"bytes\) is truncated or no file of weights") as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, is_zip: bool):
    path, target = tmp_path / "w.pth", tmp_path / "executed"
    content = {"a": torch.ones(2), "b": Malicious(target)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError, match=r"refers to code \(posix.system\)"):
        read_file(path)
    assert not target.exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), 3])
def test_a_checkpoint_of_another_form_is_told(tmp_path: Path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"holds a \w+, wanted tensors by name: save the"):
        read_file(tmp_path / "w.pth")


def test_every_known_model_has_shapes_of_its_own():
    shapes = {tuple(sorted(shapes_of(m, "transformer").items())) for m in MODELS.values()}
    assert len(shapes) == len(MODELS)


def test_a_model_without_storage_draws_no_noise(monkeypatch: pytest.MonkeyPatch):
    """Torch would import its compiler for it: seconds of every process that finds a model."""

    def drawn(tensor: Tensor, *_: object, **__: object) -> Tensor:
        raise AssertionError(tensor.device)

    monkeypatch.setattr(Tensor, "normal_", drawn)
    transformer, tokenizer = (blank_part(D16, part) for part in PARTS)
    assert transformer.class_emb.weight.is_meta
    assert tokenizer.quantize.embedding.weight.is_meta
