"""What every test process needs before a test begins."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray starts workers when there is something to do, not some that no test has work for, and lets
# them run like everything else: as nice as they are, they would starve on a busy machine.
os.environ |= {"RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0"}
os.environ |= {"RAY_worker_niceness": "0"}
os.environ.setdefault("TRITON_INTERPRET", "1")  # read as Triton is imported: there is no GPU

import pytest

# Nothing of what is imported and collected is garbage; looking for it takes a quarter of that time.
gc.disable()

# Jobs that tests start inherit what is ignored here: under nohup, or in the background of a script.
for number, default in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

# Files that take longest, for the processes of a run to end together: these are begun first. One
# that waits for Ray (*) comes when the one before it is about done: beside it others compute.
LONGEST = (
    "tests/test_end_to_end.py",  # *
    "research/test_study.py",
    "depthvar/test_sampling.py",
    "run/test_driver.py",  # *
    "depthvar/test_memory.py",
    "training/test_run.py",
    "run/test_driver_nodes.py",  # *
    "weights/test_own_model.py",
    "research/test_evaluation.py",
    "depthvar/test_cost.py",
    "tests/test_token.py",  # *
    "depthvar/test_bundled_model.py",
    "tests/test_docs.py",
    "weights/test_checkpoint.py",
    "tests/test_faults.py",  # *
    "infinity/test_sampling.py",
    "tests/test_stores.py",  # *
    "depthvar/test_recording.py",
    "report/test_page.py",
    "text/test_t5.py",
    "jobs/test_benchmark.py",
    "run/test_regenerate.py",
    "jobs/test_jobs.py",
    "jobs/test_train_classifier.py",
    "tests/test_gpu_check.py",
    "depthvar/test_triton_pointwise.py",
    "tests/test_text_jobs.py",
    "tests/test_cluster_yaml.py",
    "weights/test_tensor_files.py",
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors run faster on one thread, and results do not vary with cores."""
    import torch  # not in the process that only hands out the tests

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.as_posix()
        return next((i for i, end in enumerate(LONGEST) if name.endswith(end)), len(LONGEST))

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session):
    result = yield
    gc.freeze()
    gc.enable()
    return result
