"""What is told to Ray; `test_driver.py` reads it back from Ray's own Prometheus endpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pipeline.run.ray_metrics import PROMETHEUS_NAMES

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
