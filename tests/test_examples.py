"""What docs/ gives to begin with: configurations that `plan` takes, a manifest with our flags."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml

from depthvar.weights.files import BUNDLED
from jobs import plan
from pipeline.request.flags import load_config
from pipeline.request.generation import GenerateConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PLANNED = {
    "imagenet_256": [
        "50,000 images of 1,000 classes, 256x256 jpg",
        "50.3% of the token-layers",
        "13.9 GB per worker",
    ],
    "imagenet_512": [
        "50,000 images of 1,000 classes, 512x512 jpg",
        "57.5% of the token-layers",
        "15.1 GB per worker",
    ],
    "own_model": ["10,000 images of 10 classes", "1,000 images each"],
}


def test_every_example_is_planned_here():
    assert {file.stem for file in EXAMPLES.iterdir()} == set(PLANNED)


@pytest.mark.parametrize("name", PLANNED)
def test_plan_says_of_an_example_what_its_comment_says(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["--config", str(EXAMPLES / f"{name}.yaml"), "--out", str(tmp_path / "out")]
    argv += ["--address", "auto"]  # of this machine's memory nothing is said
    if name == "own_model":
        argv += ["--model", str(BUNDLED / "digits")]
    assert plan.main(argv) == 0
    said = capsys.readouterr().out
    assert [part for part in PLANNED[name] if part not in said] == [], said
    assert "warning" not in said


@pytest.fixture
def ray_job() -> dict[str, Any]:
    text = (ROOT / "docs" / "kubernetes" / "rayjob.yaml").read_text()
    return yaml.safe_load(Template(text).substitute(IMAGE="registry/depthvar:cuda", BUCKET="data"))


def test_the_rayjob_runs_a_command_that_generate_takes(ray_job: dict[str, Any]):
    program, name, *argv = shlex.split(ray_job["spec"]["entrypoint"])
    assert (program, name) == ("depthvar", "generate")
    config = load_config(GenerateConfig, argv, prog="generate", description="")
    assert (config.address, config.device, config.out) == ("auto", "cuda", "s3://data/imagenet")
    (workers,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert config.workers == workers["maxReplicas"]


def test_the_rayjob_is_of_the_pinned_ray_with_a_token_and_gpus_for_workers_alone(
    ray_job: dict[str, Any],
):
    cluster = ray_job["spec"]["rayClusterSpec"]
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    head, worker = (
        group["template"]["spec"]["containers"][0] for group in (cluster["headGroupSpec"], workers)
    )
    assert head["image"] == worker["image"] == "registry/depthvar:cuda"
    assert head["envFrom"] == worker["envFrom"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_the_image_is_built_of_what_the_package_is_made_of():
    sent = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    packages = re.search(r"include = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert packages is not None
    wanted = {name.strip(' "*') for name in packages[1].split(",")}
    assert wanted | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == set(sent)
