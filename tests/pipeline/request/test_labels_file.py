from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthvar.errors import InputError
from pipeline.request.classes import parse_classes
from pipeline.request.labels_file import read_labels_file

NAMES = ("zero", "one", "tench, Tinca tinca", "crane", "crane", "Seven")


@pytest.mark.parametrize(
    "text", ["zero,2\n1\n\n0,3\n", "class,count\nzero,5\none,1\n", "\ufeffzero,5\r\n1,1"]
)
def test_repeated_lines_of_a_labels_file_add_up(tmp_path: Path, text):
    file = tmp_path / "labels.csv"
    file.write_bytes(text.encode())
    assert read_labels_file(file, NAMES).as_mapping() == {0: 5, 1: 1}


def test_a_jsonl_labels_file_takes_ids_names_and_counts(tmp_path: Path):
    lines = [2, "zero", {"class": "seven", "count": 4}, {"class": 2}]
    file = tmp_path / "labels.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_labels_file(file, NAMES).as_mapping() == {0: 1, 2: 2, 5: 4}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("l.csv", b"zero,1\none,-0", "line 2: got the count '-0'"),
        ("l.csv", b"zero,-3", "line 1"),
        ("l.csv", b"zero,1.5", "line 1"),
        ("l.csv", b"zero,1,2", "3 columns"),
        ("l.csv", b"../../etc/passwd", "unknown class"),
        ("l.csv", b"\xff\xfe\x00", "not UTF-8"),
        ("l.csv", b'"zero', "not CSV"),
        ("l.csv", b"\n \n", "no class"),
        ("l.jsonl", b"{", "line 1"),
        ("l.jsonl", b"[" * 100_000, "not JSON"),
        ("l.jsonl", b'{"class": 1, "cuont": 2}', "wanted a class id"),
        ("l.jsonl", b'{"class": true}', "wanted a class id"),
        ("l.jsonl", b'{"class": 1, "count": 1e99}', "got the count"),
        ("l.jsonl", b'{"class": 1, "count": -1}', "got the count -1"),
        ("l.jsonl", b'{"class": 1, "count": "3"}', "got the count '3'"),
        ("l.jsonl", b'{"class": 1, "class": 2}', "line 1: got the keys class, class, wanted each"),
        ("l.jsonl", b'# a comment\n\n{"class": 2.0}', "line 3: .*wanted a class id"),
        ("l.csv", b"zero,1e3", "line 1: got the count '1e3', wanted a whole number from 0"),
        ("l.csv", b"zero,1_000", "got the count '1_000'"),
        ("l.csv", "zero,\uff11\uff12".encode(), "got the count '\uff11\uff12'"),
        ("l.csv", b"zero,5.0", "got the count '5.0'"),
        ("l.csv", b"zero,", "got the count ''"),
        ("l.csv", b"zero,10000000000000", "got the count '10000000000000'"),
        ("l.csv", b"zero,1000000000001", "got the count '1000000000001'"),
        (
            "l.csv",
            b"zero,1000000000000\none,1",
            r"l\.csv: got 1000000000001 samples",
        ),
        ("l.csv", b"zero,5 # five", "got the count '5 # five'"),
        ("l.csv", b",5", "unknown class ''"),
        ("l.csv", b"0-4,5", "got the range '0-4', wanted a class"),
        ("l.csv", b"zero,0\none,0\n", "the count 0 for every class, wanted at least one sample"),
        ("l.csv", b"zero,0\n\n# c\nclass,count\none,2", "line 4: got the header 'class,count'"),
        ("l.csv", b"class,count\nzero,1\nclass,count\none,2", "line 3: got the header"),
        ("l.csv", b"count,class\nzero", "line 2: got 'zero', wanted count,class"),
        ("l.csv", b"class_id,class_name\n0,zero", "line 1: got the header 'class_id,class_name'"),
        ("l.csv", b"class,count,note\nzero,1,x", "line 1: got the header 'class,count,note'"),
        ("l.csv", b'\r\n# c\r\n"tench, Tinca\r\ntinca",1\r\n', "line 3: got the unknown class"),
        ("l.csv", b'"x\ny",1', "line 1: got the unknown class 'x.ny'"),
        ("l.csv", b"zero,1\rone,x\r", "line 2: got the count 'x'"),
        ("l.csv", b'zero,1\n"one\ntwo\n', "line 2: got '\"one', which is not CSV"),
        ("l.tsv", b"zero\t1\none\tx", "line 2: got the count 'x'"),
        ("l.csv", "zero,1\n".encode("utf-16"), "looks like UTF-16, not UTF-8"),
        ("l.csv", "zero,1\n".encode("utf-16-le"), "a NUL byte in line 1, as UTF-16"),
        ("l.csv", b"zero,1\none\0,1", "a NUL byte in line 2"),
        ("l.csv", "zero,1\r\ncaf\xe9,1".encode("latin-1"), "the byte 0xe9 in line 2, .* not UTF-8"),
        ("l.xlsx", b"PK\x03\x04\0\0", "an Excel or zip file"),
        ("l.csv", b"", "names no class"),
        ("l.csv", b"class,count\n", "names no class"),
    ],
)
def test_a_bad_line_of_a_labels_file_is_named(tmp_path: Path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=told):
        read_labels_file(tmp_path / name, NAMES)


def test_a_missing_labels_file_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        read_labels_file(tmp_path / "none.csv", NAMES)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.csv", "# c\n\n  # more\nclass,count\nzero,2\n\none,3\n# end"),
        ("l.csv", "\n,\nclass,count\n\nzero,2\n,\none,3"),
        ("l.csv", "Count,Class\n2,zero\n3,one\n"),
        ("l.csv", "n,label\n2,0\n3,1\n"),
        ("l.csv", "class_id,images\n0,2\n1,3\n"),
        ("l.csv", "class,howmany\nzero,2\none,3\n"),
        ("l.csv", "zero , 2 \n one, 3\n3,0"),
        ("l.csv", "zero\t2\none\t3\n"),
        ("l.tsv", "class\tcount\r\nzero\t2\r\none\t3\r\n"),
        ("l.csv", '"zero","2"\r"one","3"\r'),
        ("l.txt", "\ufeffzero,2\r\none,3"),
        ("l.jsonl", '\ufeff# c\r\n\r\n{"class": "zero", "count": 2}\r\n{"class": 1, "count": 3}\n'),
        ("l.ndjson", '{"class": "zero", "count": 2}\n1\n1\n"one"\n{"class": 5, "count": 0}'),
    ],
)  # fmt: skip
def test_a_labels_file_may_look_as_people_and_their_programs_write_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert read_labels_file(tmp_path / name, NAMES).as_mapping() == {0: 2, 1: 3}


@pytest.mark.parametrize(
    ("line", "class_id"),
    [
        ('"tench, Tinca tinca",4', 0), ("tench, Tinca tinca\t4", 0), ('"a ""b"" c",4', 1),
        ('a "b" c,4', 1), ('"#1",4', 2), ('"two\nlines",4', 3), ("label,4", 4), ('" pad",4', 5),
    ],
)  # fmt: skip
def test_a_labels_file_takes_any_name_quoted_as_in_csv(tmp_path: Path, line: str, class_id: int):
    names = ("tench, Tinca tinca", 'a "b" c', "#1", "two\nlines", "label", " pad", "pad")
    (tmp_path / "l.csv").write_text(f"# c\n{line}\n")
    assert read_labels_file(tmp_path / "l.csv", names).as_mapping() == {class_id: 4}


def test_a_comment_that_may_be_a_class_is_refused(tmp_path: Path):
    (tmp_path / "l.csv").write_text("zero,1\n#1,5\n")
    with pytest.raises(InputError, match="line 2: got '#1', a comment or the class of that name"):
        read_labels_file(tmp_path / "l.csv", ("zero", "#1"))


def test_classes_on_several_lines_are_told_with_what_they_add_up_to(tmp_path: Path):
    file, notes = tmp_path / "l.csv", []
    file.write_text("zero,2\none\n0,3\none,0\n3,1\n")
    counts = read_labels_file(file, NAMES, note=notes.append)
    assert counts.as_mapping() == {0: 5, 1: 1, 3: 1}
    added_up = "'zero' 5 from 2 lines, 'one' 1 from 2 lines"
    assert notes == [f"{file} names 2 classes more than once, whose counts add up: {added_up}"]
    file.write_text("zero,2\none\n")
    read_labels_file(file, NAMES, note=notes.append)
    assert len(notes) == 1


NUMBERS = ("0", "1", "10", "2", "3")


@pytest.mark.parametrize("name", ["l.csv", "l.jsonl"])
def test_a_labels_file_reads_numbers_as_the_command_line_does(tmp_path: Path, name: str):
    file = tmp_path / name
    for line in ("2", '"2"'):
        file.write_text(f"{line}\n")
        with pytest.raises(InputError, match=r"line 1: .* write id:2 for '10' or name:2 for '2'"):
            read_labels_file(file, NUMBERS)
    file.write_text('"id:2"\n"name:2"\n10\n1\n')
    assert read_labels_file(file, NUMBERS).as_mapping() == {1: 1, 2: 2, 3: 1}


@pytest.mark.parametrize(
    ("header", "class_id"), [("class_id", 2), ("id", 2), ("class_name", 3), ("name", 3)]
)
def test_a_header_can_say_whether_numbers_are_ids_or_names(tmp_path, header, class_id):
    (tmp_path / "l.csv").write_text(f"{header},count\n2,7\n")
    assert read_labels_file(tmp_path / "l.csv", NUMBERS).as_mapping() == {class_id: 7}


def test_a_column_of_ids_holds_no_names_that_look_like_ids(tmp_path: Path):
    (tmp_path / "l.csv").write_text("class_id\n10\n")
    with pytest.raises(InputError, match="'id:10', wanted an id from 0 to 4"):
        read_labels_file(tmp_path / "l.csv", NUMBERS)


@pytest.mark.parametrize("text", ["caf\u00e9", "cafe\u0301", "CAFE\u0301", "name:cafe\u0301"])
@pytest.mark.parametrize("name", ["caf\u00e9", "cafe\u0301"])
def test_a_name_is_found_in_any_unicode_form(tmp_path: Path, name: str, text: str):
    names = ("x", name)
    assert parse_classes(text, names) == (1,)
    assert parse_classes(text, ("x", "y"), ((), (name,))) == (1,)
    (tmp_path / "l.csv").write_text(f"{text},3\n", encoding="utf-8")
    assert read_labels_file(tmp_path / "l.csv", names).as_mapping() == {1: 3}


@given(st.binary(max_size=60), st.sampled_from(["csv", "jsonl"]))
def test_no_labels_file_does_more_than_raise_an_input_error(tmp_path_factory, content, suffix):
    file = tmp_path_factory.mktemp("labels") / f"l.{suffix}"
    file.write_bytes(content)
    with suppress(InputError):
        read_labels_file(file, NAMES)
