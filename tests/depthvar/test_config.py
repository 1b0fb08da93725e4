"""Configurations of models and sampling: the published numbers, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from depthvar.config import MODELS, model_config, small_model_config
from depthvar.errors import InputError
from depthvar.settings import SamplingSettings


@pytest.mark.parametrize(
    ("name", "depth", "num_tokens", "image_side"),
    [
        ("var-d16", 16, 680, 256),
        ("var-d20", 20, 680, 256),
        ("var-d24", 24, 680, 256),
        ("var-d30", 30, 680, 256),
        ("var-d36-512", 36, 2240, 512),
    ],
)
def test_published_models_have_their_published_shape(name, depth, num_tokens, image_side):
    config = model_config(name)
    shape = config.transformer
    assert config.name == name
    assert (config.num_blocks, shape.width, shape.num_heads) == (depth, 64 * depth, depth)
    assert (shape.head_dim, shape.mlp_ratio, shape.norm_eps) == (64, 4, 1e-6)
    assert (shape.codebook_size, shape.code_channels) == (4096, 32)
    assert shape.shared_adaln == (depth == 36)
    assert config.num_classes == len(config.class_names) == 1000
    assert shape.num_tokens == num_tokens
    assert (config.image_side, config.image_channels) == (image_side, 3)
    assert config.sampling == SamplingSettings(cfg=1.5, top_k=900, top_p=0.96)


def test_published_sides():
    assert model_config("var-d16").sides == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert model_config("var-d36-512").sides == (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def test_the_bundled_model_makes_grey_digits_of_32_pixels():
    config = model_config("digits")
    assert config.sides == (1, 2, 3, 4, 5, 6, 8)
    assert config.transformer.num_tokens == 155
    assert (config.image_side, config.image_channels) == (32, 1)
    assert (config.num_blocks, config.num_classes) == (16, 10)
    assert config.class_names[0] == "zero"
    assert config.class_names[9] == "nine"


def test_a_small_model_takes_any_classes_in_grey_or_colour():
    config = small_model_config("pets", ("cat", "dog", "fish"), image_channels=3)
    assert (config.num_classes, config.image_channels, config.image_side) == (3, 3, 32)
    assert config.sides == model_config("digits").sides


def test_the_halves_of_every_model_agree():
    for name, config in MODELS.items():
        assert config.name == name
        assert config.transformer.sides == config.tokenizer.sides == config.sides
        assert config.transformer.codebook_size == config.tokenizer.codebook_size
        assert config.transformer.code_channels == config.tokenizer.code_channels
        assert len(config.tokenizer.phi_of_scale) == len(config.sides)
        assert config.image_side == config.sides[-1] * config.tokenizer.downsampling


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(InputError, match="unknown model 'var-d17', wanted one of digits, var-d16"):
        model_config("var-d17")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg": -0.1}, "cfg is -0.1, wanted a finite number >= 0"),
        ({"cfg": float("inf")}, "cfg is inf"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"top_k": -1}, "top_k is -1, wanted >= 0"),
        ({"top_p": 0.0}, "top_p is 0.0, wanted 0 < top_p <= 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_settings_that_cannot_be_sampled_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SamplingSettings(**options)


def test_guidance_needs_two_streams():
    assert SamplingSettings(cfg=0.0).streams == 1
    assert SamplingSettings(cfg=0.01).streams == 2


@pytest.mark.parametrize(
    "part",
    [
        {"sides": (1, 2, 3)},
        {"codebook_size": 7},
        {"code_channels": 8},
    ],
)
def test_halves_that_disagree_are_refused(part):
    config = model_config("digits")
    with pytest.raises(InputError, match=next(iter(part))):
        dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, **part))


def test_as_many_names_as_classes_are_wanted():
    with pytest.raises(InputError, match="2 class names for 10 classes"):
        dataclasses.replace(model_config("digits"), class_names=("zero", "one"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"width": 95}, "width 95 does not divide among 3 heads"),
        ({"num_blocks": 0}, "num_blocks is 0, wanted 1 or more"),
        ({"sides": (2, 4)}, r"the sides are \(2, 4\), wanted 1 first"),
        ({"sides": (1, 4, 2)}, r"the sides are \(1, 4, 2\)"),
    ],
)
def test_transformers_that_cannot_be_built_are_refused(part, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(model_config("digits").transformer, **part)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"phi_of_scale": (0, 1)}, r"phi_of_scale is \(0, 1\)"),
        ({"image_channels": 4}, "image_channels is 4, wanted 1 for grey or 3 for RGB"),
        ({"norm_groups": 7}, "does not divide into 7 groups"),
    ],
)
def test_tokenizers_that_cannot_be_built_are_refused(part, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(model_config("digits").tokenizer, **part)
