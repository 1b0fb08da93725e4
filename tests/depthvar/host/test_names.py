from __future__ import annotations

import pytest

from depthvar.host.names import comparable, comparable_in_any_case


def test_composed_and_decomposed_letters_are_the_same_name():
    assert comparable("cafe\u0301") == comparable("caf\u00e9") == "caf\u00e9"
    assert comparable("\u1112\u1161\u11ab") == comparable("\ud55c")


@pytest.mark.parametrize("other", ["Caf\u00e9", "cafe", "\uff43af\u00e9", "caf\u00e9 "])
def test_what_reads_otherwise_is_another_name(other: str):
    assert comparable(other) != comparable("caf\u00e9")


@pytest.mark.parametrize(
    ("one", "other"),
    [("CAFE\u0301", "caf\u00e9"), ("STRASSE", "stra\u00dfe"), ("\u0345", "\u0399")],
)
def test_case_does_not_count_in_any_form(one: str, other: str):
    assert comparable_in_any_case(one) == comparable_in_any_case(other)


def test_what_a_file_name_that_is_not_utf_8_becomes_is_compared_too():
    assert comparable("a\udcff") == "a\udcff"
    assert comparable_in_any_case("A\udcff") == "a\udcff"
