"""How every job ends: mistakes in one line each and exit code 2, everything else its own code."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from depthvar.errors import InputError, advice
from depthvar.host.streams import outlive_readers

EXIT_DONE = 0
EXIT_INCOMPLETE = 1
EXIT_BAD_INPUT = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S = 3.0


def run_job(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with its code; an `InputError` becomes `error:` lines and code 2.

    Files that cannot be read or written, a store that does not answer: one line for what happened,
    one for what to do, and code 1.
    Ctrl-C, SIGTERM and SIGHUP at a moment when nothing has to be put in order end the job with code
    128 and their number, unless they were ignored from the start, as SIGHUP is under `nohup`.
    Output that cannot be written any more changes nothing of it.
    """
    outlive_readers()
    try:
        with _stopped_by_signals():
            code = main()
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except OSError as error:
        reason = " ".join(str(error).split())
        print(f"error: {type(error).__name__}: {reason}", file=sys.stderr)
        print(
            f"nothing that was committed is lost: {advice(error)}, then run the same command again",
            file=sys.stderr,
        )
        code = EXIT_INCOMPLETE
    except _Stopped as stopped:
        print("stopped", file=sys.stderr)
        code = 128 + stopped.number
    sys.exit(code)


class _Stopped(KeyboardInterrupt):
    """A signal asked the job to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise `_Stopped` in the main thread when a signal comes that was not ignored before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    job = os.getpid()

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        if os.getpid() != job:  # a fork, which inherits this
            os._exit(128 + number)
        signal.signal(number, signal.SIG_DFL)  # the next one ends the job at once
        for process in multiprocessing.active_children():
            if not process.daemon:  # it would be waited for
                process.terminate()
        raise _Stopped(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    taken = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    except _Stopped:
        _end_children()
        raise
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def _end_children() -> None:
    """End the processes of this one: asked again, for a fork loses a signal that comes too early.

    Python would wait at its exit without end for one that did not hear it.
    """
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    deadline_s = time.monotonic() + _GRACE_S
    for child in children:
        child.join(max(0.0, deadline_s - time.monotonic()))
        if child.is_alive():
            child.kill()
