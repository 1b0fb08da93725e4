"""A dataset in the formats that other tools read: whole, at a new path, or not at all.

`adm-npz` is what OpenAI's evaluator reads (github.com/openai/guided-diffusion, evaluations): arr_0
with uint8 RGB images (N, H, W, 3) and, as its samplers write, arr_1 with the labels where there are
classes. `png-folder` is a folder of PNG files for each class, named as `class_folders` does, which
torchvision's ImageFolder reads, and `depthvar train-model --data` and `depthvar train-classifier
--test` with the classes' names. Of a text model's dataset a `metadata.jsonl` holds the prompt of
every file, as `load_dataset("imagefolder")` wants it; without classes all files are in one folder.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from depthvar.errors import InputError, naming
from depthvar.paths import check_writable
from depthvar.training.class_folders import folder_names
from pipeline.dataset.loader import iterate_samples, iterate_stored, stored_image
from pipeline.shards.committed import Dataset
from pipeline.shards.samples import ShardError, TarSample, encode_image
from pipeline.storage import TEMP_PREFIX

METADATA_NAME = "metadata.jsonl"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest a zip knows: equal datasets give equal files

Advance = Callable[[int], object]


def export_adm_npz(dataset: Dataset, out: Path, advance: Advance = lambda count: None) -> None:
    """Write the committed images in key order to one `.npz`, holding one image at a time.

    Grey images become RGB, which is all the evaluator takes. Errors: `InputError` where `out`
    exists or is no `.npz`; `ShardError` for a damaged shard.
    """
    if out.suffix != ".npz":
        raise InputError(f"got --out {out}, wanted a name that ends in .npz: rename it")
    shape, count = (*dataset.plan.image_size, 3), dataset.num_samples
    labels = np.empty(count, dtype=np.int64)
    with _appearing_whole(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with _array(archive, "arr_0", (count, *shape), np.dtype(np.uint8)) as write:
            for place, sample in enumerate(iterate_samples(dataset)):
                image = sample.image.repeat(3 // sample.image.shape[2], axis=2)
                if image.shape != shape:
                    wanted = "x".join(map(str, dataset.plan.image_size))
                    raise ShardError(f"{sample.key} is {image.shape}, wanted {wanted} pixels")
                write(image.tobytes())
                if sample.label is not None:
                    labels[place] = sample.label
                advance(1)
        if dataset.plan.class_names:
            with _array(archive, "arr_1", labels.shape, labels.dtype) as write:
                write(labels.tobytes())


def export_png_folder(
    dataset: Dataset, out: Path, advance: Advance = lambda count: None, *, flat: bool = False
) -> None:
    """Write the committed images to `out/{class}/{key}.png`, or `out/{key}.png` when `flat`.

    A class without a committed image has no folder. Images that are PNG already keep their bytes.
    Errors: `InputError` where `out` exists; `ShardError`.
    """
    folders = folder_names(dataset.plan.class_names)
    with _appearing_whole(out) as temporary:
        temporary.mkdir()
        for image in _png_files(dataset):
            name = f"{image.key}.png"
            if image.label is not None and not flat:
                name = f"{folders[image.label]}/{name}"
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(image.image)
            if image.prompt is not None:
                line = json.dumps({"file_name": name, "prompt": image.prompt}, ensure_ascii=False)
                with open(temporary / METADATA_NAME, "a", encoding="utf-8") as stream:
                    stream.write(f"{line}\n")
            advance(1)


def _png_files(dataset: Dataset) -> Iterator[TarSample]:
    """Every committed sample in key order, its image as a PNG file."""
    for stored in iterate_stored(dataset):
        pixels = stored_image(stored, dataset.plan.image_channels)  # a damaged file stops here
        is_png = dataset.plan.image_format == "png"
        yield stored if is_png else replace(stored, image=encode_image(pixels, "png").image)


@contextmanager
def _array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Iterator[Callable[[bytes], object]]:
    """A member of an `.npz` whose values come piece by piece, in C order."""
    info = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
    with archive.open(info, "w", force_zip64=True) as stream:
        descr = np.lib.format.dtype_to_descr(dtype)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        yield stream.write


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    """A temporary path beside `out` that gets its name at a clean exit and else disappears.

    Errors: `InputError` where `out` exists, before or after the work, or cannot be made.
    """
    if os.path.lexists(out):
        raise _exists(out)
    if not out.absolute().parent.is_dir():
        raise InputError(f"got --out {out}, whose folder does not exist: make it first")
    check_writable(out.absolute().parent, f"--out {out}")
    temporary = out.absolute().with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}-{out.name}")
    try:
        with naming(out):
            yield temporary
        if os.path.lexists(out):
            raise _exists(out)
        os.rename(temporary, out)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _exists(out: Path) -> InputError:
    return InputError(f"got --out {out}, which exists: nothing is overwritten, choose another name")
