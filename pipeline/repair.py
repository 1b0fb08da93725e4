"""Putting right what `verify` found: bad shards lose their mark of done, leftovers are removed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from pipeline.claims import STALE_AFTER, sweep_claims
from pipeline.manifest import META_FOLDER, TRAIN_FOLDER, record_name
from pipeline.plan import JobPlan
from pipeline.storage import TEMP_PREFIX, Storage
from pipeline.verify import Report


@dataclass(frozen=True)
class Repair:
    """What was done: shards that `generate` will make again, and leftovers that were removed."""

    unmarked: tuple[int, ...]
    num_swept: int


def repair(storage: Storage, plan: JobPlan, report: Report) -> Repair:
    """Remove the records of the shards found bad, and what killed runs left long ago.

    Data files stay where they are: making a shard again replaces them. Errors: `OSError`.
    """
    unmarked = []
    for shard_id in report.shards_to_make:
        with suppress(FileNotFoundError):
            storage.remove(record_name(shard_id))
            unmarked.append(shard_id)
    num_swept = 0
    for folder in ("", TRAIN_FOLDER, META_FOLDER):
        for name in storage.list_older(folder, STALE_AFTER):
            if name.startswith(TEMP_PREFIX):
                with suppress(FileNotFoundError):
                    storage.remove(f"{folder}/{name}" if folder else name)
                    num_swept += 1
    sound = set(range(plan.num_shards)) - set(report.shards_to_make)
    return Repair(tuple(unmarked), num_swept + sweep_claims(storage, sound))
