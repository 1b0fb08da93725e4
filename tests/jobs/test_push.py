"""`depthvar push` with the real client, against a stand-in of the Hub's API on this machine.

Large files go by LFS here; by Xet, which a client with hf_xet takes to the real Hub, none was sent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from depthvar.errors import InputError
from jobs import push as push_job
from pipeline.dataset import push
from pipeline.request.plan_file import open_plan
from pipeline.shards.committed import Dataset, committed_shards
from pipeline.storage import Storage
from tests.fake_hub import TOKEN, FakeHub, running_hub
from tests.fake_shards import make_plan, object_store, publish_one, write_dataset

REPO = "me/digits"
DESCRIPTIONS = {"README.md", "_info.json", "index.json", "plan.json", "sizes.json"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with running_hub() as hub:
        here = partial(huggingface_hub.HfApi, endpoint=hub.endpoint)
        monkeypatch.setattr(huggingface_hub, "HfApi", here)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(push, "_STEP_SHARDS", 2)
        yield hub


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """22 samples in 3 shards."""
    write_dataset(Storage.open(tmp_path / "out"), make_plan(), tmp_path / "scratch")
    return tmp_path / "out"


def shard_files(*ids: int) -> set[str]:
    kinds = {"train": "tar", "meta": "parquet", "commits": "json"}
    return {f"{folder}/{i:05d}.{kind}" for folder, kind in kinds.items() for i in ids}


def stored(out: Path, paths: set[str]) -> dict[str, bytes]:
    return {path: (out / path).read_bytes() for path in paths}


def test_a_dataset_is_pushed_in_steps_and_again_without_a_commit(
    hub: FakeHub, out: Path, capsys: pytest.CaptureFixture[str]
):
    (out / "train" / "notes.txt").write_text("mine")
    (out / ".claims").mkdir(exist_ok=True)
    assert push_job.main([str(out), REPO]) == 0
    assert capsys.readouterr().out == (
        f"pushed    22 images in 3 shards: {hub.endpoint}/datasets/{REPO}\n"
    )
    there = {k: v for k, v in hub.repos[REPO].items() if k != ".gitattributes"}
    assert there == stored(out, shard_files(0, 1, 2) | DESCRIPTIONS)
    assert [set(paths) for paths in hub.commits] == [
        shard_files(0, 1) | {"plan.json"},
        shard_files(2),
        DESCRIPTIONS - {"plan.json"},
    ]
    assert push_job.main([str(out), REPO, "--private"]) == 0
    assert (len(hub.commits), hub.uploads, hub.private) == (3, 6, set())


def test_a_push_that_broke_off_goes_on(hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch):
    at_once = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", at_once)
    hub.fail_after = 5
    with pytest.raises(OSError, match=f"^the push to {REPO} broke off: "):
        push_job.main([str(out), REPO])
    assert set(hub.repos[REPO]) == {".gitattributes", "plan.json"} | shard_files(0, 1)
    hub.fail_after = None
    assert push_job.main([str(out), REPO]) == 0
    assert hub.uploads == 6
    assert set(hub.commits[1]) == shard_files(2)


def test_committed_shards_alone_are_pushed_and_only_if_that_is_meant(hub: FakeHub, tmp_path: Path):
    storage = Storage.open(tmp_path / "out")
    plan = open_plan(storage, make_plan())
    publish_one(storage, plan, 1, tmp_path / "scratch")
    storage.publish_bytes(b"half", "train/00000.tar")
    with pytest.raises(InputError, match=r"1 of 3 shards: run its generate .* --unfinished"):
        push_job.main([str(tmp_path / "out"), REPO])
    assert hub.repos == {}
    assert push_job.main([str(tmp_path / "out"), REPO, "--unfinished", "--private"]) == 0
    assert set(hub.repos[REPO]) == shard_files(1) | DESCRIPTIONS | {".gitattributes"}
    assert b"9 of 22 planned" in hub.repos[REPO]["README.md"]
    assert hub.private == {REPO}


def test_a_store_is_pushed_as_a_folder_is(hub: FakeHub, out: Path, tmp_path: Path):
    store = object_store()
    plan = write_dataset(store, make_plan(), tmp_path / "scratch")
    push.push(Dataset(store, plan, committed_shards(store, plan)), "me/stored")
    assert push_job.main([str(out), REPO]) == 0
    tars = {path for path in hub.repos[REPO] if path.startswith(("train/", "meta/"))}
    assert len(tars) == 6
    assert all(hub.repos["me/stored"][path] == hub.repos[REPO][path] for path in tars)


def test_a_grown_dataset_is_pushed_over_the_smaller_one_and_no_other(
    hub: FakeHub, out: Path, tmp_path: Path
):
    assert push_job.main([str(out), REPO]) == 0
    grown = make_plan().extended_to(make_plan({0: 30, 1: 6, 2: 8}))
    storage = Storage.open(out)
    push.push(Dataset(storage, grown, committed_shards(storage, grown)), REPO)
    assert hub.repos[REPO]["plan.json"] == grown.to_json()
    for other in (make_plan(seed=6), make_plan()):
        write_dataset(Storage.open(tmp_path / f"{other.seed}"), other, tmp_path / "scratch")
        with pytest.raises(InputError, match=f"{REPO} has .*: choose another repository"):
            push_job.main([str(tmp_path / f"{other.seed}"), REPO])
    hub.repos["me/foreign"] = {"train/00000.tar": b"mine"}
    with pytest.raises(InputError, match=r"me/foreign holds shards but no plan\.json"):
        push_job.main([str(out), "me/foreign"])
    assert hub.repos["me/foreign"] == {"train/00000.tar": b"mine"}


def test_a_card_edited_here_is_pushed_and_one_edited_there_is_kept(
    hub: FakeHub, out: Path, capsys: pytest.CaptureFixture[str]
):
    (out / "README.md").write_text("# mine\n")
    assert push_job.main([str(out), REPO]) == 0
    assert hub.repos[REPO]["README.md"] == b"# mine\n"
    hub.repos[REPO]["README.md"] = b"# theirs\n"
    assert push_job.main([str(out), REPO]) == 0
    assert hub.repos[REPO]["README.md"] == b"# theirs\n"
    assert f"note: kept README.md of {REPO}, which was edited there" in capsys.readouterr().out


def test_a_tar_that_changed_since_it_was_committed_is_not_pushed(hub: FakeHub, out: Path):
    tar = out / "train" / "00002.tar"
    tar.write_bytes(b"\0" * tar.stat().st_size)
    with pytest.raises(
        InputError, match=r"train/00002\.tar is not as it was committed: run verify"
    ):
        push_job.main([str(out), REPO])
    assert "train/00002.tar" not in hub.repos[REPO]


def test_what_keeps_a_push_from_beginning_is_told_with_what_to_do(
    hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch
):
    for argv, problem in (
        ([str(out), "digits"], "--repo: got 'digits'|repo: got 'digits'"),
        ([str(out)], "--repo is missing"),
        ([str(out), "closed/digits"], "Hub refuses closed/digits: .*rights.*: check the name"),
    ):
        with pytest.raises(InputError, match=problem):
            push_job.main(argv)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match=r"Hub refuses me/digits: .*that the token may write"):
        push_job.main([str(out), REPO])
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"no token .*: set HF_TOKEN"):
        push_job.main([str(out), REPO])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install huggingface_hub"):
        push_job.main([str(out), REPO])
    assert hub.repos == {}
