import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cxr import classifier


@pytest.fixture
def x():
    return torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_greys_are_rounded_and_clipped_and_come_back():
    assert classifier.to_uint8(torch.tensor([-2.0, -1, 0, 1, 2])).tolist() == [0, 0, 128, 255, 255]
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    assert (classifier.to_uint8(classifier.to_tensor(levels))[:, 0] == levels).all()


def test_gamma_raises_greys_to_the_power_0_7(x):
    expected = ((x + 1) / 2).clamp_min(1e-4) ** 0.7 * 2 - 1
    torch.testing.assert_close(classifier.perturb(x, "gamma"), expected, atol=1e-5, rtol=0)


def test_blur_is_a_binomial_mean_of_five_pixels(x):
    taps = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = (taps[:, None] * taps)[None, None]
    inside = F.conv2d(x, kernel)
    torch.testing.assert_close(classifier.perturb(x, "blur")[..., 2:-2, 2:-2], inside)


def test_a_crop_enlarges_the_middle_nine_tenths():
    ramp = torch.linspace(-0.9, 0.9, 32).expand(1, 1, 32, 32)
    torch.testing.assert_close(classifier.perturb(ramp, "crop"), 0.9 * ramp, atol=1e-5, rtol=0)


def test_noise_has_a_standard_deviation_of_a_twentieth_of_the_range(x):
    noise = classifier.perturb(x, "noise") - x
    torch.testing.assert_close(noise[0], noise[1], atol=1e-6, rtol=0)  # the same for every image
    assert noise.std().item() == pytest.approx(0.1, rel=0.1)  # 1,024 draws: 2.2% is one sigma
    assert noise.mean().item() == pytest.approx(0, abs=0.015)


@pytest.mark.parametrize("change", classifier.PERTURBATIONS)
def test_a_perturbation_is_the_same_every_time(x, change):
    assert torch.equal(classifier.perturb(x, change), classifier.perturb(x, change))


def test_likeness_falls_for_an_inverted_or_overturned_image():
    ramp = torch.linspace(-1, 1, 32).view(1, 1, 32, 1).expand(1, 1, 32, 32)
    assert classifier.likeness(ramp, ramp).item() == pytest.approx(1)
    assert classifier.likeness(-ramp, ramp).item() == pytest.approx(-1)
    assert classifier.likeness(ramp.flip(2), ramp).item() == pytest.approx(-1)


@pytest.mark.parametrize(
    ("low", "sensitivity", "specificity", "words"),
    [
        (0.6, 0.5, 0.5, None),
        (0.5, 0.5, 0.5, "interval reaches 0.5"),
        (None, 0.5, 0.5, "interval reaches 0.5"),
        (float("nan"), 0.5, 0.5, "interval reaches 0.5"),
        (0.6, 0.0, 0.5, "sensitivity is 0"),
        (0.6, 0.5, 0.0, "specificity is 0"),
    ],
)
def test_a_classifier_that_tells_nothing_is_called_useless(low, sensitivity, specificity, words):
    numbers = {"auroc": {"value": 0.7, "low": low}}
    numbers |= {"sensitivity": {"value": sensitivity}, "specificity": {"value": specificity}}
    why = classifier.useless(numbers)
    assert why is None if words is None else words in why
