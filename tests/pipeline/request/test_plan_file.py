from __future__ import annotations

import threading

import pytest

from depthvar.errors import InputError
from pipeline.request.job_plan import JobPlan
from pipeline.request.plan_file import check_output, open_plan, read_plan
from pipeline.storage import Storage
from tests.fake_shards import make_plan, object_store


@pytest.fixture(params=["disk", "store"])
def storage(request, tmp_path) -> Storage:
    return Storage.open(str(tmp_path / "o")) if request.param == "disk" else object_store()


def opened(storage: Storage, plan: JobPlan, *, extend: bool) -> JobPlan:
    return open_plan(storage, check_output(storage, plan, extend=extend) or plan)


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


def test_a_run_that_takes_any_batch_size_takes_the_stored_one(storage):
    stored = open_plan(storage, make_plan(batch_size=3))
    wanted = make_plan(batch_size=5)
    with pytest.raises(InputError, match=r"batch_size: .* has 3, this run has 5: resume with"):
        check_output(storage, wanted)
    assert check_output(storage, wanted, left_open=["batch_size"]) == stored
    assert open_plan(storage, wanted, left_open=["batch_size"]) == stored, "another run was first"
    more = make_plan({0: 8, 1: 6, 2: 186}, batch_size=5)
    extended = check_output(storage, more, extend=True, left_open=["batch_size"])
    assert extended is not None
    assert (extended.batch_size, extended.num_samples) == (3, 200)
    with pytest.raises(InputError, match=r"^seed: [^;]*: resume with"):
        check_output(storage, make_plan(batch_size=5, seed=6), left_open=["batch_size"])


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


def test_a_precision_that_is_left_open_is_the_stored_one(storage):
    stored = open_plan(storage, make_plan(precision="float16"))
    with pytest.raises(InputError, match=r"precision: .* has float16, this run has float32"):
        check_output(storage, make_plan())
    assert check_output(storage, make_plan(), left_open=["precision"]) == stored
