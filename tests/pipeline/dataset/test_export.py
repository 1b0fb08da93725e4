from __future__ import annotations

import io
import shutil
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthvar.errors import InputError
from depthvar.training.folders import PictureFolder
from jobs.export import main
from pipeline.dataset import export
from pipeline.dataset.export import export_adm_npz, export_png_folder
from pipeline.dataset.loader import Sample, iterate_samples, open_dataset
from pipeline.research.quality.downstream import open_test_set
from pipeline.shards.committed import Dataset
from pipeline.shards.samples import ShardError
from pipeline.storage import Storage
from tests.fake_shards import make_plan, write_dataset


def dataset_of(folder: Path, **changes: object) -> Dataset:
    plan = make_plan(**changes)
    write_dataset(Storage.open(folder / "data"), plan, folder / "scratch")
    return open_dataset(str(folder / "data"))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_npz_holds_every_image_in_key_order_with_its_label(tmp_path: Path):
    dataset = dataset_of(tmp_path, image_channels=3)
    advanced: list[int] = []
    export_adm_npz(dataset, tmp_path / "samples.npz", advanced.append)
    samples = list(iterate_samples(dataset))
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8
        assert (arrays["arr_0"] == np.stack([s.image for s in samples])).all()
        assert (arrays["arr_1"] == [s.label for s in samples]).all()
    assert sum(advanced) == len(samples) == 22


def test_grey_images_become_rgb_for_the_evaluator(tmp_path: Path):
    dataset = dataset_of(tmp_path)
    export_adm_npz(dataset, tmp_path / "samples.npz")
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    assert images.shape == (22, 7, 7, 3)
    grey = np.stack([s.image for s in iterate_samples(dataset)])
    assert (images == grey).all()


def test_the_evaluators_streaming_reader_gets_the_images(tmp_path: Path):
    """It opens arr_0.npy inside the zip, reads the header and then takes bytes."""
    dataset = dataset_of(tmp_path, image_channels=3)
    export_adm_npz(dataset, tmp_path / "samples.npz")
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert archive.testzip() is None
        with archive.open("arr_0.npy") as stream:
            assert np.lib.format.read_magic(stream) == (1, 0)
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            assert (shape, is_fortran, dtype) == ((22, 7, 7, 3), False, np.uint8)
            first = np.frombuffer(stream.read(7 * 7 * 3), dtype).reshape(7, 7, 3)
    assert (first == next(iterate_samples(dataset)).image).all()


def test_equal_datasets_give_equal_npz_files(tmp_path: Path):
    dataset = dataset_of(tmp_path)
    for name in ("a.npz", "b.npz"):
        export_adm_npz(dataset, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_the_folders_hold_every_image_under_its_class(tmp_path: Path, image_format: str):
    names = tuple(f"class {i}" for i in range(12))
    counts = {0: 8, 2: 6, 11: 8}
    plan = make_plan(counts, class_names=names, image_format=image_format)
    write_dataset(Storage.open(tmp_path / "data"), plan, tmp_path / "scratch")
    dataset = open_dataset(str(tmp_path / "data"))
    export_png_folder(dataset, tmp_path / "out")
    found = files_below(tmp_path / "out")
    assert {name.split("/")[0] for name in found} == {"class 0", "class 2", "class 11"}
    samples = list(iterate_samples(dataset))
    assert len(found) == len(samples)
    for sample in samples:
        image = Image.open(io.BytesIO(found[f"class {sample.label}/{sample.key}.png"]))
        assert image.format == "PNG"
        assert (np.asarray(image) == sample.image[:, :, 0]).all()


def test_train_model_and_test_read_the_folders_with_the_classes_own_names(tmp_path: Path):
    names = ("AC/DC", "..", "cat", "Cat", ".DS_Store", "a ", "crane", "crane", "unused")
    plan = make_plan(dict.fromkeys(range(8), 2), class_names=names, image_size=(9, 9))
    write_dataset(Storage.open(tmp_path / "data"), plan, tmp_path / "scratch")
    dataset = open_dataset(str(tmp_path / "data"))
    export_png_folder(dataset, tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 8, "no folder of a class without images"
    read = PictureFolder.open(tmp_path / "out", flag="--data").class_names
    assert sorted(read) == sorted([*names[:7], "crane%~7"])
    labels = open_test_set(str(tmp_path / "out"), dataset).labels_N.tolist()
    assert sorted(labels) == sorted(2 * [*range(8)])
    for sample in iterate_samples(dataset):
        (file,) = (tmp_path / "out").glob(f"*/{sample.key}.png")
        ids = open_held_out_ids(file.parent, dataset)
        assert ids == {sample.label}, "the folder of each image is that of its label"


def open_held_out_ids(class_folder: Path, dataset: Dataset) -> set[int]:
    """The labels that `--test` gives to the images of one class folder, alone in a folder."""
    alone = class_folder.parent.parent / "alone"
    shutil.rmtree(alone, ignore_errors=True)
    shutil.copytree(class_folder, alone / class_folder.name)
    return set(open_test_set(str(alone), dataset).labels_N.tolist())


def test_a_flat_folder_has_no_classes(tmp_path: Path):
    dataset = dataset_of(tmp_path)
    export_png_folder(dataset, tmp_path / "out", flat=True)
    keys = [f"{sample.key}.png" for sample in iterate_samples(dataset)]
    assert sorted(files_below(tmp_path / "out")) == keys


@pytest.mark.parametrize("name", ["out.npz", "folder"])
def test_nothing_is_overwritten(tmp_path: Path, name: str):
    dataset = dataset_of(tmp_path)
    out = tmp_path / name
    write = export_adm_npz if name == "out.npz" else export_png_folder
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(InputError, match="which exists: nothing is overwritten"):
        write(dataset, out)
    assert files_below(out) == {"mine": b"keep"}


@pytest.mark.parametrize("name", ["out.npz", "folder"])
def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    dataset = dataset_of(tmp_path, image_format="webp")

    def failing(iterate):
        def five(dataset: Dataset):
            yield from islice(iterate(dataset), 5)
            raise ShardError("damaged")

        return five

    for reader in ("iterate_samples", "iterate_stored"):
        monkeypatch.setattr(export, reader, failing(getattr(export, reader)))
    before = sorted(p.name for p in tmp_path.iterdir())
    write = export_adm_npz if name == "out.npz" else export_png_folder
    with pytest.raises(ShardError, match="damaged"):
        write(dataset, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path):
    dataset = dataset_of(tmp_path)
    seen = []

    def look(count: int) -> None:
        seen.append((tmp_path / "out.npz").exists())

    export_adm_npz(dataset, tmp_path / "out.npz", look)
    assert not any(seen)
    assert (tmp_path / "out.npz").exists()


def test_a_folder_made_meanwhile_is_not_overwritten(tmp_path: Path):
    dataset = dataset_of(tmp_path)
    out = tmp_path / "out"

    def meddle(count: int) -> None:
        out.mkdir(exist_ok=True)

    with pytest.raises(InputError, match="which exists"):
        export_png_folder(dataset, out, meddle)
    assert files_below(out) == {}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp-")]


def test_wrong_names_are_refused_before_the_work(tmp_path: Path):
    dataset = dataset_of(tmp_path)
    with pytest.raises(InputError, match=r"ends in .npz"):
        export_adm_npz(dataset, tmp_path / "samples")
    with pytest.raises(InputError, match="whose folder does not exist"):
        export_png_folder(dataset, tmp_path / "no" / "out")


def test_an_image_of_another_size_stops_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = dataset_of(tmp_path)
    odd = Sample("000000000000", 0, np.zeros((5, 7, 1), dtype=np.uint8), {})
    monkeypatch.setattr(export, "iterate_samples", lambda dataset: iter([odd]))
    with pytest.raises(ShardError, match="wanted 7x7 pixels"):
        export_adm_npz(dataset, tmp_path / "out.npz")


def test_the_job_writes_both_formats_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = dataset_of(tmp_path).storage.uri
    (Path(data) / "commits" / "00001.json").unlink()
    out = tmp_path / "samples.npz"
    assert main([data, "--format", "adm-npz", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{out}: 13 images" in shown
    assert "not finished: 13 of 22" in shown
    assert len(np.load(out)["arr_0"]) == 13
    folder = ["--format", "png-folder", "--out", str(tmp_path / "folder"), "--flat"]
    assert main([data, *folder]) == 0
    assert len(files_below(tmp_path / "folder")) == 13
    with pytest.raises(InputError, match="--flat with adm-npz"):
        main([data, "--format", "adm-npz", "--out", str(tmp_path / "b.npz"), "--flat"])
