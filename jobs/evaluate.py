"""Measure a dataset's quality: `depthvar evaluate DIR [--json FILE]`. Reads, changes nothing.

Every number is printed once it is known, which takes seconds for those of digits but for CAS.

Digits: label accuracy, Frechet distance, precision and recall against real digits, and with
--cas-runs the accuracy of classifiers trained on the images (CAS). Other images: FID, Inception
Score, precision and recall, with --inception-weights and --reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from depthvar.errors import InputError
from depthvar.paths import check_input_file
from jobs._entry import EXIT_DONE, run_job
from jobs._report import ReportConfig, check_report, write_report
from pipeline.request.flags import Positional, load_config
from pipeline.request.paths import LocalPath, Location

if TYPE_CHECKING:
    from pipeline.research.quality.evaluation import Evaluation

_SHOWN = {
    "label_accuracy": "share read as their label by a network trained on real digits",
    "cas": "accuracy on real held-out digits after training on these images alone",
    "frechet_distance": "to the real training digits, in digit features",
    "fid": "Frechet Inception distance to the reference",
    "inception_score": "Inception Score",
    "precision": "share of the images among the real ones' nearest neighbours",
    "recall": "share of the real images among these images' nearest neighbours",
}


class EvaluateConfig(ReportConfig):
    """What `depthvar evaluate` can be told."""

    out: Annotated[Location, Positional()] = Field(description="dataset to measure")
    samples: int | None = Field(
        None, gt=0, description="use the first images only (default: all that are committed)"
    )
    cas_samples: int | None = Field(
        None, gt=0, description="images to train on for CAS (default: all, at most 5,000)"
    )
    cas_runs: int = Field(
        0, ge=0, description="trainings for CAS, a minute or more each on a CPU, 0 for none"
    )
    reference: LocalPath | None = Field(
        None, description=".npz with mu, sigma or arr_0 for FID (default: none)"
    )
    inception_weights: LocalPath | None = Field(
        None, description="torch-fidelity's Inception weights for FID (default: none)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where Inception runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the numbers as they come and write the JSON file; exit code 0."""
    config = load_config(EvaluateConfig, argv, prog="depthvar evaluate", description=__doc__ or "")
    check_report(config)
    if config.reference is not None:
        check_input_file(config.reference, "--reference")
    if config.inception_weights is not None:
        check_input_file(config.inception_weights, "--inception-weights")
    from pipeline.dataset.loader import open_dataset
    from pipeline.research.quality.evaluation import EvaluationRequest, Listener, evaluate
    from pipeline.run.console import say
    from pipeline.shards.samples import ShardError

    dataset = open_dataset(config.out)
    request = EvaluationRequest(
        samples=config.samples,
        cas_samples=config.cas_samples,
        cas_runs=config.cas_runs,
        reference=config.reference,
        inception_weights=config.inception_weights,
        device=config.device,
    )
    try:
        evaluation = evaluate(dataset, request, Listener(_print_scores, say))
    except ShardError as error:
        raise InputError(str(error)) from error
    write_report(config, evaluation.to_json())
    print(origin_text(evaluation, str(dataset.storage)))
    return EXIT_DONE


def _print_scores(scores: Mapping[str, float]) -> None:
    for name, meaning in _SHOWN.items():
        if name in scores:
            spread = f" +- {scores[name + '_std']:.4f}" if name + "_std" in scores else ""
            print(f"  {name:<17} {scores[name]:9.4f}{spread:<10}  {meaning}", flush=True)


def origin_text(evaluation: Evaluation, where: str) -> str:
    """What the numbers were computed from."""
    lines = [
        f"{where}: {evaluation.num_samples:,} of {evaluation.num_planned:,} planned images",
        f"features: {evaluation.features}; reference: {evaluation.reference}",
    ]
    if "cas" in evaluation.scores:
        settings = evaluation.settings
        lines.append(f"cas: {settings['cas_runs']} runs on {settings['cas_samples']:,} images")
    return "\n".join(lines + [f"note: {note}" for note in evaluation.notes])


if __name__ == "__main__":
    run_job(main)
