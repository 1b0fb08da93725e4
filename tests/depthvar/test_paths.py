"""What may stand where a path is wanted: functions here, every field of every job below."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

import jobs.benchmark
import jobs.calibrate
import jobs.convert_weights
import jobs.evaluate
import jobs.export
import jobs.generate
import jobs.plan
import jobs.study
import jobs.train_classifier
import jobs.train_features
import jobs.train_model
import jobs.verify
from depthvar.errors import InputError
from depthvar.paths import (
    check_input_file,
    check_output_file,
    check_output_folder,
    checked_job_file,
    checked_location,
    checked_model,
    checked_path,
    checked_weights,
)
from pipeline.request.flags import load_config
from pipeline.request.generation import GenerateConfig
from pipeline.request.weights import default_cache

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
COPY = "session_2026/runtime_resources/working_dir_files/_ray_pkg_0123"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(IN_JOB, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("~", "{home}"),
        ("~/x/y", "{home}/x/y"),
        ("~root/x", "/root/x"),
        ("./~/x", "./~/x"),
        ("a/~/x", "a/~/x"),
        ("$HOME/x", "$HOME/x"),
        ("out/", "out/"),
        ("run:3/out", "run:3/out"),
        ("2026-01-01T10:00/out", "2026-01-01T10:00/out"),
        ("./s3:/b", "./s3:/b"),
        ("bücher/e\u0301", "bücher/e\u0301"),
        ("file:///a/b", "/a/b"),
        ("file://localhost/a%20b/100%25", "/a b/100%"),
        ("file:///a/hash#1?x", "/a/hash#1?x"),
        ("s3://b/hash#1 %20?x", "s3://b/hash#1 %20?x"),
        ("gs://b/x", "gs://b/x"),
    ],
)
def test_a_path_is_taken_as_it_is_and_a_home_expanded(home: Path, text: str, wanted: str):
    assert checked_location(text) == wanted.format(home=home)


def test_a_backslash_is_taken_where_there_is_such_a_name():
    Path("back\\slash").mkdir()
    assert checked_location("back\\slash") == "back\\slash"


def test_a_file_uri_is_what_python_writes(tmp_path: Path):
    for name in ("hash#1", "a b", "100%", "pct%20x", "q?x", "ü"):
        assert checked_path((tmp_path / name).as_uri()) == str(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("s3:/b/x", "wanted s3://b/x"),
        ("s3:b/x", "wanted s3://b/x"),
        ("s3//b/x", "wanted s3://b/x"),
        ("S3://b/x", "wanted s3://b/x"),
        ("s3a://b/x", "wanted s3://b/x"),
        ("s3:\\b", "wanted s3://b"),
        (" s3://b/x", "wanted s3://b/x"),
        ("'s3://b/x'", "wanted s3://b/x"),
        ("gs:/b/x", "wanted gs://b/x"),
        ("GCS://b/x", "wanted gcs://b/x"),
        ("abfs:/c@a/x", "wanted abfs://"),
        ("file:/x", "wanted file:///x"),
        ("FILE:///x", "wanted file:///x"),
        ("file://host/x", "write file:///folder"),
        ("file://~/x", "write file:///folder"),
        ("http://h/x", "got the scheme 'http'"),
        ("https://h/x", "got the scheme 'https'"),
        ("hdfs://n/x", "got the scheme 'hdfs'"),
        ("hf://owner/repo", "got the scheme 'hf'"),
        ("az://c/x", "got the scheme 'az'"),
        ("foo://x", "got the scheme 'foo'"),
        ("foo:/x", "got the scheme 'foo'"),
        ("C:\\data\\x", "a path of Windows"),
        ("d:/x", "a path of Windows"),
        ("\\\\server\\x", "write / between folders"),
        ("out\\mine", "write / between folders"),
        ("/data/my\\ images", "and a space as it is"),
        ("//b/x", "wanted /b/x or s3://b/x"),
        ("/mnt/s3://b/x", "a URI starts with its scheme"),
        ("out/s3://b/x", "a URI starts with its scheme"),
        ("~no-such-user/x", "no user 'no-such-user'"),
        ("", "wanted a path"),
        (" \t", "wanted a path"),
        ("a\nb", "control character"),
        ("s3://b/x\n", "control character"),
        ("a\0b", "control character"),
        ("a\x7f", "control character"),
        ("a\x85", "control character"),
        (os.fsdecode(b"caf\xe9"), "is not UTF-8"),
    ],
)
def test_what_is_nearly_a_path_or_a_uri_is_refused(text: str, wanted: str):
    with pytest.raises(InputError) as caught:
        checked_location(text)
    assert wanted in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InputError):
        checked_job_file(text)


@pytest.mark.parametrize(
    "text",
    ["S3://key:secret@b/x", "S3://key:sec/secret@b/x", "s3:/key:secret@b", "s3:/b/x?token=secret"],
)
def test_a_refused_uri_is_told_without_its_secrets(text: str):
    with pytest.raises(InputError) as caught:
        checked_location(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["s3://b/x", "gs://b/x", "abfs://c@a.dfs.core.windows.net/x"])
def test_a_store_is_refused_where_a_local_path_is_wanted(text: str):
    for check in (checked_path, checked_model, checked_job_file):
        with pytest.raises(InputError, match="stores are not taken here"):
            check(text)


def test_weights_may_be_a_repository_unless_a_folder_has_its_name(tmp_path: Path):
    for text in ("FoundationVision/var", "hf://owner/repo@main", "s3://b/x", "/a/b", "./a/b"):
        assert checked_weights(text) == text
    with pytest.raises(InputError, match="write FoundationVision/var"):
        checked_weights("https://huggingface.co/FoundationVision/var/tree/main")
    with pytest.raises(InputError, match="wanted hf://owner/repo"):
        checked_weights("hf:owner/repo")


def test_a_model_is_a_name_or_a_local_folder(home: Path):
    for name in ("digits", "var-d16", "no-such-model"):
        assert checked_model(name) == name
    assert checked_model("~/m") == f"{home}/m"
    with pytest.raises(InputError, match="wanted s3://m"):
        checked_model("s3:m")


@pytest.mark.parametrize("text", ["out", "./out", ".", "../out", "out/deep/er"])
def test_a_relative_path_is_refused_in_a_submitted_job(text: str, monkeypatch: pytest.MonkeyPatch):
    assert checked_location(text) == text
    monkeypatch.setenv(IN_JOB, "{}")
    for check in (checked_location, checked_path, checked_weights):
        with pytest.raises(InputError, match=r"an absolute path .* or, .* a URI such as s3://"):
            check(text)
    assert checked_job_file("job.yaml") == "job.yaml"
    assert checked_model("digits") == "digits"
    assert checked_weights("FoundationVision/var") == "FoundationVision/var"
    for place in ("/shared/out", "s3://b/out"):
        assert checked_location(place) == place


def test_in_a_submitted_job_a_model_of_the_working_directory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(IN_JOB, "{}")
    Path("mine").mkdir()
    Path("mine.pth").touch()
    for text in ("mine", "mine.pth", "./other"):
        with pytest.raises(InputError, match="temporary copy"):
            checked_model(text)


def test_rays_copy_of_a_working_directory_is_refused_by_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Within a task, or by an absolute path: no variable tells of it there."""
    copy = tmp_path / COPY
    copy.mkdir(parents=True)
    (tmp_path / "link").symlink_to(copy)
    for text in (str(copy), f"{copy}/out", f"{tmp_path}/link/out", copy.as_uri()):
        with pytest.raises(InputError, match="temporary copy"):
            checked_location(text)
    monkeypatch.chdir(copy)
    with pytest.raises(InputError, match="temporary copy"):
        checked_location("out")
    assert checked_location(f"{tmp_path}/runtime_resources/out")


def test_an_output_is_checked_without_writing(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    check_output_folder(tmp_path / "new" / "er", "--out x")
    for name, wanted in {
        "file": "is a file",
        "file/deeper": "is a file",
        "broken": "is a broken symbolic link",
        "circle/x": "symbolic links",
        "n" * 300: "choose a shorter name",
    }.items():
        with pytest.raises(InputError, match=wanted):
            check_output_folder(tmp_path / name, "--out x")
    check_output_file(tmp_path / "file", "--json")
    check_output_file(tmp_path / "new", "--out", is_new=True)
    for name, wanted in {
        ".": "is a folder, wanted a file",
        "none/x": "whose folder does not exist",
        "file/x": "whose folder is a file",
        "n" * 300: "choose a shorter name",
    }.items():
        with pytest.raises(InputError, match=f"--json.*{wanted}"):
            check_output_file(tmp_path / name, "--json")
    for name in ("file", "broken"):
        with pytest.raises(InputError, match="which exists, wanted a new file"):
            check_output_file(tmp_path / name, "--out", is_new=True)
    check_input_file(tmp_path / "file", "--reference")
    for name, wanted in {
        ".": "is a folder",
        "none": "does not exist",
        "broken": "not exist",
    }.items():
        with pytest.raises(InputError, match=f"--reference: .*{wanted}"):
            check_input_file(tmp_path / name, "--reference")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "circle", "file", "work"]


GENERATE = ["--out", "/nowhere/out"]
STUDY = ["--config", "{study}", "--out", "/nowhere/out"]
LOCAL, STORE_TOO = False, True
EVERY_PATH: list[tuple[ModuleType, list[str], str, bool]] = [
    *(
        (job, arguments, flag, takes_stores)
        for job in (jobs.generate, jobs.plan)
        for arguments, flag, takes_stores in (
            ([], "--out", STORE_TOO),
            (GENERATE, "--weights", STORE_TOO),
            (GENERATE, "--labels-file", LOCAL),
            (GENERATE, "--scratch", LOCAL),
            (GENERATE, "--model", LOCAL),
        )
    ),
    (jobs.verify, [], "--out", STORE_TOO),
    (jobs.verify, ["/nowhere/out"], "--weights", STORE_TOO),
    (jobs.evaluate, [], "--out", STORE_TOO),
    (jobs.evaluate, ["/nowhere/out"], "--json", LOCAL),
    (jobs.evaluate, ["/nowhere/out"], "--reference", LOCAL),
    (jobs.evaluate, ["/nowhere/out"], "--inception-weights", LOCAL),
    (jobs.export, ["--format", "adm-npz", "--out", "/nowhere/x.npz"], "--dataset", STORE_TOO),
    (jobs.export, ["/nowhere/out", "--format", "adm-npz"], "--out", LOCAL),
    (jobs.train_classifier, [], "--out", STORE_TOO),
    (jobs.train_classifier, ["/nowhere/out"], "--test", STORE_TOO),
    (jobs.train_classifier, ["/nowhere/out"], "--json", LOCAL),
    (jobs.train_classifier, ["/nowhere/out", "--runs", "1"], "--model-out", LOCAL),
    (jobs.train_features, [], "--out", LOCAL),
    (jobs.train_model, [], "--out", LOCAL),
    (jobs.train_model, GENERATE, "--data", LOCAL),
    (jobs.train_model, GENERATE, "--tokenizer-from", LOCAL),
    (jobs.convert_weights, ["--model", "digits"], "--out", LOCAL),
    (jobs.convert_weights, ["--model", "digits", *GENERATE], "--weights", STORE_TOO),
    (jobs.convert_weights, GENERATE, "--model", LOCAL),
    (jobs.calibrate, [], "--weights", STORE_TOO),
    (jobs.calibrate, [], "--model", LOCAL),
    (jobs.calibrate, [], "--out", LOCAL),
    (jobs.study, STUDY[:2], "--out", LOCAL),
    (jobs.study, STUDY, "--weights", STORE_TOO),
    (jobs.study, STUDY, "--model", LOCAL),
    (jobs.benchmark, [], "--json", LOCAL),
    (jobs.benchmark, [], "--weights", LOCAL),
    (jobs.benchmark, [], "--model", LOCAL),
]


@pytest.mark.parametrize(
    ("job", "arguments", "flag", "takes_stores"),
    [pytest.param(*case, id=f"{case[0].__name__} {case[2]}") for case in EVERY_PATH],
)
def test_every_path_of_every_job_is_checked_before_anything_is_written(
    job: ModuleType,
    arguments: list[str],
    flag: str,
    takes_stores: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    study = tmp_path / "study.yaml"
    study.write_text("methods:\n  full: {policy: full, budgets: {1x: null}}\n")
    argv = [argument.format(study=study) for argument in arguments]

    def refused(text: str, wanted: str) -> None:
        with pytest.raises(InputError, match=wanted) as caught:
            job.main([*argv, flag, text])
        assert len(str(caught.value).splitlines()) == 1

    refused("s3:/bucket/x", "wanted s3://bucket/x")
    refused("~no-such-user/x", "no user")
    if takes_stores:
        refused("s3://b//x", "write s3://b/x")
    else:
        refused("s3://b/x", "stores are not taken here|fetch the files")
    if flag == "--labels-file":
        return  # comes with a submitted job, as the file of --config does
    Path("mine").mkdir()
    monkeypatch.setenv(IN_JOB, "{}")
    refused("./mine", "temporary copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.yaml", "work"]
    assert [p.name for p in Path().iterdir()] == ["mine"]


def test_paths_in_yaml_and_flags_are_the_same(tmp_path: Path, home: Path):
    file = tmp_path / "job.yaml"
    file.write_text("out: ~/x\nscratch: ~/s\nweights: ~/w\nmodel: ~/m\nlabels_file: ~/l\n")

    def load(*argv: str) -> GenerateConfig:
        return load_config(GenerateConfig, argv, prog="generate", description="")

    flags = ["--out=~/x", "--scratch=~/s", "--weights=~/w", "--model=~/m", "--labels-file=~/l"]
    config = load(*flags)
    assert config == load("--config", str(file))
    assert (config.out, config.scratch) == (f"{home}/x", home / "s")
    assert (config.weights, config.model) == (f"{home}/w", f"{home}/m")
    assert config.labels_file == home / "l"
    home.mkdir()
    file.rename(home / "job.yaml")
    assert load("--config=~/job.yaml") == config
    (home / "job.yaml").write_text("out: s3:/b/x\n")
    with pytest.raises(InputError, match=r"^out in .*job\.yaml: got 's3:/b/x', wanted s3://b/x"):
        load("--config=~/job.yaml")
    for flag in ("--out", "--config"):
        with pytest.raises(InputError, match=rf"^{flag}: got 's3:/b/x', wanted s3://b/x"):
            load(flag, "s3:/b/x")
    with pytest.raises(
        InputError, match=r"^--config: got s3://b/job\.yaml, .* stores are not taken"
    ):
        load("--config", "s3://b/job.yaml")


def test_a_local_name_that_looks_like_more_stays_that_name():
    def scratch(text: str) -> Path | None:
        return GenerateConfig(out="out", scratch=text).scratch

    for text in ("./~x/y", "./s3:b"):
        assert scratch(text) == Path(text).absolute()
        assert checked_path(str(scratch(text))) == str(scratch(text))
    assert scratch("./s") == Path("s")


def test_a_scratch_folder_that_cannot_be_is_refused_before_the_plan_is_written(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for scratch in ("file", "file/deeper"):
        argv = ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path / scratch)]
        with pytest.raises(InputError, match=r"--scratch \S+, but \S+ is a file"):
            jobs.generate.main([*argv, "--workers", "0"])
    assert not (tmp_path / "out").exists()


def test_the_cache_of_weights_is_a_path_like_the_others(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DEPTHVAR_CACHE", "~/cache")
    assert default_cache() == home / "cache"
    monkeypatch.setenv("DEPTHVAR_CACHE", "s3://b/cache")
    with pytest.raises(InputError, match=r"^DEPTHVAR_CACHE: .*stores are not taken here"):
        default_cache()
