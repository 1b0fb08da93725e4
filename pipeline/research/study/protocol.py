"""What a study of depth policies is: every policy on the same noise, several seeds, measured alike.

A study's folder holds one file per finished piece of work, named after what went into it, so that
the same command goes on where it stopped and a changed configuration never meets old numbers:

    samples/{cell}-{seed}-{digest}-{first}.npz  some images of a policy and seed, with signals
    features/{digest}.safetensors               the network that judges them, where none is shipped
    distances/{cell}-{seed}-{digest}.json       how far they are from those of full depth
    measures/{cell}-{seed}-{digest}.json        the quality of all of them
    losses/{cell}-{digest}.npy                  what real held-out images cost under a policy
    headroom/{digest}.json                      what depth per token could gain on them
    cas/{cell}-{seed}-{digest}-{run}.json       accuracy of a classifier trained on them alone
    signals/{cell}-{seed}-{digest}.json         what the recorded signals say of them
    times/{digest}.json                         seconds per image of all policies, taken in turn

`pipeline.research.study.work` makes them, `pipeline.research.study.report` table, Parquet and plots
from them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from depthvar.config import MODELS, ModelConfig, real_set_of
from depthvar.cost import Cost, image_cost
from depthvar.errors import InputError
from depthvar.plan import DepthPlan
from depthvar.policy import DepthPolicy
from depthvar.weights.find import FoundModel
from pipeline.request.flags import FileOnly, JobConfig
from pipeline.request.generation import Scalar
from pipeline.request.job import checked_options
from pipeline.request.paths import LocalPath, ModelName, Weights
from pipeline.request.weights import fetch_model
from pipeline.request.yaml_file import FieldsOf
from pipeline.research.study.policies import study_policy
from pipeline.storage import Storage

FORMAT = "depthvar-study/1"
FULL = "full"
DISTANCE = "distance_to_full"
HEADROOM_IMAGES = 500
AT_RANDOM = "at random"
_BATCHES_OF_PART = 10
_SAMPLES_FILE = re.compile(r".+-[0-9]+-[0-9a-f]{10}-[0-9]+\.npz")

Section = Literal["methods", "ablations"]


class StudyMethod(JobConfig):
    """A policy at some budgets: budget name -> reference scale (none where it has no such)."""

    policy: str
    budgets: dict[str, int | None]
    options: Annotated[dict[str, Scalar | list[float]], FieldsOf(DepthPolicy)] = Field(
        default_factory=dict
    )
    signals: list[str] = Field(
        default_factory=list, description="budgets at which to ask what the recorded signals say"
    )

    @model_validator(mode="after")
    def _signals_at_its_budgets(self) -> StudyMethod:
        if unknown := set(self.signals) - self.budgets.keys():
            raise ValueError(
                f"signals asked at {', '.join(sorted(unknown))}, wanted some of the method's "
                f"budgets, {', '.join(self.budgets)}: correct them"
            )
        return self


class StudyConfig(JobConfig):
    """What `depthvar study` can be told; methods and ablations come from its YAML file."""

    out: LocalPath = Field(description="folder of the study; the same command goes on in it")
    model: ModelName = Field("digits", description="model of the digits, by name or folder")
    weights: Weights | None = Field(
        None, description="its weights (default: those bundled with it)"
    )
    methods: Annotated[dict[str, StudyMethod], FileOnly()] = Field(
        description="methods by name, with their budgets"
    )
    ablations: Annotated[dict[str, StudyMethod], FileOnly()] = Field(
        default_factory=dict, description="variants of a method by name (default: none)"
    )
    compare_with: Annotated[list[str], FileOnly()] = Field(
        default_factory=list,
        description="methods that the others are compared with at their budgets, besides full "
        "depth; ablations with those of the names (default: none)",
    )
    seeds: list[int] = Field(default=[1, 2, 3], min_length=2, description="job seeds")
    samples: int = Field(5000, ge=100, description="images per method, budget and seed")
    ablation_samples: int = Field(2000, ge=100, description="images per ablation and seed")
    cas_runs: int = Field(2, ge=0, description="classifiers trained per method, budget and seed")
    headroom_after: int | None = Field(
        None,
        ge=0,
        description="reference scale after which to ask what depth per token could gain over one "
        "depth for all (default: do not ask)",
    )
    batch_size: int = Field(50, gt=0, description="images sampled at once")
    timing_rounds: int = Field(5, gt=0, description="batches timed per method and budget")
    processes: int = Field(2, gt=0, description="processes, each of one CPU thread")

    @model_validator(mode="after")
    def _has_full_depth(self) -> StudyConfig:
        """Every comparison needs full depth."""
        if FULL not in self.methods:
            raise ValueError(f"methods lacks {FULL!r}, to which the others are compared: add it")
        others = [name for name in self.methods if name != FULL]
        if unknown := [name for name in self.compare_with if name not in others]:
            raise ValueError(
                f"compare_with names {', '.join(unknown)}, wanted some of the methods besides "
                f"{FULL!r}, {', '.join(others) or 'of which there are none'}: correct it"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}, wanted different ones: drop the repeats")
        return self


@dataclass(frozen=True)
class Cell:
    """One policy at one budget; `share` is that of the token-layers of full depth."""

    section: Section
    method: str
    budget: str
    policy: DepthPolicy
    depth: DepthPlan
    cost: Cost
    num_samples: int
    cas_runs: int
    signals: bool
    share: float

    @property
    def name(self) -> str:
        """Readable and fit for a file name."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.section} {self.method} {self.budget}".lower())


@dataclass(frozen=True)
class Study:
    """A configuration checked against its model."""

    config: StudyConfig
    model: ModelConfig
    real_set: str
    weights: FoundModel
    cells: tuple[Cell, ...]
    storage: Storage

    def parts(self, cell: Cell) -> list[range]:
        """The global indices of a cell's images, in parts of whole batches: a file for each."""
        size = self.config.batch_size * _BATCHES_OF_PART
        everything = range(cell.num_samples)
        return [everything[start : start + size] for start in everything[::size]]

    def lacks(self, name: str) -> bool:
        """Whether a file of the study is still to be made."""
        return self.storage.size(name) is None

    def samples_file(self, cell: Cell, seed: int, part: range) -> str:
        """Name of the file that holds some of a cell's images."""
        return f"{self._stem('samples', cell, seed)}-{part.start}.npz"

    def cas_file(self, cell: Cell, seed: int, run: int) -> str:
        """Name of the file that holds the accuracy of one classifier trained on a cell."""
        return f"{self._stem('cas', cell, seed)}-{run}.json"

    def file(self, kind: str, cell: Cell, seed: int) -> str:
        """Name of the file that says something of a cell's images."""
        return f"{self._stem(kind, cell, seed)}.json"

    def _stem(self, kind: str, cell: Cell, seed: int) -> str:
        """Name of a piece of work; the digest covers all that it depends on."""
        inputs: dict[str, Any] = {"cas_runs": cell.cas_runs} if kind == "signals" else {}
        digest = self._digest(
            policy=cell.policy.as_stored,
            samples=cell.num_samples,
            batch_size=self.config.batch_size,
            **inputs,
        )
        return f"{kind}/{cell.name}-{seed}-{digest}"

    def _digest(self, **inputs: Any) -> str:
        """A short name for what follows from the weights and these inputs."""
        return _digest({"format": FORMAT, "weights": self.weights.sha256, **inputs})

    def losses_file(self, cell: Cell) -> str:
        """Name of the file of what real held-out images cost under a cell's policy."""
        return f"losses/{cell.name}-{self._digest(policy=cell.policy.as_stored)}.npy"

    @property
    def headroom_file(self) -> str:
        """Name of the file of what depth per token could gain."""
        digest = self._digest(after=self.config.headroom_after, images=HEADROOM_IMAGES)
        return f"headroom/{digest}.json"

    @property
    def with_losses(self) -> list[Cell]:
        """The cells whose policies run every scale of a real image; losses are without guidance."""
        return [
            cell
            for cell in self.cells
            if not cell.policy.skip_last_scales and cell.policy.guided_scales is None
        ]

    @property
    def trains_features(self) -> bool:
        """Whether the study trains the feature network that judges: that of the digits ships."""
        return self.real_set != "digits"

    @property
    def features_file(self) -> str:
        """Name of the file of the feature network that the study trains."""
        return f"features/{_digest({'format': FORMAT, 'real_set': self.real_set})}.safetensors"

    @property
    def times_file(self) -> str:
        """Name of the file of the timings."""
        digest = self._digest(
            policies=[cell.policy.as_stored for cell in self.timed],
            batch_size=self.config.batch_size,
            rounds=self.config.timing_rounds,
        )
        return f"times/{digest}.json"

    @property
    def full(self) -> Cell:
        """Full depth."""
        return next(cell for cell in self.cells if cell.method == FULL)

    @property
    def timed(self) -> list[Cell]:
        """The cells that are timed: the methods."""
        return [cell for cell in self.cells if cell.section == "methods"]


def _digest(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:10]


def resolve_study(config: StudyConfig) -> Study:
    """Check a study before any of its work: model, policies, budgets.

    Raises `InputError` for what cannot be run, with the method's name.
    """
    if config.model in MODELS:
        _real_set(MODELS[config.model])  # it need not be fetched to be told
    found = fetch_model(config.model, config.weights)
    model = found.class_config
    real_set = _real_set(model)
    sections: tuple[tuple[Section, dict[str, StudyMethod]], ...] = (
        ("methods", config.methods),
        ("ablations", config.ablations),
    )
    cells = [
        _cell(config, model, section, name, method, budget)
        for section, methods in sections
        for name, method in methods.items()
        for budget in method.budgets
    ]
    after, last = config.headroom_after, len(model.sides) - 1
    if after is not None and after >= last:
        raise InputError(
            f"headroom_after is {after}, wanted a scale before the last one, {last}: lower it"
        )
    for cell in cells:
        if cell.policy.proxy == "calibrated":
            found.require_calibration(model, cell.policy.preset)
    storage = Storage.open(config.out)
    storage.check_writable()
    if not storage.is_empty() and not _holds_study(storage):
        raise InputError(
            f"got {storage}, which holds files and no study, wanted an empty folder or an earlier "
            "output of a study: choose another output"
        )
    return Study(config, model, real_set, found, tuple(cells), storage)


def _holds_study(storage: Storage) -> bool:
    """Whether the folder has the samples that a study makes before all else, and no others."""
    samples = storage.list("samples")
    return "samples" in storage.list_folders("") and all(map(_SAMPLES_FILE.fullmatch, samples))


def _real_set(model: ModelConfig) -> str:
    """Name of the real images to measure a model against; `InputError` where there are none."""
    name = real_set_of(model.class_names, model.image_side, model.image_channels)
    if name is None:
        raise InputError(
            f"got the model {model.name!r}, wanted one of the digits (10 classes, 32x32 or 48x48, "
            "grey): the study measures against real digits"
        )
    return name


def _cell(
    config: StudyConfig,
    model: ModelConfig,
    section: Section,
    name: str,
    method: StudyMethod,
    budget: str,
) -> Cell:
    is_method = section == "methods"
    try:
        policy = study_policy(
            method.policy,
            reference_scale=method.budgets[budget],
            **checked_options(method.options),
        )
        depth = DepthPlan.build(model.sides, model.num_blocks, policy)
    except InputError as error:
        raise InputError(f"{section}: {name} at {budget}: {error}") from None
    return Cell(
        section=section,
        method=name,
        budget=budget,
        policy=policy,
        depth=depth,
        cost=image_cost(model, depth, streams=model.sampling.streams),
        num_samples=config.samples if is_method else config.ablation_samples,
        cas_runs=config.cas_runs if is_method else 0,
        signals=budget in method.signals,
        share=depth.share(model.sampling.streams),
    )


def read_json_file(study: Study, name: str) -> Any:
    """A finished file of the study."""
    return json.loads(study.storage.read(name))


def finished(study: Study, kind: str, cells: Iterable[Cell]) -> list[tuple[Cell, int]]:
    """The (cell, seed) of a kind that are done."""
    return [
        (cell, seed)
        for cell in cells
        for seed in study.config.seeds
        if not study.lacks(study.file(kind, cell, seed))
    ]
