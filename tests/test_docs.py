"""What a newcomer reads: links lead somewhere, what is shown runs, or its job takes its flags."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from jobs._cli import JOBS
from jobs._cli import main as run_named_job
from pipeline.research.quality import downstream, features
from pipeline.research.quality.features import digit_arrays

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

NOT_RUN = {
    r"var-d\d+|infinity-\d+b|out/d16|out/geneval": "wants a published checkpoint",
    r"ar-ckpt": "wants the checkpoint of another program",
    r"^train-model|runs/mine": "trains for an hour, or uses what that gives",
    r"^push": "wants a token of the Hugging Face Hub",
    r"--config": "wants a configuration of the user's or a study's hours",
}
"""What stands in a command that is not run, and why; all others are."""

SHARE = 50
COUNTS = ("--per-class", "--samples-per-shard", "--samples", "--real", "--runs")
SMALL = {
    "plan": {"--samples-per-shard": "20", "--workers": "0"},
    "generate": {"--samples-per-shard": "20", "--workers": "0"},
    "train-classifier": {
        "--batch-size": "2",
        "--steps": "16",
        "--runs": "1",
        "--loader-workers": "0",
    },
}
"""A command runs with a fiftieth of the images, steps and runs, also where a default says how many,
and in this process."""


def blocks(page: Path, language: str = "") -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[str]:
    """The commands in a page's blocks of code that start a job, without what a shell fills in."""
    found = []
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|[;{]|-- )\s*(?:depthvar |python -m jobs\.)([a-z_-]+ .*)", line)
            if match and "$" not in line:
                found.append(match[1])
    return found


EVERY_COMMAND = [
    pytest.param(command, id=f"{page.name}-{number}")
    for page in PAGES
    for number, command in enumerate(commands(page))
]


def demo_command() -> str:
    """What `make demo` runs."""
    match = re.search(r"bin/depthvar (generate(?:[^\n\\]|\\\n)*)", (ROOT / "Makefile").read_text())
    assert match
    return match[1].replace("\\\n", " ")


def scaled_down(words: list[str]) -> list[str]:
    name, *argv = words
    flag, scaled = "", []
    for word in argv:
        flag = word if word.startswith("-") else flag
        is_count = flag in COUNTS and word.isdigit()
        scaled.append(str(max(1, int(word) // SHARE)) if is_count else word)
    more = [part for item in SMALL.get(name, {}).items() if item[0] not in argv for part in item]
    return [name, *scaled, *more]


def is_run(command: str) -> bool:
    return not any(re.search(pattern, command) for pattern in NOT_RUN)


class Accepted(Exception):  # noqa: N818 - ends a job once its flags are taken
    pass


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_exist(page: Path):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_readme_fits_a_newcomers_patience():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12_000
    assert len(text.splitlines()) <= 250


def test_the_pages_show_the_commands_of_a_users_way():
    shown = {shlex.split(param.values[0], comments=True)[0] for param in EVERY_COMMAND}
    assert {
        "plan",
        "generate",
        "verify",
        "report",
        "evaluate",
        "export",
        "submit",
        "train-classifier",
        "train-model",
    } <= shown


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_a_command_shown_has_flags_that_its_job_takes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name, *argv = shlex.split(command, comments=True)
    name = name.replace("_", "-")
    assert name in JOBS
    job = importlib.import_module(f"jobs.{name.replace('-', '_')}")
    for folder in ("jobs", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "job.yaml").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    if name == "benchmark":
        job.parser().parse_args(argv)
        return
    load = job.load_config

    def accept(*args: object, **options: object) -> None:
        load(*args, **options)
        raise Accepted

    monkeypatch.setattr(job, "load_config", accept)
    with pytest.raises(Accepted):
        job.main(argv)


def test_every_reason_not_to_run_a_command_is_one_of_a_command_shown():
    shown = [param.values[0] for param in EVERY_COMMAND]
    assert [p for p in NOT_RUN if not any(re.search(p, command) for command in shown)] == []


def test_the_commands_that_can_run_here_do_in_the_order_in_which_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    few = {split: tuple(a[::10] for a in digit_arrays(split)) for split in ("train", "held-out")}
    for module in (features, downstream):
        monkeypatch.setattr(module, "digit_arrays", few.get)
    shown = [demo_command(), *(c for page in PAGES for c in commands(page) if is_run(c))]
    argvs = dict.fromkeys(tuple(scaled_down(shlex.split(c, comments=True))) for c in shown)
    for argv in argvs:
        assert run_named_job(argv) == 0, argv
    assert {"plan", "generate", "verify", "evaluate", "train-classifier"} <= {
        argv[0] for argv in argvs
    }
    for page in (ROOT / "README.md", ROOT / "docs" / "dataset.md"):
        for code in blocks(page, "python"):
            found: dict[str, object] = {}
            exec(code, found)
            assert found["label"] in range(10)
