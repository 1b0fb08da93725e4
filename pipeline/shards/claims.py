"""How a shard stays whole when several workers publish it at once.

A worker that publishes a shard puts a claim, a small file of its own name, before its first byte
and takes it away after its last, unless it saw the claim of another worker then. So two
publications that overlap in time, and one whose worker died, always leave a claim behind, and a
shard with a claim is believed only after its files were hashed. Why no mixture slips through: of
two overlapping publications the one that looks last sees the other's claim, because the other
could have taken it away only if the first one's claim was made after the other's last byte.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta

from pipeline.faults import reach
from pipeline.storage import Storage

CLAIMS_FOLDER = ".claims"
STALE_AFTER = timedelta(hours=1)  # a publication takes seconds to minutes
_NAME = re.compile(r"([0-9]{1,18})-[0-9a-f]{32}")


def make_claim(storage: Storage, shard_id: int) -> str:
    """Announce that this worker is about to publish a shard; its name. Errors: `OSError`."""
    name = f"{CLAIMS_FOLDER}/{shard_id}-{uuid.uuid4().hex}"
    storage.publish_bytes(b"\n", name)
    reach("claim-made")
    return name


def others_claim(storage: Storage, shard_id: int, own: str) -> bool:
    """Whether another worker publishes this shard, or died doing so. Errors: `OSError`."""
    return any(
        int(match[1]) == shard_id and f"{CLAIMS_FOLDER}/{name}" != own
        for name in storage.list(CLAIMS_FOLDER)
        if (match := _NAME.fullmatch(name))
    )


def doubtful_shards(storage: Storage) -> frozenset[int]:
    """The shards whose files have to be hashed before they are believed. Errors: `OSError`."""
    matches = (_NAME.fullmatch(name) for name in storage.list(CLAIMS_FOLDER))
    return frozenset(int(match[1]) for match in matches if match)


def sweep_claims(storage: Storage, sound: Iterable[int]) -> int:
    """Remove old claims on shards that were just found to be whole; how many. Errors: `OSError`."""
    wanted = set(sound)
    old = [
        name
        for name in storage.list_older(CLAIMS_FOLDER, STALE_AFTER)
        if (match := _NAME.fullmatch(name)) and int(match[1]) in wanted
    ]
    for name in old:
        with suppress(FileNotFoundError):
            storage.remove(f"{CLAIMS_FOLDER}/{name}")
    return len(old)
