"""Jobs of a text model through the whole pipeline, with a sampler that has no model behind it."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image

from depthvar.errors import InputError
from depthvar.text.states import write_states
from jobs import export, report, verify
from pipeline.dataset.contact_sheet import draw_sheet
from pipeline.dataset.loader import iterate_samples, open_dataset, training_pipeline
from pipeline.request.job_plan import JobPlan
from pipeline.shards.schema import TEXT_SCHEMA
from pipeline.storage import Storage
from tests import fake_job
from tests.fake_shards import committed_anew, data_files, rewrite_rows, rewrite_tar
from tests.fake_text import states_of
from tests.fakes import FAULTS_VARIABLE, TEXT_MODEL, fake_image, set_faults
from tests.forked_job import ForkedJob

ROOT = Path(__file__).parent.parent
TEMPLATES = ("a photo of a {class} in the snow", "{class}, {description}", "a drawn {class}")
CLASSES = {"red fox": "small, and red", "tabby cat": "striped \u00e9"}
PROMPTS = {"a fox, asleep": 9, "two cats on a <b>mat</b>": 4, "nothing \u2014 at all": 10}


def all_prompts() -> list[str]:
    worded = [
        template.format(**{"class": name, "description": told})
        for template in TEMPLATES
        for name, told in CLASSES.items()
    ]
    added = [t.format(**{"class": "crane", "description": "tall"}) for t in TEMPLATES]
    return [*worded, *added, *CLASSES, *PROMPTS]


def flags(out: Path, *asked: str) -> list[str]:
    """Of a job with the states of every prompt in a file, which has the same bytes everywhere."""
    states = out.parent / "states.safetensors"
    write_states(states, {prompt: states_of(prompt) for prompt in all_prompts()})
    return [
        f"--out={out}", f"--model={TEXT_MODEL.name}", *asked, "--workers=0", "--device=cpu",
        "--samples-per-shard=10", "--batch-size=4", f"--scratch={out.parent / 'scratch'}",
        f"--text-states={states}",
    ]  # fmt: skip


def asking_for_classes(folder: Path, per_class: int = 12) -> list[str]:
    (folder / "classes.txt").write_text("".join(f"{n}\t{d}\n" for n, d in CLASSES.items()))
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    files = [f"--class-names={folder / 'classes.txt'}", f"--templates={folder / 'templates.txt'}"]
    return [*files, f"--per-class={per_class}"]


def asking_for_prompts(folder: Path) -> list[str]:
    rows = [{"prompt": text, "count": count} for text, count in PROMPTS.items()]
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [f"--prompts={folder / 'prompts.jsonl'}"]


def made(folder: Path, asked: list[str]) -> Path:
    assert fake_job.main(flags(folder / "out", *asked)) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 2 classes in 3 shards."""
    folder = tmp_path_factory.mktemp("classes")
    return made(folder, asking_for_classes(folder))


@pytest.fixture(scope="module")
def of_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images of 3 prompts without classes in 3 shards."""
    folder = tmp_path_factory.mktemp("prompts")
    return made(folder, asking_for_prompts(folder))


def members(out: Path) -> Iterator[dict[str, bytes]]:
    """The members of every sample, as any reader of tars finds them, `key` among them."""
    for path in sorted(out.glob("train/*.tar")):
        samples: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                samples.setdefault(key, {"key": key.encode()})[suffix] = tar.extractfile(
                    info
                ).read()  # type: ignore[union-attr]
        yield from samples.values()


def rows(out: Path) -> list[dict]:
    return [
        row
        for path in sorted(out.glob("meta/*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def philox_template(index: int) -> str:
    """The oracle: the template by the first number of the sample's third stream, job seed 0."""
    key, counter = np.array([0, index], np.uint64), np.array([0, 0, 0, 2], np.uint64)
    number = int(np.random.Philox(key=key, counter=counter).random_raw()) // 2**11 / 2**53
    return TEMPLATES[int(3 * number)]


def test_every_image_is_made_from_its_prompt_and_says_so(of_classes: Path):
    names = list(CLASSES)
    for index, (sample, row) in enumerate(zip(members(of_classes), rows(of_classes), strict=True)):
        name = names[index % 2]
        template = philox_template(index)
        prompt = template.format(**{"class": name, "description": CLASSES[name]})
        assert sample.keys() == {"key", "cls", "json", "png", "txt"}
        assert sample["txt"].decode() == prompt
        assert int(sample["cls"]) == index % 2
        told = {"label": index % 2, "class_name": name, "prompt": prompt, "template": template}
        assert told.items() <= json.loads(sample["json"]).items()
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        assert {**told, "prompt_sha256": digest, "index": index}.items() <= row.items()
        pixels = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert (pixels == fake_image(states_of(prompt), 0, index, 32, 3)).all()
    assert index == 23
    assert {row["template"] for row in rows(of_classes)} == {*TEMPLATES}


def test_prompts_without_classes_have_no_cls_and_null_labels(of_prompts: Path):
    samples, all_rows = list(members(of_prompts)), rows(of_prompts)
    assert {frozenset(sample) for sample in samples} == {frozenset(("key", "json", "png", "txt"))}
    assert Counter(sample["txt"].decode() for sample in samples) == PROMPTS
    assert Counter(row["prompt"] for row in all_rows) == PROMPTS
    for row in (*all_rows, *(json.loads(sample["json"]) for sample in samples)):
        assert row["label"] is row["class_name"] is row["template"] is None
    schema = pq.read_schema(of_prompts / "meta" / "00000.parquet")
    assert schema.equals(TEXT_SCHEMA, check_metadata=True)


@pytest.mark.parametrize("ask", [asking_for_classes, asking_for_prompts])
def test_a_job_that_was_killed_goes_on_byte_for_byte(
    ask, of_classes: Path, of_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(FAULTS_VARIABLE, str(tmp_path / "faults.json"))
    set_faults(tmp_path / "faults.json", crash=14)  # in the second shard
    command = flags(tmp_path / "out", *ask(tmp_path))
    assert ForkedJob(command, tmp_path / "log").wait() == -signal.SIGKILL
    assert len(list((tmp_path / "out" / "commits").glob("0*.json"))) < 3
    set_faults(tmp_path / "faults.json")
    assert fake_job.main(command) == 0
    wanted = of_classes if ask is asking_for_classes else of_prompts
    assert data_files(tmp_path / "out") == data_files(wanted)
    assert (tmp_path / "out" / "plan.json").read_bytes() == (wanted / "plan.json").read_bytes()


def test_extending_keeps_what_is_there(of_classes: Path, tmp_path: Path):
    out = made(tmp_path, asking_for_classes(tmp_path))
    more = flags(out, *asking_for_classes(tmp_path, per_class=15))
    with pytest.raises(InputError, match="add --extend"):
        fake_job.main(more)
    assert fake_job.main([*more, "--extend"]) == 0
    there = data_files(of_classes)
    assert there.items() < data_files(out).items()
    assert [row["class_name"] for row in rows(out)[24:]] == 3 * [*CLASSES]
    assert [row["template"] for row in rows(out)[24:]] == [*map(philox_template, range(24, 30))]
    assert verify.main([str(out), "--deep"]) == 0


def test_a_class_that_is_added_leaves_what_is_there(of_classes: Path, tmp_path: Path):
    out = made(tmp_path, asking_for_classes(tmp_path))
    argv = flags(out, *asking_for_classes(tmp_path))
    (tmp_path / "classes.txt").write_text((tmp_path / "classes.txt").read_text() + "crane\ttall\n")
    with pytest.raises(InputError, match=r"class_names: .*: add --extend"):
        fake_job.main(argv)
    assert fake_job.main([*argv, "--extend"]) == 0
    assert data_files(of_classes).items() < data_files(out).items()
    assert [row["class_name"] for row in rows(out)[24:]] == 12 * ["crane"]
    assert fake_job.main(argv) == 0, "the same request goes on unasked"
    assert verify.main([str(out), "--deep"]) == 0


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--class-names=red fox"], "class_names: "),
        (["--class-names=red fox,tabby cat"], "prompts.templates: "),
        (["--prompts={folder}/prompts.jsonl"], "prompts.texts: "),
    ],
)
def test_other_prompts_over_the_same_output_are_refused(
    of_classes: Path, tmp_path: Path, asked: list[str], told: str
):
    asking_for_prompts(tmp_path)
    before = {f: f.stat().st_mtime_ns for f in of_classes.rglob("*")}
    given = [flag.format(folder=tmp_path) for flag in asked]
    with pytest.raises(InputError) as caught:
        fake_job.main([*flags(of_classes, *given), "--extend"])
    assert told in str(caught.value)
    assert "choose a new output" in str(caught.value)
    assert {f: f.stat().st_mtime_ns for f in of_classes.rglob("*")} == before


@pytest.mark.parametrize("kind", ["of_classes", "of_prompts"])
def test_a_sound_dataset_is_found_sound_and_made_again_pixel_for_pixel(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys
):
    out = request.getfixturevalue(kind)
    argv = [str(out), "--deep", "--regenerate=9", "--device=cpu"]
    assert verify.main(argv, sampler_factory=fake_job.FAKE_SAMPLER) == 0
    assert "regenerated 9 images: 9 exact" in capsys.readouterr().out


def _another_prompt(rows: list[dict]) -> None:
    rows[3] |= {"prompt": "a lie", "prompt_sha256": hashlib.sha256(b"a lie").hexdigest()}


def test_verify_finds_a_prompt_that_was_not_planned(tmp_path: Path, capsys):
    out = made(tmp_path, asking_for_prompts(tmp_path))
    storage = Storage.open(out)
    rewrite_rows(storage, 0, _another_prompt)
    committed_anew(storage, 0)

    def lie(found: list[tuple[str, bytes]]) -> None:
        place = next(i for i, (name, _) in enumerate(found) if name.endswith(".txt"))
        found[place] = (found[place][0], b"another lie")

    rewrite_tar(storage, 1, lie)
    committed_anew(storage, 1)
    assert verify.main([str(out), "--deep", "--repair"]) == 1
    said = capsys.readouterr().out
    assert "meta/00000.parquet: 1 labels or prompts, first 000000000003" in said
    assert "000000000003: prompt" in said
    assert "in the tar, 'a lie' in the Parquet" in said
    assert "000000000010 has prompt 'another lie'" in said
    assert "prompts off their counts: prompt" in said
    assert fake_job.main(flags(out, *asking_for_prompts(tmp_path))) == 0
    assert verify.main([str(out), "--deep"]) == 0


def test_the_loader_gives_labels_or_prompts(of_classes: Path, of_prompts: Path):
    plain, named = open_dataset(str(of_prompts)), open_dataset(str(of_classes))
    wanted = [sample["txt"].decode() for sample in members(of_classes)]
    pairs = training_pipeline(named, shuffle_buffer=0, target="prompt")
    assert [prompt for _, prompt in pairs] == wanted
    labels = [label for _, label in training_pipeline(named, shuffle_buffer=0)]
    assert labels == 12 * [0, 1]
    assert [sample.prompt for sample in iterate_samples(named)] == wanted
    assert {sample.label for sample in iterate_samples(plain)} == {None}
    assert Counter(p for _, p in training_pipeline(plain, target="prompt")) == PROMPTS
    with pytest.raises(InputError, match="prompts and no classes"):
        training_pipeline(plain)


def test_webdataset_reads_the_prompt_as_text(of_prompts: Path):
    url = str(of_prompts / "train" / "{00000..00002}.tar")
    found = webdataset.WebDataset(url, shardshuffle=False).decode("pil").to_tuple("png", "txt")
    assert Counter(prompt for _, prompt in found) == PROMPTS


def test_the_card_names_what_there_is(of_classes: Path, of_prompts: Path):
    named, plain = ((out / "README.md").read_text() for out in (of_classes, of_prompts))
    fronts = [yaml.safe_load(card.split("---\n")[1]) for card in (named, plain)]
    assert [front["task_categories"] for front in fronts] == [
        ["image-classification", "text-to-image"], ["text-to-image"],
    ]  # fmt: skip
    assert 'dataset.to_tuple("png", "cls", "txt", "json")' in named
    told = "one of 3 templates, by chance: a photo of a \\{class\\} in the snow; \\{class\\}, "
    assert told in named
    assert 'dataset.to_tuple("png", "txt", "json")' in plain
    assert "| number | prompt | planned samples |" in plain
    assert "| 1 | two cats on a &lt;b&gt;mat&lt;/b&gt; | 4 |" in plain
    for card, number in ((named, "four"), (plain, "three")):
        assert "| `prompt` | string |" in card
        assert f"A sample has {number} members: `.png`, " in card


def test_the_sheet_and_the_report_sort_by_prompt_where_there_are_no_classes(
    of_prompts: Path, tmp_path: Path
):
    shown = [(text, []) for text in PROMPTS]
    for sample in iterate_samples(open_dataset(str(of_prompts))):
        dict(shown)[sample.prompt].append(sample.image)
    sheet = Image.open(of_prompts / "contact_sheet.png")
    assert np.array_equal(np.asarray(sheet), np.asarray(draw_sheet(shown, 10)))
    assert report.main([str(of_prompts), f"--out={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "23 images of 3 prompts" in page
    assert "<h3>two cats on a &lt;b&gt;mat&lt;/b&gt;</h3>" in page
    assert 'alt="nothing \u2014 at all, sample 0000000000' in page


def test_an_export_keeps_the_prompts(of_classes: Path, of_prompts: Path, tmp_path: Path):
    for out, name in ((of_classes, "named"), (of_prompts, "plain")):
        argv = [str(out), "--format=png-folder", f"--out={tmp_path / name}"]
        assert export.main(argv) == 0
    lines = (tmp_path / "named" / "metadata.jsonl").read_text().splitlines()
    by_class = [json.loads(line) for line in lines]
    for line, sample in zip(by_class, members(of_classes), strict=True):
        name = [*CLASSES][int(sample["cls"])]
        assert line == {
            "file_name": f"{name}/{sample['key'].decode()}.png",
            "prompt": sample["txt"].decode(),
        }
        assert (tmp_path / "named" / line["file_name"]).read_bytes() == sample["png"]
    assert len(list((tmp_path / "plain").glob("*.png"))) == 23
    assert export.main([str(of_prompts), "--format=adm-npz", f"--out={tmp_path / 'a.npz'}"]) == 0
    assert np.load(tmp_path / "a.npz").files == ["arr_0"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], "got no classes and no prompts, but fake-text makes images from text: give"),
        (["--classes=0-3"], "got --classes, but fake-text makes images from text"),
        (["--labels-file=labels.csv"], "got --labels-file, but fake-text"),
        (["--model=digits"], "got --text-states, but digits knows its own classes"),
        (["--model=digits", "--class-names=a"], "got --class-names, but digits knows its own"),
        (["--model=digits", "--prompts=p.txt"], "got --prompts, but digits knows its own"),
        (["--prompts=p.txt", "--class-names=a"], "prompts was given together with class_names"),
        (["--prompts=p.txt", "--templates=t"], "prompts was given together with templates"),
        (["--templates=t"], "templates was given without class_names"),
        (["--class-names=a", "--classes=1"], "class_names was given together with classes"),
        (["--prompts=none.txt"], "the prompts file none.txt cannot be read"),
        (["--class-names=a,a"], "--class-names: got the class 'a' again"),
    ],
)
def test_what_a_model_does_not_take_is_refused_and_nothing_written(
    tmp_path: Path, asked: list[str], told: str
):
    with pytest.raises(InputError) as caught:
        fake_job.main([*flags(tmp_path / "out"), *asked])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(told)
    if "fake-text makes images" in line:
        assert "give --class-names or --prompts (digits, var-d16, " in line
        assert line.endswith(" take --classes or --labels-file)")
    assert [path.name for path in tmp_path.iterdir()] == ["states.safetensors"]


def test_the_stored_plan_says_every_prompt(of_classes: Path, of_prompts: Path):
    settings = json.loads((of_classes / "plan.json").read_bytes())["settings"]
    assert settings["class_names"] == [*CLASSES]
    wanted = {"templates": [*TEMPLATES], "descriptions": [*CLASSES.values()]}
    assert settings["prompts"] == wanted
    plan = JobPlan.from_json((of_prompts / "plan.json").read_bytes())
    assert list(plan.distinct_prompts()) == [*PROMPTS]
