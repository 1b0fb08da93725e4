"""What a study found: one Parquet, a Markdown table and plots, from its finished files.

Means carry 95% intervals over seeds (Student's t). Differences are paired by seed: both sides used
the same noise.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.study import FULL, Cell, Study, finished, read_json_file

RESULTS_NAME = "results.parquet"
TABLE_NAME = "table.md"
DEFAULT = "depthvar"
_PERCENT = ("label_accuracy", "cas")


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95% interval; the width is NaN for a single value."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t over independent values."""
        from scipy.stats import t

        count = len(values)
        if count < 2:
            return cls(float(np.mean(values)), math.nan)
        error = float(np.std(values, ddof=1)) / math.sqrt(count)
        return cls(float(np.mean(values)), float(t.ppf(0.975, count - 1)) * error)

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return abs(self.mean) > self.half_width

    def text(self, digits: int, *, percent: bool = False, signed: bool = False) -> str:
        """`0.381 +- 0.012`; a share as percent."""
        factor = 100 if percent else 1
        sign = "+" if signed else ""
        return f"{self.mean * factor:{sign}.{digits}f} ± {self.half_width * factor:.{digits}f}"


@dataclass(frozen=True)
class Findings:
    """The quality of every finished cell: measure -> value by seed."""

    study: Study
    by_cell: dict[str, dict[int, dict[str, float]]]

    @classmethod
    def read(cls, study: Study) -> Findings:
        """Read the files of all finished cells."""
        by_cell: dict[str, dict[int, dict[str, float]]] = {}
        for cell, seed in finished(study, "measures", study.cells):
            measured = read_json_file(study, study.file("measures", cell, seed))
            by_cell.setdefault(cell.name, {})[seed] = measured
        return cls(study, by_cell)

    def cells(self, section: str) -> list[Cell]:
        """The cells of a section that every seed has finished."""
        seeds = len(self.study.config.seeds)
        return [
            cell
            for cell in self.study.cells
            if cell.section == section and len(self.by_cell.get(cell.name, {})) == seeds
        ]

    def find(self, section: str, method: str, budget: str | None = None) -> Cell | None:
        """A finished cell."""
        for cell in self.cells(section):
            if cell.method == method and budget in (None, cell.budget):
                return cell
        return None

    def interval(self, cell: Cell, measure: str) -> Interval | None:
        """A measure over the seeds."""
        by_seed = self.by_cell[cell.name]
        if any(measure not in measured for measured in by_seed.values()):
            return None
        return Interval.of([measured[measure] for measured in by_seed.values()])

    def difference(self, cell: Cell, base: Cell | None, measure: str) -> Interval | None:
        """A measure less that of another cell, paired by seed."""
        if base is None:
            return None
        ours, theirs = self.by_cell[cell.name], self.by_cell[base.name]
        if any(measure not in m for m in (*ours.values(), *theirs.values())):
            return None
        return Interval.of([ours[seed][measure] - theirs[seed][measure] for seed in ours])


def write_report(study: Study) -> list[str]:
    """Write Parquet, table and plots into the study's folder; returns their names."""
    findings = Findings.read(study)
    times = read_json_file(study, study.times_file)
    table = results_table(findings, times)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    files = {
        RESULTS_NAME: buffer.getvalue(),
        TABLE_NAME: markdown(findings, times).encode(),
        "budgets.png": budget_plot(findings),
    }
    if findings.cells("ablations"):
        files["ablations.png"] = ablation_plot(findings)
    for name, data in files.items():
        study.storage.publish_bytes(data, name)
    return list(files)


def results_table(findings: Findings, times: dict[str, list[float]]) -> pa.Table:
    """One row per cell and seed: what was asked, what it cost, what came out."""
    rows: list[dict[str, Any]] = []
    for section in ("methods", "ablations"):
        for cell in findings.cells(section):
            for seed, measured in findings.by_cell[cell.name].items():
                rows.append(
                    {
                        "section": section,
                        "method": cell.method,
                        "budget": cell.budget,
                        "policy": json.dumps(asdict(cell.policy), sort_keys=True),
                        "seed": seed,
                        "num_samples": cell.num_samples,
                        "token_layers": cell.depth.token_layers,
                        "full_token_layers": cell.depth.full_token_layers,
                        "flops": cell.cost.total_flops,
                        "seconds_per_image": _median(times.get(cell.name)),
                        **measured,
                    }
                )
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def _median(values: Sequence[float] | None) -> float | None:
    return None if not values else float(np.median(values))


def time_ratio(cell: Cell, full: Cell, times: dict[str, list[float]]) -> str:
    """Time against full depth, pair by pair of the rounds: median and range."""
    pairs = zip(times[cell.name], times[full.name], strict=True)
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return f"{np.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


_MEASURES = {
    "label_accuracy": ("read as its label, %", 2),
    "frechet_distance": ("Frechet distance", 3),
    "cas": ("CAS, %", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "diversity": ("diversity", 3),
}


def markdown(findings: Findings, times: dict[str, list[float]]) -> str:
    """All tables, as they stand in the README."""
    config = findings.study.config
    head = (
        f"{len(config.seeds)} seeds x {config.samples:,} images (ablations"
        f" {config.ablation_samples:,}); mean ± half the 95% interval over seeds. Differences are"
        " paired by seed; **bold**: the interval excludes zero.\n"
    )
    parts = [head, method_table(findings, times)]
    if findings.cells("ablations"):
        parts.append(ablation_table(findings))
    signals = [cell for cell in findings.study.cells if cell.signals]
    parts += [signal_tables(findings.study, cell) for cell in signals]
    return "\n".join(parts)


def method_table(findings: Findings, times: dict[str, list[float]]) -> str:
    """A row per method and budget, with the differences to the default at that budget."""
    full = findings.find("methods", FULL)
    assert full is not None
    titles = [title for title, _ in _MEASURES.values()]
    columns = ["budget", "method", "token-layers", "GFLOP", "time / full", *titles]
    columns += ["Frechet - default", "CAS - default"]
    lines = [_row(columns), _row(["---"] * len(columns))]
    for cell in by_budget(findings.cells("methods")):
        share = cell.depth.token_layers / cell.depth.full_token_layers
        values = [cell.budget, cell.method, f"{share:.1%}", f"{cell.cost.total_flops / 1e9:.2f}"]
        values.append(time_ratio(cell, full, times))
        for measure, (_, digits) in _MEASURES.items():
            values.append(_text(findings.interval(cell, measure), measure, digits))
        default = findings.find("methods", DEFAULT, cell.budget)
        for measure in ("frechet_distance", "cas"):
            other = default if cell is not default else None
            values.append(_difference_text(findings.difference(cell, other, measure), measure))
        lines.append(_row(values))
    return "\n".join(lines) + "\n"


def by_budget(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of one budget together, the largest budget first."""
    most: dict[str, int] = {}
    for cell in cells:
        most[cell.budget] = max(most.get(cell.budget, 0), cell.depth.token_layers)
    return sorted(cells, key=lambda cell: -most[cell.budget])


def ablation_table(findings: Findings) -> str:
    """A row per variant: differences to the unchanged default."""
    columns = ["variant", "token-layers"]
    shown = [name for name in _MEASURES if name != "cas"]
    columns += [_MEASURES[name][0] for name in shown] + ["Frechet - default"]
    lines = [_row(columns), _row(["---"] * len(columns))]
    for cell in findings.cells("ablations"):
        share = cell.depth.token_layers / cell.depth.full_token_layers
        values = [f"{cell.method} ({cell.budget})", f"{share:.1%}"]
        values += [_text(findings.interval(cell, m), m, _MEASURES[m][1]) for m in shown]
        base = findings.find("ablations", DEFAULT, cell.budget)
        other = base if cell is not base else None
        difference = findings.difference(cell, other, "frechet_distance")
        lines.append(_row([*values, _difference_text(difference, "frechet_distance")]))
    return "\n".join(lines) + "\n"


def signal_tables(study: Study, cell: Cell) -> str:
    """AUROC of the recorded signals, and what leaving out the worst by them does."""
    done = finished(study, "signals", [cell])
    read = [read_json_file(study, study.file("signals", cell, seed)) for _, seed in done]
    if not read:
        return ""
    lines = [f"Signals of {cell.method} at {cell.budget}, AUROC:\n"]
    lines += [_row(["signal", "read as another digit", "poorest 5%"]), _row(["---"] * 3)]
    for signal in read[0]["auroc"]:
        verdicts = []
        for verdict in ("wrong", "poor"):
            values = [content["auroc"][signal].get(verdict) for content in read]
            found = [value for value in values if value is not None]
            verdicts.append(Interval.of(found).text(2) if len(found) == len(read) else "")
        lines.append(_row([signal, *verdicts]))
    lines += ["", _row(["left out: the worst by", "Frechet distance", "CAS, %"]), _row(["---"] * 3)]
    for name in read[0]["without_worst"]:
        values = [content["without_worst"][name] for content in read]
        frechet = Interval.of([value["frechet_distance"] for value in values]).text(3)
        has_cas = all("cas" in value for value in values)
        cas = Interval.of([value["cas"] for value in values]) if has_cas else None
        lines.append(_row([name, frechet, _text(cas, "cas", 2)]))
    return "\n".join(lines) + "\n"


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _text(interval: Interval | None, measure: str, digits: int) -> str:
    return "" if interval is None else interval.text(digits, percent=measure in _PERCENT)


def _difference_text(interval: Interval | None, measure: str) -> str:
    if interval is None:
        return ""
    percent = measure in _PERCENT
    text = interval.text(2 if percent else 3, percent=percent, signed=True)
    return f"**{text}**" if interval.excludes_zero else text


def budget_plot(findings: Findings) -> bytes:
    """Frechet distance and CAS over the share of token-layers, one line per method, as PNG."""
    from matplotlib.figure import Figure

    measures = [m for m in ("frechet_distance", "cas") if _is_measured(findings, m)]
    figure = Figure(figsize=(6.4 * len(measures), 4.8), layout="constrained")
    for place, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), place + 1)
        factor = 100 if measure in _PERCENT else 1
        methods = dict.fromkeys(cell.method for cell in findings.cells("methods"))
        for method in methods:
            cells = [c for c in findings.cells("methods") if c.method == method]
            cells.sort(key=lambda c: c.depth.token_layers)
            intervals = [findings.interval(cell, measure) for cell in cells]
            points = [
                (cell.depth.token_layers / cell.depth.full_token_layers, interval)
                for cell, interval in zip(cells, intervals, strict=True)
                if interval is not None
            ]
            axes.errorbar(
                [share for share, _ in points],
                [interval.mean * factor for _, interval in points],
                yerr=[interval.half_width * factor for _, interval in points],
                marker="*" if method == FULL else "o",
                linewidth=2.4 if method == DEFAULT else 1.0,
                markersize=12 if method == FULL else 4,
                capsize=2,
                label=method,
            )
        axes.set_xlabel("share of the token-layers of full depth")
        axes.set_ylabel(_MEASURES[measure][0])
        if measure == "frechet_distance":
            axes.set_yscale("log")
        axes.grid(visible=True, alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return _png(figure)


def _is_measured(findings: Findings, measure: str) -> bool:
    return any(findings.interval(cell, measure) for cell in findings.cells("methods"))


def ablation_plot(findings: Findings) -> bytes:
    """Difference in Frechet distance of every variant to the unchanged default, as PNG."""
    from matplotlib.figure import Figure

    rows = []
    for cell in findings.cells("ablations"):
        base = findings.find("ablations", DEFAULT, cell.budget)
        difference = findings.difference(cell, base, "frechet_distance")
        if cell is not base and difference is not None:
            rows.append((f"{cell.method} ({cell.budget})", difference))
    rows.sort(key=lambda row: -row[1].mean)
    figure = Figure(figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(
        [difference.mean for _, difference in rows],
        range(len(rows)),
        xerr=[difference.half_width for _, difference in rows],
        fmt="o",
        capsize=2,
    )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlabel("Frechet distance less that of the default at the same budget (left is better)")
    axes.grid(visible=True, axis="x", alpha=0.3)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
