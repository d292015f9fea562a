"""What is in a data set, before anything is trained: counts, what is odd, a sheet of pictures."""

import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from cxr import console, film, images
from cxr.data import dicom
from cxr.data.patients import SPLITS
from cxr.datasets import Dataset, open_dataset, twins

SIZE = 64  # pixels to which each image is decoded here
SIDE, DRAWN = 256, 10  # pixels of a picture on the sheet, pictures of each kind
NAMED = 20  # images of each odd kind that are named
DARK, BRIGHT = 10, 245  # mean grey, of 255
TINY = 128  # pixels of the shorter side
INVERTED = -0.4  # correlation with the mean of all images; of 5,216 children's X-rays none is below


def check(data: str | Path, sheet: str | Path | None = None, **reading: str | None) -> dict:
    """Look at a data set as training would read it; see `open_dataset` for the options and errors.

    sheet: a PNG to write, a row of pictures for each class and for each odd kind. Returns numbers
    fit for JSON: {"classes": [healthy, diseased], "images", "patients": {split: [of each class]},
    "split": the rule, "sizes", "depths": {kind: count}, "odd": {kind: {"count", "images"}},
    "unreadable": {path: reason}}.
    """
    found = open_dataset(data, SIZE, **reading)
    heads = _heads(found.paths)
    odd = _odd(found, [size for size, _ in heads])
    if sheet is not None:
        _draw(found, odd, sheet)
    kinds = {kind: [found.paths[row] for row in rows] for kind, rows in odd.items()}
    kinds = {"unreadable": list(found.unreadable), **kinds}
    return {
        "classes": list(found.classes),
        "images": {split: list(counts) for split, counts in found.counts().items()},
        "patients": {split: _patients(found, split) for split in SPLITS},
        "split": found.rule,
        "sizes": dict(Counter(_size_name(size) for size, _ in heads).most_common()),
        "depths": dict(Counter(depth for _, depth in heads).most_common()),
        "odd": {
            kind: {"count": len(paths), "images": paths[:NAMED]}
            for kind, paths in kinds.items()
            if paths
        },
        "unreadable": found.unreadable,
    }


def _patients(found: Dataset, split: str) -> list[int]:
    inside = found.splits == split
    return [
        len({found.patients[row] for row in np.flatnonzero(inside & (found.labels == label))})
        for label in (0, 1)
    ]


def _heads(paths: Sequence[str]) -> list[tuple[tuple[int, int] | None, str]]:
    """(width and height, the depth in words) of each file, from its header alone."""
    found = []
    with console.progress("headers", len(paths), quiet=len(paths) < 1000) as bar:
        for path in paths:
            found.append(_head(path))
            bar.advance()
    return found


def _head(path: str) -> tuple[tuple[int, int] | None, str]:
    with warnings.catch_warnings(), suppress(Exception):  # decoding has told what is wrong
        warnings.simplefilter("ignore")
        with Image.open(path, formats=images.FORMATS) as file:
            return file.size, _depth(file.mode)
    with warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        return dicom.size_and_depth(Path(path))
    return None, "unknown"


def _depth(mode: str) -> str:
    if mode.startswith("I"):
        return "16 bits or more, grey"
    return {"L": "8 bits, grey", "1": "1 bit", "F": "floating point"}.get(mode, "8 bits, colour")


def _size_name(size: tuple[int, int] | None) -> str:
    """A size to the next power of 2 of its longer side, as few names tell more."""
    if size is None:
        return "unknown"
    top = 1 << (max(size) - 1).bit_length()
    return f"{top // 2 + 1} to {top} pixels"


def _odd(found: Dataset, sizes: Sequence[tuple[int, int] | None]) -> dict[str, list[int]]:
    """Rows of what looks odd, by kind."""
    grey = np.array([image.mean() for image in found.images])
    likeness = _likeness(found)
    groups = twins(found)
    mixed = [row for g in groups if len({found.labels[r] for r in g}) > 1 for row in g]
    again = [row for g in groups if len({found.labels[r] for r in g}) == 1 for row in g[1:]]
    return {
        "nearly black": np.flatnonzero(grey < DARK).tolist(),
        "nearly white": np.flatnonzero(grey > BRIGHT).tolist(),
        "inverted": np.flatnonzero(likeness < INVERTED).tolist(),
        "tiny": [row for row, size in enumerate(sizes) if size and min(size) < TINY],
        "in two classes": mixed,
        "duplicates": again,
    }


def _likeness(found: Dataset) -> np.ndarray:
    """Correlation of each image with the mean of all."""
    mean = np.zeros(found.images.shape[1:])
    for image in found.images:
        mean += image
    mean -= mean.mean()
    products = []
    for image in found.images:
        own = image - image.mean()
        length = np.linalg.norm(own) * np.linalg.norm(mean)
        products.append((own * mean).sum() / length if length else 0.0)
    return np.array(products)


def _draw(found: Dataset, odd: dict[str, list[int]], sheet: str | Path) -> None:
    """Pictures drawn by chance of each class and of each odd kind, with its name."""
    random = np.random.default_rng(0)
    groups = {name: np.flatnonzero(found.labels == i) for i, name in enumerate(found.classes)}
    groups |= {kind: np.array(rows) for kind, rows in odd.items() if rows}
    tiles = []
    for name, rows in groups.items():
        for row in np.sort(random.permutation(rows)[:DRAWN]):
            lines = f"{name[:24]}, {found.splits[row]}", Path(found.paths[row]).name[-28:]
            title = "\n".join(map(console.plain, lines))
            tiles.append((title, images.load(found.paths[row], SIDE), None))
    shown = film.Sheet(f"{found.name}: {len(found):,} images", (), tiles, ())
    film.write_png(sheet, film.panel(shown))
