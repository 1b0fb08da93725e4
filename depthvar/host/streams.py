"""Standard streams that a job outlives: whoever reads what it prints may go away at any time."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

_STDOUT, _STDERR = 1, 2


def hold_descriptors() -> None:
    """Put /dev/null where a standard stream is closed, before another file gets its number.

    What is then printed there, by C libraries and child processes too, would go into that file.
    """
    for descriptor in (0, _STDOUT, _STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is this one: those below are open.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def outlive_readers() -> None:
    """Let standard output and error go on into nothing once they cannot be written any more.

    A pipe whose reader has left, a terminal that is gone, a full disk: printing never raises, not
    at the interpreter's end either. Characters that the encoding lacks are escaped. Streams that
    were replaced, as by a test, stay as they are.
    """
    for name, descriptor in (("stdout", _STDOUT), ("stderr", _STDERR)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        is_open = isinstance(stream, io.TextIOWrapper)
        if is_open:
            with contextlib.suppress(OSError):
                stream.flush()
        lasting = _LastingStream(
            io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False)),
            encoding=stream.encoding if is_open else "utf-8",
            errors="backslashreplace",
            # Ray starts drivers unbuffered, so that their lines are seen when they are said.
            line_buffering=is_open and (stream.line_buffering or stream.write_through),
        )
        setattr(sys, name, lasting)


class _LastingStream(io.TextIOWrapper):
    """Text to a descriptor that becomes /dev/null when it cannot be written."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if isinstance(error, BlockingIOError):  # full for the moment: this much is passed over
            return
        with contextlib.suppress(OSError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            super().flush()  # what is waiting goes there too
        if self.fileno() == _STDOUT and error.errno != errno.EPIPE:
            print(
                f"warning: the output cannot be written ({error.strerror}): going on without it",
                file=sys.stderr,
            )
