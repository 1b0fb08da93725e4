from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthvar.errors import InputError
from pipeline.request.classes import parse_classes

NAMES = ("zero", "one", "tench, Tinca tinca", "crane", "crane", "Seven")


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


def test_names_that_differ_in_their_unicode_form_alone_are_told_by_id():
    with pytest.raises(InputError, match=r"classes 0, 1: write id:0 for .* or id:1 for"):
        parse_classes("caf\u00e9", ("caf\u00e9", "cafe\u0301"))


ODD_NAMES = st.lists(st.text('01:-,"ai dl', min_size=1, max_size=5), min_size=1, unique=True)


@given(ODD_NAMES, st.data())
def test_the_name_of_a_class_never_selects_another(names, data):
    class_id = data.draw(st.integers(0, len(names) - 1))
    with suppress(InputError):
        assert parse_classes(names[class_id], names) == (class_id,)


@given(st.text(max_size=30))
def test_no_selection_of_classes_does_more_than_raise_an_input_error(text):
    try:
        ids = parse_classes(text, NAMES)
    except InputError:
        return
    assert set(ids) <= set(range(len(NAMES)))
