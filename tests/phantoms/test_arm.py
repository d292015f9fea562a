"""An arm of the phantom protocol: its figures on known input."""

import numpy as np
import pytest
import torch

from cxr import explain
from cxr.phantoms import arm as arms
from cxr.phantoms.arm import Arm, Plan


def test_the_sign_that_lowers_the_logit_most_is_relied_on():
    rows = [
        {"reliance/lesion/drop": 1.0},
        {"reliance/lesion/drop": 0.0, "reliance/marker/drop": 0.8},
    ]
    assert arms.relied_on(rows) == "marker"
    assert arms.relied_on(rows[:1]) == "lesion"


def test_marker_share_is_chance_for_a_flat_map_and_one_for_the_marker():
    place = np.zeros((32, 32), bool)
    place[2:4, 5:9] = True
    maps = {"flat": -torch.ones(32, 32), "marker": torch.from_numpy(place).float()}
    row = arms.marker_share(maps, place)
    assert row["marker/flat/mass"] == pytest.approx(8 / 1024)
    assert row["marker/flat/mass"] == pytest.approx(row["marker/chance/mass"])
    assert row["marker/flat/mass_near"] == pytest.approx(24 / 1024)
    assert row["marker/marker/mass"] == row["marker/marker/mass_near"] == 1


def test_an_unfinished_folder_of_phantoms_is_made_anew(tmp_path):
    arm = Arm(tmp_path, Plan(phantoms=4), seed=0)
    (tmp_path / "phantoms.tmp").mkdir()
    (tmp_path / "phantoms.tmp" / "truth.csv").write_text("cut sh")
    arm.make()
    assert len(arm.samples()) == 4 and not (tmp_path / "phantoms.tmp").exists()


def test_a_swap_keeps_the_detail_which_is_of_the_structure(model, monkeypatch):
    mine, theirs = (
        explain.explain(image, model, refine=0)
        for image in np.random.default_rng(0).integers(0, 255, (2, 32, 32), np.uint8)
    )
    monkeypatch.setattr(arms.probe, "truth", lambda *_: {})

    class Reader:
        def columns(self, name, x):
            return {name: x}

    def mixed():
        known = [(None, 0.0)] * 2
        return next(arms.swapped(model, Reader(), [mine, theirs], known))["mixed"]

    without = mixed()
    mine.codes.detail += 1
    assert not torch.equal(mixed(), without)
