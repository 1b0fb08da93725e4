"""The command `depthvar`: which job a word starts, and how little is imported to say no."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from depthvar.errors import InputError
from jobs import _cli as cli
from jobs import plan

ROOT = Path(__file__).parents[2]


def test_every_job_has_a_command_and_every_command_a_job():
    files = {f.stem for f in (ROOT / "jobs").glob("*.py") if not f.stem.startswith("_")}
    assert {name.replace("-", "_") for name in cli.JOBS} == files


def test_help_names_every_job(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--help-all" in shown
    assert max(map(len, shown.splitlines())) <= 80
    for name, what in cli.JOBS.items():
        assert f"  {name} " in shown
        assert what in shown


def test_a_job_gets_the_words_behind_its_name(monkeypatch: pytest.MonkeyPatch):
    got: list[list[str]] = []

    def record(argv: list[str]) -> int:
        got.append(argv)
        return 7

    monkeypatch.setattr(plan, "main", record)
    assert cli.main(["plan", "--out", "x", "plan"]) == 7
    assert got == [["--out", "x", "plan"]]


def test_an_unknown_job_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"'generat', wanted one of plan, generate, submit"):
        cli.main(["generat"])


def test_the_version_is_that_of_the_project(capsys: pytest.CaptureFixture[str]):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"depthvar {project['version']}\n"


HEAVY = {"torch", "ray"}
LIGHT_COMMANDS = {
    "help": (["--help"], 0),
    "version": (["--version"], 0),
    "unknown job": (["generat"], 2),
    **{
        f"help of {name}": ([name, "--help"], 0)
        for name in (
            "generate",
            "plan",
            "verify",
            "status",
            "export",
            "train-model",
            "convert-weights",
        )
    },
    "all flags of submit": (["submit", "--help-all"], 0),
    "misspelt flag": (["generate", "--clases", "1"], 2),
    "refused value": (["generate", "--out", "x", "--per-class", "many"], 2),
    "flag without out": (["plan"], 2),
    "plan of a published model": (["plan", "--model", "var-d30", "--out", "/tmp/none"], 0),
    "push of nothing": (["push", "/none", "me/mine"], 2),
    "report of nothing": (["report", "/none"], 2),
    "status of nothing": (["status", "/none"], 2),
}


def test_what_needs_no_model_imports_neither_torch_nor_ray():
    """All in one process, which would show the first heavy import of any of them."""
    script = f"""
import sys
from jobs import _cli as cli
for name, (argv, wanted) in {LIGHT_COMMANDS!r}.items():
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code or 0
    except cli.InputError:
        code = 2
    assert code == wanted, (name, code)
    found = {HEAVY!r} & set(sys.modules)
    assert not found, (name, found)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
