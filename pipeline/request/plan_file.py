"""`plan.json` in a dataset: written once, compared with what every later run wants.

The same plan goes on, another is refused with a field-by-field difference, a larger one may be
appended as a segment.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from depthvar.errors import InputError, advice
from pipeline.faults import reach
from pipeline.request.job_plan import JobPlan
from pipeline.storage import Storage

PLAN_NAME = "plan.json"


def read_plan(storage: Storage) -> JobPlan | None:
    """The stored plan; None where the output is still empty. Writes nothing.

    Errors: `InputError` for a plan that is damaged, and for files that belong to something else.
    """
    data = _read_plan_file(storage)
    if data is None:
        if storage.is_empty():
            return None
        # Another run may have begun since the first look: it writes its plan before all else.
        data = _read_plan_file(storage)
    if data is None:
        raise InputError(
            f"got {storage}, which holds files but no {PLAN_NAME}, wanted an empty folder or "
            "an earlier output of this job: choose another output"
        )
    return _parsed(data, storage, "restore it or choose another output")


def stored_plan(storage: Storage) -> JobPlan:
    """The plan of a dataset that is there to be read.

    Errors: `InputError` where there is none, saying what is there instead, or it is damaged.
    """
    folder = Path(storage.root)
    if storage.is_local and not folder.is_dir():
        raise InputError(
            f"got {storage}, which {_no_folder(folder)}, wanted a dataset's folder: check the path"
        )
    data = _read_plan_file(storage)
    if data is None and storage.is_empty():
        what = "is empty" if storage.is_local else "does not exist"
        raise InputError(f"got {storage}, which {what}, wanted a dataset: generate one first")
    if data is None:
        near = _datasets_near(folder) if storage.is_local else []
        hint = f"name {' or '.join(near)}" if near else "name the folder that generate wrote"
        raise InputError(f"got {storage}, which holds no {PLAN_NAME}, wanted a dataset: {hint}")
    return _parsed(data, storage, "restore it from a copy")


def _no_folder(path: Path) -> str:
    if path.exists():
        return "is a file"
    return "is a broken symbolic link" if path.is_symlink() else "does not exist"


def _datasets_near(folder: Path) -> list[str]:
    """The dataset that a folder is a part of, or a few of those directly inside it."""
    near = [folder.parent] if (folder.parent / PLAN_NAME).is_file() else []
    return [
        str(found) for found in near or sorted(f.parent for f in folder.glob(f"*/{PLAN_NAME}"))[:3]
    ]


def _parsed(data: bytes, storage: Storage, todo: str) -> JobPlan:
    try:
        return JobPlan.from_json(data)
    except InputError as error:
        raise InputError(
            f"got {storage}/{PLAN_NAME}, which is damaged or of another program: {error}; {todo}"
        ) from error


def _read_plan_file(storage: Storage) -> bytes | None:
    try:
        return storage.read(PLAN_NAME)
    except FileNotFoundError:
        return None
    except OSError as error:
        todo = advice(error, f"{storage}/{PLAN_NAME}")
        raise InputError(
            f"got {storage}, whose {PLAN_NAME} cannot be read ({error}): {todo}"
        ) from error


def check_output(
    storage: Storage, plan: JobPlan, *, extend: bool = False, left_open: Collection[str] = ()
) -> JobPlan | None:
    """The plan to go on with, or None for a fresh output. Writes nothing.

    Of the fields that are `left_open` the stored ones are as good as any. With `extend`, a plan
    that differs only by more samples, or by prompts behind the stored ones, gives the stored one
    with a segment more. Errors: `InputError` for an output with another plan, a foreign or
    unwritable output.
    """
    storage.check_writable()
    stored = read_plan(storage)
    if stored is None:
        return None
    return _agreed(storage, stored, plan, extend=extend, left_open=left_open)


def _agreed(
    storage: Storage,
    stored: JobPlan,
    plan: JobPlan,
    *,
    extend: bool = False,
    left_open: Collection[str] = (),
) -> JobPlan:
    """What a run that wants `plan` goes on with where another is stored; else `InputError`."""
    plan = replace(plan, **{name: getattr(stored, name) for name in left_open})
    differences = stored.difference(plan, str(storage))
    if not differences:
        return stored
    can_extend = stored.begins(plan)
    if can_extend and extend:
        return stored.extended_to(plan)
    hint = "resume with the old configuration or choose a new output"
    if can_extend and stored.is_covered_by(plan.total_counts):
        hint = "add --extend to keep what is there and make the rest, or choose a new output"
    if extend and stored.prompts != plan.prompts:
        hint = "--extend adds classes and prompts behind those that are there, in the same"
        hint += " templates: do so, or choose a new output"
    raise InputError(f"{'; '.join(differences)}: {hint}")


def open_plan(storage: Storage, plan: JobPlan, *, left_open: Collection[str] = ()) -> JobPlan:
    """The plan to work by, stored in the output: written by the first run, kept by later ones.

    `left_open` as of `check_output`. A plan that continues the stored one takes its place. Errors:
    as `read_plan`; also `InputError` where plan.json cannot be written, or where another run with
    another plan started meanwhile.
    """
    stored = read_plan(storage)
    if stored is None or plan.continues(stored):
        _write_plan(storage, plan, is_new=stored is None)
        stored = read_plan(storage)
        assert stored is not None, "plan.json was written"
    return _agreed(storage, stored, plan, left_open=left_open)


def _write_plan(storage: Storage, plan: JobPlan, *, is_new: bool) -> None:
    write = storage.create if is_new else storage.publish_bytes
    reach("plan-wanted")
    try:
        write(plan.to_json(), PLAN_NAME)
    except OSError as error:
        raise InputError(
            f"got the output {storage}, which cannot be written ({error}): "
            f"{advice(error, str(storage))}, then run it again"
        ) from error
    reach("plan-written")
