"""Imported once, for all the jobs that `tests.forked_job` forks."""

import importlib
import sys

from tests.fakes import STAND_INS

sys.path.insert(0, str(STAND_INS))
for module in ("jobs._entry", "tests.fake_job", "pipeline.run.ray_crew", "PIL.PngImagePlugin"):
    importlib.import_module(module)
