"""A user's own VAR: the forms its checkpoints come in, and what is read off them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import jobs.generate
from depthvar import imagenet
from depthvar.config import ModelConfig, TokenizerConfig, TransformerConfig, model_config
from depthvar.errors import InputError
from depthvar.var.tokenizer import Tokenizer
from depthvar.var.transformer import Transformer
from depthvar.weights.checkpoint import load_model, save_model
from depthvar.weights.find import find_model
from depthvar.weights.own_model import phi_of_scale
from tests.published_weights import BUFFERS, small_transformer_shapes, write_published
from tests.tiny_models import fill_with_noise

Tensors = dict[str, Tensor]
SIDES = (1, 2, 3, 5, 6)


def config_of(
    name: str = "mine",
    *,
    sides: tuple[int, ...] = SIDES,
    num_classes: int = 3,
    shared_adaln: bool = False,
    num_phis: int = 4,
) -> ModelConfig:
    return ModelConfig(
        name=name,
        transformer=TransformerConfig(
            num_classes=num_classes,
            sides=sides,
            num_blocks=3,
            width=24,
            num_heads=2,
            codebook_size=29,
            code_channels=6,
            mlp_ratio=2,
            shared_adaln=shared_adaln,
        ),
        tokenizer=TokenizerConfig(
            sides=sides,
            phi_of_scale=phi_of_scale(len(sides), num_phis),
            codebook_size=29,
            code_channels=6,
            base_width=32,
            multipliers=(1, 2),
            num_res_blocks=1,
        ),
        class_names=tuple(f"class {i}" for i in range(num_classes)),
    )


def published(config: ModelConfig, seed: int = 0) -> tuple[Tensors, Tensors]:
    """Random weights as the published code names them, buffers included."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensors] = []
    for module in (Transformer(config.transformer), Tokenizer(config.tokenizer)):
        fill_with_noise(module, generator)
        parts.append({name: tensor.detach() for name, tensor in module.state_dict().items()})
    transformer, tokenizer = parts
    for name, shape in small_transformer_shapes(config).items():
        if name.endswith(BUFFERS):
            transformer[name] = torch.zeros(shape)
    levels = [level for level, side in enumerate(config.sides) for _ in range(side * side)]
    transformer["lvl_1L"] = torch.tensor([levels])
    tokenizer["quantize.ema_vocab_hit_SV"] = torch.zeros(len(config.sides), 29)
    return transformer, tokenizer


TRANSFORMER, TOKENIZER = published(config_of())
OTHER = published(config_of(), seed=1)[0]


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def trainer_state(transformer: Tensors, tokenizer: Tensors, **args: object) -> dict[str, Any]:
    """What the published trainer saves."""
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.ones(24), "exp_avg_sq": torch.ones(24)}
    optimizer = {
        "state": {0: moments},
        "param_groups": [{"lr": 1e-4, "params": [0], "fused": True}],
    }
    return {
        "epoch": 7,
        "iter": 0,
        "trainer": {
            "config": {"patch_nums": SIDES, "label_smooth": 0.0, "prog_it": 0},
            "vae_local": tokenizer,
            "var_wo_ddp": transformer,
            "var_opt": {"optimizer": optimizer, "scaler": None},
        },
        "args": {"exp_name": "mine", "bs": 768, "cmd": "--pn 1_2_3_5_6", **args},
    }


def loaded(model: str, weights: Path | None = None) -> Tensors:
    made = load_model(find_model(model, None if weights is None else str(weights)))
    return {**made.transformer.state_dict(), **made.tokenizer.state_dict()}


def assert_is(model: str, transformer: Tensors, weights: Path | None = None) -> None:
    """The model has the weights of a transformer and of the one tokenizer."""
    wanted = {n: t for n, t in {**transformer, **TOKENIZER}.items() if not n.endswith(BUFFERS)}
    found = loaded(model, weights)
    assert found.keys() == {n for n in wanted if not n.startswith(("encoder.", "quant_conv."))}
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name].float()), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer, for transformers of any form."""
    torch.save(TOKENIZER, tmp_path / "vae.pth")
    return tmp_path


# Forms of checkpoints.


def in_type(dtype: torch.dtype) -> Tensors:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in TRANSFORMER.items()}


INNER = {
    name.replace("blocks.1.", "blocks.1._orig_mod.").replace("ffn.", "ffn.module."): tensor
    for name, tensor in TRANSFORMER.items()
}
FORMS: dict[str, tuple[Any, str | None]] = {
    "flat": (TRANSFORMER, None),
    "model": ({"model": TRANSFORMER, "epoch": 3}, "took model; left out epoch"),
    "state_dict": ({"state_dict": TRANSFORMER, "hparams": {"lr": 1.0}}, "left out hparams"),
    "model_state_dict": ({"model_state_dict": TRANSFORMER}, "took model_state_dict"),
    "module": ({"module": TRANSFORMER, "global_steps": 5}, "left out global_steps"),
    "net.var": ({"net": prefixed("var.", TRANSFORMER)}, "took net.var"),
    "DDP": (prefixed("module.", TRANSFORMER), None),
    "compiled": (prefixed("_orig_mod.", TRANSFORMER), None),
    "DDP of compiled": (prefixed("module._orig_mod.", TRANSFORMER), None),
    "compiled DDP": ({"model": prefixed("_orig_mod.module.", TRANSFORMER)}, "took model"),
    "lightning fabric": (prefixed("_forward_module.", TRANSFORMER), None),
    "compiled blocks": (INNER, None),
    "averaged by torch": (
        {"n_averaged": torch.tensor(5), **prefixed("module.", TRANSFORMER)},
        None,
    ),
    "half": (in_type(torch.float16), None),
    "bfloat16": (in_type(torch.bfloat16), None),
    "double": (in_type(torch.float64), None),
    "parameters": (
        {name: nn.Parameter(t, requires_grad=False) for name, t in TRANSFORMER.items()},
        None,
    ),
    "averages beside": (
        {"model": OTHER, "model_ema": TRANSFORMER},
        "took model_ema, moving averages; left out model",
    ),
    "averages of the trainer": (
        {"trainer": {"var_wo_ddp": OTHER, "var_ema": prefixed("module.", TRANSFORMER)}},
        "took trainer.var_ema, moving averages; left out trainer.var_wo_ddp",
    ),
    "ema_state_dict": (
        {"state_dict": OTHER, "ema_state_dict": TRANSFORMER},
        "took ema_state_dict, moving averages",
    ),
    "averages without names": (
        {"model": TRANSFORMER, "ema": {"decay": 0.9, "shadow": [torch.ones(1)]}},
        "took model; left out ema",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_any_form_is_taken_apart(folder: Path, form: str):
    content, note = FORMS[form]
    path = folder / "best.pt"
    is_older = form in ("compiled DDP", "averages beside")
    torch.save(content, path, _use_new_zipfile_serialization=not is_older)
    assert_is(str(folder), content if form in ("half", "bfloat16") else TRANSFORMER)
    notes = find_model(str(folder)).notes
    if note is None:
        assert not any("took" in told for told in notes)
    else:
        assert note in notes[0]
        assert notes[0].startswith(f"{path}: took ")


def test_safetensors_are_taken_apart_too(folder: Path):
    both = {**prefixed("module.", TRANSFORMER), **prefixed("vae.", TOKENIZER)}
    save_file(both, folder / "best.safetensors")
    (folder / "vae.pth").unlink()
    assert_is(str(folder), TRANSFORMER)


class Settings(argparse.Namespace):
    """A class of the training script, which is not there when the file is read."""


ARGUMENTS: dict[str, object] = {
    "a namespace": argparse.Namespace(lr=0.1, resume="x"),
    "a class of the script": Settings(lr=0.1),
    "a path": Path("out"),
    "numbers of numpy": np.float64(0.5),
    "an array of numpy": np.arange(3),
    "a type of torch": torch.bfloat16,
    "nested": [{"a": (argparse.Namespace(b=np.int64(1)),)}],
}


@pytest.mark.parametrize("held", ARGUMENTS)
def test_the_published_trainer_s_file_is_a_model(tmp_path: Path, held: str):
    path = tmp_path / "ar-ckpt-best.pth"
    torch.save(trainer_state(TRANSFORMER, TOKENIZER, extra=ARGUMENTS[held]), path)
    assert_is(str(path), TRANSFORMER)
    found = find_model(str(path))
    assert found.config == config_of("ar-ckpt-best")
    assert found.transformer == found.tokenizer == path
    assert found.notes[0].startswith(
        f"{path}: took trainer.var_wo_ddp and trainer.vae_local; left out args, epoch, iter, "
        "trainer.config, trainer.var_opt"
    )


def test_a_whole_pickled_module_is_read_for_its_tensors(folder: Path):
    module = Transformer(config_of().transformer)
    module.load_state_dict({n: t for n, t in TRANSFORMER.items() if not n.endswith(BUFFERS)})
    module.patch_nums = SIDES  # as the published one has it
    torch.save(module, folder / "whole.pth")
    assert_is(str(folder), TRANSFORMER)


def test_what_is_there_twice_is_not_chosen_from(folder: Path):
    for content, told in (
        ({"last": OTHER, "best": TRANSFORMER}, "the transformer more than once, as best and last"),
        ({"ema_a": OTHER, "ema_b": TRANSFORMER, "m": OTHER}, "as ema_a and ema_b"),
        (
            {**TRANSFORMER, "module.head.bias": OTHER["head.bias"]},
            "holds head.bias more than once",
        ),
    ):
        torch.save(content, folder / "x.pth")
        with pytest.raises(InputError, match=told):
            find_model(str(folder / "x.pth"))


def test_names_that_are_off_are_told_in_the_trainer_s_file_too(tmp_path: Path):
    state = trainer_state(dict(TRANSFORMER), TOKENIZER)
    weights = state["trainer"]["var_wo_ddp"]
    del weights["pos_start"]
    weights["blocks.1.extra"] = torch.ones(2)
    weights["head.bias"] = torch.ones(28)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError) as caught:
        find_model(str(tmp_path / "x.pth"))
    for told in (
        'Missing key(s) in state_dict: "pos_start"',
        'Unexpected key(s) in state_dict: "blocks.1.extra"',
        "size mismatch for head.bias: copying a param with shape torch.Size([28])",
    ):
        assert told in str(caught.value)


# What is read off them.


@pytest.mark.parametrize("shared_adaln", [False, True])
@pytest.mark.parametrize("num_phis", [1, 2, 4])
def test_every_size_is_read_off_the_shapes(tmp_path: Path, shared_adaln: bool, num_phis: int):
    config = config_of(tmp_path.name, shared_adaln=shared_adaln, num_phis=num_phis)
    transformer, tokenizer = published(config)
    torch.save(transformer, tmp_path / "a.pth")
    torch.save(tokenizer, tmp_path / "b.pth")
    assert find_model(str(tmp_path)).config == config


def test_a_published_checkpoint_is_read_as_what_it_is(tmp_path: Path):
    folder = write_published(tmp_path / "shoes", "var-d16", torch.bfloat16)
    state = torch.load(folder / "var_d16.pth")
    del state["lvl_1L"]
    torch.save(state, folder / "var_d16.pth")
    found, known = find_model(str(folder)), model_config("var-d16")
    for part in ("transformer", "tokenizer", "class_names", "sampling"):
        assert getattr(found.config, part) == getattr(known, part)
    assert found.config.name == "shoes"


@pytest.mark.parametrize(
    ("scales", "phis", "wanted"),
    [
        (10, 4, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),  # the published table
        (8, 4, (0, 0, 1, 1, 2, 2, 3, 3)),
        (5, 1, (0, 0, 0, 0, 0)),
        (3, 3, (0, 1, 2)),
        (1, 4, (0,)),
    ],
)
def test_the_nearest_phi_smooths_a_scale(scales: int, phis: int, wanted: tuple[int, ...]):
    assert phi_of_scale(scales, phis) == wanted


@pytest.mark.parametrize("kind", ["one for all", "one each"])
def test_phis_that_are_not_shared_in_part_are_read_too(tmp_path: Path, kind: str):
    """As the published code names them."""
    config = config_of(tmp_path.name, num_phis=1 if kind == "one for all" else len(SIDES))
    transformer, tokenizer = published(config)
    number = "qresi_ls.0." if kind == "one for all" else "qresi_ls."
    stored = "qresi." if kind == "one for all" else ""
    torch.save(transformer, tmp_path / "a.pth")
    torch.save({n.replace(number, stored): t for n, t in tokenizer.items()}, tmp_path / "b.pth")
    assert find_model(str(tmp_path)).config == config


def without_levels(sides: tuple[int, ...]) -> tuple[Tensors, Tensors]:
    transformer, tokenizer = published(config_of(sides=sides))
    del transformer["lvl_1L"]
    return transformer, tokenizer


def test_sides_that_nothing_tells_are_asked_for(tmp_path: Path):
    sides = (1, 1, 5, 5)  # 52 tokens, as 1, 1, 1, 7
    transformer, tokenizer = without_levels(sides)
    path = tmp_path / "x.pth"
    torch.save({**prefixed("a.", transformer), **prefixed("b.", tokenizer)}, path)
    line = '{"patch_nums": [1, 2, ...]}'
    with pytest.raises(InputError) as caught:
        find_model(str(path))
    assert "4 scales of 52 tokens, which several lists of sides" in str(caught.value)
    assert f"write it into {tmp_path / 'config.json'} as {line}" in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"patch_nums": sides}))
    assert find_model(str(path)).config.sides == sides
    (tmp_path / "config.json").write_text(json.dumps({"patch_nums": (1, 1, 4, 5)}))
    with pytest.raises(InputError, match=r"gives the sides \[1, 1, 4, 5\], wanted 4 sides whose"):
        find_model(str(path))
    (tmp_path / "config.json").unlink()
    torch.save(trainer_state(transformer, tokenizer, patch_nums=sides), path)
    with pytest.raises(InputError, match=r"trainer.config.patch_nums gives the sides \[1, 2, 3, 5"):
        find_model(str(path))
    state = trainer_state(transformer, tokenizer, extra=argparse.Namespace(patch_nums=sides))
    del state["trainer"]["config"]
    torch.save(state, path)
    assert find_model(str(path)).config.sides == sides


def test_the_only_sides_that_can_be_are_taken(tmp_path: Path):
    transformer, tokenizer = without_levels((1, 2, 3, 4))
    torch.save({"a": transformer, "b": tokenizer}, tmp_path / "x.pth")
    assert find_model(str(tmp_path / "x.pth")).config.sides == (1, 2, 3, 4)


def test_class_names_come_from_the_file_beside_the_weights(folder: Path):
    torch.save(TRANSFORMER, folder / "a.pth")
    found = find_model(str(folder))
    assert found.config.class_names == ("class 0", "class 1", "class 2")
    told = "the 3 classes are assumed to be called class 0 to class 2: for other names write them "
    assert found.notes == (f"{told}into {folder / 'classes.txt'}, one a line, by class id",)
    (folder / "classes.txt").write_bytes("\ufeffboot\r\nhigh heel\r\n sandale é \r\n\r\n".encode())
    found = find_model(str(folder))
    assert found.config.class_names == ("boot", "high heel", "sandale é")
    assert found.notes == ()
    for text in ("boot\nshoe\n", "boot\n\nshoe\n", "a\nb\nc\nd\n"):
        (folder / "classes.txt").write_text(text)
        with pytest.raises(InputError, match=r"classes.txt holds \d lines, wanted the names of 3"):
            find_model(str(folder))


def test_a_thousand_classes_are_assumed_to_be_imagenet_s_and_said_to_be(tmp_path: Path):
    transformer, tokenizer = published(config_of(num_classes=1000))
    torch.save({"a": transformer, "b": tokenizer}, tmp_path / "x.pth")
    found = find_model(str(tmp_path / "x.pth"))
    assert found.config.class_names == imagenet.CLASS_NAMES
    assert "the 1,000 classes are assumed to be those of ImageNet" in found.notes[-1]


# Which files, and what it is called.


def test_a_folder_a_file_and_a_name_with_weights_give_one_identity(folder: Path):
    torch.save(TRANSFORMER, folder / "a.pth")
    by_folder = find_model(str(folder))
    by_file = find_model(str(folder / "a.pth"))
    by_name = find_model("var", str(folder))
    assert [i.config.name for i in (by_folder, by_file, by_name)] == [folder.name, "a", "var"]
    assert by_folder.sha256 == by_file.sha256 == by_name.sha256
    again = find_model(by_file.config.name, str(folder / "a.pth"))
    assert again == by_file  # a worker knows the name from the plan


def test_a_known_model_s_trainer_file_needs_no_tokenizer_beside_it(tmp_path: Path):
    """Of a model with a config.json, whose shapes are known."""
    config = config_of("mine")
    transformer, tokenizer = Transformer(config.transformer), Tokenizer(config.tokenizer)
    save_model(tmp_path, config, transformer, tokenizer)
    path = tmp_path / "tuned.pth"
    torch.save(trainer_state(TRANSFORMER, TOKENIZER), path)
    found = find_model("mine", str(path))
    assert found.transformer == found.tokenizer == path
    assert found.config == config


def test_several_transformers_are_not_chosen_from(folder: Path):
    for name in ("ar-ckpt-last.pth", "ar-ckpt-best.pth"):
        torch.save(TRANSFORMER, folder / name)
    with pytest.raises(InputError, match=r"ar-ckpt-best.pth, ar-ckpt-last.pth, wanted one: choose"):
        find_model(str(folder))
    assert_is(str(folder / "ar-ckpt-last.pth"), TRANSFORMER)


def test_what_is_no_part_of_the_model_does_not_stand_in_its_way(folder: Path):
    torch.save(TRANSFORMER, folder / "a.pth")
    torch.save({"state": {0: torch.ones(1)}}, folder / "optimizer.pt")
    (folder / "events.bin").write_bytes(b"\x00\x01events")
    (folder / "log.txt").write_text("epoch 1")
    (folder / "dir.pth").mkdir()
    assert_is(str(folder), TRANSFORMER)


def save(content: object, path: Path) -> None:
    torch.save(content, path)


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda f: (f / "vae.pth").unlink(), "holds no weights, wanted the transformer"),
    "no transformer": (lambda f: None, "holds vae.pth, wanted the transformer of a VAR"),
    "no tokenizer": (
        lambda f: (save(TRANSFORMER, f / "a.pth"), (f / "vae.pth").unlink()),
        "holds a.pth, wanted the tokenizer of a VAR",
    ),
    "two that do not belong together": (
        lambda f: save({**TRANSFORMER, "head.weight": torch.ones(30, 24)}, f / "a.pth"),
        "codebook_size 30, the tokenizer's 29",
    ),
    "no norm of queries and keys": (
        lambda f: save({n: t for n, t in TRANSFORMER.items() if "scale_mul" not in n}, f / "a.pth"),
        "blocks.0.attn.scale_mul_1H11 is missing",
    ),
    "a web page": (lambda f: (f / "a.pth").write_text("<!DOCTYPE html>"), "is a web page"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_folder_that_is_no_model_is_told(folder: Path, mistake: str):
    make, told = MISTAKES[mistake]
    make(folder)
    with pytest.raises(InputError) as caught:
        find_model(str(folder))
    assert told in str(caught.value)
    assert str(folder) in str(caught.value)


def test_the_tokenizer_is_no_model(folder: Path):
    with pytest.raises(InputError, match=r"vae.pth holds a tokenizer, wanted the transformer"):
        find_model(str(folder / "vae.pth"))


@pytest.mark.parametrize("name", ["var-d17", "var_d16", "digit", "runs/typo/model", "../no/such"])
def test_a_name_that_is_nearly_a_known_one_or_a_lost_path_is_refused(folder: Path, name: str):
    torch.save(TRANSFORMER, folder / "a.pth")
    with pytest.raises(InputError, match="unknown model"):
        find_model(name, str(folder))


def test_a_folder_called_as_a_known_model_must_hold_it(tmp_path: Path):
    folder = tmp_path / "var-d16"
    folder.mkdir()
    torch.save(TRANSFORMER, folder / "var_d16.pth")
    torch.save(TOKENIZER, folder / "vae_ch160v4096z32.pth")
    with pytest.raises(
        InputError, match=r"holds a transformer of no known model, wanted that of var-d16 \("
    ):
        find_model(str(folder))


def test_a_folder_around_a_model_folder_names_it(tmp_path: Path):
    config = config_of("mine")
    inner = tmp_path / "run" / "model"
    save_model(inner, config, Transformer(config.transformer), Tokenizer(config.tokenizer))
    torch.save({"transformer": TRANSFORMER, "tokenizer": TOKENIZER}, tmp_path / "run/trained.pt")
    told = f"{tmp_path / 'run'} is no model but holds {inner}: pass --model {inner}"
    for model, weights in ((str(tmp_path / "run"), None), ("mine", str(tmp_path / "run"))):
        with pytest.raises(InputError, match=told):
            find_model(model, weights)
    assert find_model(str(inner)).config == config
    assert find_model(str(inner / "config.json")).config == config
    assert find_model(str(inner / "transformer.safetensors")).config == config


def test_a_run_that_has_not_finished_is_told(tmp_path: Path):
    from depthvar.training.run import RECIPE_FILE

    (tmp_path / RECIPE_FILE).write_text("{}")
    with pytest.raises(
        InputError, match=r"holds a run of depthvar train-model that has not finished"
    ):
        find_model(str(tmp_path))


@pytest.mark.parametrize("part", ["transformer", "tokenizer"])
def test_a_config_that_takes_a_known_model_s_name_is_refused(tmp_path: Path, part: str):
    config = config_of("mine")
    save_model(tmp_path, config, Transformer(config.transformer), Tokenizer(config.tokenizer))
    content = json.loads((tmp_path / "config.json").read_text())
    for model in ("var-d16", "digits"):
        known = json.loads(json.dumps(asdict(model_config(model))))
        known[part] |= {{"transformer": "num_blocks", "tokenizer": "num_res_blocks"}[part]: 9}
        (tmp_path / "config.json").write_text(json.dumps({"format": content["format"], **known}))
        for name, weights in ((model, str(tmp_path)), (str(tmp_path), None)):
            with pytest.raises(InputError, match=f"calls its model '{model}' and gives another"):
                find_model(name, weights)


def test_generate_makes_images_of_a_trainer_s_file(tmp_path: Path, capsys):
    path, out = tmp_path / "shoes.pth", tmp_path / "out"
    torch.save(trainer_state(TRANSFORMER, TOKENIZER, ns=argparse.Namespace(a=1)), path)
    (tmp_path / "classes.txt").write_text("boot\nclog\nmule\n")
    flags = ["--model", str(path), "--classes", "clog,2", "--per-class", "1", "--policy", "full"]
    flags += ["--out", str(out), "--workers", "0", "--device", "cpu"]
    assert jobs.generate.main(flags) == 0
    assert f"note: {path}: took trainer.var_wo_ddp" in capsys.readouterr().err
    settings = json.loads((out / "plan.json").read_text())["settings"]
    assert settings["model"] == "shoes"
    assert settings["class_names"] == ["boot", "clog", "mule"]
    assert settings["image_side"] == 12
    assert len(list(out.glob("train/*.tar"))) == 1
    assert jobs.generate.main(flags) == 0
