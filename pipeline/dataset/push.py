"""Upload a dataset to the Hugging Face Hub: its committed shards, then what describes them.

In steps, each one commit there. A shard that is there is told by the SHA-256 of its tar and left
out, so that a push goes on where one ended.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthvar.errors import InputError
from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import PLAN_NAME
from pipeline.shards.card import is_edited
from pipeline.shards.committed import Dataset, ShardSummary
from pipeline.shards.indexes import index_files
from pipeline.shards.manifest import (
    CARD_NAME,
    CONTACT_SHEET_NAME,
    FOLDERS,
    FileEntry,
    read_record,
    record_name,
)
from pipeline.shards.samples import ShardError
from pipeline.storage import Storage

_STEP_SHARDS, _STEP_BYTES = 50, 2 * 10**9
_REFUSED = (400, 401, 403, 404, 409)
Content = bytes | Path


def push(
    dataset: Dataset,
    repo: str,
    *,
    private: bool = False,
    progress: Callable[[int], object] = lambda num_shards: None,
    note: Callable[[str], object] = lambda text: None,
) -> str:
    """Upload what is committed to a dataset repository, made if need be; its address.

    `progress` is told of shards, those that were there already included. A card that was edited
    there is kept. Errors: `InputError` without the library or a token, for a repository that holds
    something else and for what the Hub refuses; `ShardError` for a file that is not as recorded;
    `OSError` where the connection fails.
    """
    api = _connected()
    with _telling_errors(repo):
        address = str(api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True))
        hub = _Repository(api, repo)
        there = hub.files()
        _check_same(hub, dataset, there)
        for records in _steps(dataset.records.values()):
            missing = [record for record in records if not _is_there(record, there)]
            if missing:
                hub.commit_shards(dataset, missing)
            progress(len(records))
        files = _descriptions(dataset)
        card = hub.read(CARD_NAME) if CARD_NAME in there else files[CARD_NAME]
        if card != files[CARD_NAME] and is_edited(card):
            del files[CARD_NAME]
            note(f"kept {CARD_NAME} of {repo}, which was edited there")
        hub.commit(files, "Card and indexes")
    return address


@dataclass(frozen=True)
class _Repository:
    """A dataset repository, through `huggingface_hub.HfApi`."""

    api: Any
    name: str

    def files(self) -> dict[str, Any]:
        """What it holds: a `RepoFile` for each path."""
        tree = self.api.list_repo_tree(self.name, repo_type="dataset", recursive=True)
        return {entry.path: entry for entry in tree if hasattr(entry, "size")}

    def read(self, path: str) -> bytes:
        """The content of a file."""
        with tempfile.TemporaryDirectory() as folder:
            where = {"repo_type": "dataset", "local_dir": folder}
            return Path(self.api.hf_hub_download(self.name, path, **where)).read_bytes()

    def commit_shards(self, dataset: Dataset, records: Sequence[ShardSummary]) -> None:
        """Upload shards with the plan that they belong to, their files as they were recorded."""
        files: dict[str, Content] = {PLAN_NAME: dataset.plan.to_json()}
        with tempfile.TemporaryDirectory(prefix="depthvar-push-") as folder:
            for record in records:
                for entry in (record.files.tar, record.files.parquet):
                    files[entry.name] = _local(dataset.storage, entry, Path(folder))
                stored = read_record(dataset.storage, record.shard_id)
                if stored is None or stored.files != record.files:
                    raise ShardError(
                        f"{record_name(record.shard_id)} changed meanwhile: push again"
                    )
                files[record_name(record.shard_id)] = stored.to_json()
            self.commit(files, f"{len(records)} shards")

    def commit(self, files: Mapping[str, Content], message: str) -> None:
        """Upload files; where all are there as they are, there is no commit."""
        from huggingface_hub import CommitOperationAdd

        additions = [CommitOperationAdd(path, content) for path, content in files.items()]
        self.api.create_commit(self.name, additions, commit_message=message, repo_type="dataset")


def _connected() -> Any:
    """`HfApi` with a token. Errors: `InputError`."""
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise InputError(
            "the Hugging Face Hub needs huggingface_hub, which is not installed: pip install"
            " huggingface_hub"
        ) from None
    if get_token() is None:
        raise InputError(
            "there is no token for the Hugging Face Hub: set HF_TOKEN to one that may write, or run"
            " `hf auth login`"
        )
    disable_progress_bars()
    return HfApi()


@contextmanager
def _telling_errors(repo: str) -> Iterator[None]:
    """The client's errors, which share no base, as ours."""
    try:
        yield
    except (InputError, ShardError):
        raise
    except Exception as error:
        answer = getattr(error, "response", None)
        told = getattr(error, "server_message", None) or error
        reason = " ".join(str(told).split()) or type(error).__name__
        if getattr(answer, "status_code", None) in _REFUSED or isinstance(error, ValueError):
            raise InputError(
                f"the Hugging Face Hub refuses {repo}: {reason}: check the name, and that the token"
                " may write there"
            ) from error
        raise OSError(f"the push to {repo} broke off: {reason}") from error


def _check_same(hub: _Repository, dataset: Dataset, there: Mapping[str, Any]) -> None:
    """`InputError` for a repository that holds another dataset or anything else."""
    if PLAN_NAME not in there:
        if any(path.startswith(tuple(f"{folder}/" for folder in FOLDERS)) for path in there):
            raise InputError(
                f"{hub.name} holds shards but no {PLAN_NAME}: choose another repository"
            )
        return
    stored = JobPlan.from_json(hub.read(PLAN_NAME))
    if stored != dataset.plan and not dataset.plan.continues(stored):
        differences = "; ".join(stored.difference(dataset.plan, hub.name))
        raise InputError(f"{differences or f'{hub.name} holds more'}: choose another repository")


def _steps(records: Iterable[ShardSummary]) -> Iterator[list[ShardSummary]]:
    """Shards that are committed together: some, of not too many bytes."""
    step: list[ShardSummary] = []
    for record in records:
        num_bytes = sum(other.files.tar.size for other in (*step, record))
        if step and (len(step) == _STEP_SHARDS or num_bytes > _STEP_BYTES):
            yield step
            step = []
        step.append(record)
    yield step


def _is_there(record: ShardSummary, there: Mapping[str, Any]) -> bool:
    """Whether the Hub has a shard: the very tar, and its other files."""
    tar, parquet = record.files.tar, record.files.parquet
    large = getattr(there.get(tar.name), "lfs", None)
    return (
        getattr(large, "sha256", None) == tar.sha256
        and getattr(there.get(parquet.name), "size", None) == parquet.size
        and record_name(record.shard_id) in there
    )


def _local(storage: Storage, entry: FileEntry, folder: Path) -> Path:
    """The path of a file here, where it lies or a copy of a store's. Errors: `ShardError`."""
    path = Path(storage.root, entry.name)
    if not storage.is_local:
        path = folder / entry.name.replace("/", "-")
        with storage.open_input(entry.name) as source, open(path, "xb") as target:
            shutil.copyfileobj(source, target, 8 * 2**20)
    with open(path, "rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
            raise ShardError(
                f"{entry.name} is not as it was committed: run verify --deep --repair, then"
                " generate again"
            )
    return path


def _descriptions(dataset: Dataset) -> dict[str, bytes]:
    """Plan, card, indexes and pictures, of what is committed; a card that was edited as it is."""
    storage = dataset.storage
    files = {PLAN_NAME: dataset.plan.to_json(), **index_files(dataset.plan, dataset.records)}
    for name in (CARD_NAME, CONTACT_SHEET_NAME):
        with suppress(FileNotFoundError):
            stored = storage.read(name)
            if name != CARD_NAME or is_edited(stored):
                files[name] = stored
    return files
