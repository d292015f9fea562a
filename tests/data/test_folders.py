import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr import CxrError, UsageError, images
from cxr.data import folders
from cxr.datasets import open_dataset


def picture(path, seed=0, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)
    return path


def names(found, root):
    return [str(path.relative_to(root)) for path in found.files]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000"])
def test_images_are_told_by_their_content(tmp_path, kind):
    picture(tmp_path / "a.jfif", kind=kind)
    picture(tmp_path / "without", kind=kind)
    (tmp_path / "BMI.txt").write_text("BMI of a patient, no bitmap")
    (tmp_path / "II.txt").write_text("II*")
    found = folders.scan(tmp_path)
    assert names(found, tmp_path) == ["a.jfif", "without"] and found.left_out == {".txt": 2}
    assert images.read(tmp_path / "without").shape == (20, 20)


def test_what_is_left_out_is_counted_by_suffix_and_said(tmp_path, capsys):
    picture(tmp_path / "a.png")
    for name in ("a.txt", "b.txt", "Thumbs.db", ".DS_Store", "README", "DICOMDIR"):
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    folders.scan(tmp_path).report(tmp_path)
    said = capsys.readouterr().err
    for part in ("2 .txt", "1 .db", "1 hidden", "1 DICOMDIR", "1 broken links", "1 pipes"):
        assert part in said
    assert "1 without a suffix" in said


def test_linked_folders_are_followed_once_and_loops_are_seen(tmp_path):
    store = tmp_path / "store"
    picture(store / "deep" / "x.png")
    (store / "up").symlink_to(store)
    data = tmp_path / "data"
    picture(data / "y.png")
    for name in ("one", "two"):
        (data / name).symlink_to(store)
    (data / "loop").symlink_to(data)
    (data / "above").symlink_to(tmp_path)
    found = folders.scan(data)
    assert names(found, data) == ["one/deep/x.png", "y.png"]
    assert found.left_out == {"linked folders that are in it already": 4}


def test_masks_beside_images_are_no_images(tmp_path):
    for name in ("COVID", "Normal"):
        picture(tmp_path / name / "images" / f"{name}-1.png")
        picture(tmp_path / name / "masks" / f"{name}-1.png")
        picture(tmp_path / name / "lung masks" / f"{name}-1.png")
    found = folders.scan(tmp_path)
    assert names(found, tmp_path) == ["COVID/images/COVID-1.png", "Normal/images/Normal-1.png"]
    assert found.left_out == {"folders of masks": 4}


def test_a_folder_has_no_columns(tmp_path):
    picture(tmp_path / "NORMAL" / "a.png")
    with pytest.raises(UsageError, match="--patient-column is of a table"):
        open_dataset(tmp_path, 16, patient_column="patient")


def test_a_missing_or_empty_folder_is_said(tmp_path):
    with pytest.raises(CxrError, match="holds no image"):
        images.find_images(tmp_path)
    with pytest.raises(CxrError, match="no such file or folder"):
        images.find_images(tmp_path / "absent")


@pytest.mark.parametrize("layout", ["{split}/{label}", "{label}/{split}"])
@pytest.mark.parametrize("splits", [("train", "val", "test"), ("Training", "valid", "Testing")])
def test_ready_made_splits_are_used(tmp_path, layout, splits, capsys):
    for split in splits:
        for label in ("NORMAL", "SICK"):
            folder = layout.format(split=split, label=label)
            picture(tmp_path / folder / f"{split}{label}.png", hash((split, label)) % 99)
    picture(tmp_path / "loose.png")
    found = open_dataset(tmp_path, 16)
    assert found.classes == ("NORMAL", "SICK")
    assert found.counts() == {"train": (1, 1), "val": (1, 1), "test": (1, 1)}
    assert found.rule == "as the data came"
    said = capsys.readouterr().err
    assert "1 images outside the folders of the classes" in said
    assert "its own splits: train 2, val 2, test 2" in said


def test_validation_patients_that_are_lacking_come_out_of_train(tmp_path, capsys):
    for n in range(60):
        label = ("NORMAL", "SICK")[n % 2]
        picture(tmp_path / ("test" if n < 6 else "train") / label / f"{n}.png", n)
    found = open_dataset(tmp_path, 16)
    where = dict(zip(found.paths, found.splits))
    assert all((split == "test") == ("/test/" in path) for path, split in where.items())
    assert 0 < sum(split == "val" for split in where.values()) < 20
    assert "val drawn by patient out of train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["..", "...png", " .png", "a\nb\x1b.png", "x" * 250, "é" * 120, "index.html.png"]
)
def test_folder_names_are_plain_and_stay_inside(name):
    names = folders.names_apart([Path(name), Path("other") / name], lambda *_: True)
    assert len(set(names)) == 2
    for made in names:
        assert made.isprintable() and not made.startswith(".") and made.strip()
        assert Path(made).name == made and len(made.encode()) < 255
