"""The judging of single images."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cxr import datasets
from cxr.checkpoints import Model
from cxr.evaluation import cases


def test_change_outside_the_lungs_is_a_share_of_the_change(judged):
    own, row, e = judged
    end = e.frames[e.numbers["counterfactual"]["frame"]][0]
    change = (e.reconstructions[0, 0] - end).abs()
    inside = change[8:20, 8:20].sum() / change.sum()
    found = own.counterfactual(e, row)["counterfactual", "outside_lung"]
    assert found == pytest.approx(1 - inside.item(), rel=1e-4)
    area = own.counterfactual(e, row)["counterfactual", "outside_area"]
    assert area == pytest.approx(1 - 12**2 / 32**2)


def test_what_surrounds_the_lungs_is_compared_outside_their_mask(judged):
    own, row, e = judged
    ends = e.frames.clone()
    ends[0], ends[-1] = e.image, e.image
    ends[-1, 0, 13:15, 13:15] += 0.5  # deep in the lungs
    changed = dataclasses.replace(e, frames=ends)
    same = own.disentanglement(changed, row)
    assert same["disentanglement", "outside_lung_ssim"] == pytest.approx(1, abs=1e-3)
    ends[-1, 0, :6] += 0.5
    moved = own.disentanglement(changed, row)
    assert moved["disentanglement", "outside_lung_ssim"] < 0.99


def test_the_oracle_says_itself_whether_an_inverted_lung_is_healthy(judged):
    own, row, e = judged
    for oracle, verdict in ((torch.ones, 0), (lambda n: -torch.ones(n), 1)):
        asked = dataclasses.replace(own, oracle=lambda x, oracle=oracle: oracle(len(x)))
        found = asked.disentanglement(e, row)
        assert found["disentanglement", "oracle_inverted_healthy"] == verdict
    healthy = int(own.data.rows("test")[0])
    assert not any("inverted" in name for _, name in own.disentanglement(e, healthy))


def test_path_figures_of_a_path_that_is_known(judged):
    _, _, e = judged
    logits = torch.linspace(-2, 2, len(e.doses))
    logits[[3, 4]] = logits[[4, 3]]
    known = dataclasses.replace(e, logits=logits)
    found = cases.path(known)["path", "spearman"]
    n = len(logits)
    assert found == pytest.approx(1 - 6 * 2 / (n * (n**2 - 1)))


def test_swapped_codes_are_scored_only_where_the_classes_differ(judged, xrays):
    own, _, e = judged
    (dark,) = own.explain([int(own.data.rows("test")[0])])
    assert all(np.isnan(own.swap([e, e])))
    dose = {"classifier": lambda x: x.mean((1, 2, 3)), "generator": Disease()}
    model = Model({**own.model.networks, **dose}, own.model.info, own.model.buffers)
    e, dark = (
        dataclasses.replace(
            found,
            inversion=dataclasses.replace(
                found.inversion, codes=dataclasses.replace(found.codes, z2=z2)
            ),
        )
        for found, z2 in ((e, torch.full((1, 16), 0.5)), (dark, torch.full((1, 16), -0.5)))
    )
    assert dataclasses.replace(own, model=model).swap([e, dark]) == [1, 1]


class Disease(torch.nn.Module):
    """A generator whose picture is its `z2` alone."""

    const = torch.zeros(1)

    def forward(self, w1, z2, noise, detail=None):
        return z2.mean(1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_realism_of_mid_frames_is_less_where_the_discriminator_says_so(judged):
    own, _, e = judged

    class Middle(torch.nn.Module):
        def forward(self, x, dose):
            return -((dose >= 0.25) & (dose <= 0.75)).float()

    networks = {**own.model.networks, "discriminator": Middle()}
    critic = Model(networks, own.model.info, own.model.buffers)
    assert dataclasses.replace(own, model=critic).realism_mid([e, e]) == [-1, -1]


def test_a_reconstruction_is_rejected_for_its_gap_or_the_encoders_ssim(judged):
    own, _, e = judged
    n = e.numbers["reconstruction"]

    def rejected(limit, **changes):
        info = own.model.info | {"thresholds": {"ssim": limit}}
        strict = Model(own.model.networks, info, own.model.buffers)
        found = dataclasses.replace(e, numbers=e.numbers | {"reconstruction": n | changes})
        figures = dataclasses.replace(own, model=strict).reconstruction(found)
        return figures["reconstruction", "rejected"]

    assert rejected(-1, probability_gap=0.09) == 0
    assert rejected(-1, probability_gap=0.11) == 1
    assert rejected(0.5, probability_gap=0.0, ssim_encoder=0.4) == 1


def test_deletion_turns_an_image_into_the_nearest_that_is_called_healthy(judged):
    own, _, e = judged
    assert len(own.healthy) and (own.model.classifier(own.healthy) < 0).all()
    distances = (own.healthy - e.image).abs().square().flatten(1).mean(1)
    assert torch.equal(own.nearest_healthy(e.image)[0], own.healthy[distances.argmin()])
    none = dataclasses.replace(own, data=dataclasses.replace(own.data, labels=own.data.labels + 1))
    assert none.nearest_healthy(e.image) is None


def test_class_difference_is_the_difference_of_the_training_means(xrays):
    data = datasets.open_dataset(xrays, 32)
    healthy, diseased = (data.images[rows].mean(0) / 127.5 for rows in data.by_class("train"))
    np.testing.assert_allclose(cases.class_difference(data), diseased - healthy, atol=1e-5)
    none = dataclasses.replace(data, splits=np.full(len(data), "test"))
    assert cases.class_difference(none) is None


def test_an_empty_map_does_not_move():
    some, none = torch.ones(4, 4), torch.zeros(4, 4)
    assert cases.apart(2 * some, some) == 1 and np.isnan(cases.apart(some, none))


def test_a_typical_distance_is_of_different_patients(xrays, bright):
    data = datasets.open_dataset(xrays, 32)
    means = lambda x: x.flatten(1)[:, :4]
    oracle = SimpleNamespace(features=means)
    for n in (20, 21):
        some = dataclasses.replace(
            data, images=data.images[:n], labels=data.labels[:n], patients=data.patients[:n]
        )
        assert cases.typical_distance(oracle, some, torch.device("cpu")) > 0


def test_without_a_mask_the_lungs_are_found(judged, monkeypatch):
    own, row, e = judged
    bare = dataclasses.replace(own, lungs={})
    half = torch.arange(32).expand(1, 1, 32, 32) < 16
    e = dataclasses.replace(e, lung=half)
    monkeypatch.setattr(cases.lungs, "find", lambda x: half.expand_as(x))
    assert np.array_equal(bare.lung(e, row), half[0, 0].numpy())
    assert bare.disentanglement(e, row)["disentanglement", "lung_overlap"] == 1
    e = dataclasses.replace(e, lung=torch.zeros_like(half))
    assert bare.lung(e, row) is None
    assert "outside_lung" not in {name for _, name in bare.counterfactual(e, row)}
