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

from pipeline.research.study.protocol import (
    AT_RANDOM,
    DISTANCE,
    FULL,
    HEADROOM_IMAGES,
    Cell,
    Study,
    finished,
    read_json_file,
)

RESULTS_NAME = "results.parquet"
TABLE_NAME = "table.md"
LOSS = "held_out_loss"
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
    """The quality of every finished cell: measure -> value by seed.

    losses: of every cell that runs all scales, what each real held-out image cost, in nats a token.
    """

    study: Study
    by_cell: dict[str, dict[int, dict[str, float]]]
    losses: dict[str, np.ndarray]

    @classmethod
    def read(cls, study: Study) -> Findings:
        """Read the files of all finished cells."""
        by_cell: dict[str, dict[int, dict[str, float]]] = {}
        distant = finished(study, "distances", study.cells)
        for cell, seed in finished(study, "measures", study.cells):
            measured = read_json_file(study, study.file("measures", cell, seed))
            if (cell, seed) in distant:
                measured |= read_json_file(study, study.file("distances", cell, seed))
            files = [study.cas_file(cell, seed, run) for run in range(cell.cas_runs)]
            if files:
                measured["cas"] = float(
                    np.mean([read_json_file(study, file)["cas"] for file in files])
                )
            by_cell.setdefault(cell.name, {})[seed] = measured
        losses = {}
        for cell in study.with_losses:
            if not study.lacks(study.losses_file(cell)):
                losses_NS = np.load(io.BytesIO(study.storage.read(study.losses_file(cell))))
                losses[cell.name] = losses_NS.sum(axis=1) / study.model.transformer.num_tokens
        return cls(study, by_cell, losses)

    def cells(self, section: str) -> list[Cell]:
        """The cells of a section that every seed has finished."""
        seeds = len(self.study.config.seeds)
        return [
            cell
            for cell in self.study.cells
            if cell.section == section and len(self.by_cell.get(cell.name, {})) == seeds
        ]

    def find(self, section: str, method: str, budget: str | None = None) -> Cell | None:
        """The finished cell of a method, at a budget or its first; None where there is none."""
        for cell in self.cells(section):
            if cell.method == method and budget in (None, cell.budget):
                return cell
        return None

    def bases(self, section: str) -> list[str]:
        """The methods of a section that the others are compared with, besides full depth."""
        return [name for name in self.study.config.compare_with if self.find(section, name)]

    def interval(self, cell: Cell, measure: str) -> Interval | None:
        """A measure over the seeds, or over the real held-out images."""
        if measure == LOSS:
            losses_N = self.losses.get(cell.name)
            return None if losses_N is None else Interval.of(losses_N.tolist())
        by_seed = self.by_cell[cell.name]
        if any(measure not in measured for measured in by_seed.values()):
            return None
        return Interval.of([measured[measure] for measured in by_seed.values()])

    def measured(self, section: str) -> list[str]:
        """The measures that any cell of a section has, in the order to show them."""
        return [
            name
            for name in _MEASURES
            if any(self.interval(cell, name) is not None for cell in self.cells(section))
        ]

    def text(self, cell: Cell, measure: str) -> str:
        """A measure as it stands in a table; empty where it was not taken."""
        return _text(self.interval(cell, measure), measure)

    def difference_text(self, cell: Cell, base: Cell | None, measure: str) -> str:
        """A difference as it stands in a table, bold where its interval excludes zero."""
        found = None if cell is base else self.difference(cell, base, measure)
        return "" if found is None else _difference_text(found, measure)

    def difference(self, cell: Cell, base: Cell | None, measure: str) -> Interval | None:
        """A measure less that of another cell, paired by seed, or by real held-out image."""
        if base is None:
            return None
        if measure == LOSS:
            if cell.name not in self.losses or base.name not in self.losses:
                return None
            return Interval.of((self.losses[cell.name] - self.losses[base.name]).tolist())
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
                        "seconds_per_image": float(np.median(times[cell.name]))
                        if cell.name in times
                        else None,
                        **measured,
                        LOSS: float(findings.losses[cell.name].mean())
                        if cell.name in findings.losses
                        else None,
                    }
                )
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


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
    DISTANCE: ("distance to full depth", 4),
    LOSS: ("held-out loss", 4),
}
_SHORT = {
    "label_accuracy": "read as label",
    "frechet_distance": "Frechet",
    "cas": "CAS",
    "precision": "precision",
    DISTANCE: "distance",
    LOSS: "loss",
}
_ABLATED = {
    DISTANCE: "left",
    "frechet_distance": "left",
    "label_accuracy": "right",
    "precision": "right",
    LOSS: "left",
}
"""Measures that ablations are compared by, and where the better ones are in a plot."""
_FILTERED = ("label_accuracy", "frechet_distance", "cas", "precision")
"""Measures of what is left when the worst are left out."""
_COLOURS = 10
_MARKERS = "os^"
"""Of the methods in a plot: the next one after as many as there are colours."""
_LINEAR_TO = {DISTANCE: 0.01, LOSS: 0.01, "frechet_distance": 0.1}
"""Differences on a logarithmic scale in a plot, and up to where it is linear."""


def markdown(findings: Findings, times: dict[str, list[float]]) -> str:
    """All tables."""
    config = findings.study.config
    cas = f" CAS: mean of {config.cas_runs} classifiers a seed." if config.cas_runs else ""
    head = (
        f"{len(config.seeds)} seeds x {config.samples:,} images (ablations"
        f" {config.ablation_samples:,}); mean ± half the 95% interval over seeds. Differences are"
        f" paired by seed; **bold**: the interval excludes zero.{cas} Distance to full depth: mean"
        " squared difference of the pixels, in [-1, 1], from the full-depth images of the same"
        " noise. Held-out loss: nats a token that the real held-out images cost the model under the"
        " policy, with the interval, and paired, over images.\n"
    )
    parts = [head, "## Methods\n", method_table(findings, times)]
    if findings.cells("ablations"):
        parts += ["## Ablations\n", ablation_table(findings)]
    signals = [cell for cell in findings.study.cells if cell.signals]
    parts += [signal_tables(findings.study, cell) for cell in signals]
    if findings.study.config.headroom_after is not None:
        parts.append(headroom_table(findings.study))
    return "\n".join(parts)


def method_table(findings: Findings, times: dict[str, list[float]]) -> str:
    """A row per method and budget, with differences to full depth and to `compare_with` there."""
    full = findings.find("methods", FULL)
    assert full is not None
    shown = findings.measured("methods")
    compared = [name for name in ("frechet_distance", "cas", DISTANCE, LOSS) if name in shown]
    bases = findings.bases("methods")
    columns = ["budget", "method", "token-layers", "GFLOP", "time / full"]
    columns += [_MEASURES[name][0] for name in shown]
    columns += [f"{_SHORT[name]} - {base}" for base in (FULL, *bases) for name in compared]
    rows = []
    for cell in by_budget(findings.cells("methods")):
        values = [cell.budget, cell.method, *_cost_texts(cell), time_ratio(cell, full, times)]
        values += [findings.text(cell, measure) for measure in shown]
        for base in (full, *(findings.find("methods", name, cell.budget) for name in bases)):
            values += [findings.difference_text(cell, base, measure) for measure in compared]
        rows.append(values)
    return _table(columns, rows)


def by_budget(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of one budget together, the largest budget first."""
    most: dict[str, float] = {}
    for cell in cells:
        most[cell.budget] = max(most.get(cell.budget, 0), cell.share)
    return sorted(cells, key=lambda cell: -most[cell.budget])


def ablation_table(findings: Findings) -> str:
    """A row per variant, with paired differences to the unchanged ones at its budget."""
    shown = findings.measured("ablations")
    columns = ["variant", "token-layers", "GFLOP", *(_MEASURES[name][0] for name in shown)]
    bases = findings.bases("ablations")
    columns += [f"{_SHORT[name]} - {base}" for base in bases for name in _ABLATED]
    rows = []
    for cell in findings.cells("ablations"):
        values = [f"{cell.method} ({cell.budget})", *_cost_texts(cell)]
        values += [findings.text(cell, measure) for measure in shown]
        for name in bases:
            base = findings.find("ablations", name, cell.budget)
            values += [findings.difference_text(cell, base, measure) for measure in _ABLATED]
        rows.append(values)
    return _table(columns, rows)


def signal_tables(study: Study, cell: Cell) -> str:
    """AUROC of the recorded signals, and what leaving out the worst by them does."""
    done = finished(study, "signals", [cell])
    read = [read_json_file(study, study.file("signals", cell, seed)) for _, seed in done]
    if not read:
        return ""
    rows = []
    for signal in read[0]["auroc"]:
        verdicts = []
        for verdict in ("wrong", "poor"):
            values = [content["auroc"][signal].get(verdict) for content in read]
            found = [value for value in values if value is not None]
            verdicts.append(Interval.of(found).text(2) if len(found) == len(read) else "")
        rows.append([signal, *verdicts])
    auroc = _table(["signal", "read as another digit", "poorest 5%"], rows)
    filters = [content["without_worst"] for content in read]
    measures = [m for m in _FILTERED if all(m in q for f in filters for q in f.values())]
    columns = ["left out: the worst by", *(_MEASURES[name][0] for name in measures)]
    columns += [f"{_SHORT[name]} - {AT_RANDOM}" for name in measures]
    rows = []
    for name in filters[0]:
        base = f"{AT_RANDOM} {name.rsplit(maxsplit=1)[-1]}"
        values = [name]
        for measure in measures:
            found = [by_filter[name][measure] for by_filter in filters]
            values.append(_text(Interval.of(found), measure))
        for measure in measures:
            gains = [by_filter[name][measure] - by_filter[base][measure] for by_filter in filters]
            values.append("" if name == base else _difference_text(Interval.of(gains), measure))
        rows.append(values)
    head = f"## Signals of {cell.method} at {cell.budget}\n\nAUROC:\n"
    return "\n".join([head, auroc, _table(columns, rows)])


def headroom_table(study: Study) -> str:
    """What every scale costs at one depth for all, and with a third of the tokens deeper."""
    found = read_json_file(study, study.headroom_file)
    mixes = ("oracle", "spread", "entropy", "change", "at random")
    columns = ["side", "depth D", "uniform", *mixes, "gain of the neediest quarter"]
    explained = (
        "## Headroom of depth per token\n\nDivergence from full depth (Kullback-Leibler, nats a"
        f" token, {HEADROOM_IMAGES} real held-out images) with every token at D blocks, and with a"
        " third of each image's tokens at 2D and the others at D/2, by what chooses the third."
        " Where even the oracle costs more than uniform depth, no ranking makes this mix pay.\n"
    )
    rows = [
        [
            str(study.model.sides[entry["scale"]]),
            str(entry["depth"]),
            f"{entry['uniform']:.3f}",
            *(f"{entry['mixed'][name]:.3f}" for name in mixes),
            f"{entry['neediest_quarter']:.0%}",
        ]
        for entry in found
    ]
    return explained + "\n" + _table(columns, rows)


def _cost_texts(cell: Cell) -> list[str]:
    return [f"{cell.share:.1%}", f"{cell.cost.total_flops / 1e9:.2f}"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(interval: Interval | None, measure: str) -> str:
    if interval is None:
        return ""
    return interval.text(_MEASURES[measure][1], percent=measure in _PERCENT)


def _difference_text(interval: Interval, measure: str) -> str:
    digits = _MEASURES[measure][1]
    text = interval.text(digits, percent=measure in _PERCENT, signed=True)
    return f"**{text}**" if interval.excludes_zero else text


def budget_plot(findings: Findings) -> bytes:
    """Quality over the share of token-layers, a panel per measure and a line per method, as PNG."""
    from matplotlib.figure import Figure

    shown = findings.measured("methods")
    measures = [m for m in ("frechet_distance", "cas", DISTANCE) if m in shown]
    figure = Figure(figsize=(6.4 * len(measures), 4.8), layout="constrained")
    for place, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), place + 1)
        factor = 100 if measure in _PERCENT else 1
        methods = dict.fromkeys(cell.method for cell in findings.cells("methods"))
        for number, method in enumerate(methods):
            cells = [c for c in findings.cells("methods") if c.method == method]
            cells.sort(key=lambda c: c.share)
            intervals = [findings.interval(cell, measure) for cell in cells]
            points = [
                (cell.share, interval)
                for cell, interval in zip(cells, intervals, strict=True)
                if interval is not None
            ]
            axes.errorbar(
                [share for share, _ in points],
                [interval.mean * factor for _, interval in points],
                yerr=[interval.half_width * factor for _, interval in points],
                marker="*" if method == FULL else _MARKERS[number // _COLOURS % len(_MARKERS)],
                linewidth=2.4 if method in findings.study.config.compare_with else 1.0,
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


def ablation_plot(findings: Findings) -> bytes:
    """Differences of variants to the unchanged one at their budget, a panel per measure, as PNG."""
    from matplotlib.figure import Figure

    rows, bases = [], findings.bases("ablations")
    for cell in findings.cells("ablations"):
        at_budget = (findings.find("ablations", name, cell.budget) for name in bases)
        base = next((found for found in at_budget if found), None)
        found = [findings.difference(cell, base, name) for name in _ABLATED]
        intervals = [interval for interval in found if interval is not None]
        if cell is not base and len(intervals) == len(_ABLATED):
            rows.append((f"{cell.method} ({cell.budget})", intervals))
    rows.sort(key=lambda row: -row[1][0].mean)
    figure = Figure(figsize=(18, 1.2 + 0.28 * len(rows)), layout="constrained")
    for place, (measure, better) in enumerate(_ABLATED.items()):
        axes = figure.add_subplot(1, len(_ABLATED), place + 1)
        factor = 100 if measure in _PERCENT else 1
        axes.errorbar(
            [intervals[place].mean * factor for _, intervals in rows],
            range(len(rows)),
            xerr=[intervals[place].half_width * factor for _, intervals in rows],
            fmt="o",
            capsize=2,
        )
        axes.set_yticks(range(len(rows)), [name for name, _ in rows] if place == 0 else [])
        axes.tick_params(axis="y", labelsize=8)
        axes.axvline(0, color="grey", linewidth=1)
        if better == "left":
            axes.set_xscale("symlog", linthresh=_LINEAR_TO[measure])
        axes.set_xlabel(
            f"{_MEASURES[measure][0]}\nless that of {' or '.join(bases)} ({better} is better)"
        )
        axes.grid(visible=True, axis="both", alpha=0.3)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
