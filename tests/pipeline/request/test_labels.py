from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthvar.errors import InputError
from pipeline.request.labels import LabelCounts, parse_classes, read_labels_file

NAMES = ("zero", "one", "tench, Tinca tinca", "crane", "crane", "Seven")


def all_labels(counts: dict[int, int]) -> list[int]:
    """The brute-force oracle: every (time, class) of every sample, sorted."""
    sizes = sorted(set(counts.values()), reverse=True)
    keys = []
    for rank, size in enumerate(sizes):
        members = [c for c in sorted(counts) if counts[c] == size]
        phase = (0.5 + rank * rank * 0.6180339887498949) % 1.0
        for step in range(size * len(members)):
            keys.append(((step + phase) / (size * len(members)), members[step % len(members)]))
    return [class_id for _, class_id in sorted(keys)]


many_counts = st.dictionaries(st.integers(0, 40), st.integers(1, 60), min_size=1, max_size=25)


@given(many_counts, st.data())
def test_any_window_equals_the_sorted_list_of_all_samples(counts, data):
    everything = all_labels(counts)
    start = data.draw(st.integers(0, len(everything)))
    stop = data.draw(st.integers(start, len(everything)))
    window = LabelCounts.from_mapping(counts).labels(start, stop)
    assert window.dtype == np.int64
    assert window.tolist() == everything[start:stop]


@given(many_counts)
def test_every_class_comes_exactly_as_often_as_counted(counts):
    labels = LabelCounts.from_mapping(counts)
    assert Counter(labels.labels(0, labels.total).tolist()) == counts


@given(st.integers(1, 30), st.integers(1, 30))
def test_equal_counts_are_round_robin_by_class_id(num_classes, each):
    labels = LabelCounts(tuple(range(num_classes)), (each,) * num_classes)
    assert labels.labels(0, labels.total).tolist() == list(range(num_classes)) * each


@pytest.mark.parametrize(
    "counts",
    [
        [50] * 100,
        [7, 7, 7, 1000, 13, 500],
        [20000] + [1] * 300,
        [max(5, int(1280 * 0.98**i)) for i in range(400)],
    ],
    ids=["equal", "mixed", "one-large-many-single", "long-tail"],
)
def test_any_window_holds_each_class_within_two_of_its_share(counts):
    labels = LabelCounts(tuple(range(len(counts))), tuple(counts))
    order = labels.labels(0, labels.total)
    for size in (10, 97, 250):
        for start in range(0, labels.total - size, 61):
            seen = np.bincount(order[start : start + size], minlength=len(counts))
            share = np.array(counts) * size / labels.total
            assert np.abs(seen - share).max() <= 2


def test_a_billion_samples_of_a_thousand_classes_are_looked_up_in_milliseconds():
    labels = LabelCounts(tuple(range(1000)), tuple(1_000_000 + 7 * i for i in range(1000)))
    labels.labels(0, 1)
    started = time.perf_counter()
    window = labels.labels(labels.total // 3, labels.total // 3 + 1000)
    assert time.perf_counter() - started < 0.5
    assert len(window) == 1000


def test_neighbouring_windows_of_a_huge_plan_fit_together():
    labels = LabelCounts(tuple(range(50)), tuple(10**9 + i * i for i in range(50)))
    start = labels.total - 1234
    whole = labels.labels(start, labels.total)
    parts = [labels.labels(i, min(i + 100, labels.total)) for i in range(start, labels.total, 100)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_a_large_group_is_on_time_by_exact_arithmetic():
    labels = LabelCounts((0, 1), (10**11, 3))
    phase = Fraction((0.5 + 0.6180339887498949) % 1.0)
    position = int(phase / 3 * 10**11 + Fraction(1, 2))
    window = labels.labels(position - 2, position + 3)
    assert window.tolist().count(1) == 1


@pytest.mark.parametrize(
    ("ids", "counts"),
    [((), ()), ((1, 0), (1, 1)), ((1, 1), (1, 1)), ((0,), (0,)), ((0,), (-1,)), ((-1,), (2,)),
     ((0, 1), (1,)), ((0,), (10**12 + 1,))],
)  # fmt: skip
def test_counts_that_cannot_be_are_refused(ids, counts):
    with pytest.raises(InputError):
        LabelCounts(ids, counts)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("3", (3,)),
        ("0-2", (0, 1, 2)),
        ("5, 0-1 ,3", (0, 1, 3, 5)),
        ("seven", (5,)),
        ("ZERO,2", (0, 2)),
        ("tench, Tinca tinca", (2,)),
        ('"tench, Tinca tinca",one', (1, 2)),
    ],
)
def test_classes_are_given_by_id_range_or_name(text, ids):
    assert parse_classes(text, NAMES) == ids


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("6", "0 to 5"),
        ("-1", "0 to 5"),
        ("0-999999999", "0 to 5"),
        ("9" * 5000, "0 to 5"),
        ("4-2", "smaller id first"),
        ("1,0-2", "more than once"),
        ("crane", "3, 4"),
        ("dog", "unknown class 'dog'"),
        ("²", "unknown class"),
        ("", "no classes"),
        ("1,,2", "unknown class"),
        ('"', "parse"),
    ],
)
def test_a_class_that_is_not_there_is_refused_in_one_line(text, told):
    with pytest.raises(InputError, match=told) as caught:
        parse_classes(text, NAMES)
    assert "\n" not in str(caught.value)


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


# Names that look like numbers: folders as their names sort.

NUMBERS = ("0", "1", "10", "2", "3")
FROM_ONE = tuple(f"{i:02}" for i in range(1, 11))
ODD = (
    "-neg", "01", "0-9", "1-3", "12", "1e3", "all", "id:2", "name:12", "\uff11\uff12", " pad",
    "pad", "a,b",
)  # fmt: skip


@pytest.mark.parametrize(
    ("names", "text", "ids"),
    [
        (NUMBERS, "0,1", (0, 1)),
        (NUMBERS, "10", (2,)),
        (NUMBERS, "4", (4,)),
        (NUMBERS, "id:2,name:2", (2, 3)),
        (NUMBERS, "name:10", (2,)),
        (NUMBERS, "0-1", (0, 1)),
        (NUMBERS, "id:0-4", (0, 1, 2, 3, 4)),
        (NUMBERS, "all", (0, 1, 2, 3, 4)),
        (FROM_ONE, "02,03", (1, 2)),
        (FROM_ONE, "id:2", (2,)),
        (FROM_ONE, "id:0-2", (0, 1, 2)),
        (tuple("0123456789"), "0-9", tuple(range(10))),
        (tuple("0123456789"), "3,5-6", (3, 5, 6)),
        (("a", "b", "c"), "02", (2,)),
        (ODD, "-neg", (0,)),
        (ODD, "01", (1,)),
        (ODD, "1", (1,)),
        (ODD, "2", (2,)),
        (ODD, "name:0-9", (2,)),
        (ODD, "id:0-9", tuple(range(10))),
        (ODD, "id:12", (12,)),
        (ODD, "name:12", None),
        (ODD, "name:name:12", (8,)),
        (ODD, "id:4", (4,)),
        (ODD, "1e3", (5,)),
        (ODD, "name:all", (6,)),
        (ODD, "id:0-12", tuple(range(13))),
        (ODD, "name:id:2", (7,)),
        (ODD, "\uff11\uff12", (9,)),
        (ODD, " pad", (10,)),
        (ODD, '1," pad"', (1, 10)),
        (ODD, "1,pad", (1, 11)),
        (ODD, "a,b", (12,)),
        (ODD, '"a,b",01', (1, 12)),
        (ODD, '"name:a,b",01', (1, 12)),
        (("x", "-1", "1.0"), "-1", (1,)),
        (("x", "-1", "1.0"), "1.0", (2,)),
    ],
)
def test_a_name_that_looks_like_a_number_is_found(names, text, ids):
    if ids is None:
        with pytest.raises(InputError, match="write id:4 for '12' or name:name:12 for 'name:12'"):
            parse_classes(text, names)
    else:
        assert parse_classes(text, names) == ids


@pytest.mark.parametrize(
    ("names", "text", "advice"),
    [
        (NUMBERS, "2", "classes 2, 3: write id:2 for '10' or name:2 for '2'"),
        (NUMBERS, "0,3", "classes 3, 4: write id:3 for '2' or name:3 for '3'"),
        (NUMBERS, "02", "classes 2, 3: write id:2 for '10' or id:3 for '2'"),
        (NUMBERS, "0-2", "write id:0-2 for '0', '1', '10' or name:0,name:1,name:2 for"),
        (NUMBERS, "2-4", "write id:2-4 for '10', '2', '3' or id:3-4 for '2', '3'"),
        (FROM_ONE, "1", "classes 1, 0: write id:1 for '02' or id:0 for '01'"),
        (FROM_ONE, "1-3", "write id:1-3 for '02', '03', '04' or id:0-2 for '01', '02', '03'"),
        (ODD, "12", "classes 12, 4: write id:12 for 'a,b' or id:4 for '12'"),
        (ODD, "0-9", "classes 0-9; 2: write id:0-9 for .* or name:0-9 for '0-9'"),
        (ODD, "all", "classes 0-12; 6: write id:0-12 for .* or name:all for 'all'"),
        (ODD, "id:2", "classes 2, 7: write name:0-9 for '0-9' or name:id:2 for 'id:2'"),
        (("a", "b", "a,b"), "a,b", "classes 2; 0-1: write id:2 for 'a,b' or id:0-1 for 'a', 'b'"),
        (("pad", " pad"), '1," pad",pad', "more than once"),
    ],
)
def test_what_is_an_id_and_another_name_is_refused_with_a_way_to_write_each(names, text, advice):
    with pytest.raises(InputError, match=advice) as caught:
        parse_classes(text, names)
    assert "\n" not in str(caught.value)


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


def test_names_that_differ_in_their_unicode_form_alone_are_told_by_id():
    with pytest.raises(InputError, match=r"classes 0, 1: write id:0 for .* or id:1 for"):
        parse_classes("caf\u00e9", ("caf\u00e9", "cafe\u0301"))


ODD_NAMES = st.lists(st.text('01:-,"ai dl', min_size=1, max_size=5), min_size=1, unique=True)


@given(ODD_NAMES, st.data())
def test_the_name_of_a_class_never_selects_another(names, data):
    class_id = data.draw(st.integers(0, len(names) - 1))
    with suppress(InputError):
        assert parse_classes(names[class_id], names) == (class_id,)


@given(st.binary(max_size=60), st.sampled_from(["csv", "jsonl"]))
def test_no_labels_file_does_more_than_raise_an_input_error(tmp_path_factory, content, suffix):
    file = tmp_path_factory.mktemp("labels") / f"l.{suffix}"
    file.write_bytes(content)
    with suppress(InputError):
        read_labels_file(file, NAMES)


@given(st.text(max_size=30))
def test_no_selection_of_classes_does_more_than_raise_an_input_error(text):
    try:
        ids = parse_classes(text, NAMES)
    except InputError:
        return
    assert set(ids) <= set(range(len(NAMES)))
