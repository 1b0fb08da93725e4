"""The import table: who may know whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Inside pipeline a file may import only files before it.
PIPELINE_ORDER = (
    "faults",
    "storage",
    "marks",
    "paths",
    "claims",
    "weights",
    "text_file",
    "yaml_file",
    "labels",
    "schema",
    "settings",
    "config",
    "plan",
    "card",
    "manifest",
    "samples",
    "writer",
    "loader",
    "evaluation",
    "downstream",
    "study",
    "study_report",
    "export",
    "shard_check",
    "verify",
    "repair",
    "contact_sheet",
    "actor",
    "regenerate",
    "address",
    "schedule",
    "console",
    "run",
    "driver",
)
ENTRY = "_entry"


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Dotted names of all imports in a file, those inside functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(file)}


def test_depthvar_knows_no_pipeline():
    forbidden = {"ray", "pyarrow", "webdataset", "pydantic", "yaml", "pipeline", "jobs", "tests"}
    for file in modules("depthvar"):
        assert not packages(file) & forbidden, file


def test_only_the_driver_imports_ray():
    files = [*modules("depthvar"), *modules("pipeline"), *modules("jobs")]
    assert [f for f in files if "ray" in packages(f)] == [ROOT / "pipeline" / "driver.py"]


def test_the_benchmark_needs_no_pipeline():
    """It runs where only torch is installed, on the machine whose GPU is in question."""
    forbidden = {"ray", "pyarrow", "webdataset", "pydantic", "yaml", "pipeline"}
    for name in ("benchmark", ENTRY):
        assert not packages(ROOT / "jobs" / f"{name}.py") & forbidden


def test_nothing_but_jobs_imports_jobs_and_nothing_imports_tests():
    for file in [*modules("depthvar"), *modules("pipeline")]:
        assert not packages(file) & {"jobs", "tests"}, file
    for file in modules("jobs"):
        assert "tests" not in packages(file), file


def test_the_order_names_every_file_of_pipeline():
    names = {file.stem for file in modules("pipeline")} - {"__init__"}
    assert names == set(PIPELINE_ORDER)


@pytest.mark.parametrize("name", PIPELINE_ORDER)
def test_pipeline_files_import_only_earlier_ones(name: str):
    file = ROOT / "pipeline" / f"{name}.py"
    inside = {i.split(".")[1] for i in imported(file) if i.startswith("pipeline.")}
    assert inside <= set(PIPELINE_ORDER[: PIPELINE_ORDER.index(name)])


def test_only_the_actor_touches_what_runs_a_model():
    """The pure parts of depthvar (numbers and names) are open to all of the pipeline."""
    for file in modules("pipeline"):
        parts = {i.split(".")[1] for i in imported(file) if i.startswith("depthvar.")}
        numbers = {"cost", "memory", "plan", "policy", "rate"}
        pure = {"class_folders", "config", "errors", "leftovers", "names", "paths"} | numbers
        more = {
            "weights": {"weights_files"},
            "config": {"checkpoint"},
            "actor": {"checkpoint", "sampling"},
            "evaluation": {"features", "metrics", "inception"},
            "downstream": {"features", "pictures", "training"},
            "study": {"checkpoint", "held_out", "processes", "study", "timing"},
        }.get(file.stem, set())
        assert parts <= pure | more, file


def test_torch_is_imported_by_the_pipeline_only_where_a_model_runs_or_trains():
    users = [f.stem for f in modules("pipeline") if "torch" in packages(f)]
    assert users == ["actor", "downstream"]
