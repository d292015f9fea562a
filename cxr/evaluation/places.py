"""Where disease and lungs are, as people have marked them: folders of masks, tables of boxes."""

import csv
from pathlib import Path

from cxr import CxrError, UsageError, images
from cxr.datasets import Dataset

Places = dict[str, Path | list[tuple[float, ...]]]  # mask files or boxes, by the image's stem


def mask_files(folder: str | Path | None, option: str, data: Dataset) -> dict[str, Path]:
    """The masks in a folder, by their stems. A mask has the stem of its image.

    Raises UsageError if no mask belongs to an image, and CxrError if two masks or two images share
    a stem.
    """
    if folder is None:
        return {}
    files: dict[str, Path] = {}
    for path in images.find_images(folder):
        if path.stem in files:
            raise CxrError(
                f"{option} {folder}: {files[path.stem]} and {path} are called alike; "
                "keep one, with all of the mask in it"
            )
        files[path.stem] = path
    stems = [Path(name).stem for name in data.paths if Path(name).stem in files]
    if not stems:
        raise UsageError(f"{option} {folder}: no file there is called like an image of {data.name}")
    if twice := [stem for stem in set(stems) if stems.count(stem) > 1]:
        raise CxrError(f"{option} {folder}: two images are called {twice[0]}; rename one")
    return files


def boxes_of(table: str | Path, data: Dataset) -> Places:
    """Boxes around the disease, by the stem of the image's name: from a CSV table with a column
    `name` or `path` and x, y (of the upper left corner), width, height, as shares of the image's
    width and height. A line without numbers says that there is none.

    Raises CxrError if it is malformed, UsageError if no box belongs to an image.
    """
    places: dict[str, list[tuple[float, ...]]] = {}
    try:
        number = 1
        with open(table, newline="", encoding="utf-8-sig") as file:
            for number, line in enumerate(csv.DictReader(file), 2):
                name = line.get("name") or line.get("path")
                cells = [line.get(key) for key in ("x", "y", "width", "height")]
                if not name or None in cells:
                    raise ValueError("columns name (or path), x, y, width, height are needed")
                if not any(cells):
                    continue
                values = tuple(map(float, cells))
                if not all(-0.5 <= value <= 1.5 for value in values):  # some reach beyond it
                    raise ValueError("shares from 0 to 1 are needed: divide pixels by the image's")
                places.setdefault(Path(name.replace("\\", "/")).stem, []).append(values)
    except (ValueError, UnicodeError, csv.Error) as error:
        raise CxrError(f"--boxes {table}, line {number}: {error}") from None
    if not places.keys() & {Path(name).stem for name in data.paths}:
        raise UsageError(f"--boxes {table}: no name there is that of an image of {data.name}")
    return places
