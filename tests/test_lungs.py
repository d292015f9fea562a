"""The lung finder, and what is cut out by it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cxr import CxrError, film, images, lungs
from cxr.data.patients import split_of, tell_patients
from cxr.data.places import place_of
from cxr.evaluation.heatmaps import iou
from cxr.phantoms.lesions import phantom

R = 128


def overlaps(a, b):
    """The IoU of each pair of masks [N, 1, R, R]."""
    return [iou(x, y) for x, y in zip(a[:, 0].numpy(), b[:, 0].numpy())]


@pytest.fixture(scope="module")
def marked():
    """Phantoms and their lungs, [N, 1, R, R]."""
    drawn = [phantom(number, 3, R).render() for number in range(1, 7)]
    x = torch.stack([torch.from_numpy(d.image) for d in drawn])[:, None].float() / 127.5 - 1
    return x, torch.stack([torch.from_numpy(d.lung) for d in drawn])[:, None]


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_lungs_of_phantoms_are_found_at_any_size(marked, size):
    x, true = marked
    resized = torch.nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
    place = torch.nn.functional.interpolate(true.float(), (size, size)) > 0.5
    assert min(overlaps(lungs.find(resized), place)) > 0.85


def test_exposure_does_not_matter_and_nothing_is_found_in_noise(marked):
    x, _ = marked
    assert min(overlaps(lungs.find(x), lungs.find(0.3 * x + 0.5))) > 0.99
    grey = torch.full((1, 1, R, R), 0.2)
    assert not lungs.find(grey).any()


@pytest.mark.parametrize("pad", [0, 40])
def test_the_square_holds_the_lungs_and_stays_inside(marked, pad):
    for lung in marked[1][:, 0]:
        wide = torch.nn.functional.pad(lung, (pad, 0, 0, 0))
        top, left, side = lungs.box(wide)
        assert 0 <= top <= wide.shape[0] - side and 0 <= left <= wide.shape[1] - side
        inside = wide[top : top + side, left : left + side].sum() / wide.sum()
        assert inside > 0.98 and side < 1.3 * max(b - a for a, b in lungs.extent(wide))


def test_specks_do_not_move_the_square(marked):
    lung = marked[1][0, 0]
    speckled = lung.clone()
    speckled[:3, :3] = True
    before, after = lungs.box(lung), lungs.box(speckled)
    assert max(abs(a - b) for a, b in zip(before, after)) <= 3


def test_blanked_images_hold_nothing_of_the_lungs(marked):
    x, true = marked
    dark = torch.where(true, torch.full_like(x, -1.0), x)
    assert torch.equal(lungs.blanked(x, true), lungs.blanked(dark, true))
    bright = torch.where(lungs.around(true) > 0, x, torch.ones_like(x))
    assert torch.allclose(lungs.alone(x, true), lungs.alone(bright, true), atol=1e-6)
    assert torch.allclose(lungs.alone(x, true)[true], x[true])


def test_an_image_without_lungs_is_left_as_it_is(marked):
    x, _ = marked
    nothing = torch.zeros_like(x, dtype=torch.bool)
    assert torch.equal(lungs.blanked(x, nothing), x)
    assert torch.equal(lungs.alone(x, nothing), x)
    with pytest.raises(CxrError, match="no lungs"):
        lungs.box(nothing[0, 0])


def test_an_image_is_cropped_to_its_lungs_and_its_mask_with_it(marked, tmp_path):
    x, true = marked
    picture = np.uint8((x[0, 0].numpy() + 1) * 127.5)
    wide = np.pad(picture, ((30, 50), (90, 10)))
    film.write_png(tmp_path / "x.png", wide)
    film.write_png(
        tmp_path / "m.png", np.pad(np.uint8(true[0, 0].numpy() * 255), ((30, 50), (90, 10)))
    )
    cropped = images.load(tmp_path / "x.png", 64, "lungs")
    mask = place_of({"x": tmp_path / "m.png"}, tmp_path / "x.png", 64, "lungs")
    found = lungs.find(torch.from_numpy(cropped)[None, None] / 127.5 - 1)
    assert overlaps(found, torch.from_numpy(mask)[None, None])[0] > 0.8
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    assert max(np.ptp(rows), np.ptp(columns)) > 0.75 * 64


def test_a_picture_without_lungs_is_refused(tmp_path):
    film.write_png(tmp_path / "x.png", np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
    with pytest.raises(CxrError, match="x.png: no lungs"):
        images.load(tmp_path / "x.png", 32, "lungs")


@pytest.mark.skipif("CXRGAN_DATA" not in os.environ, reason="CXRGAN_DATA names no folder")
def test_real_lungs_are_found_in_patients_it_was_not_trained_on():
    folder = Path(os.environ["CXRGAN_DATA"]) / "lung-masks"
    files, scores = sorted((folder / "images").iterdir()), []
    names = [path.name for path in files]
    for path, told in zip(files, tell_patients(names, names)):
        if split_of(told.patient) == "test":
            x = torch.from_numpy(images.load(path, R, "pad"))[None, None] / 127.5 - 1
            mask = place_of({path.stem: folder / "masks" / path.name}, path, R, "pad")
            scores += overlaps(lungs.find(x), torch.from_numpy(mask)[None, None])
    assert len(scores) == 42 and np.mean(scores) >= 0.9
