"""Object stores: a real S3 API over HTTP on this machine, and one that fails now and then."""

from __future__ import annotations

import http.client
import http.server
import json
import threading
import urllib.parse
import urllib.request
import uuid
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from depthvar.errors import InputError
from jobs import status as status_job
from jobs import verify as verify_job
from pipeline import storage as storage_module
from pipeline.dataset.loader import iterate_samples, open_dataset, training_pipeline
from pipeline.request.generation import GenerateConfig
from pipeline.request.plan_file import read_plan
from pipeline.request.weights import local_weights
from pipeline.run.driver import generate
from pipeline.shards.committed import committed_shards
from pipeline.shards.manifest import FOLDERS
from pipeline.storage import Storage, is_transient
from tests.fake_job import FAKE_SAMPLER, fake_weights
from tests.fakes import open_gate, set_faults, wait_at_gate
from tests.fault_hook import FAULTS_VARIABLE
from tests.forked_job import ForkedJob

SECRET = "a-secret-of-the-test"


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """The port of an S3 API with one bucket."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    port = moto.get_host_and_port()[1]
    bucket = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
    urllib.request.urlopen(bucket).close()
    yield port
    moto.stop()


class FailingProxy(http.server.BaseHTTPRequestHandler):
    """Hands requests on to `upstream`; one in five is answered with 503 or not at all."""

    protocol_version = "HTTP/1.1"
    upstream = 0
    seen = 0
    failed = 0
    lock = threading.Lock()

    def handle_one(self) -> None:
        body = self.body()
        with self.lock:
            cls = type(self)
            cls.seen += 1
            fails = cls.seen % 5 == 0
            cls.failed += fails
        if fails and self.failed % 2:
            self.close_connection = True
            return
        if fails:
            self.answer(503, [], b"")
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        self.answer(answer.status, answer.getheaders(), answer.read())
        connection.close()

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_one

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def failing(server: int) -> Iterator[type[FailingProxy]]:
    """A proxy in front of the server; its port is `.port`."""
    handler = type("Proxy", (FailingProxy,), {"upstream": server})
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    handler.port = proxy.server_address[1]  # type: ignore[attr-defined]
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    yield handler
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture(autouse=True)
def environment(server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user sets it: endpoint and credentials, nothing in the URI."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("pipeline.request.job.fetch_model", fake_weights)
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def uri() -> str:
    return f"s3://bucket/{uuid.uuid4().hex}/data"


def run(out: str, tmp_path: Path, **changes: object) -> int:
    """20 images in 3 shards in this process."""
    settings = {"per_class": 2, "samples_per_shard": 8, "batch_size": 4, "contact_sheet": 1}
    config = GenerateConfig(
        **{
            "out": out,
            "scratch": tmp_path / "scratch",
            "workers": 0,
            "device": "cpu",
            **settings,
            **changes,
        }
    )
    return generate(config, sampler_factory=FAKE_SAMPLER)


def data_files(storage: Storage) -> dict[str, bytes]:
    names = [f"train/{n}" for n in storage.list("train")]
    names += [f"meta/{n}" for n in storage.list("meta")]
    return {name: storage.read(name) for name in names}


def test_a_job_on_a_store_makes_the_bytes_of_a_folder_and_is_verified(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(str(tmp_path / "out"), tmp_path) == 0
    assert run(uri, tmp_path) == 0
    stored = data_files(Storage.open(uri))
    assert len(stored) == 6
    assert stored == data_files(Storage.open(str(tmp_path / "out")))
    assert verify_job.main([uri, "--deep"]) == 0
    assert run(uri, tmp_path) == 0
    captured = capsys.readouterr()
    assert "all 3 shards" in captured.err
    assert SECRET not in captured.out + captured.err


def test_what_is_missing_on_a_store_is_found_and_made_again(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(uri, tmp_path) == 0
    storage = Storage.open(uri)
    before = data_files(storage)
    storage.remove("commits/00000.json")
    storage.remove("train/00001.tar")
    storage.publish_bytes(b"{", "commits/00002.json")
    assert verify_job.main([uri]) == 1
    capsys.readouterr()
    assert status_job.main([uri, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["shards"]["committed"], told["unsound"]) == (0, [2])
    assert run(uri, tmp_path) == 0
    assert data_files(storage) == before
    assert status_job.main([uri]) == 0


def test_a_store_that_fails_one_request_in_five_loses_nothing(
    uri: str, failing: type[FailingProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run(str(tmp_path / "out"), tmp_path) == 0
    port = failing.port  # type: ignore[attr-defined]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    assert run(uri, tmp_path) == 0
    assert failing.failed >= failing.seen // 5 > 10
    storage = Storage.open(uri)
    plan = read_plan(storage)
    assert plan is not None
    assert len(committed_shards(storage, plan)) == 3
    assert data_files(storage) == data_files(Storage.open(str(tmp_path / "out")))
    assert storage.size("commits/failures.jsonl") is None, "the store's failures charge no shard"


def test_two_drivers_at_once_leave_no_shard_half_from_each(uri: str, tmp_path: Path):
    """Their pixels differ by one grey level, as those of two environments may."""
    gate, jobs = tmp_path / "gate", []
    for number in range(2):
        faults = tmp_path / f"faults-{number}.json"
        set_faults(faults, environment=number, gate=str(gate))
        argv = [f"--out={uri}", f"--scratch={tmp_path / 'scratch'}", "--workers=0", "--device=cpu"]
        argv += ["--per-class=2", "--samples-per-shard=8", "--batch-size=4", "--contact-sheet=0"]
        jobs.append(ForkedJob(argv, tmp_path / f"log-{number}", {FAULTS_VARIABLE: str(faults)}))
    try:
        wait_at_gate(gate, 2)  # both hold the first shard: from here on they are side by side
        open_gate(gate)
        codes = [job.wait(timeout=120) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert codes == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    assert verify_job.main([uri, "--deep"]) == 0
    storage = Storage.open(uri)
    plan = read_plan(storage)
    assert plan is not None
    records = committed_shards(storage, plan)
    assert sorted(records) == [0, 1, 2]
    assert sum(record.num_samples for record in records.values()) == 20


def test_nothing_secret_reaches_the_store(uri: str, tmp_path: Path):
    assert run(uri, tmp_path) == 0
    storage = Storage.open(uri)
    names = [f"{folder}/{name}" for folder in FOLDERS for name in storage.list(folder)]
    for name in [*names, *storage.list("")]:
        assert SECRET.encode() not in storage.read(name), name
    assert {"README.md", "plan.json", "commits/00000.json"} <= {*names, *storage.list("")}


def test_a_folder_of_more_than_a_thousand_objects_is_listed_whole(uri: str):
    storage = Storage.open(uri)
    names = [f"{i:05d}.tar" for i in range(1003)]
    bucket, folder = storage.root.split("/", 1)
    behind_the_server = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for name in names:
        behind_the_server.put_object(bucket, f"{folder}/train/{name}", b"x")
    assert sorted(storage.list("train")) == names


def test_a_bucket_that_is_not_there_is_named_without_credentials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for uri in ("s3://none-such/data", f"s3://key:{SECRET}@none-such/data"):
        with pytest.raises(Exception, match=r"NO_SUCH_BUCKET|does not exist") as caught:
            run(uri, tmp_path)
        captured = capsys.readouterr()
        assert SECRET not in str(caught.value) + captured.out + captured.err


def test_a_large_object_is_read_in_ranges_and_uploaded_whole(uri: str, tmp_path: Path):
    data = bytes(range(256)) * 46_000  # 11.8 MB: two parts of 10 MiB up, two ranges of 8 down
    local = tmp_path / "big"
    local.write_bytes(data)
    storage = Storage.open(uri)
    storage.publish_file(local, "train/big.tar")
    with storage.open_input("train/big.tar") as stream:
        assert stream.read(3) == data[:3]
        assert stream.read() == data[3:]


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("AWS Error SLOW_DOWN during PutObject operation", True),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response", True),
        ("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 56", True),
        ("google::cloud::Status(UNAVAILABLE: Permanent error)", True),
        ("Azure Error: ServerBusy, 503 The server is busy", True),
        ("AWS Error ACCESS_DENIED during PutObject operation", False),
        ("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation", False),
        ("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation", False),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject", False),
        ("google::cloud::Status(PERMISSION_DENIED: no)", False),
    ],
)
def test_only_named_errors_are_tried_again(message: str, wanted: bool):
    assert is_transient(OSError(message)) == wanted


def test_tries_end_and_the_last_error_is_told(monkeypatch: pytest.MonkeyPatch, uri: str):
    monkeypatch.setattr(storage_module.time, "sleep", lambda _: None)
    calls: list[int] = []

    def request() -> None:
        calls.append(1)
        raise OSError("AWS Error SLOW_DOWN")

    with pytest.raises(OSError, match="SLOW_DOWN"):
        Storage.open(uri)._asking(request)
    assert len(calls) == 8
    calls.clear()
    with pytest.raises(OSError, match="SLOW_DOWN"):
        Storage.open("/nowhere")._asking(request)
    assert len(calls) == 1, "a disk is asked once"


@pytest.mark.parametrize(
    ("uri", "type_name", "root"),
    [
        ("gs://anonymous@bucket/a/b", "gcs", "bucket/a/b"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs", "container/a"),
        ("s3://bucket/a?region=eu-west-1", "s3", "bucket/a"),
        ("s3://bucket/a/?region=eu-west-1", "s3", "bucket/a"),
        ("s3://bucket", "s3", "bucket"),
        ("s3://bucket/", "s3", "bucket"),
        ("s3://key:a%2Fb@bucket/a@b:c", "s3", "bucket/a@b:c"),
        ("s3://bucket/what?now/a", "s3", "bucket/what?now/a"),
        ("s3://bucket/a?b=c?region=eu-west-1", "s3", "bucket/a?b=c"),
        ("s3://bucket/a?region=b?region=eu-west-1", "s3", "bucket/a?region=b"),
        ("gs://anonymous@bucket/hash#1/pct%20x", "gcs", "bucket/hash#1/pct%20x"),
        ("gcs://anonymous@bucket/a b?scheme=http", "gcs", "bucket/a b"),
        ("abfss://c@account.dfs.core.windows.net/hash#1 é", "abfs", "c/hash#1 é"),
        ("abfs://account.blob.core.windows.net/container/a#b", "abfs", "container/a#b"),
        ("abfs://acct:cGFzcw==@localhost:10000/c/a%?enable_tls=false", "abfs", "c/a%"),
    ],
)
def test_every_store_takes_the_same_path(uri: str, type_name: str, root: str):
    storage = Storage.open(uri)
    assert storage.filesystem.type_name == type_name
    assert storage.root == root
    assert not storage.is_local
    assert str(storage).endswith(root.removeprefix("container/").removeprefix("c/"))


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        ("s3://", "without a bucket: write s3://bucket/folder"),
        ("s3:///b/x", "without a bucket: write s3://b/x"),
        ("s3://?region=x", "without a bucket"),
        ("abfs://account.blob.core.windows.net", "without a bucket"),
        ("s3://b//x", "write s3://b/x"),
        ("s3://b/x//y", "write s3://b/x/y"),
        ("s3://b/x//", "write s3://b/x"),
        ("s3://b//", "write s3://b/"),
        ("s3://b/./x", "write s3://b/x"),
        ("s3://b/x/../y", "write s3://b/x/y"),
        ("s3://b/..", "write s3://b/"),
        ("s3://buc ket/x", "something else than a bucket"),
        ("s3://bücket/x", "something else than a bucket"),
        ("s3://localhost:9000/x", "endpoint_override=host:port"),
        (f"s3://key:{SECRET}/more@b/x", "%2F for / in a password"),
        ("s3://b/x?regoin=eu", r"ends in \?regoin=\.\.\."),
        (f"s3://b/x?region=eu&token={SECRET}", r"ends in \?token=\.\.\."),
        (f"gs://b/x?client_secret={SECRET}", "cannot be opened"),
    ],
)
def test_a_uri_that_no_store_keeps_as_it_is_is_refused(uri: str, wanted: str):
    with pytest.raises(InputError, match=wanted) as caught:
        Storage.open(uri)
    assert SECRET not in str(caught.value)


NAMES = (
    *("hash#1", "pct%20x", "100%", " a b ", "what?now", "+&=;,'\"()", "e\u0301 é 日本 😀", "~"),
    *("$HOME", "{0..3}[a]*<a>|^`\\", "a:b@c", "s3:", "...", ".hidden"),
)


def stored_keys(server: int, prefix: str) -> list[str]:
    """The keys under a prefix, asked of the server without anything of ours."""
    query = urllib.parse.urlencode({"list-type": 2, "prefix": prefix, "encoding-type": "url"})
    with urllib.request.urlopen(f"http://127.0.0.1:{server}/bucket?{query}") as answer:
        found = xml.etree.ElementTree.fromstring(answer.read())
    return sorted(urllib.parse.unquote(str(e.text)) for e in found.iter() if e.tag.endswith("}Key"))


def test_what_follows_the_bucket_is_the_key(server: int):
    folder = uuid.uuid4().hex
    for name in NAMES:
        storage = Storage.open(f"s3://bucket/{folder}/{name}/x")
        assert storage.is_empty(), name
        assert storage.create(b"1", "plan.json")
        storage.publish_bytes(b"22", "meta/0.json")
        assert storage.read("plan.json") == b"1"
        assert storage.list("meta") == {"0.json": 2}
        assert storage.list_folders("") == ("meta",)
        assert str(storage) == f"s3://bucket/{folder}/{name}/x"
    wanted = [f"{folder}/{n}/x/{file}" for n in NAMES for file in ("plan.json", "meta/0.json")]
    assert stored_keys(server, f"{folder}/") == sorted(wanted)
    everything = Storage.open(f"s3://bucket/{folder}")
    assert everything.list_folders("") == tuple(sorted(NAMES))
    Storage.open(f"s3://bucket/{folder}/~/x").remove("plan.json")
    assert f"{folder}/~/x/plan.json" not in stored_keys(server, f"{folder}/")


def test_names_that_differ_after_a_mark_are_two_datasets(tmp_path: Path):
    folder = f"s3://bucket/{uuid.uuid4().hex}"
    for seed in (1, 2):
        out = f"{folder}/hash#{seed}"
        assert run(out, tmp_path, seed=seed, samples_per_shard=20, contact_sheet=0) == 0
    for seed in (1, 2):
        dataset = open_dataset(f"{folder}/hash#{seed}")
        assert dataset.plan.seed == seed
        assert len(list(iterate_samples(dataset))) == 20
        pipeline = training_pipeline(dataset, shuffle_buffer=0)
        assert sum(1 for _ in pipeline) == 20
        chosen = training_pipeline(dataset, where="label in (1, 2) and mean_log_prob < -1")
        assert sorted(label for _, label in chosen) == [1, 1, 2, 2]
        assert verify_job.main([f"{folder}/hash#{seed}", "--deep"]) == 0
    with pytest.raises(InputError, match="does not exist, wanted a dataset"):
        open_dataset(f"{folder}/hash")


def test_weights_are_fetched_by_their_key(tmp_path: Path):
    folder = f"s3://bucket/{uuid.uuid4().hex}/run#1 50%"
    names = ("config.json", "transformer.safetensors", "tokenizer.safetensors")
    for name in names:
        Storage.open(folder).publish_bytes(name.encode(), name)
    for place in (folder, f"{folder}/", f"{folder}/transformer.safetensors"):
        found = Path(str(local_weights("mine", place, cache=tmp_path)))
        found = found if found.is_dir() else found.parent
        assert {name: (found / name).read_bytes() for name in names} == {
            name: name.encode() for name in names
        }
    with pytest.raises(InputError, match="holds no files"):
        local_weights("mine", folder.replace("#1", "#2"), cache=tmp_path)


def test_what_a_store_refuses_comes_with_what_to_do(uri: str, tmp_path: Path):
    with pytest.raises(InputError, match="make the bucket, or correct its name"):
        run("s3://none-such/data", tmp_path)


def test_the_uri_wins_over_the_environment_and_region_falls_back(monkeypatch: pytest.MonkeyPatch):
    resolve = storage_module._with_environment
    assert "endpoint_override=127.0.0.1" in resolve("s3://b/x")
    assert resolve("s3://b/x?endpoint_override=other:1&region=r").count("endpoint_override") == 1
    assert "other" in resolve("s3://b/x?endpoint_override=other:1")
    assert resolve("gs://b/x") == "gs://b/x"
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert "region=us-east-1" in resolve("s3://b/x")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert resolve("s3://b/x") == "s3://b/x"
