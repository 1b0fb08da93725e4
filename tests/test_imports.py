"""The import table: who may know whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room is a folder or a file. It imports only rooms that stand before it, in this order.
ROOMS = (
    "depthvar.errors",
    "depthvar.strict_json",
    "depthvar.host",
    "depthvar.imagenet",
    "depthvar.settings",
    "depthvar.infinity_config",
    "depthvar.config",
    "depthvar.knobs",
    "depthvar.policy",
    "depthvar.presets",
    "depthvar.plan",
    "depthvar.cost",
    "depthvar.memory",
    "depthvar.draw",
    "depthvar.randomness",
    "depthvar.pointwise",
    "depthvar.triton_kernels",
    "depthvar.triton_pointwise",
    "depthvar.layers",
    "depthvar.engine",
    "depthvar.var",
    "depthvar.infinity",
    "depthvar.weights",
    "depthvar.text",
    "depthvar.recording",
    "depthvar.sampling",
    "depthvar.published",
    "depthvar.counting",
    "depthvar.timing",
    "depthvar.paths",
    "depthvar.training",
    "pipeline.faults",
    "pipeline.store_uri",
    "pipeline.storage",
    "pipeline.request",
    "pipeline.shards",
    "pipeline.dataset",
    "pipeline.run",
    "pipeline.research.quality",
    "pipeline.research.study",
)
RESEARCH = "pipeline.research."
RESEARCH_JOBS = {"benchmark", "evaluate", "study", "train_classifier", "train_features"}
ENTRY = "_entry"


def modules(package: str) -> list[Path]:
    return sorted(f for f in (ROOT / package).rglob("*.py") if f.name != "__init__.py")


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


def room_of(name: str) -> str:
    (room,) = [r for r in ROOMS if name == r or name.startswith(f"{r}.")]
    return room


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def rooms_known_to(file: Path) -> set[str]:
    ours = {n for n in imported(file) if n.startswith(("depthvar.", "pipeline."))}
    return {room_of(name) for name in ours - {"depthvar.models"}}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_before_it(room: str):
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    files = [f for f in [*modules("depthvar"), *modules("pipeline")] if room_of(name_of(f)) == room]
    assert files
    for file in files:
        assert rooms_known_to(file) <= allowed, file


def test_nothing_but_its_jobs_imports_research():
    for file in modules("jobs"):
        if any(room.startswith(RESEARCH) for room in rooms_known_to(file)):
            assert file.stem in RESEARCH_JOBS, file


def test_depthvar_knows_no_pipeline():
    forbidden = {"ray", "pyarrow", "webdataset", "pydantic", "yaml", "pipeline", "jobs", "tests"}
    for file in modules("depthvar"):
        assert not packages(file) & forbidden, file


def test_ray_is_imported_where_the_work_is_run_alone():
    files = [*modules("depthvar"), *modules("pipeline"), *modules("jobs")]
    assert {name_of(f) for f in files if "ray" in packages(f)} == {
        "pipeline.run.cluster",
        "pipeline.run.ray_crew",
        "pipeline.run.ray_metrics",
        "pipeline.run.submission",  # speaks to a cluster that it is no part of
        "pipeline.run.worker_failures",
    }


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


def test_only_the_worker_and_research_run_a_model():
    """What is left of depthvar, numbers, names and files, is open to all of the pipeline."""
    running = {"depthvar.engine", "depthvar.var", "depthvar.sampling", "depthvar.timing"}
    for file in modules("pipeline"):
        if name_of(file) != "pipeline.run.worker" and not name_of(file).startswith(RESEARCH):
            assert not rooms_known_to(file) & running, file


def test_torch_is_imported_by_the_pipeline_only_where_a_model_runs_or_trains():
    users = [name_of(f) for f in modules("pipeline") if "torch" in packages(f)]
    assert [name for name in users if not name.startswith(RESEARCH)] == ["pipeline.run.worker"]
