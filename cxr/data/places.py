"""Where disease and lungs are, as people have marked them: folders of masks, tables of boxes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxr import CxrError, UsageError, console, images
from cxr.data import spreadsheet
from cxr.data.folders import file_name, stem
from cxr.data.listing import sounds_healthy
from cxr.datasets import Dataset

Places = dict[str, Path | list[tuple[float, ...]]]  # mask files or boxes, by the image's stem


def find_places(masks: str | Path | None, boxes: str | Path | None, data: Dataset) -> Places:
    """Where the disease is, of --masks or --boxes. Raises as `mask_files` and `boxes_of`, and
    UsageError for both."""
    if masks and boxes:
        raise UsageError("--masks and --boxes both say where the disease is: give one")
    return boxes_of(boxes, data) if boxes else mask_files(masks, "--masks", data)


def place_of(places: Places, image: str, size: int, fit: str) -> np.ndarray | None:
    """The mask of an image file, bool [size, size], prepared as the image is. None if there is none
    or it is empty."""
    cover = cover_of(places, image, size, fit)
    return None if cover is None or cover.max() <= 127 else cover > 127


def cover_of(places: Places, image: str, size: int, fit: str) -> np.ndarray | None:
    """How much of each pixel of an image file, prepared as for training, is marked, uint8
    [size, size] in 255ths. None if no place is known. Raises CxrError."""
    found = places.get(stem(image))
    if found is None:
        return None
    xray = images.read(image)
    if isinstance(found, Path):
        mask = images.pixels_of(found).astype(np.float32)
        mask /= max(mask.max(), 1)
        if mask.shape != xray.shape:
            mask = images.resize(mask, *xray.shape)
    else:
        mask = inside(found, *xray.shape)
    return images.square(mask, size, fit, xray)


def inside(boxes: Sequence[tuple[float, ...]], height: int, width: int) -> np.ndarray:
    """1 in boxes (x, y, width, height, as shares of an image's width and height), else 0, float32
    [height, width]."""
    mask = np.zeros((height, width), np.float32)
    for x, y, wide, high in boxes:
        rows, columns = (
            slice(max(round(first * n), 0), max(round((first + length) * n), 0))
            for first, length, n in ((y, high, height), (x, wide, width))
        )
        mask[rows, columns] = 1
    return mask


def marked(places: Places, data: Dataset, size: int, fit: str) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel of all images is marked, uint8 [N, size, size] in 255ths, and of which
    the place is known, bool [N]: of those that have a mask and of the healthy ones. How many of the
    others there are is said. Raises UsageError if no diseased image is marked."""
    covers = np.zeros((len(data), size, size), np.uint8)
    with console.progress("marks", len(data), unit="images") as bar:
        for row, path in enumerate(data.paths):
            cover = cover_of(places, path, size, fit)
            covers[row] = 0 if cover is None else cover
            bar.advance()
    seen, healthy = covers.any((1, 2)), data.labels == 0
    if len(data.classes) > 2 and not sounds_healthy(data.classes[0]):
        healthy[:] = False  # each class is a disease
    known = seen | healthy
    if not seen[~healthy].any():
        raise UsageError(
            "--masks, --boxes: no diseased image is marked, so there is nothing to learn"
        )
    others = len(places.keys() - {stem(path) for path in data.paths})
    console.say(
        f"{seen.sum():,} images are marked; of {(~known).sum():,} diseased ones no place "
        "is known: they are trained on without"
        + (f"; marks of images that are not in {data.name}: {others:,}" if others else "")
    )
    if odd := (seen & healthy).sum():
        console.warn(f"{odd:,} of the marked images are healthy: what is marked counts as disease")
    return covers, known


def mask_files(folder: str | Path | None, option: str, data: Dataset) -> dict[str, Path]:
    """The masks in a folder, by their stems. A mask has the stem of its image.

    Raises UsageError if no mask belongs to an image, and CxrError if two masks or two images share
    a stem.
    """
    if folder is None:
        return {}
    files: dict[str, Path] = {}
    for path in images.find_images(folder):
        name = stem(path)
        if name in files:
            raise CxrError(
                f"{option} {folder}: {files[name]} and {path} are called alike; "
                "keep one, with all of the mask in it"
            )
        files[name] = path
    if not _stems(files, data, f"{option} {folder}"):
        raise UsageError(f"{option} {folder}: no file there is called like an image of {data.name}")
    return files


def _stems(places: Places, data: Dataset, told: str) -> list[str]:
    """The images of the data that have a place, by their stems. Raises CxrError if two are called
    alike."""
    stems = [name for name in map(stem, data.paths) if name in places]
    if twice := [name for name, count in Counter(stems).items() if count > 1]:
        raise CxrError(f"{told}: two images are called {twice[0]}; rename one")
    return stems


def boxes_of(table: str | Path, data: Dataset) -> Places:
    """Boxes around the disease, by the stem of the image's name: from a table with a column `name` or
    `path` and x, y (of the upper left corner), width, height, as shares of the image's width and
    height. A line without numbers says that there is none. A name may lack its image's suffix.

    Raises CxrError if it is malformed, UsageError if no box belongs to an image.
    """
    lines = spreadsheet.read_lines(Path(table))
    _, header = next(lines, (1, []))
    header = [name.lower() for name in header]
    named = next((name for name in ("name", "path") if name in header), None)
    if named is None or not {"x", "y", "width", "height"} <= set(header):
        raise CxrError(f"--boxes {table}: columns name (or path), x, y, width, height are needed")
    stems = {stem(path) for path in data.paths}
    places: dict[str, list[tuple[float, ...]]] = {}
    for number, cells in lines:
        line = dict(zip(header, cells))
        numbers = [line.get(key, "") for key in ("x", "y", "width", "height")]
        if not any(numbers):
            continue
        try:
            box = _box(numbers)
        except ValueError as error:
            raise CxrError(f"--boxes {table}, line {number}: {error}") from None
        name = file_name(line[named])
        places.setdefault(name if name in stems else stem(name), []).append(box)
    if not _stems(places, data, f"--boxes {table}"):
        raise UsageError(f"--boxes {table}: no name there is that of an image of {data.name}")
    return places


def _box(numbers: Sequence[str]) -> tuple[float, float, float, float]:
    """x, y, width, height. Raises ValueError."""
    x, y, width, height = box = tuple(map(float, numbers))
    if not all(-0.5 <= value <= 1.5 for value in box):  # some reach beyond the image
        raise ValueError("shares from 0 to 1 are needed: divide pixels by the image's")
    if width <= 0 or height <= 0:
        raise ValueError(
            "width and height are above 0: leave the numbers out where there is no box"
        )
    if x + width > 1.5 or y + height > 1.5:
        raise ValueError("the box ends far beyond the image: is it corners, not width and height?")
    return box
