"""The published shapes and schedules, and sizes of images that are in none."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from depthvar.config import TEXT_MODELS, config_json, model_config, stored_config
from depthvar.errors import InputError
from depthvar.infinity_config import INFINITY_2B, INFINITY_8B, InfinityConfig
from tests.tiny_models import tiny_infinity

SIZES = {
    (1024, 1024): 10521, (1120, 896): 10774, (1152, 864): 10973, (1248, 832): 10997,
    (1344, 768): 11252, (1440, 720): 11269, (1600, 640): 10805, (1776, 592): 11123,
    (592, 1776): 11123, (768, 1344): 11252, (512, 512): 2521, (256, 256): 521,
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_an_image_size_has_the_tokens_of_its_published_schedule(name, size):
    config = TEXT_MODELS[name].of_size(size)
    assert config.image_size == size
    assert config.num_tokens == SIZES[size]
    assert config.grids[0] == (1, 1)
    assert math.prod(config.rotary_grid) >= math.prod(config.grids[-1])


def test_positions_are_spread_over_the_schedule_of_a_million_pixels():
    assert INFINITY_2B.of_size((256, 256)).rotary_grid == (64, 64)
    portrait = INFINITY_2B.of_size((560, 448))
    assert (portrait.grids[-1], portrait.rotary_grid) == ((35, 28), (70, 56))


@pytest.mark.parametrize(("size", "scale"), [((1024, 1024), 9), ((512, 512), 6), ((256, 256), 4)])
def test_the_usual_reference_scale_has_a_quarter_of_the_last_tokens(size, scale):
    assert INFINITY_2B.of_size(size).usual_reference_scale == scale


def test_the_8b_has_two_cells_a_side_in_each_token():
    assert (INFINITY_8B.map_channels, INFINITY_8B.map_size) == (14, (128, 128))
    assert INFINITY_8B.image_size == INFINITY_2B.image_size == (1024, 1024)


def test_a_size_outside_the_schedules_names_the_nearest():
    with pytest.raises(InputError, match=r"no images of 1000x1000 pixels .* nearest are 1024x1024"):
        INFINITY_2B.of_size((1000, 1000))
    with pytest.raises(InputError, match="var-d16 makes images of 256x256 pixels, got 512x256"):
        model_config("var-d16").of_size((256, 512))


def test_a_stored_configuration_comes_back(tmp_path: Path):
    config = tiny_infinity(1)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    assert stored_config(tmp_path) == config


def test_a_known_name_over_other_sizes_is_refused(tmp_path: Path):
    stored = {**config_json(tiny_infinity()), "name": "infinity-2b"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"another architecture .* width 16 \(2048\)"):
        stored_config(tmp_path)
    small = config_json(INFINITY_2B.of_size((512, 512)))
    (tmp_path / "config.json").write_text(json.dumps(small))
    assert stored_config(tmp_path) == INFINITY_2B.of_size((512, 512))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": ((2, 2), (3, 3))}, "wanted 1x1 first"),
        ({"grids": ((1, 1), (3, 3), (2, 2))}, "none smaller than the one before"),
        ({"num_levels": 3}, "4 scales have 3 level embeddings"),
        ({"num_heads": 3}, "does not divide among 3 heads"),
        ({"width": 12}, "channels in fours"),
        ({"pool_heads": 5}, "5 heads of the text pool"),
        ({"num_chunks": 4}, "6 blocks do not divide into 4 chunks"),
        ({"patch": 5}, "12 bits do not divide among 5x5 cells"),
        ({"bits": 0}, "bits is 0, wanted 1 or more"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(changes, message):
    fields = {f: v for f, v in vars(tiny_infinity()).items() if f in asdict(tiny_infinity())}
    with pytest.raises(InputError, match=message):
        InfinityConfig(**{**fields, **changes})
