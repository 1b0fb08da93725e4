"""YAML: text as it stands, numbers and truth values where a field takes them, nothing twice."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from depthvar.errors import InputError
from depthvar.policy import DepthPolicy
from pipeline.request.yaml_file import FieldsOf, Unquoted, as_field, parse_yaml, read_yaml

ODD_TEXT = (
    "010", "no", "off", "Yes", "1_000", "0x10", "1e3", "1:30", "2024-01-01", "null", "~", "1.0",
    "=", ".inf", "+5", "0o7", "true", "y", "-",
)  # fmt: skip


@pytest.mark.parametrize("text", [text for text in ODD_TEXT if text != "-"])
def test_text_is_what_stands_in_the_file(text: str):
    assert as_field(parse_yaml(f"a: {text}", "x"), dict[str, str]) == {"a": text}
    assert as_field(parse_yaml(f"[{text}, '{text}']", "x"), list[str]) == [text, text]
    assert as_field(parse_yaml(f"{text}: 1", "x"), dict[str, int]) == {text: 1}
    assert as_field(parse_yaml(f"'{text}'", "x"), str | None) == text
    assert as_field(parse_yaml(f"[{text}]", "x"), str) == [text], "a list where text is wanted"


@pytest.mark.parametrize(
    ("text", "wanted", "value"),
    [
        ("5", int, 5), ("1_000", int, 1000), ("0x1F", int, 31), ("-0b11", int, -3), ("0", int, 0),
        ("1e-3", float, 0.001), (".5", float, 0.5), ("1.", float, 1.0), ("-1_0.5", float, -10.5),
        ("2", float, 2), ("1e3", int, 1000.0), (".inf", float, float("inf")),
        ("yes", bool, True), ("Off", bool, False), ("FALSE", bool, False), ("yEs", bool, "yEs"),
        ("null", int | None, None), ("~", str | None, None), ("", str | None, None),
        ("null", Path | None, None), ("", str, None), ("no", Path, "no"),
        ("off", Literal["on", "off"], "off"),
        ("1:30", int, "1:30"), ("2024-01-01", int, "2024-01-01"), ("0x_", int, "0x_"),
        ("9" * 5000, int, "9" * 5000), ("010.5", float, 10.5), ("'5'", int, "5"),
        ("!!int '5'", int, 5), ("!!str 'no'", bool, "no"),
        ("[1, 2]", Annotated[list[Annotated[int, "x"]], "y"], [1, 2]),
        ("{1x: ~, 2: 3}", dict[str, int | None], {"1x": None, "2": 3}),
        ("{dither: off, ranking: off, reference_scale: null, rotation: 1e-3, min_depth: 2, no: no}",
         Annotated[dict[str, bool | int | str | None], FieldsOf(DepthPolicy)],
         {"dither": False, "ranking": "off", "reference_scale": None, "rotation": 0.001,
          "min_depth": 2, "no": "no"}),
    ],
)  # fmt: skip
def test_other_fields_get_what_yaml_means(text: str, wanted: object, value: object):
    found = as_field(parse_yaml(f"- {text}", "x"), list[wanted])[0]  # type: ignore[valid-type]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["010", "-08", "007_0"])
def test_a_number_with_a_zero_in_front_is_refused_with_its_line(text: str):
    content = parse_yaml(f"\n\na: {text}", "job.yaml")
    with pytest.raises(InputError, match=f"job.yaml, line 3: got {text}, wanted a number without"):
        as_field(content, dict[str, int])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands in line 1 too: keep one"),
        ("a: 1\n'a': 3\n", "line 2: the key 'a' stands in line 1 too"),
        (
            "x:\n  - {b: 1}\n  - y:\n      c: 1\n      c: 1\n",
            "line 5: the key 'c' stands in line 4",
        ),
        ("x: {a: 1, b: 2,\n a: 3}", "line 2: the key 'a' stands in line 1"),
        ("010: 1\n010: 2\n", "line 2: the key '010' stands in line 1"),
        ("x: &b {q: 1}\ny:\n  <<: *b\n  <<: *b\n", "line 4: the key '<<' stands in line 3"),
        ("a: 1\n? [b]\n: 2\n", "line 2: a key is no text"),
        ("a: 1\n?\n: 2\n", "line 2: a key is no text"),
        ("a: 1\n---\nb: 2\n", "line 2: no valid YAML: expected a single document .* another"),
        ("a:\n\tb: 1\n", "line 2: .* indent with spaces"),
        ("a: [1\n", "line 2: no valid YAML: while parsing a flow sequence"),
        ("a: &x [*x]\n", "line 1: an alias stands within"),
        ("&x a: {b: *x}\nc: &y {d: [*y]}\n", "line 2: an alias stands within"),
        ("a: *nobody\n", "line 1: no valid YAML: found undefined alias"),
        ("a: !!python/object:os.system x\n", "line 1: got the tag 'tag:yaml.org,2002:python/"),
        ("a: !mine x\n", "line 1: got the tag '!mine'"),
        ("a: !!set {x, y}\n", "line 1: got the tag"),
        ("a: 1\nb: \x07\n", "line 2: no valid YAML: the character '.x07'"),
        ('a: "\\UFFFFFFFF"\n', "no valid YAML"),
        ("a: 1\n<<: 3\n", "line 2: `<<` merges something else"),
        ("[" * 1000, "no valid YAML"),
    ],
)
def test_what_may_not_be_meant_is_refused_in_one_line_with_its_place(text: str, told: str):
    with pytest.raises(InputError, match=rf"^job\.yaml.*{told}") as caught:
        parse_yaml(text, "job.yaml")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("items", ["[*{0}, *{0}]", "{{x: *{0}, y: *{0}}}", "{{<<: *{0}, y: *{0}}}"])
def test_aliases_that_multiply_are_refused_at_once(items: str):
    lines = ["a0: &a0 {z: 1}", *(f"a{i}: &a{i} {items.format(f'a{i - 1}')}" for i in range(1, 61))]
    with pytest.raises(InputError, match=r"^job\.yaml, line \d+: the file holds more than 100,000"):
        parse_yaml("\n".join(lines), "job.yaml")


def test_a_long_file_without_aliases_is_read():
    content = parse_yaml("\n".join(f"- {i}" for i in range(5000)), "job.yaml")
    assert as_field(content, list[int]) == list(range(5000))


@pytest.mark.parametrize("data", [b"", b"# nothing\n", b"\xef\xbb\xbf\r\n", b"---\n...\n"])
def test_an_empty_file_holds_nothing(tmp_path: Path, data: bytes):
    (tmp_path / "f").write_bytes(data)
    assert read_yaml(tmp_path / "f", "--config") in (None, "")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks_of_other_systems(tmp_path: Path, end: str, mark: bytes):
    lines = "base: &b {x: 1, y: 2}\nz:\n  <<: *b\n  y: 3\n".replace("\n", end)
    (tmp_path / "f").write_bytes(mark + lines.encode())
    content = read_yaml(tmp_path / "f", "--config")
    assert as_field(content, dict[str, dict[str, int]])["z"] == {"x": 1, "y": 3}


def test_the_first_of_several_merged_mappings_wins():
    text = "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc:\n  <<: [*a, *b]\n"
    assert as_field(parse_yaml(text, "x"), dict[str, dict[str, int]])["c"] == {"x": 1, "y": 2}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner),
    max_leaves=8,
)


@given(VALUES)
def test_what_a_program_writes_reads_as_it_was(value):
    def same(found: object, meant: object) -> bool:
        if isinstance(meant, dict):
            return isinstance(found, dict) and all(same(found[k], v) for k, v in meant.items())
        if isinstance(meant, list):
            return isinstance(found, list) and all(map(same, found, meant))
        if isinstance(meant, str):
            return found == meant
        return isinstance(found, Unquoted) and as_field(found, float | None) == meant

    assert same(parse_yaml(yaml.safe_dump(value), "x"), value)


@given(st.text(max_size=40))
def test_no_text_does_more_than_raise_an_input_error(text: str):
    with suppress(InputError):
        as_field(parse_yaml(text, "x"), dict[str, int])
