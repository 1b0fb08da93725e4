"""Ray's token authentication: a job gets into a cluster with its token, and not without."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.runtime_env import packaging

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).parent / "ray"
TOKEN, OTHER_TOKEN = "a" * 64, "b" * 64


def environment(token: str | None) -> dict[str, str]:
    """Without a token the mode is still `token`: there is no other way in."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ours |= {"RAY_AUTH_MODE": "token", "HOME": "/nonexistent"}
    return ours | ({} if token is None else {"RAY_AUTH_TOKEN": token})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The dashboard of a head that asks for the token; only its own processes are ended."""
    port, dashboard = free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets want a short path
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"]
    # The agent that takes jobs never comes up on the usual port while another test's Ray has it.
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(
            [str(part) for part in (*command, f"--temp-dir={folder}")],
            env=environment(TOKEN),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_until_open(dashboard, head)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            head.send_signal(signal.SIGTERM)
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def wait_until_open(port: int, head: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert head.poll() is None, "ray start ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the dashboard did not open")


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


def submit(address: str, token: str | None, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "job.yaml").write_text("seed: 5")
    (folder / "main.py").write_text(PROGRAM)
    command = [RAY, "job", "submit", "--address", address, "--working-dir", folder]
    command += ["--runtime-env-json", json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})]
    command += ["--", sys.executable, "main.py"]
    return subprocess.run(
        [str(part) for part in command],
        env=environment(token),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_a_job_with_the_clusters_token_runs_and_knows_what_it_would_lose(
    address: str, tmp_path: Path
):
    done = submit(address, TOKEN, tmp_path)
    for _ in range(20):  # the dashboard opens before the agent that takes jobs is up
        if "No available agent" not in done.stderr:
            break
        time.sleep(3)
        done = submit(address, TOKEN, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "42 seed: 5" in done.stdout
    assert done.stdout.count("refused got 'out/mine', which in a Ray job lies in") == 1
    assert done.stdout.count("refused got '/") == 1
    assert "taken /shared/out\ntaken s3://bucket/out\n" in done.stdout


@pytest.mark.parametrize("token", [None, OTHER_TOKEN], ids=["no token", "another token"])
def test_a_job_without_the_clusters_token_is_refused(
    address: str, token: str | None, tmp_path: Path
):
    done = submit(address, token, tmp_path)
    assert done.returncode != 0
    assert "42" not in done.stdout
    assert "authentication" in (done.stdout + done.stderr).lower()


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


def test_nothing_here_turns_the_token_off():
    for folder in ("depthvar", "pipeline", "jobs"):
        for file in (ROOT / folder).rglob("*.py"):
            assert "RAY_AUTH_MODE" not in file.read_text(), file
    assert "RAY_AUTH_MODE=disabled" not in (ROOT / "cluster.yaml").read_text()
