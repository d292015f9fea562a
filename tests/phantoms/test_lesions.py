"""The phantoms keep their promises: exact twins, true masks, reproducible truth."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cxr import UsageError, datasets
from cxr.phantoms import lesions, thorax
from cxr.phantoms.lesions import Lesion, Sample, phantom, render


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms")
    lesions.write(out, images=24, size=32, seed=5, shortcut=0.75)
    return out


@pytest.fixture(scope="module")
def truth(folder):
    with open(folder / "truth.csv", newline="") as file:
        return list(csv.DictReader(file))


def diseased(count, size=32, shortcut=None):
    return [phantom(2 * k, 0, size, shortcut) for k in range(1, count + 1)]


def with_opacity(sample, opacity):
    return tuple(replace(lesion, opacity=opacity) for lesion in sample.lesions)


def pixels(path):
    return np.asarray(Image.open(path))


def test_same_seed_same_picture_other_seed_another():
    first = phantom(2, 7, 32).render().image
    thorax.anatomy_of.cache_clear()
    np.testing.assert_array_equal(first, phantom(2, 7, 32).render().image)
    assert (first != phantom(2, 8, 32).render().image).mean() > 0.5
    assert (first != phantom(4, 7, 32).render().image).mean() > 0.5


def test_structure_and_lesions_do_not_depend_on_size_or_shortcut():
    small, large = phantom(2, 3, 32), phantom(2, 3, 256, shortcut=1.0)
    assert (small.structure, small.lesions) == (large.structure, large.lesions)


def test_lesions_of_opacity_zero_give_exactly_the_twin():
    for sample in diseased(5):
        none = render(sample.structure, with_opacity(sample, 0.0), sample.size)
        np.testing.assert_array_equal(none.image, sample.render(lesions=False).image)
        assert none.burden == 0


def test_twin_differs_only_in_the_lung_and_only_where_a_lesion_reaches():
    for sample in diseased(12, size=64, shortcut=1.0):
        shown, twin = sample.render(), sample.render(lesions=False)
        n = lesions._working_size(sample.size)
        anatomy = thorax.anatomy_of(sample.structure, n)
        reach = np.zeros((n, n), bool)
        for lesion in sample.lesions:
            reach |= lesions._extent(lesion, sample.structure, anatomy)[0] > 0
        reach &= anatomy.air > 0
        touched = thorax.shrink(reach, sample.size) > 0
        np.testing.assert_array_equal(shown.image[~touched], twin.image[~touched])
        assert (shown.image >= twin.image).all()
        assert shown.marker.any() and not touched[shown.marker].any()


def test_more_opacity_darkens_no_pixel_and_brightens_the_mask():
    for sample in diseased(6):
        doses = [with_opacity(sample, a) for a in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
        shown = [render(sample.structure, lesions, sample.size) for lesions in doses]
        images = np.array([one.image for one in shown]).astype(int)
        assert (np.diff(images, axis=0) >= 0).all()
        assert (np.diff(images[:, shown[0].lesion].mean(axis=1)) > 0).all()
        assert (np.diff([one.burden for one in shown]) > 0).all()
        for one in shown:
            np.testing.assert_array_equal(one.lesion, shown[0].lesion)


def test_mask_lies_in_the_lungs_and_holds_most_of_the_change():
    shares = []
    for sample in diseased(25, size=64):
        shown, twin = sample.render(), sample.render(lesions=False)
        change = shown.image.astype(float) - twin.image
        assert shown.lesion.any()
        assert (shown.lesion & shown.lung).sum() >= 0.97 * shown.lesion.sum()
        assert change[shown.lesion].mean() > 4 * change[~shown.lesion].mean()
        shares.append(change[shown.lesion].sum() / change.sum())
    assert np.mean(shares) > 0.8


@pytest.mark.parametrize("sizes", [(32, 64), (64, 128), (128, 256)])
def test_same_structure_looks_the_same_at_any_size(sizes):
    small, large = (replace(phantom(2, 11, 32, 1.0), size=size).render() for size in sizes)
    halved = thorax.shrink(large.image.astype(float), sizes[0])
    assert np.abs(halved - small.image).mean() < 1.5
    for name in ("lesion", "lung"):
        mask = getattr(small, name)
        halved = thorax.shrink(getattr(large, name), sizes[0]) >= 0.5
        assert (halved & mask).sum() > 0.85 * (halved | mask).sum()
    assert large.burden == pytest.approx(small.burden, rel=0.05)


def test_lesions_vary_in_kind_side_number_and_lie_low_and_far_out():
    samples = diseased(200)
    drawn = [lesion for sample in samples for lesion in sample.lesions]
    assert {len(sample.lesions) for sample in samples} == {1, 2, 3, 4}
    assert {(lesion.kind, lesion.side) for lesion in drawn} == {
        (kind, side) for kind in lesions.KINDS for side in (-1, 1)
    }
    opacities = [sample.lesions[0].opacity for sample in samples]
    assert 0.2 <= min(opacities) < 0.25 and 0.95 < max(opacities) <= 1
    assert np.mean([lesion.down for lesion in drawn]) > 0.55
    assert np.mean([lesion.across for lesion in drawn]) > 0.5


def test_consolidation_is_denser_than_ground_glass():
    sample = phantom(2, 0, 64)
    lesion = Lesion.draw(np.random.default_rng(0), opacity=1.0)
    thin, dense = (
        render(sample.structure, (replace(lesion, kind=kind),), 64) for kind in lesions.KINDS
    )
    assert dense.image[dense.lesion].mean() > thin.image[thin.lesion].mean() + 5


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_marker_agrees_with_the_label_at_the_rate_asked_for(share):
    samples = [phantom(index, 2, 32, share) for index in range(1, 601)]
    for part in (samples[::2], samples[1::2]):
        agrees = np.mean([sample.marker == bool(sample.lesions) for sample in part])
        assert agrees == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 300))


def test_without_shortcut_there_is_no_marker():
    assert not any(phantom(index, 2, 32).marker for index in range(1, 101))


def test_marker_is_bright_and_changes_nothing_else():
    for size in lesions.SIZES:
        sample = phantom(2, 4, size, shortcut=1.0)
        marked, bare = sample.render(), sample.render(marker=False)
        changed = marked.image != bare.image
        grown = np.pad(marked.marker, 2)
        near = sum(np.roll(grown, (i, j), (0, 1)) for i in (-2, -1, 0, 1, 2) for j in range(-2, 3))
        assert marked.marker.sum() >= 4 and not bare.marker.any()
        assert not (changed & (near[2:-2, 2:-2] == 0)).any()
        assert (marked.image > bare.image)[marked.marker].all()


def test_folder_is_balanced_and_complete(folder, truth):
    assert [row["label"] for row in truth] == ["NORMAL", "DISEASE"] * 12
    assert sorted(row["path"] for row in truth) == sorted(
        str(path.relative_to(folder)) for path in (folder / "images").rglob("*.png")
    )
    names = {
        "twins": [row for row in truth if row["label"] == "DISEASE"],
        "masks": [row for row in truth if row["label"] == "DISEASE"],
        "lungs": truth,
        "markers": [row for row in truth if row["marker"] == "yes"],
    }
    for name, rows in names.items():
        expected = {f"phantom_{int(row['index']):05d}.png" for row in rows}
        assert {path.name for path in (folder / name).iterdir()} == expected
    assert 0 < len(names["markers"]) < 24


def test_any_row_of_the_truth_renders_again_exactly(folder, truth):
    for row in truth[:8]:
        sample = Sample.from_row(row)
        assert sample == phantom(sample.index, 5, 32, 0.75)
        shown, name = sample.render(), f"{sample.name}.png"
        np.testing.assert_array_equal(pixels(folder / row["path"]), shown.image)
        np.testing.assert_array_equal(pixels(folder / "lungs" / name) > 0, shown.lung)
        assert float(row["burden"]) == shown.burden
        assert int(row["count"]) == len(sample.lesions)
        if sample.lesions:
            twin = sample.render(lesions=False)
            np.testing.assert_array_equal(pixels(folder / "twins" / name), twin.image)
            np.testing.assert_array_equal(twin.marker, shown.marker)
            np.testing.assert_array_equal(pixels(folder / "masks" / name) > 0, shown.lesion)


def test_folder_and_truth_open_as_the_same_data_set(folder):
    by_folder = datasets.open_dataset(folder / "images", size=32)
    by_table = datasets.open_dataset(folder / "truth.csv", size=32)
    assert by_folder.classes == by_table.classes == ("NORMAL", "DISEASE")
    assert by_folder.labels.sum() == by_table.labels.sum() == 12
    assert sorted(by_folder.patients) == sorted(by_table.patients)
    assert len(set(by_table.patients)) == 24


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"images": 1}, "at least 2"),
        ({"size": 100}, "32, 64, 128, 256"),
        ({"seed": -1}, "0 or more"),
        ({"shortcut": 1.5}, "from 0 to 1"),
        ({"shortcut": float("nan")}, "from 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path, wrong, words):
    with pytest.raises(UsageError, match=words):
        lesions.write(tmp_path / "out", **{"images": 4, "size": 32, "seed": 0, **wrong})
    assert not (tmp_path / "out").exists()


def test_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        lesions.write(tmp_path, images=2, size=32, seed=0)
    with pytest.raises(UsageError, match="is a file"):
        lesions.write(tmp_path / "thesis.txt", images=2, size=32, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
