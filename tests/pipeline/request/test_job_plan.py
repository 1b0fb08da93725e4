from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthvar.errors import InputError
from depthvar.presets import make_policy
from depthvar.settings import SamplingSettings
from pipeline.request.generation import GenerateConfig
from pipeline.request.job import plan_job
from pipeline.request.job_plan import FormerPolicy, JobPlan, key_of, policy_fields
from tests.fake_shards import make_plan


def test_shards_cover_every_index_once_and_hold_the_planned_labels():
    plan = make_plan()
    shards = [plan.shard(i) for i in range(plan.num_shards)]
    assert [(s.start, s.stop) for s in shards] == [(0, 9), (9, 18), (18, 22)]
    labels = np.concatenate([s.labels for s in shards])
    assert Counter(labels.tolist()) == plan.total_counts.as_mapping()


def test_micro_batches_are_fixed_by_the_plan():
    assert make_plan().shard(1).micro_batches == [(9, 13), (13, 17), (17, 18)]


def test_a_shard_outside_the_plan_is_an_index_error():
    with pytest.raises(IndexError):
        make_plan().shard(3)


def test_keys_sort_as_their_numbers_and_have_no_dot():
    keys = [key_of(i) for i in (0, 9, 10, 10**12 - 1)]
    assert keys == sorted(keys)
    assert {len(key) for key in keys} == {12}


def test_a_billion_samples_of_a_thousand_classes_are_planned_in_no_time():
    names = tuple(f"class {i}" for i in range(1000))
    started = time.process_time()
    plan = make_plan(dict.fromkeys(range(1000), 10**6), class_names=names, samples_per_shard=1000)
    shard = plan.shard(777_777)
    plan.shard_fingerprint(777_777)
    assert time.process_time() - started < 1
    assert plan.num_shards == 10**6
    assert sorted(shard.labels.tolist()) == list(range(1000))


def test_a_plan_without_depth_maps_is_spelt_as_it_was_before_there_were_any():
    plain, mapped = make_plan(), make_plan(depth_map_grids=((1, 1), (2, 2), (3, 3)))
    assert b"depth_map" not in plain.to_json()
    assert plain.fingerprint != mapped.fingerprint
    assert JobPlan.from_json(mapped.to_json()) == mapped


def test_the_plan_survives_json():
    plan = make_plan()
    again = JobPlan.from_json(plan.to_json())
    assert again == plan
    assert again.fingerprint == plan.fingerprint


STORED_PLANS = Path(__file__).parents[2] / "stored_plans"
FINGERPRINTS = {
    "depthvar": "ffd4b2b340c45645069071545e1e7389f0a539657d8737918f8517d8aab48da1",
    "random_depth": "25fc42101ca5fe07194639c7ee1bbf20916274bd773fa435c58c90dfba509270",
}
"""Of plans that an earlier release wrote: its commit records carry them."""


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_a_plan_of_an_earlier_release_is_read_and_written_byte_for_byte(name):
    data = (STORED_PLANS / f"{name}.json").read_bytes()
    plan, stored = JobPlan.from_json(data), json.loads(data)["settings"]
    assert plan.to_json() == data
    assert plan.fingerprint == FINGERPRINTS[name]
    assert json.loads(plan.policy_json) == stored["policy"]
    assert (plan.policy.preset, plan.policy.reference_scale) == (stored["policy"]["preset"], 3)
    assert plan.sampling == SamplingSettings(cfg=2.0, top_k=0, top_p=0.98)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_the_same_request_gives_the_plan_that_an_earlier_release_stored(tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("0,6\n3,10\n7,20\n")
    plan, model = plan_job(
        GenerateConfig(
            out="out", labels_file=labels, reference_scale=3, samples_per_shard=12, batch_size=4
        )
    )
    assert plan.to_json() == (STORED_PLANS / "depthvar.json").read_bytes()
    assert plan.runnable_policy == make_policy("depthvar", reference_scale=3)
    assert model.image_size == plan.image_size


@pytest.mark.parametrize(
    "changes", [{"gain": 0.5}, {"ranking": "by-hand"}, {"steepness": 1}, {"min_depth": "0"}]
)
def test_a_policy_that_is_not_of_this_release_is_kept_and_not_run(changes):
    fields = {**policy_fields(make_policy("uniform", reference_scale=2)), **changes}
    plan = make_plan(policy=FormerPolicy(fields))
    again = JobPlan.from_json(plan.to_json())
    assert again == plan
    assert again.fingerprint == plan.fingerprint
    assert (again.policy.preset, again.policy.reference_scale) == ("uniform", 2)
    assert json.loads(again.policy_json) == fields
    with pytest.raises(InputError, match="'uniform' of another release"):
        _ = again.runnable_policy


def test_a_policy_with_a_field_that_older_plans_lack_comes_back():
    plan = make_plan(policy=make_policy("fastvar"))
    assert json.loads(plan.policy_json)["mean_depths"] == [0.6, 0.5]
    again = JobPlan.from_json(plan.to_json())
    assert again.runnable_policy == make_policy("fastvar")
    assert again.fingerprint == plan.fingerprint


def test_the_png_level_is_stored_where_it_is_not_the_one_of_older_plans():
    assert b"png_level" not in make_plan(png_level=6).to_json()
    assert make_plan(png_level=6).fingerprint == make_plan().fingerprint
    plan = make_plan(png_level=1)
    assert json.loads(plan.to_json())["settings"]["png_level"] == 1
    assert JobPlan.from_json(plan.to_json()) == plan


def test_equal_numbers_of_another_type_are_the_same_plan():
    plan = make_plan(sampling=SamplingSettings(cfg=2.0))
    stored = plan.to_json()
    assert b'"cfg": 2.0' in stored
    assert JobPlan.from_json(stored.replace(b'"cfg": 2.0', b'"cfg": 2')) == plan


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6}, {"sampling": SamplingSettings(1.6, 90, 0.96)}, {"weights_sha256": "cd" * 32},
        {"batch_size": 5}, {"policy": make_policy("full")}, {"image_format": "webp"},
        {"png_level": 1},
    ],
)  # fmt: skip
def test_every_setting_changes_every_fingerprint(change):
    plan, other = make_plan(), make_plan(**change)
    assert plan.fingerprint != other.fingerprint
    assert plan.shard_fingerprint(0) != other.shard_fingerprint(0)


def test_the_difference_names_the_fields_and_both_values():
    stored = make_plan()
    policy = replace(stored.runnable_policy, compensation=False)
    other = make_plan({0: 8, 1: 9}, seed=1, policy=policy, png_level=1)
    assert stored.difference(stored) == []
    assert stored.difference(other, "out") == [
        "policy.compensation: out has true, this run has false",
        "seed: out has 5, this run has 1",
        "png_level: out has 6, this run has 1",
        "samples of class 1: out has 6, this run has 9",
        "samples of class 2: out has 8, this run has 0",
    ]


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"seed": 2**63}, {"samples_per_shard": 0}, {"batch_size": -1},
     {"image_format": "gif"}, {"image_channels": 2}, {"class_names": ("a", "b")},
     {"policy": FormerPolicy({"preset": "full"})}, {"weights_sha256": "sha256:ab"},
     {"precision": "int8"}, {"png_level": 10}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(InputError):
        JobPlan.from_json(make_plan(**change).to_json())


def test_extending_keeps_shards_labels_and_fingerprints():
    plan = make_plan()
    longer = plan.extended_to(make_plan({0: 20, 1: 6, 2: 8, 3: 1}))
    assert longer.num_samples == 35
    assert longer.fingerprint != plan.fingerprint
    for shard_id in range(plan.num_shards):
        assert longer.shard_fingerprint(shard_id) == plan.shard_fingerprint(shard_id)
        assert longer.shard(shard_id).labels.tolist() == plan.shard(shard_id).labels.tolist()
    new = [longer.shard(i) for i in range(plan.num_shards, longer.num_shards)]
    assert [(s.start, s.stop) for s in new] == [(22, 31), (31, 35)]
    assert Counter(np.concatenate([s.labels for s in new]).tolist()) == {0: 12, 3: 1}


def test_a_dataset_does_not_shrink():
    with pytest.raises(InputError, match="can grow, not shrink"):
        make_plan().extended_to(make_plan({0: 8, 1: 5, 2: 8}))


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_raise_an_input_error(data):
    with pytest.raises(InputError):
        JobPlan.from_json(data)


def test_any_edit_of_plan_json_is_noticed():
    stored = json.loads(make_plan().to_json())
    edits = [
        {**stored, "extra": 1},
        {**stored, "settings": {**stored["settings"], "seed": 6}},
        {**stored, "settings": {**stored["settings"], "seed": "5"}},
        {**stored, "segments": []},
        {**stored, "fingerprint": "0" * 64},
        {name: value for name, value in stored.items() if name != "settings"},
    ]
    for edit in edits:
        with pytest.raises(InputError):
            JobPlan.from_json(json.dumps(edit).encode())
