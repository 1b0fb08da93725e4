"""`depthvar plan`: what it needs, and what it says of workers, time and price."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from depthvar.errors import InputError
from jobs import plan
from pipeline.request.flags import load_config
from pipeline.request.generation import GenerateConfig
from pipeline.request.job import plan_job
from pipeline.request.plan_file import open_plan
from pipeline.storage import Storage
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fake_text import CLASSES, text_job
from tests.fakes import FAULTS_VARIABLE, set_faults

PUBLISHED = ["var-d16", "var-d20", "var-d24", "var-d30", "var-d36-512"]


@pytest.mark.parametrize("model", PUBLISHED)
def test_plan_knows_a_published_model_by_its_name_alone(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Neither fetched nor read: also where weights are named that lie elsewhere."""
    monkeypatch.setattr("pipeline.request.job.fetch_model", None)
    argv = ["--model", model, "--out", str(tmp_path / "out"), "--address", "auto"]
    for weights in ([], ["--weights", "s3://bucket/var"], ["--weights", "FoundationVision/var"]):
        assert plan.main([*argv, *weights]) == 0
        text = capsys.readouterr().out
        assert f"model     {model}, weights not read, float32\n" in text
        assert "identity  not known before the weights are read\n" in text
    assert not list(tmp_path.iterdir())


def test_plan_without_weights_goes_on_with_what_was_planned_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    argv = ["--model", "var-d16", "--out", str(tmp_path / "out"), "--classes", "3"]
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    stored, _ = plan_job(load_config(GenerateConfig, argv, prog="", description=""))
    open_plan(Storage.open(tmp_path / "out"), stored)
    assert plan.main(argv) == 0
    text = capsys.readouterr().out
    assert f"weights {'ab' * 6}, float32\n" in text
    assert f"identity  {stored.fingerprint}\n" in text
    with pytest.raises(InputError, match=r"^seed: .* has 0, this run has 1: resume"):
        plan.main([*argv, "--seed", "1"])


def test_plan_reads_no_text_encoder_and_goes_on_with_the_one_that_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stored, _ = text_job(tmp_path)
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    monkeypatch.setattr("pipeline.request.job.find_text", None)
    argv = ["--model=fake-text", f"--out={tmp_path / 'out'}", f"--class-names={CLASSES}"]
    argv += [f"--templates={tmp_path / 'templates.txt'}", "--per-class=2", "--samples-per-shard=8"]
    argv += ["--batch-size=3"]
    for encoder in ([], ["--text-encoder=s3://bucket/t5"], ["--text-encoder=google/flan-t5-xl"]):
        assert plan.main([*argv, *encoder]) == 0
        text = capsys.readouterr().out
        assert f"weights {'ab' * 6}, text encoder not read, float32\n" in text
        assert "identity  not known before the weights are read\n" in text
    open_plan(Storage.open(tmp_path / "out"), stored)
    assert plan.main(argv) == 0
    text = capsys.readouterr().out
    assert f", text encoder {str(stored.text_encoder_sha256)[:12]}, float32\n" in text
    assert f"identity  {stored.fingerprint}\n" in text


@pytest.mark.parametrize(
    ("flags", "policy", "size", "ratio"),
    [
        ([], "depthvar-paper", "1024x1024", "52.0%"),
        (["--image-size=864x1152", "--cfg=3"], "depthvar-paper", "864x1152", "49.6%"),
        (["--image-size=512", "--policy=depthvar"], "depthvar", "512x512", "51.1%"),
        (["--policy=full", "--temperature=1"], "full", "1024x1024", "100.0%"),
        (["--policy=fastvar"], "fastvar", "1024x1024", "30.2%"),
    ],
)
def test_a_published_text_model_has_a_policy_a_budget_and_sizes_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags, policy, size, ratio
):
    argv = ["--model=infinity-2b", "--class-names=fox", f"--out={tmp_path / 'out'}", *flags]
    assert plan.main(argv) == 0
    text = capsys.readouterr().out
    cfg = "3" if "--cfg=3" in flags else "4"
    assert f"policy    {policy}, cfg {cfg}, top-k 0, top-p 0.97" in text
    assert f" of 1 classes, {size} png\n" in text
    assert f"; {ratio} of the token-layers\n" in text


def test_scales_without_guidance_are_an_option_of_every_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    argv = ["--out", str(tmp_path / "out"), "--policy", "full", "--policy-options"]
    assert plan.main([*argv, "guided_scales=5", "kept_guidance=1"]) == 0
    assert "transformer 0.874 of 1.32, decoder 0.136; 100.0% of the tok" in capsys.readouterr().out
    for more, told in (
        (["guided_scales=8"], "guided_scales is 8, wanted 1 to 7, the scales that the model samp"),
        (["guided_scales=5", "--cfg=0"], "guided_scales is 5 and guidance is off"),
    ):
        with pytest.raises(InputError, match=told):
            plan.main([*argv, *more])
    assert not list(tmp_path.iterdir())


def test_plan_times_a_worker_and_prices_it_where_it_has_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    argv = ["--out", str(tmp_path / "out"), "--per-class", "2", "--batch-size", "4"]
    argv += ["--device", "cpu", "--workers", "0", "--scratch", str(tmp_path / "scratch")]
    argv += ["--calibrate", "--price-per-gpu-hour", "2"]
    assert plan.main(argv, sampler_factory=FAKE_SAMPLER) == 0
    text = capsys.readouterr().out
    assert "images/s of a worker with " in text
    assert " an image, from 12 of them\n" in text
    assert "time      20 images left: " in text
    assert "worker hours of " in text
    assert "cost      not known: no GPU was measured" in text
    assert [file.name for file in tmp_path.rglob("*")] == ["scratch"]
    set_faults(tmp_path / "faults", memory=0)
    monkeypatch.setenv(FAULTS_VARIABLE, str(tmp_path / "faults"))
    assert plan.main(argv, sampler_factory=FAKE_SAMPLER) == 1
    assert "error: no batch can be made: MemoryError" in capsys.readouterr().err
    with pytest.raises(InputError, match="wanted both: add --calibrate"):
        plan.main([*argv, "--no-calibrate"])


def test_plan_counts_workers_and_memory_as_generate_would_place_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    monkeypatch.setattr(plan, "available_cores", lambda: 9)
    monkeypatch.setattr(plan, "available_memory", lambda: 2 * 10**9)
    argv = ["--out", str(tmp_path / "out"), "--device", "cpu", "--samples-per-shard", "500"]
    for more, workers in (
        ([], 9),
        (["--threads-per-worker", "4"], 2),
        (["--encode-threads", "3"], 3),
    ):
        assert plan.main([*argv, *more]) == 0
        text = capsys.readouterr().out
        assert (f"2 shards for {workers} workers" in text) == (workers > 2)
        assert ("note: batch size 1: 50 would need 183.4 MB of memory" in text) == (workers > 8)
        assert ("no batch size fits" in text) == (workers > 8)
    assert plan.main([*argv, "--batch-size=50"]) == 0
    assert "at --batch-size 50 a worker needs about 183.4 MB" in capsys.readouterr().out
    argv += ["--workers=0", "--calibrate", f"--scratch={tmp_path / 'scratch'}"]
    monkeypatch.setattr("pipeline.run.cluster.available_memory", lambda: 640 * 10**6)
    assert plan.main(argv, sampler_factory=FAKE_SAMPLER) == 0
    text = capsys.readouterr().out
    (fitting,) = re.findall(r"note: batch size (\d+): 50 would need 183.4 MB of memory, a", text)
    assert f" per worker at batch {fitting}: " in text
    assert f" an image, from {3 * int(fitting)} of them\n" in text


def test_plan_says_where_nobody_knows_how_much_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    argv = [f"--out={tmp_path / 'out'}", "--address=auto"]
    assert plan.main(argv) == 0
    said = "note: batch size 50: the memory of a worker is not known, --batch-size sets another\n"
    assert said in capsys.readouterr().out
    assert plan.main([*argv, "--batch-size=50"]) == 0
    assert "note: batch size" not in capsys.readouterr().out
