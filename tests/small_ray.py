"""Ray without the processes that no test asks anything: they import for seconds each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from ray.cluster_utils import Cluster


def small_head(**settings: Any) -> Cluster:
    """A head of its own cluster, with no dashboard, autoscaler or monitor of logs."""
    left_out = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    return Cluster(initialize_head=True, head_node_args={**left_out, **settings})


@contextlib.contextmanager
def without_metrics() -> Iterator[None]:
    """Nodes that are started in here have the agents of a Ray that was installed by itself."""
    error = ImportError("left out")
    with mock.patch("ray._private.utils.get_dashboard_dependency_error", return_value=error):
        yield
