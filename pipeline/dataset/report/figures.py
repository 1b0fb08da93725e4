"""The report's figures as inline SVG, whose colours are the page's, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.dataset.report.progress import Timeline
from pipeline.request.job_plan import ImageCompute

# Matplotlib knows no CSS variables: each stands in its SVG as a colour that nothing else has.
_INK, _GRID, _MAIN, _OTHER, _BAD = "#010101", "#010102", "#010103", "#010104", "#010105"
_VARIABLES = {_INK: "ink", _GRID: "line", _MAIN: "main", _OTHER: "other", _BAD: "bad"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and read by screen readers
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_WIDTH, _HEIGHT = 4.8, 2.9  # inches; one of ten points is read on a phone as it is


def depth_figure(depth_per_scale: Sequence[float]) -> Markup:
    """Mean depth of the tokens of every scale."""

    def draw(axes: Any) -> None:
        axes.bar(range(len(depth_per_scale)), depth_per_scale, color=_MAIN)
        axes.set_xticks(range(len(depth_per_scale)))
        axes.set_xlabel("scale")
        axes.set_ylabel("blocks a token, mean")
        axes.grid(visible=False, axis="x")

    return _drawn("depth", draw)


def cost_figure(compute: ImageCompute) -> Markup:
    """GFLOP of an image, transformer and decoder, beside full depth."""

    def draw(axes: Any) -> None:
        names = ("this dataset", "full depth")
        transformer = np.array([compute.transformer_flops, compute.full_transformer_flops]) / 1e9
        decoder = compute.decoder_flops / 1e9
        axes.barh(names, transformer, color=_MAIN, label="transformer", height=0.6)
        axes.barh(names, decoder, left=transformer, color=_OTHER, label="decoder", height=0.6)
        axes.set_xlabel("GFLOP an image")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        _legend(axes)

    return _drawn("cost", draw, height=2.1)


def histogram(name: str, values_N: np.ndarray, label: str) -> Markup:
    """How many images have which value."""

    def draw(axes: Any) -> None:
        axes.hist(values_N, bins=40, color=_MAIN)
        axes.axvline(np.median(values_N), color=_OTHER, linewidth=2, label="median")
        axes.set_xlabel(label)
        axes.set_ylabel("images")
        _legend(axes)

    return _drawn(name, draw)


def by_scale(name: str, values_NS: np.ndarray, label: str) -> Markup:
    """Median and middle 90% of the images at every scale."""

    def draw(axes: Any) -> None:
        low, middle, high = np.percentile(values_NS, (5, 50, 95), axis=0)
        scales = np.arange(values_NS.shape[1])
        axes.fill_between(scales, low, high, color=_MAIN, alpha=0.3, label="90% of the images")
        axes.plot(scales, middle, color=_MAIN, marker="o", markersize=4, label="median")
        axes.set_xticks(scales)
        axes.set_xlabel("scale")
        axes.set_ylabel(label)
        _legend(axes)

    return _drawn(name, draw)


def throughput_figure(timeline: Timeline, failures_s: Sequence[float]) -> Markup:
    """Images per second over time, with a line where a shard failed and one at every pause."""
    unit, unit_s = next(
        (unit, unit_s)
        for unit, unit_s in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
        if timeline.working_s >= 3 * unit_s or unit_s == 1.0
    )

    def draw(axes: Any) -> None:
        axes.stairs(timeline.rate, timeline.edges_s / unit_s, fill=True, color=_MAIN, alpha=0.8)
        for places, colour, style, label in (
            ([when for when, _ in timeline.pauses], _OTHER, ":", "pause, cut out"),
            (failures_s, _BAD, "-", "a shard failed"),
        ):
            for number, place in enumerate(places):
                axes.axvline(
                    place / unit_s,
                    color=colour,
                    linestyle=style,
                    linewidth=1.6,
                    label="_" if number else label,
                )
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, timeline.working_s / unit_s)
        axes.set_xlabel(f"{unit} of work")
        axes.set_ylabel("images/s")
        if timeline.pauses or failures_s:
            _legend(axes)

    return _drawn("throughput", draw)


def stages_figure(seconds: Mapping[str, float]) -> Markup:
    """Seconds that an image took in every stage."""

    def draw(axes: Any) -> None:
        axes.barh(list(seconds), list(seconds.values()), color=_MAIN, height=0.6)
        axes.set_xlabel("seconds an image")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")

    return _drawn("stages", draw)


def _legend(axes: Any) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1))


def _drawn(name: str, draw: Callable[[Any], None], *, height: float = _HEIGHT) -> Markup:
    """A figure as an SVG element, equal bytes for equal data; ids begin with its name."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return Markup(svg.replace("<svg", '<svg aria-hidden="true"', 1))
