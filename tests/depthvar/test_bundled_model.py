"""The model in the package: its size, its tokens (a golden file) and what its images are worth."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from depthvar.presets import make_policy
from depthvar.sampling import Sampler
from depthvar.weights.checkpoint import load_model
from depthvar.weights.files import BUNDLED
from depthvar.weights.find import find_model
from pipeline.research.quality.features import digit_features

GOLDEN = Path(__file__).parents[1] / "golden_tokens.json"
MAX_BYTES = 8_000_000


def test_the_weights_take_at_most_8_megabytes():
    assert sum(path.stat().st_size for path in (BUNDLED / "digits").iterdir()) <= MAX_BYTES


def token_hashes(policy: str) -> list[str]:
    """SHA-256 of the tokens of four samples, in float64, where rounding moves no token."""
    model = load_model(find_model("digits"), dtype=torch.float64)
    sampler = Sampler(model, make_policy(policy), model.config.sampling)
    tokens = torch.cat(sampler.tokens([0, 3, 6, 9], seed=7, indices=[0, 5, 50, 10**9]).tokens, 1)
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in tokens]


@pytest.mark.parametrize("policy", ["full", "depthvar", "depthvar-paper", "hard-pruning"])
def test_tokens_change_only_in_a_commit_that_says_why(policy: str):
    assert token_hashes(policy) == json.loads(GOLDEN.read_text())[policy]


@pytest.mark.parametrize("policy", ["full", "depthvar"])
def test_its_images_are_read_as_their_labels(policy: str):
    """At most 1 of 90 is not: a model that lost 7% of them would pass once in a hundred times."""
    model = load_model(find_model("digits"))
    sampler = Sampler(model, make_policy(policy), model.config.sampling)
    labels = [i % 10 for i in range(90)]
    batches = [sampler(labels[i : i + 45], seed=3, indices=range(i, i + 45)) for i in (0, 45)]
    read = digit_features().read(np.concatenate([batch.images_BHWC for batch in batches])).labels
    assert (read != labels).sum() <= 1
