"""Images decoded once and kept in a cache, as one array that is read as it is needed."""

import atexit
import ctypes
import hashlib
import json
import os
import pwd
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from cxr import CxrError, console, images
from cxr.data import dicom
from cxr.files import distrusted, replacing

THREADS = 4
BUDGET = 2**29  # bytes that all decoders together may need, whatever the number of cores
CACHE_VERSION = 3  # raise it whenever images.load gives other pixels for the same file


def packed(paths: Sequence[str], size: int, fit: str) -> tuple[np.ndarray, dict[int, str]]:
    """The readable images, uint8 [n, size, size], and {place in `paths`: reason} for the others."""
    key = _cache_key(paths, size, fit)
    for folder in cache_folders():
        try:
            return _read_entry(folder, key, len(paths), size)
        except (
            OSError,
            EOFError,
            ValueError,
            TypeError,
            LookupError,
        ):  # absent, or damaged: build it anew
            continue
    return _build_entry(writable_folder(), key, paths, size, fit)


def _cache_key(paths: Sequence[str], size: int, fit: str) -> str:
    stamps = []
    for path in paths:
        try:
            stat = os.stat(path)
            stamps.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
        except (OSError, ValueError):  # a missing file is counted among the unreadable ones
            stamps.append((os.path.abspath(path), None, None))
    return hashlib.sha256(json.dumps([CACHE_VERSION, size, fit, stamps]).encode()).hexdigest()


def cache_folders() -> list[Path]:
    """This user's cache folders that exist, best first; none that others could have changed."""
    return [place for place, private in _places() if os.path.isdir(place) and _ours(place, private)]


def writable_folder() -> Path:
    """The folder for what is cached now: the first that can be written, made if need be, else one
    for this process alone. Raises CxrError if there is none."""
    for place, private in _places():
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)  # patients' images: not for all
        except OSError:
            continue
        if _ours(place, private) and os.access(place, os.W_OK | os.X_OK):
            return place
    return _own_folder()


def _ours(folder: Path, private: bool) -> bool:
    """Whether only this user can have filled it and, if `private`, look into it; says why not."""
    reason = distrusted(folder)
    if not reason and private and folder.stat().st_mode & 0o077:
        reason = f"{folder} is open to others"
    if reason:
        _warn_once(f"the cache {folder} is not used: {reason}")
    return not reason


def _places() -> list[tuple[Path, bool]]:
    """Where a cache may lie, and whether it must be closed to others: CXRGAN_CACHE, else the
    user's cache folder; the temporary directory, if the home is read-only or unknown."""
    named = os.environ.get("CXRGAN_CACHE")
    places = [(Path(named).absolute(), False)] if named else []
    with suppress(KeyError):  # a user without an entry
        home = os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
        if not named and os.path.isabs(base):
            places.append((Path(base) / "cxrgan", False))
    return [*places, (Path(tempfile.gettempdir()) / f"cxrgan-{os.getuid()}", True)]


@lru_cache
def _own_folder() -> Path:
    """A new folder, removed when the process ends."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="cxrgan-"))
    except OSError:
        raise CxrError(
            "no folder to keep decoded images in; set CXRGAN_CACHE to a writable one"
        ) from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@lru_cache
def _warn_once(line: str) -> None:
    console.warn(line)


def _read_entry(folder: Path, key: str, count: int, size: int) -> tuple[np.ndarray, dict[int, str]]:
    """A cache entry; OSError if there is none, EOFError, ValueError or TypeError if damaged."""
    listed = json.loads((folder / f"{key}.json").read_text())
    bad = {int(row): str(reason) for row, reason in listed["bad"]}
    pixels = np.load(folder / f"{key}.npy", mmap_mode="r")
    if pixels.shape != (count - len(bad), size, size) or pixels.dtype != np.uint8:
        raise ValueError("the array is not the one that was listed")
    if _digest(pixels) != listed["digest"]:
        console.warn(f"{folder / key}.npy: its content has changed; decoding the images again")
        raise ValueError("its digest is another")
    return pixels, bad


def _digest(pixels: np.ndarray) -> str:
    """Of the array's content; in pieces, as it may be larger than memory."""
    found = hashlib.sha256()
    for start in range(0, len(pixels), 256):
        found.update(np.ascontiguousarray(pixels[start : start + 256]))
    return found.hexdigest()


def _build_entry(
    folder: Path, key: str, paths: Sequence[str], size: int, fit: str
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode everything into `folder`; another process may do the same at the same time.

    Each writes files of its own and then renames them. The list is renamed last: an entry
    without one does not count, so that a crash in between leaves nothing half-valid.
    """
    try:
        with replacing(folder / f"{key}.npy", private=True) as own:
            with open(own, "wb") as file:
                bad = _decode_into(file, paths, size, fit)
            pixels = np.load(own, mmap_mode="r")  # stays this file, whoever renames another over it
        with replacing(folder / f"{key}.json", private=True) as own:
            own.write_text(json.dumps({"bad": list(bad.items()), "digest": _digest(pixels)}))
    except CxrError as error:
        if not isinstance(error.__cause__, OSError):  # none of the images can be read
            raise
        reason = error.__cause__.strerror or error.__cause__
        raise CxrError(
            f"{folder}: cannot keep the decoded images here ({reason}); "
            "set CXRGAN_CACHE to a folder with room"
        ) from None
    return pixels, bad


def _decode_into(file: BinaryIO, paths: Sequence[str], size: int, fit: str) -> dict[int, str]:
    """Write a .npy of all readable images; returns {place in `paths`: reason} for the others."""

    def decode(path: str) -> np.ndarray | str:
        try:
            with room.taken(_bytes_needed(path)):
                return images.load(path, size, fit)
        except Exception as error:  # noqa: BLE001 - MemoryError, too: one file ends no folder
            return str(error) if isinstance(error, CxrError) else f"{path}: {error!r}"

    bad, room = {}, _Room(BUDGET)
    _npy_header(file, len(paths), size)
    # Threads, not processes: PIL decodes outside the GIL, and torch may be loaded already.
    with ThreadPoolExecutor(THREADS) as pool, console.progress("decoding", len(paths)) as bar:
        for row, result in enumerate(pool.map(decode, paths)):
            if isinstance(result, str):
                bad[row] = result
            else:
                file.write(result.tobytes())
            bar.advance()
    if len(bad) == len(paths):
        raise CxrError(f"none of the {len(paths)} images can be read (the first: {bad[0]})")
    file.seek(0)
    _npy_header(file, len(paths) - len(bad), size)
    return bad


class _Room:
    """Memory shared by threads: each waits until what it needs is free."""

    def __init__(self, size: int):
        self.size = self.free = size
        self.changed = threading.Condition()

    @contextmanager
    def taken(self, need: int) -> Iterator[None]:
        """Holds `need` bytes; who needs more than there are takes all, and so works alone."""
        need = min(need, self.size)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= need)
            self.free -= need
        try:
            yield
        finally:
            if need > self.size / 8:
                _return_memory()
            with self.changed:
                self.free += need
                self.changed.notify_all()


def _return_memory() -> None:
    """Have the C library give back what it keeps for each thread, if it can: glibc keeps a large
    film's memory."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _bytes_needed(path: str) -> int:
    """Four times the decoded size that the header tells, or all there is where it tells none."""
    if not (os.path.isfile(path) and os.path.getsize(path)):  # a pipe, or /proc: might never end
        return 0
    with warnings.catch_warnings(), suppress(Exception):  # DICOM, or damaged: decoding will say
        warnings.simplefilter("ignore")
        with Image.open(path, formats=images.FORMATS) as file:
            depth = 4 if file.mode == "F" or file.mode.startswith("I") else len(file.getbands())
            return 4 * depth * file.width * file.height
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        return 4 * dicom.decoded_bytes(Path(path))
    return BUDGET


def _npy_header(file: BinaryIO, count: int, size: int) -> None:
    """Its length does not depend on `count`: numpy leaves room for the first axis to change."""
    shape = (count, size, size)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
