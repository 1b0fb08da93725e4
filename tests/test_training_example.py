"""The training loop that docs/training.md shows, in one process and in two as torchrun has them."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch

from pipeline.storage import Storage
from tests.fake_shards import make_plan, write_dataset

PAGE = Path(__file__).parent.parent / "docs" / "training.md"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """54 samples in 6 shards."""
    plan = make_plan({0: 20, 1: 14, 2: 20})
    write_dataset(Storage.open(tmp_path / "out"), plan, tmp_path / "scratch")
    return tmp_path / "out"


def example() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(code)


def train(out: Path, told: Path) -> None:
    """Run the example on a dataset and tell how many images it saw and what it learned."""
    torch.manual_seed(int(os.environ.get("RANK", 0)))
    sys.argv = ["train.py", str(out)]
    found: dict[str, object] = {}
    exec(example(), found)
    weights = sum(float(p.abs().sum()) for p in found["model"].parameters())  # type: ignore[attr-defined]
    told.write_text(json.dumps([found["seen"], weights]))


def test_the_example_trains_in_one_process(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", [])
    train(out, tmp_path / "told")
    assert json.loads((tmp_path / "told").read_text())[0] == 54


def test_two_processes_share_the_images_and_learn_the_same(out: Path, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train(out, tmp_path / f"told{rank}")

    forked = multiprocessing.get_context("fork")
    ranks = [forked.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"told{rank}").read_text()) for rank in range(2))
    assert first == second
    assert first[0] == 27
