"""Timing of policies: what is compared with what, and what the job prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from depthvar.config import model_config
from depthvar.errors import InputError
from depthvar.policy import make_policy
from depthvar.sampling import Sampler
from depthvar.timing import Lap, time_policies
from depthvar.weights.checkpoint import random_model
from jobs.benchmark import chosen_policies, main, row
from tests.tiny_models import tiny_model

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
        "full": [Lap(t, t / 3, 0, 0.0) for t in (0.003, 0.030, 0.015)],
        "depthvar:2": [
            Lap(0.001, 0.001, 0, 0.01),
            Lap(0.006, 0.002, 0, 0.02),
            Lap(0.015, 0.005, 0, 0.06),
        ],
    }
    policy = make_policy("depthvar", reference_scale=2)
    cells = row(DIGITS, "depthvar:2", policy, 8, laps).strip("| ").split(" | ")
    assert cells[:3] == ["8", "depthvar:2", "32.3%"]
    assert cells[4:9] == ["6.00", "2.00", "125", "0.50 (0.20-1.00)", "0.0300"]


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
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jobs.benchmark.load_model", None)
    with pytest.raises(InputError, match=message):
        main(flags)


def test_the_job_prints_a_row_per_batch_size_and_policy_and_writes_every_lap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "times.json"
    flags = ["--policies", "uniform:2", "--batch-sizes", "1", "2", "--rounds", "2"]
    assert main([*flags, "--device", "cpu", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    rows = [line.split(" | ")[:2] for line in shown.splitlines() if line.startswith("| ")][2:]
    assert rows == [["| 1", "full"], ["| 1", "uniform:2"], ["| 2", "full"], ["| 2", "uniform:2"]]
    assert f"torch {torch.__version__}" in shown
    numbers = json.loads(path.read_text())
    assert [len(entry["laps"]) for entry in numbers["rows"]] == [2] * 4
    assert numbers["rows"][1]["policy"]["preset"] == "uniform"


def test_a_random_model_is_the_same_every_time_and_makes_finite_images():
    ours, again = random_model("digits"), random_model("digits", dtype=torch.float64)
    for one, other in zip(
        ours.transformer.parameters(), again.transformer.parameters(), strict=True
    ):
        assert torch.equal(one, other.float())
    assert time_policies(ours, {"full": make_policy("full")}, rounds=1, batch_size=1)
