"""What is handed to a cluster, with a client that keeps it; for a real one see tests/test_token."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from depthvar.errors import InputError
from jobs import submit
from pipeline.request.flags import load_config
from pipeline.request.generation import GenerateConfig
from pipeline.run import submission
from tests.fake_servers import SERVERS, serving
from tests.test_token import free_port

OUT = ["--out", "s3://bucket/digits"]


class FakeClient:
    """Keeps the jobs that are handed in and what travels with them; they end as told."""

    def __init__(self, kept: Path) -> None:
        self.kept = kept
        self.jobs: list[SimpleNamespace] = []
        self.end = {"status": JobStatus.SUCCEEDED, "driver_exit_code": 0, "message": "done"}

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.jobs

    def submit_job(self, *, submission_id: str, runtime_env: dict[str, Any], **job: Any) -> None:
        shutil.copytree(runtime_env["working_dir"], self.kept / submission_id)
        self.jobs.append(
            SimpleNamespace(submission_id=submission_id, status=JobStatus.RUNNING, **job)
        )

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield f"{job} says"
        vars(self.get_job_info(job)).update(self.end)

    def get_job_info(self, job: str) -> SimpleNamespace:
        (found,) = [known for known in self.jobs if known.submission_id == job]
        return found


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    (tmp_path / "kept").mkdir()
    client = FakeClient(tmp_path / "kept")
    monkeypatch.setattr(submission, "_client", lambda url: client)
    monkeypatch.chdir(tmp_path)
    return client


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--out", "out/mine"], "temporary copy of the working directory"),
        ([*OUT, "--weights", "./runs/x"], "temporary copy of the working directory"),
        ([*OUT, "--model", "./mine"], "temporary copy of the working directory"),
        ([*OUT, "--classes", "ten"], "ten"),
        ([*OUT, "--reference-scale", "99"], "99"),
        ([*OUT, "--policy", "none-such"], "none-such"),
        ([*OUT, "--labels-file", "none.csv"], "none.csv"),
        ([*OUT, "--model", "var-d30", "--classes", "1000"], "1000"),
        ([*OUT, "--per-clas", "3"], "--per-clas"),
        ([*OUT, "--address", "head:6379"], "http://HEAD:8265"),
    ],
)
def test_what_can_be_told_here_is_refused_before_anything_is_sent(
    cluster: FakeClient, argv: list[str], told: str
):
    with pytest.raises(InputError, match=told):
        submit.main(argv)
    assert not cluster.jobs
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ


def test_the_job_reads_the_request_that_was_given(
    cluster: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Path("job.yaml").write_text("precision: float16\naddress: ignored\nper_class: 7\n")
    argv = [*OUT, "--classes", "one,id:3", "--seed", "9007199254740993", "--top-p", "1e-05"]
    argv += ["--policy-options", "skip_last_scales=1", "--policy", "uniform", "--no-extend"]
    asked = load_config(
        GenerateConfig,
        ["--config", "job.yaml", *argv, "--address", "auto"],
        prog="",
        description="",
    )
    assert submit.main(["--config", "job.yaml", *argv, "--address", "http://head:8265"]) == 0
    (job,) = cluster.jobs
    assert job.entrypoint == "python -m jobs.generate --config job.yaml"
    monkeypatch.chdir(cluster.kept / job.submission_id)
    assert load_config(GenerateConfig, ["--config", "job.yaml"], prog="", description="") == asked


def test_code_request_and_labels_travel_and_nothing_else(
    cluster: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Path("big.pth").write_text("weights")
    Path("my.csv").write_text("1,2\n")
    assert submit.main([*OUT, "--labels-file", "my.csv"]) == 0
    sent = cluster.kept / cluster.jobs[0].submission_id
    names = {"depthvar", "jobs", "pipeline", "job.yaml", "labels"}
    assert {path.name for path in sent.iterdir()} == names
    assert not list(sent.rglob("__pycache__"))
    monkeypatch.chdir(sent)
    config = load_config(GenerateConfig, ["--config", "job.yaml"], prog="", description="")
    assert config.labels_file is not None
    assert config.labels_file.read_text() == "1,2\n"


def test_files_of_a_text_models_request_travel_whatever_they_are_called(
    cluster: FakeClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.request.job.check_before_submission", lambda config: None)
    for folder, text in (("a", "fox\n"), ("b", "a {class}\n")):
        Path(folder).mkdir()
        Path(folder, "mine.txt").write_text(text)
    asked = ["--class-names", "a/mine.txt", "--templates", "b/mine.txt"]
    assert submit.main([*OUT, "--model", "fake-text", *asked]) == 0
    monkeypatch.chdir(cluster.kept / cluster.jobs[0].submission_id)
    config = load_config(GenerateConfig, ["--config", "job.yaml"], prog="", description="")
    assert config.class_names is not None
    assert config.templates is not None
    assert Path(config.class_names).read_text() == "fox\n"
    assert config.templates.read_text() == "a {class}\n"


def test_an_output_has_one_job_at_a_time_and_ids_of_its_own(
    cluster: FakeClient, capsys: pytest.CaptureFixture[str]
):
    assert submit.main([*OUT, "--no-follow"]) == 0
    assert submit.main(["--out", "s3://bucket/digits/", "--no-follow", *OUT]) == 0
    (first,) = [job.submission_id for job in cluster.jobs]
    assert first.startswith("digits-")
    assert first.endswith("-1")
    assert f"joined the job {first}" in capsys.readouterr().err
    with pytest.raises(InputError, match=f"made by the job {first} from another request"):
        submit.main([*OUT, "--seed", "1"])
    cluster.jobs[0].status = JobStatus.FAILED
    assert submit.main([*OUT, "--seed", "1"]) == 0
    assert submit.main(["--out", "s3://other/digits", "--no-follow"]) == 0
    again, other = [job.submission_id for job in cluster.jobs[1:]]
    assert again == f"{first.removesuffix('1')}2"
    assert other.removesuffix("-1") not in first


@pytest.mark.parametrize(
    ("status", "of_the_driver", "code"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 1),
    ],
)
def test_the_exit_code_is_the_jobs(
    cluster: FakeClient,
    status: JobStatus,
    of_the_driver: int | None,
    code: int,
    capsys: pytest.CaptureFixture[str],
):
    cluster.end = {"status": status, "driver_exit_code": of_the_driver, "message": "why\nmore"}
    assert submit.main(OUT) == code
    said = capsys.readouterr()
    assert said.out.endswith("-1 says")
    assert (f"is {status.lower()}: why\n" in said.err) == (code != 0)


def test_where_no_dashboard_answers_it_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    nowhere = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=f"handed in at {nowhere} .*ray dashboard cluster.yaml"):
        submit.main([*OUT, "--address", nowhere])
    with (
        serving(SERVERS["http"][0]) as server,
        pytest.raises(InputError, match=f"handed in at http://{server.text} "),
    ):
        submit.main([*OUT, "--address", f"http://{server.text}"])
