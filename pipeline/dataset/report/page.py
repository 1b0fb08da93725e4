"""The survey as one HTML file: images as data URIs, figures as inline SVG, no script, no network.

Equal datasets give equal bytes: nothing of the moment or the machine of the report goes in.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image

from depthvar.host.rate import duration
from pipeline.dataset.report import figures
from pipeline.dataset.report.progress import Timeline, stage_seconds, worker_lines
from pipeline.dataset.report.survey import Picture, Rows, Survey, spread
from pipeline.shards.committed import mixed_environments

_TEMPLATE = "page.html.jinja"
_SMALL_SIDE, _SHOWN_SIDE = 64, 192  # pixels: small images are kept, large ones shrink to this
_MAX_MAPS, _TILE_SIDE, _TILE_GAP = 10, 64, 6  # pixels
_MAX_ROWS = 200  # of a table


@dataclass(frozen=True)
class Figure:
    """An SVG with what it shows in words."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class SubjectLine:
    """A class or a prompt in the table: of the rows that were read, None where there are none."""

    name: str
    planned: int
    committed: int
    tflop: float
    certainty: float | None
    change: float | None


def render(survey: Survey) -> bytes:
    """The page."""
    environment = Environment(
        loader=PackageLoader("pipeline.dataset.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["depth_strip"] = depth_strip
    environment.filters["duration"] = duration
    records = list(survey.records.values())
    values: dict[str, Any] = {
        "survey": survey,
        "plan": survey.plan,
        "mapped": [p for _, shown in survey.by_subject for p in shown[:1] if p.depths][:_MAX_MAPS],
        "num_bytes": sum(r.files.tar.size + r.files.parquet.size for r in records),
        "timeline": Timeline.of(records) if records else None,
        "subject_lines": list(_subject_lines(survey)),
        "num_subjects": len(survey.plan.subject_counts),
        "subject_words": survey.plan.subject_words,
        "workers": worker_lines(records)[:_MAX_ROWS],
        "num_workers": len({record.worker for record in records}),
        "num_blank": sum(record.num_blank for record in records),
        "num_duplicates": sum(record.num_duplicates for record in records),
        "num_again": sum(record.attempt > 1 for record in records),
        "failures": spread(survey.failures, _MAX_ROWS),
        "mixed": mixed_environments(records),
        "made_with": records[0].made_with if records else {},
        "settings": dict(_settings(survey.plan.settings_as_stored)),
        "scope": _scope(survey.rows),
        "is_small": max(survey.plan.image_size) <= _SMALL_SIDE,
        "is_shrunk": max(survey.plan.image_size) > _SHOWN_SIDE,
        **_figures(survey),
    }
    return (environment.get_template(_TEMPLATE).render(values) + "\n").encode()


def _scope(rows: Rows | None) -> dict[str, int]:
    """Of how many shards the rows and the images are, and from how many images these are chosen."""
    if rows is None:
        return {"row_shards": 0, "shards": 0, "candidates": 0}
    with_images = rows.shard_N[rows.has_image_N]
    return {
        "row_shards": len(set(rows.shard_N.tolist())),
        "shards": len(set(with_images.tolist())),
        "candidates": len(with_images),
    }


def data_uri(picture: Picture) -> str:
    """The image for the page: small ones without loss, large ones smaller and as JPEG."""
    pixels = picture.image_HWC
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if image.width <= _SMALL_SIDE:
        return _encoded(image, "PNG", optimize=True)
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.LANCZOS)
    return _encoded(image, "JPEG", quality=85)


def depth_strip(picture: Picture) -> str:
    """How deep an image's tokens ran, as one picture: the sum over the scales, then every scale.

    The brightest is the most blocks that a token of the image ran, at every scale.
    """
    maps = [_tile(depths) for depths in picture.depths]
    most = max(1.0, float(np.max(maps)))
    tiles = [np.mean(maps, axis=0), *maps]
    step = _TILE_SIDE + _TILE_GAP
    strip = Image.new("RGBA", (len(tiles) * step - _TILE_GAP, _TILE_SIDE))
    for place, tile in enumerate(tiles):
        colours = colormaps["viridis"](tile / most, bytes=True)
        strip.paste(Image.fromarray(colours), (place * step, 0))
    return _encoded(strip, "PNG", optimize=True)


def _tile(depths: np.ndarray) -> np.ndarray:
    """A map grown or shrunk to the side of a tile: every pixel is that of the token over it."""
    rows, columns = (
        (2 * np.arange(_TILE_SIDE) + 1) * length // (2 * _TILE_SIDE) for length in depths.shape
    )
    return np.asarray(depths[np.ix_(rows, columns)], dtype=np.float64)


def _encoded(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _subject_lines(survey: Survey) -> Iterator[SubjectLine]:
    plan, rows = survey.plan, survey.rows
    planned, committed = plan.subject_counts, survey.committed_counts()
    flop = plan.compute.transformer_flops + plan.compute.decoder_flops
    for subject in spread(list(planned), _MAX_ROWS):
        certainty = change = None
        if rows is not None and (mine := rows.subject_N == subject).any():
            certainty = float(rows.certainty_N[mine].mean())
            change = float(rows.change_NS[mine].mean())
        count = committed[subject]
        yield SubjectLine(
            plan.subject_name(subject),
            planned[subject],
            count,
            count * flop / 1e12,
            certainty,
            change,
        )


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its dotted name; what other parts of the page show is left out."""
    for name, value in values.items():
        if name in ("class_names", "compute", "texts", "class_ids", "descriptions"):
            continue
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value)


def _figures(survey: Survey) -> dict[str, list[Figure]]:
    """The figures of every section; those that need rows or records only where there are some."""
    compute = survey.plan.compute
    saved = 1 - compute.flops_ratio
    found = {
        "compute_figures": [
            Figure(
                figures.depth_figure(compute.depth_per_scale),
                "Transformer blocks that a token of each scale runs, mean over its tokens: "
                + ", ".join(f"{depth:.3g}" for depth in compute.depth_per_scale),
            ),
            Figure(
                figures.cost_figure(compute),
                f"Operations of an image, guidance included: {saved:.0%} less than at full depth",
            ),
        ],
        "signal_figures": [] if survey.rows is None else list(_signal_figures(survey.rows)),
        "throughput_figures": [],
    }
    if survey.records:
        timeline = Timeline.of(survey.records.values())
        places = [timeline.place(failure.at) for failure in survey.failures]
        mean = survey.num_samples / timeline.working_s
        stages = stage_seconds(survey.records.values())
        found["throughput_figures"] = [
            Figure(
                figures.throughput_figure(timeline, places),
                f"Images per second of all workers together, {mean:.3g} in the mean",
            ),
            Figure(
                figures.stages_figure(stages),
                "Seconds of one worker for an image (encoding runs beside the others): "
                + ", ".join(f"{name} {seconds:.3g}" for name, seconds in stages.items()),
            ),
        ]
    return found


def _signal_figures(rows: Rows) -> Iterator[Figure]:
    for name, values_NS, label, what in (
        ("certainty", rows.log_prob_NS, "log-probability, nat", "Log-probability of the tokens"),
        ("change", rows.change_NS, "mean change", "Mean change, by which tokens are ranked"),
    ):
        by_image = values_NS.mean(axis=1)
        yield Figure(
            figures.histogram(name, by_image, label),
            f"{what}, mean over the scales: {by_image.min():.3g} to {by_image.max():.3g}",
        )
        yield Figure(figures.by_scale(f"{name}-scale", values_NS, label), f"{what}, scale by scale")
