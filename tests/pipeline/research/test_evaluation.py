from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depthvar.config import model_config
from depthvar.errors import InputError
from depthvar.training.data import REAL_SETS, ImageSet
from jobs.evaluate import main
from pipeline.dataset.loader import iterate_samples, open_dataset
from pipeline.request.job_plan import JobPlan
from pipeline.research.quality import evaluation, features
from pipeline.research.quality.evaluation import (
    EvaluationRequest,
    Listener,
    Reference,
    evaluate,
    inception_evaluation,
)
from pipeline.research.quality.features import (
    ClassifierRecipe,
    Readings,
    digit_arrays,
    digit_features,
)
from pipeline.research.quality.inception import library_network
from pipeline.research.quality.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    moments,
    precision_recall,
)
from pipeline.shards.committed import Dataset
from pipeline.storage import Storage
from tests.fake_shards import make_plan, write_dataset, write_images
from tests.inception_weights import has_library, write_inception

NO_CAS = EvaluationRequest()
DIGITS = model_config("digits")


def digit_plan(counts: dict[int, int] | None = None) -> JobPlan:
    return make_plan(
        counts or dict.fromkeys(range(10), 13),
        class_names=DIGITS.class_names,
        image_size=(32, 32),
        samples_per_shard=60,
        batch_size=25,
    )


def planned_labels(plan: JobPlan) -> np.ndarray:
    return np.concatenate([plan.shard(i).labels for i in range(plan.num_shards)])


def real_digits(plan: JobPlan) -> tuple[np.ndarray, np.ndarray]:
    """Held-out digits for the labels of a plan, every one another one."""
    images, labels = digit_arrays("held-out")
    places = {c: iter(np.flatnonzero(labels == c)) for c in range(10)}
    wanted = planned_labels(plan)
    return images[[next(places[c]) for c in wanted]], wanted


@pytest.fixture(scope="module", autouse=True)
def fewer_training_digits() -> Iterator[None]:
    """Every eighth of them: what is done with them is the same."""

    def fewer(split: str) -> ImageSet:
        whole = REAL_SETS["digits"](split)
        step = 8 if split == "train" else 1
        return ImageSet(whole.images_NCHW[::step], whole.labels_N[::step], whole.class_names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "REAL_SETS", {**REAL_SETS, "digits": fewer})
        features.real_arrays.cache_clear()
        yield
    features.real_arrays.cache_clear()


@pytest.fixture(scope="module")
def real_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """130 real held-out digits as if a model had made them."""
    plan = digit_plan()
    return write_images(tmp_path_factory.mktemp("real") / "data", plan, real_digits(plan)[0])


def test_digits_get_the_numbers_of_the_feature_network(real_dataset: Dataset):
    network = digit_features()
    images, labels = real_digits(real_dataset.plan)
    real, made = network.read(digit_arrays("train")[0]), network.read(images)
    evaluation = evaluate(real_dataset, NO_CAS)
    precision, recall = precision_recall(real.features_NF, made.features_NF, neighbours=3)
    assert evaluation.scores == pytest.approx(
        {
            "label_accuracy": (made.labels == labels).mean(),
            "frechet_distance": frechet_distance(real.features_NF, made.features_NF),
            "precision": precision,
            "recall": recall,
        },
        rel=1e-6,
    )
    assert evaluation.scores["label_accuracy"] > 0.95
    assert evaluation.num_samples == 130
    assert not evaluation.notes


def test_noise_is_told_from_digits(tmp_path: Path, real_dataset: Dataset):
    plan = digit_plan()
    noise = np.random.default_rng(0).integers(0, 256, (130, 32, 32, 1), dtype=np.uint8)
    bad = evaluate(write_images(tmp_path / "data", plan, noise), NO_CAS).scores
    good = evaluate(real_dataset, NO_CAS).scores
    assert bad["label_accuracy"] < 0.3
    assert bad["precision"] < 0.1 < 0.6 < good["precision"]
    assert bad["frechet_distance"] > 10 * good["frechet_distance"]


def test_the_quick_numbers_are_told_before_any_training_and_its_time_from_its_first_steps(
    real_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
):
    told: list[object] = []
    clock = iter([100.0, 130.0])  # after the first step, and after 20 more

    def train(*_: object, after_step: Callable[[], object], **__: object) -> None:
        told.append("training")
        for _ in range(60):
            after_step()

    monkeypatch.setattr(evaluation, "ClassifierRecipe", lambda: ClassifierRecipe(steps=60))
    monkeypatch.setattr(features, "train_classifier", train)
    monkeypatch.setattr(features, "accuracy", lambda *_: 0.5)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    listener = Listener(found=lambda scores: told.append(list(scores)), said=told.append)
    scores = evaluate(real_dataset, EvaluationRequest(cas_runs=3), listener).scores
    assert told == [
        ["label_accuracy"],
        ["frechet_distance"],
        ["precision", "recall"],
        "training",
        "cas: 3 x 60 steps of training, about 4 min in all",
        "training",
        "training",
        ["cas", "cas_std"],
    ]
    assert next(iter(scores)) == "label_accuracy"
    assert (scores["cas"], scores["cas_std"]) == (0.5, 0.0)


def test_cas_trains_on_the_images_alone(real_dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    seen = []
    train = features.train_classifier

    def recording(images_NHWC: np.ndarray, labels_N: np.ndarray, **options: Any) -> Any:
        seen.append((images_NHWC, labels_N, options["seed"]))
        return train(images_NHWC, labels_N, **options)

    monkeypatch.setattr(features, "ClassifierRecipe", lambda: ClassifierRecipe(steps=40, batch=25))
    monkeypatch.setattr(features, "train_classifier", recording)
    evaluation = evaluate(real_dataset, EvaluationRequest(cas_samples=110, cas_runs=2))
    images, labels = real_digits(real_dataset.plan)
    for images_NHWC, labels_N, _ in seen:
        assert (images_NHWC == images[:110]).all()
        assert (labels_N == labels[:110]).all()
    assert [seed for _, _, seed in seen] == [0, 1]
    assert 0.3 < evaluation.scores["cas"] < 1
    assert evaluation.scores["cas_std"] >= 0
    assert evaluation.settings == {"cas_samples": 110, "cas_runs": 2}


def test_a_dataset_in_progress_is_measured_and_says_so(tmp_path: Path):
    plan = digit_plan()
    write_images(tmp_path / "data", plan, real_digits(plan)[0])
    (tmp_path / "data" / "commits" / "00001.json").unlink()
    dataset = open_dataset(str(tmp_path / "data"))
    evaluation = evaluate(dataset, NO_CAS)
    assert (evaluation.num_samples, evaluation.num_planned) == (70, 130)
    assert evaluation.notes == (
        "not finished: 70 of 130 images are committed; the numbers are of these alone",
    )
    fewer = evaluate(dataset, EvaluationRequest(samples=40))
    assert fewer.num_samples == 40
    assert "the first 40 of 70 committed images were used" in fewer.notes


def test_unbalanced_classes_are_noted(tmp_path: Path):
    plan = digit_plan({1: 30, 4: 10})
    evaluation = evaluate(write_images(tmp_path / "data", plan, real_digits(plan)[0]), NO_CAS)
    assert evaluation.notes == ("the classes are not balanced, those of the reference are",)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (EvaluationRequest(samples=131), "got --samples 131, wanted at most 130"),
        (EvaluationRequest(samples=9), "got 9 images, wanted at least 10"),
        (
            EvaluationRequest(cas_samples=131, cas_runs=1),
            "got --cas-samples 131, wanted 100 to 130",
        ),
        (EvaluationRequest(cas_samples=99, cas_runs=1), "got --cas-samples 99, wanted 100 to 130"),
        (EvaluationRequest(samples=110, cas_samples=120, cas_runs=1), "wanted 100 to 110"),
        (EvaluationRequest(cas_samples=110), "got --cas-samples without.*add --cas-runs"),
    ],
)
def test_too_few_images_are_said_before_the_work(
    real_dataset: Dataset, request_: EvaluationRequest, message: str
):
    with pytest.raises(InputError, match=message):
        evaluate(real_dataset, request_)


class ColourNetwork:
    """Mean and spread of every channel as features, the shares of the colours as classes."""

    def read(self, images_NHWC: np.ndarray) -> Readings:
        assert images_NHWC.dtype == np.uint8
        assert images_NHWC.shape[3] == 3
        mean = images_NHWC.mean(axis=(1, 2))
        features = np.concatenate([mean, images_NHWC.std(axis=(1, 2))], axis=1)
        return Readings(features, mean / mean.sum(1, keepdims=True))


@pytest.fixture
def rgb_dataset(tmp_path: Path) -> Dataset:
    plan = make_plan({0: 40, 1: 35}, image_channels=3, samples_per_shard=20)
    write_dataset(Storage.open(tmp_path / "rgb"), plan, tmp_path / "scratch")
    return open_dataset(str(tmp_path / "rgb"))


def reference_images() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 200, (121, 7, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["all", "images", "moments", "compressed"])
def test_rgb_images_are_compared_with_the_reference(rgb_dataset: Dataset, tmp_path: Path, kind):
    network, path = ColourNetwork(), tmp_path / "reference.npz"
    real = network.read(reference_images())
    given = moments(real.features_NF)
    statistics = {"mu": given.mean_F, "sigma": given.covariance_FF, "mu_s": np.zeros(3)}
    images = {"arr_0": reference_images()}
    if kind == "compressed":
        np.savez_compressed(path, **images, **statistics)
    else:
        np.savez(
            path,
            **(images if kind != "moments" else {}),
            **(statistics if kind != "images" else {}),
        )
    made = network.read(np.stack([s.image for s in iterate_samples(rgb_dataset)]))
    reference = Reference.open(path, image_side=7)
    evaluation = inception_evaluation(rgb_dataset, network, reference, 75)
    score, deviation = inception_score(made.probabilities_NK, splits=1)
    wanted = {
        "fid": frechet_distance(real.features_NF, made.features_NF),
        "inception_score": score,
        "inception_score_std": deviation,
    }
    if kind != "moments":
        precision, recall = precision_recall(real.features_NF, made.features_NF, neighbours=3)
        wanted |= {"precision": precision, "recall": recall}
    assert evaluation.scores == pytest.approx(wanted, rel=1e-9)
    assert evaluation.reference == "reference.npz"
    assert any("no precision and recall" in note for note in evaluation.notes) == (
        kind == "moments"
    )


def cheap_distance(a: Moments, b: Moments) -> float:
    """Stands in for Frechet's, whose roots of 2048 x 2048 values take 10 seconds."""
    overlap = (a.covariance_FF * b.covariance_FF).sum()
    return float(((a.mean_F - b.mean_F) ** 2).sum() + np.trace(a.covariance_FF) - overlap)


@has_library
def test_the_job_computes_fid_through_the_users_inception_file(
    rgb_dataset: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """The numbers in the JSON are those of the library's own network on the same pixels."""
    monkeypatch.setattr(evaluation, "frechet_from_moments", cheap_distance)
    weights, reference = write_inception(tmp_path), tmp_path / "VIRTUAL_imagenet7.npz"
    np.savez(reference, arr_0=reference_images()[:5])  # the network takes its time
    network = library_network()(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
    )
    made, real = (
        [part.numpy() for part in network(torch.from_numpy(images).permute(0, 3, 1, 2))]
        for images in (
            np.stack([s.image for s in iterate_samples(rgb_dataset)][:10]),
            reference_images()[:5],
        )
    )
    flags = ["--reference", str(reference), "--inception-weights", str(weights), "--device", "cpu"]
    flags += ["--samples", "10"]
    path = tmp_path / "numbers.json"
    assert main([rgb_dataset.storage.uri, *flags, "--json", str(path)]) == 0
    numbers = json.loads(path.read_text())
    probabilities = np.exp(made[1]) / np.exp(made[1]).sum(1, keepdims=True)
    score, _ = inception_score(probabilities, splits=1)
    precision, recall = precision_recall(real[0], made[0], neighbours=3)
    wanted = {
        "fid": cheap_distance(moments(real[0]), moments(made[0])),
        "inception_score": score,
        "precision": precision,
        "recall": recall,
    }
    assert {name: numbers[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
    assert not {"label_accuracy", "cas", "frechet_distance"} & numbers.keys()
    assert "fid " in capsys.readouterr().out


def test_a_reference_of_another_kind_is_refused(tmp_path: Path):
    cases: dict[str, tuple[dict[str, np.ndarray], str]] = {
        "size": ({"arr_0": reference_images()[:, :6]}, "6x7x3, the dataset's are 7x7x3"),
        "grey": ({"arr_0": reference_images()[..., 0]}, r"wanted uint8 \(images, height"),
        "floats": ({"arr_0": reference_images() / 255}, "of float64, wanted uint8"),
        "names": ({"images": reference_images()}, "holds images, wanted mu and sigma or"),
        "moments": ({"mu": np.zeros(4), "sigma": np.zeros((3, 3))}, r"sigma \(3, 3\), wanted"),
        "objects": ({"mu": np.array([{}]), "sigma": np.zeros(1)}, "cannot read the reference"),
    }
    for name, (arrays, message) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(InputError, match=message):
            Reference.open(tmp_path / f"{name}.npz", image_side=7)
    np.save(tmp_path / "array.npz.npy", reference_images())
    (tmp_path / "text.npz").write_text("no zip")
    np.savez(tmp_path / "whole.npz", arr_0=reference_images())
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("array.npz.npy", "text.npz", "cut.npz", "missing.npz"):
        with pytest.raises(InputError, match="cannot read the reference"):
            Reference.open(tmp_path / name, image_side=7)


def test_fid_says_everything_that_is_missing_and_downloads_nothing(rgb_dataset: Dataset):
    with pytest.raises(InputError) as raised:
        evaluate(rgb_dataset, EvaluationRequest())
    first, second = str(raised.value).splitlines()
    assert first.startswith("--inception-weights is missing, wanted torch-fidelity's")
    assert second.startswith("--reference is missing, wanted reference statistics")


def test_grey_images_of_another_model_are_refused(tmp_path: Path):
    write_dataset(Storage.open(tmp_path / "grey"), make_plan(), tmp_path / "scratch")
    request = EvaluationRequest(reference=tmp_path / "r", inception_weights=tmp_path / "w")
    with pytest.raises(InputError, match="holds grey images of fake, wanted RGB"):
        evaluate(open_dataset(str(tmp_path / "grey")), request)


def test_the_job_prints_a_table_and_writes_flat_json(
    real_dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "numbers.json"
    flags = ["--json", str(path), "--cas-runs", "0", "--samples", "100"]
    assert main([real_dataset.storage.uri, *flags]) == 0
    numbers = json.loads(path.read_text())
    assert {"label_accuracy", "frechet_distance", "precision", "recall"} <= numbers.keys()
    assert not {"cas", "fid", "inception_score"} & numbers.keys()
    assert numbers["num_samples"] == 100
    shown = capsys.readouterr().out
    assert f"label_accuracy       {numbers['label_accuracy']:.4f}" in shown
    assert "real training digits" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"]


def test_the_job_refuses_a_json_file_in_no_folder(real_dataset: Dataset, tmp_path: Path):
    with pytest.raises(InputError, match="whose folder does not exist"):
        main([real_dataset.storage.uri, "--json", str(tmp_path / "no" / "x.json")])


def test_a_damaged_shard_is_a_clear_error(tmp_path: Path):
    plan = digit_plan()
    write_images(tmp_path / "data", plan, real_digits(plan)[0])
    tar = tmp_path / "data" / "train" / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[5000:9000] = bytes(4000)
    tar.write_bytes(data)
    with pytest.raises(InputError, match="run verify --deep"):
        main([str(tmp_path / "data"), "--cas-runs", "0"])
