"""One sample as stored: image files, and the strict reading of a shard's tar and Parquet."""

from __future__ import annotations

import hashlib
import io
import tarfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import IO, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.request.generation import DEFAULT_PNG_LEVEL
from pipeline.shards.depth_maps import DEPTH_MAP_SUFFIX
from pipeline.shards.schema import SHARD_SCHEMA

# Quality 95 without colour subsampling; lossless WebP; PNG with the level it is told.
_ENCODERS: dict[str, dict[str, object]] = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True, "quality": 60, "method": 4, "exact": True},
}


@dataclass(frozen=True)
class TarSample:
    """The members of one sample as stored; `label` is the `.cls` member as a number.

    `depths` is the depth map, see `depth_maps`, `prompt` the `.txt` member; None where there is
    none.
    """

    key: str
    label: int | None
    metadata: bytes
    image: bytes
    depths: bytes | None = None
    prompt: str | None = None


class ShardError(Exception):
    """A shard's file that does not hold what it should."""


class ByteReader(Protocol):
    """What reading a tar needs of a stream."""

    def read(self, size: int = ..., /) -> bytes:
        """Up to `size` bytes, fewer at the end only."""


@dataclass(frozen=True)
class EncodedImage:
    """An image file with the facts about it that go into its row."""

    image: bytes
    image_sha256: str
    pixel_sha256: str
    is_blank: bool
    encoding_s: float


def read_tar(
    stream: ByteReader, image_format: str, captions: Collection[str] = ("cls",)
) -> Iterator[TarSample]:
    """The samples of a shard in order, read strictly and as a stream.

    `captions` as `JobPlan.caption_suffixes`. Errors: `ShardError` for a truncated or damaged tar
    and for members that are not exactly `{key}.json`, `{key}.{image_format}` and those of the
    captions together, a `{key}.depth.npy` between them or not.
    """
    members: dict[str, bytes] = {}
    wanted, current = {"json", image_format, *captions}, ""
    known = wanted | {DEPTH_MAP_SUFFIX}
    try:
        with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                content = tar.extractfile(info) if info.isreg() else None
                is_next = key == current if members else key > current
                if content is None or suffix not in known - members.keys() or not is_next:
                    raise ShardError(f"the member {info.name!r} does not belong here")
                current, members[suffix] = key, content.read()
                if wanted <= members.keys():
                    yield _tar_sample(key, members, image_format)
                    members = {}
                tar.members = []  # type: ignore[attr-defined]  # or it keeps every header
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ShardError(f"the tar is damaged or cut off: {error}") from error
    if members:
        raise ShardError(f"the tar is cut off inside the sample {current}")


def read_parquet(data: bytes, schema: pa.Schema = SHARD_SCHEMA) -> pa.Table:
    """The rows of a shard, read strictly. Errors: `ShardError` for anything else."""
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ShardError(f"the Parquet is damaged or cut off: {reason}") from error
    if not table.schema.equals(schema):
        raise ShardError("the Parquet has other columns than this release writes")
    return table


def decode_image(data: bytes, channels: int) -> np.ndarray:
    """The pixels of an image file as uint8 (height, width, channels); 1 is grey, 3 is RGB.

    Errors: `ShardError` where it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # Pillow's decoders raise many types
        raise ShardError(f"the image cannot be decoded: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def pixel_hash(image_HWC: np.ndarray) -> str:
    """SHA-256 of uint8 pixels, rows from the top, channels last: the column `pixel_sha256`."""
    return hashlib.sha256(np.ascontiguousarray(image_HWC).tobytes()).hexdigest()


def _tar_sample(key: str, members: dict[str, bytes], image_format: str) -> TarSample:
    label, prompt = members.get("cls"), members.get("txt")
    if label is not None and (not label.isdigit() or len(label) > 9):
        raise ShardError(f"the label of {key} is {label[:20]!r}, wanted a number")
    return TarSample(
        key,
        None if label is None else int(label),
        members["json"],
        members[image_format],
        members.get(DEPTH_MAP_SUFFIX),
        None if prompt is None else prompt.decode(),
    )


def encode_image(
    image_HWC: np.ndarray, image_format: str, png_level: int = DEFAULT_PNG_LEVEL
) -> EncodedImage:
    """The file of uint8 pixels (height, width, channels); equal pixels give equal bytes."""
    started = time.perf_counter()
    pixels = image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC
    buffer = io.BytesIO()
    options = dict(_ENCODERS[image_format])
    if image_format == "png":
        options["compress_level"] = png_level
    Image.fromarray(np.ascontiguousarray(pixels)).save(
        buffer, str(options.pop("format")), **options
    )
    image = buffer.getvalue()
    return EncodedImage(
        image=image,
        image_sha256=hashlib.sha256(image).hexdigest(),
        pixel_sha256=pixel_hash(image_HWC),
        is_blank=bool((image_HWC == image_HWC[0, 0]).all()),
        encoding_s=time.perf_counter() - started,
    )
