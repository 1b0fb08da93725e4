"""The shard indexes of other readers, and the dataset card: made from what is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.request.job_plan import JobPlan
from pipeline.shards.card import dataset_card, is_edited, sealed
from pipeline.shards.committed import ShardSummary
from pipeline.shards.manifest import (
    CARD_NAME,
    INDEX_NAME,
    INFO_NAME,
    SIZES_COPY_NAME,
    SIZES_NAME,
    TRAIN_FOLDER,
)
from pipeline.storage import Storage


def index_files(plan: JobPlan, records: Mapping[int, ShardSummary]) -> dict[str, bytes]:
    """The content of the indexes and the dataset card, by name.

    index.json is read by wids (0.1.11), `_info.json` by timm (1.0.31) and sizes.json by open_clip
    (3.3.0), which looks beside the tars: there it would stop `datasets` (5.2.0), whose
    `load_dataset("webdataset", data_dir=...)` opens every file below `train/` as a tar, so it is
    left to be copied there.
    """
    done = [records[shard_id] for shard_id in sorted(records)]
    index = {
        "wids_version": 1,
        "name": f"{plan.model}-{plan.fingerprint[:12]}",
        "shardlist": [
            {
                "url": record.files.tar.name,
                "nsamples": record.num_samples,
                "filesize": record.files.tar.size,
            }
            for record in done
        ],
    }
    sizes = {Path(record.files.tar.name).name: record.num_samples for record in done}
    split = {
        "name": TRAIN_FOLDER,
        "num_samples": sum(sizes.values()),
        "filenames": [record.files.tar.name for record in done],
        "shard_lengths": list(sizes.values()),
    }
    num_samples = sum(record.num_samples for record in done)
    tar_bytes = sum(record.files.tar.size for record in done)
    return {
        INDEX_NAME: (json.dumps(index, indent=1) + "\n").encode(),
        SIZES_NAME: (json.dumps(sizes, indent=1) + "\n").encode(),
        INFO_NAME: (json.dumps({"splits": {TRAIN_FOLDER: split}}, indent=1) + "\n").encode(),
        CARD_NAME: sealed(dataset_card(plan, len(done), num_samples, tar_bytes)),
    }


def write_indexes(storage: Storage, plan: JobPlan, records: Mapping[int, ShardSummary]) -> bool:
    """Write the indexes and the dataset card of the shards that are done.

    A file that is right already keeps its bytes and its time, and so does a card that was edited:
    returns whether one was kept for that. A copy of the sizes beside the tars is kept up to date
    where there is one. Errors: `OSError`.
    """
    is_card_kept = False
    files = index_files(plan, records)
    if storage.size(SIZES_COPY_NAME) is not None:
        files[SIZES_COPY_NAME] = files[SIZES_NAME]
    for name, data in files.items():
        stored = None
        with suppress(FileNotFoundError):
            stored = storage.read(name)
        if name == CARD_NAME and stored is not None and stored != data and is_edited(stored):
            is_card_kept = True
        elif stored != data:
            storage.publish_bytes(data, name)
    return is_card_kept
