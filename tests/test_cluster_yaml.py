from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.request.flags import load_config
from pipeline.request.generation import GenerateConfig

FILE = Path(__file__).parent.parent / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_rays_own_validator_accepts_the_file(cluster: dict[str, Any]):
    validate_config(prepare_config(cluster))


def test_rays_own_validator_would_refuse_a_misspelt_key(cluster: dict[str, Any]):
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(prepare_config({**cluster, "max_workerz": 3}))


def test_the_head_takes_no_work_and_the_workers_are_spot_gpus(cluster: dict[str, Any]):
    kinds = cluster["available_node_types"]
    head = kinds.pop(cluster["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]
    (worker,) = kinds.values()
    assert worker["resources"]["GPU"] == 1
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert worker["max_workers"] <= cluster["max_workers"]


def test_the_command_in_its_comment_is_one_that_the_job_takes():
    (command,) = re.findall(r"python -m jobs.generate (.*)", FILE.read_text())
    config = load_config(GenerateConfig, command.split(), prog="generate", description="")
    assert (config.device, config.workers, config.address) == ("cuda", 8, "auto")


def test_every_node_asks_for_the_clusters_token(cluster: dict[str, Any]):
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for node in ("head", "worker"):
        (start,) = [c for c in cluster[f"{node}_start_ray_commands"] if "ray start" in c]
        assert re.search(r"RAY_AUTH_MODE=token \S*ray start", start)


def test_ray_listens_where_the_workers_look_for_it(cluster: dict[str, Any]):
    head, worker = (" ".join(cluster[f"{node}_start_ray_commands"]) for node in ("head", "worker"))
    assert "--port=6379" in head
    assert "$RAY_HEAD_IP:6379" in worker
    assert "dashboard-host=0.0.0.0" not in head, "the dashboard stays on the head's loopback"
