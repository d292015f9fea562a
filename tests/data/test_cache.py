"""Decoded images in the cache: a changed byte is seen; one bad file ends no folder."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxr import images
from cxr.data import cache


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


# Whose cache it is


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A temporary directory of its own, a home that cannot be written; where the cache would lie."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("CXRGAN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    cache._own_folder.cache_clear()
    cache._warn_once.cache_clear()
    yield tmp_path / "tmp" / f"cxrgan-{os.getuid()}"
    cache._own_folder.cache_clear()


def test_the_temporary_folder_is_closed_to_others(temporary):
    assert cache.writable_folder() == temporary
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    assert cache.cache_folders() == [temporary]


@pytest.mark.parametrize("planted", ["open", "link", "owner"])
def test_a_planted_temporary_folder_is_not_used(temporary, tmp_path, monkeypatch, planted, capsys):
    if planted == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        temporary.symlink_to(tmp_path / "theirs")
    else:
        temporary.mkdir(mode=0o755 if planted == "open" else 0o700)
    if planted == "owner":
        distrusted = cache.distrusted
        monkeypatch.setattr(
            cache, "distrusted", lambda p: "theirs" if p == temporary else distrusted(p)
        )
    own = cache.writable_folder()
    assert own != temporary and own == cache.writable_folder() and own.parent == temporary.parent
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert cache.cache_folders() == [] and list(temporary.iterdir()) == []
    assert capsys.readouterr().err.count("is not used: ") == 1


def test_a_named_cache_that_others_may_write_is_not_used(temporary, paths, tmp_path, monkeypatch):
    monkeypatch.setenv("CXRGAN_CACHE", str(tmp_path / "shared"))
    cache.packed(paths, 32, "crop")
    (array,) = (tmp_path / "shared").glob("*.npy")
    np.save(array, np.zeros((2, 32, 32), np.uint8))
    (tmp_path / "shared").chmod(0o777)
    pixels, _ = cache.packed(paths, 32, "crop")
    assert pixels.any() and len(list(temporary.glob("*.npy"))) == 1


def test_arrays_are_for_this_user_alone(paths, tmp_path):
    cache.packed(paths, 32, "crop")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache").iterdir()}
    assert modes == {0o600}


@pytest.mark.parametrize("home", ["", "relative", None])
def test_without_a_home_nothing_is_put_below_the_working_folder(
    temporary, tmp_path, monkeypatch, home
):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(cache.pwd, "getpwuid", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert cache.writable_folder() == temporary and set(tmp_path.iterdir()) == before
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.writable_folder() == temporary and set(tmp_path.iterdir()) == before


def test_a_folder_for_one_process_is_removed_at_its_end(tmp_path):
    code = "from cxr.data import cache; folder = cache._own_folder(); (folder / 'x').touch(); print(folder)"
    command = [sys.executable, "-c", code]
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(cache.__file__).parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert str(tmp_path) in done.stdout and list(tmp_path.iterdir()) == []
