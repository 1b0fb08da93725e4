"""One shard, built whole in local scratch: encoded beside the sampler, checked, then handed on.

The same samples give the same bytes: members in key order, fixed times and owners in the tar,
fixed Parquet options, nothing that varies from run to run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset import TarWriter

from pipeline.faults import reach
from pipeline.request.job_plan import JobPlan, ShardPlan, key_of
from pipeline.shards.depth_maps import DEPTH_MAP_SUFFIX, depth_map_file, read_depth_map
from pipeline.shards.manifest import (
    BatchTiming,
    BuiltShard,
    FileEntry,
    ShardFiles,
    parquet_name,
    tar_name,
)
from pipeline.shards.samples import EncodedImage, ShardError, encode_image, read_tar
from pipeline.shards.schema import (
    NO_REFERENCE_SCALE,
    STATUS_OK,
    SampleRow,
    caption,
    columns_of,
    finite_floats,
    json_member,
    rows_to_table,
    schema_of,
)


class SampledBatch(Protocol):
    """What the writer reads of a sampler's batch; B images, S scales."""

    @property
    def images_BHWC(self) -> np.ndarray:  # noqa: N802
        """Pixels, uint8."""

    @property
    def mean_change_BS(self) -> np.ndarray:  # noqa: N802
        """Ranking signal, mean over the tokens of each scale, float32, finite."""

    @property
    def mean_log_prob_BS(self) -> np.ndarray:  # noqa: N802
        """Log-probability of the drawn tokens in nats, mean per scale, float32, finite."""

    @property
    def depths_BN(self) -> np.ndarray:  # noqa: N802
        """Blocks that every token ran, all scales in a row, uint8; read where the plan wants it."""

    @property
    def sampling_s(self) -> float:
        """Wall seconds in the transformer."""

    @property
    def decoding_s(self) -> float:
        """Wall seconds in the image decoder."""


@dataclass
class _Batch:
    """A batch on its way to the tar; `encoding_s` grows as its images arrive."""

    start: int
    stop: int
    sampling_s: float
    decoding_s: float
    mean_change: list[list[float]]
    mean_log_prob: list[list[float]]
    depth_maps: list[bytes]
    encoding_s: float = 0.0


class ShardWriter:
    """Writes one shard; use as a context manager, which removes its scratch files at the end.

    Publish what `finish` returns before leaving the `with` block. At most `max_pending` images
    wait for their encoding: `add` blocks beyond that. Errors in a thread surface in `add` or
    `finish`; `OSError` where the scratch folder is full.
    """

    def __init__(
        self,
        plan: JobPlan,
        shard: ShardPlan,
        scratch: Path,
        *,
        threads: int = 1,
        max_pending: int | None = None,
    ) -> None:
        self._plan, self._shard = plan, shard
        self._max_pending = max_pending or 2 * max(plan.batch_size, threads)
        scratch.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f"shard-{shard.shard_id}-", dir=scratch))
        self._tar_path = self._folder / Path(tar_name(shard.shard_id)).name
        self._parquet_path = self._folder / Path(parquet_name(shard.shard_id)).name
        self._stream = open(self._tar_path, "xb")  # noqa: SIM115 (closed by finish or abort)
        self._tar = TarWriter(self._stream, encoder=False, mtime=0)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._pending: deque[tuple[_Batch, int, Future[EncodedImage]]] = deque()
        self._next_index = shard.start
        self._batches: list[_Batch] = []
        self._rows: list[SampleRow] = []
        self._pixel_hashes: set[str] = set()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        self.abort()

    def add(self, batch: SampledBatch, start: int) -> None:
        """Take the samples start, start + 1, ... of a micro-batch; batches come in order.

        Errors: `ValueError` for images or signals that are not as planned.
        """
        images_BHWC = batch.images_BHWC
        stop = start + len(images_BHWC)
        wanted = (len(images_BHWC), *self._plan.image_size, self._plan.image_channels)
        if images_BHWC.dtype != np.uint8 or images_BHWC.shape != wanted:
            raise ValueError(
                f"got images {images_BHWC.dtype} {images_BHWC.shape}, wanted uint8 {wanted}"
            )
        if start != self._next_index or not start < stop <= self._shard.stop:
            raise ValueError(
                f"got samples {start} to {stop}, wanted them from {self._next_index} on, "
                f"up to {self._shard.stop}"
            )
        entry = _Batch(
            start,
            stop,
            float(batch.sampling_s),
            float(batch.decoding_s),
            [finite_floats(row, "mean_change") for row in batch.mean_change_BS],
            [finite_floats(row, "mean_log_prob") for row in batch.mean_log_prob_BS],
            list(map(depth_map_file, batch.depths_BN)) if self._plan.depth_map_grids else [],
        )
        for depth_map in entry.depth_maps:
            read_depth_map(depth_map, self._plan)
        if not len(entry.mean_change) == len(entry.mean_log_prob) == stop - start:
            raise ValueError("got signals for another number of images than there are")
        self._batches.append(entry)
        self._next_index = stop
        for offset in range(stop - start):
            while len(self._pending) >= self._max_pending:
                self._write_oldest()
            future = self._pool.submit(
                encode_image, images_BHWC[offset], self._plan.image_format, self._plan.png_level
            )
            self._pending.append((entry, offset, future))

    def finish(self) -> BuiltShard:
        """Close, fsync, reopen and check. Errors: `ShardError`, `ValueError`, `OSError`."""
        if self._next_index != self._shard.stop:
            raise ValueError(f"got samples up to {self._next_index}, wanted {self._shard.stop}")
        while self._pending:
            self._write_oldest()
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        reach("tar-built")
        self._write_parquet()
        self._check()
        shard_id = self._shard.shard_id
        return BuiltShard(
            shard_id=shard_id,
            num_samples=self._shard.num_samples,
            num_blank=sum(row.is_blank for row in self._rows),
            num_duplicates=sum(row.is_duplicate_in_shard for row in self._rows),
            tar_path=self._tar_path,
            parquet_path=self._parquet_path,
            files=ShardFiles(
                tar=_file_entry(self._tar_path, tar_name(shard_id)),
                parquet=_file_entry(self._parquet_path, parquet_name(shard_id)),
            ),
            batches=tuple(
                BatchTiming(b.start, b.stop, b.sampling_s, b.decoding_s, b.encoding_s)
                for b in self._batches
            ),
        )

    def abort(self) -> None:
        """Stop the threads and remove every scratch file; safe at any time, also twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        with suppress(OSError, ValueError):  # a full disk refuses the last blocks too
            self._tar.close()
        with suppress(OSError):
            self._stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write_oldest(self) -> None:
        batch, offset, future = self._pending.popleft()
        encoded = future.result()
        batch.encoding_s += encoded.encoding_s
        row = self._row(batch, offset, encoded)
        self._tar.write(
            {
                "__key__": row.key,
                **({} if row.label is None else {"cls": str(row.label).encode("ascii")}),
                **({} if row.prompt is None else {"txt": row.prompt.encode()}),
                "json": json_member(row, columns_of(self._plan)),
                self._plan.image_format: encoded.image,
                **({DEPTH_MAP_SUFFIX: batch.depth_maps[offset]} if batch.depth_maps else {}),
            }
        )
        self._rows.append(row)
        self._pixel_hashes.add(row.pixel_sha256)

    def _row(self, batch: _Batch, offset: int, encoded: EncodedImage) -> SampleRow:
        plan, compute, index = self._plan, self._plan.compute, batch.start + offset
        scale = plan.policy.reference_scale
        label = int(self._shard.labels[index - self._shard.start])
        return SampleRow(
            index=index,
            key=key_of(index),
            **caption(plan, label, index),
            seed=plan.seed,
            model=plan.model,
            weights_sha256=plan.weights_sha256,
            policy=plan.policy.preset,
            policy_json=plan.policy_json,
            reference_scale=NO_REFERENCE_SCALE if scale is None else scale,
            token_layers=compute.token_layers,
            token_layers_ratio=compute.token_layers_ratio,
            transformer_flops=compute.transformer_flops,
            decoder_flops=compute.decoder_flops,
            flops_ratio=compute.flops_ratio,
            depth_per_scale=list(compute.depth_per_scale),
            mean_change=batch.mean_change[offset],
            mean_log_prob=batch.mean_log_prob[offset],
            pixel_sha256=encoded.pixel_sha256,
            image_sha256=encoded.image_sha256,
            image_bytes=len(encoded.image),
            width=plan.image_size[1],
            height=plan.image_size[0],
            status=STATUS_OK,
            is_blank=encoded.is_blank,
            is_duplicate_in_shard=encoded.pixel_sha256 in self._pixel_hashes,
        )

    @property
    def _table(self) -> pa.Table:
        return rows_to_table(self._rows, schema_of(self._plan))

    def _write_parquet(self) -> None:
        with open(self._parquet_path, "xb") as stream:
            pq.write_table(
                self._table,
                stream,
                version="2.6",
                data_page_version="1.0",
                compression="zstd",
                compression_level=3,
                row_group_size=2**16,
            )
            stream.flush()
            os.fsync(stream.fileno())

    def _check(self) -> None:
        """Read both files back: every member and every row is what was written."""
        rows = iter(self._rows)
        with open(self._tar_path, "rb") as stream:
            plan = self._plan
            for sample in read_tar(stream, plan.image_format, plan.caption_suffixes):
                row = next(rows, None)
                told = sample.key, sample.label, sample.prompt
                if row is None or told != (row.key, row.label, row.prompt):
                    raise ShardError(f"{self._tar_path}: sample {sample.key} is not the next one")
                if hashlib.sha256(sample.image).hexdigest() != row.image_sha256:
                    raise ShardError(f"{self._tar_path}: the image of {sample.key} changed on disk")
        if next(rows, None) is not None:
            raise ShardError(f"{self._tar_path}: it ends early")
        if not pq.read_table(self._parquet_path).equals(self._table):
            raise ShardError(f"{self._parquet_path}: its rows changed on disk")


def _file_entry(path: Path, name: str) -> FileEntry:
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(name, path.stat().st_size, digest)
