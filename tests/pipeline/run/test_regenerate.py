"""Sampling stored images again with the bundled model."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthvar.errors import InputError
from jobs import generate as generate_job
from jobs import verify as verify_job
from pipeline.run.regenerate import regenerate
from pipeline.run.worker import Workplace
from pipeline.shards.committed import committed_shards
from pipeline.shards.samples import pixel_hash
from pipeline.storage import Storage
from tests.fake_shards import committed_anew, make_plan, rewrite_rows, rewrite_tar, write_dataset

BRIGHTER = 50


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """10 digits in 3 shards, by the bundled model."""
    argv = ["--per-class=1", "--samples-per-shard=4", "--batch-size=4", "--contact-sheet=0"]
    out = tmp_path / "out"
    argv += [f"--out={out}", f"--scratch={tmp_path / 'scratch'}", "--workers=0", "--device=cpu"]
    assert generate_job.main(argv) == 0
    return out


def brighten(out: Path, shard_id: int, sample: int) -> None:
    """One pixel of an image gets another grey level; rows and record are made to fit."""
    png = b""
    pixels = np.zeros(0, np.uint8)

    def change_tar(members: list[tuple[str, bytes]]) -> None:
        nonlocal png, pixels
        name, data = members[3 * sample + 2]
        assert name.endswith(".png")
        pixels = np.array(Image.open(io.BytesIO(data)))
        pixels[5, 7] += np.uint8(BRIGHTER) if pixels[5, 7] < 128 else np.uint8(256 - BRIGHTER)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        png = stream.getvalue()
        members[3 * sample + 2] = (name, png)

    def change_rows(rows: list[dict]) -> None:
        rows[sample].update(
            pixel_sha256=pixel_hash(pixels[:, :, None]),
            image_sha256=hashlib.sha256(png).hexdigest(),
            image_bytes=len(png),
        )

    storage = Storage.open(out)
    rewrite_tar(storage, shard_id, change_tar)
    rewrite_rows(storage, shard_id, change_rows)
    committed_anew(storage, shard_id)


@pytest.mark.parametrize(
    ("recorded", "interpreted", "wanted"),
    [
        ({}, True, "plain"),
        ({"kernels": "graph"}, True, "auto"),
        ({"kernels": "triton"}, True, "triton"),
        ({"kernels": "triton"}, False, "auto"),
    ],
)
def test_images_are_made_again_with_the_kernels_and_threads_of_their_record(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: dict[str, str],
    interpreted: bool,
    wanted: str,
):
    """Triton's where this machine runs them: without a GPU only its interpreter does."""
    monkeypatch.setattr("depthvar.triton_pointwise.INTERPRETED", interpreted)
    plan, storage = make_plan(), Storage.open(tmp_path / "out")
    write_dataset(storage, plan, tmp_path)
    records = {
        i: replace(r, environment=json.dumps(json.loads(r.environment) | recorded), threads=3)
        for i, r in committed_shards(storage, plan).items()
    }
    places: list[Workplace] = []

    def stop_here(_: object, place: Workplace) -> None:
        places.append(place)
        raise InputError("seen")

    monkeypatch.setattr("pipeline.run.regenerate.Resampler", stop_here)
    with pytest.raises(InputError, match="seen"):
        regenerate(storage, plan, records, 1, weights=None)
    assert [(place.kernels, place.threads) for place in places] == [(wanted, 3)]


def test_the_bundled_model_makes_the_same_pixels_again_and_tells_what_it_did_not_make(
    real: Path, capsys: pytest.CaptureFixture[str]
):
    argv = [str(real), "--regenerate", "10", "--device", "cpu"]
    assert verify_job.main(argv) == 0
    assert "regenerated 10 images: 10 exact" in capsys.readouterr().out

    brighten(real, shard_id=1, sample=2)
    assert verify_job.main(argv) == 1
    said = capsys.readouterr().out
    assert f"00001  regenerate: 000000000006 differs by up to {BRIGHTER}" in said
    assert f"regenerated 10 images: 9 exact, largest difference {BRIGHTER} of 255" in said
    assert "nothing that was recorded differs" in said

    record = real / "commits" / "00001.json"
    stored = json.loads(record.read_text())
    stored["environment"]["torch"] = "1.0"
    record.write_text(json.dumps({**stored, "threads": 7}))
    assert verify_job.main(argv) == 0, "another environment may make other pixels"
    said = capsys.readouterr().out
    assert f"9 exact, largest difference {BRIGHTER} of 255" in said
    assert "environment  torch: 1.0 then" in said
    assert "environment  threads: 7 then, 1 now" in said
