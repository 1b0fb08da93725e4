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
from typing import Any

import pyarrow as pa

from pipeline.request.job_plan import JobPlan

LOSSLESS_FORMATS = ("png", "webp")
STATUS_OK = "ok"
NO_REFERENCE_SCALE = -1


@dataclass(frozen=True)
class SampleRow:
    """One planned sample. The fields are the columns, in their order."""

    index: int
    key: str
    label: int | None
    class_name: str | None
    seed: int
    model: str
    weights_sha256: str
    policy: str
    policy_json: str
    reference_scale: int
    token_layers: int
    token_layers_ratio: float
    transformer_flops: float
    decoder_flops: float
    flops_ratio: float
    depth_per_scale: list[float]
    mean_change: list[float]
    mean_log_prob: list[float]
    pixel_sha256: str
    image_sha256: str
    image_bytes: int
    width: int
    height: int
    status: str
    is_blank: bool
    is_duplicate_in_shard: bool
    prompt: str | None = None
    prompt_sha256: str | None = None
    template: str | None = None


@dataclass(frozen=True)
class Column:
    """One column: its Arrow type, its unit ("" where it has none) and what it says."""

    name: str
    type: pa.DataType
    unit: str
    description: str
    is_compact: bool = False
    is_nullable: bool = False


_FLOATS = pa.list_(pa.field("element", pa.float32(), nullable=False))

COLUMNS = (
    Column("index", pa.int64(), "", "global index of the sample in the plan", True),
    Column("key", pa.string(), "", "index in twelve digits: the key of the tar members"),
    Column("label", pa.int32(), "", "class id, also the .cls member", True),
    Column("class_name", pa.string(), "", "name of the class in the model's list", True),
    Column(
        "seed", pa.int64(), "", "job seed; the sample's noise is a function of (seed, index)", True
    ),
    Column("model", pa.string(), "", "name of the model", True),
    Column("weights_sha256", pa.string(), "", "SHA-256 of the weights"),
    Column("policy", pa.string(), "", "preset of the depth policy", True),
    Column("policy_json", pa.string(), "", "every field of the depth policy, as JSON"),
    Column(
        "reference_scale",
        pa.int32(),
        "",
        "reference scale R of the policy, counted from 0; -1 where it has none",
        True,
    ),
    Column(
        "token_layers",
        pa.int64(),
        "tokens x blocks",
        "blocks passed, summed over the tokens of one guided stream",
    ),
    Column(
        "token_layers_ratio", pa.float64(), "share", "token_layers as a share of full depth", True
    ),
    Column("transformer_flops", pa.float64(), "FLOP", "transformer, both guided streams"),
    Column("decoder_flops", pa.float64(), "FLOP", "image decoder"),
    Column(
        "flops_ratio",
        pa.float64(),
        "share",
        "FLOPs of the whole image as a share of full depth",
        True,
    ),
    Column("depth_per_scale", _FLOATS, "blocks", "mean depth of the tokens of each scale"),
    Column("mean_change", _FLOATS, "", "ranking signal, mean over the tokens of each scale", True),
    Column(
        "mean_log_prob", _FLOATS, "nat", "log-probability of the drawn tokens, mean per scale", True
    ),
    Column(
        "pixel_sha256",
        pa.string(),
        "",
        "SHA-256 of the sampled uint8 pixels, rows of the image from the top, channels last; "
        "what png and webp decode to (jpg loses some)",
        True,
    ),
    Column("image_sha256", pa.string(), "", "SHA-256 of the image file in the tar"),
    Column("image_bytes", pa.int64(), "byte", "size of the image file in the tar"),
    Column("width", pa.int32(), "pixel", "width of the image"),
    Column("height", pa.int32(), "pixel", "height of the image"),
    Column("status", pa.string(), "", '"ok": the sample is in the tar; else why it is not'),
    Column("is_blank", pa.bool_(), "", "all pixels are equal", True),
    Column(
        "is_duplicate_in_shard",
        pa.bool_(),
        "",
        "an earlier sample of the shard has the same pixels",
        True,
    ),
)

TEXT_COLUMNS = (
    *(
        replace(column, description=f"{column.description}; null without classes", is_nullable=True)
        if column.name in ("label", "class_name")
        else column
        for column in COLUMNS
    ),
    Column("prompt", pa.string(), "", "text the image was made from, also the .txt member", True),
    Column("prompt_sha256", pa.string(), "", "SHA-256 of the prompt in UTF-8"),
    Column(
        "template",
        pa.string(),
        "",
        "template that the prompt was made with; null where it was written as it is",
        True,
        is_nullable=True,
    ),
)
"""Of the datasets of text models."""


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
