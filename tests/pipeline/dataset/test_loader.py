from __future__ import annotations

import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from depthvar.errors import InputError
from pipeline.dataset.loader import iterate_samples, open_dataset, training_pipeline
from pipeline.request.job_plan import key_of
from pipeline.request.plan_file import open_plan
from pipeline.shards.committed import Dataset
from pipeline.shards.samples import ShardError
from pipeline.storage import Storage
from tests.fake_shards import fake_batch, make_plan, object_store, publish_one, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """54 samples in 6 shards."""
    folder = tmp_path_factory.mktemp("data") / "out"
    plan = make_plan({0: 20, 1: 14, 2: 20})
    write_dataset(Storage.open(str(folder)), plan, tmp_path_factory.mktemp("scratch"))
    return folder


@pytest.fixture
def dataset(folder) -> Dataset:
    return open_dataset(str(folder))


def test_every_sample_comes_back_as_it_was_made(dataset):
    samples = list(iterate_samples(dataset))
    made = fake_batch(dataset.plan, range(54)).images_BHWC
    labels = np.concatenate([dataset.plan.shard(i).labels for i in range(6)])
    assert [s.key for s in samples] == [key_of(i) for i in range(54)]
    assert np.array_equal(np.stack([s.image for s in samples]), made)
    assert [s.label for s in samples] == labels.tolist()
    assert all(s.metadata["index"] == int(s.key) for s in samples)


def test_a_store_is_read_as_a_folder_is(dataset, tmp_path):
    store = object_store()
    plan = write_dataset(store, dataset.plan, tmp_path)
    same = iterate_samples(Dataset(store, plan, dataset.records))
    assert [s.metadata for s in same] == [s.metadata for s in iterate_samples(dataset)]


def test_only_shards_that_are_done_are_read(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    plan = open_plan(storage, make_plan())
    publish_one(storage, plan, 1, tmp_path / "scratch")
    storage.publish_bytes(b"cut off", "train/00000.tar")
    dataset = open_dataset(str(tmp_path / "out"))
    assert (dataset.num_samples, dataset.num_missing) == (9, 2)
    assert [int(s.key) for s in iterate_samples(dataset)] == list(range(9, 18))


def test_an_output_without_a_finished_shard_is_refused(tmp_path):
    open_plan(Storage.open(str(tmp_path / "out")), make_plan())
    with pytest.raises(InputError, match="none of 3 shards is done"):
        open_dataset(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("none", "does not exist, wanted a dataset's folder: check the path"),
        ("empty", "is empty, wanted a dataset: generate one first"),
        ("broken", "is a broken symbolic link, wanted a dataset's folder"),
        ("other/file", "is a file, wanted a dataset's folder"),
        ("other", r"holds no plan\.json, wanted a dataset: name the folder that generate wrote"),
        ("all/out/train", r"holds no plan\.json, wanted a dataset: name \S+/all/out$"),
        ("all", r"holds no plan\.json, wanted a dataset: name \S+/all/out or \S+/all/two$"),
    ],
)
def test_what_is_no_dataset_is_named_in_the_words_of_a_reader(tmp_path, place, wanted):
    for folder in ("empty", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "file").write_text("x")
    (tmp_path / "broken").symlink_to("nowhere")
    for name in ("two", "out"):
        storage = Storage.open(tmp_path / "all" / name)
        open_plan(storage, make_plan())
        storage.publish_bytes(b"", "train/00000.tar")
    with pytest.raises(InputError, match=f"got {tmp_path}/{place}, which {wanted}") as caught:
        open_dataset(str(tmp_path / place))
    assert "output" not in str(caught.value)


def test_a_shard_damaged_after_it_was_committed_is_named(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    write_dataset(storage, make_plan(), tmp_path / "scratch")
    data = bytearray(storage.read("train/00001.tar"))
    data[0:512] = bytes(512)
    storage.publish_bytes(bytes(data), "train/00001.tar")
    with pytest.raises(ShardError, match=r"train/00001\.tar"):
        list(iterate_samples(open_dataset(str(tmp_path / "out"))))


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(dataset):
    pipeline = training_pipeline(dataset, seed=3, transform=_fingerprint)
    epochs = [list(pipeline), list(pipeline)]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert len(set(epochs[0])) == 54
    assert epochs[0] != epochs[1]
    assert Counter(label for _, label in epochs[0]) == {0: 20, 1: 14, 2: 20}


def test_the_order_is_a_function_of_seed_and_epoch(dataset):
    first = training_pipeline(dataset, seed=3, transform=_fingerprint)
    second = training_pipeline(dataset, seed=3, transform=_fingerprint)
    epochs = [list(first), list(first)]
    second.set_epoch(1)
    assert list(second) == epochs[1]
    assert list(training_pipeline(dataset, seed=4, transform=_fingerprint)) != epochs[0]


def test_without_a_buffer_samples_come_in_key_order(dataset):
    pipeline = training_pipeline(dataset, shuffle_buffer=0, transform=_fingerprint)
    made = [_fingerprint(image) for image in fake_batch(dataset.plan, range(54)).images_BHWC]
    assert [image for image, _ in pipeline] == made


def test_loader_workers_share_the_samples_between_them(dataset):
    pipeline = training_pipeline(dataset)
    batches = list(DataLoader(pipeline, batch_size=4, num_workers=2))
    labels = torch.cat([labels for _, labels in batches])
    assert Counter(labels.tolist()) == {0: 20, 1: 14, 2: 20}
    assert batches[0][0].shape == (4, 7, 7, 1)
    assert batches[0][0].dtype == torch.uint8


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_and_workers_cover_every_sample_once(dataset, monkeypatch, num_ranks):
    seen: list[object] = []
    for rank in range(num_ranks):
        for worker in range(2):
            _pretend(monkeypatch, rank, num_ranks, worker, 2)
            seen += training_pipeline(dataset, seed=1, transform=_fingerprint)
    assert len(seen) == len(set(seen)) == 54


def test_with_equal_share_every_worker_gives_the_same_number(dataset, monkeypatch):
    counts = []
    for rank in range(4):
        _pretend(monkeypatch, rank, 4, 0, 1)
        counts.append(len(list(training_pipeline(dataset, seed=1, equal_share=True))))
    assert counts == [13, 13, 13, 13]


@pytest.mark.parametrize("count", [1, 9, 25, 54])
def test_the_first_samples_can_be_asked_for(dataset, count):
    made = [_fingerprint(image) for image in fake_batch(dataset.plan, range(count)).images_BHWC]
    in_order = training_pipeline(
        dataset, num_samples=count, shuffle_buffer=0, transform=_fingerprint
    )
    assert [image for image, _ in in_order] == made
    shuffled = training_pipeline(dataset, num_samples=count, transform=_fingerprint)
    assert Counter(image for image, _ in shuffled) == Counter(made)


def test_an_equal_share_of_the_first_samples(dataset, monkeypatch):
    first = Counter(training_pipeline(dataset, num_samples=25, transform=_fingerprint))
    for rank in range(2):
        _pretend(monkeypatch, rank, 2, 0, 1)
        pipeline = training_pipeline(
            dataset, num_samples=25, equal_share=True, transform=_fingerprint
        )
        share = list(pipeline)
        assert len(share) == 12
        assert set(share) <= set(first)


def test_a_damaged_image_is_named_in_training_too(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    plan = write_dataset(storage, make_plan(), tmp_path / "scratch")
    tar = storage.read("train/00001.tar")
    start = tar.index(b"\x89PNG")
    storage.publish_bytes(tar[:start] + bytes(8) + tar[start + 8 :], "train/00001.tar")
    dataset = open_dataset(str(tmp_path / "out"))
    for samples in (training_pipeline(dataset, shuffle_buffer=0), iterate_samples(dataset)):
        with pytest.raises(ShardError, match=rf"^{key_of(9)}: .*run verify --deep"):
            list(samples)
    assert plan.shard_range(1)[0] == 9


def test_too_few_shards_is_an_error_and_not_a_hang(dataset, monkeypatch):
    _pretend(monkeypatch, 0, 4, 0, 2)
    with pytest.raises(InputError, match="6 shards for 4 ranks x 2 loader workers"):
        next(iter(training_pipeline(dataset)))


def test_too_few_shards_reaches_the_training_process(dataset):
    loader = DataLoader(training_pipeline(dataset), num_workers=7)
    with pytest.raises(InputError, match="use fewer workers"):
        next(iter(loader))


def test_a_pipeline_travels_to_a_spawned_worker(dataset):
    pipeline = pickle.loads(pickle.dumps(training_pipeline(dataset, transform=_fingerprint)))
    assert len(list(pipeline)) == 54


CONDITIONS = {
    "label in (0, 2) and not is_blank": lambda row: row["label"] in (0, 2),
    "0 < label <= 1 or index < 3": lambda row: row["label"] == 1 or row["index"] < 3,
    "mean_log_prob > -0.5": lambda row: np.mean(row["mean_log_prob"]) > -0.5,
    "mean_change[2] * 2 >= 1.0": lambda row: row["mean_change"][2] * 2 >= 1.0,
    "class_name not in ['zero'] and -token_layers / 4 < -8.4": lambda row: row["label"] != 0,
    "pixel_sha256 < '8'": lambda row: row["pixel_sha256"] < "8",
}


@pytest.mark.parametrize("where", CONDITIONS)
def test_a_condition_on_the_rows_chooses_the_samples(dataset, monkeypatch, where):
    made = [s for s in iterate_samples(dataset) if CONDITIONS[where](s.metadata | ROW)]
    assert 0 < len(made) < 54
    assert [s.key for s in iterate_samples(dataset, where=where)] == [s.key for s in made]
    wanted = Counter(_fingerprint(sample.image) for sample in made)
    seen: list[bytes] = []
    for rank in range(2):
        _pretend(monkeypatch, rank, 2, 0, 1)
        seen += [i for i, _ in training_pipeline(dataset, where=where, transform=_fingerprint)]
    assert Counter(seen) == wanted
    _pretend(monkeypatch, 0, 1, 0, 1)
    few = training_pipeline(
        dataset, where=where, num_samples=5, shuffle_buffer=0, transform=_fingerprint
    )
    assert [image for image, _ in few] == [_fingerprint(s.image) for s in made[:5]]


ROW = {"token_layers": 34}


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("mean_logprob > 1", "with the unknown column 'mean_logprob': did you mean mean_log_prob"),
        ("zzz == 1", "unknown column 'zzz': known: index, key, label"),
        ("label > 'a'", "cannot be told of the columns: Function 'greater' has no kernel"),
        ("label", "must evaluate to bool"),
        ("label[0] == 1", "cannot be told of the columns"),
        ("mean_change[3] > 0", "Index 3 is out of bounds"),
        ("mean_change[-1] > 0", "wanted columns, numbers"),
        ("label in 3", "with '3', wanted a list"),
        ("label ==", "does not parse: invalid syntax"),
        ("label == 99999999999999999999999", "does not parse"),
        ("__import__('os').getcwd() == label", "wanted columns, numbers, texts"),
        ("label.real == 1", "with 'label.real', wanted columns"),
        ("label == 3", "fits no sample of "),
    ],
)
def test_what_is_no_condition_is_refused_with_what_to_write(dataset, where, problem):
    with pytest.raises(InputError, match=re.escape(problem)):
        training_pipeline(dataset, where=where)


def test_rows_that_are_damaged_are_named(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    write_dataset(storage, make_plan(), tmp_path / "scratch")
    storage.publish_bytes(bytes(storage.size("meta/00001.parquet") or 0), "meta/00001.parquet")
    with pytest.raises(ShardError, match=r"^meta/00001\.parquet: .*run verify --deep"):
        training_pipeline(open_dataset(str(tmp_path / "out")), where="label == 1")


def test_standard_readers_read_the_dataset(folder):
    urls = sorted(str(path) for path in (folder / "train").iterdir())
    keys = [s["__key__"] for s in wds.WebDataset(urls, shardshuffle=False)]
    table = ds.dataset(folder / "meta").to_table()
    assert keys == table["key"].to_pylist() == [key_of(i) for i in range(54)]


def _fingerprint(image_HWC: np.ndarray) -> bytes:
    return image_HWC.tobytes()


def _pretend(monkeypatch, rank: int, num_ranks: int, worker: int, num_workers: int) -> None:
    values = {"RANK": rank, "WORLD_SIZE": num_ranks, "WORKER": worker, "NUM_WORKERS": num_workers}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
