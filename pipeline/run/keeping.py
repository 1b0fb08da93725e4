"""The summaries of commit records, written while a run goes on: whoever resumes it reads few."""

from __future__ import annotations

import contextlib
import threading

from pipeline.request.job_plan import JobPlan
from pipeline.run.progress import Tally
from pipeline.shards.committed import FEWEST_KEPT, keep_summaries
from pipeline.storage import Storage

_SHARE = 20  # the part of all committed shards whose records may be left to read


class SummaryKeeper:
    """A view of a run that has the summaries written beside it, seldom enough to cost little.

    First when the run begins, then whenever a twentieth of what is committed has been added.
    """

    def __init__(self, storage: Storage, plan: JobPlan) -> None:
        self._storage, self._plan = storage, plan
        self._num_kept = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SummaryKeeper:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()

    def show(self, tally: Tally) -> None:
        """Have them written if it is time to; never waits for it."""
        num_done = tally.shards_before + tally.shards
        if num_done - self._num_kept < max(FEWEST_KEPT, num_done // _SHARE):
            return
        if self._thread is None or not self._thread.is_alive():
            self._num_kept = num_done
            self._thread = threading.Thread(target=self._keep, name="summaries")
            self._thread.start()

    def _keep(self) -> None:
        with contextlib.suppress(OSError):  # the next time, or when the run ends
            keep_summaries(self._storage, self._plan)
