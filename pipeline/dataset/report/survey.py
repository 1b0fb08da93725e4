"""What the report is about, read from a dataset that may be unfinished and may be huge.

Every commit record is read. Of rows and images only those of a few shards, spread evenly: classes
take turns in every shard, so a shard is a fair sample of the dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pipeline.request.job_plan import JobPlan, key_of
from pipeline.shards.committed import ShardSummary, committed_shards
from pipeline.shards.depth_maps import read_depth_map
from pipeline.shards.failures import LedgerLine, given_up, ledger_lines
from pipeline.shards.manifest import parquet_name, tar_name
from pipeline.shards.samples import ShardError, TarSample, decode_image, read_parquet, read_tar
from pipeline.shards.schema import schema_of
from pipeline.storage import Storage

SHARDS_WITH_ROWS = 32
SHARDS_WITH_IMAGES = 8
ROWS_WITH_IMAGES = 1000  # the first ones of a shard: a tar is read up to the last image wanted
_MAX_SUBJECTS = 40
_EXTREMES = 12

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Rows:
    """What the Parquet files of some shards say: N samples, S scales."""

    shard_N: np.ndarray
    index_N: np.ndarray
    subject_N: np.ndarray
    """As `JobPlan.stored_subject`, -1 for none of the plan's."""
    change_NS: np.ndarray
    log_prob_NS: np.ndarray
    image_sha256: list[str]
    has_image_N: np.ndarray
    """Whether the image is among those that the report chooses from."""

    @cached_property
    def certainty_N(self) -> np.ndarray:  # noqa: N802
        """Log-probability of the drawn tokens in nats, mean over the scales."""
        return np.asarray(self.log_prob_NS.mean(axis=1))


@dataclass(frozen=True, eq=False)
class Picture:
    """One sample that is shown.

    `subject`: its class, or its prompt where there are no classes. `image_HWC` is uint8. `depths`:
    blocks that the tokens of every scale ran, (side, side) each; none where the dataset has no
    depth maps.
    """

    key: str
    subject: str
    certainty: float
    image_HWC: np.ndarray
    depths: Sequence[np.ndarray] = ()
    prompt: str | None = None


@dataclass(frozen=True, eq=False)
class Survey:
    """All that a report says. `problems`: what could not be read, a line for each."""

    where: str
    plan: JobPlan
    records: dict[int, ShardSummary]
    ledger: list[LedgerLine]
    rows: Rows | None
    by_subject: list[tuple[str, list[Picture]]]
    least_certain: list[Picture]
    most_certain: list[Picture]
    problems: list[str]

    @property
    def num_samples(self) -> int:
        """Samples in the shards that are done."""
        return sum(record.num_samples for record in self.records.values())

    @property
    def failures(self) -> list[LedgerLine]:
        """Every failure of a shard, in the order in which they were written."""
        return [line for line in self.ledger if line.is_failure]

    @property
    def set_aside(self) -> list[int]:
        """The shards that are not done and that the job has given up."""
        return sorted(given_up(self.ledger).keys() - self.records.keys())

    def committed_counts(self) -> dict[int, int]:
        """Committed samples of every planned subject."""
        planned = self.plan.subject_counts
        if len(self.records) == self.plan.num_shards:
            return planned
        found = dict.fromkeys(planned, 0)
        for shard_id in self.records:
            labels, counts = np.unique(self.plan.shard(shard_id).labels, return_counts=True)
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
                found[self.plan.subject_of(label)] += count
        return found


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """All items, or an even choice, first and last included, where there are more than `most`."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def survey(storage: Storage, plan: JobPlan, per_subject: int) -> Survey:
    """Read what a report shows, with up to `per_subject` images of each class or prompt.

    Errors: `OSError`.
    """
    records = committed_shards(storage, plan)
    problems: list[str] = []
    rows = _read_rows(storage, plan, sorted(records), problems)
    chosen = _Choice.of(rows, plan, per_subject)
    pictures = _read_pictures(storage, plan, rows, chosen.all_places, problems)

    def shown(places: Sequence[int]) -> list[Picture]:
        return [pictures[place] for place in places if place in pictures]

    return Survey(
        where=str(storage),
        plan=plan,
        records=records,
        ledger=list(ledger_lines(storage, plan)),
        rows=rows,
        by_subject=[(plan.subject_name(s), shown(p)) for s, p in chosen.by_subject.items()],
        least_certain=shown(chosen.least_certain),
        most_certain=shown(chosen.most_certain),
        problems=problems,
    )


def _read_rows(
    storage: Storage, plan: JobPlan, shard_ids: list[int], problems: list[str]
) -> Rows | None:
    """The rows of some shards, evenly chosen; None where none can be read."""
    with_images = spread(shard_ids, SHARDS_WITH_IMAGES)
    tables, shards, has_image = [], [], []
    for shard_id in sorted({*spread(shard_ids, SHARDS_WITH_ROWS), *with_images}):
        name = parquet_name(shard_id)
        try:
            table = read_parquet(storage.read(name), schema_of(plan))
        except (ShardError, FileNotFoundError) as error:
            problems.append(f"{name}: {error}")
            continue
        tables.append(table)
        shards.append(np.full(table.num_rows, shard_id))
        limit = ROWS_WITH_IMAGES if shard_id in with_images else 0
        has_image.append(np.arange(table.num_rows) < limit)
    if not tables:
        return None
    table = pa.concat_tables(tables)

    def per_scale(name: str) -> np.ndarray:
        values = table[name].combine_chunks().flatten()
        return np.asarray(values).reshape(table.num_rows, -1)

    return Rows(
        shard_N=np.concatenate(shards),
        index_N=table["index"].to_numpy(),
        subject_N=_subjects(plan, table),
        change_NS=per_scale("mean_change"),
        log_prob_NS=per_scale("mean_log_prob"),
        image_sha256=table["image_sha256"].to_pylist(),
        has_image_N=np.concatenate(has_image),
    )


def _subjects(plan: JobPlan, table: pa.Table) -> np.ndarray:
    if plan.class_names:
        return np.asarray(table["label"].to_numpy())
    found = [plan.stored_subject(None, text) for text in table["prompt"].to_pylist()]
    return np.array([-1 if subject is None else subject for subject in found])


@dataclass(frozen=True)
class _Choice:
    """Which images are shown, as places in the rows."""

    by_subject: dict[int, list[int]]
    least_certain: list[int]
    most_certain: list[int]

    @classmethod
    def of(cls, rows: Rows | None, plan: JobPlan, per_subject: int) -> _Choice:
        subjects = spread(list(plan.subject_counts), _MAX_SUBJECTS)
        if rows is None:
            return cls({}, [], [])
        places = np.flatnonzero(rows.has_image_N)
        of_place = rows.subject_N[places]
        by_subject = {s: spread(places[of_place == s].tolist(), per_subject) for s in subjects}
        ranked = places[rows.certainty_N[places].argsort(kind="stable")].tolist()
        few = min(_EXTREMES, len(ranked) // 2)
        return cls(by_subject, ranked[:few], ranked[::-1][:few])

    @property
    def all_places(self) -> set[int]:
        return {*self.least_certain, *self.most_certain}.union(*self.by_subject.values())


def _read_pictures(
    storage: Storage, plan: JobPlan, rows: Rows | None, places: set[int], problems: list[str]
) -> dict[int, Picture]:
    """The images at some places of the rows, each checked against its hash."""
    if rows is None:
        return {}
    pictures: dict[int, Picture] = {}
    for shard_id in sorted({int(rows.shard_N[place]) for place in places}):
        inside = sorted(place for place in places if rows.shard_N[place] == shard_id)
        left = {key_of(int(rows.index_N[place])): place for place in inside}
        try:
            with storage.open_input(tar_name(shard_id)) as stream:
                for sample in read_tar(stream, plan.image_format, plan.caption_suffixes):
                    place = left.pop(sample.key, None)
                    if place is not None:
                        pictures[place] = _picture(plan, rows, place, sample)
                    if not left:
                        break
            if left:
                raise ShardError(f"it ends before the sample {min(left)}")
        except (ShardError, FileNotFoundError) as error:
            problems.append(f"{tar_name(shard_id)}: {error}")
    return pictures


def _picture(plan: JobPlan, rows: Rows, place: int, sample: TarSample) -> Picture:
    key = key_of(int(rows.index_N[place]))
    if hashlib.sha256(sample.image).hexdigest() != rows.image_sha256[place]:
        raise ShardError(f"the image of {key} is not the one that was committed")
    depths: Sequence[np.ndarray] = ()
    if sample.depths is not None and plan.depth_map_grids:
        try:
            depths = read_depth_map(sample.depths, plan)
        except ValueError as error:
            raise ShardError(f"the depth map of {key}: {error}") from error
    return Picture(
        key=key,
        subject=plan.subject_name(int(rows.subject_N[place])),
        certainty=float(rows.certainty_N[place]),
        image_HWC=decode_image(sample.image, plan.image_channels),
        depths=depths,
        prompt=sample.prompt,
    )
