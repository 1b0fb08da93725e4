"""Time depth policies on this machine: `depthvar benchmark --model var-d16`.

Prints a Markdown table: time per image in the transformer and in the decoder, the time against full
depth, compared batch by batch, and the distance: mean squared difference of the pixels, in [-1, 1],
from full depth's images of the same noise, which says without any real images which policy suits
a checkpoint. Without --weights a published model gets random ones, which take the same time and
whose distances mean nothing. Needs torch, numpy and safetensors alone: neither Ray nor any
other part of the pipeline.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median

import torch
from tqdm import tqdm

from depthvar.config import MODELS, ModelConfig, model_config
from depthvar.cost import image_cost
from depthvar.errors import InputError, naming
from depthvar.host.rate import rate_text
from depthvar.paths import check_output_file, checked_model, checked_path, checked_weights
from depthvar.plan import DepthPlan
from depthvar.policy import DEFAULT_PRESET, PRESETS, DepthPolicy, make_policy
from depthvar.timing import Lap, time_policies
from depthvar.weights.checkpoint import LoadedModel, load_model, random_model
from depthvar.weights.files import BUNDLED
from depthvar.weights.find import find_model
from jobs._entry import EXIT_DONE, run_job

FULL = "full"
_COLUMNS = (
    "batch",
    "policy",
    "token-layers",
    "GFLOP",
    "transformer, ms",
    "decoder, ms",
    "images/s",
    "time / full",
    "distance to full",
    "GPU memory",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and write the JSON file; exit code 0."""
    flags = parser().parse_args(argv)
    device = torch.device(_device(flags.device))
    _check_paths(flags)
    torch.set_num_threads(flags.threads)
    config = (
        model_config(flags.model)
        if _is_random(flags)
        else find_model(flags.model, flags.weights).config
    )
    policies = chosen_policies(config, flags.policies)
    for policy in policies.values():
        DepthPlan.build(config.sides, config.num_blocks, policy)  # what does not fit stops here
    model = _model(flags, device)
    lines = [*heading(model, device), "", _row(_COLUMNS), _row(["---"] * len(_COLUMNS))]
    print("\n".join(lines), flush=True)
    report: list[dict[str, object]] = []
    total = len(flags.batch_sizes) * len(policies) * (flags.rounds + 1)
    with tqdm(total=total, unit="batch", desc="benchmark", file=sys.stderr) as bar:
        for batch_size in flags.batch_sizes:
            laps = time_policies(
                model,
                policies,
                rounds=flags.rounds,
                batch_size=batch_size,
                after_batch=bar.update,
            )
            for name, policy in policies.items():
                tqdm.write(row(config, name, policy, batch_size, laps), file=sys.stdout)
                report.append(
                    {
                        "batch_size": batch_size,
                        "policy": asdict(policy),
                        "laps": [asdict(lap) for lap in laps[name]],
                    }
                )
    if flags.json is not None:
        content = {"machine": heading(model, device), "rounds": flags.rounds, "rows": report}
        with naming(flags.json):
            flags.json.write_text(json.dumps(content, indent=1) + "\n")
    return EXIT_DONE


def chosen_policies(config: ModelConfig, words: Sequence[str]) -> dict[str, DepthPolicy]:
    """Policies by the words that name them, `preset` or `preset:R`; full depth comes first.

    Without words, the default at the three reference scales that end two to four scales early.
    """
    last = len(config.sides) - 1
    words = words or [
        f"{DEFAULT_PRESET}:{last - skipped}" for skipped in (2, 3, 4) if last > skipped
    ]
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


def heading(model: LoadedModel, device: torch.device) -> list[str]:
    """What the times are of: the model, the machine, the versions, the commit."""
    hardware = _cpu_name()
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    precision = str(model.dtype).removeprefix("torch.")
    threads = "" if device.type == "cuda" else f", threads: {torch.get_num_threads()}"
    weights = model.found.sha256[:12] if model.found.transformer.is_file() else "random"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return [
        f"model     {model.config.name}, {precision}, weights {weights}",
        f"machine   {hardware}{threads}",
        f"software  {versions}, commit {_commit()}",
    ]


def row(
    config: ModelConfig,
    name: str,
    policy: DepthPolicy,
    batch_size: int,
    laps: Mapping[str, Sequence[Lap]],
) -> str:
    """A line of the table: medians over the rounds, and the ratio's range."""
    plan = DepthPlan.build(config.sides, config.num_blocks, policy)
    cost = image_cost(config, plan, streams=config.sampling.streams)
    ours = laps[name]
    pairs = zip(ours, laps[FULL], strict=True)
    ratios = sorted(lap.image_s / full.image_s for lap, full in pairs)
    peak = max(lap.peak_bytes for lap in ours)
    return _row(
        (
            str(batch_size),
            name,
            f"{plan.token_layers / plan.full_token_layers:.1%}",
            f"{cost.total_flops / 1e9:.2f}",
            f"{1e3 * median(lap.sampling_s for lap in ours):.2f}",
            f"{1e3 * median(lap.decoding_s for lap in ours):.2f}",
            rate_text(1 / median(lap.image_s for lap in ours)),
            f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})",
            f"{mean(lap.distance for lap in ours):.4f}",
            f"{peak / 1e9:.1f} GB" if peak else "",
        )
    )


def parser() -> argparse.ArgumentParser:
    """The flags; without pydantic, which need not be where the GPU is."""
    parser = argparse.ArgumentParser(
        prog="depthvar benchmark", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--model", default="digits", help="model to time (default: digits)")
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="its weights: a local file or folder, or a Hugging Face repository (default: random)",
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        default=[],
        metavar="POLICY:R",
        help=f"policies with their reference scale, of {', '.join(PRESETS)}; full depth is timed "
        "too (default: depthvar at three reference scales)",
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=_count,
        default=[8],
        metavar="N",
        help="images at once (default: 8)",
    )
    parser.add_argument(
        "--rounds", type=_count, default=5, metavar="N", help="batches per policy (default: 5)"
    )
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "float16"), default="float32"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--threads", type=_count, default=1, metavar="N", help="CPU threads (default: 1)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the times to this file")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1")
    return int(text)


def _check_paths(flags: argparse.Namespace) -> None:
    """Put in place of the paths what is to be opened. Errors: `InputError`."""
    flags.model = checked_model(flags.model)
    if flags.weights is not None:
        flags.weights = checked_weights(flags.weights)
    if flags.json is not None:
        flags.json = Path(checked_path(flags.json))
        check_output_file(flags.json, "--json")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("got --device cuda, but torch finds no GPU here: use --device cpu")
    return name


def _is_random(flags: argparse.Namespace) -> bool:
    """Whether a published model is timed without its weights."""
    is_bundled = (BUNDLED / flags.model).is_dir()
    return flags.weights is None and flags.model in MODELS and not is_bundled


def _model(flags: argparse.Namespace, device: torch.device) -> LoadedModel:
    dtype = getattr(torch, flags.precision)
    if _is_random(flags):
        return random_model(flags.model, device=device, dtype=dtype)
    return load_model(find_model(flags.model, flags.weights), device=device, dtype=dtype)


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


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


if __name__ == "__main__":
    run_job(main)
