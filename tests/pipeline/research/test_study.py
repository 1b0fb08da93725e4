"""The study of policies: what it samples and measures, and how it goes on."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from depthvar.config import scenes_model_config
from depthvar.errors import InputError
from depthvar.plan import DepthPlan
from depthvar.policy import DepthPolicy
from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.training.data import REAL_SETS, ImageSet
from depthvar.var.tokenizer import Tokenizer
from depthvar.var.transformer import Transformer
from depthvar.weights.checkpoint import load_model, save_model, save_proxy_fit
from depthvar.weights.files import CALIBRATION_FILE
from depthvar.weights.find import find_model
from jobs.study import main
from pipeline.request.flags import load_config
from pipeline.request.job import checked_options
from pipeline.research.quality import features
from pipeline.research.quality.features import digit_features, real_arrays, to_safetensors
from pipeline.research.study.measure import (
    PolicySamples,
    badness,
    best_of_each_class,
    judge_of,
    sample_policies,
    spread_within_classes,
)
from pipeline.research.study.policies import study_policy
from pipeline.research.study.protocol import StudyConfig, read_json_file, resolve_study
from pipeline.research.study.shared_scales import shared_scales
from pipeline.research.study.work import ask_signals
from tests.killed_jobs import assert_no_process_outlives
from tests.tiny_models import random_fit, tiny_model

FULL = {"policy": "full", "budgets": {"1x": None}}


def test_shared_scales_change_no_image_and_no_signal():
    """Every policy's samples are those that it makes alone, whatever it shares scales with."""
    model = tiny_model(0)
    policies = {
        "full": make_policy("full"),
        "raw": DepthPolicy(reference_scale=1, schedule="linear", proxy="raw", blending="mean"),
        "entropy": DepthPolicy(reference_scale=1, schedule="octaves", ranking="entropy"),
        "deeper": DepthPolicy(reference_scale=2, ranking="change"),
        "guided": make_policy("depthvar", reference_scale=2, guided_scales=2, kept_guidance=0.5),
        "dropped": DepthPolicy(guided_scales=3),
    }
    shared = sample_policies(model, policies, indices=range(5), seed=3, batch_size=2)
    for name, policy in policies.items():
        sampler = Sampler(model, policy, model.config.sampling)
        for start, stop in ((0, 2), (2, 4), (4, 5)):
            indices = range(start, stop)
            labels = [i % model.config.num_classes for i in indices]
            alone = sampler(labels, seed=3, indices=indices)
            ours = shared[name]
            assert np.array_equal(ours.images_NHWC[start:stop], alone.images_BHWC)
            assert ours.labels_N[start:stop].tolist() == labels
            assert np.array_equal(ours.mean_change_NS[start:stop], alone.mean_change_BS)
            assert np.array_equal(ours.mean_log_prob_NS[start:stop], alone.mean_log_prob_BS)


def test_scales_before_the_first_shallow_token_are_shared_but_those_that_leave_it_more():
    sides = (1, 2, 3, 4)
    for policy, count in (
        (make_policy("full"), 4),
        (make_policy("skip-scales"), 3),
        (make_policy("uniform", reference_scale=1), 2),
        (make_policy("hard-pruning", reference_scale=1), 2),
        (make_policy("depthvar", reference_scale=1), 1),
        (make_policy("depthvar-paper", reference_scale=1), 1),
        (make_policy("uniform", reference_scale=2, guided_scales=2, kept_guidance=1.0), 1),
    ):
        assert shared_scales(DepthPlan.build(sides, 4, policy)) == count


def samples(labels: list[int], log_probs: list[list[float]]) -> PolicySamples:
    count = len(labels)
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    values = np.array(log_probs, dtype=np.float32)
    return PolicySamples(images, np.array(labels), np.ones_like(values), values)


def test_what_is_left_out_is_the_worst_of_each_class():
    made = samples([0, 1, 0, 1, 0, 1, 0, 1], [[-1.0]] * 8)
    rest = best_of_each_class(made, np.array([9, 0, 1, 5, 2, 3, 3, 4]), 0.5)
    assert rest.images_NHWC[:, 0, 0, 0].tolist() == [1, 2, 4, 5]
    assert rest.labels_N.tolist() == [1, 0, 0, 1]


def test_surprise_is_large_for_improbable_tokens_and_knows_no_skipped_scale():
    signals = badness(samples([0, 1], [[-1.0, -3.0, 0.0], [-2.0, -5.0, 0.0]]))
    assert signals["surprise"].tolist() == [2.0, 3.5]
    assert signals["surprise of scale 1"].tolist() == [3.0, 5.0]
    assert "surprise of scale 2" not in signals


def test_spread_is_the_variance_around_the_class_mean():
    features = np.array([[0.0, 0.0], [2.0, 0.0], [10.0, 1.0], [10.0, 5.0]])
    assert spread_within_classes(features, np.array([0, 0, 1, 1])) == pytest.approx((2 + 8) / 2)


# Policies that studies ask for.


def test_the_baselines_at_random_are_presets_of_studies():
    pruning = study_policy("random-pruning", reference_scale=2)
    hard = make_policy("hard-pruning", reference_scale=2)
    assert pruning == replace(hard, preset="random-pruning", ranking="random")
    depth = study_policy("random-depth")
    assert (depth.schedule, depth.ranking, depth.compensation) == ("linear", "random", True)
    with pytest.raises(InputError, match="unknown policy 'random-depth', wanted one of full"):
        make_policy("random-depth")


def test_a_study_varies_every_field():
    changes = {"dither": True, "min_depth": 2, "rotation": 0.25, "proxy": "raw"}
    varied = study_policy("depthvar", reference_scale=2, **changes)
    assert varied == replace(make_policy("depthvar", reference_scale=2), **changes)
    with pytest.raises(InputError, match="unknown policy option 'gain', wanted some of alloc"):
        study_policy("depthvar", gain=0.5)


# The configuration.


def config(**changes: object) -> StudyConfig:
    return StudyConfig.model_validate({"out": "unused", "methods": {"full": FULL}, **changes})


def test_a_folder_of_something_else_is_refused_and_a_studys_own_is_not(tmp_path: Path):
    config = StudyConfig(out=tmp_path, methods={"full": FULL})
    assert resolve_study(config).cells
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"holds files and no study.*choose another output"):
        resolve_study(config)
    (tmp_path / "samples").mkdir()
    study = resolve_study(config)
    (cell,) = study.cells
    (tmp_path / study.samples_file(cell, 1, study.parts(cell)[0])).touch()
    assert resolve_study(config).cells
    (tmp_path / "samples" / "song.wav").touch()
    with pytest.raises(InputError, match="holds files and no study"):
        resolve_study(config)


def test_a_study_without_full_depth_is_refused():
    with pytest.raises(ValidationError, match="methods lacks 'full'"):
        config(methods={"uniform": {"policy": "uniform", "budgets": {"2x": 3}}})


def test_a_comparison_with_an_unknown_method_is_refused():
    methods = {"full": FULL, "even": {"policy": "uniform", "budgets": {"2x": 3}}}
    assert config(methods=methods, compare_with=["even"]).compare_with == ["even"]
    with pytest.raises(ValidationError, match=r"names ours, wanted some .* besides 'full', even"):
        config(methods=methods, compare_with=["even", "ours"])
    with pytest.raises(ValidationError, match="names full, wanted some"):
        config(methods=methods, compare_with=["full"])


def test_headroom_after_the_last_scale_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="headroom_after is 6, wanted a scale before the last"):
        resolve_study(config(out=str(tmp_path), headroom_after=6))


def test_repeated_seeds_are_refused():
    with pytest.raises(ValidationError, match="wanted different ones"):
        config(seeds=[1, 2, 1])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"policy": "luck", "budgets": {"2x": 3}}, "ours at 2x: unknown policy 'luck'"),
        ({"policy": "uniform", "budgets": {"2x": 30}}, "ours at 2x: reference scale is 30"),
        (
            {"policy": "uniform", "budgets": {"2x": 3}, "options": {"rotation": "much"}},
            "ours at 2x: policy option rotation",
        ),
    ],
)
def test_a_policy_that_cannot_run_is_refused_with_its_method(tmp_path: Path, method, message):
    with pytest.raises(InputError, match=message):
        resolve_study(config(out=str(tmp_path), methods={"full": FULL, "ours": method}))


def test_a_model_of_something_else_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"var-d16.*wanted one of the digits"):
        resolve_study(config(out=str(tmp_path), model="var-d16", weights=str(tmp_path)))


@pytest.fixture
def few_real_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every set of real images with 10 of each class: what is done with them is the same."""

    def few_of(name: str, split: str) -> ImageSet:
        whole = REAL_SETS[name](split)
        rows = [(whole.labels_N == c).nonzero()[:10, 0] for c in range(10)]
        chosen = torch.cat(rows).sort().values
        return ImageSet(whole.images_NCHW[chosen], whole.labels_N[chosen], whole.class_names)

    monkeypatch.setattr(features, "REAL_SETS", {name: partial(few_of, name) for name in REAL_SETS})
    forget_real_images()
    yield
    forget_real_images()


def forget_real_images() -> None:
    judge_of.cache_clear()
    features.real_arrays.cache_clear()


def write_scenes_model(folder: Path) -> Path:
    """A model of the scenes with random weights."""
    model = scenes_model_config()
    save_model(folder, model, Transformer(model.transformer), Tokenizer(model.tokenizer))
    fit = random_fit(model, torch.float32)
    save_proxy_fit(folder / CALIBRATION_FILE, fit, find_model(str(folder)))
    return folder


@pytest.mark.usefixtures("few_real_images")
def test_scenes_of_digits_are_judged_by_a_network_of_their_own(tmp_path: Path):
    model = write_scenes_model(tmp_path / "model")
    study = resolve_study(config(out=str(tmp_path / "out"), model=str(model)))
    assert study.real_set == "digit-scenes"
    assert study.trains_features
    assert not resolve_study(config(out=str(tmp_path / "digits"))).trains_features
    judge = judge_of(study.real_set, to_safetensors(digit_features()))
    images, labels = real_arrays("digit-scenes", "train")
    copies = PolicySamples(images[::2], labels[::2], np.ones((50, 1)), np.ones((50, 1)))
    measured = judge.measure(copies)
    assert measured["precision"] == 1
    assert measured["frechet_distance"] < judge.frechet(judge.read(copies).features_NF + 1)


def test_a_changed_policy_or_seed_never_meets_old_numbers(tmp_path: Path):
    study = resolve_study(config(out=str(tmp_path)))
    (cell,) = study.cells
    other = replace(cell, policy=make_policy("skip-scales"))
    more = replace(cell, num_samples=cell.num_samples + 1)
    pairs = [(c, seed) for c in (cell, other, more) for seed in (1, 2)]
    assert len({study.file("measures", c, seed) for c, seed in pairs}) == 6
    assert len({study.samples_file(c, seed, range(100)) for c, seed in pairs}) == 6
    filters = [study.file("signals", replace(cell, cas_runs=runs), 1) for runs in (0, 1, 2)]
    assert len(set(filters)) == 3, "their CAS is a mean over the runs"


@pytest.mark.parametrize(
    ("samples", "batch_size", "sizes"),
    [(2500, 100, [1000, 1000, 500]), (2500, 200, [2000, 500]), (3000, 300, [3000])],
)
def test_parts_are_whole_batches(tmp_path: Path, samples: int, batch_size: int, sizes: list[int]):
    """So that no image meets another batch than in a study of one part."""
    study = resolve_study(config(out=str(tmp_path), samples=samples, batch_size=batch_size))
    parts = study.parts(study.cells[0])
    assert [len(part) for part in parts] == sizes
    assert [i for part in parts for i in part] == list(range(samples))


def test_names_and_options_of_a_study_are_what_stands_in_its_file(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(
        "out: x\nseeds: [1, 2]\ncompare_with: [no]\nmethods:\n"
        "  full: {policy: full, budgets: {1x: null}}\n"
        "  no: {policy: depthvar, budgets: {1e3: 2}, options: {dither: on, rotation: 1e-1}}\n"
        "  fast: {policy: fastvar, budgets: {2x: 4}, options: {mean_depths: [5e-1, 1]}}\n"
    )
    argv = ["--config", str(tmp_path / "study.yaml")]
    read = load_config(StudyConfig, argv, prog="study", description="")
    assert read.methods["full"].budgets == {"1x": None}
    assert read.methods["no"].budgets == {"1e3": 2}
    assert read.methods["no"].options == {"dither": True, "rotation": 0.1}
    assert checked_options(read.methods["fast"].options) == {"mean_depths": (0.5, 1.0)}
    (tmp_path / "study.yaml").write_text("methods:\n  full: {}\n  full: {}\n")
    with pytest.raises(InputError, match="line 3: the key 'full' stands in line 2 too"):
        load_config(StudyConfig, argv, prog="study", description="")


@pytest.mark.parametrize("name", ["study", "study_other_seeds", "study_guidance", "study_scenes"])
def test_a_study_in_the_repository_resolves(tmp_path: Path, name: str):
    """With budgets that are what they are called."""
    file = Path(__file__).parents[3] / "jobs" / f"{name}.yaml"
    argv = ["--config", str(file), "--out", str(tmp_path / "study")]
    if name == "study_scenes":
        argv += ["--model", str(write_scenes_model(tmp_path / "model"))]
    study = resolve_study(load_config(StudyConfig, argv, prog="study", description=""))
    for cell in study.cells:
        assert cell.share == pytest.approx(1 / float(cell.budget.rstrip("x")), rel=0.15), cell.name
    for cell in study.with_losses:
        assert cell.depth.streams(1), "losses are of one stream, which all of them run"


@pytest.mark.usefixtures("few_real_images")
def test_cas_of_filtered_samples_is_the_mean_of_as_many_classifiers_as_the_cell_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    study = resolve_study(config(out=str(tmp_path), samples=200, batch_size=100))
    cell = replace(study.cells[0], cas_runs=2)
    made = samples([i % 10 for i in range(200)], [[0.1 * i - 20, 0.0] for i in range(200)])
    images_NHWC = np.empty((200, 32, 32, 1), np.uint8)
    images_NHWC[:] = np.arange(200)[:, None, None, None]
    made = replace(made, images_NHWC=images_NHWC)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **vars(made))
    study.storage.publish_bytes(buffer.getvalue(), study.samples_file(cell, 7, range(200)))
    asked = []

    def cas(images: np.ndarray, labels: np.ndarray, *, real_set: str, seed: int) -> float:
        asked.append((len(labels), int(images.min()), seed))
        return 0.5 + seed / 10

    monkeypatch.setattr("pipeline.research.study.work.cas", cas)
    steps: list[int] = []
    ask_signals(study, (cell, 7), steps.append)
    filtered = read_json_file(study, study.file("signals", cell, 7))["without_worst"]
    assert list(filtered) == [
        f"{name} {share}" for name in ("surprise", "change", "at random") for share in ("5%", "10%")
    ]
    assert all(quality["cas"] == pytest.approx(0.55) for quality in filtered.values())
    assert len(steps) == len(filtered)
    assert [(count, seed) for count, _, seed in asked] == [
        (190, 0),
        (190, 1),
        (180, 0),
        (180, 1),
    ] * 3
    assert [first for _, first, _ in asked[:4]] == [10, 10, 20, 20], "the least probable come first"
    assert [first for _, first, _ in asked[-4:]] == [0] * 4, "at random"


# A whole study, of a model of few blocks and on very few images.


def write_shallow_model(folder: Path) -> Path:
    """The bundled model with its first four blocks alone."""
    whole = load_model(find_model("digits"), with_encoder=True)
    config = replace(
        whole.config, name="shallow", transformer=replace(whole.config.transformer, num_blocks=4)
    )
    transformer = Transformer(config.transformer)
    transformer.load_state_dict(whole.transformer.state_dict(), strict=False)
    save_model(folder, config, transformer, whole.tokenizer)
    return folder


@pytest.mark.usefixtures("few_real_images")
def test_a_study_goes_on_where_it_stopped_and_reports(tmp_path: Path):
    model = write_shallow_model(tmp_path / "model")
    argv = [f"--out={tmp_path / 'study'}", f"--config={tmp_path / 'study.yaml'}"]
    argv.append(f"--model={model}")
    (tmp_path / "study.yaml").write_text(
        "samples: 100\nbatch_size: 9\nseeds: [4, 5]\ncas_runs: 0\ntiming_rounds: 1\nprocesses: 1\n"
        "methods:\n"
        "  full: {policy: full, budgets: {1x: null}}\n"
        "  depthvar: {policy: depthvar, budgets: {3x: 2}, signals: [3x]}\n"
    )
    assert main(argv) == 0
    done = {file: file.read_bytes() for file in (tmp_path / "study").rglob("*") if file.is_file()}
    table = (tmp_path / "study" / "table.md").read_text()
    assert "| 3x | depthvar | 32.3% |" in table
    assert "| distance to full depth | held-out loss |" in table
    assert (
        "| left out: the worst by | read as its label, % | Frechet distance | precision |" in table
    )
    (full,) = [row for row in table.splitlines() if row.startswith("| 1x | full")]
    assert "| 0.0000 ± 0.0000 |" in full
    parts = sorted((tmp_path / "study" / "samples").iterdir())
    assert len(parts) == 2 * 2 * 2, "policies, seeds, parts"
    lost = [sorted((tmp_path / "study" / "measures").iterdir())[0], parts[1]]
    for file in lost:
        file.unlink()
    kept = {file: file.stat().st_mtime_ns for file in parts if file not in lost}
    assert main(argv) == 0
    assert all(file.read_bytes() == done[file] for file in lost)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert (tmp_path / "study" / "table.md").read_text() == table


def test_no_process_of_a_study_outlives_it(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(
        "samples: 100000\nbatch_size: 5\ncas_runs: 0\nprocesses: 2\nmethods:\n"
        "  full: {policy: full, budgets: {1x: null}}\n"
    )
    argv = [f"--out={tmp_path / 'study'}", f"--config={tmp_path / 'study.yaml'}"]
    assert_no_process_outlives(["jobs.study", *argv], of=300_000)
