"""Class names, prompts and templates as people write them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthvar.errors import InputError
from pipeline.request import prompt_files
from pipeline.request.prompt_files import Asked, asked_classes, asked_prompts
from pipeline.request.prompts import ClassPrompts, WrittenPrompts

THREE_AS_JSON = """\
{"prompt": "a, b", "class": "fox", "count": 3}
{"prompt": "c", "class": "cat"}
{"count": 0, "prompt": "d", "class": "fox"}
"""


def classes(text: str, templates: Path | None = None, notes: list[str] | None = None) -> Asked:
    return asked_classes(text, templates, 7, [].append if notes is None else notes.append)


def prompts(path: Path, notes: list[str] | None = None) -> Asked:
    return asked_prompts(path, 7, [].append if notes is None else notes.append)


def written(folder: Path, content: str | bytes, name: str = "asked.txt") -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def refusal(ask, *args: object) -> list[str]:
    with pytest.raises(InputError) as caught:
        ask(*args)
    return str(caught.value).splitlines()


def test_classes_are_listed_and_quoted_as_csv():
    asked = classes('red fox, tabby cat,"tench, Tinca tinca",AC/DC')
    assert asked.class_names == ("red fox", "tabby cat", "tench, Tinca tinca", "AC/DC")
    assert asked.prompts == ClassPrompts()
    assert asked.counts.as_mapping() == dict.fromkeys(range(4), 7)


def test_a_file_of_classes_may_describe_them(tmp_path: Path):
    text = '# ours\n\nred fox\tsmall, and red\n"crane"\t\n"say ""hi"""\r\n#1 fan\t x \n'
    asked = classes(str(written(tmp_path, text)))
    assert asked.class_names == ("red fox", "crane", 'say "hi"', "#1 fan")
    assert asked.prompts == ClassPrompts((), ("small, and red", "", "", "x"))


def test_templates_are_read_a_line_each(tmp_path: Path):
    templates = written(tmp_path, "# ours\na photo of a {class}\n\n {class}, {description} \n", "t")
    file = written(tmp_path, "fox\tred\ncrane\ttall\n")
    asked = classes(str(file), templates)
    assert asked.prompts == ClassPrompts(
        ("a photo of a {class}", "{class}, {description}"), ("red", "tall")
    )


def test_descriptions_that_no_template_says_are_told(tmp_path: Path):
    notes: list[str] = []
    templates = written(tmp_path, "a {class}\n", "t")
    classes(str(written(tmp_path, "fox\tred\n")), templates, notes)
    (note,) = notes
    assert note == f"no template of {templates} has {{description}}: the descriptions are not used"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("fox,fox", "got the class 'fox' again"),
        ("caf\u00e9,cafe\u0301", "again"),
        ("fox,,cat", "got an empty class"),
        ("", "names no class"),
        ('"fox', "which is not CSV"),
        ("fox\0", "control character '\\x00'"),
        ("x" * 4001, "a class of 4,001 characters"),
        ("classes.txt", "classes.txt is no file"),
        ("~/none.tsv", "~/none.tsv is no file"),
    ],
)
def test_a_bad_list_of_classes_is_one_line(text: str, told: str):
    (line,) = refusal(classes, text)
    assert line.startswith("--class-names")
    assert told in line


def test_all_bad_lines_of_a_file_are_told_at_once(tmp_path: Path):
    file = written(tmp_path, "fox\n\tno name\nfox\tred\na\tb\tc\ncrane\x07\ncrane\n")
    lines = refusal(classes, str(file))
    assert [line.removeprefix(f"{file}, ").partition(":")[0] for line in lines] == [
        "line 2", "line 3", "line 4", "line 5"
    ]  # fmt: skip
    assert "got an empty class" in lines[0]
    assert "got the class 'fox' again" in lines[1]
    assert "got 3 columns, wanted class<TAB>description" in lines[2]
    assert "control character '\\x07'" in lines[3]


def test_of_very_many_bad_lines_a_few_are_told(tmp_path: Path):
    lines = refusal(prompts, written(tmp_path, "a\tb\n" * 1000))
    assert len(lines) == 6
    assert lines[5].endswith("and 995 more lines cannot be read")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a photo\n", "line 1: got the template 'a photo', wanted {class} in it"),
        ("{class}\n{class} {size}\n", "line 2: got the template '{class} {size}' with {size}"),
        ("{class}\n{class}\n", "line 2: got the template '{class}' again"),
        ("# {class}\n", "holds no template"),
        ("{class}{description}\n", "2 of 3 classes without one, 'crane' first: describe them"),
        ("{class}" + 3990 * "x" + "\n", "a prompt of 4,000 characters"),
    ],
)
def test_bad_templates_are_refused_by_file_and_line(tmp_path: Path, text: str, told: str):
    file = written(tmp_path, "fox\tred\ncrane\nheron bird\n")
    templates = written(tmp_path, text, "templates.txt")
    if "4,000" in told:  # the longest that may be
        assert len(next(iter(classes(str(file), templates).prompts.templates))) == 3997
        templates.write_text(text.strip() + "x\n")
        told = "a prompt of 4,001 characters"
    (line,) = refusal(classes, str(file), templates)
    assert line.startswith(str(templates))
    assert told in line


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "# mine\na fox, red\n\n  two cats \n#1 fan\n"),
        ("p.csv", 'prompt\n"a fox, red"\ntwo cats\n#1 fan\n'),
        ("p.jsonl", '"a fox, red"\n{"prompt": "two cats"}\n"#1 fan"\n'),
        ("p.txt", "\ufeffa fox, red\r\ntwo cats\r\n#1 fan"),
    ],
)
def test_prompts_without_classes(tmp_path: Path, name: str, text: str):
    asked = prompts(written(tmp_path, text, name))
    assert asked.class_names == ()
    assert asked.prompts == WrittenPrompts(("a fox, red", "two cats", "#1 fan"))
    assert asked.counts.as_mapping() == {0: 7, 1: 7, 2: 7}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'prompt,class,count\n"a, b",fox,3\nc,cat\nd,fox,0\n'),
        ("p.txt", 'count, "Prompt", class\n3,"a, b",fox\n,c,cat\n0,d,fox\n'),
        ("p.tsv", "prompt\tcount\tclass\na, b\t3\tfox\nc\t\tcat\nd\t0\tfox\n"),
        ("p.ndjson", THREE_AS_JSON),
    ],
)
def test_prompts_with_classes_and_counts(tmp_path: Path, name: str, text: str):
    asked = prompts(written(tmp_path, text, name))
    assert asked.class_names == ("fox", "cat")
    assert asked.prompts == WrittenPrompts(("a, b", "c", "d"), (0, 1, 0))
    assert asked.counts.as_mapping() == {0: 3, 1: 7}, "a count of 0 leaves room to extend"


def test_a_prompt_that_comes_again_adds_up_and_is_told(tmp_path: Path):
    notes: list[str] = []
    asked = prompts(written(tmp_path, "prompt,count\na,2\nb,1\na,3\na,\n"), notes)
    assert asked.counts.as_mapping() == {0: 12, 1: 1}
    assert notes == [
        f"{tmp_path / 'asked.txt'} holds prompts again in 2 lines, whose counts add up"
    ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "# only this\n\n", "holds no prompt"),
        ("p.csv", "prompt,count\n", "holds no prompt"),
        ("p.csv", "prompt,count\na,0\n", "count 0 for every prompt"),
        ("p.csv", "prompt,count\na,-1\n", "line 2: got the count '-1'"),
        ("p.csv", "prompt,count\na,1.5\n", "line 2: got the count '1.5'"),
        ("p.csv", "prompt,count\n,3\n", "line 2: got an empty prompt"),
        ("p.csv", "prompt,count\na,b,3\n", "line 2: got 3 columns, wanted prompt,count"),
        ("p.csv", 'prompt\n"a\nb"\n', "line 2: got '\"a', which is not CSV"),
        ("p.csv", "a fox\n", "line 1: got the header 'a fox', wanted prompt"),
        ("p.csv", "prompt,label\na,b\n", "line 1: got the header 'prompt,label'"),
        ("p.csv", "prompt,class\na,x\nb\nc,y\n", "line 3: got a prompt without a class"),
        ("p.csv", "prompt,class\na\nb,x\n", "line 3: got a prompt with a class"),
        ("p.csv", "prompt,class\na,x\na,y\n", "line 3: got 'a' again with another class"),
        ("p.csv", "prompt,class\na,\x07\n", "control character '\\x07' in the class"),
        ("p.txt", "a\tb\n", "line 1: got the control character '\\t'"),
        ("p.txt", "a" * 4001, "a prompt of 4,001 characters"),
        ("p.jsonl", "{\n", "line 1: got '{\\n', which is not JSON"),
        ("p.jsonl", '{"text": "a"}\n', "line 1: got"),
        ("p.jsonl", '{"prompt": 3}\n', "line 1: got"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}\n', "wanted each once"),
        ("p.jsonl", '"\\ud800"\n', "control character '\\ud800'"),
        ("p.jsonl", '{"prompt": "a", "count": true}\n', "got the count 'True'"),
        ("p.txt", "caf\u00e9\n".encode("utf-16"), "looks like UTF-16"),
        ("p.txt", "caf\u00e9\n".encode("latin-1"), "which is not UTF-8"),
        ("p.txt", b"a\0b\n", "NUL byte in line 1"),
    ],
)
def test_bad_prompts_are_one_line_each(tmp_path: Path, name: str, text: str | bytes, told: str):
    file = written(tmp_path, text, name)
    (line,) = refusal(prompts, file)
    assert str(file) in line
    assert told in line


def test_a_job_has_a_bounded_number_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    many = written(tmp_path, "".join(f"prompt number {i}\n" for i in range(100_001)))
    assert "100,001 prompts, wanted at most 100,000: split the job" in refusal(prompts, many)[0]
    templates = written(tmp_path, "".join(f"{i} {{class}}\n" for i in range(317)), "t")
    names = ",".join(map(str, range(317)))
    assert "at most 100,000 different prompts: split" in refusal(classes, names, templates)[0]
    monkeypatch.setattr(prompt_files, "_MAX_BYTES", 2**20)
    assert "is larger than 1 MiB" in refusal(prompts, many)[0]


@given(st.binary(max_size=80), st.sampled_from([".txt", ".csv", ".jsonl"]))
def test_no_prompts_file_does_more_than_raise_an_input_error(tmp_path_factory, content, suffix):
    file = written(tmp_path_factory.getbasetemp(), content, f"any{suffix}")
    for ask in (prompts, lambda path: classes(str(path)), lambda path: classes("a", path)):
        with suppress(InputError):
            ask(file)
