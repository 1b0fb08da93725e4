"""Prompts become states before any image is sampled: each once, in one process, then kept."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from depthvar.errors import InputError
from pipeline.request.job_plan import JobPlan
from pipeline.request.text import find_text
from pipeline.run.worker import Workplace, resolve_device
from pipeline.shards.text_states import TextStates
from pipeline.storage import Storage

_FILE_PROMPTS = 64  # and the most that is made again after a crash


def missing_prompts(plan: JobPlan, out: str) -> list[str]:
    """The prompts of a plan whose states an output lacks. Errors: `OSError`."""
    if plan.text_encoder_sha256 is None:
        return []
    states = TextStates(Storage.open(out), plan.text_encoder_sha256)
    return states.missing(plan.distinct_prompts())


def encode_missing(plan: JobPlan, place: Workplace) -> Iterator[int]:
    """Encode what the output lacks, file by file; yields how many prompts each one holds.

    A file is published whole before it is counted, and which prompts are encoded together follows
    from the plan: an encoding that is taken up again gives the same bytes. The encoder is gone from
    memory at the end. Errors: `InputError` for another encoder than was planned, `OSError`.
    """
    assert plan.text_encoder_sha256 is not None, "a plan without prompts lacks none"
    source = find_text(place.text_encoder, place.text_states)
    if source.sha256 != plan.text_encoder_sha256:
        raise InputError(
            f"the text encoder on {socket.gethostname()} has SHA-256 {source.sha256}, the plan has"
            f" {plan.text_encoder_sha256}: give every machine the same files"
        )
    states = TextStates(Storage.open(place.out), plan.text_encoder_sha256)
    missing = states.missing(plan.distinct_prompts())
    # As published: in half precision wherever the images are made so.
    is_half = plan.precision != "float32"
    encode = source.load(resolve_device(place.device), half=is_half, threads=place.threads)
    for start in range(0, len(missing), _FILE_PROMPTS):
        prompts = missing[start : start + _FILE_PROMPTS]
        states.publish(prompts, encode(prompts))
        yield len(prompts)
