"""What a sample is asked for: a function of the plan, its seed and its index."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from depthvar.errors import InputError
from pipeline.request.job_plan import JobPlan, Segment
from pipeline.request.labels import LabelCounts
from pipeline.request.prompts import ClassPrompts, Prompt, WrittenPrompts, check_template
from tests.fake_shards import make_plan

NAMES = ("red fox", "crane", "{} & <b>")
TEMPLATES = ("a photo of a {class}", "{class}, drawn", "a {{toy}} {class} in snow")


def class_plan(counts: dict[int, int] | None = None, **changes: object) -> JobPlan:
    settings = {"class_names": NAMES, "prompts": ClassPrompts(TEMPLATES), **changes}
    return make_plan(counts or {0: 40, 1: 40, 2: 40}, **settings)


def written_plan(counts: dict[int, int] | None = None, **changes: object) -> JobPlan:
    prompts = WrittenPrompts(("a fox, asleep", "a crane", "two foxes"), (1, 0, 1))
    return make_plan(counts, **{"class_names": ("crane", "fox"), "prompts": prompts, **changes})


def philox_uniform(seed: int, index: int) -> float:
    """The oracle: the first number of the sample's third stream."""
    key, counter = np.array([seed, index], np.uint64), np.array([0, 0, 0, 2], np.uint64)
    return int(np.random.Philox(key=key, counter=counter).random_raw()) // 2**11 / 2**53


def test_a_samples_template_is_drawn_by_its_seed_and_index_alone():
    plan = class_plan()
    for index in range(120):
        label = index % 3
        template = TEMPLATES[int(3 * philox_uniform(plan.seed, index))]
        text = template.replace("{class}", NAMES[label]).replace("{{toy}}", "{toy}")
        assert plan.prompt_of(label, index) == Prompt(text, template, label)
    drawn = Counter(plan.prompt_of(0, i).template for i in range(3000))
    assert all(abs(drawn[template] - 1000) < 120 for template in TEMPLATES)


def test_every_prompt_that_may_occur_is_told_once():
    plan = class_plan()
    told = list(plan.distinct_prompts())
    assert len(told) == len(set(told)) == 9
    assert {plan.prompt_of(i % 3, i).text for i in range(300)} == set(told)
    fewer = make_plan({1: 5}, class_names=NAMES, prompts=ClassPrompts())
    assert list(fewer.distinct_prompts()) == ["crane"]
    assert list(make_plan().distinct_prompts()) == []


def test_without_templates_the_class_is_said_and_its_description_where_it_has_one():
    plan = class_plan(prompts=ClassPrompts((), ("", "a tall bird", "")))
    assert plan.prompt_of(0, 7) == Prompt("red fox", "{class}", 0)
    assert plan.prompt_of(1, 7) == Prompt("crane, a tall bird", "{class}, {description}", 1)
    assert plan.prompt_of(2, 7) == Prompt("{} & <b>", "{class}", 2)


def test_written_prompts_are_said_as_they_are_with_their_class_or_none():
    plan = written_plan()
    assert plan.prompt_of(2, 5) == Prompt("two foxes", None, 1)
    assert plan.subject_counts == {0: 6, 1: 16}
    assert [plan.subject_name(i) for i in plan.subject_counts] == ["crane", "fox"]
    alone = written_plan(class_names=(), prompts=WrittenPrompts(("a", "b", "c")))
    assert alone.prompt_of(1, 5) == Prompt("b", None, None)
    assert alone.subject_counts == alone.total_counts.as_mapping()
    assert [alone.subject_name(i) for i in alone.subject_counts] == ["a", "b", "c"]
    assert alone.stored_subject(None, "c") == 2
    assert alone.stored_subject(None, "none such") is None


@pytest.mark.parametrize("plan", [class_plan(), written_plan()], ids=["classes", "written"])
def test_a_plan_with_prompts_survives_json(plan: JobPlan):
    again = JobPlan.from_json(plan.to_json())
    assert again == plan
    assert pickle.loads(pickle.dumps(again)).fingerprint == plan.fingerprint


def test_other_prompts_are_another_plan():
    assert class_plan().fingerprint != class_plan(prompts=ClassPrompts(TEMPLATES[:2])).fingerprint
    other = WrittenPrompts(("a fox, asleep", "a crane", "two Foxes"), (1, 0, 1))
    assert written_plan().shard_fingerprint(0) != written_plan(prompts=other).shard_fingerprint(0)


def test_a_plan_without_prompts_does_not_name_them():
    assert b"prompt" not in make_plan().to_json()


@pytest.mark.parametrize(
    ("class_names", "prompts"),
    [
        (NAMES, {"templates": ["a {thing} of {class}"], "descriptions": []}),
        (NAMES, {"templates": ["nothing"], "descriptions": []}),
        (NAMES, {"templates": ["{class}{description}"], "descriptions": []}),
        (NAMES, {"templates": ["{class}{description}"], "descriptions": ["a", "", "c"]}),
        (NAMES, {"templates": [], "descriptions": ["a", "b"]}),
        (NAMES, {"templates": [], "descriptions": [], "more": 1}),
        ((), {"templates": [], "descriptions": []}),
        ((), {"texts": ["a", "b", " "], "class_ids": []}),
        ((), {"texts": ["a", "b", "b"], "class_ids": []}),
        ((), {"texts": ["a", "b", "c\n"], "class_ids": []}),
        ((), {"texts": ["a", "b"], "class_ids": []}),
        ((), {"texts": ["a", "b", "c"], "class_ids": [0, 0, 0]}),
        (("x",), {"texts": ["a", "b", "c"], "class_ids": [0, 0]}),
        (("x", "y"), {"texts": ["a", "b", "c"], "class_ids": [0, 0, 0]}),
    ],
)
def test_prompts_that_cannot_be_are_refused_in_a_stored_plan(class_names, prompts):
    stored = json.loads(written_plan().to_json())
    stored["settings"] |= {"class_names": list(class_names), "prompts": prompts}
    with pytest.raises(InputError, match=r"prompts|settings|fingerprint|the file") as caught:
        JobPlan.from_json(json.dumps(stored).encode())
    assert "fingerprint" not in str(caught.value), "it was refused for its fingerprint alone"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("a photo", "wanted {class} in it"),
        ("{class} {colour}", "with {colour}, wanted"),
        ("{class!r}", "with {class!r}"),
        ("{class:>9}", "with {class:>9}"),
        ("{class.name}", "with {class.name}"),
        ("{}", "with {}"),
        ("{class", "expected '}'"),
        ("{class} }", "Single '}'"),
        ("  ", "empty template"),
        ("{class}\0", "control character"),
        ("{class}" + 4000 * "x", "4,007 characters"),
    ],
)
def test_a_template_says_the_class_and_nothing_unknown(template: str, told: str):
    with pytest.raises(InputError) as caught:
        check_template(template)
    assert told in str(caught.value)


def test_extending_keeps_the_prompts_of_the_samples_that_are_there():
    plan = class_plan()
    longer = plan.extended_to(class_plan({0: 40, 1: 50, 2: 40}))
    for shard_id in range(plan.num_shards):
        assert longer.shard_fingerprint(shard_id) == plan.shard_fingerprint(shard_id)
    assert longer.prompt_of(1, 125).template in TEMPLATES
    with pytest.raises(InputError, match="5 samples of prompt 'two foxes', but 8"):
        written_plan().extended_to(written_plan({0: 8, 1: 6, 2: 5}))


WRITTEN = ("a fox, asleep", "a crane", "two foxes", "a heron", "a third fox")
LARGER = (
    (
        class_plan(prompts=ClassPrompts(())),
        class_plan({0: 40, 1: 41, 2: 40, 3: 5}, class_names=(*NAMES, "heron"),
                   prompts=ClassPrompts((), ("", "", "", "grey"))),
    ),
    (
        written_plan(),
        written_plan({0: 8, 1: 7, 2: 8, 3: 2, 4: 3}, class_names=("crane", "fox", "heron"),
                     prompts=WrittenPrompts(WRITTEN, (1, 0, 1, 2, 1))),
    ),
)  # fmt: skip


@pytest.mark.parametrize(("plan", "wanted"), LARGER, ids=["classes", "written"])
def test_classes_and_prompts_are_added_behind_those_that_are_there(plan: JobPlan, wanted: JobPlan):
    assert plan.begins(wanted)
    longer = plan.extended_to(wanted)
    assert longer.total_counts == wanted.total_counts
    assert (longer.class_names, longer.prompts) == (wanted.class_names, wanted.prompts)
    assert longer.continues(plan)
    for shard_id in range(plan.num_shards):
        assert longer.shard_fingerprint(shard_id) == plan.shard_fingerprint(shard_id)
        assert longer.shard(shard_id).labels.tolist() == plan.shard(shard_id).labels.tolist()
    again = JobPlan.from_json(longer.to_json())
    assert again == longer
    assert again.fingerprint == longer.fingerprint not in (plan.fingerprint, wanted.fingerprint)
    further = longer.extended_to(replace(wanted, segments=(Segment(doubled(wanted)),)))
    assert further.continues(longer)
    assert further.shard_fingerprint(longer.num_shards - 1) == longer.fingerprint


def doubled(plan: JobPlan) -> LabelCounts:
    return LabelCounts(plan.total_counts.class_ids, tuple(2 * n for n in plan.total_counts.counts))


def test_prompts_that_are_not_behind_are_no_extension():
    plan = written_plan()
    before = WrittenPrompts(("a heron", *WRITTEN[:3]), (1, 1, 0, 1))
    fewer = WrittenPrompts(WRITTEN[:2], (1, 0))
    for other in (
        written_plan(prompts=before),
        written_plan({0: 8, 1: 6}, prompts=fewer),
        class_plan(),
        make_plan(class_names=("crane", "fox", "heron")),
        class_plan(prompts=ClassPrompts(TEMPLATES[1:])),
    ):
        assert not plan.begins(other)
    described = class_plan(prompts=ClassPrompts(TEMPLATES, ("a", "", "")))
    assert not class_plan().begins(described)
    assert not class_plan().begins(class_plan(prompts=ClassPrompts(TEMPLATES[1:])))


def test_samples_of_prompts_that_came_later_are_refused_in_a_stored_plan():
    stored = json.loads(LARGER[1][0].extended_to(LARGER[1][1]).to_json())
    assert [segment.get("num_added") for segment in stored["segments"]] == [None, 2]
    stored["segments"][0]["counts"] = {"class_ids": [0, 3], "counts": [8, 14]}
    with pytest.raises(InputError, match="got class id 3, wanted 0 to 2"):
        JobPlan.from_json(json.dumps(stored).encode())


def test_the_difference_shows_where_long_prompts_part():
    texts = tuple(f"a long prompt about the number {i}" for i in range(9))
    plan = make_plan(class_names=(), prompts=WrittenPrompts(texts))
    other = make_plan(class_names=(), prompts=WrittenPrompts((*texts[:8], "another")))
    (line,) = plan.difference(other, "out")
    left, right = line.removeprefix("prompts.texts: out has ").split(", this run has ")
    assert left == '...ut the number 7", "a long prompt about the nu...'
    assert right == '...ut the number 7", "another"]'
