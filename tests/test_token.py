"""Ray's token authentication: a job gets into a cluster with its token, and not without."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from ray._private.runtime_env import packaging

from tests import fake_job
from tests.fake_shards import data_files
from tests.fakes import set_faults, without_torch
from tests.fault_hook import FAULT_HOOK, FAULTS_VARIABLE, hold

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"
TOKEN, OTHER_TOKEN = "a" * 64, "b" * 64


def environment(token: str | None) -> dict[str, str]:
    """Without a token the mode is still `token`: there is no other way in."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ours |= {"RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0", "HOME": "/nonexistent"}
    return ours | ({} if token is None else {"RAY_AUTH_TOKEN": token})


def free_port() -> int:
    """A port that no connection is given by chance: another process would have it meanwhile.

    An agent of Ray that finds its port taken goes on without taking jobs.
    """
    given_by_chance = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    for port in random.SystemRandom().sample(range(20_000, int(given_by_chance[0])), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class Head(NamedTuple):
    """Where a cluster answers: jobs are submitted to the dashboard, nodes and drivers join.

    Its jobs look into the folder `faults`, see `tests.fault_hook`.
    """

    dashboard: str
    gcs: str
    faults: Path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head that asks for the token; only its own processes are ended."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets want a short path
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"]
    # The agent that takes jobs never comes up on the usual port while another test's Ray has it.
    command += [f"--dashboard-agent-listen-port={agent}"]
    set_faults(folder / "faults.json")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(part) for part in (*command, f"--temp-dir={folder}")],
            env={
                **environment(TOKEN),
                "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",  # whose python jobs run
                "PYTHONPATH": os.pathsep.join([without_torch(), str(ROOT)]),
                "DEPTHVAR_FAULT": FAULT_HOOK,
                FAULTS_VARIABLE: str(folder / "faults.json"),
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_until_open(dashboard, process)
            wait_until_open(agent, process)
            yield Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", folder)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def wait_until_open(port: int, head: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert head.poll() is None, "ray start ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"port {port} did not open")


# What a job of ours finds out about itself, without waiting for torch.
PROGRAM = """
import os
from depthvar.errors import InputError
from depthvar.paths import checked_job_file, checked_location
print(6 * 7, open(checked_job_file("job.yaml")).read())
for place in ("out/mine", os.path.abspath("out/mine"), "/shared/out", "s3://bucket/out"):
    try:
        print("taken", checked_location(place))
    except InputError as error:
        print("refused", error)
"""


def submit(address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "job.yaml").write_text("seed: 5")
    (folder / "main.py").write_text(PROGRAM)
    command = [RAY, "job", "submit", "--address", address, "--working-dir", folder]
    command += ["--runtime-env-json", json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})]
    command += ["--", sys.executable, "main.py"]
    return subprocess.run(
        [str(part) for part in command],
        env=environment(TOKEN),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_a_job_with_the_clusters_token_runs_and_knows_what_it_would_lose(
    head: Head, tmp_path: Path
):
    done = submit(head.dashboard, tmp_path)
    for _ in range(20):  # the dashboard opens before the agent that takes jobs is up
        if "No available agent" not in done.stderr:
            break
        time.sleep(3)
        done = submit(head.dashboard, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "42 seed: 5" in done.stdout
    assert done.stdout.count("refused got 'out/mine', which in a Ray job lies in") == 1
    assert done.stdout.count("refused got '/") == 1
    assert "taken /shared/out\ntaken s3://bucket/out\n" in done.stdout


def test_only_code_and_configuration_go_along_with_a_job(tmp_path: Path):
    """Of a checkout that holds weights, images and datasets beside the code."""
    shutil.copy(ROOT / ".rayignore", tmp_path)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    sent = [
        "depthvar/models/digits/transformer.safetensors",
        "jobs/generate.py",
        "job.yaml",
        "x.py",
    ]
    left = ["checkpoints/var_d16.pth", "my_images/jobs/1.png", "runs/x", "out/x.tar", "d16.npz"]
    for name in (*sent, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found: list[str] = []
    packaging._dir_travel(
        tmp_path,
        [packaging._get_excludes(tmp_path, [".git"])],
        lambda path: found.append(str(path.relative_to(tmp_path))) if path.is_file() else None,
        include_gitignore=True,
    )
    assert sorted(found) == sorted(sent)


_WAIT_S = 240  # on a machine that has much else to do

# 4 shards of 4 digits.
FLAGS = ["--classes", "0-1", "--per-class", "8", "--samples-per-shard", "4", "--batch-size", "4"]


class Submitter:
    """`depthvar submit` in a process of its own; the job has the fake sampler."""

    def __init__(self, head: Head, out: Path, log: Path) -> None:
        command = [sys.executable, "-m", "tests.fake_submit", "--address", head.dashboard]
        command += ["--out", str(out), "--workers", "1", *FLAGS]
        self._log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment(TOKEN), "PYTHONPATH": without_torch()},
                stdout=stream,
                stderr=stream,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait(self) -> int:
        return self.process.wait(_WAIT_S)


def wait_for(happened: Callable[[], object], submitter: Submitter) -> None:
    deadline_s = time.monotonic() + _WAIT_S
    while not happened():
        assert submitter.process.poll() is None, submitter.said
        assert time.monotonic() < deadline_s, submitter.said
        time.sleep(0.1)


def driver_of(head: Head, job: str) -> int:
    """The process id of a job's driver."""
    reply = requests.get(
        f"{head.dashboard}/api/jobs/{job}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30
    )
    return int(reply.json()["driver_info"]["pid"])


@pytest.mark.timeout(900)
def test_a_job_handed_in_is_left_joined_killed_and_handed_in_again_to_the_same_bytes(
    head: Head, tmp_path: Path
):
    out = tmp_path / "out"
    one_shard = hold(head.faults, "record-published")
    try:
        first = Submitter(head, out, tmp_path / "log-1")
        wait_for(lambda: "images" in first.said and list(out.glob("commits/*.json")), first)
        (name,) = re.findall(r"submitted the job (out-[0-9a-f]{8}-1): `ray job stop", first.said)
        first.process.send_signal(signal.SIGINT)
        assert first.wait() == 128 + signal.SIGINT
        assert f"the job {name} goes on: the same command follows it" in first.said

        second = Submitter(head, out, tmp_path / "log-2")
        wait_for(lambda: "images" in second.said, second)
        assert f"joined the job {name}" in second.said
        os.kill(driver_of(head, name), signal.SIGKILL)
        assert second.wait() == 128 + signal.SIGKILL, second.said
        assert f"the job {name} is failed" in second.said
        assert 1 <= len(list(out.glob("commits/*.json"))) < 4
    finally:
        one_shard.unlink()
    third = Submitter(head, out, tmp_path / "log-3")
    assert third.wait() == 0, third.said
    assert "submitted the job " + name.removesuffix("1") + "2" in third.said
    here = tmp_path / "here"
    assert fake_job.main(["--out", str(here), "--workers", "0", *FLAGS]) == 0
    assert data_files(out) == data_files(here)


# Asks in forks of one process, which has imported Ray once, each with an environment of its own.
ASK = """
import json, os, sys
from ray._private.authentication_test_utils import reset_auth_token_state
from ray.job_submission import JobSubmissionClient
from pipeline.run.address import ClusterAddress
from pipeline.run.cluster import found_cluster

def found(address):
    return "found " + found_cluster(ClusterAddress("--address", address)).text

def submitted(address):
    return JobSubmissionClient(address).submit_job(entrypoint="true")

for ask, address, environment in json.load(sys.stdin):
    if os.fork() == 0:
        os.environ.clear()
        os.environ.update(environment)
        reset_auth_token_state()
        try:
            answer = {"find": found, "submit": submitted}[ask](address)
        except Exception as error:
            answer = type(error).__name__ + ": " + str(error)
        print(json.dumps(answer), flush=True)
        os._exit(0)
    os.wait()
"""
TOKENS = {
    "the token": environment(TOKEN),
    "no token": environment(None),
    "another token": environment(OTHER_TOKEN),
    "no token mode": {**environment(TOKEN), "RAY_AUTH_MODE": "disabled"},
}


@pytest.fixture(scope="module")
def answers(head: Head) -> dict[tuple[str, str], str]:
    """What a process with each of the tokens is told: a driver at a port of the head, a job."""
    dashboard = head.dashboard.removeprefix("http://")
    asked = {("find", which): head.gcs for which in TOKENS}
    asked |= {("submit", which): head.dashboard for which in ("no token", "another token")}
    asked[("find at the dashboard", "the token")] = dashboard
    questions = [
        (what.split()[0], address, TOKENS[which]) for (what, which), address in asked.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=ROOT,
        env=TOKENS["the token"],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return dict(zip(asked, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("token", ["no token", "another token"])
def test_a_job_without_the_clusters_token_is_refused(
    answers: dict[tuple[str, str], str], token: str
):
    said = answers["submit", token]
    assert "Error: " in said, "not the name of a job"
    assert "authentication" in said.lower()


def test_a_driver_with_the_clusters_token_finds_the_cluster_and_tells_its_other_ports(
    head: Head, answers: dict[tuple[str, str], str]
):
    assert answers["find", "the token"] == f"found {head.gcs}"
    refused = answers["find at the dashboard", "the token"]
    assert refused.startswith("InputError: ")
    assert "an HTTP server, as a cluster's dashboard is" in refused


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("no token", "there is no token to show"),
        ("another token", "refuses this process without its token"),
        ("no token mode", "refuses this process"),
    ],
)
def test_a_driver_without_the_clusters_token_is_told_what_to_set(
    head: Head, answers: dict[tuple[str, str], str], token: str, reason: str
):
    said = answers["find", token]
    assert said.startswith(f"InputError: --address is {head.gcs}, ")
    assert reason in said
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in said


def test_nothing_here_turns_the_token_off():
    for folder in ("depthvar", "pipeline", "jobs"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text().replace("RAY_AUTH_MODE=token", "")
            assert "RAY_AUTH_MODE" not in text, file
    assert "RAY_AUTH_MODE=disabled" not in (ROOT / "cluster.yaml").read_text()
