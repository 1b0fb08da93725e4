from __future__ import annotations

import numpy as np
import pytest
import torch

from depthvar.errors import InputError
from pipeline.research.quality.features import (
    NUM_FEATURES,
    ClassifierRecipe,
    accuracy,
    digit_arrays,
    digit_features,
    to_safetensors,
    train_classifier,
)


def test_the_shipped_network_reads_the_held_out_digits():
    network = digit_features()
    assert accuracy(network, *digit_arrays("held-out")) >= 0.985


def test_features_are_the_layer_before_the_classes_and_do_not_depend_on_the_batch():
    network = digit_features()
    images, _ = digit_arrays("held-out")
    readings = network.read(images[:260])  # more than one batch
    assert readings.features_NF.shape == (260, NUM_FEATURES)
    assert readings.features_NF.dtype == np.float32
    assert np.allclose(readings.probabilities_NK.sum(1), 1, atol=1e-6)
    alone = network.read(images[255:258])
    assert np.allclose(alone.features_NF, readings.features_NF[255:258], atol=1e-5)
    with torch.inference_mode():
        logits = network.head(torch.from_numpy(readings.features_NF))
    assert np.allclose(logits.softmax(1).numpy(), readings.probabilities_NK, atol=1e-5)


def test_a_training_is_a_function_of_its_seed():
    images, labels = digit_arrays("train")
    recipe = ClassifierRecipe(steps=6, batch=32)
    first, again, other = (
        to_safetensors(
            train_classifier(images[:80], labels[:80], num_classes=10, seed=seed, recipe=recipe)
        )
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_training_leaves_the_global_random_stream_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    images = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    recipe = ClassifierRecipe(steps=2, batch=8)
    train_classifier(images, np.zeros(8), num_classes=2, seed=0, recipe=recipe)
    assert torch.equal(torch.rand(3), wanted)


def test_a_short_training_learns_the_labels_it_is_given():
    images, labels = digit_arrays("train")
    recipe = ClassifierRecipe(steps=60, batch=64)
    shifted = train_classifier(
        images[::5], (labels[::5] + 1) % 10, num_classes=10, seed=0, recipe=recipe
    )
    images, labels = digit_arrays("held-out")
    assert accuracy(shifted, images, (labels + 1) % 10) > 0.8
    assert accuracy(shifted, images, labels) < 0.2


def test_too_few_images_are_refused():
    images = np.zeros((99, 32, 32, 1), dtype=np.uint8)
    with pytest.raises(InputError, match="got 99 images to train a classifier on, wanted at least"):
        train_classifier(images, np.zeros(99), num_classes=10, seed=0)
