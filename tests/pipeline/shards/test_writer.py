from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image, JpegImagePlugin

import pipeline.shards.writer as writer_module
from pipeline.request.job_plan import key_of, policy_fields
from pipeline.shards.depth_maps import read_depth_map
from pipeline.shards.samples import ShardError, decode_image, encode_image, pixel_hash, read_tar
from pipeline.shards.writer import ShardWriter
from tests.fake_shards import WITH_DEPTH_MAPS, FakeBatch, fake_batch, fill, make_plan


def built_bytes(plan, scratch: Path, shard_id: int = 0, **options) -> tuple[bytes, bytes]:
    shard = plan.shard(shard_id)
    with ShardWriter(plan, shard, scratch, **options) as writer:
        built = fill(writer, plan, shard)
        return built.tar_path.read_bytes(), built.parquet_path.read_bytes()


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_samples_give_the_same_bytes_whatever_the_threads(
    tmp_path, image_format, channels
):
    plan = make_plan(image_format=image_format, image_channels=channels)
    first = built_bytes(plan, tmp_path, threads=1)
    assert first == built_bytes(plan, tmp_path, threads=5, max_pending=3)
    assert first == built_bytes(plan, tmp_path / "other", threads=2, max_pending=100)


def test_standard_readers_see_the_planned_samples(tmp_path):
    plan = make_plan()
    shard = plan.shard(1)
    with ShardWriter(plan, shard, tmp_path) as writer:
        built = fill(writer, plan, shard)
        rows = pq.read_table(built.parquet_path).to_pylist()
        samples = list(wds.WebDataset(str(built.tar_path), shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in samples] == [key_of(i) for i in range(9, 18)]
    assert [s["cls"] for s in samples] == shard.labels.tolist() == [r["label"] for r in rows]
    for sample, row in zip(samples, rows, strict=True):
        image_HWC = np.ascontiguousarray(sample["png"][:, :, :1])
        assert hashlib.sha256(image_HWC.tobytes()).hexdigest() == row["pixel_sha256"]
        assert sample["json"]["index"] == row["index"]
        assert sample["json"]["pixel_sha256"] == row["pixel_sha256"]
        assert sample["json"]["mean_log_prob"] == pytest.approx(row["mean_log_prob"])


def test_depth_maps_are_read_back_scale_by_scale_and_by_webdataset(tmp_path):
    plan = make_plan(**WITH_DEPTH_MAPS)
    shard = plan.shard(1)
    with ShardWriter(plan, shard, tmp_path) as writer:
        built = fill(writer, plan, shard)
        samples = list(wds.WebDataset(str(built.tar_path), shardshuffle=False).decode("l"))
        with built.tar_path.open("rb") as stream:
            ours = list(read_tar(stream, "png"))
    want_BN = fake_batch(plan, range(9, 18)).depths_BN
    assert len(samples) == len(ours) == 9
    for sample, stored, want_N in zip(samples, ours, want_BN, strict=True):
        assert sample["depth.npy"].dtype == np.uint8
        assert sample["depth.npy"].tolist() == want_N.tolist()
        scales = read_depth_map(stored.depths, plan)
        assert [scale.shape for scale in scales] == [(1, 1), (2, 2), (3, 3)]
        assert np.concatenate([scale.ravel() for scale in scales]).tolist() == want_N.tolist()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d[:, :-1], r"got a depth map uint8 \(13,\), wanted uint8 \(14,\)"),
        (lambda d: d.astype(np.int64), r"got a depth map int64"),
        (lambda d: d[:, ::-1], r"got scales of mean depth"),
    ],
)
def test_depths_that_are_not_as_planned_are_refused(tmp_path, change, told):
    plan = make_plan(**WITH_DEPTH_MAPS)
    batch = fake_batch(plan, range(4))
    wrong = dataclasses.replace(batch, depths_BN=change(batch.depths_BN))
    with (
        ShardWriter(plan, plan.shard(0), tmp_path) as writer,
        pytest.raises(ValueError, match=told),
    ):
        writer.add(wrong, 0)


def test_rows_carry_the_plan_and_the_signals(tmp_path):
    plan = make_plan()
    shard = plan.shard(0)
    batch = fake_batch(plan, range(9))
    with ShardWriter(plan, shard, tmp_path) as writer:
        table = pq.read_table(fill(writer, plan, shard).parquet_path)
    row = table.to_pylist()[5]
    compute = plan.compute
    assert row["class_name"] == plan.class_names[row["label"]]
    assert json.loads(row["policy_json"]) == dict(policy_fields(plan.policy))
    assert (row["policy"], row["reference_scale"]) == ("depthvar", 1)
    assert row["token_layers_ratio"] == compute.token_layers / compute.full_token_layers
    assert row["flops_ratio"] == pytest.approx(3e6 / 7e6)
    assert row["depth_per_scale"] == [4.0, 2.0, 1.25]
    assert np.array_equal(np.float32(row["mean_change"]), batch.mean_change_BS[5])
    assert row["status"] == "ok"


def test_names_with_odd_characters_never_become_paths(tmp_path):
    plan = make_plan({2: 3})
    shard = plan.shard(0)
    with ShardWriter(plan, shard, tmp_path) as writer:
        built = fill(writer, plan, shard)
        with open(built.tar_path, "rb") as stream:
            assert [s.key for s in read_tar(stream, "png")] == [key_of(i) for i in range(3)]
        assert pq.read_table(built.parquet_path)["class_name"][0].as_py() == "../tw|o\n"


def test_blank_and_repeated_images_are_marked_not_dropped(tmp_path):
    plan = make_plan({0: 4})
    batch = fake_batch(plan, range(4))
    batch.images_BHWC[1] = 255
    batch.images_BHWC[2:] = batch.images_BHWC[0]
    with ShardWriter(plan, plan.shard(0), tmp_path) as writer:
        writer.add(batch, 0)
        built = writer.finish()
        table = pq.read_table(built.parquet_path)
    assert table["is_blank"].to_pylist() == [False, True, False, False]
    assert table["is_duplicate_in_shard"].to_pylist() == [False, False, True, True]
    assert (built.num_samples, built.num_blank, built.num_duplicates) == (4, 1, 2)


def test_times_of_each_batch_are_handed_on_but_are_in_no_file(tmp_path):
    plan = make_plan()
    shard = plan.shard(0)
    with ShardWriter(plan, shard, tmp_path) as writer:
        slow = fill(writer, plan, shard)
        slow_bytes = slow.tar_path.read_bytes(), slow.parquet_path.read_bytes()
    assert [(b.start, b.stop) for b in slow.batches] == [(0, 4), (4, 8), (8, 9)]
    assert all(b.sampling_s == 0.25 and b.decoding_s == 0.125 for b in slow.batches)
    assert all(b.encoding_s > 0 for b in slow.batches)
    with ShardWriter(plan, shard, tmp_path) as writer:
        for start, stop in shard.micro_batches:
            batch = fake_batch(plan, range(start, stop))
            writer.add(dataclasses.replace(batch, sampling_s=9.0), start)
        fast = writer.finish()
        assert (fast.tar_path.read_bytes(), fast.parquet_path.read_bytes()) == slow_bytes


def test_the_sizes_and_hashes_are_those_of_the_files(tmp_path):
    plan = make_plan()
    with ShardWriter(plan, plan.shard(2), tmp_path) as writer:
        built = fill(writer, plan, plan.shard(2))
        for path, entry in (
            (built.tar_path, built.files.tar),
            (built.parquet_path, built.files.parquet),
        ):
            data = path.read_bytes()
            assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert built.files.tar.name == "train/00002.tar"
    assert built.files.parquet.name == "meta/00002.parquet"


def test_scratch_is_empty_after_success_and_after_an_error(tmp_path):
    plan = make_plan()
    built_bytes(plan, tmp_path)
    writer = ShardWriter(plan, plan.shard(0), tmp_path)
    writer.add(fake_batch(plan, range(4)), 0)
    with pytest.raises(RuntimeError, match="sampler"), writer:
        raise RuntimeError("the sampler broke")
    assert os.listdir(tmp_path) == []


def test_an_error_while_encoding_surfaces_and_leaves_nothing(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError("encoder broke")

    monkeypatch.setattr(writer_module, "encode_image", broken)
    plan = make_plan()
    with (
        pytest.raises(OSError, match="encoder broke"),
        ShardWriter(plan, plan.shard(0), tmp_path) as writer,
    ):
        fill(writer, plan, plan.shard(0))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="wants /dev/full")
@pytest.mark.filterwarnings("error")
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path):
    plan = make_plan(image_size=(200, 200))
    writer = ShardWriter(plan, plan.shard(0), tmp_path)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), writer._stream.fileno())
    with pytest.raises(OSError, match="No space"), writer:
        fill(writer, plan, plan.shard(0))
    assert os.listdir(tmp_path) == []


def test_a_shard_that_is_not_complete_is_not_finished(tmp_path):
    plan = make_plan()
    with ShardWriter(plan, plan.shard(0), tmp_path) as writer:
        writer.add(fake_batch(plan, range(4)), 0)
        with pytest.raises(ValueError, match="up to 4, wanted 9"):
            writer.finish()


def test_batches_out_of_order_or_beyond_the_shard_are_refused(tmp_path):
    plan = make_plan()
    with ShardWriter(plan, plan.shard(0), tmp_path) as writer:
        with pytest.raises(ValueError, match="from 0 on"):
            writer.add(fake_batch(plan, range(4, 8)), 4)
        with pytest.raises(ValueError, match="up to 9"):
            writer.add(fake_batch(plan, range(10)), 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: {"images_BHWC": b.images_BHWC.astype(np.float32)},
        lambda b: {"images_BHWC": b.images_BHWC[:, :-1]},
        lambda b: {"mean_change_BS": b.mean_change_BS[:-1]},
        lambda b: {"mean_log_prob_BS": b.mean_log_prob_BS[:-1]},
        lambda b: {"mean_log_prob_BS": b.mean_log_prob_BS * np.float32(np.nan)},
    ],
)
def test_a_batch_of_the_wrong_kind_is_refused(tmp_path, change):
    plan = make_plan()
    batch: FakeBatch = fake_batch(plan, range(4))
    with (
        ShardWriter(plan, plan.shard(0), tmp_path) as writer,
        pytest.raises(ValueError, match="got"),
    ):
        writer.add(dataclasses.replace(batch, **change(batch)), 0)


def test_no_more_images_wait_than_allowed(tmp_path, monkeypatch):
    running, most, lock = 0, 0, threading.Lock()
    real_submit = writer_module.ThreadPoolExecutor.submit
    plan = make_plan({0: 40}, samples_per_shard=40, batch_size=10)
    with ShardWriter(plan, plan.shard(0), tmp_path, threads=2, max_pending=5) as writer:

        def submit(pool, *arguments):
            nonlocal running, most
            with lock:
                most = max(most, len(writer._pending) + 1)
            return real_submit(pool, *arguments)

        monkeypatch.setattr(writer_module.ThreadPoolExecutor, "submit", submit)
        fill(writer, plan, plan.shard(0))
    assert most == 5


def test_what_changes_on_disk_before_the_check_is_noticed(tmp_path, monkeypatch):
    plan = make_plan()
    check = ShardWriter._check

    def flip_then_check(writer: ShardWriter) -> None:
        data = bytearray(writer._tar_path.read_bytes())
        place = data.index(b"IDAT") + 6
        data[place] ^= 1
        writer._tar_path.write_bytes(data)
        check(writer)

    monkeypatch.setattr(ShardWriter, "_check", flip_then_check)
    with pytest.raises(ShardError, match="changed on disk"):
        built_bytes(plan, tmp_path)


def relabelled(tar: bytes) -> bytes:
    place = tar.index(b".cls") - 12  # of the header, whose content is in the next block
    label = int(tar[place + 512 : place + 513])
    return tar[: place + 512] + b"%d" % (9 - label) + tar[place + 513 :]


def without_last(tar: bytes) -> bytes:
    return tar[: tar.rindex(b"%012d.cls" % 8)] + bytes(1024)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("00000.tar", relabelled, "sample 000000000000 is not the next one"),
        ("00000.tar", without_last, "it ends early"),
        ("00000.parquet", None, "its rows changed on disk"),
    ],
)
def test_a_file_that_is_read_back_otherwise_is_no_shard(tmp_path, monkeypatch, file, change, told):
    check = ShardWriter._check
    _, other_rows = built_bytes(make_plan({0: 7, 1: 7, 2: 8}), tmp_path)

    def change_then_check(writer: ShardWriter) -> None:
        path = writer._folder / file
        path.write_bytes(change(path.read_bytes()) if change else other_rows)
        check(writer)

    monkeypatch.setattr(ShardWriter, "_check", change_then_check)
    with pytest.raises(ShardError, match=told):
        built_bytes(make_plan(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_png_is_compressed_as_hard_as_the_plan_says(tmp_path):
    plan = make_plan(png_level=0, image_size=(64, 64))
    tar, _ = built_bytes(plan, tmp_path)
    image_HWC = fake_batch(plan, [0]).images_BHWC[0]
    wanted = io.BytesIO()
    Image.fromarray(image_HWC[:, :, 0]).save(wanted, "PNG", compress_level=0)
    assert wanted.getvalue() in tar
    assert encode_image(image_HWC, "png", 0).image == wanted.getvalue()
    assert encode_image(image_HWC, "png").image == encode_image(image_HWC, "png", 6).image
    assert len(encode_image(image_HWC // 64, "png").image) < len(wanted.getvalue()) // 2


def test_a_jpeg_keeps_its_colours_at_quality_95():
    image_HWC = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    wanted = io.BytesIO()
    Image.fromarray(image_HWC).save(wanted, "JPEG", quality=95)
    with Image.open(io.BytesIO(encode_image(image_HWC, "jpg").image)) as image:
        assert JpegImagePlugin.get_sampling(image) == 0
        assert image.quantization == Image.open(wanted).quantization


def test_an_image_of_one_colour_is_blank():
    image_HWC = np.full((5, 4, 3), (10, 20, 30), dtype=np.uint8)
    assert encode_image(image_HWC, "png").is_blank
    image_HWC[4, 3, 2] = 31
    assert not encode_image(image_HWC, "png").is_blank


@pytest.mark.parametrize("image_format", ["png", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_give_the_pixels_back(image_format, channels):
    image_HWC = np.random.default_rng(1).integers(0, 256, (13, 9, channels), dtype=np.uint8)
    encoded = encode_image(image_HWC, image_format)
    assert np.array_equal(decode_image(encoded.image, channels), image_HWC)
    assert encoded.pixel_sha256 == pixel_hash(image_HWC)
    assert not encoded.is_blank


def test_a_tar_cut_anywhere_never_reads_as_whole(tmp_path):
    plan = make_plan({0: 3})
    tar, _ = built_bytes(plan, tmp_path)
    content = len(tar.rstrip(b"\0"))
    path = tmp_path / "cut.tar"
    for length in range(0, content, 101):
        path.write_bytes(tar[:length])
        with open(path, "rb") as stream:
            try:
                num_read = sum(1 for _ in read_tar(stream, "png"))
            except ShardError:
                continue
        assert num_read < 3
