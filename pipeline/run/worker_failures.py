"""What Ray's errors mean: whose fault it was that a shard was not made."""

from __future__ import annotations

import re
from typing import Literal

from ray import exceptions as ray_errors

from pipeline.run.ledger import one_line

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def cause_of(error: ray_errors.RayError) -> Literal["exception", "memory", "node", "worker"]:
    """What ended a task: its own code, the memory monitor, its node, or its process.

    A worker that nobody can reach is taken for lost with its node: of a process that dies alone,
    its node tells at once, and Ray needs a quarter of a minute to call a node dead.
    """
    if isinstance(error, ray_errors.RayTaskError):
        return "exception"
    if isinstance(error, ray_errors.OutOfMemoryError):
        return "memory"
    if isinstance(error, ray_errors.NodeDiedError | ray_errors.ActorUnavailableError):
        return "node"
    if getattr(error, "preempted", False):
        return "node"
    if isinstance(error, ray_errors.RayActorError) and "node has died" in str(error):
        return "node"
    return "worker"


def reason_of(error: ray_errors.RayError) -> str:
    """Return one line: the error that the worker raised, or what became of its process."""
    is_traceback = isinstance(error, ray_errors.RayTaskError) or getattr(
        error, "actor_init_failed", False
    )
    lines = [line.strip() for line in plain(error).splitlines() if line.strip()]
    if lines and is_traceback:
        return lines[-1]
    if cause_of(error) == "worker":
        return "its process died: it crashed, was killed, or ran out of memory"
    return one_line(error)


def storage_error_of(error: ray_errors.RayError) -> OSError | None:
    """The error of a file that a worker could not read or write, None for any other."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, OSError) else None


def plain(error: BaseException) -> str:
    """Return the error's text without the colours that Ray adds for terminals."""
    return _COLOURS.sub("", str(error))
