"""The study of depth policies: every policy on the same noise, several seeds, measured alike.

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

`pipeline.research.study.report` makes table, Parquet and plots from them.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import groupby
from multiprocessing.managers import SyncManager
from queue import Empty
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from tqdm import tqdm

from depthvar.config import MODELS, ModelConfig, real_set_of
from depthvar.cost import Cost, image_cost
from depthvar.errors import InputError
from depthvar.host.processes import end_with_parent
from depthvar.plan import DepthPlan
from depthvar.policy import DepthPolicy
from pipeline.request.flags import FileOnly, JobConfig
from pipeline.request.generation import PolicyOptions
from pipeline.request.job import checked_options
from pipeline.request.paths import LocalPath, ModelName, Weights
from pipeline.request.weights import fetch_model
from pipeline.research.study.policies import study_policy
from pipeline.storage import Storage

if TYPE_CHECKING:
    from depthvar.weights.checkpoint import LoadedModel
    from depthvar.weights.find import FoundModel
    from pipeline.research.quality.held_out import HeldOutImages
    from pipeline.research.study.measure import Judge, PolicySamples

FORMAT = "depthvar-study/1"
FULL = "full"
DISTANCE = "distance_to_full"
HEADROOM_IMAGES = 500
AT_RANDOM = "at random"
_BATCHES_OF_PART = 10
_FILTER_SHARES = (0.05, 0.10)
_SAMPLES_FILE = re.compile(r".+-[0-9]+-[0-9a-f]{10}-[0-9]+\.npz")
_FILTER_SIGNALS = ("surprise", "change")

Section = Literal["methods", "ablations"]


class StudyMethod(JobConfig):
    """A policy at some budgets: budget name -> reference scale (none where it has no such)."""

    policy: str
    budgets: dict[str, int | None]
    options: PolicyOptions = Field(default_factory=dict)
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
    """One policy at one budget."""

    section: Section
    method: str
    budget: str
    policy: DepthPolicy
    depth: DepthPlan
    cost: Cost
    num_samples: int
    cas_runs: int
    signals: bool

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
            policy=asdict(cell.policy),
            samples=cell.num_samples,
            batch_size=self.config.batch_size,
            **inputs,
        )
        return f"{kind}/{cell.name}-{seed}-{digest}"

    def _digest(self, **inputs: Any) -> str:
        """Names what the weights and some inputs give."""
        return _digest({"format": FORMAT, "weights": self.weights.sha256, **inputs})

    def losses_file(self, cell: Cell) -> str:
        """Name of the file of what real held-out images cost under a cell's policy."""
        return f"losses/{cell.name}-{self._digest(policy=asdict(cell.policy))}.npy"

    @property
    def headroom_file(self) -> str:
        """Name of the file of what depth per token could gain."""
        digest = self._digest(after=self.config.headroom_after, images=HEADROOM_IMAGES)
        return f"headroom/{digest}.json"

    @property
    def with_losses(self) -> list[Cell]:
        """The cells whose policies run every scale of a real image."""
        return [cell for cell in self.cells if not cell.policy.skip_last_scales]

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
            policies=[asdict(cell.policy) for cell in self.timed],
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


Pairs = list[tuple[Cell, int]]
Parts = list[tuple[Cell, int, range]]
Task = Callable[[Study, Any, Callable[[int], object]], None]


def resolve_study(config: StudyConfig) -> Study:
    """Check a study before any of its work: model, policies, budgets.

    Raises `InputError` for what cannot be run, with the method's name.
    """
    if config.model in MODELS:
        _real_set(MODELS[config.model])  # it need not be fetched to be told
    found = fetch_model(config.model, config.weights)
    model = found.config
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
    if found.calibration is None and any(c.policy.proxy == "calibrated" for c in cells):
        raise InputError(
            f"a policy uses calibrated proxies and {model.name} has no calibration: run "
            "depthvar calibrate, or leave it out"
        )
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
    )


def run_study(study: Study) -> None:
    """Do what is not done yet: sample, measure, ask the signals, take the times."""
    config = study.config
    pairs = [(cell, seed) for cell in study.cells for seed in config.seeds]
    missing = [
        (cell, seed, part)
        for cell, seed in pairs
        for part in study.parts(cell)
        if study.storage.size(study.samples_file(cell, seed, part)) is None
    ]
    images = sum(len(part) for _, _, part in missing)
    _in_processes(study, _sample_group, _groups(missing), "sample", "image", images)
    full = study.full
    comparable = [pair for pair in pairs if pair[0].num_samples <= full.num_samples]
    _for_each(study, "distances", _take_distances, comparable)
    if study.trains_features and study.storage.size(study.features_file) is None:
        _in_processes(study, _train_features, [None], "features", "network", 1)
    _for_each(study, "measures", _measure, pairs)
    todo = [
        cell for cell in study.with_losses if study.storage.size(study.losses_file(cell)) is None
    ]
    shares = [todo[i :: config.processes] for i in range(min(config.processes, len(todo)))]
    _in_processes(study, _take_losses, shares, "losses", "cell", len(todo))
    if config.headroom_after is not None and study.storage.size(study.headroom_file) is None:
        asked = [config.headroom_after]
        _in_processes(study, _ask_headroom, asked, "headroom", "image", HEADROOM_IMAGES)
    runs = [
        (cell, seed, run)
        for run in range(max(cell.cas_runs for cell in study.cells))
        for cell, seed in pairs
        if run < cell.cas_runs and study.storage.size(study.cas_file(cell, seed, run)) is None
    ]
    _in_processes(study, _train_classifier, runs, "cas", "run", len(runs))
    unasked = [p for p in pairs if p[0].signals and _is_missing(study, "signals", *p)]
    filters = len(unasked) * (len(_FILTER_SIGNALS) + 1) * len(_FILTER_SHARES)
    _in_processes(study, ask_signals, [[pair] for pair in unasked], "signals", "filter", filters)
    if study.storage.size(study.times_file) is None:
        rounds = config.timing_rounds
        total = (rounds + 1) * len(study.timed)  # one that is not counted comes first
        _in_processes(study, _take_times, [rounds], "times", "batch", total)


def _for_each(study: Study, kind: str, task: Task, pairs: Pairs) -> None:
    """Run a task for every cell and seed that lacks the file of its kind."""
    todo = [pair for pair in pairs if _is_missing(study, kind, *pair)]
    _in_processes(study, task, [[pair] for pair in todo], kind, "cell", len(todo))


def _is_missing(study: Study, kind: str, cell: Cell, seed: int) -> bool:
    return study.storage.size(study.file(kind, cell, seed)) is None


def _groups(parts: Parts) -> list[Parts]:
    """The same images of all cells go together: they share what they run in full depth."""

    def key(part: tuple[Cell, int, range]) -> tuple[int, int, int]:
        cell, seed, indices = part
        return -cell.num_samples, seed, indices.start

    return [list(group) for _, group in groupby(sorted(parts, key=key), key=key)]


def _in_processes(
    study: Study, task: Task, arguments: Sequence[Any], what: str, unit: str, total: int
) -> None:
    """Run a task on every argument in the study's processes, under one progress bar.

    One process is this one: nothing is started for it.
    """
    if not arguments:
        return
    if study.config.processes == 1:
        with tqdm(total=total, desc=what, unit=unit, file=sys.stderr) as bar:
            for argument in arguments:
                _run_task(task, study, argument, bar.update)
        return
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(initializer=end_with_parent)
    pool = ProcessPoolExecutor(
        min(study.config.processes, len(arguments)),
        mp_context=context,
        initializer=end_with_parent,
    )
    with manager, pool, tqdm(total=total, desc=what, unit=unit, file=sys.stderr) as bar:
        counts = manager.Queue()
        waiting: set[Future[None]] = {
            pool.submit(_run_task, task, study, argument, counts.put) for argument in arguments
        }
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5)
                _drain(counts, bar)
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        _drain(counts, bar)


def _drain(counts: Any, bar: Any) -> None:
    while True:
        try:
            bar.update(counts.get_nowait())
        except Empty:
            return


def _run_task(task: Task, study: Study, argument: object, advance: Callable[[int], object]) -> None:
    from pipeline.research.study.measure import use_one_thread

    use_one_thread()
    task(study, argument, advance)


def _model(study: Study) -> LoadedModel:
    from depthvar.weights.checkpoint import load_model

    return load_model(study.weights)


def _sample_group(study: Study, parts: Parts, advance: Callable[[int], object]) -> None:
    from pipeline.research.study.measure import sample_policies

    cells = {cell.name: cell for cell, _, _ in parts}
    _, seed, indices = parts[0]
    made = sample_policies(
        _model(study),
        {name: cell.policy for name, cell in cells.items()},
        indices=indices,
        seed=seed,
        batch_size=study.config.batch_size,
        after_batch=advance,
    )
    for name, samples in made.items():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **vars(samples))
        file = study.samples_file(cells[name], seed, indices)
        study.storage.publish_bytes(buffer.getvalue(), file)


def load_samples(study: Study, cell: Cell, seed: int) -> PolicySamples:
    """What a finished cell made."""
    from pipeline.research.study.measure import PolicySamples, joined

    parts = []
    for part in study.parts(cell):
        data = study.storage.read(study.samples_file(cell, seed, part))
        with np.load(io.BytesIO(data)) as arrays:
            parts.append(PolicySamples(**arrays))
    return joined(parts)


def _take_distances(study: Study, pairs: Pairs, advance: Callable[[int], object]) -> None:
    from depthvar.timing import pixel_distance

    for cell, seed in pairs:
        samples, full = load_samples(study, cell, seed), load_samples(study, study.full, seed)
        distance = pixel_distance(samples.images_NHWC, full.images_NHWC)
        _publish_json(study, study.file("distances", cell, seed), {DISTANCE: distance})
        advance(1)


def _train_features(study: Study, _: None, advance: Callable[[int], object]) -> None:
    from pipeline.research.study.measure import trained_features

    study.storage.publish_bytes(trained_features(study.real_set), study.features_file)
    advance(1)


def _judge(study: Study) -> Judge:
    from pipeline.research.study.measure import judge_of

    trained = study.storage.read(study.features_file) if study.trains_features else None
    return judge_of(study.real_set, trained)


def _held_out(study: Study) -> HeldOutImages:
    from depthvar.weights.checkpoint import load_model
    from pipeline.research.quality.held_out import HeldOutImages

    model = load_model(study.weights, with_encoder=True)
    return HeldOutImages.of_set(model, study.real_set)


def _take_losses(study: Study, cells: list[Cell], advance: Callable[[int], object]) -> None:
    images = _held_out(study)
    for cell in cells:
        buffer = io.BytesIO()
        np.save(buffer, images.losses(cell.policy))
        study.storage.publish_bytes(buffer.getvalue(), study.losses_file(cell))
        advance(1)


def _ask_headroom(study: Study, after: int, advance: Callable[[int], object]) -> None:
    images = _held_out(study)
    found = images.headroom(after, num_images=HEADROOM_IMAGES, after_batch=advance)
    _publish_json(study, study.headroom_file, [asdict(headroom) for headroom in found])


def _measure(study: Study, pairs: Pairs, advance: Callable[[int], object]) -> None:
    judge = _judge(study)
    for cell, seed in pairs:
        samples = load_samples(study, cell, seed)
        _publish_json(study, study.file("measures", cell, seed), judge.measure(samples))
        advance(1)


def _train_classifier(
    study: Study, run: tuple[Cell, int, int], advance: Callable[[int], object]
) -> None:
    from pipeline.research.study.measure import cas

    cell, seed, number = run
    accuracy = cas(load_samples(study, cell, seed), run=number, real_set=study.real_set)
    _publish_json(study, study.cas_file(cell, seed, number), {"cas": accuracy})
    advance(1)


def ask_signals(study: Study, pairs: Pairs, advance: Callable[[int], object]) -> None:
    """AUROC of every signal, and the quality when the worst by a signal are left out.

    The comparison drops as many at random (by global index, which knows nothing of the image).
    CAS is the mean of as many classifiers as the cell has.
    """
    from pipeline.research.study.measure import badness, best_of_each_class, cas

    judge = _judge(study)
    for cell, seed in pairs:
        samples = load_samples(study, cell, seed)
        suspects = {name: badness(samples)[name] for name in _FILTER_SIGNALS}
        suspects[AT_RANDOM] = np.arange(len(samples.labels_N))
        filtered: dict[str, dict[str, float]] = {}
        for name, values_N in suspects.items():
            for share in _FILTER_SHARES:
                rest = best_of_each_class(samples, values_N, share)
                quality = judge.measure(rest)
                runs = [cas(rest, run=r, real_set=study.real_set) for r in range(cell.cas_runs)]
                if runs:
                    quality["cas"] = float(np.mean(runs))
                filtered[f"{name} {share:.0%}"] = quality
                advance(1)
        content = {"auroc": judge.signals(samples), "without_worst": filtered}
        _publish_json(study, study.file("signals", cell, seed), content)


def _take_times(study: Study, rounds: int, advance: Callable[[int], object]) -> None:
    from depthvar.timing import time_policies

    laps = time_policies(
        _model(study),
        {cell.name: cell.policy for cell in study.timed},
        rounds=rounds,
        batch_size=study.config.batch_size,
        after_batch=advance,
    )
    times = {name: [lap.image_s for lap in of_cell] for name, of_cell in laps.items()}
    _publish_json(study, study.times_file, times)


def _publish_json(study: Study, name: str, content: object) -> None:
    study.storage.publish_bytes(json.dumps(content, indent=1).encode(), name)


def read_json_file(study: Study, name: str) -> Any:
    """A finished file of the study."""
    return json.loads(study.storage.read(name))


def read_losses(study: Study, cell: Cell) -> np.ndarray:
    """What every real held-out image cost at every scale, in nats: (N, S)."""
    losses_NS: np.ndarray = np.load(io.BytesIO(study.storage.read(study.losses_file(cell))))
    return losses_NS


def finished(study: Study, kind: str, cells: Iterable[Cell]) -> list[tuple[Cell, int]]:
    """The (cell, seed) of a kind that are done."""
    return [
        (cell, seed)
        for cell in cells
        for seed in study.config.seeds
        if not _is_missing(study, kind, cell, seed)
    ]
