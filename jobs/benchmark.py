"""Time depth policies on this machine: `depthvar benchmark --model var-d16`.

Prints Markdown: a table of times, beside those of the loop as it was published, of how much of what
a policy leaves out becomes time saved, of memory, and of what it changes; and one of operations and
bytes, which are counted. docs/performance.md says what the columns mean. Without --weights a
published model gets random ones, which take the same time and whose images mean nothing. A text
model is given noise in place of an encoder's states, and has no published loop beside it. Needs
torch, numpy and safetensors alone: neither Ray nor any other part of the pipeline.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import get_args

import torch

from depthvar.config import (
    IMAGE_SIZE,
    KNOWN_MODELS,
    AnyModel,
    model_config,
    of_written_size,
)
from depthvar.cost import image_cost
from depthvar.counting import BatchWork, blank_model, work_of_batch
from depthvar.errors import InputError, naming
from depthvar.host.rate import rate_text
from depthvar.memory import memory_need
from depthvar.paths import check_output_file, checked_model, checked_path, checked_weights
from depthvar.plan import DepthPlan
from depthvar.pointwise import Pointwise
from depthvar.policy import DepthPolicy
from depthvar.presets import DEFAULT_PRESET, PRESETS, TEXT_PRESET, make_policy
from depthvar.recording import pointwise_of, recorder
from depthvar.settings import Kernels
from depthvar.timing import Contender, Lap, equal_tokens, product_rate, time_contenders
from depthvar.weights.checkpoint import AnyLoaded, LoadedModel, load_any, random_model
from depthvar.weights.files import BUNDLED
from depthvar.weights.find import FoundModel, find_model
from jobs._entry import EXIT_DONE, run_job

FULL = "full"
PUBLISHED = "as published"
PRODUCT_SIDE = {"cuda": 8192, "cpu": 512}
"""Side of the matrices whose product is the peak that times are compared with."""
_MOST_COMPARED = 4
"""Images whose tokens are compared with float32's."""


@dataclass(frozen=True)
class Row:
    """What was measured of a contender at a batch size; the published loop has no policy.

    image_flops: floating-point operations of an image. bound: how many times fewer of them than
    full depth in the transformer. memory_bytes: weights and the most that was taken above them, 0
    on a CPU. predicted_bytes: the same by arithmetic. equal_tokens: share of tokens drawn as in
    float32, teacher-forced.
    """

    batch_size: int
    name: str
    policy: DepthPolicy | None
    laps: list[Lap]
    full_laps: list[Lap]
    image_flops: float
    bound: float
    memory_bytes: int
    predicted_bytes: int | None
    equal_tokens: float | None

    @property
    def image_s(self) -> float:
        """Median seconds of an image."""
        return median(lap.image_s for lap in self.laps)

    def peak_share(self, product_rate: float) -> float:
        """Share of the rate of large products, over the whole image."""
        return self.image_flops / self.image_s / product_rate

    @property
    def time_to_full(self) -> list[float]:
        """Time of an image over full depth's in the same round, ascending."""
        pairs = zip(self.laps, self.full_laps, strict=True)
        return sorted(lap.image_s / full.image_s for lap, full in pairs)

    @property
    def speed_ups(self) -> list[float]:
        """Full depth's time without the decoder over this one's in the same round, ascending."""
        pairs = zip(self.laps, self.full_laps, strict=True)
        return sorted(full.sampling_s / lap.sampling_s for lap, full in pairs)

    @property
    def saving_efficiency(self) -> float | None:
        """The speed-up over the bound, where something is left out."""
        return median(self.speed_ups) / self.bound if self.bound > 1 else None

    def cells(self, product_rate: float) -> dict[str, str]:
        """The row of the table, by the columns' names."""
        images_ms = sorted(1e3 * lap.image_s for lap in self.laps)
        drawing_s = median(lap.drawing_s for lap in self.laps)
        sampling_s = median(lap.sampling_s for lap in self.laps)
        is_ours = self.policy is not None
        efficiency = self.saving_efficiency
        return {
            "batch": str(self.batch_size),
            "policy": self.name,
            "image, ms": _with_range(images_ms),
            "transformer": f"{1e3 * (sampling_s - drawing_s):.2f}",
            "drawing": f"{1e3 * drawing_s:.2f}",
            "decoder": f"{1e3 * median(lap.decoding_s for lap in self.laps):.2f}",
            "images/s": rate_text(1 / self.image_s),
            "of peak": f"{self.peak_share(product_rate):.1%}",
            "time / full": _with_range(self.time_to_full),
            "speed-up": _with_range(self.speed_ups),
            "bound": f"{self.bound:.2f}" if efficiency is not None else "",
            "saving efficiency": f"{efficiency:.1%}" if efficiency is not None else "",
            "memory, GB": f"{self.memory_bytes / 1e9:.2f}" if self.memory_bytes else "",
            "predicted": f"{self.predicted_bytes / 1e9:.2f}" if self.predicted_bytes else "",
            "tokens as float32": "" if self.equal_tokens is None else f"{self.equal_tokens:.1%}",
            "distance": f"{mean(lap.distance for lap in self.laps):.4f}" if is_ours else "",
        }

    def numbers(self, product_rate: float) -> dict[str, object]:
        """All of it for the JSON file."""
        kept = {k: v for k, v in vars(self).items() if k not in ("policy", "laps", "full_laps")}
        return kept | {
            "policy": self.policy.as_stored if self.policy else None,
            "laps": [asdict(lap) for lap in self.laps],
            "images_per_s": 1 / self.image_s,
            "peak_share": self.peak_share(product_rate),
            "speed_up": median(self.speed_ups),
            "saving_efficiency": self.saving_efficiency,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables and write the files; exit code 0."""
    flags = parser().parse_args(argv)
    device = torch.device(_device(flags.device))
    _check_paths(flags)
    torch.set_num_threads(flags.threads)
    config = _found(flags).config
    policies = chosen_policies(config, flags.policies)
    for policy in policies.values():
        DepthPlan.build(config.grids, config.num_blocks, policy)  # what does not fit stops here
    dtype = getattr(torch, flags.precision)
    if flags.count_only:
        blank = blank_model(config, dtype=dtype)
        print(f"model     {config.name}, {flags.precision}, counted without weights\n")
        _print_work(blank, policies, flags)
        return EXIT_DONE
    for kernels in flags.kernels:
        recorder(kernels, device)  # what the device does not have stops here
    model = _model(flags, device, dtype)
    wide = None
    if not config.is_text:
        wide = model if dtype == torch.float32 else _model(flags, device, torch.float32)
    rate = product_rate(device, dtype, side=PRODUCT_SIDE[device.type])
    lines = [*heading(model, device), f"peak      {rate / 1e12:.3g} TFLOP/s in large products"]
    print("\n".join([*lines, ""]), flush=True)
    rows = _timed(model, wide, policies, flags)
    _print_table([row.cells(rate) for row in rows])
    print()
    # A text model is too large to run once more for what its shapes tell.
    counted = blank_model(config, dtype=dtype) if config.is_text else model
    work = _print_work(counted, policies, flags)
    if flags.json is not None:
        content = {
            "machine": lines,
            "rounds": flags.rounds,
            "product_flops_per_s": rate,
            "rows": [row.numbers(rate) for row in rows],
            "work": work,
        }
        with naming(flags.json):
            flags.json.write_text(json.dumps(content, indent=1) + "\n")
    if flags.plot is not None:
        _plot(flags.plot, lines, rows)
    return EXIT_DONE


def _timed(
    model: AnyLoaded,
    wide: AnyLoaded | None,
    policies: Mapping[str, DepthPolicy],
    flags: argparse.Namespace,
) -> list[Row]:
    """A row per batch size and contender; `wide` is the model in float32, None for one of texts."""
    contenders, policy_of = {}, {}
    for kernels in flags.kernels:
        for word, policy in policies.items():
            # Full depth in the first way is what all others are compared with.
            name = _named(word, kernels, flags)
            contenders[name], policy_of[name] = Contender.of_policy(model, policy, kernels), policy
    if isinstance(wide, LoadedModel):
        contenders[PUBLISHED] = Contender.as_published(wide, model.dtype)
    agreements: dict[str, float] = {}
    if wide is not None and model.dtype != wide.dtype:
        for name, policy in policies.items():
            count = min(_MOST_COMPARED, max(flags.batch_sizes))
            agreements[name] = equal_tokens(model, wide, policy, count)
    total = len(flags.batch_sizes) * len(contenders) * (flags.rounds + 1)
    done = 0

    def after_batch(batches: int) -> None:
        nonlocal done
        done += batches
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rbatch {done} of {total}", end=end, file=sys.stderr, flush=True)

    rows = []
    for batch_size in flags.batch_sizes:
        laps = time_contenders(
            contenders,
            model.config,
            model.device,
            rounds=flags.rounds,
            batch_size=batch_size,
            after_batch=after_batch,
        )
        for name in contenders:
            own = wide if wide is not None and name == PUBLISHED else model
            rows.append(
                _row_of(own, name, policy_of.get(name), batch_size, laps, agreements.get(name))
            )
    return rows


def _row_of(
    model: AnyLoaded,
    name: str,
    policy: DepthPolicy | None,
    batch_size: int,
    laps: Mapping[str, list[Lap]],
    agreement: float | None,
) -> Row:
    config, streams = model.config, model.config.sampling.streams
    full, plan = (
        DepthPlan.build(config.grids, config.num_blocks, each or make_policy(FULL))
        for each in (None, policy)
    )
    full_cost, cost = (image_cost(config, each, streams=streams) for each in (full, plan))
    predicted = None
    if policy is not None:
        precision = str(model.dtype).removeprefix("torch.")
        need = memory_need(
            config, plan, batch_size=batch_size, streams=streams, precision=precision
        )
        predicted = need.peak
    added_bytes = laps[name][0].added_bytes
    weights = (*model.transformer.parameters(), *model.tokenizer.parameters())
    weight_bytes = sum(parameter.nbytes for parameter in weights)
    return Row(
        batch_size=batch_size,
        name=name,
        policy=policy,
        laps=laps[name],
        full_laps=laps[FULL],
        image_flops=cost.total_flops,
        bound=full_cost.transformer_flops / cost.transformer_flops,
        memory_bytes=weight_bytes + added_bytes if added_bytes else 0,
        predicted_bytes=predicted,
        equal_tokens=agreement,
    )


def _print_work(
    model: AnyLoaded, policies: Mapping[str, DepthPolicy], flags: argparse.Namespace
) -> list[dict[str, object]]:
    """The table of what is counted; the same for the JSON file."""
    ways: dict[Pointwise, Kernels] = {}
    for kernels in flags.kernels:  # a recording is of the plain operations
        ways.setdefault(pointwise_of(kernels), kernels)
    counted = [
        (batch_size, _named(word, kernels, flags), work_of_batch(model, policy, batch_size, way))
        for batch_size in flags.batch_sizes
        for way, kernels in ways.items()
        for word, policy in policies.items()
    ]
    _print_table([_work_cells(*each) for each in counted])
    return [
        {"batch_size": batch_size, "name": name, **asdict(work)}
        for batch_size, name, work in counted
    ]


def _named(policy: str, kernels: Kernels, flags: argparse.Namespace) -> str:
    """Of a policy and the kernels it is run by, where those are not the first."""
    return policy if kernels == flags.kernels[0] else f"{policy}, {kernels}"


def _work_cells(batch_size: int, name: str, work: BatchWork) -> dict[str, str]:
    sampling, decoding = work.sampling, work.decoding
    return {
        "batch": str(batch_size),
        "policy": name,
        "operations: sampling": f"{sampling.operations:,}",
        "operations: decoding": f"{decoding.operations:,}",
        "GB an image: sampling": f"{sampling.operand_bytes / batch_size / 1e9:.3f}",
        "GB an image: decoding": f"{decoding.operand_bytes / batch_size / 1e9:.3f}",
    }


def chosen_policies(config: AnyModel, words: Sequence[str]) -> dict[str, DepthPolicy]:
    """Policies by the words that name them, `preset` or `preset:R`; full depth comes first.

    Without words, the default at the three reference scales that end two to four scales early.
    """
    last = len(config.grids) - 1
    preset = TEXT_PRESET if config.is_text else DEFAULT_PRESET
    words = words or [f"{preset}:{last - skipped}" for skipped in (2, 3, 4) if last > skipped]
    policies = {FULL: make_policy(FULL)}
    for word in words:
        preset, colon, reference = word.partition(":")
        if colon and not reference.isdecimal():
            raise InputError(
                f"--policies: got {word!r}, wanted a policy such as depthvar:3, with its "
                "reference scale after the colon"
            )
        policies[word] = make_policy(preset, reference_scale=int(reference) if colon else None)
    return policies


def heading(model: AnyLoaded, device: torch.device) -> list[str]:
    """What the times are of: the model, the machine, the versions, the commit."""
    hardware = _cpu_name()
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    precision = str(model.dtype).removeprefix("torch.")
    threads = "" if device.type == "cuda" else f", threads: {torch.get_num_threads()}"
    weights = model.found.sha256[:12] if model.found.transformer.is_file() else "random"
    height, width = model.config.image_size
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return [
        f"model     {model.config.name}, {width}x{height}, {precision}, weights {weights}",
        f"machine   {hardware}{threads}",
        f"software  {versions}, commit {_commit()}",
    ]


def parser() -> argparse.ArgumentParser:
    """The flags; without pydantic, which need not be where the GPU is."""
    parser = argparse.ArgumentParser(
        prog="depthvar benchmark",
        usage="%(prog)s [flags]",
        description=__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--help-all", action="help", help=argparse.SUPPRESS)
    _add_what(parser.add_argument_group("what to time"))
    _add_how(parser.add_argument_group("how"))
    _add_told(parser.add_argument_group("what to tell"))
    return parser


def _add_what(flags: argparse._ArgumentGroup) -> None:
    flags.add_argument("--model", default="digits", help="model to time (default: digits)")
    flags.add_argument(
        "--weights",
        metavar="PATH",
        help="its weights: a local file or folder, or a Hugging Face repository (default: random)",
    )
    flags.add_argument(
        "--image-size",
        type=_image_size,
        metavar="SIZE",
        help="pixels of an image as SIDE or WIDTHxHEIGHT, of a text model's published sizes "
        "(default: the model's own)",
    )
    flags.add_argument(
        "--policies",
        nargs="+",
        default=[],
        metavar="POLICY:R",
        help=f"policies with their reference scale, of {', '.join(PRESETS)}; full depth is timed "
        "too, and so is the published loop of a model of classes (default: the usual one at "
        "three reference scales)",
    )
    flags.add_argument(
        "--batch-sizes",
        nargs="+",
        type=_count,
        default=[8],
        metavar="N",
        help="images at once (default: 8)",
    )


def _add_how(flags: argparse._ArgumentGroup) -> None:
    flags.add_argument(
        "--rounds", type=_count, default=5, metavar="N", help="batches per policy (default: 5)"
    )
    flags.add_argument("--precision", choices=("float32", "bfloat16", "float16"), default="float32")
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags.add_argument(
        "--kernels",
        nargs="+",
        choices=get_args(Kernels),
        default=["auto"],
        help="plain; graph: a batch recorded as one CUDA graph; or triton: recorded, its pointwise "
        "regions Triton's kernels (default: auto, graph on a GPU)",
    )
    flags.add_argument(
        "--threads", type=_count, default=1, metavar="N", help="CPU threads (default: 1)"
    )


def _add_told(flags: argparse._ArgumentGroup) -> None:
    flags.add_argument(
        "--count-only",
        action="store_true",
        help="print the operations and bytes alone, without weights and without running anything",
    )
    flags.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    flags.add_argument("--plot", metavar="FILE", help="draw the times to this file (.png, .svg)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1")
    return int(text)


def _image_size(text: str) -> str:
    if not re.fullmatch(IMAGE_SIZE, text):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted pixels such as 512 or 1248x832")
    return text


def _check_paths(flags: argparse.Namespace) -> None:
    """Put in place of the paths what is to be opened. Errors: `InputError`."""
    flags.model = checked_model(flags.model)
    if flags.weights is not None:
        flags.weights = checked_weights(flags.weights)
    if flags.json is not None:
        flags.json = Path(checked_path(flags.json))
        check_output_file(flags.json, "--json")
    if flags.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise InputError("got --plot, but matplotlib is not installed: pip install matplotlib")
        flags.plot = Path(checked_path(flags.plot))
        check_output_file(flags.plot, "--plot")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("got --device cuda, but torch finds no GPU here: use --device cpu")
    return name


def _is_random(flags: argparse.Namespace) -> bool:
    """Whether a published model is timed without its weights."""
    is_bundled = (BUNDLED / flags.model).is_dir()
    return flags.weights is None and flags.model in KNOWN_MODELS and not is_bundled


def _found(flags: argparse.Namespace) -> FoundModel:
    """The model at the size of images that is asked for."""
    if _is_random(flags):
        found = FoundModel(model_config(flags.model), Path("random"), Path("random"), None, ())
    else:
        found = find_model(flags.model, flags.weights)
    return replace(found, config=of_written_size(found.config, flags.image_size))


def _model(flags: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> AnyLoaded:
    found = _found(flags)
    if not _is_random(flags):
        return load_any(found, device=device, dtype=dtype)
    return random_model(found.config, device=device, dtype=dtype)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of this checkout, or `unknown` outside one."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def _with_range(ascending: Sequence[float]) -> str:
    return f"{median(ascending):.2f} ({ascending[0]:.2f}-{ascending[-1]:.2f})"


def _print_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Markdown, with the columns that the first row names."""
    columns = list(rows[0])
    for values in (columns, ["---"] * len(columns), *(list(row.values()) for row in rows)):
        print("| " + " | ".join(values) + " |")


def _plot(path: Path, lines: Sequence[str], rows: Sequence[Row]) -> None:
    """A bar per row: milliseconds of an image in transformer, drawing and decoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batch_sizes = list(dict.fromkeys(row.batch_size for row in rows))
    per_batch = len(rows) // len(batch_sizes)
    figure, axes = pyplot.subplots(
        len(batch_sizes),
        squeeze=False,
        figsize=(8, 1.4 + 0.5 * len(rows) + 0.5 * len(batch_sizes)),
        layout="constrained",
    )
    for axis, batch_size in zip(axes[:, 0], batch_sizes, strict=True):
        shown = [row for row in rows if row.batch_size == batch_size]
        names = [row.name for row in shown]
        begin = [0.0] * per_batch
        for part in ("transformer", "drawing", "decoder"):
            length = [1e3 * median(_seconds(lap, part) for lap in row.laps) for row in shown]
            axis.barh(names, length, left=begin, label=part)
            begin = [a + b for a, b in zip(begin, length, strict=True)]
        for place, (row, end) in enumerate(zip(shown, begin, strict=True)):
            axis.text(end, place, f" {rate_text(1 / row.image_s)} images/s", va="center")
        axis.margins(x=0.25)
        axis.invert_yaxis()
        axis.set_title(f"batch {batch_size}", loc="left")
        axis.set_xlabel("milliseconds an image")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=3)
    figure.suptitle("\n".join(lines[:2]), fontsize=8, ha="left", x=0.02)
    with naming(path):
        figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _seconds(lap: Lap, part: str) -> float:
    if part == "transformer":
        return lap.sampling_s - lap.drawing_s
    return lap.drawing_s if part == "drawing" else lap.decoding_s


if __name__ == "__main__":
    run_job(main)
