"""What every test process needs before a test begins."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Small tensors run faster on one thread, and results do not vary with cores.
torch.set_num_threads(1)

# Jobs that tests start inherit what is ignored here: under nohup, or in the background of a script.
for number, default in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

# Files that take longest, for the processes of a run to end together: these are begun first.
LONGEST = (
    "research/test_study.py",
    "tests/test_end_to_end.py",
    "run/test_driver.py",
    "run/test_driver_nodes.py",
    "tests/test_faults.py",
    "weights/test_own_model.py",
    "training/test_run.py",
    "research/test_evaluation.py",
    "tests/test_stores.py",
    "tests/test_token.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.as_posix()
        return next((i for i, end in enumerate(LONGEST) if name.endswith(end)), len(LONGEST))

    items.sort(key=place)
