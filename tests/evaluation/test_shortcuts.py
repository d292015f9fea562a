"""Whether a classifier looks at the lungs, and how it does by source."""

import dataclasses

import numpy as np
import pytest
import torch

from cxr import datasets, lungs
from cxr.evaluation.shortcuts import FEW, shortcuts

CPU = torch.device("cpu")


@pytest.fixture
def data(xrays, monkeypatch):
    """64 images of 16 x 16 pixels: the diseased ones are bright in the lungs, and, of source B, have
    a marker in the corner."""
    monkeypatch.setattr(lungs, "find", middle)
    pictures = np.full((64, 16, 16), 100, np.uint8)
    pictures += np.random.default_rng(0).integers(0, 9, pictures.shape, dtype=np.uint8)
    labels = np.arange(64) % 2
    sources = tuple("A" if row < 32 else "B" for row in range(64))
    pictures[labels == 1, 5:11, 5:11] += 60
    pictures[np.flatnonzero(labels & (np.arange(64) >= 32)), :2, :2] = 255
    names = tuple(str(row) for row in range(64))
    whole = datasets.open_dataset(xrays, 32)
    return dataclasses.replace(
        whole,
        images=pictures,
        labels=labels,
        patients=names,
        paths=names,
        splits=np.full(64, "test"),
        sources=sources,
        scanners=(),
    )


def middle(x):
    marked = torch.zeros_like(x, dtype=torch.bool)
    marked[..., 5:11, 5:11] = True
    return marked


def at_lungs(x):
    return x[..., 5:11, 5:11].mean((1, 2, 3)) - x[..., 14:, 5:11].mean((1, 2, 3)) - 0.2


def at_corner(x):
    return x[..., :2, :2].mean((1, 2, 3)) - 0.5


def values(part):
    return {name: figure["value"] for name, figure in part.items()}


def test_a_classifier_of_lungs_fails_without_them_and_not_on_them_alone(data):
    found = values(shortcuts(at_lungs, data, "test", CPU)["shortcut"])
    assert found["auroc_lungs_alone"] == 1 and found["auroc_without_lungs"] < 0.75


def test_a_classifier_of_a_marker_is_found_out_by_its_source(data):
    parts = shortcuts(at_corner, data, "test", CPU)
    assert values(parts["shortcut"])["auroc_lungs_alone"] < 0.75
    a, b = (values(parts["source"][name]) for name in "AB")
    assert b["auroc"] == b["auroc_without_lungs"] == 1 and b["sensitivity"] == 1
    assert a["auroc"] < 0.75 and a["sensitivity"] == 0 and a["specificity"] == 1
    assert "scanner" not in parts


def test_small_sources_are_put_together_and_one_class_has_no_auroc(data):
    sources = tuple("A" if row % 2 else f"B{row}" for row in range(64))
    parts = shortcuts(at_lungs, dataclasses.replace(data, sources=sources), "test", CPU)
    assert FEW < 32 and set(parts["source"]) == {"A", "others (32)"}
    assert set(parts["source"]["A"]) == {"sensitivity"}
    assert set(parts["source"]["others (32)"]) == {"specificity"}
    for alone in (("A",) * 64, ("A",) * 40 + (None,) * 24):
        one = dataclasses.replace(data, sources=alone)
        assert "source" not in shortcuts(at_lungs, one, "test", CPU)
    some = dataclasses.replace(data, sources=("A",) * 24 + ("B",) * 24 + (None,) * 16)
    parts = shortcuts(at_lungs, some, "test", CPU)
    assert set(parts["source"]) == {"A", "B", "not named"}
