"""The ledger of failures beside the commit records, as whoever looks at a dataset reads it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from pipeline.request.job_plan import JobPlan
from pipeline.shards.manifest import LEDGER_NAME, OLD_LEDGER_NAME
from pipeline.storage import Storage

NODE, SHARD, STORAGE = "node", "shard", "storage"
"""What a line gives as the cause."""


class LedgerLine(BaseModel):
    """A failure of a shard: its worker died, or an error came up; or that it counts no more."""

    model_config = ConfigDict(strict=True)

    shard_id: int
    fingerprint: str
    error: str
    at: AwareDatetime
    worker: str = ""
    cause: str = ""
    set_aside: bool = False

    @property
    def is_failure(self) -> bool:
        """False where an attempt was given back: its node had failed, and not the shard."""
        return self.cause != NODE


def ledger_lines(storage: Storage, plan: JobPlan) -> Iterator[LedgerLine]:
    """The lines of this plan in the order in which they were written; others say nothing.

    Errors: `OSError`.
    """
    for name in (OLD_LEDGER_NAME, LEDGER_NAME):
        data = b""
        with suppress(FileNotFoundError):
            data = storage.read(name)
        for text in data.splitlines():
            with suppress(ValidationError):
                line = LedgerLine.model_validate_json(text)
                is_ours = 0 <= line.shard_id < plan.num_shards
                if is_ours and line.fingerprint == plan.shard_fingerprint(line.shard_id):
                    yield line


def given_up(lines: Iterable[LedgerLine]) -> dict[int, LedgerLine]:
    """The shards that a job has set aside, by the last line on each.

    One that could not be stored is none of them: the next run tries it again unasked.
    """
    last = {line.shard_id: line for line in lines}
    return {i: line for i, line in last.items() if line.set_aside and line.cause != STORAGE}
