"""Timing of policies: what is compared with what, and what the job prints."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from depthvar.config import model_config
from depthvar.cost import image_cost
from depthvar.errors import InputError
from depthvar.infinity_config import INFINITY_2B, InfinityConfig
from depthvar.memory import memory_need
from depthvar.plan import DepthPlan
from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.timing import Contender, Lap, _drawing_s, equal_tokens, time_policies
from depthvar.weights.checkpoint import random_model
from jobs.benchmark import Row, _row_of, chosen_policies, main
from tests.tiny_models import tiny_infinity, tiny_model, tiny_text_model

DIGITS = model_config("digits")


def test_every_policy_has_a_lap_in_every_round_and_the_first_batch_is_not_counted():
    policies = {"full": make_policy("full"), "uniform": make_policy("uniform", reference_scale=1)}
    heard: list[int] = []
    laps = time_policies(tiny_model(0), policies, rounds=2, batch_size=3, after_batch=heard.append)
    assert {name: len(of_policy) for name, of_policy in laps.items()} == {"full": 2, "uniform": 2}
    assert all(lap.sampling_s > 0 and lap.decoding_s > 0 for lap in laps["full"])
    assert len(heard) == 2 * 3


def test_times_are_compared_within_a_round():
    laps = {
        "full": [Lap(t, t / 5, t / 3, 0, 0.0) for t in (0.003, 0.030, 0.015)],
        "depthvar:2": [
            Lap(0.001, 0.0, 0.001, 0, 0.01),
            Lap(0.006, 0.002, 0.002, 0, 0.02),
            Lap(0.015, 0.001, 0.005, 0, 0.06),
        ],
    }
    policy = make_policy("depthvar", reference_scale=2)
    flops = 4e9
    row = Row(8, "depthvar:2", policy, laps["depthvar:2"], laps["full"], flops, 3.1, 0, 7, 0.9)
    cells = row.cells(product_rate=1e12)
    assert cells["image, ms"] == "8.00 (2.00-20.00)"
    assert (cells["transformer"], cells["drawing"], cells["decoder"]) == ("5.00", "1.00", "2.00")
    assert cells["images/s"] == "125"
    assert cells["time / full"] == "0.50 (0.20-1.00)"
    assert cells["speed-up"] == "3.00 (1.00-5.00)"
    assert cells["bound"] == "3.10"
    assert cells["saving efficiency"] == "96.8%"
    assert cells["of peak"] == "50.0%"  # 4 GFLOP in 8 ms of a machine that does 1,000 a second
    assert cells["tokens as float32"] == "90.0%"
    assert cells["distance"] == "0.0300"
    numbers = row.numbers(product_rate=1e12)
    assert numbers["saving_efficiency"] == pytest.approx(3 / 3.1)
    assert numbers["peak_share"] == pytest.approx(0.5)
    full = replace(row, policy=None, laps=laps["full"], bound=1.0)
    assert full.saving_efficiency is None
    assert full.speed_ups == [1, 1, 1]


def test_distances_are_to_the_first_policys_images_of_the_same_round():
    model = tiny_model(0)
    policies = {"full": make_policy("full"), "uniform": make_policy("uniform", reference_scale=1)}
    laps = time_policies(model, policies, rounds=2, batch_size=3)
    assert [lap.distance for lap in laps["full"]] == [0, 0]
    for seed, lap in enumerate(laps["uniform"]):
        full, ours = (
            Sampler(model, policy, model.config.sampling)([0, 1, 2], seed=seed, indices=range(3))
            for policy in policies.values()
        )
        apart = full.images_BHWC.astype(float) - ours.images_BHWC
        assert lap.distance == pytest.approx(((apart / 127.5) ** 2).mean(), rel=1e-4)
        assert lap.distance > 0


def test_policies_come_with_full_depth_and_by_default_at_three_budgets():
    assert list(chosen_policies(DIGITS, [])) == ["full", "depthvar:4", "depthvar:3", "depthvar:2"]
    paper = [f"depthvar-paper:{reference}" for reference in (10, 9, 8)]
    assert list(chosen_policies(INFINITY_2B, [])) == ["full", *paper]
    chosen = chosen_policies(DIGITS, ["hard-pruning:3", "skip-scales"])
    assert list(chosen) == ["full", "hard-pruning:3", "skip-scales"]
    assert chosen["hard-pruning:3"].reference_scale == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policies", "depthvar:x"], "got 'depthvar:x', wanted a policy such as"),
        (["--policies", "depthvar:7"], "reference scale is 7, wanted 0 to 6"),
        (["--policies", "fast"], "unknown policy 'fast'"),
        (["--json", "no/such/file.json"], "whose folder does not exist"),
        (["--model", "var-d17"], "var-d17"),
        (["--image-size", "64"], "digits makes images of 32x32 pixels, got 64x64"),
        (["--model", "infinity-2b", "--image-size", "250"], "the nearest are 256x256, "),
        (
            ["--model", "infinity-2b", "--image-size", "512", "--policies", "fastvar"],
            "'fastvar' gives the depth of 2 scales .* samples 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jobs.benchmark._model", None)
    with pytest.raises(InputError, match=message):
        main(flags)


def test_the_job_prints_a_row_per_batch_size_and_contender_and_writes_every_lap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jobs.benchmark._model", lambda _, device, dtype: tiny_model(0, dtype))
    path, plot = tmp_path / "times.json", tmp_path / "times.png"
    flags = ["--policies", "uniform:2", "--batch-sizes", "1", "2", "--rounds", "2"]
    flags += ["--device", "cpu", "--precision", "bfloat16"]
    assert main([*flags, "--json", str(path), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    times, work = (part.splitlines()[2:] for part in shown.split("| batch")[1:])
    contenders = ["full", "uniform:2", "as published"]
    assert [line.split(" | ")[:2] for line in times if line] == [
        [f"| {size}", name] for size in (1, 2) for name in contenders
    ]
    assert [line.split(" | ")[:2] for line in work] == [
        [f"| {size}", name] for size in (1, 2) for name in contenders[:2]
    ]
    assert f"torch {torch.__version__}" in shown
    numbers = json.loads(path.read_text())
    assert [len(entry["laps"]) for entry in numbers["rows"]] == [2] * 6
    assert numbers["rows"][1]["policy"]["preset"] == "uniform"
    full, uniform = (
        image_cost(tiny_model(0).config, DepthPlan.build((1, 2, 3, 5), 5, policy))
        for policy in (make_policy("full"), make_policy("uniform", reference_scale=2))
    )
    assert numbers["rows"][1]["bound"] == full.transformer_flops / uniform.transformer_flops
    assert 0 < numbers["rows"][1]["equal_tokens"] <= 1
    assert numbers["rows"][2]["policy"] is None
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def known_tiny_model(monkeypatch: pytest.MonkeyPatch) -> InfinityConfig:
    """A text model of images of 64x64 pixels, which makes smaller ones too."""
    config = tiny_infinity(num_levels=13, num_blocks=2).of_size((64, 64))
    for place in ("depthvar.config", "jobs.benchmark"):
        monkeypatch.setattr(f"{place}.KNOWN_MODELS", {config.name: config})
    return config


def test_a_text_model_is_timed_on_texts_of_noise_without_a_published_loop(
    known_tiny_model: InfinityConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path, config = tmp_path / "times.json", known_tiny_model.of_size((32, 32))
    flags = ["--model", config.name, "--image-size", "32", "--precision", "bfloat16"]
    flags += ["--policies", "depthvar-paper:4", "--batch-sizes", "2", "--rounds", "2"]
    assert main([*flags, "--device", "cpu", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "model     tiny-infinity, 32x32, bfloat16, weights random" in shown
    numbers = json.loads(path.read_text())
    for table in ("rows", "work"):
        assert [row["name"] for row in numbers[table]] == ["full", "depthvar-paper:4"]
    plans = [
        DepthPlan.build(config.grids, config.num_blocks, policy)
        for policy in (make_policy("full"), make_policy("depthvar-paper", reference_scale=4))
    ]
    full, shallow = (image_cost(config, plan) for plan in plans)
    row = numbers["rows"][1]
    assert row["bound"] == full.transformer_flops / shallow.transformer_flops
    assert row["image_flops"] == shallow.total_flops
    assert row["equal_tokens"] is None
    need = memory_need(config, plans[1], batch_size=2, streams=2, precision="bfloat16")
    assert row["predicted_bytes"] == need.peak
    assert all(lap["distance"] > 0 and lap["drawing_s"] > 0 for lap in row["laps"])
    operations = [work["sampling"]["operations"] for work in numbers["work"]]
    assert operations[0] > operations[1] > 0


def test_drawing_is_timed_on_one_number_for_every_bit():
    model = tiny_text_model(0, torch.float32)
    asked: list[tuple[int, ...]] = []

    class Asked:
        draws_per_token = model.config.bits

        def draw(self, logits_BTV: torch.Tensor, uniforms_BU: torch.Tensor, _: object) -> None:
            asked.append((*logits_BTV.shape, uniforms_BU.shape[1]))

    tokenizer = SimpleNamespace(quantize=Asked())
    contender = Contender.of_policy(replace(model, tokenizer=tokenizer), make_policy("skip-scales"))
    _drawing_s(contender, torch.zeros(2 * 25, model.config.num_logits), 2)
    assert asked == [(2, count, 24, count * 12) for count in (1, 4, 9)]


def test_counting_alone_runs_and_loads_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jobs.benchmark._model", None)
    monkeypatch.setattr("jobs.benchmark.model_config", lambda _: tiny_model(0).config)
    monkeypatch.setattr("jobs.benchmark._is_random", lambda _: True)
    assert main(["--count-only", "--device", "cpu", "--policies", "uniform:1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    full, uniform = (line.strip("| ").split(" | ") for line in lines[-2:])
    assert (full[0], full[1], uniform[1]) == ("8", "full", "uniform:1")
    assert int(uniform[2]) < int(full[2])
    kernels = ["--kernels", "graph", "triton", "plain"]  # a recording is of the plain operations
    assert main(["--count-only", "--device", "cpu", "--policies", "uniform:1", *kernels]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[1] for row in rows] == ["full", "uniform:1", "full, triton", "uniform:1, triton"]
    assert all(int(fast[2]) < int(plain[2]) for plain, fast in zip(rows, rows[2:], strict=False))


def test_memory_is_predicted_beside_what_was_measured():
    model = tiny_model(0, torch.float32)
    policy = make_policy("uniform", reference_scale=1)
    laps = {name: [Lap(1.0, 0.1, 0.5, 1000, 0.0)] for name in ("full", "uniform:1")}
    row = _row_of(model, "uniform:1", policy, 3, laps, None)
    parts = (model.transformer, model.tokenizer)
    weights = sum(4 * p.numel() for part in parts for p in part.parameters())
    assert row.memory_bytes == weights + 1000
    plan = DepthPlan.build((1, 2, 3, 5), 5, policy)
    need = memory_need(model.config, plan, batch_size=3, streams=2, precision="float32")
    assert row.predicted_bytes == need.peak


def test_tokens_agree_wholly_with_the_same_precision_and_not_with_another_model():
    policy = make_policy("depthvar", reference_scale=1)
    wide = tiny_model(0, torch.float32)
    assert equal_tokens(tiny_model(0, torch.float64), wide, policy, 3) == 1
    other = replace(wide, transformer=copy.deepcopy(wide.transformer))
    other.transformer.head.weight.neg_()
    assert equal_tokens(other, wide, policy, 3) < 0.5


def test_a_random_model_is_the_same_every_time_and_makes_finite_images():
    ours, again = random_model(DIGITS), random_model(DIGITS, dtype=torch.float64)
    for one, other in zip(
        ours.transformer.parameters(), again.transformer.parameters(), strict=True
    ):
        assert torch.equal(one, other.float())
    assert time_policies(ours, {"full": make_policy("full")}, rounds=1, batch_size=1)
