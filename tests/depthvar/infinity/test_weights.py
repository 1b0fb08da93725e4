"""The published files of a text model: names, shapes, and what is no such file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from depthvar.config import config_json
from depthvar.errors import InputError
from depthvar.infinity_config import INFINITY_2B, INFINITY_8B, InfinityConfig
from depthvar.weights.checkpoint import LoadedTextModel, load_any, load_model
from depthvar.weights.find import blank_part, find_model
from depthvar.weights.tensor_files import PARTS
from tests.tiny_models import tiny_infinity, tiny_text_model


def published_shapes(config: InfinityConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published transformer, written out from the description of its files."""
    width, heads, bits, text = config.width, config.num_heads, config.bits, config.text_width
    per_block: dict[str, tuple[int, ...]] = {
        "ada_gss": (1, 1, 6, width),
        "sa.scale_mul_1H11": (1, heads, 1, 1),
        "sa.q_bias": (width,), "sa.v_bias": (width,), "sa.zero_k_bias": (width,),
        "sa.mat_qkv.weight": (3 * width, width),
        "sa.proj.weight": (width, width), "sa.proj.bias": (width,),
        "ca.mat_q.weight": (width, width), "ca.mat_q.bias": (width,),
        "ca.mat_kv.weight": (2 * width, width),
        "ca.v_bias": (width,), "ca.zero_k_bias": (width,),
        "ca.proj.weight": (width, width), "ca.proj.bias": (width,),
        "ca_norm.weight": (width,), "ca_norm.bias": (width,),
        "ffn.fc1.weight": (config.mlp_width, width), "ffn.fc1.bias": (config.mlp_width,),
        "ffn.fc2.weight": (width, config.mlp_width), "ffn.fc2.bias": (width,),
    }  # fmt: skip
    pool = "text_proj_for_sos.ca"
    shapes: dict[str, tuple[int, ...]] = {
        "cfg_uncond": (config.max_text_tokens, text),
        "text_norm.weight": (text,),
        f"{pool}.mat_q": (1, config.pool_heads, width // config.pool_heads),
        f"{pool}.mat_kv.weight": (2 * width, text),
        f"{pool}.v_bias": (width,), f"{pool}.zero_k_bias": (width,),
        f"{pool}.proj.weight": (width, width), f"{pool}.proj.bias": (width,),
        "text_proj_for_ca.0.weight": (width, text), "text_proj_for_ca.0.bias": (width,),
        "text_proj_for_ca.2.weight": (width, width), "text_proj_for_ca.2.bias": (width,),
        "pos_start": (1, 1, width),
        "lvl_embed.weight": (config.num_levels, width),
        "word_embed.weight": (width, bits), "word_embed.bias": (width,),
        "shared_ada_lin.1.weight": (6 * width, width), "shared_ada_lin.1.bias": (6 * width,),
        "head_nm.ada_lin.1.weight": (2 * width, width), "head_nm.ada_lin.1.bias": (2 * width,),
        "head.weight": (2 * bits, width), "head.bias": (2 * bits,),
    }  # fmt: skip
    each = config.num_blocks // config.num_chunks
    for block in range(config.num_blocks):
        prefix = f"block_chunks.{block // each}.module.{block % each}"
        shapes |= {f"{prefix}.{name}": shape for name, shape in per_block.items()}
    return shapes


def published_state(config: InfinityConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors and the zero buffers of the published file."""
    shapes = published_shapes(config)
    return {name: ours.get(name, torch.zeros(shape)) for name, shape in shapes.items()}


def published_tokenizer(ours: dict[str, Tensor]) -> dict[str, Any]:
    """As the published file nests it: layers in wrappers, an encoder, a mask, other modules."""
    renamed = {}
    for name, tensor in ours.items():
        stem, leaf = name.rsplit(".", 1)
        inner = "norm" if "norm" in stem.rsplit(".", 1)[-1] else "conv"
        renamed[f"{stem}.{inner}.{leaf}"] = tensor
    renamed["encoder.conv_in.conv.weight"] = torch.zeros(4, 3, 3, 3)
    renamed["quantizer.lfq.mask"] = torch.zeros(12, dtype=torch.int64)
    renamed["quantize.lfq.mask"] = torch.zeros(12, dtype=torch.int64)
    return {"vae": renamed, "args": {"lr": 1.0}, "discriminator": {"w": torch.zeros(2)}}


def read(path: Path) -> dict[str, Tensor]:
    """A checkpoint, whatever its suffix says."""
    with open(path, "rb") as file:
        state: dict[str, Tensor] = torch.load(file)
    return state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model under the names of the published files, and the configuration that it needs."""
    model = tiny_text_model(0, torch.float32)
    state = published_state(model.config, model.transformer.state_dict())
    tokenizer = published_tokenizer(model.tokenizer.state_dict())
    torch.save(state, tmp_path / "transformer.safetensors")
    torch.save(tokenizer, tmp_path / "tokenizer.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(model.config)))
    return tmp_path


@pytest.mark.parametrize("config", [INFINITY_2B, INFINITY_8B], ids=lambda config: config.name)
def test_the_published_names_and_shapes_are_those_of_the_modules(config):
    transformer, tokenizer = (blank_part(config, part) for part in PARTS)
    ours = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    wanted = published_shapes(config)
    assert ours == {name: shape for name, shape in wanted.items() if "zero_k_bias" not in name}
    if config is INFINITY_2B:
        assert len(wanted) == 694
        assert sum(p.numel() for p in tokenizer.parameters()) == 65_092_355


def test_the_published_files_load_with_their_buffers_wrappers_and_rest(folder: Path):
    found = find_model(str(folder))
    assert found.notes == (
        f"{folder / 'tokenizer.safetensors'}: took vae; left out args, discriminator",
    )
    loaded, wanted = load_any(found), tiny_text_model(0, torch.float32)
    assert isinstance(loaded, LoadedTextModel)
    for part in ("transformer", "tokenizer"):
        ours, theirs = (getattr(m, part).state_dict() for m in (loaded, wanted))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_names_without_the_inner_layers_load_too(folder: Path):
    state = tiny_text_model(0, torch.float32).tokenizer.state_dict()
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "tokenizer.safetensors")
    load_any(find_model(str(folder)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("head.bias"), 'Missing key.*"head.bias"'),
        (lambda state: state.update(extra=torch.zeros(1)), 'Unexpected key.*"extra"'),
        (lambda state: state.update({"pos_start": torch.zeros(1, 1, 8)}), "size mismatch for pos"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_file_of_other_tensors_is_refused(folder: Path, damage, message):
    path = folder / "transformer.safetensors"
    state = read(path)
    damage(state)
    torch.save(state, path)
    with pytest.raises(InputError, match=f"wanted that of tiny-infinity .*{message}"):
        find_model(str(folder))


def test_the_tokenizer_of_another_model_is_refused(folder: Path):
    state = tiny_text_model(1, torch.float32).tokenizer.state_dict()
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "tokenizer.safetensors")
    with pytest.raises(InputError, match="holds a tokenizer of no known model"):
        find_model(str(folder))


def test_an_index_of_safetensors_is_read_with_all_that_it_names(folder: Path):
    state = read(folder / "transformer.safetensors")
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: state[n].contiguous() for n in part}, folder / f"part-{number}.safetensors")
    where = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    whole = find_model(str(folder)).sha256
    (folder / "transformer.safetensors").unlink()
    found = find_model("tiny-infinity", str(index))
    loaded = load_any(found)
    wanted = tiny_text_model(0, torch.float32).transformer.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in loaded.transformer.state_dict().items())
    assert found.sha256 != whole
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"names part-1.safetensors, wanted files beside it"):
        find_model("tiny-infinity", str(index))


def test_what_works_on_models_of_classes_says_so(folder: Path):
    with pytest.raises(InputError, match="tiny-infinity is asked in words, wanted a model"):
        load_model(find_model(str(folder)))


def test_a_folder_without_the_files_says_what_they_are_called(tmp_path: Path):
    (tmp_path / "infinity_vae_d32.pth").write_bytes(b"")
    with pytest.raises(InputError, match="wanted the transformer of infinity-2b as infinity_2b"):
        find_model("infinity-2b", str(tmp_path))


def test_positions_are_rounded_half_to_even():
    """20 rows over 70: row 1 is at 3.5 and row 3 at 10.5."""
    config = tiny_infinity(0, grids=((1, 1), (20, 20)), rotary_grid=(70, 70))
    transformer = blank_part(config, "transformer")
    rotations_TD = transformer.rotations(1)
    angle = torch.atan2(rotations_TD[:, 4], rotations_TD[:, 0])  # the row's first frequency is 1
    for row, position in ((1, 4), (3, 10), (5, 18)):
        assert angle[row * 20].item() == pytest.approx(
            (position + 3.14159265) % 6.2831853 - 3.14159265, abs=1e-6
        )
