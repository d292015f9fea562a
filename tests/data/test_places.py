"""Where disease and lungs are: masks and boxes, brought to where their images are."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cxr import CxrError, UsageError, datasets, film
from cxr.data import places


@pytest.fixture
def data(xrays):
    return datasets.open_dataset(xrays, 32)


@pytest.fixture
def wide(tmp_path):
    """An X-ray of 200 x 400 pixels."""
    path = tmp_path / "x.png"
    film.write_png(path, np.tile(np.arange(0, 200, 0.5).astype(np.uint8), (200, 1)))
    return str(path)


def boxes(folder, *lines, header="name,x,y,width,height"):
    path = folder / "boxes.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def named(data, *names):
    """The data set, with images called so."""
    return dataclasses.replace(data, paths=names)


def test_masks_of_other_images_are_refused(data, tmp_path):
    film.write_png(tmp_path / "stranger.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(UsageError, match="--masks .*no file there is called like an image"):
        places.mask_files(tmp_path, "--masks", data)
    twice = named(data, "a/one.png", "b/one.png")
    film.write_png(tmp_path / "one.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(CxrError, match="two images are called one"):
        places.mask_files(tmp_path, "--masks", twice)
    (tmp_path / "left").mkdir()
    film.write_png(tmp_path / "left" / "one.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(CxrError, match="are called alike"):
        places.mask_files(tmp_path, "--masks", twice)


def test_a_mask_may_be_empty_and_of_any_depth(tmp_path):
    film.write_png(tmp_path / "x.png", np.arange(1600, dtype=np.uint16).reshape(40, 40))
    mask, known = np.zeros((40, 40), np.uint8), {"x": tmp_path / "mask.png"}
    for full in (0, 1, 255):
        mask[10:20, 10:20] = full
        film.write_png(tmp_path / "mask.png", mask)
        found = places.place_of(known, tmp_path / "x.png", 40, "crop")
        assert found is None if full == 0 else np.array_equal(found, mask > 0)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(200, 400), (128, 128), (50, 100)])
def test_a_mask_lies_where_the_image_is_whatever_its_own_shape(wide, tmp_path, fit, shape):
    box = (0.25, 0.5, 0.25, 0.25)
    film.write_png(tmp_path / "mask.png", np.uint8(255 * places.inside([box], *shape)))
    by_mask = places.place_of({"x": tmp_path / "mask.png"}, wide, 64, fit)
    by_box = places.place_of({"x": [box]}, wide, 64, fit)
    rows, columns = (
        (slice(32, 48), slice(0, 32)) if fit == "crop" else (slice(32, 40), slice(16, 32))
    )
    expected = np.zeros((64, 64), bool)
    expected[rows, columns] = True
    assert np.array_equal(by_box, expected) and (by_mask == expected).mean() > 0.99


def test_boxes_mark_the_place_that_they_name(data, tmp_path):
    path = data.paths[0]
    name = Path(path).name
    table = boxes(tmp_path, f"{name},0.25,0.5,0.25,0.125", f"{name},0,0,0.125,0.125", "other,,,,")
    place = places.place_of(places.boxes_of(table, data), path, 32, "crop")
    expected = np.zeros((32, 32), bool)
    expected[16:20, 8:16] = expected[:4, :4] = True
    assert (place == expected).mean() > 0.98  # the fixture's images are not square, or are resized


def test_healthy_images_that_are_marked_are_counted(wide, data, capsys):
    two = dataclasses.replace(data, paths=(wide, wide), labels=np.array([0, 1]))
    places.marked({"x": [(0.5, 0.5, 0.1, 0.1)]}, two, 32, "crop")
    assert "1 of the marked images are healthy" in " ".join(capsys.readouterr().err.split())


def test_names_may_hold_dots_and_go_with_or_without_their_suffix(data, tmp_path):
    images = named(
        data,
        *("7.png", "7.1.png", "1.2.276.7.DCM", "1.2.276.8", "9.jfif", "scan.left.png", "a.IMA"),
    )
    lines = ("7", "7.1", "1.2.276.7", "x\\\\1.2.276.8", "7.PNG", "9", "scan.left", "a.ima")
    found = places.boxes_of(boxes(tmp_path, *(f"{n},0,0,1,1" for n in lines)), images)
    assert {name: len(each) for name, each in found.items()} == {
        "7": 2,
        "7.1": 1,
        "1.2.276.7": 1,
        "1.2.276.8": 1,
        "9": 1,
        "scan.left": 1,
        "a": 1,
    }


def test_small_marks_count_in_training(wide, data):
    two = dataclasses.replace(data, paths=(data.paths[0], wide), labels=np.array([0, 1]))
    two = dataclasses.replace(two, images=data.images[:2])
    covers, known = places.marked({"x": [(0.5, 0.5, 0.005, 0.01)]}, two, 32, "crop")
    assert 0 < covers[1].max() < 127 and not covers[0].any() and known.all()
    with pytest.raises(UsageError, match="no diseased image is marked"):
        places.marked({}, two, 32, "crop")


def test_of_many_diseases_none_counts_as_healthy(wide, data):
    three = dataclasses.replace(data, paths=(wide, "b.png", "c.png"), labels=np.array([0, 1, 2]))
    three = dataclasses.replace(three, images=data.images[:3])
    for first, known in (("BACTERIAL", [True, False, False]), ("NORMAL", [True, False, False])):
        named = dataclasses.replace(three, classes=(first, "COVID", "VIRAL"))
        place = {"x": [(0.5, 0.5, 0.1, 0.1)]}
        if first == "NORMAL":
            named = dataclasses.replace(named, labels=np.array([1, 0, 2]))
            known = [True, True, False]
        assert places.marked(place, named, 32, "crop")[1].tolist() == known


HEADER = "name,x,y,width,height"


@pytest.mark.parametrize(
    "header, line, words",
    [
        ("name,x,y,width", "a,0,0,1", "columns name .* are needed"),
        (HEADER, "a,10,20,30,40", "line 2: shares from 0 to 1"),
        (HEADER, "a,zero,0,1,1", "line 2: could not convert"),
        (HEADER, "a,0.5,0.5,0,0.1", "line 2: width and height are above 0"),
        (HEADER, "a,0.7,0.1,0.9,0.3", "line 2: .* corners"),
    ],
)
def test_bad_boxes_are_refused_with_their_line(data, tmp_path, header, line, words):
    with pytest.raises(CxrError, match=words):
        places.boxes_of(boxes(tmp_path, line, header=header), data)


@pytest.mark.parametrize(
    "delimiter, encoding", [(";", "utf-8"), (",", "utf-8-sig"), ("\t", "utf-16")]
)
def test_boxes_may_come_from_a_spreadsheet(data, tmp_path, delimiter, encoding):
    table = boxes(tmp_path, f"{Path(data.paths[0]).name},0,0,1,0.5", header="Name,X,Y,Width,Height")
    table.write_bytes(table.read_text().replace(",", delimiter).encode(encoding))
    assert places.boxes_of(table, data) == {places.stem(data.paths[0]): [(0, 0, 1, 0.5)]}


def test_boxes_of_other_images_are_refused(data, tmp_path):
    with pytest.raises(UsageError, match="no name there is that of an image"):
        places.boxes_of(boxes(tmp_path, "stranger,0,0,1,1"), data)


def test_boxes_that_two_images_might_have_are_refused(data, tmp_path):
    twice = named(data, *(f"{i % 2}.png" for i in range(len(data))))
    with pytest.raises(CxrError, match="two images are called 0"):
        places.boxes_of(boxes(tmp_path, "0.png,0,0,1,1"), twice)
