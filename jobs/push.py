"""Upload a dataset to the Hugging Face Hub: `depthvar push OUT OWNER/NAME`. Run again, it goes on.

Committed shards alone, with plan, card and indexes. HF_TOKEN, or `hf auth login`, lets it in.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from tqdm import tqdm

from depthvar.errors import InputError
from jobs._entry import EXIT_DONE, run_job
from pipeline.request.flags import JobConfig, Positional, load_config
from pipeline.request.paths import Location


class PushConfig(JobConfig):
    """What `depthvar push` can be told."""

    dataset: Annotated[Location, Positional()] = Field(description="dataset to upload")
    repo: Annotated[str, Positional()] = Field(
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        description="dataset repository, OWNER/NAME, which is made if it is not there",
    )
    private: bool = Field(False, description="make a new repository a private one")
    unfinished: bool = Field(False, description="also where shards are missing: without them")


def main(argv: Sequence[str] | None = None) -> int:
    """Upload what the Hub lacks and print where it is; exit code 0."""
    config = load_config(PushConfig, argv, prog="depthvar push", description=__doc__ or "")
    from pipeline.dataset.push import push
    from pipeline.request.plan_file import stored_plan
    from pipeline.shards.committed import Dataset, committed_shards
    from pipeline.shards.samples import ShardError
    from pipeline.storage import Storage

    storage = Storage.open(config.dataset)
    plan = stored_plan(storage)
    records = committed_shards(storage, plan)
    dataset = Dataset(storage, plan, records)
    if not records or (dataset.num_missing and not config.unfinished):
        raise InputError(
            f"{storage} has {len(records):,} of {plan.num_shards:,} shards: run its generate"
            " command first" + (", or push what is there with --unfinished" if records else "")
        )
    notes: list[str] = []
    with tqdm(total=len(records), unit="shard", desc="push", file=sys.stderr) as bar:
        try:
            address = push(
                dataset,
                config.repo,
                private=config.private,
                progress=bar.update,
                note=notes.append,
            )
        except ShardError as error:
            raise InputError(str(error)) from error
    print(f"pushed    {dataset.num_samples:,} images in {len(records):,} shards: {address}")
    for note in notes:
        print(f"note: {note}")
    return EXIT_DONE


if __name__ == "__main__":
    run_job(main)
