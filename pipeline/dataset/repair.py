"""Putting right what `verify` found: bad shards lose their mark of done, leftovers are removed."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.dataset.verify import Report
from pipeline.request.job_plan import JobPlan
from pipeline.shards.claims import STALE_AFTER, sweep_claims
from pipeline.shards.manifest import FOLDERS, old_record_name, record_name
from pipeline.shards.text_states import TEXT_FOLDER
from pipeline.storage import TEMP_PREFIX, Storage


@dataclass(frozen=True)
class Repair:
    """What was done: shards that `generate` will make again, and leftovers that were removed."""

    unmarked: tuple[int, ...]
    num_swept: int


def repair(storage: Storage, plan: JobPlan, report: Report) -> Repair:
    """Remove the records of the shards found bad, and what killed runs left long ago.

    Data files stay where they are: making a shard again replaces them. Errors: `OSError`.
    """
    unmarked = [
        shard_id
        for shard_id in report.shards_to_make
        if _removed(storage, record_name(shard_id)) | _removed(storage, old_record_name(shard_id))
    ]
    num_swept = 0
    for folder in ("", TEXT_FOLDER, *FOLDERS):
        for name in storage.list_older(folder, STALE_AFTER):
            if name.startswith(TEMP_PREFIX):
                num_swept += _removed(storage, f"{folder}/{name}" if folder else name)
    sound = set(range(plan.num_shards)) - set(report.shards_to_make)
    return Repair(tuple(unmarked), num_swept + sweep_claims(storage, sound))


def _removed(storage: Storage, name: str) -> bool:
    """Remove a file; whether there was one."""
    try:
        storage.remove(name)
    except FileNotFoundError:
        return False
    return True
