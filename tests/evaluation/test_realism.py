"""Distances of random lungs from real ones, and what classifiers say of them."""

import numpy as np
import pytest
import torch

from cxr import datasets
from cxr.evaluation import realism


def test_fid_of_gaussians_is_the_closed_form():
    x, y = torch.randn(2, 60_000, 3, generator=torch.Generator().manual_seed(0)).double()
    mixing = torch.tensor([[2.0, 0, 0], [0.5, 1, 0], [0, 0, 3]]).double()
    covariance = mixing @ mixing.T  # of y; that of x is the identity
    root = torch.linalg.eigvalsh(covariance).sqrt().sum()
    known = 1 + 4 + 3 + covariance.trace() - 2 * root
    found = realism.fid(x, y @ mixing.T + torch.tensor([1.0, 0, 2]))
    assert found == pytest.approx(known.item(), rel=0.02)
    assert realism.fid(x, x) == pytest.approx(0, abs=1e-6)


def test_fid_survives_fewer_images_than_features():
    x, y = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    assert np.isfinite(realism.fid(x, y)) and realism.fid(x, y) > 0


def test_kid_is_unbiased():
    random = torch.Generator().manual_seed(0)
    same = [realism.kid(*torch.randn(2, 50, 4, generator=random)) for _ in range(200)]
    error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same)) < 3 * error and min(same) < 0 < max(same)
    moved = realism.kid(*(torch.randn(2, 50, 4, generator=random) + torch.tensor([[[0.0]], [[1]]])))
    assert moved > 10 * np.std(same)


def test_kid_of_two_points_each_is_computed_by_hand():
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    assert realism.kid(x, y) == pytest.approx(27 + 1 - 2 * (1 + 8 + 1 + 27) / 4)


def test_fakes_like_reals_lie_at_the_floor_and_others_above_it():
    random = torch.Generator().manual_seed(0)
    reals, fakes = torch.randn(2, 120, 4, generator=random)
    patients, labels = np.arange(120) // 2, np.arange(120) // 60
    same, floor, ratio = realism.against_reals(realism.fid, fakes, reals, patients, labels)
    assert floor["low"] < same["value"] < floor["high"] and same["n"] == floor["n"] == 60
    assert ratio["low"] < 1 < ratio["high"]
    other, again, ratio = realism.against_reals(realism.fid, fakes + 1, reals, patients, labels)
    assert again == floor and other["low"] > floor["high"]
    assert 1 < ratio["low"] < ratio["value"] < ratio["high"]


def test_distances_take_a_bounded_number_of_images_at_once(monkeypatch):
    monkeypatch.setattr(realism, "SUBSET", 10)
    sizes = set()
    x = torch.randn(60, 3)
    labels = np.zeros(60)
    found = realism.against_reals(
        lambda a, b: sizes.add((len(a), len(b))) or 0, x, x, range(60), labels
    )
    assert sizes == {(10, 10)} and [figure["n"] for figure in found] == [10] * 3


def test_the_ratio_is_that_of_the_mean_distances():
    distances = iter(range(1, 201))
    x = torch.randn(8, 3)
    fakes, reals, ratio = realism.against_reals(
        lambda a, b: next(distances), x, x, range(8), np.zeros(8)
    )
    assert (fakes["value"], reals["value"]) == (100, 101)
    assert ratio["value"] == pytest.approx(100 / 101)
    ends = np.percentile(np.arange(1, 201, 2) / 101, (2.5, 97.5))
    assert [ratio["low"], ratio["high"]] == pytest.approx(ends)


def test_halves_hold_different_patients_as_many_of_each_class_and_fakes_of_the_floors_doses():
    patients = np.array([0, 0, 0, 1, 2, 3, 4, 4, 5, 6])
    labels = np.array([0, 0, 1, 0, 0, 0, 1, 1, 1, 1])
    for seed in range(20):
        a, b = realism.halves(patients, labels, np.random.default_rng(seed))
        assert not set(patients[a]) & set(patients[b])
        assert sorted(labels[a]) == sorted(labels[b])
        assert 0 < labels[a].sum() < len(a)
    rows = torch.arange(10.0)[:, None]
    told = []
    realism.against_reals(lambda x, _: told.append(x) or 0, rows, rows, patients, labels)
    assert all(torch.equal(fakes, floor) for fakes, floor in zip(told[::2], told[1::2]))


def test_the_floor_never_compares_a_patient_with_himself():
    reals = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([reals, reals])

    def shared(a, b):
        return float((a[:, None] == b).all(-1).any())

    patients = np.tile(np.arange(6), 2)
    _, floor, _ = realism.against_reals(shared, twice, twice, patients, np.zeros(12))
    assert floor["value"] == 0
    _, floor, _ = realism.against_reals(shared, twice, twice, np.arange(12), np.zeros(12))
    assert floor["value"] > 0


def test_random_lungs_are_called_by_the_oracle_itself(bright):
    def sick(x):
        return torch.ones(len(x))

    found = realism.random_lungs(bright, 0, sick)
    assert found["oracle_healthy_at_zero"]["value"] == 0
    assert found["oracle_diseased_at_full"]["value"] == 1
    assert found.items() > realism.random_lungs(bright, 0).items()


def test_features_of_another_kind_are_not_compared(xrays):
    data, cpu = datasets.open_dataset(xrays, 32), torch.device("cpu")
    for features in (torch.nn.Conv2d(3, 8, 1), torch.nn.Identity()):
        other = torch.nn.Module()
        other.features = features
        assert not realism.pools(other, data, cpu)
    assert not realism.pools(None, data, cpu)


def test_the_limit_draws_rows_of_both_classes(xrays):
    data = datasets.open_dataset(xrays, 32)
    rows = realism.drawn_rows(data, "all", 20, 0)
    assert len(set(rows)) == 20 and 4 <= data.labels[rows].sum() <= 16
    assert set(realism.drawn_rows(data, "test", None, 0)) == set(data.rows("test"))
