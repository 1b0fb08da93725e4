"""Named points of the commit protocol, where tests kill what is running.

A run that sets no `DEPTHVAR_FAULT` pays one call of an empty function per point.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import cast

VARIABLE = "DEPTHVAR_FAULT"  # `module:function`, called with the name of every point reached

POINTS = (
    "plan-wanted",  # plan.json is about to be written
    "plan-written",
    "batch-sampled",  # a micro-batch is in the writer's hands
    "tar-built",  # closed in scratch, not read back yet
    "shard-built",  # both files in scratch, checked
    "claim-made",
    "file-staged",  # under its temporary name, whole and synced (local output)
    "file-replaced",  # under its own name, the folder not synced yet (local output)
    "tar-published",
    "parquet-published",  # everything but the record
    "record-published",
    "claim-removed",
    "indexes-wanted",  # all shards are done, index files are not written
    "indexes-written",
)


def _nothing(point: str) -> None:
    """Production: a point is only a name."""


def _hook(path: str) -> Callable[[str], None]:
    module, _, name = path.partition(":")
    return cast("Callable[[str], None]", getattr(importlib.import_module(module), name))


reach = _hook(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else _nothing
