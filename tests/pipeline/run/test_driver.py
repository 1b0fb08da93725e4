from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray

from depthvar.errors import InputError
from pipeline.faults import VARIABLE as FAULT_VARIABLE
from pipeline.request.generation import GenerateConfig
from pipeline.request.job import plan_job
from pipeline.request.plan_file import stored_plan
from pipeline.run import cluster, driver, ray_crew
from pipeline.run.cluster import starts_nodes
from pipeline.run.driver import generate
from pipeline.run.encoding import missing_prompts
from pipeline.run.ledger import JobStopped
from pipeline.run.ray_crew import RayCrew, encode_on_a_worker
from pipeline.run.ray_metrics import PROMETHEUS_NAMES
from pipeline.run.schedule import Machine, WorkerShape
from pipeline.run.worker_failures import cause_of, reason_of
from pipeline.shards.committed import ShardSummary
from pipeline.shards.manifest import CommitRecord
from pipeline.shards.text_states import TEXT_FOLDER
from pipeline.storage import Storage
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fake_servers import SERVERS, serving
from tests.fake_text import text_job, text_request
from tests.fakes import open_gate, set_faults, wait_at_gate, wait_for, without_torch
from tests.fault_hook import FAULT_HOOK, FAULTS_VARIABLE, arm, armed, hold
from tests.small_ray import small_head


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One small Ray for the module; the file that holds the faults of its workers."""
    faults = tmp_path_factory.mktemp("faults") / "faults.json"
    set_faults(faults)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULTS_VARIABLE, str(faults))
        patch.setenv(FAULT_VARIABLE, FAULT_HOOK)
        patch.setenv("PYTHONPATH", without_torch())
        head = small_head(
            num_cpus=2,
            object_store_memory=100 * 2**20,
            _system_config={"metrics_report_interval_ms": 1000},
        )
        ray.init(head.address, log_to_driver=False, logging_level="ERROR")
        yield faults
        ray.shutdown()
        head.shutdown()


@pytest.fixture
def faults(ray_here: Path) -> Iterator[Callable[..., None]]:
    yield lambda **kwargs: set_faults(ray_here, **kwargs)
    set_faults(ray_here)


@pytest.fixture(autouse=True)
def fake_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    monkeypatch.setattr(cluster, "available_cores", lambda: 2)


def config(out: Path, **changes: Any) -> GenerateConfig:
    """42 images of 10 classes in 5 shards of at most 9, batches of 4."""
    settings: dict[str, Any] = {
        "labels_file": _labels(out.parent),
        "samples_per_shard": 9,
        "batch_size": 4,
        "device": "cpu",
        "scratch": out.parent / "scratch",
    }
    return GenerateConfig(out=str(out), **{**settings, **changes})


def _labels(folder: Path) -> Path:
    file = folder / "labels.csv"
    file.write_text("".join(f"{label},{4 + (label < 2)}\n" for label in range(10)))
    return file


def run(out: Path, **changes: Any) -> int:
    return generate(config(out, **changes), sampler_factory=FAKE_SAMPLER)


def contents(out: Path) -> dict[str, bytes]:
    """What must not depend on the run: tars and Parquet."""
    files = [*out.glob("train/*"), *out.glob("meta/*.parquet")]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def ledger(out: Path) -> list[dict[str, Any]]:
    file = out / "commits" / "failures.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def attempts(out: Path) -> dict[int, int]:
    records = [CommitRecord.from_json(f.read_bytes()) for f in out.glob("commits/0*.json")]
    return {record.shard_id: record.attempt for record in records if record is not None}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The dataset as one process without Ray makes it."""
    out = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.request.job.fetch_model", fake_weights)
        assert run(out, workers=0) == 0
    return contents(out)


def test_two_workers_make_the_bytes_of_one_process(ray_here, reference, faults, tmp_path, capsys):
    loads, gate = tmp_path / "loads", tmp_path / "gate"
    faults(loads=str(loads), gate=str(gate))
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(run, tmp_path / "out")
        wait_at_gate(gate, 2)  # or the first would be done before the second has begun
        open_gate(gate)
        assert code.result() == 0
    assert contents(tmp_path / "out") == reference
    assert set(attempts(tmp_path / "out").values()) == {1}
    assert len(loads.read_text().split()) == 2, "each worker loads the model once"
    assert not list((tmp_path / "scratch").iterdir())
    assert (tmp_path / "out" / "contact_sheet.png").exists()
    said = capsys.readouterr().out
    assert "42 images in" in said
    assert "2 x cpu" in said
    assert "5 of 5 shards" in said


def test_the_output_is_tried_once(tmp_path, monkeypatch):
    tried: list[str] = []
    monkeypatch.setattr(Storage, "check_writable", lambda storage: tried.append(str(storage)))
    assert run(tmp_path / "out", workers=0) == 0
    assert tried == [str(tmp_path / "out")]


def test_a_finished_job_returns_at_once_and_touches_nothing(reference, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(out, workers=0) == 0
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    monkeypatch.setattr(driver, "_crew", None)
    assert run(out) == 0
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*")} == before


def test_a_poison_shard_is_set_aside_after_three_attempts_and_the_others_are_made(
    ray_here, reference, faults, tmp_path, capsys
):
    out = tmp_path / "out"
    faults(poison=20)
    assert run(out, workers=1) == 1
    assert [(e["shard_id"], e["attempt"], e["set_aside"]) for e in ledger(out)] == [
        (2, 1, False),
        (2, 2, False),
        (2, 3, True),
    ]
    assert all(e["error"] == "ValueError: poison at 20" for e in ledger(out))
    assert all("_act_out" in e["traceback"] for e in ledger(out))
    assert sorted(attempts(out)) == [0, 1, 3, 4]
    assert "missing: 1 shard: 2" in capsys.readouterr().err
    assert not (out / "index.json").exists()

    faults()
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in out.glob("*/0000[0134].*")}
    assert len(before) == 12
    assert run(out) == 1, "what was set aside is not tried again unasked"
    assert "--retry-failed" in capsys.readouterr().err
    assert run(out, retry_failed=True) == 0
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in before} == before
    assert contents(out) == reference


def test_a_worker_that_dies_once_is_replaced_and_its_shard_charged_once(
    ray_here, reference, faults, tmp_path
):
    out, loads, once = tmp_path / "out", tmp_path / "loads", tmp_path / "once"
    once.touch()
    faults(crash_once=str(once), loads=str(loads))
    assert run(out, workers=1) == 0
    assert contents(out) == reference
    assert len(ledger(out)) == 1
    assert "its process died" in ledger(out)[0]["error"]
    assert sorted(attempts(out).values()) == [1, 1, 1, 1, 2]
    assert len(loads.read_text().split()) == 2


def test_shards_that_always_end_their_worker_are_set_aside_with_what_happened(
    ray_here, faults, tmp_path
):
    out = tmp_path / "out"
    faults(crash=0, segfault=40)  # killed, and by a fault of its own
    assert run(out, workers=1, max_attempts=2) == 1
    told = [(e["shard_id"], e["set_aside"]) for e in ledger(out)]
    for shard in (0, 4):
        assert [entry for entry in told if entry[0] == shard] == [(shard, False), (shard, True)]
    assert len(told) == 4
    assert all("its process died" in e["error"] and e["traceback"] for e in ledger(out))
    assert sorted(attempts(out)) == [1, 2, 3]


@pytest.fixture
def committing(ray_here: Path, faults: Callable[..., None], tmp_path: Path) -> Iterator[Path]:
    """The file that holds shard 0 back before it is published, while shard 1 waits at a gate."""
    faults(gate=str(tmp_path / "gate"), gate_from=9)
    file = hold(ray_here.parent, "shard-built")
    yield file
    file.unlink(missing_ok=True)


def test_a_worker_that_dies_with_two_shards_charges_neither_and_each_is_made_alone(
    committing, reference, tmp_path, capsys
):
    out, gate = tmp_path / "out", tmp_path / "gate"
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(run, out, workers=1, max_attempts=1)
        (pid,) = wait_at_gate(gate, 1)
        assert attempts(out) == {}, "shard 1 is begun before shard 0 is committed"
        os.kill(int(pid), signal.SIGKILL)
        committing.unlink()
        open_gate(gate)
        assert code.result() == 0
    assert contents(out) == reference
    assert attempts(out) == {0: 2, 1: 2, 2: 1, 3: 1, 4: 1}
    assert ledger(out) == []
    assert capsys.readouterr().err.count("now each is made alone") == 2


def test_a_shard_that_fails_beside_the_commit_of_another_is_charged_and_the_other_is_not(
    committing, faults, tmp_path
):
    out = tmp_path / "out"
    faults(poison=9)
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(run, out, workers=1, max_attempts=1)
        while not ledger(out):
            time.sleep(0.02)
        assert attempts(out) == {}
        committing.unlink()
        assert code.result() == 1
    assert [(e["shard_id"], e["set_aside"]) for e in ledger(out)] == [(1, True)]
    assert attempts(out) == {0: 1, 2: 1, 3: 1, 4: 1}


def metrics_of(out: Path) -> dict[str, float]:
    """What Ray's Prometheus endpoint says of a dataset, by name and own tag."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found = {}
    for line in urllib.request.urlopen(url, timeout=30).read().decode().splitlines():
        name, _, rest = line.partition("{")
        tags, _, value = rest.rpartition("} ")
        told = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if name.startswith("ray_depthvar_") and told["dataset"] == str(out):
            found[f"{name} {told.get('stage', told.get('state', ''))}".strip()] = float(value)
    return found


def test_prometheus_is_told_what_a_run_counts(ray_here, faults, tmp_path):
    """Shard 2 fails twice behind its first batch of four, the other 33 images are committed."""
    out = tmp_path / "out"
    faults(poison=25)
    assert run(out, workers=1, max_attempts=2) == 1
    last = {"ray_depthvar_queue_shards set aside": 1, "ray_depthvar_workers ready": 0}
    wait_for(lambda: last.items() <= metrics_of(out).items())
    told = metrics_of(out)
    records = [CommitRecord.from_json(f.read_bytes()) for f in out.glob("commits/0*.json")]
    batches = [batch for record in records for batch in record.batches]
    seconds = "ray_depthvar_stage_seconds_total"
    compute = stored_plan(Storage.open(out)).compute
    assert {name.split()[0] for name in told} == PROMETHEUS_NAMES
    assert told.pop(f"{seconds} publishing") > 0
    assert told.pop(f"{seconds} encoding") == pytest.approx(sum(b.encoding_s for b in batches))
    assert told == {
        "ray_depthvar_images_total": 33,
        "ray_depthvar_shards_total": 4,
        "ray_depthvar_bytes_total": sum(len(data) for data in contents(out).values()),
        "ray_depthvar_sampled_images_total": 41,
        "ray_depthvar_flops_total": 41 * (compute.transformer_flops + compute.decoder_flops),
        "ray_depthvar_retries_total": 1,
        f"{seconds} sampling": pytest.approx(0.01 * len(batches)),
        f"{seconds} decoding": pytest.approx(0.005 * len(batches)),
        "ray_depthvar_images_left": 0,
        "ray_depthvar_queue_shards waiting": 0,
        "ray_depthvar_queue_shards running": 0,
        "ray_depthvar_queue_shards set aside": 1,
        "ray_depthvar_workers ready": 0,
        "ray_depthvar_workers starting": 0,
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_that_cannot_load_stops_the_job_with_its_real_error(
    ray_here, faults, tmp_path, capsys, workers
):
    loads = tmp_path / "loads"
    faults(load_error="no such layer: blocks.9", loads=str(loads))
    assert run(tmp_path / "out", workers=workers) == 1
    assert "RuntimeError: no such layer: blocks.9" in capsys.readouterr().err
    # One may be hired in place of the first before the last is heard.
    assert len(loads.read_text().split()) <= max(1, workers, 2) + (workers > 1)
    assert attempts(tmp_path / "out") == {}
    assert ledger(tmp_path / "out") == []


def test_a_worker_of_the_cluster_is_timed_and_its_errors_are_those_of_its_code(
    ray_here, faults, tmp_path
):
    address = ray.get_runtime_context().gcs_address
    asked = config(tmp_path / "out", address=address, threads_per_worker=2)
    plan, _ = plan_job(asked)
    found = driver.try_out(asked, lambda room: plan, sampler_factory=FAKE_SAMPLER)
    workers = found.workers
    assert (workers.shape, workers.number) == (WorkerShape(2, 0), 1)
    assert workers.place.encode_threads == 2
    assert (found.speed.device, found.speed.threads, found.speed.num_images) == ("cpu", 2, 9)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "scratch").iterdir())
    faults(load_error="no such model")
    with pytest.raises(JobStopped, match="no batch can be made: RuntimeError: no such model"):
        driver.try_out(asked, lambda room: plan, sampler_factory=FAKE_SAMPLER)
    with pytest.raises(InputError, match="a worker takes 3 CPUs"):
        driver.try_out(
            asked.model_copy(update={"threads_per_worker": 3}),
            lambda room: plan,
            sampler_factory=FAKE_SAMPLER,
        )


def test_a_worker_makes_the_bytes_of_one_process_from_prompts(ray_here, faults, tmp_path, capsys):
    made = []
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        folder.mkdir()
        request = text_request(folder, workers=workers)
        assert generate(request, sampler_factory=FAKE_SAMPLER) == 0
        states = {f.name: f.read_bytes() for f in (folder / "out" / TEXT_FOLDER).iterdir()}
        made.append((contents(folder / "out"), states))
    assert made[0] == made[1]
    assert "20/20" in capsys.readouterr().err, "every prompt is encoded once"
    (folder / "out" / "commits" / "00001.json").unlink()
    assert generate(request, sampler_factory=FAKE_SAMPLER) == 0
    assert "text encoder" not in capsys.readouterr().err, "and never again"


def test_an_encoder_that_dies_is_followed_by_another_that_goes_on_with_what_is_missing(
    ray_here, tmp_path, capsys
):
    plan, place = text_job(tmp_path)
    shape = WorkerShape(num_cpus=1, num_gpus=0)
    arm(ray_here.parent, "file-replaced")  # a file is there and nothing was heard of it
    assert list(encode_on_a_worker(plan, place, shape, lambda: False)) == []
    assert armed(ray_here.parent) == []
    assert "the text encoder goes to another worker: its process died" in capsys.readouterr().err
    assert missing_prompts(plan, place.out) == []

    Path(str(place.text_states)).unlink()
    for file in Path(place.out, TEXT_FOLDER).iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"states\.safetensors, which cannot be read"):
        list(encode_on_a_worker(plan, place, shape, lambda: False))


def test_no_more_workers_are_started_than_shards_are_missing(ray_here, faults, tmp_path):
    loads = tmp_path / "loads"
    faults(loads=str(loads))
    assert run(tmp_path / "out", samples_per_shard=42) == 0
    assert len(loads.read_text().split()) == 1


def test_in_one_process_failures_are_charged_alike(ray_here, faults, tmp_path):
    out = tmp_path / "out"
    faults(poison=20)
    assert run(out, workers=0) == 1
    assert [(e["shard_id"], e["attempt"], e["set_aside"]) for e in ledger(out)] == [
        (2, 1, False),
        (2, 2, False),
        (2, 3, True),
    ]
    assert ledger(out)[0]["error"] == "ValueError: poison at 20"
    assert sorted(attempts(out)) == [0, 1, 3, 4]


class Clock:
    """In place of `driver.time`: waiting is what happens next."""

    def __init__(self, waited: Callable[[], object]) -> None:
        self.now_s, self.waited = 0.0, waited

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.waited()


@pytest.mark.parametrize(("comes_back", "code"), [(True, 0), (False, 1)])
def test_a_shard_that_another_job_writes_over_is_waited_for_within_bounds(
    tmp_path, monkeypatch, capsys, comes_back, code
):
    out = tmp_path / "out"
    record, hidden = out / "commits" / "00003.json", tmp_path / "hidden.json"

    def come_back() -> None:
        if comes_back and clock.now_s > 30 and hidden.exists():
            hidden.rename(record)

    committed, clock = driver.keep_summaries, Clock(come_back)

    def begin_to_write_over(*asked: Any) -> dict[int, ShardSummary]:
        record.rename(hidden)
        return committed(*asked)

    monkeypatch.setattr(driver, "time", clock)
    monkeypatch.setattr(driver, "keep_summaries", begin_to_write_over)
    assert run(out, workers=0) == code
    assert (30 if comes_back else 60) <= clock.now_s < 61
    said = capsys.readouterr()
    assert ("5 of 5 shards" in said.out) == comes_back
    assert ("missing: 1 shard: 3" in said.err) != comes_back


def test_a_shard_that_was_set_aside_is_not_waited_for(tmp_path, monkeypatch):
    set_faults(tmp_path / "faults.json", poison=20)
    monkeypatch.setenv(FAULTS_VARIABLE, str(tmp_path / "faults.json"))
    clock = Clock(lambda: None)
    monkeypatch.setattr(driver, "time", clock)
    assert run(tmp_path / "out", workers=0) == 1
    assert clock.now_s == 0


def test_more_workers_than_cores_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="--workers is 3"):
        run(tmp_path / "out", workers=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kernels", ["graph", "triton"])
def test_kernels_of_a_gpu_are_refused_without_one_before_anything_is_written(
    kernels, tmp_path, monkeypatch
):
    monkeypatch.setattr("depthvar.triton_pointwise.INTERPRETED", False)
    for workers in (0, 1):
        job = config(tmp_path / "out", workers=workers, kernels=kernels, device="cpu")
        with pytest.raises(InputError, match=rf"--kernels {kernels}.*: use --kernels plain"):
            generate(job, sampler_factory=FAKE_SAMPLER)
    assert not (tmp_path / "out").exists()


def test_an_address_where_nothing_answers_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="nothing answers"):
        run(tmp_path / "out", address="127.0.0.1:1")
    assert not (tmp_path / "out").exists()


def refusal(out: Path, address: str) -> str:
    """Why a job with this address is refused: within seconds, before anything is written."""
    begun_s = time.monotonic()
    with pytest.raises(InputError) as caught:
        run(out, address=address)
    assert time.monotonic() - begun_s < 30
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_server_that_is_no_cluster_is_refused_by_what_it_is(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_PROBE_S", 0.5)
    monkeypatch.setattr("pipeline.run.address._LISTEN_S", 0.3)
    talk, who = SERVERS[kind]
    with serving(talk) as where:
        said = refusal(tmp_path / "out", where.text)
    assert said.startswith(f"{where}, where ")
    assert who in said
    assert "no Ray cluster: give its GCS, on port 6379" in said


def test_a_signal_ends_the_question_whether_a_cluster_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_PROBE_S", 60.0)

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    with serving(SERVERS["silent"][0]) as where:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        begun_s = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", address=where.text)
    signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun_s < 30
    assert not (tmp_path / "out").exists()


def test_a_grpc_server_that_is_no_cluster_is_refused_as_such(tmp_path):
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    said = refusal(tmp_path / "out", f"127.0.0.1:{port}")
    assert "where a gRPC server answers, as Ray Client's is on 10001, and no Ray cluster" in said
    server.stop(None)


@pytest.mark.parametrize("address", ["ray://head:10001", "http://head:8265", "head", ""])
def test_what_is_no_address_is_refused_before_anything_is_written(address, tmp_path):
    assert "--address" in refusal(tmp_path / "out", address)


@pytest.mark.parametrize(
    ("types", "starts"),
    [
        (None, False),
        ({"node_" + 56 * "a": 1}, False),
        ({"node_" + 56 * "a": 1, "gpu_worker": 2}, True),
        ({"ray.head.default": 1}, True),
    ],
)
def test_an_autoscaler_is_told_by_the_node_types_of_the_monitors_report(types, starts):
    report = {"autoscaler_report": {"active_nodes": types, "pending_launches": {}}}
    assert starts_nodes(json.dumps(report if types else {}).encode()) == starts
    assert not starts_nodes(None)


def test_a_job_says_which_node_it_waits_for_where_an_autoscaler_may_start_it(monkeypatch):
    monkeypatch.setattr(ray_crew, "cluster_machines", lambda: [Machine(4, 0)])
    crew = RayCrew(None, WorkerShape(0, 1), lambda: 1, lambda: False, is_shared=True)
    assert crew._reason_to_wait(5.0) == "waiting for a node with 1 GPU to join: no node has it now"
    local = RayCrew(None, WorkerShape(1, 0), lambda: 1, lambda: False)
    assert local._reason_to_wait(5.0) is None
    assert local._reason_to_wait(31.0) == "waiting for a worker to load the model"


def test_another_seed_over_the_same_output_is_refused(reference, tmp_path):
    assert run(tmp_path / "out", workers=0) == 0
    with pytest.raises(InputError, match="seed"):
        run(tmp_path / "out", workers=0, seed=1)


def test_the_reason_of_a_failure_is_its_last_line_without_colours():
    trace = "\x1b[36mf()\x1b[39m\n  x\nValueError: no"
    error = ray.exceptions.RayTaskError("f", trace, None, ip="")
    assert reason_of(error) == "ValueError: no"


def test_the_error_of_the_memory_monitor_is_told_and_charged():
    error = ray.exceptions.OutOfMemoryError("Task was killed: the node runs low on memory.\nMore")
    assert cause_of(error) == "memory"
    assert reason_of(error) == "OutOfMemoryError: Task was killed: the node runs low on memory."
