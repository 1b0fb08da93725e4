"""What is recorded about a sample: the one place with names, types, units and meanings.

A row of `meta/*.parquet` holds every column, the `.json` member of the tar those marked compact.
Both depend on the plan and the sample alone: what varies from run to run (times, worker, attempt)
stands in the commit record. The datasets of text models have columns of their own for the prompt,
and no class where the plan has none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, get_type_hints

import pyarrow as pa

from pipeline.request.job_plan import JobPlan

LOSSLESS_FORMATS = ("png", "webp")
STATUS_OK = "ok"
NO_REFERENCE_SCALE = -1


@dataclass(frozen=True)
class Column:
    """One column: its Arrow type, what it says, and its unit ("" where it has none)."""

    type: pa.DataType
    description: str
    unit: str = ""
    is_compact: bool = False
    is_nullable: bool = False
    name: str = ""


_INT32, _INT64, _FLOAT64 = pa.int32(), pa.int64(), pa.float64()
_TEXT, _BOOL = pa.string(), pa.bool_()
_FLOATS = pa.list_(pa.field("element", pa.float32(), nullable=False))
_compact = partial(Column, is_compact=True)


@dataclass(frozen=True)
class SampleRow:
    """One planned sample. The fields are the columns, in their order."""

    index: Annotated[int, _compact(_INT64, "global index of the sample in the plan")]
    key: Annotated[str, Column(_TEXT, "index in twelve digits: the key of the tar members")]
    label: Annotated[int | None, _compact(_INT32, "class id, also the .cls member")]
    class_name: Annotated[str | None, _compact(_TEXT, "name of the class in the model's list")]
    seed: Annotated[
        int, _compact(_INT64, "job seed; the sample's noise is a function of (seed, index)")
    ]
    model: Annotated[str, _compact(_TEXT, "name of the model")]
    weights_sha256: Annotated[str, Column(_TEXT, "SHA-256 of the weights")]
    policy: Annotated[str, _compact(_TEXT, "preset of the depth policy")]
    policy_json: Annotated[str, Column(_TEXT, "every field of the depth policy, as JSON")]
    reference_scale: Annotated[
        int,
        _compact(_INT32, "reference scale R of the policy, counted from 0; -1 where it has none"),
    ]
    token_layers: Annotated[
        int,
        Column(
            _INT64, "blocks passed, summed over the tokens of one guided stream", "tokens x blocks"
        ),
    ]
    token_layers_ratio: Annotated[
        float, _compact(_FLOAT64, "token_layers as a share of full depth", "share")
    ]
    transformer_flops: Annotated[
        float, Column(_FLOAT64, "transformer, both guided streams", "FLOP")
    ]
    decoder_flops: Annotated[float, Column(_FLOAT64, "image decoder", "FLOP")]
    flops_ratio: Annotated[
        float, _compact(_FLOAT64, "FLOPs of the whole image as a share of full depth", "share")
    ]
    depth_per_scale: Annotated[
        list[float], Column(_FLOATS, "mean depth of the tokens of each scale", "blocks")
    ]
    mean_change: Annotated[
        list[float], _compact(_FLOATS, "ranking signal, mean over the tokens of each scale")
    ]
    mean_log_prob: Annotated[
        list[float],
        _compact(_FLOATS, "log-probability of the drawn tokens, mean per scale", "nat"),
    ]
    pixel_sha256: Annotated[
        str,
        _compact(
            _TEXT,
            "SHA-256 of the sampled uint8 pixels, rows of the image from the top, channels last; "
            "what png and webp decode to (jpg loses some)",
        ),
    ]
    image_sha256: Annotated[str, Column(_TEXT, "SHA-256 of the image file in the tar")]
    image_bytes: Annotated[int, Column(_INT64, "size of the image file in the tar", "byte")]
    width: Annotated[int, Column(_INT32, "width of the image", "pixel")]
    height: Annotated[int, Column(_INT32, "height of the image", "pixel")]
    status: Annotated[str, Column(_TEXT, '"ok": the sample is in the tar; else why it is not')]
    is_blank: Annotated[bool, _compact(_BOOL, "all pixels are equal")]
    is_duplicate_in_shard: Annotated[
        bool, _compact(_BOOL, "an earlier sample of the shard has the same pixels")
    ]
    prompt: Annotated[
        str | None, _compact(_TEXT, "text the image was made from, also the .txt member")
    ] = None
    prompt_sha256: Annotated[str | None, Column(_TEXT, "SHA-256 of the prompt in UTF-8")] = None
    template: Annotated[
        str | None,
        _compact(
            _TEXT,
            "template that the prompt was made with; null where it was written as it is",
            is_nullable=True,
        ),
    ] = None


def _columns() -> tuple[Column, ...]:
    hints = get_type_hints(SampleRow, include_extras=True)
    return tuple(replace(hint.__metadata__[0], name=name) for name, hint in hints.items())


TEXT_COLUMNS = tuple(
    replace(column, description=f"{column.description}; null without classes", is_nullable=True)
    if column.name in ("label", "class_name")
    else column
    for column in _columns()
)
"""Of the datasets of text models."""
_OF_PROMPTS = ("prompt", "prompt_sha256", "template")
COLUMNS = tuple(column for column in _columns() if column.name not in _OF_PROMPTS)


def columns_of(plan: JobPlan) -> tuple[Column, ...]:
    """The columns of a plan's dataset."""
    return COLUMNS if plan.prompts is None else TEXT_COLUMNS


def _schema(columns: Sequence[Column]) -> pa.Schema:
    return pa.schema(
        [
            pa.field(
                column.name,
                column.type,
                nullable=column.is_nullable,
                metadata={"unit": column.unit, "description": column.description},
            )
            for column in columns
        ]
    )


SHARD_SCHEMA, TEXT_SCHEMA = _schema(COLUMNS), _schema(TEXT_COLUMNS)


def schema_of(plan: JobPlan) -> pa.Schema:
    """The schema of the Parquet files of a plan's dataset."""
    return SHARD_SCHEMA if plan.prompts is None else TEXT_SCHEMA


def caption(plan: JobPlan, label: int, index: int) -> dict[str, Any]:
    """What the row of a planned sample says of class and prompt, by column."""
    class_id, prompt = plan.class_of(label), plan.prompt_of(label, index)
    name = None if class_id is None else plan.class_names[class_id]
    told: dict[str, Any] = {"label": class_id, "class_name": name}
    if prompt is not None:
        digest = hashlib.sha256(prompt.text.encode()).hexdigest()
        told |= {"prompt": prompt.text, "prompt_sha256": digest, "template": prompt.template}
    return told


def rows_to_table(rows: list[SampleRow], schema: pa.Schema = SHARD_SCHEMA) -> pa.Table:
    """The rows of a shard as a table."""
    return pa.Table.from_pylist([vars(row) for row in rows], schema=schema)


def json_member(row: SampleRow, columns: Sequence[Column] = COLUMNS) -> bytes:
    """The `.json` member: ASCII, the same keys and types in every sample of such columns."""
    values = {column.name: getattr(row, column.name) for column in columns if column.is_compact}
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode("ascii")


def compact_features(columns: Sequence[Column]) -> list[dict[str, str]]:
    """What is in the `.json` member, as the cards of the Hugging Face Hub spell it."""
    return [
        {"name": column.name, "sequence": str(column.type.value_type)}
        if pa.types.is_list(column.type)
        else {"name": column.name, "dtype": str(column.type)}
        for column in columns
        if column.is_compact
    ]


def finite_floats(values: Any, what: str) -> list[float]:
    """A list of float32 values as Python floats with their shortest spelling.

    Errors: `ValueError` where one is not finite: JSON has no name for it.
    """
    floats = [float(str(value)) for value in values]
    if not all(map(math.isfinite, floats)):
        raise ValueError(f"got {what} {floats}, wanted finite numbers")
    return floats


def markdown_table(columns: Sequence[Column] = COLUMNS) -> str:
    """The columns as a Markdown table, for the README and the dataset card."""
    lines = ["| column | type | unit | in .json | meaning |", "|---|---|---|---|---|"]
    for column in columns:
        kind = "list of float" if pa.types.is_list(column.type) else str(column.type)
        mark = "yes" if column.is_compact else ""
        lines.append(
            f"| `{column.name}` | {kind} | {column.unit} | {mark} | {column.description} |"
        )
    return "\n".join(lines)
