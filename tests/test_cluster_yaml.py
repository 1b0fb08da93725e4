from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException

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


def test_every_node_asks_for_the_clusters_token(cluster: dict[str, Any]):
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for node in ("head", "worker"):
        (start,) = [c for c in cluster[f"{node}_start_ray_commands"] if "ray start" in c]
        assert "RAY_AUTH_MODE=token ray start" in start


def test_ray_listens_where_the_workers_look_for_it(cluster: dict[str, Any]):
    head, worker = (" ".join(cluster[f"{node}_start_ray_commands"]) for node in ("head", "worker"))
    assert "--port=6379" in head
    assert "$RAY_HEAD_IP:6379" in worker
    assert "dashboard-host=0.0.0.0" not in head, "the dashboard stays on the head's loopback"


def test_no_place_is_left_to_fill_in(cluster: dict[str, Any]):
    for kind in cluster["available_node_types"].values():
        image = kind["node_config"]["ImageId"]
        assert re.fullmatch(r"resolve:ssm:/aws/service/deeplearning/ami/x86_64/[a-z0-9./-]+", image)
    settings = [line.partition("#")[0] for line in FILE.read_text().splitlines()]
    assert not re.search(r"0123456789|REGISTRY|BUCKET|<", "\n".join(settings))


def test_the_container_image_may_be_switched_on(cluster: dict[str, Any]):
    text = re.sub(r"^# (docker:|  .*)$", r"\1", FILE.read_text(), flags=re.MULTILINE)
    on = yaml.safe_load(text)
    assert on.pop("docker")["image"] == "REGISTRY/depthvar:cuda"
    assert on == cluster
    validate_config(prepare_config(yaml.safe_load(text)))


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in of AWS in this process; keys are written to a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    aws_utils.resource_cache.cache_clear()
    aws_utils.client_cache.cache_clear()
    with mock_aws():
        yield


def started(cluster: dict[str, Any], kind: str) -> dict[str, Any]:
    """What EC2 tells of a node that Ray's launcher started."""
    config = aws_config.bootstrap_aws(prepare_config(cluster))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    node_config = config["available_node_types"][kind]["node_config"]
    (node,) = provider.create_node(node_config, {"ray-node-type": kind}, 1)
    ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
    return ec2.describe_instances(InstanceIds=[node])["Reservations"][0]["Instances"][0]


def stack_profiles() -> list[str]:
    """The instance profiles that docs/aws_roles.yaml makes."""
    stack = (FILE.parent / "docs" / "aws_roles.yaml").read_text()
    return re.findall(r"InstanceProfileName: ([a-z-]+)", stack)


def test_rays_launcher_starts_every_node_with_a_profile_of_the_stack(
    aws: None, cluster: dict[str, Any]
):
    iam = boto3.client("iam")
    for name in stack_profiles():
        iam.create_instance_profile(InstanceProfileName=name)
    head, worker = (started(cluster, kind) for kind in ("head", "gpu_worker"))
    profiles = [node["IamInstanceProfile"]["Arn"].rpartition("/")[2] for node in (head, worker)]
    assert profiles == stack_profiles() == ["depthvar-head", "depthvar-worker"]
    assert [node.get("InstanceLifecycle") for node in (head, worker)] == [None, "spot"]


@pytest.mark.parametrize("kind", ["head", "gpu_worker"])
def test_no_node_starts_without_the_stack(aws: None, cluster: dict[str, Any], kind: str):
    with pytest.raises(NodeLaunchException, match=r"Instance profile depthvar-.* not found"):
        started(cluster, kind)
