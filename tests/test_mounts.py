"""Disks that fill up or turn read-only in the middle of a job: real ones, small tmpfs mounts.

Mounting wants rights that not every machine gives; the tests say so where they are skipped.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from depthvar.errors import InputError
from jobs import verify as verify_job
from pipeline.request.generation import GenerateConfig
from pipeline.request.plan_file import read_plan
from pipeline.run.driver import generate
from pipeline.shards.committed import committed_shards
from pipeline.shards.manifest import parquet_name, tar_name
from pipeline.storage import Storage
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fake_shards import data_files
from tests.fakes import open_gate, set_faults, wait_at_gate, wait_for
from tests.fault_hook import FAULTS_VARIABLE

Mount = Callable[[str, str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """`mount(name, size)`: an empty folder that is a file system of its own."""
    mounted: list[Path] = []

    def mount(name: str, size: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    set_faults(tmp_path / "faults.json")
    monkeypatch.setenv(FAULTS_VARIABLE, str(tmp_path / "faults.json"))


def run(out: Path, scratch: Path) -> int:
    """40 images in 5 shards of 8, batches of 4, each tar about 20 kB."""
    config = GenerateConfig(
        out=str(out),
        scratch=scratch,
        workers=0,
        device="cpu",
        per_class=4,
        samples_per_shard=8,
        batch_size=4,
        contact_sheet=0,
    )
    return generate(config, sampler_factory=FAKE_SAMPLER)


def done_in(out: Path) -> list[int]:
    storage = Storage.open(out)
    plan = read_plan(storage)
    assert plan is not None
    return sorted(committed_shards(storage, plan))


def ledger(out: Path) -> list[dict[str, Any]]:
    file = out / "commits" / "failures.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    assert run(tmp_path / "undisturbed", tmp_path / "scratch") == 0
    return data_files(tmp_path / "undisturbed")


def test_an_output_that_turns_read_only_stops_the_job_and_a_rerun_completes(
    mount: Mount, undisturbed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    place, gate = mount("disk", "20m"), tmp_path / "gate"
    out = place / "out"
    set_faults(tmp_path / "faults.json", gate=str(gate), gate_from=20)  # within the third shard
    codes: list[int] = []
    job = threading.Thread(target=lambda: codes.append(run(out, tmp_path / "scratch")))
    job.start()
    wait_at_gate(gate, 1)
    wait_for(lambda: done_in(out) == [0, 1])  # shards are committed beside the sampling
    remount(place, "ro")
    open_gate(gate)
    job.join(timeout=60)
    assert codes == [1]
    said = capsys.readouterr().err
    assert "5 shards in a row could not be stored" in said
    assert "Read-only file system" in said
    assert f": have {place} mounted writable, or choose another place" in said
    assert "missing: 3 shards: 2-4" in said
    assert done_in(out) == [0, 1]
    assert not list((tmp_path / "scratch").glob("*/shard-*"))

    set_faults(tmp_path / "faults.json")
    with pytest.raises(InputError, match=f"is not writable: have {place} mounted writable"):
        run(out, tmp_path / "scratch")
    remount(place, "rw")
    assert run(out, tmp_path / "scratch") == 0
    assert data_files(out) == undisturbed
    assert verify_job.main([str(out), "--deep"]) == 0


def test_a_plan_that_finds_no_room_says_which_disk_is_full(mount: Mount, tmp_path: Path):
    small = mount("disk", "16k")
    (small / "filler").write_bytes(bytes(16 * 1024))
    with pytest.raises(InputError) as caught:
        run(small / "out", tmp_path / "scratch")
    assert f"free space on {small}: it is full" in str(caught.value)
    assert "permissions" not in str(caught.value)
    (small / "filler").unlink()
    remount(small, "size=20m")
    assert run(small / "out", tmp_path / "scratch") == 0


@pytest.mark.parametrize("full", ["output", "scratch"])
def test_a_disk_that_fills_up_within_a_shard_loses_nothing_once_there_is_room(
    full: str,
    mount: Mount,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    small = mount("disk", "64k" if full == "output" else "16k")
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    out, scratch = (small / "out", scratch) if full == "output" else (out, small / "scratch")
    assert run(out, scratch) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "shards in a row could not be stored" in said
    assert f": free space on {small}: it is full" in said
    assert "run the same command again" in said
    assert "--retry-failed" not in said
    assert {entry["cause"] for entry in ledger(out)} <= {"storage"}
    made = done_in(out)
    assert len(made) < 5
    assert bool(made) == (full == "output"), "the small output has room for some shards"
    assert not [f for f in out.rglob("*") if f.name.startswith(".tmp-")]
    for name in [name for i in made for name in (tar_name(i), parquet_name(i))]:
        assert (out / name).read_bytes() == undisturbed[name]

    remount(small, "size=20m")
    assert run(out, scratch) == 0
    assert data_files(out) == undisturbed
    assert verify_job.main([str(out), "--deep"]) == 0
