"""A job handed to a cluster by its dashboard: sent, found again, followed to its end.

The process that does it is no part of the cluster. What travels is this code, the request as YAML
and the files of labels and prompts it names; everything else lies where every node sees it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
import yaml
from ray import exceptions as ray_errors
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from depthvar.errors import InputError
from depthvar.paths import without_secrets
from pipeline.request.generation import SubmitConfig
from pipeline.run.address import DASHBOARD_VARIABLE
from pipeline.run.cluster import TOKEN_ADVICE
from pipeline.run.console import say
from pipeline.run.ledger import one_line

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("depthvar", "pipeline", "jobs")
_REQUEST_FILE = "job.yaml"
_COMMAND = f"python -m jobs.generate --config {_REQUEST_FILE}"
_FILES_FOLDER = "labels"
_REQUEST = "depthvar request"  # the job's metadata
_STARTING_S = 90.0  # a dashboard answers before the agent that takes jobs does
_RETRY_S = 2.0


@dataclass(frozen=True)
class Submission:
    """A job on a cluster."""

    client: JobSubmissionClient
    url: str
    id: str

    @property
    def stop_command(self) -> str:
        """What ends the job."""
        return f"ray job stop --address {self.url} {self.id}"


def submit(config: SubmitConfig, url: str) -> Submission:
    """Hand a request in, or find the job that makes the same output from it already.

    An output has its own ids, so that it has one job at a time. Raises `InputError` where no
    cluster takes it, and where a job of another request makes the output.
    """
    client = _client(url)
    told = yaml.safe_dump(_told(config), allow_unicode=True, sort_keys=False)
    name = _name_of(config.out)
    earlier = {job.submission_id: job for job in client.list_jobs() if _is_of(job, name)}
    for job in earlier.values():
        if not job.status.is_terminal():
            found = Submission(client, url, str(job.submission_id))
            if (job.metadata or {}).get(_REQUEST) != told:
                raise InputError(
                    f"{without_secrets(config.out)} is made by the job {found.id} from another"
                    f" request: wait for its end, or end it with `{found.stop_command}`"
                )
            say(f"joined the job {found.id}, which runs already: `{found.stop_command}` ends it")
            return found
    with tempfile.TemporaryDirectory(prefix="depthvar-") as folder:
        _pack(Path(folder), config, told)
        sent = Submission(client, url, f"{name}-{len(earlier) + 1}")
        _send(sent, Path(folder), told)
    say(f"submitted the job {sent.id}: `{sent.stop_command}` ends it")
    return sent


def follow(job: Submission) -> int:
    """Show what a job says until it ends, and return its exit code.

    Errors: `OSError` where the connection is lost.
    """
    try:
        asyncio.run(_show(job))
    except (RuntimeError, aiohttp.ClientError) as error:
        raise OSError(
            f"the connection to {job.url} is lost, and the job {job.id} goes on"
        ) from error
    end = job.client.get_job_info(job.id)
    if end.status == JobStatus.SUCCEEDED:
        return 0
    reason = (end.message or "").partition("\n")[0]
    say(f"the job {job.id} is {end.status.lower()}: {reason}")
    code = end.driver_exit_code or 1
    return code if code > 0 else 128 - code  # of a signal


async def _show(job: Submission) -> None:
    async for text in job.client.tail_job_logs(job.id):
        print(text, end="", flush=True)


def _client(url: str) -> JobSubmissionClient:
    os.environ[DASHBOARD_VARIABLE] = url  # Ray prefers its variables to the address it is given
    for name in ("dashboard_sdk", "job.sdk"):  # they set their own level, and tell of packages
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    where = f"no job can be handed in at {without_secrets(url)}"
    try:
        return JobSubmissionClient(url)
    except ray_errors.AuthenticationError as error:
        reason = one_line(error).partition(". ")[0]
        raise InputError(f"{where}: {reason}: {TOKEN_ADVICE}") from None
    except (requests.RequestException, ConnectionError) as error:
        raise InputError(
            f"{where} ({one_line(error)}): check --address, and that the cluster runs; `ray"
            " dashboard cluster.yaml` brings the dashboard of one to http://127.0.0.1:8265"
        ) from None
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{where} ({one_line(error)}), wanted the dashboard of Ray") from None


def _told(config: SubmitConfig) -> dict[str, Any]:
    told = config.for_cluster()
    return told | {
        name: f"{_FILES_FOLDER}/{name}{p.suffix}" for name, p in config.job_files.items()
    }


def _pack(folder: Path, config: SubmitConfig, told: str) -> None:
    """Fill a folder with all that travels."""
    for package in _PACKAGES:
        shutil.copytree(
            _ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    (folder / _REQUEST_FILE).write_text(told)
    for name, path in config.job_files.items():
        (folder / _FILES_FOLDER).mkdir(exist_ok=True)
        shutil.copy(path, folder / _FILES_FOLDER / f"{name}{path.suffix}")


def _send(job: Submission, folder: Path, told: str) -> None:
    deadline_s = time.monotonic() + _STARTING_S
    while True:
        try:
            job.client.submit_job(
                entrypoint=_COMMAND,
                submission_id=job.id,
                runtime_env={"working_dir": str(folder)},
                metadata={_REQUEST: told},
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline_s:
                raise InputError(f"{job.url} does not take the job: {one_line(error)}") from None
            time.sleep(_RETRY_S)
        else:
            return


def _name_of(out: str) -> str:
    """What the ids of all jobs of an output begin with: as one reads it, and as it is."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", out.rstrip("/").rpartition("/")[2]).strip("-")
    return f"{words or 'dataset'}-{hashlib.sha256(out.rstrip('/').encode()).hexdigest()[:8]}"


def _is_of(job: JobDetails, name: str) -> bool:
    return re.fullmatch(rf"{name}-\d+", job.submission_id or "") is not None
