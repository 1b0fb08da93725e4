"""A generation request checked against its model: what will be made, before anything is."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from depthvar.config import KNOWN_MODELS, AnyModel, ModelConfig, model_name, of_written_size
from depthvar.cost import image_cost
from depthvar.errors import InputError
from depthvar.infinity_config import InfinityConfig
from depthvar.paths import check_output_folder, is_uri
from depthvar.plan import DepthPlan
from depthvar.policy import DepthPolicy
from depthvar.presets import DEFAULT_PRESET, PRESETS, TEXT_PRESET, make_policy, policy_of
from depthvar.settings import SamplingSettings
from depthvar.weights.files import BUNDLED, is_repository
from pipeline.request.classes import parse_classes
from pipeline.request.generation import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_PRECISION,
    GenerateConfig,
    ModelRequest,
    Scalar,
)
from pipeline.request.job_plan import ImageCompute, JobPlan, Segment
from pipeline.request.labels import LabelCounts
from pipeline.request.labels_file import read_labels_file
from pipeline.request.prompt_files import Asked, asked_classes, asked_prompts
from pipeline.request.text import find_text
from pipeline.request.weights import fetch_model

UNREAD_WEIGHTS = "0" * 64
"""Stands for the SHA-256 of weights in a plan that was made without them."""


@dataclass(frozen=True)
class _KnownModel:
    """A published model by its name alone, as `FoundModel` of weights that were read."""

    config: AnyModel
    sha256: str = UNREAD_WEIGHTS
    notes: tuple[str, ...] = ()

    def require_calibration(self, config: AnyModel, policy: str) -> None:
        """Nobody knows before the weights are read."""


def plan_job(
    config: GenerateConfig,
    *,
    note: Callable[[str], object] = lambda text: None,
    fetches: bool = True,
) -> tuple[JobPlan, AnyModel]:
    """What a request will make, checked against its model, and the model's sizes.

    Loads no weights and writes nothing; `note` is told what may have been meant otherwise. Without
    `fetches` a published model whose weights lie elsewhere is taken by its name: the plan has
    `UNREAD_WEIGHTS`. Raises `InputError` for names, classes, scales and weights that cannot work.
    """
    _check_scratch(config)
    by_name = None if fetches else _known_model(config)
    found = by_name or fetch_model(config.model, config.weights)
    model = of_written_size(found.config, config.image_size)
    policy = _policy(config, model)
    sampling = _sampling(config, model.sampling)
    compute = _compute(model, policy, sampling)
    for text in found.notes:
        note(text)
    asked = _asked(config, model, note)
    if policy.proxy == "calibrated":
        found.require_calibration(model, policy.preset)
    plan = JobPlan(
        model=model.name,
        weights_sha256=found.sha256,
        class_names=asked.class_names,
        image_size=model.image_size,
        image_channels=model.image_channels,
        policy=policy,
        sampling=sampling,
        precision=config.precision or DEFAULT_PRECISION,
        seed=config.seed,
        samples_per_shard=config.samples_per_shard,
        batch_size=config.batch_size or DEFAULT_BATCH_SIZE,
        image_format=config.image_format,
        png_level=config.png_level,
        compute=compute,
        segments=(Segment(asked.counts),),
        depth_map_grids=model.grids if config.save_depth_maps else (),
        prompts=asked.prompts,
    )
    if plan.prompts is None:
        return plan, model
    assert isinstance(model, InfinityConfig)
    encoder = _text_encoder(config, plan, model, fetches, note)
    return replace(plan, text_encoder_sha256=encoder), model


def _text_encoder(
    config: GenerateConfig,
    plan: JobPlan,
    model: InfinityConfig,
    fetches: bool,
    note: Callable[[str], object],
) -> str:
    """Identity of what makes states of the prompts, which it takes; `UNREAD_WEIGHTS` as of them."""
    is_here = config.text_states is not None or os.path.exists(config.text_encoder or "")
    if not fetches and not is_here:
        return UNREAD_WEIGHTS
    states = None if config.text_states is None else str(config.text_states)
    source = find_text(config.text_encoder, states)
    prompts = list(plan.distinct_prompts())
    source.check(prompts, width=model.text_width, max_tokens=model.max_text_tokens)
    if num_bytes := source.num_bytes(half=plan.precision != "float32"):
        note(
            f"{len(prompts):,} prompts are encoded before the first image, by an encoder of"
            f" up to {num_bytes / 1e9:.2f} GB that has left memory by then"
        )
    return source.sha256


def _known_model(config: GenerateConfig) -> _KnownModel | None:
    """A published model whose weights would have to be fetched."""
    weights = config.weights
    is_here = weights is not None and not is_uri(weights) and not is_repository(weights)
    if config.model not in KNOWN_MODELS or is_here or (BUNDLED / config.model).is_dir():
        return None
    return _KnownModel(KNOWN_MODELS[config.model])


def check_before_submission(config: GenerateConfig) -> None:
    """`InputError` for what can be told to be wrong here, where the weights are not.

    Of a model of the user's own nothing is known before its files are read.
    """
    known = KNOWN_MODELS.get(model_name(config.model))
    if known is not None:
        model = of_written_size(known, config.image_size)
        _compute(model, _policy(config, model), _sampling(config, model.sampling))
        _asked(config, model, lambda note: None)


def _policy(config: GenerateConfig, model: AnyModel) -> DepthPolicy:
    options = checked_options(config.policy_options)
    preset, reference_scale = config.policy or DEFAULT_PRESET, config.reference_scale
    if isinstance(model, InfinityConfig):
        preset = config.policy or TEXT_PRESET
        usual = PRESETS.get(preset)
        # One that says how deep the scales after its own reference scale are stays with that.
        takes_any = usual and usual.reference_scale is not None and not usual.mean_depths
        if reference_scale is None and takes_any:
            reference_scale = model.usual_reference_scale
    return policy_of(preset, reference_scale, options)


def checked_options(options: Mapping[str, Scalar | list[float]]) -> dict[str, Any]:
    """Policy options of the right type; unknown names are left for `make_policy` to refuse."""
    hints = typing.get_type_hints(DepthPolicy)
    checked: dict[str, Any] = dict(options)
    for name in options.keys() & hints.keys():
        given = options[name]
        value = tuple(given) if isinstance(given, list) else given
        try:
            checked[name] = TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise InputError(
                f"policy option {name}: got {given!r}, wanted {wanted}: correct it"
            ) from None
    return checked


def _check_scratch(config: GenerateConfig) -> None:
    """`InputError` where the scratch folder cannot be; a cluster's nodes say so themselves."""
    joins_cluster = config.address is not None or "RAY_ADDRESS" in os.environ
    if config.scratch is not None and (config.workers == 0 or not joins_cluster):
        check_output_folder(config.scratch, f"--scratch {config.scratch}")


def _sampling(config: GenerateConfig, default: SamplingSettings) -> SamplingSettings:
    return replace(
        default,
        cfg=default.cfg if config.cfg is None else config.cfg,
        top_k=default.top_k if config.top_k is None else config.top_k,
        top_p=default.top_p if config.top_p is None else config.top_p,
        temperature=default.temperature if config.temperature is None else config.temperature,
    )


def _compute(model: AnyModel, policy: DepthPolicy, sampling: SamplingSettings) -> ImageCompute:
    depth = DepthPlan.build(model.grids, model.num_blocks, policy)
    full = DepthPlan.build(model.grids, model.num_blocks, make_policy("full"))
    cost = image_cost(model, depth, streams=sampling.streams)
    full_cost = image_cost(model, full, streams=sampling.streams)
    return ImageCompute(
        token_layers=depth.token_layers,
        full_token_layers=depth.full_token_layers,
        transformer_flops=float(cost.transformer_flops),
        decoder_flops=float(cost.decoder_flops),
        full_transformer_flops=float(full_cost.transformer_flops),
        depth_per_scale=tuple(depth.mean_depth_per_scale),
    )


def _asked(config: GenerateConfig, model: AnyModel, note: Callable[[str], object]) -> Asked:
    """What a request asks of a model, in the terms of its kind."""
    if wrong := config.unfit_for(is_text=model.is_text):
        raise InputError(_other_kind(model, wrong))
    if not isinstance(model, ModelConfig):
        return asked_in_words(config, config.per_class, note)
    names, others = model.class_names, model.other_names
    if config.labels_file is not None:
        counts = read_labels_file(config.labels_file, names, others, note=note)
    else:
        class_ids = parse_classes(config.classes, names, others)
        counts = LabelCounts.from_mapping(dict.fromkeys(class_ids, config.per_class))
    return Asked(names, None, counts)


def asked_in_words(config: ModelRequest, per_class: int, note: Callable[[str], object]) -> Asked:
    """What a request that gives prompts or names classes asks of a text model."""
    if config.prompts is not None:
        return asked_prompts(config.prompts, per_class, note)
    assert config.class_names is not None
    return asked_classes(config.class_names, config.templates, per_class, note)


def _other_kind(model: AnyModel, got: str) -> str:
    """What to say where a request is of another kind than its model."""
    flags = ["--classes or --labels-file", "--class-names or --prompts"]
    kind = "makes images from text" if model.is_text else "knows its own classes alone"
    takers = [name for name, known in KNOWN_MODELS.items() if known.is_text != model.is_text]
    others = f" ({', '.join(takers)} take {flags[not model.is_text]})"
    return f"got {got}, but {model.name} {kind}: give {flags[model.is_text]}{others}"
