import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from cxr import losses


def test_image_loss_is_what_ssim_lacks_and_the_difference_at_three_scales():
    random = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 1, 32, 32, generator=random) * 2 - 1
    unit = [((t + 1) / 2)[0, 0].double().numpy() for t in (x, y)]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = 1 - structural_similarity(*unit, data_range=1, **options)
    difference = (x - y)[0, 0].double().numpy()
    for side in (1, 2, 4):
        blocks = difference.reshape(32 // side, side, 32 // side, side).mean((1, 3))
        expected += np.abs(blocks).mean()
    assert losses.image(x, y).item() == pytest.approx(expected, abs=1e-4)
    assert losses.image(x, x).item() == pytest.approx(0, abs=1e-5)


def test_proximity_is_the_mean_change_from_the_first_half_to_the_second():
    healthy = torch.zeros(2, 1, 8, 8)
    diseased = torch.full((2, 1, 8, 8), 0.25)
    assert losses.proximity(torch.cat([healthy, diseased])).item() == pytest.approx(0.25)


def test_latent_loss_counts_structure_disease_and_consistency():
    w1, z2 = torch.zeros(1, 2, 3), torch.zeros(2, 4)
    w1_read = torch.stack([torch.full((2, 3), 1.0), torch.full((2, 3), 3.0)])
    z2_read = torch.full((2, 4), 0.5)
    structure, disease, consistency = (1 + 9) / 2, 4 * 0.25, (3 - 1) ** 2
    expected = structure + disease + consistency
    assert losses.latent(w1_read, z2_read, w1, z2).item() == pytest.approx(expected)
