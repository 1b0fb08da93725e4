"""What only a GPU can show, in one go: `make gpu-check`, made for six minutes of an H100.

    python -m tests.gpu_check [--device cuda|cpu]

First whether the sampler computes there what it should, by comparisons with plain loops and with
limits that are printed; then the benchmark of var-d16 and var-d30 with random weights, in bfloat16;
then the ten dearest kernels of a batch. Needs torch, numpy and safetensors alone, and no network.
`--device cpu` does the same with the bundled model, in small. Exit code 1 if a comparison failed.

Shape legend: B images, T tokens of a scale, N tokens of an image, V codes.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from depthvar.config import MODELS
from depthvar.errors import InputError
from depthvar.presets import PRESETS, make_policy
from depthvar.published import PublishedSampler
from depthvar.recording import pointwise_of, recorder
from depthvar.sampling import Given, SampledTokens, Sampler
from depthvar.settings import Kernels
from depthvar.timing import equal_tokens
from depthvar.weights.checkpoint import AnyLoaded, LoadedModel, assemble, load_model, random_model
from depthvar.weights.find import find_model
from jobs import benchmark
from jobs._entry import EXIT_DONE, EXIT_INCOMPLETE, run_job
from tests import reference_depthvar as reference
from tests.tiny_models import (
    GUIDED,
    SHAPES,
    TEXT_GUIDED,
    TOLERANCE,
    states,
    text_states,
    tiny_model,
    tiny_policy,
    tiny_text_model,
)

LABELS = [1, 4, 0]
HALVES = (torch.bfloat16, torch.float16)
HALF_LIMIT = {torch.bfloat16: 0.1, torch.float16: 0.02}
"""Mean difference of logits from float32's, teacher-forced, as a share of their deviation."""


@dataclass(frozen=True)
class Comparison:
    """What was compared, how far apart it came, and how far it may."""

    what: str
    apart: float
    limit: float

    @property
    def holds(self) -> bool:
        """False for NaN too."""
        return self.apart <= self.limit


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, time, profile; the exit code says whether all comparisons held."""
    parser = argparse.ArgumentParser(prog="make gpu-check", allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__} finds no GPU here: run make gpu-check where one is, "
            "or python -m tests.gpu_check --device cpu for its small form"
        )
    begun = time.monotonic()
    all_hold = True
    for comparison in comparisons(device):
        all_hold &= comparison.holds
        verdict = "ok    " if comparison.holds else "FAILED"
        print(f"{verdict} {comparison.what}: {comparison.apart:.2g} (limit {comparison.limit:.2g})")
    print(f"\n{time.monotonic() - begun:.0f} s so far\n", flush=True)
    for model, reference_scale in {"cuda": (("var-d16", 5), ("var-d30", 5))}.get(
        device.type, (("digits", 3),)
    ):
        _time(model, reference_scale, device)
        print(f"\n{time.monotonic() - begun:.0f} s so far\n", flush=True)
    print_dearest(device)
    print(f"\n{time.monotonic() - begun:.0f} s in all")
    return EXIT_DONE if all_hold else EXIT_INCOMPLETE


def comparisons(device: torch.device) -> Iterator[Comparison]:
    """All comparisons with plain loops, cheap ones first."""
    for dtype in (torch.float64, torch.float32):
        yield from _with_dense(device, dtype)
    for dtype in HALVES:
        yield _half_with_dense(device, dtype)
    yield from _among_ourselves(device)
    if device.type == "cuda":
        yield from _recorded(device)
        yield from _texts_by_triton(device)
        yield from _triton_in_half(device)
    yield from _with_published(device)
    yield from _half_tokens(device)


def _with_dense(device: torch.device, dtype: torch.dtype) -> Iterator[Comparison]:
    """Every preset, tokens drawn freely: one that differs puts the feature maps far apart."""
    for i, preset in enumerate(PRESETS):
        plain, policy = tiny_model(i % len(SHAPES), dtype), tiny_policy(preset)
        numbers = _uniforms(plain)
        want = reference.sample(states(plain), plain.config, policy, GUIDED, LABELS, *numbers)
        sampler = Sampler(_moved(plain, device, dtype), policy, GUIDED)
        given = (torch.tensor(LABELS), *numbers)
        got = sampler.tokens_from_uniforms(*(values.to(device) for values in given))
        apart = (got.feature_map_BZHW.cpu() - want.feature_map_BZHW).abs().max().item()
        yield Comparison(
            f"{preset} on prefixes and the dense reference, {_name(dtype)}, feature map",
            apart,
            TOLERANCE[dtype],
        )


def _half_with_dense(device: torch.device, dtype: torch.dtype) -> Comparison:
    """Logits of a policy that ranks, teacher-forced by the dense reference in float32."""
    plain, policy = tiny_model(0, torch.float32), make_policy("depthvar", reference_scale=1)
    numbers = _uniforms(plain)
    want = reference.sample(states(plain), plain.config, policy, GUIDED, LABELS, *numbers)
    logits: list[Tensor] = []
    sampler = Sampler(_moved(plain, device, dtype), policy, GUIDED)
    sampler.tokens_from_uniforms(
        *(values.to(device) for values in (torch.tensor(LABELS), *numbers)),
        on_scale=lambda _, logits_BTV, __: logits.append(logits_BTV.cpu()),
        forced=[scale.tokens_BT.to(device) for scale in want.scales],
    )
    return Comparison(
        f"depthvar and the dense reference in float32, {_name(dtype)}, mean of logits",
        _mean_apart(logits, [scale.logits_BTV for scale in want.scales]),
        HALF_LIMIT[dtype],
    )


def _among_ourselves(device: torch.device) -> Iterator[Comparison]:
    """An image alone and in a batch; a batch as jobs make it and scale by scale."""
    for preset in ("full", "depthvar"):
        policy = tiny_policy(preset)
        exact = Sampler(_model(device, torch.float64), policy, GUIDED)
        batch = exact.tokens(LABELS, seed=3, indices=[7, 8, 9])
        alone = exact.tokens(LABELS[1:2], seed=3, indices=[8])
        apart = sum(
            (one[0] != of_batch[1]).sum().item()
            for one, of_batch in zip(alone.tokens, batch.tokens, strict=True)
        )
        yield Comparison(f"{preset}, an image alone and in a batch, float64, tokens", apart, 0)
        sampler = Sampler(_model(device, torch.float32), policy, GUIDED)
        made = sampler(LABELS, seed=3, indices=[7, 8, 9]).images_BHWC
        stepwise = sampler.tokens(LABELS, seed=3, indices=[7, 8, 9], on_scale=lambda *_: None)
        pixels = sampler.decode(stepwise.feature_map_BZHW).cpu().numpy()
        levels = abs(made.astype(int) - pixels.astype(int)).max()
        yield Comparison(f"{preset}, a batch and its scales one by one, float32, pixels", levels, 1)


def _recorded(device: torch.device) -> Iterator[Comparison]:
    """Batches replayed by one recording, other ones than it was made of, and plain ones."""
    kinds: tuple[Kernels, ...] = ("graph", "triton")
    for preset, kernels in product(PRESETS, kinds):
        model = _moved(tiny_model(0, torch.float32), device, torch.float32)
        policy = tiny_policy(preset)
        plain = Sampler(model, policy, GUIDED)
        record, pointwise = recorder(kernels, device), pointwise_of(kernels)
        recorded = Sampler(model, policy, GUIDED, record=record, pointwise=pointwise)
        levels = 0
        for labels, begin in ((LABELS, 0), (LABELS[:2], 3), (LABELS[::-1], 5), (LABELS[1:], 9)):
            indices = range(begin, begin + len(labels))
            got, want = (
                sampler(labels, seed=3, indices=indices).images_BHWC.astype(int)
                for sampler in (recorded, plain)
            )
            levels = max(levels, abs(got - want).max())
        what = f"{preset}, batches recorded by --kernels {kernels} and plain ones, float32, pixels"
        yield Comparison(what, levels, 1)


def _texts_by_triton(device: torch.device) -> Iterator[Comparison]:
    """A model of texts, whose queries and keys turn, by Triton's kernels and plain ones."""
    plain, texts = tiny_text_model(0, torch.float32), text_states((3, 5, 2))
    model = _moved(plain, device, torch.float32)
    policy = tiny_policy("depthvar-paper")
    drawn, want = _drawn(Sampler(model, policy, TEXT_GUIDED), texts)
    fast = Sampler(model, policy, TEXT_GUIDED, pointwise=pointwise_of("triton"))
    got = _drawn(fast, texts, forced=drawn.tokens)[1]
    what = "a model of texts, Triton's kernels and plain ones, float32, mean of logits"
    yield Comparison(what, _mean_apart(got, want), 1e-3)


def _triton_in_half(device: torch.device) -> Iterator[Comparison]:
    """Triton's kernels and the plain sampler at real shapes: logits, teacher-forced, and pixels."""
    for dtype, limit in HALF_LIMIT.items():
        model = random_model(MODELS["var-d16"], device=device, dtype=dtype)
        policy = make_policy("depthvar", reference_scale=5)
        plain, fast = (
            Sampler(model, policy, model.config.sampling, pointwise=pointwise_of(kernels))
            for kernels in ("plain", "triton")
        )
        drawn, want = _drawn(plain)
        what = f"var-d16, Triton's kernels and plain ones, {_name(dtype)}"
        apart = _mean_apart(_drawn(fast, forced=drawn.tokens)[1], want)
        yield Comparison(f"{what}, mean of logits", apart, limit)
        pixels = (sampler.decode(drawn.feature_map_BZHW).float() for sampler in (fast, plain))
        levels = torch.sub(*pixels).abs().mean().item()
        yield Comparison(f"{what}, mean of pixels", levels, 1)


def _drawn(
    sampler: Sampler, given: Given = LABELS, forced: Sequence[Tensor] | None = None
) -> tuple[SampledTokens, list[Tensor]]:
    """Tokens, and the guided logits of every scale (B, T, V)."""
    logits: list[Tensor] = []
    drawn = sampler.tokens(
        given,
        seed=0,
        indices=range(len(given)),
        on_scale=lambda _, logits_BTV, __: logits.append(logits_BTV),
        forced=forced,
    )
    return drawn, logits


def _with_published(device: torch.device) -> Iterator[Comparison]:
    """Full depth and the published loop, scale by scale on the same tokens."""
    plain = [_moved(tiny_model(1, torch.float32), device, torch.float32)]
    if device.type == "cuda":
        plain.append(random_model(MODELS["var-d16"], device=device))
    for wide in plain:
        for dtype, limit in ((torch.float32, 1e-3), *HALF_LIMIT.items()):
            sampler = Sampler(
                _moved(wide, device, dtype), make_policy("full"), wide.config.sampling
            )
            sampled, ours = _drawn(sampler)
            theirs = published_logits(wide, dtype, LABELS, sampled.tokens)
            what = f"{wide.config.name} and the loop as published, {_name(dtype)}, mean of logits"
            yield Comparison(what, _mean_apart(ours, theirs), limit)


def published_logits(
    model: LoadedModel, dtype: torch.dtype, labels: Sequence[int], tokens: Sequence[Tensor]
) -> list[Tensor]:
    """The published loop's guided logits of every scale (B, T, V), after tokens that are given."""
    logits: list[Tensor] = []

    def follow(logits_BTV: Tensor) -> Tensor:
        logits.append(logits_BTV)
        return tokens[len(logits) - 1]

    PublishedSampler(model, dtype, follow).feature_map(labels)
    return logits


def _half_tokens(device: torch.device) -> Iterator[Comparison]:
    """Tokens that half precision draws otherwise than float32, teacher-forced, trained weights."""
    wide = _model(device, torch.float32)
    for dtype, limit in ((torch.bfloat16, 0.25), (torch.float16, 0.06)):
        model = _model(device, dtype)
        differing = 1 - equal_tokens(model, wide, make_policy("full"), len(LABELS))
        what = f"{model.config.name}, {_name(dtype)} and float32, share of tokens that differ"
        yield Comparison(what, differing, limit)


def _model(device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """The bundled model; in the small form one that a CPU is quick with."""
    if device.type == "cpu":
        return _moved(tiny_model(2, torch.float32), device, dtype)
    return load_model(find_model("digits", None), device=device, dtype=dtype)


def _uniforms(model: LoadedModel) -> tuple[Tensor, Tensor]:
    """Numbers for the draws and for ranking at random, each (B, N)."""
    shape = (2, len(LABELS), model.config.transformer.num_tokens)
    both = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return both[0], both[1]


def _moved(model: AnyLoaded, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy on a device in a precision, without its calibration."""
    parts = copy.deepcopy(model.transformer), copy.deepcopy(model.tokenizer)
    return assemble(model.found, *parts, device=device, dtype=dtype)


def _mean_apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Mean absolute difference as a share of the deviation of the second over the codes."""
    some_BNV, others_BNV = torch.cat(list(some), dim=1), torch.cat(list(others), dim=1)
    return ((some_BNV - others_BNV).abs().mean() / others_BNV.std(dim=2).mean()).item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _time(model: str, reference_scale: int, device: torch.device) -> None:
    is_small = device.type == "cpu"
    precision = "float32" if is_small else "bfloat16"  # which a CPU is slow in
    flags = ["--model", model, "--device", device.type, "--precision", precision]
    flags += ["--policies", f"depthvar:{reference_scale}"]
    flags += ["--batch-sizes", "1", *([] if is_small else ["64"])]
    flags += ["--kernels", *(["plain"] if is_small else ["graph", "triton", "plain"])]
    benchmark.main([*flags, "--rounds", "1" if is_small else "5"])


def print_dearest(device: torch.device, count: int = 10) -> None:
    """The kernels that took most of a batch of the benchmark's last model, after one to warm up."""
    is_small = device.type == "cpu"
    name, batch_size = ("digits", 1) if is_small else ("var-d30", 64)
    policy = make_policy("depthvar", reference_scale=3 if is_small else 5)
    dtype = torch.float32 if is_small else torch.bfloat16
    model = random_model(MODELS[name], device=device, dtype=dtype)
    sampler = Sampler(model, policy, model.config.sampling)
    labels = [i % model.config.num_classes for i in range(batch_size)]
    sampler(labels, seed=0, indices=range(batch_size))
    activities = [ProfilerActivity.CPU, *([] if is_small else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as profiler:
        sampler(labels, seed=0, indices=range(batch_size))
    time_of = "self_cpu_time_total" if is_small else "self_device_time_total"
    events = [e for e in profiler.key_averages() if e.device_type.name.lower() == device.type]
    events.sort(key=lambda event: -getattr(event, time_of))
    total_us = sum(getattr(event, time_of) for event in events)
    print(f"{name}, batch {batch_size}, {policy.preset}: {total_us / 1e3:.1f} ms in kernels\n")
    print("| ms | share | calls | kernel |\n| --- | --- | --- | --- |")
    for event in events[:count]:
        taken_us = getattr(event, time_of)
        share = taken_us / total_us
        print(f"| {taken_us / 1e3:.2f} | {share:.1%} | {event.count} | `{event.key[:90]}` |")


if __name__ == "__main__":
    run_job(main)
