from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from pipeline.shards.schema import (
    COLUMNS,
    SHARD_SCHEMA,
    TEXT_COLUMNS,
    TEXT_SCHEMA,
    SampleRow,
    finite_floats,
    json_member,
    markdown_table,
    rows_to_table,
)

ROW = SampleRow(
    index=3, key="000000000003", label=1, class_name='é "|\n', seed=2**62, model="fake",
    weights_sha256="ab" * 32, policy="full", policy_json="{}", reference_scale=-1,
    token_layers=10, token_layers_ratio=1.0, transformer_flops=2e6, decoder_flops=1e6,
    flops_ratio=1.0, depth_per_scale=[4.0, 4.0], mean_change=[0.0, 1.0],
    mean_log_prob=[-1.0, -0.5], pixel_sha256="0" * 64, image_sha256="1" * 64, image_bytes=99,
    width=7, height=7, status="ok", is_blank=False, is_duplicate_in_shard=True,
)  # fmt: skip


NO_CLASS = dataclasses.replace(
    ROW, label=None, class_name=None, prompt="é fox", prompt_sha256="2" * 64
)


def test_the_fields_of_a_row_are_the_columns_in_order():
    names = [f.name for f in dataclasses.fields(SampleRow)]
    assert TEXT_SCHEMA.names == names == [c.name for c in TEXT_COLUMNS]
    assert SHARD_SCHEMA.names == names[:-3] == [c.name for c in COLUMNS]
    assert names[-3:] == ["prompt", "prompt_sha256", "template"]


def test_a_row_survives_the_table():
    (row,) = rows_to_table([ROW]).to_pylist()
    assert row == {c.name: getattr(ROW, c.name) for c in COLUMNS}
    assert rows_to_table([NO_CLASS], TEXT_SCHEMA).to_pylist() == [dataclasses.asdict(NO_CLASS)]


def test_only_what_a_text_models_sample_may_lack_may_be_null():
    assert not any(field.nullable for field in SHARD_SCHEMA)
    nullable = [field.name for field in TEXT_SCHEMA if field.nullable]
    assert nullable == ["label", "class_name", "template"]


def test_the_json_member_of_a_text_model_holds_the_prompt_and_null_for_no_class():
    values = json.loads(json_member(NO_CLASS, TEXT_COLUMNS))
    assert values["prompt"] == "é fox"
    assert [values[name] for name in ("label", "class_name", "template")] == [None] * 3
    assert not {"prompt", "template"} & json.loads(json_member(ROW)).keys()


def test_every_column_carries_its_meaning_in_the_schema():
    for field in TEXT_SCHEMA:
        assert field.metadata[b"description"]
        assert b"unit" in field.metadata


def test_the_json_member_has_the_same_keys_and_types_whatever_the_values():
    other = dataclasses.replace(ROW, reference_scale=5, flops_ratio=0.0, mean_change=[1.0])

    def shape(row):
        values = json.loads(json_member(row))
        return {name: (type(v), type(v[0]) if isinstance(v, list) else None)
                for name, v in values.items()}  # fmt: skip

    assert shape(ROW) == shape(other)
    assert json.loads(json_member(ROW))["class_name"] == ROW.class_name
    assert json_member(ROW).isascii()


def test_floats_keep_their_shortest_spelling_and_value():
    values = np.array([0.1, -3.25, 1e-8, 0.0], dtype=np.float32)
    assert finite_floats(values, "x") == [0.1, -3.25, 1e-08, 0.0]
    assert np.array_equal(np.float32(finite_floats(values, "x")), values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_json_cannot_hold_is_refused(bad):
    with pytest.raises(ValueError, match="mean_change"):
        finite_floats(np.array([0.0, bad], dtype=np.float32), "mean_change")


def test_the_markdown_table_names_every_column():
    lines = markdown_table().splitlines()
    assert len(lines) == len(COLUMNS) + 2
    assert all(line.count("|") == 6 for line in lines)
