"""Intervals and differences of a study, against numbers worked out by hand."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.research.study.protocol import StudyConfig, resolve_study
from pipeline.research.study.report import (
    LOSS,
    Findings,
    Interval,
    ablation_plot,
    ablation_table,
    headroom_table,
    method_table,
    results_table,
    signal_tables,
    time_ratio,
)

METHODS = {
    "full": {"policy": "full", "budgets": {"1x": None}},
    "depthvar": {"policy": "depthvar", "budgets": {"3x": 2}},
    "uniform": {"policy": "uniform", "budgets": {"3x": 2}},
}


@pytest.fixture
def findings(tmp_path) -> Findings:
    study = resolve_study(
        StudyConfig.model_validate(
            {"out": tmp_path, "methods": METHODS, "compare_with": ["depthvar"], "seeds": [1, 2, 3]}
        )
    )
    full, depthvar, uniform = study.cells
    values = {
        full.name: (0.2, 0.3, 0.4),
        depthvar.name: (0.5, 0.6, 0.7),
        uniform.name: (0.6, 0.7, 0.8),
    }
    return Findings(
        study,
        {
            name: {
                seed: {"frechet_distance": v} for seed, v in zip((1, 2, 3), by_seed, strict=True)
            }
            for name, by_seed in values.items()
        },
        losses={},
    )


def test_an_interval_is_students_t_over_the_seeds():
    interval = Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.half_width == pytest.approx(4.302653 / math.sqrt(3))
    assert not interval.excludes_zero
    assert Interval.of([5.0, 5.1, 4.9]).excludes_zero
    assert math.isnan(Interval.of([1.0]).half_width)
    assert interval.text(1) == "2.0 ± 2.5"


def test_differences_are_paired_by_seed(findings: Findings):
    """The seeds differ by far more than the methods do, which pairing takes out."""
    _, depthvar, uniform = findings.study.cells
    difference = findings.difference(uniform, depthvar, "frechet_distance")
    assert difference is not None
    assert difference.mean == pytest.approx(0.1)
    assert difference.half_width == pytest.approx(0, abs=1e-9)


def test_losses_are_paired_by_image(findings: Findings):
    """The images differ by far more than the methods do."""
    full, depthvar, uniform = findings.study.cells
    for cell, added in ((full, 0.0), (depthvar, 0.25), (uniform, 0.5)):
        losses_NS = np.outer([1.0, 20.0, 300.0], [1.0, 0.0]) + added
        buffer = io.BytesIO()
        np.save(buffer, losses_NS * findings.study.model.transformer.num_tokens)
        findings.study.storage.publish_bytes(buffer.getvalue(), findings.study.losses_file(cell))
    losses = Findings.read(findings.study).losses
    assert losses[depthvar.name].tolist() == [1.5, 20.5, 300.5], "nats a token, all scales"
    findings = replace(findings, losses=losses)
    interval = findings.interval(uniform, LOSS)
    assert interval is not None
    assert interval.mean == pytest.approx(108)
    assert interval.half_width > 100
    assert findings.difference_text(uniform, depthvar, LOSS) == "**+0.5000 ± 0.0000**"


def test_cas_is_the_mean_of_the_runs_of_a_seed(findings: Findings):
    study, cell = findings.study, findings.study.cells[0]
    cell = replace(cell, cas_runs=2)
    study = replace(study, cells=(cell,))
    for seed in (1, 2, 3):
        study.storage.publish_bytes(b'{"recall": 0.5}', study.file("measures", cell, seed))
        for run, accuracy in enumerate((0.9, 0.9 + seed / 100)):
            numbers = json.dumps({"cas": accuracy}).encode()
            study.storage.publish_bytes(numbers, study.cas_file(cell, seed, run))
    interval = Findings.read(study).interval(cell, "cas")
    assert interval is not None
    assert interval.mean == pytest.approx(0.91)


def test_a_cell_that_lacks_a_seed_is_not_shown(findings: Findings):
    del findings.by_cell[findings.study.cells[2].name][3]
    assert [cell.method for cell in findings.cells("methods")] == ["full", "depthvar"]


def test_the_table_marks_differences_whose_interval_excludes_zero(findings: Findings):
    times = {cell.name: [1.0, 1.0] for cell in findings.study.cells}
    rows = method_table(findings, times).splitlines()
    (uniform,) = [row for row in rows if "| uniform |" in row]
    assert "**+0.100 ± 0.000**" in uniform
    (depthvar,) = [row for row in rows if "| depthvar |" in row]
    assert depthvar.endswith("| **+0.300 ± 0.000** |  |"), "to full depth, none to itself"


def test_a_measure_that_was_not_taken_has_no_column(findings: Findings):
    times = {cell.name: [1.0] for cell in findings.study.cells}
    titles = method_table(findings, times).splitlines()[0]
    assert "Frechet distance" in titles
    assert "CAS" not in titles
    assert "precision" not in titles


def test_ablations_are_compared_with_the_unchanged_method_at_their_budget(tmp_path: Path):
    ablations = {
        "depthvar": METHODS["depthvar"],
        "flat": METHODS["uniform"],
        "uniform": {"policy": "uniform", "budgets": {"2x": 3}},
        "short": {"policy": "uniform", "budgets": {"2x": 3}, "options": {"block_order": "ends"}},
    }
    given = {"out": tmp_path, "methods": METHODS, "ablations": ablations, "seeds": [1, 2]}
    given["compare_with"] = ["depthvar", "uniform"]
    study = resolve_study(StudyConfig.model_validate(given))
    depthvar, flat, uniform, short = study.cells[3:]
    measures = {"frechet_distance": 0.5, "label_accuracy": 0.99, "precision": 0.9}
    worse = {"frechet_distance": 0.6, "label_accuracy": 0.98, "precision": 0.9}
    by_cell = {
        cell.name: dict.fromkeys((1, 2), measures if cell in (depthvar, uniform) else worse)
        for cell in (depthvar, flat, uniform, short)
    }
    titles, _, *rows = ablation_table(Findings(study, by_cell, {})).splitlines()
    assert titles.endswith("precision - uniform | loss - uniform |")
    none = "|  |  |  |  |  "
    changed = "|  | **+0.100 ± 0.000** | **-1.00 ± 0.00** | +0.000 ± 0.000 |  "
    assert rows[0].endswith(none * 2 + "|")
    assert rows[1].endswith(changed + none + "|")
    assert rows[2].endswith(none * 2 + "|")
    assert rows[3].endswith(none + changed + "|")
    losses = {depthvar.name: np.array([1.0, 2.0]), flat.name: np.array([1.5, 2.4])}
    assert ablation_plot(Findings(study, by_cell, losses)).startswith(b"\x89PNG")


def test_what_a_filter_gains_is_paired_with_leaving_out_as_many_at_random(findings: Findings):
    study, cell = findings.study, findings.study.cells[1]
    for seed, gain in ((1, 0.01), (2, 0.02), (3, 0.03)):
        filtered = {
            "surprise 5%": {"frechet_distance": 0.2 * seed, "cas": 0.9 + gain},
            "surprise 10%": {"frechet_distance": 0.3 * seed, "cas": 0.9 - gain},
            "at random 5%": {"frechet_distance": 0.2 * seed + 0.1, "cas": 0.9},
            "at random 10%": {"frechet_distance": 0.3 * seed, "cas": 0.9 + gain},
        }
        content = {"auroc": {"surprise": {"poor": 0.8}}, "without_worst": filtered}
        study.storage.publish_bytes(json.dumps(content).encode(), study.file("signals", cell, seed))
    rows = {row.split(" | ")[0]: row for row in signal_tables(study, cell).splitlines()}
    assert rows["| surprise"] == "| surprise |  | 0.80 ± 0.00 |"
    assert rows["| surprise 5%"].endswith("| **-0.100 ± 0.000** | +2.00 ± 2.48 |")
    assert rows["| surprise 10%"].endswith("| +0.000 ± 0.000 | -4.00 ± 4.97 |")
    assert rows["| at random 5%"].endswith("| 90.00 ± 0.00 |  |  |")


def test_headroom_is_shown_by_scale_and_depth(findings: Findings):
    given = findings.study.config.model_copy(update={"headroom_after": 2})
    study = replace(findings.study, config=given)
    mixed = {"oracle": 0.1, "spread": 0.2, "entropy": 0.3, "change": 0.4, "at random": 0.5}
    entry = {"scale": 6, "depth": 4, "uniform": 0.15, "mixed": mixed, "neediest_quarter": 0.5}
    study.storage.publish_bytes(json.dumps([entry]).encode(), study.headroom_file)
    row = headroom_table(study).splitlines()[-1]
    assert row == "| 8 | 4 | 0.150 | 0.100 | 0.200 | 0.300 | 0.400 | 0.500 | 50% |"


def test_times_are_compared_within_a_round(findings: Findings):
    full, depthvar, _ = findings.study.cells
    times = {full.name: [1.0, 10.0, 4.0], depthvar.name: [0.5, 2.0, 4.0]}
    assert time_ratio(depthvar, full, times) == "0.50 (0.20-1.00)"


def test_the_parquet_has_a_row_for_every_cell_and_seed(findings: Findings):
    table = results_table(findings, {})
    assert table.num_rows == 9
    assert set(table.column("seed").to_pylist()) == {1, 2, 3}
    row = table.filter([value == "uniform" for value in table.column("method").to_pylist()])
    assert row.column("frechet_distance").to_pylist() == [0.6, 0.7, 0.8]
