"""What a study found: one Parquet, a Markdown table and plots, from its finished files.

Means carry 95% intervals over seeds (Student's t). Differences are paired by seed: both sides used
the same noise.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95% interval; the width is NaN for a single value."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Interval:
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

    def text(self, digits: int, factor: int = 1, sign: str = "") -> str:
        """`0.381 ± 0.012`, of numbers that many times as large; with "+" a sign before each."""
        return f"{self.mean * factor:{sign}.{digits}f} ± {self.half_width * factor:.{digits}f}"


@dataclass(frozen=True)
class Measure:
    """How a measure is shown: its name in full and short, and its digits after the point.

    factor: 100 for a share that is shown in percent. linear_to: of a measure whose lower values are
    better, up to where the logarithmic scale of its differences is linear.
    """

    title: str
    short: str
    digits: int
    factor: int = 1
    linear_to: float | None = None

    def text(self, interval: Interval | None, sign: str = "") -> str:
        """An interval as it stands in a table; empty where there is none."""
        return "" if interval is None else interval.text(self.digits, self.factor, sign)

    def difference_text(self, interval: Interval | None) -> str:
        """A difference as it stands in a table, bold where its interval excludes zero."""
        text = self.text(interval, "+")
        return f"**{text}**" if interval is not None and interval.excludes_zero else text


MEASURES = {
    "label_accuracy": Measure("read as its label, %", "read as label", 2, factor=100),
    "frechet_distance": Measure("Frechet distance", "Frechet", 3, linear_to=0.1),
    "cas": Measure("CAS, %", "CAS", 2, factor=100),
    "precision": Measure("precision", "precision", 3),
    "recall": Measure("recall", "recall", 3),
    "diversity": Measure("diversity", "diversity", 3),
    DISTANCE: Measure("distance to full depth", "distance", 4, linear_to=0.01),
    LOSS: Measure("held-out loss", "loss", 4, linear_to=0.01),
}
"""In the order to show them."""
_COMPARED = ("frechet_distance", "cas", DISTANCE, LOSS)
_ABLATED = (DISTANCE, "frechet_distance", "label_accuracy", "precision", LOSS)
"""Measures that ablations are compared by."""
_FILTERED = ("label_accuracy", "frechet_distance", "cas", "precision")
"""Measures of what is left when the worst are left out."""
_COLOURS = 10
_MARKERS = "os^"
"""Of the methods in a plot: the next one after as many as there are colours."""


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

    def values(self, cell: Cell, measure: str) -> np.ndarray | None:
        """A measure by seed, or by real held-out image; None where it was not taken."""
        if measure == LOSS:
            return self.losses.get(cell.name)
        values = [self.by_cell[cell.name][seed].get(measure) for seed in self.study.config.seeds]
        return None if None in values else np.array(values)

    def interval(self, cell: Cell, measure: str) -> Interval | None:
        """A measure over the seeds, or over the real held-out images."""
        values = self.values(cell, measure)
        return None if values is None else Interval.of(values)

    def difference(self, cell: Cell, base: Cell | None, measure: str) -> Interval | None:
        """A measure less that of another cell, paired by seed, or by real held-out image."""
        if base is None:
            return None
        ours, theirs = self.values(cell, measure), self.values(base, measure)
        return None if ours is None or theirs is None else Interval.of(ours - theirs)

    def measured(self, section: str) -> list[str]:
        """The measures that any cell of a section has, in the order to show them."""
        cells = self.cells(section)
        return [
            name for name in MEASURES if any(self.values(cell, name) is not None for cell in cells)
        ]

    def text(self, cell: Cell, measure: str) -> str:
        """A measure as it stands in a table; empty where it was not taken."""
        return MEASURES[measure].text(self.interval(cell, measure))

    def difference_text(self, cell: Cell, base: Cell | None, measure: str) -> str:
        """A difference as it stands in a table, bold where its interval excludes zero."""
        found = None if cell is base else self.difference(cell, base, measure)
        return MEASURES[measure].difference_text(found)


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
                        "policy": json.dumps(cell.policy.as_stored, sort_keys=True),
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
    compared = [name for name in _COMPARED if name in shown]
    bases = findings.bases("methods")
    columns = ["budget", "method", "token-layers", "GFLOP", "time / full"]
    columns += [MEASURES[name].title for name in shown]
    columns += [f"{MEASURES[name].short} - {base}" for base in (FULL, *bases) for name in compared]
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
    columns = ["variant", "token-layers", "GFLOP", *(MEASURES[name].title for name in shown)]
    bases = findings.bases("ablations")
    columns += [f"{MEASURES[name].short} - {base}" for base in bases for name in _ABLATED]
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
    columns = ["left out: the worst by", *(MEASURES[name].title for name in measures)]
    columns += [f"{MEASURES[name].short} - {AT_RANDOM}" for name in measures]
    rows = []
    for name in filters[0]:
        base = f"{AT_RANDOM} {name.rsplit(maxsplit=1)[-1]}"
        texts, gain_texts = [], []
        for measure in measures:
            found = [by_filter[name][measure] for by_filter in filters]
            gains = [by_filter[name][measure] - by_filter[base][measure] for by_filter in filters]
            texts.append(MEASURES[measure].text(Interval.of(found)))
            gain = None if name == base else Interval.of(gains)
            gain_texts.append(MEASURES[measure].difference_text(gain))
        rows.append([name, *texts, *gain_texts])
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


def budget_plot(findings: Findings) -> bytes:
    """Quality over the share of token-layers, a panel per measure and a line per method, as PNG."""
    from matplotlib.figure import Figure

    shown = findings.measured("methods")
    measures = [name for name in ("frechet_distance", "cas", DISTANCE) if name in shown]
    methods = dict.fromkeys(cell.method for cell in findings.cells("methods"))
    cells = sorted(findings.cells("methods"), key=lambda cell: cell.share)
    figure = Figure(figsize=(6.4 * len(measures), 4.8), layout="constrained")
    for place, measure in enumerate(measures):
        axes = figure.add_subplot(1, len(measures), place + 1)
        factor = MEASURES[measure].factor
        for number, method in enumerate(methods):
            found = [(c.share, findings.interval(c, measure)) for c in cells if c.method == method]
            points = [(share, interval) for share, interval in found if interval is not None]
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
        axes.set_ylabel(MEASURES[measure].title)
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
    for place, name in enumerate(_ABLATED):
        axes = figure.add_subplot(1, len(_ABLATED), place + 1)
        measure = MEASURES[name]
        axes.errorbar(
            [intervals[place].mean * measure.factor for _, intervals in rows],
            range(len(rows)),
            xerr=[intervals[place].half_width * measure.factor for _, intervals in rows],
            fmt="o",
            capsize=2,
        )
        axes.set_yticks(range(len(rows)), [variant for variant, _ in rows] if place == 0 else [])
        axes.tick_params(axis="y", labelsize=8)
        axes.axvline(0, color="grey", linewidth=1)
        better = "right" if measure.linear_to is None else "left"
        if measure.linear_to is not None:
            axes.set_xscale("symlog", linthresh=measure.linear_to)
        less = f"less that of {' or '.join(bases)} ({better} is better)"
        axes.set_xlabel(f"{measure.title}\n{less}")
        axes.grid(visible=True, axis="both", alpha=0.3)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
