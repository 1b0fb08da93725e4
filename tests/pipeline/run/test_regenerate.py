"""Sampling stored images again with the bundled model."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import generate as generate_job
from jobs import verify as verify_job
from pipeline.shards.samples import pixel_hash
from pipeline.storage import Storage
from tests.fake_shards import committed_anew, rewrite_rows, rewrite_tar

BRIGHTER = 50


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """10 digits in 3 shards, by the bundled model."""
    argv = ["--per-class=1", "--samples-per-shard=4", "--batch-size=2", "--contact-sheet=0"]
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
