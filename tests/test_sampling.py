import numpy as np
import pytest
import torch

from cxr import sampling


def test_a_walk_keeps_the_structure_and_starts_without_disease(model):
    w1, u, noise = sampling.draw_codes(model.generator, 3, seed=0)
    a = sampling.walk(model.generator, w1, u, noise)
    b = sampling.walk(model.generator, w1, -u, noise)
    assert a.shape == (3, 5, 1, 32, 32)
    torch.testing.assert_close(a[:, 0], b[:, 0])
    assert (a[:, 1:] - b[:, 1:]).abs().amax((1, 2, 3, 4)).min() > 1e-3
    torch.testing.assert_close(u.norm(dim=1), torch.ones(3))


def test_codes_are_the_same_for_a_seed_and_others_for_another(model):
    a, b, c = (sampling.draw_codes(model.generator, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[2][-1], b[2][-1])
    assert not torch.equal(a[0], c[0])


def test_fakes_are_counted_as_the_classifier_calls_them(model, monkeypatch):
    """A classifier that answers by the dose it is shown, through the frames' order."""
    answers = iter([-5.0, -1.0, 1.0, 2.0, 3.0])
    networks = {**model.networks, "classifier": lambda x: torch.full((len(x),), next(answers))}
    monkeypatch.setattr(model, "networks", networks)
    row = sampling.measure_fakes(model, n=4)
    assert row["healthy_at_zero"] == row["diseased_at_full"] == row["rising"] == 1
    # named are -3, -1.5, 0, 1.5, 3: the gaps are 2, 0.5, 1, 0.5, 0
    assert row["logit_gap"] == pytest.approx(0.5)
    assert row["spread"] > 0


def test_inversions_are_measured_on_diseased_images_set_to_healthy(model):
    x, labels = torch.rand(6, 1, 32, 32) * 2 - 1, torch.tensor([0, 1] * 3)
    row = sampling.measure_inversions(model, x, labels)
    w1, z2 = model.encoder(x[labels == 1])
    noise = [eps[labels == 1] for eps in model.generator.noise(6, sampling.rng(1))]
    healthy = model.generator(w1, torch.zeros_like(z2), noise).clamp(-1, 1)
    expected = (model.classifier(healthy) < 0).float().mean().item()
    assert row["inverted_healthy"] == pytest.approx(expected)
    assert row["ssim_low"] <= row["ssim"] < 1 and 0 <= row["probability_gap"] <= 1


def test_a_sheet_shows_doses_and_inversions_side_by_side(model):
    sheet = sampling.sheet(model, torch.zeros(4, 1, 32, 32))
    assert sheet.dtype == np.uint8 and sheet.shape == (4 * 130 - 2 + 24, 8 * 130 - 2, 3)
    words = (sheet[:24] > 200).any((0, 2))
    assert all(words[column * 130 : column * 130 + 128].any() for column in range(8))
