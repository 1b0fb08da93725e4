"""Claims: who publishes a shard at once with whom, and when a claim may go."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.shards.claims import (
    STALE_AFTER,
    doubtful_shards,
    make_claim,
    others_claim,
    sweep_claims,
)
from pipeline.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "out")


def test_a_claim_tells_all_but_its_owner_and_is_of_one_shard(storage: Storage):
    own, other = make_claim(storage, 1), make_claim(storage, 12)
    assert doubtful_shards(storage) == {1, 12}
    assert not others_claim(storage, 1, own)
    assert others_claim(storage, 12, own)
    assert others_claim(storage, 1, other)
    assert not others_claim(storage, 2, own)
    storage.publish_bytes(b"", ".claims/notes.txt")
    assert doubtful_shards(storage) == {1, 12}


def test_only_old_claims_on_sound_shards_are_swept(storage: Storage, monkeypatch):
    old_sound, old_unsound, young = (make_claim(storage, i) for i in (1, 2, 1))
    storage.publish_bytes(b"", ".claims/notes.txt")
    long_ago_s = time.time() - 2 * 3600
    for name in (old_sound, old_unsound, ".claims/notes.txt"):
        os.utime(Path(storage.root, name), (long_ago_s, long_ago_s))
    listed = storage.list_older(".claims", STALE_AFTER)
    assert sweep_claims(storage, [0, 1]) == 1
    assert {f".claims/{n}" for n in storage.list(".claims")} == {
        old_unsound,
        young,
        ".claims/notes.txt",
    }
    monkeypatch.setattr(Storage, "list_older", lambda *_: listed)
    assert sweep_claims(storage, [1]) == 1, "another job swept it since the listing"
