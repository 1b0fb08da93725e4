"""The `--json FILE` of jobs that measure something."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from depthvar.errors import naming
from depthvar.paths import check_output_file
from pipeline.request.flags import JobConfig
from pipeline.request.marks import Metavar
from pipeline.request.paths import LocalPath

with warnings.catch_warnings():
    # pydantic's BaseModel has a deprecated method of the name `json`, which is our flag.
    warnings.filterwarnings("ignore", message='Field name "json"', category=UserWarning)

    class ReportConfig(JobConfig):
        """Base of the configurations that have `--json`."""

        json: Annotated[LocalPath, Metavar("FILE")] | None = Field(
            None, description="write the numbers to this file (default: none)"
        )


def check_report(config: ReportConfig) -> None:
    """`InputError` where the JSON file could not be written."""
    if config.json is not None:
        check_output_file(config.json, "--json")


def write_report(config: ReportConfig, numbers: Mapping[str, object]) -> None:
    """Write the JSON file, if one is asked for: whole, or not at all."""
    if config.json is None:
        return
    temporary = config.json.with_name(f".tmp-{os.getpid()}-{config.json.name}")
    with naming(config.json):
        temporary.write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, config.json)
