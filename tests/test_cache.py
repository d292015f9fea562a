"""Decoded images in the cache: a changed byte is seen; one bad file ends no folder."""

import numpy as np
import pytest
from PIL import Image

from cxr import cache, images


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.setenv("CXRGAN_CACHE", str(tmp_path / "cache"))
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(2)]


def test_a_flipped_byte_is_seen_and_the_entry_built_anew(paths, tmp_path, capsys):
    expected = cache.packed(paths, 32, "crop")[0].copy()
    (array,) = (tmp_path / "cache").glob("*.npy")
    data = bytearray(array.read_bytes())
    data[-5] ^= 1
    array.write_bytes(data)
    np.testing.assert_array_equal(cache.packed(paths, 32, "crop")[0], expected)
    assert "decoding the images again" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("error", [MemoryError, RecursionError, TypeError])
def test_whatever_one_file_raises_is_a_reason(paths, monkeypatch, error):
    load = images.load

    def fail(path, *rest):
        if path == paths[0]:
            raise error
        return load(path, *rest)

    monkeypatch.setattr(images, "load", fail)
    pixels, bad = cache.packed(paths, 32, "crop")
    assert len(pixels) == 1 and error.__name__ in bad[0]


def test_decoders_together_stay_within_the_budget(paths, monkeypatch):
    """Both files need 3/4 of the budget, so that one has to wait for the other."""
    monkeypatch.setattr(cache, "BUDGET", 4 * 32 * 32 * 4 // 3)
    load, at_work, most = images.load, [], []

    def counted(*args):
        at_work.append(1)
        most.append(len(at_work))
        result = load(*args)
        at_work.pop()
        return result

    monkeypatch.setattr(images, "load", counted)
    assert len(cache.packed(paths * 20, 32, "crop")[0]) == 40
    assert max(most) == 1


def test_a_file_larger_than_the_budget_is_still_read(paths, monkeypatch):
    monkeypatch.setattr(cache, "BUDGET", 10)
    assert len(cache.packed(paths, 32, "crop")[0]) == 2
