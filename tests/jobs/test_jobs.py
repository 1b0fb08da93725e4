"""The command line: what goes in, what comes out, and how mistakes read."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import jobs._entry
import jobs.generate
import jobs.plan
import jobs.verify
from jobs import _cli as cli
from pipeline.request.job_plan import JobPlan
from tests.file_modes import assert_as_the_umask_has_it, umask
from tests.random_weights import write_random_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def dataset(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of three classes in two shards, made in this process by the real sampler."""
    out = tmp_path_factory.mktemp("dataset") / "out"
    with umask(0o002):
        assert jobs.generate.main([*flags(out, weights), "--workers", "0"]) == 0
    return out


def flags(out: Path, weights: Path, *more: str) -> list[str]:
    text = "--policy uniform --classes 1,4,seven --per-class 2 --samples-per-shard 4 --batch-size 2"
    options = [*text.split(), "--save-depth-maps"]
    return ["--out", str(out), "--weights", str(weights), "--device", "cpu", *options, *more]


def exit_code(main: object, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a job as its module does, and return the code it exits with."""
    monkeypatch.setattr(sys, "argv", ["job", *argv])
    with pytest.raises(SystemExit) as caught:
        jobs._entry.run_job(main)  # type: ignore[arg-type]
    assert isinstance(caught.value.code, int)
    return caught.value.code


def bad_inputs(tmp_path: Path, weights: Path) -> dict[str, tuple[list[str], str]]:
    """Flags after the good ones, and a part of the one line they must give."""
    truncated = tmp_path / "truncated"
    truncated.mkdir()
    for file in weights.iterdir():
        (truncated / file.name).write_bytes(file.read_bytes())
    transformer = truncated / "transformer.safetensors"
    transformer.write_bytes(transformer.read_bytes()[:-1000])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("")
    labels = tmp_path / "labels.csv"
    labels.write_text("1,-4\n")
    config = tmp_path / "job.yaml"
    config.write_text("per_clas: 3\n")
    return {
        "unknown class": (["--classes", "eleven"], "unknown class 'eleven'"),
        "class id outside the model": (["--classes", "3-10"], "'10'"),
        "negative count": (["--per-class", "-3"], "--per-class: got '-3'"),
        "zero count": (["--per-class", "0"], "--per-class: got '0'"),
        "R outside the scales": (["--reference-scale", "7"], "reference scale is 7"),
        "R below the scales": (["--reference-scale", "-1"], "reference scale is -1"),
        "top-p of zero": (["--top-p", "0"], "--top-p: got '0'"),
        "top-p above one": (["--top-p", "1.01"], "--top-p: got '1.01'"),
        "unwritable output": (["--out", "/proc/out"], "/proc"),
        "output under a file": (["--out", str(file / "out")], "is a file"),
        "foreign output": (["--out", str(foreign)], "wanted an empty folder"),
        "unknown scheme": (["--out", "ftp://host/out"], "'ftp'"),
        "more workers than resources": (["--workers", "9999"], "--workers is 9999"),
        "no GPU": (["--device", "cuda"], "no GPU worker fits"),
        "no GPU in one process": (["--device", "cuda", "--workers", "0"], "no GPU worker fits"),
        "unknown model": (["--model", "dalle"], "wanted 'dalle'"),
        "missing weights": (["--weights", str(tmp_path / "none")], "does not exist"),
        "truncated weights": (["--weights", str(truncated)], "is truncated or no file of weights"),
        "weights of another model": (
            ["--model", "var-d16", "--classes", "3"],
            "holds the model 'digits', wanted 'var-d16'",
        ),
        "no calibration": (["--policy-options", "proxy=calibrated"], "no calibration"),
        "unknown policy": (["--policy", "magic"], "unknown policy 'magic'"),
        "unknown policy option": (["--policy-options", "zz=1"], "unknown policy option 'zz'"),
        "policy option of a wrong type": (["--policy-options", "kept_depth=x"], "kept_depth"),
        "policy option of studies": (["--policy-options", "dither=true"], "option 'dither'"),
        "policy option with a flag of its own": (
            ["--policy-options", "reference_scale=2"],
            "unknown policy option 'reference_scale'",
        ),
        "unknown YAML key": (["--config", str(config)], "did you mean per_class?"),
        "missing YAML file": (["--config", str(tmp_path / "none")], "No such file"),
        "unknown flag": (["--per-clas", "3"], "--per-clas"),
        "address where nothing answers": (["--address", "127.0.0.1:1"], "nothing answers"),
        "text encoder of a model of classes": (
            ["--text-encoder", "google/flan-t5-xl"],
            "got --text-encoder, but digits knows its own classes alone",
        ),
        "two sources of text states": (
            ["--text-encoder", "google/flan-t5-xl", "--text-states", str(file)],
            "text_states was given together with text_encoder",
        ),
        "two sources of labels": (["--labels-file", str(labels)], "drop"),
    }


BAD_INPUTS = tuple(
    """unknown class|class id outside the model|negative count|zero count|R outside the scales
    |R below the scales|top-p of zero|top-p above one|unwritable output|output under a file
    |foreign output|unknown scheme|more workers than resources|no GPU|no GPU in one process
    |unknown model|missing weights|truncated weights|weights of another model|no calibration
    |unknown policy|unknown policy option
    |policy option of a wrong type|policy option of studies
    |policy option with a flag of its own|unknown YAML key|missing YAML file
    |unknown flag|address where nothing answers|text encoder of a model of classes
    |two sources of text states|two sources of labels""".replace("\n    ", "").split("|")
)


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_clear_line_code_2_and_nothing_written(
    name: str,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    if name.startswith("no GPU"):
        monkeypatch.setattr("pipeline.run.cluster.local_gpus", lambda: 0)
    more, part = bad_inputs(tmp_path, weights)[name]
    before = sorted(tmp_path.rglob("*"))
    argv = flags(tmp_path / "out", weights, *more)
    if name == "two sources of labels":
        argv = [*flags(tmp_path / "out", weights)[:4], "--classes", "3", *more]
    assert exit_code(jobs.generate.main, argv, monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert part in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_gpu_that_torch_cannot_use_is_refused_before_anything_is_written(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("pipeline.run.cluster.local_gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for workers in ("0", "1"):
        argv = flags(tmp_path / "out", weights, "--device", "cuda", "--workers", workers)
        assert exit_code(jobs.generate.main, argv, monkeypatch) == 2
        assert "torch" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_table_of_bad_input_is_complete(weights: Path, tmp_path: Path):
    assert tuple(bad_inputs(tmp_path, weights)) == BAD_INPUTS


def test_bad_lines_of_a_labels_file_are_refused(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    labels = tmp_path / "labels.csv"
    for content in ("1,-4\n", "1,0\n", "eleven,4\n", "12,4\n", ""):
        labels.write_text(content)
        argv = [*flags(tmp_path / "out", weights)[:4], "--labels-file", str(labels)]
        assert exit_code(jobs.generate.main, argv, monkeypatch) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_another_configuration_over_the_same_output_is_refused_field_by_field(
    dataset: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    before = {f: f.stat().st_mtime_ns for f in dataset.rglob("*")}
    argv = flags(dataset, weights, "--seed", "7", "--top-p", "0.5")
    for main in (jobs.generate.main, jobs.plan.main):
        assert exit_code(main, argv, monkeypatch) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "seed: " in line
        assert "this run has 7" in line
        assert "top_p: " in line
    assert {f: f.stat().st_mtime_ns for f in dataset.rglob("*")} == before


def test_plan_prints_the_dry_run_and_writes_nothing(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = flags(tmp_path / "out", weights, "--workers", "4", "--batch-size", "3")
    assert jobs.plan.main(argv) == 0
    text = capsys.readouterr().out
    assert "6 images of 3 classes, 32x32 png" in text
    assert "classes   2 images each: 1 'one', 4 'four', 7 'seven'\n" in text
    assert "2 of 4 images" in text
    assert "GFLOP per image, full depth" in text
    assert "bytes a pixel, measured on the bundled model's digits" in text
    assert "all 16 blocks; " in text
    assert "the last shard holds 2 images, the others 4" in text
    assert "--batch-size 3 does not divide --samples-per-shard 4" in text
    assert "2 shards for 4 workers" in text
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert [row[1] for row in rows] == [f"{side}x{side}" for side in (1, 2, 3, 4, 5, 6, 8)]
    assert not list(tmp_path.iterdir())


def test_plan_warns_of_a_batch_that_does_not_fit(
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(jobs.plan, "available_memory", lambda: 10**9)
    argv = flags(tmp_path / "out", weights, "--batch-size", "2000", "--samples-per-shard", "2000")
    assert jobs.plan.main([*argv, "--workers", "1"]) == 0
    assert "warning: at --batch-size 2000 a worker needs about" in capsys.readouterr().out
    assert jobs.plan.main(flags(tmp_path / "out", weights, "--workers", "1")) == 0
    assert "a worker needs about" not in capsys.readouterr().out


def test_plan_over_a_dataset_says_what_is_done_and_how_large_it_gets(
    dataset: Path, weights: Path, capsys: pytest.CaptureFixture[str]
):
    assert jobs.plan.main(flags(dataset, weights)) == 0
    text = capsys.readouterr().out
    assert "6 images in 2 shards" in text
    assert "about " in text
    plan = JobPlan.from_json((dataset / "plan.json").read_bytes())
    assert plan.fingerprint in text


def test_images_from_numbers_that_are_not_finite_are_never_committed(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Weights that give NaN for one class: its shards are set aside, the others are made."""
    for file in weights.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    transformer = tmp_path / "transformer.safetensors"
    tensors = load_file(transformer)
    tensors["class_emb.weight"][4] = torch.nan
    save_file(tensors, transformer)
    out = tmp_path / "out"
    labels = ["--classes", "1,4,seven", "--per-class", "1", "--samples-per-shard", "1"]
    flags = ["--out", str(out), "--weights", str(tmp_path), "--workers", "0", *labels]
    assert jobs.generate.main(flags) == 1
    assert "missing: 1 shard: 1" in capsys.readouterr().err
    ledger = [json.loads(row) for row in (out / "commits" / "failures.jsonl").open()]
    assert [(row["shard_id"], row["set_aside"]) for row in ledger] == [(1, False)] * 2 + [(1, True)]
    assert all("drew tokens from numbers that are not finite" in row["error"] for row in ledger)
    cause = f"{transformer} holds NaN in class_emb.weight: it is damaged"
    assert all(cause in row["error"] for row in ledger)
    assert sorted(file.name for file in out.glob("train/*")) == ["00000.tar", "00002.tar"]


def test_generate_says_which_classes_it_makes_before_it_begins(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    labels = tmp_path / "labels.csv"
    labels.write_text("# mine\nseven,1\n1,2\nseven,1\n4,0\n")
    argv = ["--out", str(tmp_path / "out"), "--weights", str(weights), "--labels-file", str(labels)]
    assert jobs.generate.main([*argv, "--workers", "0", "--device", "cpu"]) == 0
    shown = capsys.readouterr().err
    added_up = "names 1 class more than once, whose counts add up: 'seven' 2 from 2 lines"
    notes = f"classes   2 images each: 1 'one', 7 'seven'\nnote: {labels} {added_up}\n"
    assert notes in shown
    assert shown.index(notes) < shown.index("0/4 images")
    assert jobs.plan.main(argv) == 0
    text = capsys.readouterr().out
    assert all(line in text.splitlines() for line in notes.splitlines())


def test_what_generate_makes_has_the_permissions_of_the_umask(dataset: Path):
    assert_as_the_umask_has_it(dataset, 0o002)


def test_verify_accepts_what_generate_made(dataset: Path, capsys: pytest.CaptureFixture[str]):
    for argv in ([str(dataset)], ["--out", str(dataset), "--deep"]):
        assert jobs.verify.main(argv) == 0
        assert "2 of 2 shards sound (6 images), 0 problems" in capsys.readouterr().out
    with tarfile.open(dataset / "train" / "00001.tar") as tar:
        suffixes = [member.name.partition(".")[2] for member in tar]
    assert suffixes == 2 * ["cls", "depth.npy", "json", "png"]


def test_verify_names_the_shard_that_is_damaged_and_generate_mends_it(
    weights: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    for file in [f for f in dataset.rglob("*") if f.is_file()]:
        copy = out / file.relative_to(dataset)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    tar = out / "train" / "00001.tar"
    good = tar.read_bytes()
    tar.write_bytes(good[:-512])
    assert jobs.verify.main([str(out)]) == 1
    assert "00001" in capsys.readouterr().out
    assert jobs.generate.main([*flags(out, weights), "--workers", "0"]) == 0
    assert tar.read_bytes() == good
    assert jobs.verify.main([str(out), "--deep"]) == 0


def test_verify_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert exit_code(jobs.verify.main, [str(tmp_path / "none")], monkeypatch) == 2


def test_a_file_of_configuration_makes_the_same_plan_as_flags(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "job.yaml"
    content = {
        "out": str(tmp_path / "out"),
        "weights": str(weights),
        "device": "cpu",
        "policy": "uniform",
        "classes": [1, 4, "seven"],
        "per_class": 2,
        "samples_per_shard": 4,
        "batch_size": 2,
        "save_depth_maps": True,
    }
    file.write_text(json.dumps(content))  # JSON is YAML
    jobs.plan.main(["--config", str(file)])
    from_file = capsys.readouterr().out
    jobs.plan.main(flags(tmp_path / "out", weights))
    assert capsys.readouterr().out == from_file


METAVARS = {
    "N": """ablation-samples batch-size batch-sizes calibration-samples cas-runs cas-samples
        contact-sheet decoder-steps encode-threads headroom-after image-channels loader-workers
        max-attempts per-class png-level processes real reference-scale regenerate rounds runs
        samples samples-per-shard seed seeds steps threads threads-per-worker timing-rounds
        tokenizer-steps top-k transformer-steps transformer-tuning-steps workers""",
    "X": "cfg held-out-share layer-drop learning-rate price-per-gpu-hour temperature top-p",
    "PATH": "data inception-weights model-out out reference scratch test text-encoder weights",
    "FILE": "config json plot labels-file prompts templates text-states",
    "MODEL": "model tokenizer-from",
    "CLASSES": "classes class-names",
    "POLICY": "policy",
    "POLICY:R": "policies",
    "KEY=VALUE": "policy-options",
    "ADDRESS": "address",
    "DEVICE": "device",
    "COLOUR": "background",
    "SIZE": "image-size",
}
JOBS = sorted(file.stem for file in (ROOT / "jobs").glob("[a-z]*.py"))


@pytest.mark.parametrize("job", JOBS)
def test_help_calls_the_value_of_every_flag_what_it_is(
    job: str, capsys: pytest.CaptureFixture[str]
):
    """One flag, one meaning, in all jobs; choices are listed, switches take none."""
    with pytest.raises(SystemExit):
        importlib.import_module(f"jobs.{job}").main(["--help-all"])
    shown = dict(re.findall(r"^  --([-a-z]+) ([^\s{]\S*)", capsys.readouterr().out, re.M))
    metavar_of = {flag: metavar for metavar, flags in METAVARS.items() for flag in flags.split()}
    assert shown == {flag: metavar_of[flag] for flag in shown}
    assert shown


@pytest.mark.parametrize("job", JOBS)
def test_help_fits_on_a_screen_and_help_all_shows_the_rest(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")

    def shown(main: Callable[[list[str]], int], *argv: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*argv])
        assert caught.value.code == 0
        return capsys.readouterr().out

    main, name = importlib.import_module(f"jobs.{job}").main, job.replace("_", "-")
    first, whole = shown(main, "--help"), shown(main, "--help-all")
    assert len(first.splitlines()) <= 50
    assert max(map(len, first.splitlines())) <= 80
    assert set(re.findall("^  --[-a-z]+", first, re.M)) <= set(re.findall("  --[-a-z]+", whole))
    assert ("--help-all" in first.splitlines()[-1]) == (first != whole)
    assert shown(cli.main, name, "--help") == shown(cli.main, job, "-h") == first
    assert shown(cli.main, name, "--help-all") == whole


@pytest.mark.parametrize("job", ["plan", "generate", "verify"])
def test_every_job_runs_as_a_module_and_explains_itself(job: str):
    command = [sys.executable, "-m", f"jobs.{job}", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"usage: depthvar {job.replace('_', '-')}")
    assert shown.stderr == ""
