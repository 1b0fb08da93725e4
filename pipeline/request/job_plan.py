"""What a job will make, decided before it starts: every shard is a pure function of this plan.

It holds the values that the sampler runs by; how plan.json spells them is known here alone.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from depthvar.errors import InputError, shown
from depthvar.policy import DepthPolicy
from depthvar.randomness import prompt_uniform
from depthvar.settings import Grid, SamplingSettings
from pipeline.request.generation import DEFAULT_PNG_LEVEL, ImageFormat, Precision
from pipeline.request.labels import MAX_SAMPLES, LabelCounts
from pipeline.request.prompts import Prompt, Prompts, WrittenPrompts, distinct_texts

FORMAT_VERSION = 1
KEY_DIGITS = 12

PositiveInt = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class ImageCompute:
    """What one image costs: known from the depth plan, equal for all images.

    Token-layers are those of the conditional stream, FLOPs those of all streams that run, a
    multiply-add counted as two. `depth_per_scale` is the mean number of blocks a token of each
    scale passes. `full_*` is the same model at full depth.
    """

    __pydantic_config__ = STRICT

    token_layers: PositiveInt
    full_token_layers: PositiveInt
    transformer_flops: float
    decoder_flops: float
    full_transformer_flops: float
    depth_per_scale: tuple[float, ...]

    @property
    def token_layers_ratio(self) -> float:
        """Token-layers spent, as a share of full depth."""
        return self.token_layers / self.full_token_layers

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the whole image (transformer and decoder), as a share of full depth."""
        full = self.full_transformer_flops + self.decoder_flops
        return (self.transformer_flops + self.decoder_flops) / full


@dataclass(frozen=True)
class FormerPolicy:
    """A stored policy that is none of this release's: its images can be read, not made again."""

    stored: Mapping[str, JsonValue]

    @property
    def preset(self) -> str:
        """The name of the preset it was made from."""
        return str(self.stored["preset"])

    @property
    def reference_scale(self) -> int | None:
        """R, None where it has none."""
        scale = self.stored["reference_scale"]
        return scale if isinstance(scale, int) else None


def policy_fields(policy: DepthPolicy | FormerPolicy) -> Mapping[str, JsonValue]:
    """Every field of a policy as plan.json holds it, by name."""
    if isinstance(policy, FormerPolicy):
        return policy.stored
    return policy.as_stored


def _policy(value: object) -> object:
    """The policy that is stored so; what is none yet and names no preset is left to be refused."""
    if not isinstance(value, dict) or not {"preset", "reference_scale"} <= value.keys():
        return value
    try:
        policy = _POLICY.validate_python(value)
    except ValidationError:
        return FormerPolicy(value)
    is_all = canonical_json(policy_fields(policy)) == canonical_json(value)
    return policy if is_all else FormerPolicy(value)


@dataclass(frozen=True)
class Segment:
    """A run of samples planned together. Shards never cross a segment's start.

    `num_added`: the last entries of a text model's prompts that came with it.
    """

    __pydantic_config__ = STRICT

    counts: LabelCounts
    num_added: Annotated[int, Field(ge=0)] = 0

    @property
    def as_stored(self) -> dict[str, Any]:
        """What plan.json holds of it."""
        stored = asdict(self)
        return stored if self.num_added else {"counts": stored["counts"]}


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """One shard: the global indices start ... stop - 1 and their labels, int64 (stop - start,).

    A label is a class id, or of a text model the entry of `prompts` that a sample is made for.
    """

    shard_id: int
    start: int
    stop: int
    labels: np.ndarray
    batch_size: int

    @property
    def num_samples(self) -> int:
        """Samples in this shard."""
        return self.stop - self.start

    @property
    def micro_batches(self) -> list[tuple[int, int]]:
        """Global (start, stop) of each batch, fixed by the plan."""
        starts = range(self.start, self.stop, self.batch_size)
        return [(start, min(start + self.batch_size, self.stop)) for start in starts]


@dataclass(frozen=True)
class JobPlan:
    """The whole job: everything that decides a byte of the dataset, labels included.

    Memory and look-ups do not grow with the number of samples. All but `segments` are the settings,
    which extending a dataset keeps. Errors: `InputError` for labels that cannot be planned.
    """

    __pydantic_config__ = STRICT

    model: str
    weights_sha256: Sha256
    class_names: tuple[str, ...]
    image_size: tuple[PositiveInt, PositiveInt]
    image_channels: int
    policy: Annotated[DepthPolicy | FormerPolicy, BeforeValidator(_policy)]
    sampling: SamplingSettings
    precision: Precision
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    samples_per_shard: PositiveInt
    batch_size: PositiveInt
    image_format: ImageFormat
    compute: ImageCompute
    segments: tuple[Segment, ...]
    depth_map_grids: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    """Rows and columns of the scales whose depths are stored with every image; or none."""
    png_level: Annotated[int, Field(ge=0, le=9)] = DEFAULT_PNG_LEVEL
    prompts: Prompts | None = None
    """What a text model is told; None for a class-conditional model."""
    text_encoder_sha256: Sha256 | None = None
    """Identity of what makes states of the prompts, or of the file of states in its place."""

    def __post_init__(self) -> None:
        if not self.segments:
            raise InputError("got a plan without samples, wanted at least one")
        if self.image_channels not in (1, 3):
            raise InputError(f"got {self.image_channels} image channels, wanted 1 or 3")
        if self.prompts is not None:
            self.prompts.check_entries(self.class_names)
        num_labels = self.num_labels
        for segment in reversed(self.segments):
            if segment.counts.class_ids[-1] >= num_labels:
                raise InputError(
                    f"got class id {segment.counts.class_ids[-1]}, "
                    f"wanted 0 to {num_labels - 1} of {self.model}"
                )
            num_labels -= segment.num_added
        if self.num_samples > MAX_SAMPLES:
            raise InputError(f"got {self.num_samples} samples, wanted at most {MAX_SAMPLES}")

    @property
    def runnable_policy(self) -> DepthPolicy:
        """The depth policy to sample with; `InputError` where this release has none such."""
        if isinstance(self.policy, FormerPolicy):
            raise InputError(
                f"got a plan with a policy {self.policy.preset!r} of another release, which this"
                " one cannot run: use the release that wrote it"
            )
        return self.policy

    @cached_property
    def policy_json(self) -> str:
        """Every field of the depth policy as canonical JSON."""
        return canonical_json(policy_fields(self.policy)).decode()

    @cached_property
    def num_samples(self) -> int:
        """Samples of all segments."""
        return sum(segment.counts.total for segment in self.segments)

    @cached_property
    def num_shards(self) -> int:
        """Shards of all segments; ids run from 0 without a gap."""
        return self._first_shards[-1]

    @cached_property
    def total_counts(self) -> LabelCounts:
        """Samples per class over all segments."""
        totals: Counter[int] = Counter()
        for segment in self.segments:
            totals.update(segment.counts.as_mapping())
        return LabelCounts.from_mapping(totals)

    @property
    def num_labels(self) -> int:
        """Labels that shards may have: the classes, or a text model's entries of prompts."""
        if self.prompts is None:
            return len(self.class_names)
        return self.prompts.num_entries(self.class_names)

    def class_of(self, label: int) -> int | None:
        """The class id that a label of a shard stands for; None where there are no classes."""
        return label if self.prompts is None else self.prompts.class_of(label)

    def prompt_of(self, label: int, index: int) -> Prompt | None:
        """What the sample of a global index is asked for; None for a class-conditional model."""
        if self.prompts is None:
            return None
        ways = self.prompts.num_wordings
        chosen = int(ways * prompt_uniform(self.seed, index)) if ways > 1 else 0
        return self.prompts.worded(label, chosen, self.class_names)

    def distinct_prompts(self) -> Iterator[str]:
        """Every prompt that a sample may have, each once; none for a class-conditional model."""
        if self.prompts is not None:
            yield from distinct_texts(self.prompts, self.total_counts.class_ids, self.class_names)

    @cached_property
    def subject_counts(self) -> dict[int, int]:
        """Samples of each subject: what images are sorted by, a class or else a prompt.

        A subject's id is the class id, or where there are no classes the label of a shard.
        """
        counts: Counter[int] = Counter()
        for label, count in self.total_counts.as_mapping().items():
            counts[self.subject_of(label)] += count
        return dict(sorted(counts.items()))

    def subject_of(self, label: int) -> int:
        """The subject that a label of a shard belongs to."""
        class_id = self.class_of(label)
        return label if class_id is None else class_id

    def subject_name(self, subject: int) -> str:
        """The name of a class, or a prompt."""
        if self.class_names or self.prompts is None:
            return self.class_names[subject]
        return self.prompts.worded(subject, 0, ()).text

    def stored_subject(self, class_id: int | None, prompt: str | None) -> int | None:
        """The subject of a stored sample by what is stored of it; None for none of the plan's."""
        return self._subject_of_text.get(prompt) if class_id is None else class_id

    @property
    def subject_words(self) -> tuple[str, str]:
        """What one subject is called, and many."""
        return ("class", "classes") if self.class_names else ("prompt", "prompts")

    @property
    def subjects_told(self) -> str:
        """How many classes or prompts the images are of."""
        return f"{len(self.subject_counts):,} {self.subject_words[1]}"

    @property
    def caption_suffixes(self) -> tuple[str, ...]:
        """The members that say what an image of the dataset shows."""
        return (*("cls",) * bool(self.class_names), *("txt",) * (self.prompts is not None))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of the settings and all segments."""
        return self._segment_fingerprints[-1]

    def shard_fingerprint(self, shard_id: int) -> str:
        """SHA-256 of the settings and the segments up to the shard's own: extending keeps it."""
        return self._segment_fingerprints[self._segment_of(shard_id)]

    def shard_range(self, shard_id: int) -> tuple[int, int]:
        """The global indices (start, stop) of a shard."""
        segment = self._segment_of(shard_id)
        size = self.samples_per_shard
        start = self._first_samples[segment] + (shard_id - self._first_shards[segment]) * size
        return start, min(start + size, self._first_samples[segment + 1])

    def shard(self, shard_id: int) -> ShardPlan:
        """One shard with its labels, made on demand in milliseconds."""
        segment = self._segment_of(shard_id)
        start, stop = self.shard_range(shard_id)
        offset = self._first_samples[segment]
        labels = self.segments[segment].counts.labels(start - offset, stop - offset)
        return ShardPlan(shard_id, start, stop, labels, self.batch_size)

    def to_json(self) -> bytes:
        """The content of plan.json: readable, ends with a line feed."""
        content = {
            "fingerprint": self.fingerprint,
            "settings": self.settings_as_stored,
            "segments": [segment.as_stored for segment in self.segments],
        }
        return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()

    @staticmethod
    def from_json(data: bytes) -> JobPlan:
        """The plan back from `to_json`, checked strictly, its fingerprint included.

        Errors: `InputError` with the first thing that is wrong.
        """
        try:
            stored = _PLAN_FILE.validate_json(data)
            plan = _PLAN.validate_json(json.dumps(_as_fields(stored.settings, stored.segments)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(f"{place}: {first['msg']}") from error
        if plan.fingerprint != stored.fingerprint:
            raise InputError("its fingerprint does not fit its content")
        return plan

    def difference(self, other: JobPlan, name: str = "the output") -> list[str]:
        """What differs, field by field: self is what `name` holds, `other` is this run's."""
        pairs = _differing(self._settings, other._settings)
        lines = [f"{field}: {name} has {a}, this run has {b}" for field, a, b in pairs]
        if self.prompts != other.prompts:
            return lines
        stored, wanted = self.total_counts.as_mapping(), other.total_counts.as_mapping()
        changed = [i for i in sorted({*stored, *wanted}) if stored.get(i, 0) != wanted.get(i, 0)]
        lines += [
            f"samples of {self._called(i)}: {name} has {stored.get(i, 0)}, this run has "
            f"{wanted.get(i, 0)}"
            for i in changed[:3]
        ]
        if len(changed) > 3:
            what = "prompts" if isinstance(self.prompts, WrittenPrompts) else "classes"
            lines.append(f"and the samples of {len(changed) - 3} more {what}")
        return lines

    def begins(self, plan: JobPlan) -> bool:
        """Whether the settings are those of `plan`, but for prompts that it has behind the own."""
        if self.prompts is None or plan.prompts is None:
            return self.settings_as_stored == plan.settings_as_stored
        names, prompts = plan.prompts.first(self.num_labels, plan.class_names)
        first = {"class_names": names, "prompts": asdict(prompts)}
        return self.settings_as_stored == {**plan.settings_as_stored, **first}

    def extended_to(self, plan: JobPlan) -> JobPlan:
        """This plan with a further segment, so that totals and prompts are those of `plan`.

        Errors: `InputError` where a class or a prompt would lose samples.
        """
        have, wanted = self.total_counts.as_mapping(), plan.total_counts.as_mapping()
        for label, count in have.items():
            if wanted.get(label, 0) < count:
                raise InputError(
                    f"got {wanted.get(label, 0)} samples of {self._called(label)}, but {count} "
                    "are planned already: a dataset can grow, not shrink"
                )
        more = {c: n - have.get(c, 0) for c, n in wanted.items() if n > have.get(c, 0)}
        if not more:
            return self
        segment = Segment(LabelCounts.from_mapping(more), plan.num_labels - self.num_labels)
        return replace(
            self,
            class_names=plan.class_names,
            prompts=plan.prompts,
            segments=(*self.segments, segment),
        )

    def continues(self, stored: JobPlan) -> bool:
        """Whether this is `stored` with further segments."""
        return self._as_of(len(stored.segments)) == stored != self

    def _as_of(self, num_segments: int) -> JobPlan:
        """This plan before the segments behind the first came, with what they added."""
        segments = self.segments[:num_segments]
        num_added = sum(segment.num_added for segment in self.segments[num_segments:])
        if self.prompts is None or not num_added:
            return replace(self, segments=segments)
        names, prompts = self.prompts.first(self.num_labels - num_added, self.class_names)
        return replace(self, class_names=names, prompts=prompts, segments=segments)

    def is_covered_by(self, counts: LabelCounts) -> bool:
        """Whether no class has fewer samples in `counts` than here."""
        wanted = counts.as_mapping()
        return all(wanted.get(c, 0) >= n for c, n in self.total_counts.as_mapping().items())

    def _called(self, label: int) -> str:
        """A label of a shard as messages have it."""
        if isinstance(self.prompts, WrittenPrompts):
            return f"prompt {shown(self.prompts.texts[label])}"
        return f"class {label}"

    @cached_property
    def _subject_of_text(self) -> dict[str | None, int]:
        """The labels of written prompts."""
        texts = self.prompts.texts if isinstance(self.prompts, WrittenPrompts) else ()
        return {text: i for i, text in enumerate(texts)}

    def _segment_of(self, shard_id: int) -> int:
        if not 0 <= shard_id < self.num_shards:
            raise IndexError(f"shard {shard_id} of {self.num_shards}")
        return bisect_right(self._first_shards, shard_id) - 1

    @cached_property
    def _first_samples(self) -> tuple[int, ...]:
        return tuple(accumulate((s.counts.total for s in self.segments), initial=0))

    @cached_property
    def _first_shards(self) -> tuple[int, ...]:
        size = self.samples_per_shard
        return tuple(accumulate((-(-s.counts.total // size) for s in self.segments), initial=0))

    @cached_property
    def _segment_fingerprints(self) -> tuple[str, ...]:
        segments = [segment.as_stored for segment in self.segments]
        return tuple(
            hashlib.sha256(
                canonical_json(
                    {"settings": self._as_of(n).settings_as_stored, "segments": segments[:n]}
                )
            ).hexdigest()
            for n in range(1, len(segments) + 1)
        )

    @cached_property
    def settings_as_stored(self) -> dict[str, Any]:
        """All but the segments as plan.json holds it.

        What plans had before a setting was there is left out, as they leave it out.
        """
        stored = self._settings.items()
        return {k: v for k, v in stored if k not in _FORMERLY or v != _FORMERLY[k]}

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """All but the segments, what is drawn and the policy taken apart."""
        settings: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name in _SQUARE:
                settings.update(_stored_square(name, _SQUARE[name], value))
            else:
                settings.update(value if name == "sampling" else {name: value})
        del settings["segments"]
        settings["policy"] = policy_fields(self.policy)
        return {**settings, "format_version": FORMAT_VERSION}


@dataclass(frozen=True)
class _PlanFile:
    __pydantic_config__ = STRICT

    fingerprint: Sha256
    settings: dict[str, JsonValue]
    segments: JsonValue


def _as_fields(settings: Mapping[str, JsonValue], segments: JsonValue) -> dict[str, JsonValue]:
    """The fields of a `JobPlan` from what plan.json holds. `InputError` for another format."""
    values = dict(settings)
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise InputError(
            f"got a plan of format {version}, wanted {FORMAT_VERSION}: use the release that wrote"
            " it"
        )
    drawing = [f.name for f in fields(SamplingSettings)]
    sampling = {name: values.pop(name) for name in drawing if name in values}
    if "image_side" in values:
        values["image_size"] = [values.pop("image_side")] * 2
    if isinstance(sides := values.get("depth_map_sides"), list):
        values["depth_map_grids"] = [[side, side] for side in sides]
        del values["depth_map_sides"]
    return {**values, "sampling": sampling, "segments": segments}


_SQUARE = {"image_size": "image_side", "depth_map_grids": "depth_map_sides"}
"""Fields that plan.json holds as sides, by another name, where all is square."""


def _stored_square(name: str, of_sides: str, value: Any) -> dict[str, Any]:
    grids: tuple[Grid, ...] = value if name == "depth_map_grids" else (value,)
    if any(rows != columns for rows, columns in grids):
        return {name: value}
    sides = tuple(rows for rows, _ in grids)
    return {of_sides: sides if name == "depth_map_grids" else sides[0]}


_FORMERLY: Mapping[str, object] = {
    "depth_map_sides": (),
    "png_level": DEFAULT_PNG_LEVEL,
    "prompts": None,
    "text_encoder_sha256": None,
    "temperature": 1.0,
    "guidance": "ramp",
}
_POLICY = TypeAdapter(DepthPolicy)
_PLAN_FILE, _PLAN = TypeAdapter(_PlanFile), TypeAdapter(JobPlan)


def key_of(index: int) -> str:
    """The key of a sample: its global index in twelve digits, which sorts as the number does."""
    return f"{index:0{KEY_DIGITS}d}"


def _differing(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted name, left value, right value) of the leaves that differ."""
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _differing(left, right, f"{prefix}{name}.")
        elif left != right or (name in a) != (name in b):
            a_text, b_text = _text(left), _text(right)
            pairs = enumerate(zip(a_text, b_text, strict=False))
            differ_at = next((i for i, (x, y) in pairs if x != y), 0)
            yield f"{prefix}{name}", _brief(a_text, differ_at), _brief(b_text, differ_at)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _brief(text: str, place: int) -> str:
    """A text, or of a long one the part around a place."""
    if len(text) <= 48:
        return text
    start = max(0, place - 20)
    part = text[start : start + 45]
    return f"{'...' if start else ''}{part}{'...' if start + 45 < len(text) else ''}"


def canonical_json(value: object) -> bytes:
    """The one spelling of a value that is hashed: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
