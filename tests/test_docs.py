"""What a newcomer reads: links lead somewhere, and the jobs take every command that is shown."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from jobs._cli import JOBS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The commands in a page's blocks of code that start a job, without what a shell fills in."""
    found = []
    for block in BLOCK.findall(page.read_text()):
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
    assert {"plan", "generate", "verify", "evaluate", "export", "train", "train-model"} <= shown


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_a_command_shown_has_flags_that_its_job_takes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name, *argv = shlex.split(command, comments=True)
    name = name.replace("_", "-")
    assert name in JOBS
    job = importlib.import_module(f"jobs.{name.replace('-', '_')}")
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
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
