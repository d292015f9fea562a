"""Each score of a heat map against a case whose answer is known."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr import metrics
from cxr.evaluation import heatmaps
from cxr.networks import PRESETS, Classifier


@pytest.fixture
def planted():
    """A place and a map that is brightest in it."""
    place = np.zeros((16, 16), bool)
    place[4:8, 4:8] = True
    return place, place + np.random.default_rng(0).random((16, 16)) * 0.5


def test_a_map_of_the_place_scores_one_everywhere(planted):
    place, heat = planted
    found = heatmaps.localisation(heat, place)
    inside = heat[place].sum() / heat.sum()
    assert found == {"ap": 1, "auroc": 1, "pointing": 1, "mass": inside, "iou_otsu": 1}
    worst = heatmaps.localisation(-heat + heat.max(), place)
    assert worst["auroc"] == worst["pointing"] == 0 and worst["ap"] < 0.06


def test_average_precision_by_hand_and_a_flat_maps_is_chance():
    place = np.array([[True, False], [True, False]])
    assert heatmaps.average_precision(np.array([[4, 3], [2, 1]]), place) == pytest.approx(5 / 6)
    assert heatmaps.average_precision(np.array([[4, 2], [2, 1]]), place) == pytest.approx(5 / 6)
    assert heatmaps.average_precision(np.ones((2, 2)), place) == 0.5


def test_scikit_learn_finds_the_same_average_precision_and_auroc():
    random = np.random.default_rng(0)
    place = random.random((16, 16)) < 0.2
    heat = np.round(random.random((16, 16)) + place, 1)  # with ties
    scores = heatmaps.localisation(heat, place)
    flat = place.ravel(), heat.ravel()
    assert scores["ap"] == pytest.approx(average_precision_score(*flat))
    assert scores["auroc"] == pytest.approx(roc_auc_score(*flat))


def test_pointing_counts_the_share_of_tied_maxima():
    place = np.array([[True, False], [False, False]])
    assert heatmaps.pointing(np.array([[2, 2], [1, 0]]), place) == 0.5


def test_otsu_parts_two_levels_and_finds_nothing_in_a_flat_map(planted):
    place, _ = planted
    noise = np.random.default_rng(0).normal(0, 0.1, place.shape)
    assert 0.2 < heatmaps.otsu(place + noise) < 0.8
    flat = np.ones((16, 16))
    assert heatmaps.iou(flat > heatmaps.otsu(flat), place) == 0


def test_iou_by_hand_and_along_thresholds(planted):
    place, _ = planted
    assert heatmaps.iou(np.roll(place, 2, 0), place) == pytest.approx(8 / 24)
    wider = 0.4 * np.roll(place, 2, 0) + place  # 16 pixels of the place, 8 beside it
    curve = heatmaps.iou_curve(wider, place)
    assert curve[0] == pytest.approx(16 / 24) and curve[9] == 1
    assert not heatmaps.iou_curve(np.zeros((16, 16)), place).any()


class Corner(torch.nn.Module):
    """Asks only how bright the upper left corner is."""

    def forward(self, x):
        return 8 * x[:, 0, :4, :4].mean((1, 2))


def test_the_true_map_deletes_sooner_and_inserts_sooner_than_chance():
    x, baseline = torch.ones(1, 1, 16, 16), -torch.ones(1, 1, 16, 16)
    true = torch.zeros(16, 16)
    true[:4, :4] = 1
    low, high = heatmaps.deletion_insertion(Corner(), x, true, baseline)
    chance = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    deletion, insertion = heatmaps.deletion_insertion(Corner(), x, chance, baseline)
    assert low < 0.1 and high > 0.9
    assert deletion > 0.3 and insertion < 0.7
    flat = heatmaps.deletion_insertion(Corner(), x, torch.zeros(16, 16), baseline)
    assert flat[0] > 0.3  # ties are no order


def test_areas_of_a_classifier_that_never_changes_are_its_probability():
    def never(x):
        return torch.zeros(len(x))

    x = torch.ones(1, 1, 8, 8)
    assert heatmaps.deletion_insertion(never, x, torch.rand(8, 8), -x) == pytest.approx((0.5, 0.5))


def test_the_cascade_begins_at_the_logit_and_ends_with_every_layer():
    torch.manual_seed(0)
    network = Classifier(PRESETS["tiny"].classifier).requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    changed = []
    for stage in range(1, heatmaps.STAGES + 1):
        after = heatmaps.randomised(network, stage).state_dict()
        changed.append({key for key in before if not torch.equal(before[key], after[key])})
        for key in before:
            same = torch.equal(before[key].flatten().sort()[0], after[key].flatten().sort()[0])
            assert same, key  # shuffled
    assert changed[0] == {"head.weight"}  # its bias is one number
    assert all(a < b for a, b in pairwise(changed))
    layers = {key for key in before if key.startswith("trunk") and before[key].unique().numel() > 1}
    assert changed[-1] == layers | {"head.weight"}
    assert all(torch.equal(before[key], network.state_dict()[key]) for key in before)


def test_trivial_maps_are_what_they_are_called():
    x = torch.full((1, 1, 32, 32), -1.0)
    x[..., 16:] = 1
    maps = heatmaps.trivial_maps(x, 7)
    assert maps["centre"].argmax() // 32 in (15, 16) and maps["centre"][0, 0] < 0.01
    assert maps["edges"][:, 15:17].min() > 0 and maps["edges"][:, :15].max() == 0
    assert torch.equal(maps["random"], heatmaps.trivial_maps(-x, 7)["random"])
    assert not torch.equal(maps["random"], heatmaps.trivial_maps(x, 8)["random"])


@pytest.mark.parametrize("size", [32, 64, 128])
def test_ssim_looks_only_where_it_is_asked_to(size):
    x = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(0)) - 0.5
    y = x.clone()
    y[..., 8:20, 14:18] += 0.8
    far = torch.ones(size, size, dtype=torch.bool)
    far[8 - 5 : 20 + 5, 14 - 5 : 18 + 5] = False  # windows of 11 pixels see none of the change
    assert heatmaps.ssim_where(x, y, far) == pytest.approx(1)
    assert heatmaps.ssim_where(x, y, ~far) < 0.9
    assert np.isnan(heatmaps.ssim_where(x, y, far & ~far))


def test_ssim_of_all_windows_is_ssim():
    x, y = torch.rand(2, 1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    everywhere = torch.ones(32, 32, dtype=torch.bool)
    assert heatmaps.ssim_where(x, y, everywhere) == pytest.approx(
        metrics.ssim(x, y).item(), abs=1e-5
    )


def test_a_counterfactual_transition_is_one_if_the_first_pixels_decide():
    x, y = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    y[..., 0, :4] = 1  # one share of the pixels
    y[..., 5, 5] = 0.1

    def at_once(images):
        return 1000 * (images[:, 0, 0, :4].sum(1) - 0.5)

    def late(images):
        return 1000 * (images[:, 0, 5, 5] - 0.05)

    assert heatmaps.cout(at_once, x, y, diseased=False) == pytest.approx(1 - 1 / 16)
    assert heatmaps.cout(late, x, y, diseased=False) == pytest.approx(1 - 3 / 16)
    assert heatmaps.cout(at_once, y, x, diseased=True) == pytest.approx(1 - 1 / 16)
    assert heatmaps.cout(at_once, x, x, diseased=False) == pytest.approx(-1)  # nothing turns
