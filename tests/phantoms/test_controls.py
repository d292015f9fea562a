"""The controls of the phantom protocol."""

import numpy as np
import pytest
import torch

from cxr import datasets
from cxr.checkpoints import Model
from cxr.networks import PRESETS, Classifier
from cxr.phantoms import controls


def test_relabelled_images_stay_in_their_splits(arm, tmp_path):
    data = arm.dataset()
    flipped = controls.relabelled(data, 1 - data.labels, tmp_path / "flipped.csv")
    again = datasets.open_dataset(flipped, 32)
    assert again.patients == data.patients and (again.splits == data.splits).all()
    np.testing.assert_array_equal(again.labels, 1 - data.labels)
    np.testing.assert_array_equal(again.images, data.images)


def test_a_standardised_cnn_has_the_spread_of_the_real_one(arm):
    model = untrained_model()
    images = arm.dataset().images
    wanted = np.random.default_rng(0).normal(-1, 4, 500)
    controls.standardise(model, arm.logits(model, images), wanted)
    logits = arm.logits(model, images)
    assert np.median(logits) == pytest.approx(0, abs=0.05)
    assert logits.std() == pytest.approx(wanted.std(), rel=0.01)


def untrained_model():
    torch.manual_seed(0)
    network = Classifier(PRESETS["tiny"].classifier).eval().requires_grad_(False)
    network.temperature.fill_(1.7)
    return Model({"classifier": network}, {})
