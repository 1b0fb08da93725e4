"""The dataset card: what the dataset is, for people and for the Hugging Face hub.

It ends in a comment with a hash of itself: a card that a user edited, or wrote, is told by it.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections import Counter
from string import Template
from typing import Any

import yaml

from depthvar.policy import DepthPolicy
from depthvar.presets import PRESETS, make_policy
from pipeline.request.job_plan import FormerPolicy, JobPlan, policy_fields
from pipeline.request.prompts import ClassPrompts
from pipeline.shards.depth_maps import DEPTH_MAP_SUFFIX
from pipeline.shards.schema import columns_of, compact_features, markdown_table

_MAX_ROWS = 20
_MAX_NAMED = 1000
_MAX_TEMPLATES = 5
_SEAL = re.compile(rb"\n<!-- depthvar keeps this card once it is edited: ([0-9a-f]{64}) -->\n\Z")
# Literal patterns: the hub and `datasets` read the front matter, where names stand as YAML alone.
_CARD = Template("""\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: train/*.tar
task_categories:
$tasks
tags:
- synthetic
- webdataset
$features---
# $title

$num_samples $images, sampled by a visual autoregressive model. No photograph is in it.

| | |
|---|---|
$facts

## Loading

```python
import webdataset as wds

shards = "train/{00000..$last_shard}.tar"
dataset = wds.WebDataset(shards, shardshuffle=False).decode("pil")
for image, $names, metadata in dataset.to_tuple("$format", $suffixes, "json"):
    ...
```

`datasets.load_dataset` gives the same members as columns, a class as a `ClassLabel`.
One row per sample, with $rows, pixel hashes and the compute it took:
`pandas.read_parquet("meta")`, and so with polars, DuckDB and pyarrow.

## Columns

A sample has $number members: `.$format`, $members and `.json` (the columns
marked so). Samples and rows join on the key.

$columns

## $subjects

$table
""")

_CAPTIONS = {
    "cls": ("label", "`.cls` (the class id in ASCII)", "- image-classification"),
    "txt": ("prompt", "`.txt` (the prompt in UTF-8)", "- text-to-image"),
}
"""What each member of a sample is called, what it holds and what it is good for."""


def dataset_card(plan: JobPlan, num_shards: int, num_samples: int, tar_bytes: int) -> str:
    """The README.md of a dataset with `num_shards` shards done: Markdown with YAML front matter."""
    captions = [_CAPTIONS[suffix] for suffix in plan.caption_suffixes]
    names, members, tasks = zip(*captions, strict=True)
    return _CARD.substitute(
        title=f"{_cell(plan.model)}: {plan.policy.preset}",
        num_samples=f"{num_samples:,}",
        facts="\n".join(
            f"| {name} | {_cell(value)} |"
            for name, value in _facts(plan, num_shards, num_samples, tar_bytes)
        ),
        last_shard=f"{max(num_shards - 1, 0):05d}",
        format=plan.image_format,
        images="labelled images" if plan.class_names else "images with their prompts",
        tasks="\n".join(tasks),
        features=yaml.safe_dump(
            {"dataset_info": {"features": _features(plan)}},
            sort_keys=False,
            allow_unicode=True,
            width=float("inf"),
        ),
        names=", ".join(names),
        rows=", ".join(f"{name}s" for name in names),
        suffixes=", ".join(f'"{suffix}"' for suffix in plan.caption_suffixes),
        number="four" if len(members) > 1 else "three",
        members=", ".join(members),
        columns=markdown_table(columns_of(plan)),
        subjects=plan.subject_words[1].capitalize(),
        table=_subjects(plan),
    )


def _features(plan: JobPlan) -> list[dict[str, Any]]:
    """The columns that `datasets` makes of a sample's members, as it writes its own in cards.

    They have to be all of them, `__key__` and `__url__` too.
    """
    names = plan.class_names
    twice = {name for name, count in Counter(names).items() if count > 1}  # which it refuses
    labels = {str(i): f"{n} ({i})" if n in twice else n for i, n in enumerate(names)}
    kinds: dict[str, dict[str, Any]] = {
        "cls": {"dtype": {"class_label": {"names": labels}}},
        "txt": {"dtype": "string"},
    }
    members = {
        plan.image_format: {"dtype": "image"},
        **{suffix: kinds[suffix] for suffix in plan.caption_suffixes},
        "json": {"struct": compact_features(columns_of(plan))},
        **({DEPTH_MAP_SUFFIX: {"sequence": "uint8"}} if plan.depth_map_grids else {}),
        "__key__": {"dtype": "string"},
        "__url__": {"dtype": "string"},
    }
    return [{"name": name, **kind} for name, kind in members.items()]


def _depth_maps(plan: JobPlan) -> list[tuple[str, str]]:
    grids = ", ".join(f"{rows}x{columns}" for rows, columns in plan.depth_map_grids)
    what = "blocks of every token, uint8, scale by scale in raster order"
    return [("depth maps", f"`.depth.npy`: {what}; {grids}")] if grids else []


def _templates(plan: JobPlan) -> list[tuple[str, str]]:
    templates = plan.prompts.templates if isinstance(plan.prompts, ClassPrompts) else ()
    more = [f"{len(templates) - _MAX_TEMPLATES:,} more"] * (len(templates) > _MAX_TEMPLATES)
    told = "; ".join([*templates[:_MAX_TEMPLATES], *more])
    return [("prompts", f"one of {len(templates):,} templates, by chance: {told}")] if told else []


def sealed(card: str) -> bytes:
    """The file of a card: its text and a comment by which `is_edited` tells it."""
    text = card.encode()
    digest = hashlib.sha256(text).hexdigest()
    return text + f"\n<!-- depthvar keeps this card once it is edited: {digest} -->\n".encode()


def is_edited(file: bytes) -> bool:
    """Whether a card is other than `sealed` made it; one of an earlier release may be."""
    seal = _SEAL.search(file)
    return seal is None or hashlib.sha256(file[: seal.start()]).hexdigest() != seal[1].decode()


def _facts(
    plan: JobPlan, num_shards: int, num_samples: int, tar_bytes: int
) -> list[tuple[str, str]]:
    compute, drawing = plan.compute, plan.sampling
    flops = compute.transformer_flops + compute.decoder_flops
    mode = "grey" if plan.image_channels == 1 else "RGB"
    sampling = (
        f"guidance {drawing.cfg}, top-k {drawing.top_k}, top-p {drawing.top_p}, "
        f"{plan.precision}, seed {plan.seed}"
    )
    is_partial = num_samples < plan.num_samples
    return [
        ("model", f"{plan.model}, weights SHA-256 {plan.weights_sha256}"),
        (
            "samples",
            f"{num_samples:,}" + (f" of {plan.num_samples:,} planned" if is_partial else ""),
        ),
        (plan.subject_words[1], f"{len(plan.subject_counts):,}"),
        *_templates(plan),
        ("shards", f"{num_shards:,} ({tar_bytes / 1e6:,.1f} MB)"),
        (
            "images",
            f"{plan.image_size[1]} x {plan.image_size[0]} {mode} {plan.image_format}",
        ),
        ("depth policy", _policy(plan.policy)),
        *_depth_maps(plan),
        (
            "mean depth of the scales",
            f"{', '.join(f'{depth:.3g}' for depth in compute.depth_per_scale)} blocks",
        ),
        (
            "token-layers",
            f"{compute.token_layers:,}: {compute.token_layers_ratio:.3f} of full depth",
        ),
        ("compute per image", f"{flops / 1e9:,.3f} GFLOP: {compute.flops_ratio:.3f} of full depth"),
        ("sampling", sampling),
        ("plan fingerprint", plan.fingerprint),
    ]


def _policy(policy: DepthPolicy | FormerPolicy) -> str:
    """The preset, its reference scale, and the fields that are not as the preset has them."""
    usual = policy_fields(make_policy(policy.preset)) if policy.preset in PRESETS else {}
    words = [policy.preset]
    if policy.reference_scale is not None:
        words.append(
            f"reference scale {policy.reference_scale} (the last at full depth, counted from 0)"
        )
    words += [
        f"{name} {value}"
        for name, value in policy_fields(policy).items()
        if name not in ("preset", "reference_scale") and usual.get(name) != value
    ]
    return ", ".join(words)


def _subjects(plan: JobPlan) -> str:
    """A table of few classes or prompts; of many a folded list, of very many the first alone."""
    counts = plan.subject_counts
    named = {subject: _cell(plan.subject_name(subject)) for subject in counts}
    head = ("label", "name") if plan.class_names else ("number", "prompt")
    if len(counts) <= _MAX_ROWS:
        rows = [f"| {i} | {named[i]} | {count:,} |" for i, count in counts.items()]
        return "\n".join([f"| {' | '.join(head)} | planned samples |", "|---|---|---|", *rows])
    fewest, most = min(counts.values()), max(counts.values())
    each = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    shown = [f"{i} {named[i]}" for i in list(counts)[:_MAX_NAMED]]
    if len(counts) > len(shown):
        shown.append(f"{len(counts) - len(shown):,} more in `plan.json`")
    return (
        f"<details>\n<summary>{len(counts):,} {plan.subject_words[1]}, {each} planned samples each:"
        f" {' and '.join(head)}</summary>\n\n{' · '.join(shown)}\n\n</details>"
    )


def _cell(text: str) -> str:
    """Text that stays inside its table cell and means nothing to Markdown or HTML."""
    flat = " ".join(html.escape(text, quote=False).split())
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", flat)
