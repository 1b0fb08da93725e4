"""Say how far a dataset is: `depthvar status DIR`, also while a job makes it.

Exit code 0 once it is finished, 1 before: `depthvar status DIR && train`. Reads listings and the
newest commit records; `depthvar verify` reads everything.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

from pydantic import Field

from jobs._entry import EXIT_DONE, EXIT_INCOMPLETE, run_job
from pipeline.request.flags import JobConfig, Positional, load_config
from pipeline.request.paths import Location

with warnings.catch_warnings():
    # pydantic's BaseModel has a deprecated method of the name `json`, which is our flag.
    warnings.filterwarnings("ignore", message='Field name "json"', category=UserWarning)

    class StatusConfig(JobConfig):
        """What `depthvar status` can be told."""

        dataset: Annotated[Location, Positional()] = Field(description="dataset to look at")
        json: bool = Field(False, description="print JSON, for programs")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the status; exit code 0 for a finished dataset, 1 for any other."""
    config = load_config(StatusConfig, argv, prog="depthvar status", description=__doc__ or "")
    from pipeline.dataset.status import status
    from pipeline.request.plan_file import stored_plan
    from pipeline.storage import Storage

    storage = Storage.open(config.dataset)
    found = status(storage, stored_plan(storage), datetime.now(UTC))
    print(json.dumps(found.as_json(), indent=2) if config.json else found.as_text())
    return EXIT_DONE if found.state == "finished" else EXIT_INCOMPLETE


if __name__ == "__main__":
    run_job(main)
