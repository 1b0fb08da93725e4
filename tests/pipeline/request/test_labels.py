from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthvar.errors import InputError
from pipeline.request.labels import LabelCounts


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
    started = time.process_time()
    window = labels.labels(labels.total // 3, labels.total // 3 + 1000)
    assert time.process_time() - started < 0.5
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
