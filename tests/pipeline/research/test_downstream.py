from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from depthvar.config import model_config
from depthvar.errors import InputError
from depthvar.training.pictures import Background
from pipeline.dataset.loader import iterate_samples, open_dataset
from pipeline.request.job_plan import JobPlan
from pipeline.research.quality import downstream
from pipeline.research.quality.downstream import TrainingSet, open_test_set, train_on, training_sets
from pipeline.research.quality.features import ClassifierRecipe, to_safetensors, train_classifier
from pipeline.shards.committed import Dataset
from pipeline.shards.samples import ShardError
from pipeline.storage import Storage
from tests.fake_shards import fake_batch, fake_digits, make_plan, write_dataset, write_images

DIGITS = model_config("digits")
TINY = ClassifierRecipe(steps=3, batch=20)


def digit_plan(counts: dict[int, int] | None = None, **changes: Any) -> JobPlan:
    """Noise in the format of the digits: 70 samples in 4 shards."""
    counts = counts or dict.fromkeys(range(10), 7)
    names, side = DIGITS.class_names, DIGITS.image_side
    settings = {
        "class_names": names,
        "image_size": (side, side),
        "samples_per_shard": 18,
        **changes,
    }
    return make_plan(counts, **settings)


def written(folder: Path, plan: JobPlan) -> Dataset:
    write_dataset(Storage.open(folder / "data"), plan, folder / "scratch")
    return open_dataset(str(folder / "data"))


@pytest.fixture(autouse=True)
def _no_parsing_of_the_real_digits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(downstream, "digit_arrays", fake_digits)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return written(tmp_path_factory.mktemp("noise"), digit_plan())


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """24 RGB images of 9x9 pixels, which show no digits."""
    plan = make_plan(
        {0: 8, 1: 8, 3: 8}, image_size=(9, 9), image_channels=3, class_names=tuple("cabd")
    )
    return written(tmp_path_factory.mktemp("colours"), plan)


def balanced_digits(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Real training digits one class after the other: 0 1 ... 9 0 1 ..."""
    images, labels = fake_digits("train")
    places = {label: iter(np.flatnonzero(labels == label)) for label in range(10)}
    chosen = [next(places[i % 10]) for i in range(number)]
    return images[chosen], labels[chosen]


def seen_batches(
    training_set: TrainingSet, recipe: ClassifierRecipe, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Tensor, Tensor]]:
    """The batches that a training would take."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(model: Any, batches: Iterable[tuple[Tensor, Tensor]], *others: Any) -> Any:
        seen.extend(batches)
        return model

    monkeypatch.setattr(downstream, "fit_classifier", record)
    train_on(training_set, recipe, seed=0)
    return seen


def fingerprints(images: Iterable[np.ndarray], labels: Iterable[int]) -> Counter[Any]:
    return Counter((np.asarray(i).tobytes(), int(k)) for i, k in zip(images, labels, strict=True))


def batch_fingerprints(batches: Iterable[tuple[Tensor, Tensor]]) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for images_BCHW, labels_B in batches:
        found += fingerprints(images_BCHW.permute(0, 2, 3, 1).contiguous().numpy(), labels_B)
    return found


def test_real_digits_alone_give_the_classifier_of_these_arrays():
    wanted = train_classifier(*balanced_digits(33), num_classes=10, seed=4, recipe=TINY)
    trained = train_on(TrainingSet(None, 0, 33, 0), TINY, seed=4)
    assert to_safetensors(trained) == to_safetensors(wanted)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_image_comes_once_in_an_epoch(noise: Dataset, monkeypatch, num_workers: int):
    samples = list(iterate_samples(noise))
    wanted = fingerprints((s.image for s in samples), (s.label for s in samples))
    recipe = ClassifierRecipe(steps=6, batch=35)  # three epochs of 70 images
    batches = seen_batches(TrainingSet(noise, 70, 0, num_workers), recipe, monkeypatch)
    epochs = [batch_fingerprints(batches[start : start + 2]) for start in (0, 2, 4)]
    assert epochs == [wanted] * 3
    assert not torch.equal(batches[0][0], batches[2][0])


def test_samples_are_the_first_of_the_dataset(noise: Dataset, monkeypatch):
    made = fake_batch(noise.plan, range(40)).images_BHWC
    labels = np.concatenate([noise.plan.shard(i).labels for i in range(3)])[:40]
    recipe = ClassifierRecipe(steps=2, batch=20)
    batches = seen_batches(TrainingSet(noise, 40, 0, 2), recipe, monkeypatch)
    assert batch_fingerprints(batches) == fingerprints(made, labels)
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), 4)


def test_real_digits_are_mixed_into_every_batch_in_proportion(noise: Dataset, monkeypatch):
    real, samples = balanced_digits(20), list(iterate_samples(noise))
    made = fingerprints((s.image for s in samples), (s.label for s in samples))
    recipe = ClassifierRecipe(steps=9, batch=10)  # one epoch of 70 + 20
    batches = seen_batches(TrainingSet(noise, 70, 20, 1), recipe, monkeypatch)
    assert batch_fingerprints(batches) == made + fingerprints(*real)
    shares = [(batch_fingerprints([batch]) & fingerprints(*real)).total() for batch in batches]
    assert set(shares) == {2, 3}


def test_a_training_on_shards_is_a_function_of_its_seed(noise: Dataset):
    training_set = TrainingSet(noise, 36, 4, 2)
    first, again, other = (
        to_safetensors(train_on(training_set, TINY, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_training_leaves_the_global_random_stream_alone(noise: Dataset):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train_on(TrainingSet(noise, 70, 0, 0), TINY, seed=0)
    assert torch.equal(torch.rand(3), wanted)


def rows(dataset: Dataset | None, **changes: Any) -> list[TrainingSet]:
    test_set = open_test_set("digits", dataset)
    options: dict[str, Any] = {"samples": [], "real": [0], "num_workers": None, "recipe": TINY}
    return training_sets(dataset, test_set, **{**options, **changes})


def test_every_number_of_samples_meets_every_number_of_real_digits(noise: Dataset):
    sets = rows(noise, samples=[20, 50], real=[0, 10])
    assert [(s.num_samples, s.num_real) for s in sets] == [(20, 0), (20, 10), (50, 0), (50, 10)]
    assert [(s.num_samples, s.num_real) for s in rows(noise)] == [(70, 0)]
    assert [(s.num_samples, s.num_real) for s in rows(None, real=[20, 40])] == [(0, 20), (0, 40)]


def test_loader_workers_are_two_or_as_many_as_there_are_shards(noise: Dataset):
    assert [s.num_workers for s in rows(noise, samples=[18, 19, 70], real=[10])] == [1, 2, 2]
    assert [s.num_workers for s in rows(noise, num_workers=4)] == [4]
    assert [s.num_workers for s in rows(None, real=[20])] == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": [20, 71]}, "got --samples 71, wanted at most 70"),
        ({"samples": [19]}, "got 19 images to train a classifier on, wanted at least 20"),
        ({"num_workers": 5}, "got 4 shards for 1 ranks x 5 loader workers"),
        ({"samples": [36], "num_workers": 3}, "got 2 shards for 1 ranks x 3 loader workers"),
        ({"real": [0, 201]}, "got --real 201, wanted at most 200, the real training digits"),
    ],
)
def test_too_few_images_or_shards_are_refused(noise: Dataset, changes, message: str):
    with pytest.raises(InputError, match=message):
        rows(noise, **changes)


@pytest.mark.parametrize("changes", [{}, {"samples": [20], "real": [20]}])
def test_without_a_dataset_only_real_digits_can_be_trained_on(changes):
    with pytest.raises(InputError, match="name a dataset, or give --real and no --samples"):
        rows(None, **changes)


def test_classes_that_only_the_test_has_are_refused(tmp_path: Path):
    dataset = written(tmp_path, digit_plan({2: 15, 7: 15}))
    with pytest.raises(InputError, match="no image of 8 classes to train on, class 0 first"):
        rows(dataset)
    assert rows(dataset, real=[10])[0].class_ids() == set(range(10))


def test_digits_do_not_test_what_shows_none(colours: Dataset):
    with pytest.raises(InputError, match=r"got --test digits for .* shows no 32x32 grey digits"):
        open_test_set("digits", colours)


def test_real_digits_are_not_mixed_with_what_shows_none(colours: Dataset, tmp_path: Path):
    test_set = open_test_set(str(class_folders(tmp_path / "real", {"a": 1})), colours)
    with pytest.raises(InputError, match=r"got --real 7 for .* leave --real out"):
        training_sets(colours, test_set, samples=[], real=[7], num_workers=None, recipe=TINY)


def test_a_held_out_dataset_is_read_whole(colours: Dataset, tmp_path: Path):
    plan = make_plan(
        {0: 5, 1: 6},
        image_size=(9, 9),
        image_channels=3,
        class_names=colours.plan.class_names,
        seed=77,
    )
    test_set = open_test_set(written(tmp_path, plan).storage.uri, colours)
    assert np.array_equal(test_set.images_NHWC, fake_batch(plan, range(11)).images_BHWC)
    wanted = np.concatenate([plan.shard(i).labels for i in range(plan.num_shards)])
    assert test_set.labels_N.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "holds the images that are trained on"),
        ({"class_names": tuple("cabx"), "seed": 9}, "differ in class_names"),
        ({"image_size": (10, 10), "seed": 9}, "differ in image_size"),
        ({"image_channels": 1, "seed": 9}, "differ in image_channels"),
    ],
)
def test_a_dataset_that_cannot_test_is_refused(colours: Dataset, tmp_path: Path, changes, message):
    settings: dict[str, Any] = {"image_channels": 3, "class_names": tuple("cabd")}
    plan = make_plan({0: 8, 1: 8, 3: 8}, **{"image_size": (9, 9), **settings, **changes})
    with pytest.raises(InputError, match=message):
        open_test_set(written(tmp_path, plan).storage.uri, colours)


def class_folders(folder: Path, sides: dict[str, int]) -> Path:
    """One PNG for each class: a square of one grey, twice as wide as the images are."""
    for name, grey in sides.items():
        (folder / name).mkdir(parents=True)
        Image.new("L", (18, 18), grey).save(folder / name / "one.png")
    return folder


def test_a_folder_of_images_is_read_by_class_name(colours: Dataset, tmp_path: Path):
    folder = class_folders(tmp_path / "real", {"a": 10, "b": 20, "c": 30})
    test_set = open_test_set(str(folder), colours)
    names = colours.plan.class_names
    found = dict(zip(test_set.labels_N.tolist(), test_set.images_NHWC, strict=True))
    greys = {names[label]: set(image.ravel().tolist()) for label, image in found.items()}
    assert greys == {"a": {10}, "b": {20}, "c": {30}}
    assert test_set.images_NHWC.shape == (3, 9, 9, 3)


@pytest.mark.parametrize("name", ["caf\u00e9", "cafe\u0301"])
def test_class_folders_are_matched_in_any_unicode_form(tmp_path: Path, name: str):
    names = ("2", "caf\u00e9", "1")
    dataset = written(tmp_path, make_plan({0: 8, 1: 8, 2: 8}, class_names=names, image_size=(9, 9)))
    folder = class_folders(tmp_path / "real", {"1": 10, "2": 20, name: 30})
    test_set = open_test_set(str(folder), dataset)
    greys = test_set.images_NHWC[:, 0, 0, 0].tolist()
    assert dict(zip(test_set.labels_N.tolist(), greys, strict=True)) == {0: 20, 1: 30, 2: 10}


def test_a_dataset_of_the_same_classes_in_another_unicode_form_fits(tmp_path: Path):
    plans = [
        make_plan({0: 8, 1: 8}, class_names=("a", name), image_size=(9, 9), seed=seed)
        for seed, name in enumerate(("caf\u00e9", "cafe\u0301"))
    ]
    ours, theirs = (written(tmp_path / str(plan.seed), plan) for plan in plans)
    assert len(open_test_set(theirs.storage.uri, ours).labels_N) == 16


def test_a_folder_is_read_as_for_training(colours: Dataset, tmp_path: Path):
    folder = class_folders(tmp_path / "real", {"a": 10, "b": 20})
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(folder / "b" / "one.png")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "a" / "Thumbs.db").touch()
    (folder / "a" / "zero.png").touch()
    with pytest.raises(InputError, match=r"a/zero\.png is no readable picture: the file is empty"):
        open_test_set(str(folder), colours)
    background = Background.of("#070809")
    test_set = open_test_set(str(folder), colours, background=background, skip_unreadable=True)
    assert test_set.images_NHWC[:, 0, 0].tolist() == [[10, 10, 10], [7, 8, 9]]
    assert test_set.reading is not None
    assert test_set.reading.passed_over == {".*": 1, "Thumbs.db": 1}
    assert len(test_set.reading.unreadable) == 1


def test_a_test_folder_of_splits_is_named_for_what_it_is(colours: Dataset, tmp_path: Path):
    class_folders(tmp_path / "real" / "train", {"a": 1})
    class_folders(tmp_path / "real" / "val", {"a": 1})
    with pytest.raises(InputError, match=r"wanted --test .*real/val"):
        open_test_set(str(tmp_path / "real"), colours)


def test_a_folder_of_other_classes_is_refused(colours: Dataset, tmp_path: Path):
    other = class_folders(tmp_path / "other", {"a": 1, "zebra": 2})
    with pytest.raises(InputError, match=r"a class folder 'zebra', wanted .* such as 'c'"):
        open_test_set(str(other), colours)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no class folder"):
        open_test_set(str(tmp_path / "empty"), colours)


def test_images_too_small_for_the_classifier_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="7x7 pixels, wanted at least 8x8"):
        open_test_set("elsewhere", written(tmp_path, make_plan()))


def test_another_test_than_digits_wants_a_dataset(tmp_path: Path):
    with pytest.raises(InputError, match="without a dataset, wanted --test digits"):
        open_test_set(str(tmp_path), None)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_shard_ends_a_training_in_one_line(tmp_path: Path, num_workers: int):
    plan = digit_plan()
    images = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 1), dtype=np.uint8)
    dataset = write_images(tmp_path / "data", plan, images)
    tar = tmp_path / "data" / "train" / "00002.tar"
    tar.write_bytes(bytes(512) + tar.read_bytes()[512:])
    with pytest.raises(ShardError) as raised:
        train_on(TrainingSet(dataset, 70, 0, num_workers), TINY, seed=0)
    assert str(raised.value).startswith("train/00002.tar: ")
    assert len(str(raised.value).splitlines()) == 1
