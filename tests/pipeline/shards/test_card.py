from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from depthvar.presets import make_policy
from pipeline.dataset.loader import iterate_samples, open_dataset
from pipeline.request.job_plan import FormerPolicy, JobPlan
from pipeline.request.prompts import WrittenPrompts
from pipeline.shards.card import dataset_card
from pipeline.storage import Storage
from tests.fake_shards import WITH_DEPTH_MAPS, make_plan, write_dataset


def card(plan: JobPlan) -> str:
    return dataset_card(plan, plan.num_shards, plan.num_samples, 1000)


def fact(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return line.removeprefix(f"| {name} | ").removesuffix(" |")


def many_classes(number: int, counts: dict[int, int]) -> JobPlan:
    return make_plan(counts, class_names=tuple(f"name {i}" for i in range(number)))


def test_few_classes_are_a_table():
    text = card(make_plan())
    assert text.endswith(
        "| label | name | planned samples |\n|---|---|---|\n"
        "| 0 | zero | 8 |\n| 1 | one, or uno | 6 |\n| 2 | ../tw\\|o | 8 |\n"
    )


def test_a_thousand_classes_are_one_folded_line():
    text = card(many_classes(1000, dict.fromkeys(range(1000), 50)))
    section = text.partition("## Classes\n\n")[2].splitlines()
    assert section[1] == (
        "<summary>1,000 classes, 50 planned samples each: label and name</summary>"
    )
    assert section[3].startswith("0 name 0 · 1 name 1 · 2 name 2 · ")
    assert section[3].endswith(" · 999 name 999")
    assert len(section) == 6, "folded away, after an empty line as Markdown in HTML wants it"


def test_very_many_classes_name_the_first_thousand_and_say_where_the_others_are():
    text = card(many_classes(1200, {i: 1 + i % 2 for i in range(1200)}))
    assert "1,200 classes, 1 to 2 planned samples each" in text
    assert "999 name 999 · 200 more in `plan.json`\n" in text
    assert "name 1000" not in text.partition("## Classes")[2]


def test_names_mean_nothing_to_markdown_or_html():
    names = ("<b>*x*</b>", *(f"n{i}" for i in range(1, 40)))
    text = card(make_plan(dict.fromkeys(range(40), 1), class_names=names))
    assert "\n0 &lt;b&gt;\\*x\\*&lt;/b&gt; · 1 n1 · " in text


def test_the_policy_is_told_in_words():
    def told(preset: str, **changes: object) -> str:
        policy = make_policy(preset, **changes)
        return fact(card(make_plan(policy=policy)), "depth policy")

    assert told("full") == "full"
    assert told("depthvar", reference_scale=5) == (
        "depthvar, reference scale 5 (the last at full depth, counted from 0)"
    )
    assert told("shallow-pruning", reference_scale=3, kept_depth=0.5) == (
        "shallow-pruning, reference scale 3 (the last at full depth, counted from 0), "
        "kept\\_depth 0.5"
    )
    former = FormerPolicy({"gain": 0.5, "preset": "steps", "reference_scale": None})
    assert fact(card(make_plan(policy=former)), "depth policy") == "steps, gain 0.5"
    assert fact(card(make_plan()), "mean depth of the scales") == "4, 2, 1.25 blocks"


def test_the_front_matter_names_the_tars():
    _, front, _ = card(make_plan()).split("---\n", 2)
    assert yaml.safe_load(front)["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "train/*.tar"}]}
    ]


def test_datasets_reads_images_named_classes_and_what_is_known_of_every_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With the real library, offline; names that YAML or the library would stumble over."""
    names = ("no", "a\n---\nb: c", "twice", "twice", "'0'")
    plan = make_plan({0: 8, 1: 6, 3: 8}, class_names=names, **WITH_DEPTH_MAPS)
    read = loaded(tmp_path, plan, monkeypatch)
    assert type(read.features["png"]).__name__ == "Image"
    assert read.features["cls"].names == [*names[:2], "twice (2)", "twice (3)", names[4]]
    stored = list(iterate_samples(open_dataset(str(tmp_path / "out"))))
    assert read["__key__"][:] == [sample.key for sample in stored]
    assert read["cls"][:] == [sample.label for sample in stored]
    assert read["depth.npy"][0][0] == 4
    assert set(read["json"][5]) == set(stored[5].metadata)
    assert (
        read["json"][5]["mean_log_prob"] == np.float32(stored[5].metadata["mean_log_prob"]).tolist()
    )
    assert np.array_equal(np.asarray(read[21]["png"]), stored[21].image[:, :, 0])


def test_datasets_reads_prompts_where_there_are_no_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    texts = ('a "red" fox: asleep', "\u00e9, <b>", "no")
    plan = make_plan({0: 8, 1: 6, 2: 8}, class_names=(), prompts=WrittenPrompts(texts))
    read = loaded(tmp_path, plan, monkeypatch)
    assert "cls" not in read.features
    assert Counter(read["txt"][:]) == dict(zip(texts, (8, 6, 8), strict=True))
    for row, prompt in zip(read["json"][:], read["txt"][:], strict=True):
        assert [row[name] for name in ("prompt", "label", "class_name", "template")] == [
            prompt, None, None, None,
        ]  # fmt: skip
    assert read.features["json"]["label"].dtype == "int32", "as with classes, and not null"


def loaded(folder: Path, plan: JobPlan, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A dataset of a plan as the real library reads it, offline."""
    import datasets  # takes a second

    for place in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{place}.HF_HUB_OFFLINE", True)
    write_dataset(Storage.open(folder / "out"), plan, folder / "scratch")
    return datasets.load_dataset(str(folder / "out"), split="train", cache_dir=folder / "cache")
