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
from pipeline.labels import LabelCounts, parse_classes, read_labels_file

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
        ("l.csv", b"zero,1\none,0", "line 2: got the count '0'"),
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
    ],
)
def test_a_bad_line_of_a_labels_file_is_named(tmp_path: Path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=told):
        read_labels_file(tmp_path / name, NAMES)


def test_a_missing_labels_file_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be read"):
        read_labels_file(tmp_path / "none.csv", NAMES)


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
