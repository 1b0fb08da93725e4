"""What `plan` foretells: sizes, depth in words, time and price, and what may not be meant."""

from __future__ import annotations

from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest

from depthvar.config import MODELS
from depthvar.plan import DepthPlan
from depthvar.presets import make_policy
from pipeline.request.job import UNREAD_WEIGHTS
from pipeline.request.job_plan import JobPlan
from pipeline.run.forecast import (
    DIGIT_BYTES,
    PHOTOGRAPH_BYTES,
    Speed,
    depth_table,
    depth_words,
    plan_report,
    plan_warnings,
    speed_report,
)
from pipeline.run.schedule import WorkerShape
from pipeline.shards.committed import committed_shards
from pipeline.shards.manifest import CommitRecord
from pipeline.shards.samples import encode_image
from pipeline.storage import Storage
from tests.fake_shards import make_plan, write_dataset
from tests.measure_throughput import SIDE, photograph

CPU, GPU = WorkerShape(2, 0), WorkerShape(4, 1)
DIGITS = MODELS["digits"]
DEPTH = DepthPlan.build(DIGITS.sides, DIGITS.num_blocks, make_policy("full"))


def report_lines(plan: JobPlan, records: dict[int, CommitRecord]) -> dict[str, str]:
    text = plan_report(plan, DIGITS, DEPTH, records, where="W")
    return {line[:9].strip(): line[10:] for line in text.splitlines()}


@pytest.mark.parametrize("image_format", PHOTOGRAPH_BYTES)
def test_the_bytes_of_a_pixel_are_those_of_photographs(image_format):
    pieces = range(1, 400, 51)
    measured = np.mean([len(encode_image(photograph(i), image_format).image) for i in pieces])
    assert measured / SIDE**2 == pytest.approx(PHOTOGRAPH_BYTES[image_format], rel=0.02)


def test_bytes_are_foretold_from_the_format_until_there_are_shards(tmp_path):
    plan = make_plan(
        {0: 40}, image_size=(32, 32), samples_per_shard=20, depth_map_grids=((1, 1), (2, 2), (3, 3))
    )
    # Header and content of .cls, .json, .png (0.39 of 1,024 pixels) and .depth.npy in blocks of 512
    in_tar = 4 * 1024
    lines = report_lines(plan, {})
    assert lines["bytes"] == (
        f"about {40 * in_tar / 1000:.1f} kB of images, 0.39 bytes a pixel, measured on the bundled"
        " model's digits, until a shard is committed"
    )
    assert lines["shards"] == f"2 of 20 images, about {20 * in_tar / 1000:.1f} kB each"
    raw = report_lines(make_plan(image_channels=3, image_size=(100, 100), png_level=0), {})["bytes"]
    assert "3 bytes a pixel, measured on images that are not compressed" in raw
    assert f"about {22 * (3 * 1024 + 59 * 512 + 512 - 1024) / 1e3:.1f} kB" in raw
    assert set(DIGIT_BYTES) == set(PHOTOGRAPH_BYTES) == {"png", "jpg", "webp"}


def test_bytes_are_those_of_the_shards_once_there_are_some(tmp_path):
    plan = write_dataset(Storage.open(tmp_path / "out"), make_plan(), tmp_path / "scratch")
    record = committed_shards(Storage.open(tmp_path / "out"), plan)[0]
    size = record.files.tar.size / 9 * 22
    assert report_lines(plan, {0: record})["bytes"] == (
        f"about {size / 1000:.1f} kB of images, as in the shards that are committed"
    )


def test_token_layers_are_told_beside_those_of_full_depth():
    assert report_lines(make_plan(), {})["layers"] == "34 token-layers per image, 100 at full depth"


def test_weights_that_were_not_read_give_no_identity():
    unread = make_plan(weights_sha256=UNREAD_WEIGHTS)
    lines = report_lines(unread, {})
    assert lines["model"] == "fake, weights not read, float32"
    assert lines["identity"] == "not known before the weights are read"
    assert report_lines(make_plan(), {})["identity"] == make_plan().fingerprint


def test_the_depth_of_the_scales_is_told_in_words():
    depths = ([4], [4] * 4, [4] * 9, [4, 2, 2, 1], [2] * 25)
    depth = SimpleNamespace(
        num_blocks=4,
        scales=[SimpleNamespace(depths=of_scale) for of_scale in depths],
        mean_depth_per_scale=(4.0, 4.0, 4.0, 2.25, 2.0, 0.0),
        grids=tuple((side, side) for side in range(1, 7)),
    )
    assert depth_words(depth) == (  # type: ignore[arg-type]
        "scales 0-2 (1x1 to 3x3 tokens) all 4 blocks; scale 3 (4x4 tokens) 2.25 of 4 blocks in the"
        " mean, 1 to 4 by token; scale 4 (5x5 tokens) 2 of 4 blocks; scale 5 (6x6 tokens) not"
        " sampled"
    )


@pytest.mark.parametrize(
    ("changes", "workers", "told"),
    [
        ({"samples_per_shard": 11, "batch_size": 11}, 2, []),
        ({"samples_per_shard": 22, "batch_size": 22}, None, []),
        ({"samples_per_shard": 9, "batch_size": 3}, 3,
         ["the last shard holds 4 images, the others 9: choose --samples-per-shard"]),
        ({"samples_per_shard": 11, "batch_size": 4}, 1,
         [("--batch-size 4 does not divide --samples-per-shard 11: every shard ends with a batch "
          "of 3")]),
        ({"samples_per_shard": 11, "batch_size": 12}, 1,
         ["--batch-size 12 is more than --samples-per-shard 11: batches of 11"]),
        ({"samples_per_shard": 22, "batch_size": 22}, 13,
         ["10 shards for 13 workers: 3 of them stay"]),
        ({"samples_per_shard": 44}, 1,
         ["5 shards for training: a loader worker wants one of its own, and a training run often"]),
        ({"samples_per_shard": 1000}, 1, ["1 shard for training: "]),
    ],
)  # fmt: skip
def test_what_may_not_be_meant_is_warned_of(changes, workers, told):
    warnings = plan_warnings(make_plan({0: 220}, **changes), workers)
    assert len(warnings) == len(told)
    assert all(map(str.startswith, warnings, told))


def test_the_depth_of_every_scale_is_a_row():
    depth = SimpleNamespace(
        scales=[SimpleNamespace(prefix=[4, 4, 2, 1])],
        mean_depth_per_scale=(2.75, 0.0),
        grids=((2, 2), (13, 12)),
    )
    assert depth_table(depth).splitlines() == [
        "scale   grid  tokens  depth  tokens x blocks",
        "    0    2x2       4   2.75  4 x 2, 2 x 1, 1 x 1",
        "    1  13x12     156   0.00  not sampled",
    ]


SPEED = Speed("H100", 1, num_images=150, loading_s=4.0, making_s=0.01, writing_s=0.02)


@pytest.mark.parametrize(
    ("shape", "encoders", "rate"),
    [
        (GPU, 4, 100.0),  # the sampler's
        (GPU, 1, 50.0),  # the encoder's
        (WorkerShape(0, 1), 2, 100.0),
        (WorkerShape(1, 0), 1, 1 / 0.03),  # one CPU for both
        (WorkerShape(2, 0), 2, 1 / 0.015),  # two CPUs for both
        (WorkerShape(4, 0), 4, 100.0),
    ],
)
def test_a_worker_is_as_fast_as_its_slowest_part(shape, encoders, rate):
    assert SPEED.images_per_s(shape, encoders) == pytest.approx(rate)


def told(shape: WorkerShape, encoders: int, **changes: object) -> list[str]:
    """Of 3,600,000 images in 3,600 shards."""
    plan = make_plan({0: 3_600_000}, samples_per_shard=1000)
    how = {"workers": 7, "price_per_gpu_hour": None, "now": datetime(2026, 1, 1), **changes}
    return speed_report(plan, SPEED, shape, {}, encoders=encoders, **how)  # type: ignore[arg-type]


def test_hours_and_price_are_those_of_the_gpus_and_the_end_that_of_the_last_shard():
    # 100 images/s; 3,600 shards are 515 rounds of seven workers, of 10 s each.
    assert told(GPU, 4, price_per_gpu_hour=2.5) == [
        "speed     100 images/s of a worker with 1 GPU and 4 CPUs (H100):",
        "          10 ms of sampling and 20 ms of encoding and writing an image, from 150 of them",
        "time      3,600,000 images left: 10 GPU hours;",
        "          7 workers, ready after 4.0 s, take about 1:25:54, until 2026-01-01 01:25",
        "cost      25.00 at 2.5 a GPU hour",
    ]


def test_without_a_gpu_hours_are_called_what_they_are_and_have_no_price():
    lines = told(CPU, 2, price_per_gpu_hour=2.5)
    assert lines[2] == "time      3,600,000 images left: 15 worker hours of 2 CPUs each, no GPU;"
    assert lines[-1] == "cost      not known: no GPU was measured, and the price is of GPU hours"


def test_encoders_that_cannot_keep_up_are_warned_of_with_how_many_would():
    assert told(GPU, 1)[-1] == (
        "warning: 1 encode thread writes 50 images/s, the sampler makes 100: --encode-threads 2"
        " keep up, and --image-format jpg or --png-level 1 take less"
    )
    assert not told(GPU, 2)[-1].startswith("warning")
