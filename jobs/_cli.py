"""The command `depthvar`: every job by its name, `depthvar generate --help`.

`python -m jobs.generate` is the same code. Only the job that is asked for is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from depthvar.errors import InputError
from jobs._entry import EXIT_DONE, run_job

JOBS = {
    "plan": "show what generate would make and cost; writes nothing",
    "generate": "make a labelled image dataset, or go on with one",
    "submit": "hand generate to a Ray cluster, and follow it",
    "status": "say how far a dataset is, how fast, and what to do",
    "verify": "check a dataset against its plan, and repair it",
    "report": "show a dataset on one page: images, compute, speed, state",
    "evaluate": "measure a dataset's quality against real images",
    "export": "copy a dataset into another format",
    "push": "upload a dataset to the Hugging Face Hub",
    "train-classifier": "train a classifier on a dataset and test it on real images",
    "benchmark": "time depth policies on this machine",
    "train-model": "train a small VAR model on a folder of labelled images",
    "calibrate": "fit the proxies of a model to its own samples",
    "convert-weights": "write a model's weights in half precision",
    "study": "compare depth policies",
    "train-features": "train the feature network of the digits again",
}
"""The jobs, in the order in which a user meets them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the first word names with the words behind it; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return EXIT_DONE
    if words[0] == "--version":
        print(f"depthvar {version('depthvar')}")
        return EXIT_DONE
    name = words[0].replace("_", "-")
    if name not in JOBS:
        raise InputError(
            f"got the job {words[0]!r}, wanted one of {', '.join(JOBS)}: see `depthvar --help`"
        )
    job = importlib.import_module(f"jobs.{name.replace('-', '_')}")
    code: int = job.main(words[1:])
    return code


def console() -> NoReturn:
    """The installed command: `main`, its mistakes in one line each, and its exit code."""
    run_job(main)


def _usage() -> str:
    width = max(map(len, JOBS))
    return "\n".join(
        [
            "usage: depthvar JOB [flags]",
            "",
            "Make large labelled image datasets with visual autoregressive models whose depth",
            "is chosen for every token.",
            "",
            *(f"  {name:<{width}}  {what}" for name, what in JOBS.items()),
            "",
            "depthvar JOB --help shows a job's flags that most need, --help-all all of them;",
            "depthvar --version shows the version.",
        ]
    )


if __name__ == "__main__":
    console()
