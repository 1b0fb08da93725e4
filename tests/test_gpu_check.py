"""The GPU check in its small form, and without a GPU."""

from __future__ import annotations

import ast
import sys

import pytest
import torch

from depthvar.errors import InputError
from tests import gpu_check
from tests.gpu_check import Comparison, main
from tests.test_imports import ROOT
from tests.tiny_models import tiny_model

ON_THE_GPU_MACHINE = {"torch", "numpy", "safetensors"}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"^torch \S+ finds no GPU here: .*--device cpu[^\n]*$"):
        main([])


def test_the_small_form_compares_times_and_names_the_dearest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """With a model that is smaller still than the bundled one."""
    monkeypatch.setattr("jobs.benchmark._model", lambda _, device, dtype: tiny_model(3, dtype))
    monkeypatch.setattr(gpu_check, "random_model", lambda *_, dtype, **__: tiny_model(3, dtype))
    assert main(["--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    compared = [line for line in shown.splitlines() if line.startswith("ok    ")]
    assert len(compared) == 2 * 9 + 2 + 4 + 3 + 2
    assert "FAILED" not in shown
    assert [line.split(" | ")[1] for line in shown.splitlines() if line.startswith("| 1 |")] == [
        "full", "depthvar:3", "as published", "full", "depthvar:3"
    ]  # fmt: skip
    dearest = shown.partition("| kernel |\n")[2].splitlines()[1:11]
    taken_ms = [float(line.split("|")[1]) for line in dearest]
    assert len(taken_ms) == 10
    assert taken_ms == sorted(taken_ms, reverse=True)
    assert any("addmm" in line for line in dearest)


def test_a_comparison_that_fails_fails_the_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    found = [Comparison("near", 0.1, 0.1), Comparison("far", 0.2, 0.1)]
    for name in ("_time", "print_dearest"):
        monkeypatch.setattr(gpu_check, name, lambda *_: None)
    for bad in (found, [Comparison("not a number", float("nan"), 1.0)]):
        monkeypatch.setattr(gpu_check, "comparisons", lambda _, bad=bad: iter(bad))
        assert main(["--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "ok     near: 0.1 (limit 0.1)\nFAILED far: 0.2 (limit 0.1)\n" in shown
    assert "FAILED not a number" in shown


def test_it_imports_nothing_but_torch_numpy_and_safetensors():
    """What is imported when modules are, followed through our own."""
    seen, todo, foreign = set(), ["tests.gpu_check"], set()
    while todo:
        name = todo.pop()
        file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        if not file.exists():
            file = ROOT.joinpath(*name.split(".")) / "__init__.py"
        if name in seen or not file.exists():
            continue
        seen.add(name)
        todo += [name.rpartition(".")[0]] if "." in name else []
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            else:
                continue
            for imported in names:
                top = imported.partition(".")[0]
                todo += [imported] if (ROOT / top).is_dir() else []
                foreign |= set() if (ROOT / top).is_dir() else {top}
    assert "depthvar.sampling" in seen
    assert foreign - set(sys.stdlib_module_names) == ON_THE_GPU_MACHINE
