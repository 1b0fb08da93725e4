from __future__ import annotations

import json
import pickle
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthvar.config import SamplingSettings
from depthvar.errors import InputError
from depthvar.policy import make_policy
from pipeline.request.labels import LabelCounts
from pipeline.request.plan import (
    FormerPolicy,
    JobPlan,
    check_output,
    key_of,
    open_plan,
    policy_fields,
    read_plan,
)
from pipeline.storage import Storage
from tests.fake_shards import make_plan, object_store


@pytest.fixture(params=["disk", "store"])
def storage(request, tmp_path) -> Storage:
    return Storage.open(str(tmp_path / "o")) if request.param == "disk" else object_store()


def opened(storage: Storage, plan: JobPlan, *, extend: bool) -> JobPlan:
    return open_plan(storage, check_output(storage, plan, extend=extend) or plan)


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
    started = time.perf_counter()
    plan = make_plan(dict.fromkeys(range(1000), 10**6), class_names=names, samples_per_shard=1000)
    shard = plan.shard(777_777)
    plan.shard_fingerprint(777_777)
    assert time.perf_counter() - started < 1
    assert plan.num_shards == 10**6
    assert sorted(shard.labels.tolist()) == list(range(1000))


def test_the_plan_survives_json():
    plan = make_plan()
    again = JobPlan.from_json(plan.to_json())
    assert again == plan
    assert again.fingerprint == plan.fingerprint


STORED = {
    "depthvar": "ffd4b2b340c45645069071545e1e7389f0a539657d8737918f8517d8aab48da1",
    "random_depth": "25fc42101ca5fe07194639c7ee1bbf20916274bd773fa435c58c90dfba509270",
}
"""Plans that earlier releases wrote, with the fingerprints that their commit records carry."""


@pytest.mark.parametrize("name", STORED)
def test_a_plan_of_an_earlier_release_is_read_and_written_byte_for_byte(name):
    data = (Path(__file__).parents[2] / "stored_plans" / f"{name}.json").read_bytes()
    plan, stored = JobPlan.from_json(data), json.loads(data)["settings"]
    assert plan.to_json() == data
    assert plan.fingerprint == STORED[name]
    assert json.loads(plan.policy_json) == stored["policy"]
    assert (plan.policy.preset, plan.policy.reference_scale) == (stored["policy"]["preset"], 3)
    assert plan.sampling == SamplingSettings(cfg=2.0, top_k=0, top_p=0.98)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_stored_policy_is_the_policy_that_was_asked_for():
    data = (Path(__file__).parents[2] / "stored_plans" / "depthvar.json").read_bytes()
    assert JobPlan.from_json(data).runnable_policy == make_policy("depthvar", reference_scale=3)


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
    ],
)  # fmt: skip
def test_every_setting_changes_every_fingerprint(change):
    plan, other = make_plan(), make_plan(**change)
    assert plan.fingerprint != other.fingerprint
    assert plan.shard_fingerprint(0) != other.shard_fingerprint(0)


def test_the_difference_names_the_fields_and_both_values():
    stored = make_plan()
    policy = replace(stored.runnable_policy, compensation=False)
    other = make_plan({0: 8, 1: 9}, seed=1, policy=policy)
    assert stored.difference(stored) == []
    assert stored.difference(other, "out") == [
        "policy.compensation: out has true, this run has false",
        "seed: out has 5, this run has 1",
        "samples of class 1: out has 6, this run has 9",
        "samples of class 2: out has 8, this run has 0",
    ]


@pytest.mark.parametrize(
    "change",
    [{"seed": -1}, {"seed": 2**63}, {"samples_per_shard": 0}, {"batch_size": -1},
     {"image_format": "gif"}, {"image_channels": 2}, {"class_names": ("a", "b")},
     {"policy": FormerPolicy({"preset": "full"})}, {"weights_sha256": "sha256:ab"},
     {"precision": "int8"}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(InputError):
        JobPlan.from_json(make_plan(**change).to_json())


def test_extending_keeps_shards_labels_and_fingerprints():
    plan = make_plan()
    longer = plan.extended_to(LabelCounts.from_mapping({0: 20, 1: 6, 2: 8, 3: 1}))
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
        make_plan().extended_to(LabelCounts.from_mapping({0: 8, 1: 5, 2: 8}))


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


def test_the_first_run_writes_the_plan_and_the_next_goes_on_with_it(storage):
    plan = make_plan()
    assert check_output(storage, plan) is None
    assert read_plan(storage) is None
    assert open_plan(storage, plan) == plan
    written = storage.read("plan.json")
    assert open_plan(storage, plan) == plan
    assert storage.read("plan.json") == written == plan.to_json()


def test_checking_an_output_writes_nothing(tmp_path):
    check_output(Storage.open(str(tmp_path / "out")), make_plan())
    assert not (tmp_path / "out").exists()


def test_another_plan_over_the_same_output_is_refused(storage):
    open_plan(storage, make_plan())
    before = storage.read("plan.json")
    with pytest.raises(InputError, match=r"seed: .* has 5, this run has 6: resume with"):
        open_plan(storage, make_plan(seed=6))
    assert storage.read("plan.json") == before


def test_a_foreign_output_is_refused_and_left_alone(storage):
    storage.publish_bytes(b"mine", "thesis.tex")
    with pytest.raises(InputError, match=r"no plan\.json"):
        open_plan(storage, make_plan())
    assert storage.list("") == {"thesis.tex": 4}


def test_a_folder_with_nothing_but_folders_is_foreign_too(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match="choose another output"):
        check_output(Storage.open(str(tmp_path)), make_plan())


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\x00", make_plan().to_json()[:-40]])
def test_a_damaged_plan_is_refused(storage, data):
    storage.publish_bytes(data, "plan.json")
    with pytest.raises(InputError, match="damaged or of another program"):
        open_plan(storage, make_plan())


def test_more_samples_are_appended_only_when_asked(storage):
    plan, larger = open_plan(storage, make_plan()), make_plan({0: 9, 1: 6, 2: 8, 3: 4})
    with pytest.raises(InputError, match="samples of class 0"):
        open_plan(storage, larger)
    extended = opened(storage, larger, extend=True)
    assert len(extended.segments) == 2
    assert extended.num_samples == larger.num_samples
    assert open_plan(storage, larger) == extended == read_plan(storage)
    assert opened(storage, larger, extend=True) == extended
    with pytest.raises(InputError):
        open_plan(storage, plan)


def test_extending_with_another_setting_is_refused(storage):
    open_plan(storage, make_plan())
    with pytest.raises(InputError, match="seed"):
        opened(storage, make_plan({0: 99, 1: 6, 2: 8}, seed=6), extend=True)


def test_an_output_that_cannot_be_written_is_an_input_error(tmp_path, monkeypatch):
    def refuse(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Storage, "create", refuse)
    with pytest.raises(InputError, match="cannot be written"):
        open_plan(Storage.open(str(tmp_path / "out")), make_plan())


def test_a_plan_written_between_two_looks_at_the_output_is_found(storage, monkeypatch):
    """The file is not there yet, and by the time the folder is listed another run has begun."""
    plan, is_empty = make_plan(), Storage.is_empty

    def look(self: Storage) -> bool:
        self.create(plan.to_json(), "plan.json")
        return is_empty(self)

    monkeypatch.setattr(Storage, "is_empty", look)
    assert open_plan(storage, plan) == plan


def test_of_two_plans_started_at_once_one_wins_and_the_other_is_told(tmp_path):
    storage = Storage.open(str(tmp_path / "out"))
    plans = [make_plan(seed=seed) for seed in range(6)]
    agreed: list[JobPlan] = []
    refused: list[InputError] = []

    def start(plan: JobPlan) -> None:
        try:
            agreed.append(open_plan(storage, plan))
        except InputError as error:
            refused.append(error)

    threads = [threading.Thread(target=start, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agreed == [read_plan(storage)]
    assert len(refused) == len(plans) - 1
