"""What the workers decide: the batch that fits, the precision, and what is said of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from depthvar.config import MODELS, AnyModel
from depthvar.infinity_config import INFINITY_2B
from depthvar.memory import memory_need
from depthvar.plan import DepthPlan
from depthvar.presets import make_policy
from pipeline.request.job_plan import JobPlan
from pipeline.run.left_open import Room, fitted, memory_warning, settled
from tests.fake_shards import make_plan

CASES = [
    (MODELS["var-d30"], make_policy("depthvar", reference_scale=6), "float32", 37),
    (INFINITY_2B, make_policy("depthvar-paper", reference_scale=9), "bfloat16", 12),
    (INFINITY_2B, make_policy("full"), "bfloat16", 1),
]


def plan_of(model: AnyModel, policy, precision: str, **changes) -> JobPlan:
    settings = {"samples_per_shard": 100, "batch_size": 50, **changes}
    plan = make_plan({0: 100}, policy=policy, precision=precision, **settings)
    return replace(plan, sampling=model.sampling)


def room_for(plan: JobPlan, model: AnyModel, batch: int, *, times: int = 1) -> int:
    """Bytes of the weights and of what so many images take, so many times."""
    depth = DepthPlan.build(model.grids, model.num_blocks, plan.policy)
    need = memory_need(model, depth, batch_size=batch, streams=2, precision=plan.precision)
    return need.weights + times * max(need.cache + need.sampling, need.decoding)


@pytest.mark.parametrize("records", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize(("model", "policy", "precision", "batch"), CASES)
def test_the_batch_is_the_largest_that_fits(model, policy, precision, batch, records):
    plan = plan_of(model, policy, precision)
    room = room_for(plan, model, batch, times=1 + records)
    found, told = fitted(plan, model, Room(room, records))
    assert found == replace(plan, batch_size=batch)
    assert str(told).startswith(f"batch size {batch}: 50 would need ")
    assert (" as recordings (--kernels plain makes none), a worker has " in str(told)) == records
    assert fitted(plan, model, Room(room - 1, records))[0].batch_size == max(1, batch - 1)
    assert memory_warning(found, model, Room(room, records)) is None


def test_the_default_stays_where_it_fits_and_where_nobody_knows():
    model, policy, precision, _ = CASES[0]
    plan = plan_of(model, policy, precision)
    assert fitted(plan, model, Room(room_for(plan, model, 50))) == (plan, None)
    unknown = "batch size 50: the memory of a worker is not known, --batch-size sets another"
    assert fitted(plan, model, Room(None)) == (plan, unknown)
    small = plan_of(model, policy, precision, samples_per_shard=20)
    assert fitted(small, model, Room(room_for(plan, model, 20))) == (small, None)


def test_where_no_batch_fits_one_image_is_tried_and_warned_of():
    model, policy, precision, _ = CASES[1]
    plan, told = fitted(plan_of(model, policy, precision), model, Room(10**9))
    assert plan.batch_size == 1
    assert str(told).endswith(" GB of memory, a worker has 1.0 GB")
    warning = str(memory_warning(plan, model, Room(10**9)))
    assert warning.startswith("at --batch-size 1 a worker needs about 9.8 GB of memory and has 1.0")
    assert "no batch size fits" in warning


def test_a_plan_that_is_kept_is_to_go_on_elsewhere():
    model, policy, precision, _ = CASES[1]
    plan = plan_of(model, policy, precision, batch_size=7)
    warning = str(memory_warning(plan, model, Room(room_for(plan, model, 3)), is_stored=True))
    assert warning.startswith("at the plan's batch size, 7, a worker needs about ")
    assert warning.endswith("under another --out --batch-size 3 fits")


@pytest.mark.parametrize(
    ("model", "half"), [(MODELS["var-d30"], "float16"), (INFINITY_2B, "bfloat16")]
)
def test_on_a_gpu_numbers_are_halves_unless_others_are_asked_for(model, half):
    plan = plan_of(model, make_policy("full"), "float32", batch_size=1)
    on_gpu, on_cpu = Room(10**11, is_gpu=True), Room(10**11)
    both = ["batch_size", "precision"]
    found, told = settled(plan, model, on_gpu, both)
    assert found == replace(plan, precision=half)
    assert told == [f"precision {half}, the default on GPUs: --precision sets another"]
    assert settled(plan, model, on_gpu, ["batch_size"]) == (plan, [])
    assert settled(plan, model, on_cpu, both) == (plan, [])


def test_a_batch_is_fitted_in_the_precision_that_was_decided():
    model = MODELS["var-d30"]
    plan = plan_of(model, make_policy("full"), "float32")
    halves = replace(plan, precision="float16")
    room = Room(room_for(halves, model, 20), is_gpu=True)
    found, _ = settled(plan, model, room, ["batch_size", "precision"])
    assert found == replace(halves, batch_size=20)
