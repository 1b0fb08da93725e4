"""A small image classifier: it judges digits by label and by features, and tests synthetic ones.

Two uses. The *feature network* of the digits is trained once on the real training digits and
shipped, so that a Frechet distance means the same on every machine (training gives other last bits,
and then another network, on another processor). The classifier of a *classification accuracy score*
(Ravuri and Vinyals, arXiv 1905.10887) is trained on generated images alone and tested on real ones.

Shape legend: N images of a set, B of a batch, F features, K classes, C channels, H W sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from depthvar.errors import InputError
from depthvar.training.data import REAL_SETS, augment, to_float
from depthvar.training.recipe import Augmentation

NUM_FEATURES = 96
FEATURE_SEED = 0
FEATURE_FILE = "digit_features.safetensors"
MAX_CAS_SAMPLES = 5_000
"""Images that a classifier for CAS is trained on, unless told otherwise."""
_READ_BATCH = 250


@dataclass(frozen=True)
class ClassifierRecipe:
    """How a classifier is trained: a fixed number of steps, whatever the number of images."""

    steps: int = 800
    batch: int = 100
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    label_smoothing: float = 0.05
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True, eq=False)
class Readings:
    """What a network makes of images: float32 features and probabilities of the classes."""

    features_NF: np.ndarray
    probabilities_NK: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """The most probable class of each image, int64."""
        labels: np.ndarray = self.probabilities_NK.argmax(axis=1)
        return labels

    @staticmethod
    def joined(parts: Sequence[Readings]) -> Readings:
        """Those of several batches in a row, as one."""
        return Readings(
            np.concatenate([part.features_NF for part in parts]),
            np.concatenate([part.probabilities_NK for part in parts]),
        )


class Classifier(nn.Module):
    """Five convolutions to `NUM_FEATURES` averages over the image, and a linear layer to classes.

    Takes float images (B, C, H, W) in [-1, 1] with sides of at least 8 pixels.
    """

    def __init__(self, num_classes: int, channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, 16, kernel=5, stride=2),
            *_convolution(16, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            *_convolution(64, 64),
            nn.MaxPool2d(2),
            *_convolution(64, NUM_FEATURES),
        )
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """The layer before the classes, (B, F); never negative."""
        features_BF: Tensor = self.body(images_BCHW).mean(dim=(2, 3))
        return features_BF

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits_BK: Tensor = self.head(self.features(images_BCHW))
        return logits_BK

    @torch.inference_mode()
    def read(self, images_NHWC: np.ndarray) -> Readings:
        """Features and probabilities of uint8 images, in batches of a fixed size."""
        self.eval()
        parts = []
        for batch_BCHW in _channels_first(images_NHWC).split(_READ_BATCH):
            features_BF = self.features(to_float(batch_BCHW))
            parts.append(Readings(features_BF.numpy(), self.head(features_BF).softmax(1).numpy()))
        return Readings.joined(parts)


class ShuffledArrays:
    """Epochs of shuffled images in memory, cut into batches; a batch may span two epochs."""

    def __init__(
        self, images_NHWC: np.ndarray, labels_N: np.ndarray, generator: torch.Generator
    ) -> None:
        self._images_NCHW = _channels_first(images_NHWC)
        self._labels_N = torch.from_numpy(np.ascontiguousarray(labels_N, dtype=np.int64))
        self._generator = generator
        self._left = torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` images, uint8 (B, C, H, W), and their labels (B,)."""
        while len(self._left) < count:
            epoch = torch.randperm(len(self._labels_N), generator=self._generator)
            self._left = torch.cat([self._left, epoch])
        taken_B, self._left = self._left[:count], self._left[count:]
        return self._images_NCHW[taken_B], self._labels_N[taken_B]


def train_classifier(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    num_classes: int,
    seed: int,
    recipe: ClassifierRecipe | None = None,
    after_step: Callable[[], object] | None = None,
) -> Classifier:
    """A classifier trained on uint8 images (N, H, W, C) and labels; about 20 s on one CPU thread.

    The result is a function of the data, the seed, the number of torch threads and the processor.
    `InputError` where there are fewer images than a batch holds.
    """
    recipe = recipe or ClassifierRecipe()
    check_enough_images(len(images_NHWC), recipe)
    generator = torch.Generator().manual_seed(seed)
    source = ShuffledArrays(images_NHWC, labels_N, generator)
    return fit_classifier(
        new_classifier(num_classes, images_NHWC.shape[3], seed),
        (source.take(recipe.batch) for _ in range(recipe.steps)),
        recipe,
        generator,
        after_step,
    )


def check_enough_images(num_images: int, recipe: ClassifierRecipe) -> None:
    """`InputError` where there are fewer images than a batch holds."""
    if num_images < recipe.batch:
        raise InputError(
            f"got {num_images} images to train a classifier on, wanted at least "
            f"{recipe.batch}: generate more"
        )


def new_classifier(num_classes: int, channels: int, seed: int) -> Classifier:
    """A classifier with the random weights of `seed`; the global random stream stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(num_classes, channels)


def fit_classifier(
    model: Classifier,
    batches: Iterable[tuple[Tensor, Tensor]],
    recipe: ClassifierRecipe,
    generator: torch.Generator,
    after_step: Callable[[], object] | None = None,
) -> Classifier:
    """Train `model` in place, a step for each of the `recipe.steps` batches, and return it.

    A batch is uint8 images (B, C, H, W) and int64 labels (B,); `generator` moves the images.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.2
    )
    model.train()
    for pixels_BCHW, labels_B in batches:
        images_BCHW = augment(to_float(pixels_BCHW), recipe.augmentation, generator)
        loss = F.cross_entropy(model(images_BCHW), labels_B, label_smoothing=recipe.label_smoothing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if after_step:
            after_step()
    return model.eval()


def accuracy(model: Classifier, images_NHWC: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of the images that the classifier reads as their label."""
    return float((model.read(images_NHWC).labels == labels_N).mean())


@lru_cache(maxsize=4)  # making the scenes takes a while
def real_arrays(real_set: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """A split of one of `training.data.REAL_SETS`: uint8 (N, H, W, C) and int64 labels.

    The arrays are shared by all callers: not to be changed.
    """
    real = REAL_SETS[real_set](split)
    return real.images_NCHW.permute(0, 2, 3, 1).contiguous().numpy(), real.labels_N.numpy()


def digit_arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Real digits of a split of `training.data.digits`, as `real_arrays` gives them."""
    return real_arrays("digits", split)


def cas(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    real_set: str,
    seed: int,
    after_step: Callable[[], object] | None = None,
) -> float:
    """Classification accuracy score: of one classifier that is trained on these images alone.

    It is tested on the held-out real images of a set of 10 classes.
    """
    classifier = train_classifier(
        images_NHWC, labels_N, num_classes=10, seed=seed, after_step=after_step
    )
    return accuracy(classifier, *real_arrays(real_set, "held-out"))


def train_features(real_set: str, after_step: Callable[[], object] | None = None) -> Classifier:
    """A feature network of a set's training images; that of the digits is shipped."""
    images_NHWC, labels_N = real_arrays(real_set, "train")
    return train_classifier(
        images_NHWC, labels_N, num_classes=10, seed=FEATURE_SEED, after_step=after_step
    )


def digit_features() -> Classifier:
    """The shipped feature network of the digits."""
    return from_safetensors((resources.files("depthvar.models") / FEATURE_FILE).read_bytes())


def from_safetensors(data: bytes) -> Classifier:
    """The feature network that `to_safetensors` wrote."""
    model = Classifier(num_classes=10)
    model.load_state_dict(load(data))
    return model.eval()


def to_safetensors(model: Classifier) -> bytes:
    """The weights of a classifier as a safetensors file."""
    return save({name: value.contiguous() for name, value in model.state_dict().items()})


def _convolution(inside: int, outside: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU(inplace=True),
    ]


def _channels_first(images_NHWC: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2)
