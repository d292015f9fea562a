"""The synthetic chest has the anatomy of a chest, and the film shows every parameter of it."""

from dataclasses import fields, replace

import numpy as np
import pytest

from cxr.phantoms import thorax
from cxr.phantoms.lesions import phantom, render
from cxr.phantoms.thorax import Structure


def test_every_structure_parameter_shows():
    middle = {f.name: f.type(np.mean(f.metadata["range"])) for f in fields(Structure)}
    for f in fields(Structure):
        low, high = (
            render(Structure(**{**middle, f.name: f.type(end)}), (), 64, marker=True).image
            for end in f.metadata["range"]
        )
        assert np.abs(low.astype(int) - high).max() >= 5, f.name


def test_lungs_are_two_and_darker_than_what_is_between_them():
    for index in range(1, 12, 2):
        shown = phantom(index, 1, 64).render()
        assert 0.12 < shown.lung.mean() < 0.5
        assert shown.lung[:, :32].any() and shown.lung[:, 32:].any()
        between = [slice(*np.flatnonzero(row)[[0, -1]]) for row in shown.lung if row.any()]
        rows = np.flatnonzero(shown.lung.any(axis=1))
        inner = np.concatenate(
            [shown.image[r, c][~shown.lung[r, c]] for r, c in zip(rows, between)]
        )
        assert shown.image[shown.lung].mean() < 0.75 * inner.mean()


def test_heart_is_on_the_right_of_the_image_and_right_diaphragm_is_higher():
    middle = Structure(**{f.name: f.type(np.mean(f.metadata["range"])) for f in fields(Structure)})
    middle = replace(middle, tilt=0.0, shift_x=0.0, spine_bend=0.0)
    lung = render(middle, (), 128).lung
    left_half, right_half = lung[:, :64], lung[:, 64:]
    assert left_half.sum() > 1.1 * right_half.sum()
    assert np.flatnonzero(left_half.any(axis=1))[-1] < np.flatnonzero(right_half.any(axis=1))[-1]


def test_anatomy_does_not_depend_on_what_was_drawn_before():
    chest, other = (phantom(index, 3, 32).structure for index in (1, 3))
    first = thorax.anatomy_of(chest, 64)
    thorax.anatomy_of(other, 64)
    for one, again in zip(first, thorax.anatomy_of(chest, 64)):
        np.testing.assert_array_equal(one, again)


def test_film_brightens_with_attenuation_and_keeps_its_mean_at_any_size():
    chest = replace(phantom(1, 3, 32).structure, grain=0.0)
    ramp = np.tile(np.linspace(-0.5, 3, 256, dtype=np.float32), (256, 1))
    flat = thorax.film(replace(chest, vignette=0.0, heel=0.0), ramp, 64)
    assert (np.diff(flat.astype(int), axis=1) >= 0).all() and np.ptp(flat) > 100
    large, small = (thorax.film(chest, ramp, size).mean() for size in (128, 32))
    assert large == pytest.approx(small, abs=0.5)
