"""What is told to Ray; `test_driver.py` reads it back from Ray's own Prometheus endpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.run import ray_metrics
from pipeline.run.progress import Tally
from pipeline.run.ray_metrics import PROMETHEUS_NAMES, RayMetrics
from pipeline.run.schedule import ShardQueue
from tests.fake_shards import make_plan

DOCS = Path(__file__).parents[3] / "docs"


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\bray_depthvar_\w+", text))


def test_the_dashboard_shows_every_metric_and_no_other():
    board = json.loads((DOCS / "grafana.json").read_text())
    shown = {t["expr"] for panel in board["panels"] for t in panel["targets"]}
    assert names_in(" ".join(shown)) == PROMETHEUS_NAMES
    (query,) = (v["query"] for v in board["templating"]["list"] if v["type"] == "query")
    assert names_in(query) <= PROMETHEUS_NAMES


def test_every_metric_is_documented():
    assert names_in((DOCS / "cluster.md").read_text()) == PROMETHEUS_NAMES


def test_numbers_are_told_twice_a_second_and_when_the_last_worker_has_left(
    monkeypatch: pytest.MonkeyPatch,
):
    now_s, told = [0.0], []

    class Metric:
        def __init__(self, name: str, *_: object) -> None:
            self.name = name

        def inc(self, value: float, tags: object) -> None:
            told.append((self.name, value))

        set = inc

    monkeypatch.setattr(ray_metrics, "Counter", Metric)
    monkeypatch.setattr(ray_metrics, "Gauge", Metric)
    monkeypatch.setattr(ray_metrics, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    metrics = RayMetrics("here")
    tally = Tally(make_plan(), ShardQueue([], 1), workers_ready=1)
    for now_s[0], tally.shards in ((10.0, 1), (10.3, 2), (10.6, 4), (10.7, 7)):
        metrics.show(tally)
    assert [value for name, value in told if name == "depthvar_shards"] == [1, 3]
    tally.workers_ready = 0
    metrics.show(tally)
    assert [value for name, value in told if name == "depthvar_shards"] == [1, 3, 3]
