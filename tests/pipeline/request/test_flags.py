from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from depthvar.errors import InputError
from jobs.verify import VerifyConfig
from pipeline.request.flags import JobConfig, Positional, load_config
from pipeline.request.generation import GenerateConfig, ModelRequest, PlanConfig, SubmitConfig

PROMISED_FLAGS = """
    config model weights classes per-class labels-file out seed policy reference-scale cfg top-k
    top-p samples-per-shard batch-size image-format workers address
"""


def load(*argv: str) -> GenerateConfig:
    return load_config(GenerateConfig, argv, prog="generate", description="")


def refused(*argv: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(*argv)
    return str(caught.value).splitlines()


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text("out: from-file\nseed: 5\nper_class: 7\ntop_p: 0.5\n")
    config = load("--config", str(file), "--seed", "6")
    assert (config.out, config.seed, config.per_class, config.top_p) == ("from-file", 6, 7, 0.5)
    assert config.batch_size == GenerateConfig.model_fields["batch_size"].default


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load("--out", "x").seed = 3  # type: ignore[misc]


def test_unknown_keys_of_the_file_are_refused_with_a_near_miss(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text("out: x\nper_clas: 7\nzzz: 1\n")
    first, second = refused("--config", str(file))
    assert first == f"unknown key 'per_clas' in {file}: did you mean per_class?"
    assert second.startswith("unknown key 'zzz' in ")


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "just text", "a: [1\n", "\xff\xfe"])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(tmp_path: Path, content: str):
    file = tmp_path / "job.yaml"
    file.write_text(content, encoding="latin-1")
    assert len(refused("--config", str(file))) == 1


def test_a_missing_file_and_an_empty_file(tmp_path: Path):
    assert "No such file" in refused("--config", str(tmp_path / "none.yaml"))[0]
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert load("--config", str(empty), "--out", "x").out == "x"


def test_a_batch_size_is_a_number_or_auto():
    assert load("--out", "x").batch_size is None
    assert load("--out", "x", "--batch-size", "auto").batch_size is None
    assert load("--out", "x", "--batch-size", "12").batch_size == 12


def test_every_mistake_gets_its_own_line_that_says_got_wanted_and_what_to_do():
    lines = refused("--out", "x", "--seed", "-1", "--top-p", "1.5", "--batch-size", "0")
    assert lines == [
        "--seed: got '-1', wanted greater than or equal to 0: change it or leave it out for 0",
        "--top-p: got '1.5', wanted less than or equal to 1: change it or leave it out",
        "--batch-size: got '0', wanted greater than 0: change it or leave it out",
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ["--per-class", "0"],
        ["--per-class", "-1"],
        ["--top-p", "0"],
        ["--top-p", "nan"],
        ["--cfg", "inf"],
        ["--top-k", "-1"],
        ["--workers", "-1"],
        ["--workers", "1.5"],
        ["--batch-size", "0"],
        ["--samples-per-shard", "0"],
        ["--seed", str(2**63)],
        ["--foo"],
        ["--se", "3"],
        ["--policy-options", "rotation"],
    ],
)
def test_bad_flags_are_one_line_each(flags: list[str]):
    assert len(refused("--out", "x", *flags)) == 1


def test_a_value_that_begins_with_a_dash_can_be_given():
    (line,) = refused("--out", "x", "--classes", "-neg,01")
    assert "expected one argument (one that begins with a dash as --classes=-VALUE)" in line
    assert load("--out", "x", "--classes=-neg,01").classes == "-neg,01"
    assert load("--out", "x", "--classes", "name:-neg,01").classes == "name:-neg,01"


def test_out_is_required():
    assert refused() == ["--out is missing, wanted a value: give --out or set out in YAML"]


def test_a_labels_file_excludes_the_other_sources_of_labels():
    assert "drop one of them" in refused("--out", "x", "--labels-file", "l", "--classes", "3")[0]
    assert load("--out", "x", "--labels-file", "l").labels_file == Path("l")


def test_class_names_in_yaml_may_be_a_list(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text("out: x\nclass_names: [no, 'tench, Tinca', 3]\n")
    assert load("--config", str(file)).class_names == 'no,"tench, Tinca",3'


def test_a_png_level_is_refused_for_other_formats():
    flags = ("--out", "x", "--png-level", "1")
    assert "together with image_format jpg" in refused(*flags, "--image-format", "jpg")[0]
    assert load(*flags).png_level == 1


def test_classes_in_yaml_may_be_a_number_or_a_list(tmp_path: Path):
    file = tmp_path / "job.yaml"
    for text, wanted in (("3", "3"), ("[1, seven]", "1,seven"), ("0-4", "0-4")):
        file.write_text(f"out: x\nclasses: {text}\n")
        assert load("--config", str(file)).classes == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("010", "010"), ("no", "no"), ("~", "~"), ("'3'", "3"), ("[0-4, '5-6']", "0-4,5-6"),
        ("[off, 1_000, 0x10, 1e3, 1:30, 2024-01-01, null, ~, 010]",
         "off,1_000,0x10,1e3,1:30,2024-01-01,null,~,010"),
        ('[1, "tench, Tinca tinca", " pad", \'a"b\']', '1,"tench, Tinca tinca"," pad","a""b"'),
        ("\n  - n01440764\n  - id:3", "n01440764,id:3"),
    ],
)  # fmt: skip
def test_classes_are_what_stands_in_the_file(tmp_path: Path, text: str, wanted: str):
    file = tmp_path / "job.yaml"
    file.write_text(f"out: x\nclasses: {text}\n")
    assert load("--config", str(file)).classes == wanted


@pytest.mark.parametrize("text", ["", "[1, ]\n  #", "[[1, 2], 3]", "{a: 1}", "[1, '', [ ]]"])
def test_classes_that_are_no_list_of_names_are_refused(tmp_path: Path, text: str):
    file = tmp_path / "job.yaml"
    file.write_text(f"out: x\nclasses: {text}\n")
    if text.startswith("[1, ]"):
        assert load("--config", str(file)).classes == "1"
    else:
        assert "classes in " in refused("--config", str(file))[0]


def test_every_field_of_a_file_is_read_as_its_type(tmp_path: Path):
    file = tmp_path / "job.yaml"
    file.write_text(
        "out: 010\nmodel: no\nweights: null\nlabels_file: 1e3\nseed: 1_000\ncfg: 1e-3\n"
        "top_k: 0x10\nworkers: ~\nscratch:\nretry_failed: yes\nextend: off\nimage_format: webp\n"
        "address: 1:30\npolicy_options:\n"
        "  {compensation: off, blending: none, reference_scale: null, rotation: 1e-3}\n"
    )
    config = load("--config", str(file))
    assert (config.out, config.model, config.weights) == ("010", "no", None)
    assert (config.labels_file, config.seed, config.cfg, config.top_k) == (
        Path("1e3"), 1000, 0.001, 16,
    )  # fmt: skip
    assert (config.workers, config.scratch, config.retry_failed, config.extend) == (
        None, None, True, False,
    )  # fmt: skip
    assert config.address == "1:30"
    assert config.policy_options == {
        "compensation": False, "blending": "none", "reference_scale": None, "rotation": 0.001,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("seed: 1\nout: x\nseed: 2\n", "line 3: the key 'seed' stands in line 1 too"),
        ("out: x\npolicy_options:\n  a: 1\n  a: 2\n", "line 4: the key 'a' stands in line 3"),
        ("out: x\nseed: 010\n", "line 2: got 010, wanted a number without a zero in front"),
        ("out: x\n1: 2\n", "unknown key '1'"),
        ("out: x\nseed: 1:30\n", "seed in .*: got '1:30', wanted a valid integer"),
        ("out: x\nimage_format: no\n", "got 'no', wanted 'png', 'jpg' or 'webp'"),
    ],
)
def test_what_a_file_may_not_mean_is_refused_in_one_line(tmp_path: Path, content: str, told: str):
    file = tmp_path / "job.yaml"
    file.write_text(content)
    (line,) = refused("--config", str(file))
    assert re.search(told, line)
    assert str(file) in line


def test_policy_options_are_read_as_the_fields_of_a_policy():
    config = load(
        "--out", "x", "--policy-options", "ranking=off", "dither=off", "--policy-options",
        "reference_scale=null", "rotation=1e-3",
    )  # fmt: skip
    assert config.policy_options == {
        "ranking": "off", "dither": False, "reference_scale": None, "rotation": 0.001,
    }  # fmt: skip


def test_a_policy_option_given_twice_is_refused():
    for words in (["a=1", "a=2"], ["a=1", "--policy-options", "a=1"]):
        assert refused("--out", "x", "--policy-options", *words) == [
            "--policy-options: got a twice: keep one of them"
        ]


def test_policy_options_are_typed_words():
    config = load("--out", "x", "--policy-options", "rotation=0.5", "compensation=false", "a=b")
    assert config.policy_options == {"rotation": 0.5, "compensation": False, "a": "b"}


def told_of_flags(flag: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, str]]:
    """All that help says, and what it says of each flag, by name."""
    with pytest.raises(SystemExit) as caught:
        load(flag)
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    told = re.split(r"^  --", shown, flags=re.M)[1:]
    return shown, {re.match("[-a-z]+", text)[0]: " ".join(text.split()) for text in told}


def test_help_all_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]):
    shown, told = told_of_flags("--help-all", capsys)
    assert shown.startswith("usage: generate --out PATH [flags]\n\n")
    fields = {name.replace("_", "-"): f for name, f in GenerateConfig.model_fields.items()}
    assert set(told) == {"config", *fields}
    for name, field in fields.items():
        assert field.description, name
        for line in field.description.split("\n"):
            assert " ".join(line.split()) in told[name].replace("- ", "-")
        if type(field.default) in (int, str):
            assert f"(default: {field.default})" in told[name]
    assert "(required)" in told["out"]


def test_help_shows_what_most_need_and_names_the_flag_that_shows_all(
    capsys: pytest.CaptureFixture[str],
):
    shown, told = told_of_flags("--help", capsys)
    whole, all_told = told_of_flags("--help-all", capsys)
    less_common = set(all_told) - set(told)
    assert set(told) <= set(all_told)
    assert set(PROMISED_FLAGS.split()) - set(told) == {"top-k", "top-p"}
    assert {"kernels", "text-states", "max-attempts"} <= less_common
    assert shown.endswith("\n\ngenerate --help-all shows every flag in full.\n")
    assert "--help-all" not in whole
    assert "one of full, depthvar" not in told["policy"]
    assert "one of full, depthvar" in all_told["policy"]
    headings = re.findall(r"^[a-z].*:$", shown, re.M)
    assert len(headings) > 4
    assert headings == re.findall(r"^[a-z].*:$", whole, re.M)


def test_groups_of_help_name_each_flag_once():
    for model in (ModelRequest, GenerateConfig, PlanConfig, SubmitConfig):
        named = [name for group in model.help_groups for name in (*group.fields, *group.more)]
        assert len(set(named)) == len(named)
        assert set(named) <= set(model.model_fields)


def test_help_is_no_value_of_a_flag(capsys: pytest.CaptureFixture[str]):
    (line,) = refused("--out", "--help-all")
    assert line.startswith("argument --out: expected one argument")


def test_a_positional_field_may_also_be_a_flag(capsys: pytest.CaptureFixture[str]):
    def verify(*argv: str) -> VerifyConfig:
        return load_config(VerifyConfig, argv, prog="verify", description="")

    with pytest.raises(SystemExit):
        verify("--help")
    assert capsys.readouterr().out.startswith("usage: verify OUT [flags]\n")
    assert verify("data").out == verify("--out", "data").out == "data"
    assert verify("data", "--deep").deep
    assert not verify("--no-deep", "data").deep
    with pytest.raises(InputError, match="given twice"):
        verify("data", "--out", "other")
    with pytest.raises(InputError, match="--out is missing"):
        verify()


def test_any_model_gets_a_command_line_lists_included():
    class Small(JobConfig):
        folder: Annotated[Path, Positional()] = Field(description="where")
        steps: list[int] = Field([1, 2], description="how many")

    config = load_config(Small, ["here", "--steps", "3", "4"], prog="small", description="")
    assert config == Small(folder=Path("here"), steps=[3, 4])
