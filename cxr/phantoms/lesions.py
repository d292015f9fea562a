"""Phantoms, synthetic chest X-rays with known lesions, masks and shortcuts; data sets of them."""

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr import CxrError, UsageError, console
from cxr.files import replacing
from cxr.film import write_png
from cxr.phantoms.thorax import Anatomy, Structure, anatomy_of, clouds, film, letter, ramp, shrink

SIZES = (32, 64, 128, 256)
CLASSES = ("NORMAL", "DISEASE")
KINDS = ("ground-glass", "consolidation")
DENSITY = {"ground-glass": 0.6, "consolidation": 0.97}  # share of the air displaced at opacity 1
AIR = 1.05  # attenuation that a lung full of air takes away from the same chest full of water


@dataclass(frozen=True)
class Lesion:
    """Fluid that replaces air. Its profile is at most 1, and 0 beyond `size` and the soft edge."""

    kind: str  # ground-glass or consolidation
    side: int  # -1 the right lung (left on the image), 1 the left lung
    across: float  # 0 at the mediastinum, 1 at the chest wall
    down: float  # 0 at the apex, 1 at the diaphragm
    size: float  # radius
    opacity: float  # from 0, invisible, to 1, the densest of its kind
    aspect: float  # stretches the first axis and shortens the second
    angle: float  # radians
    edge: float  # half-width of the soft edge, in radii
    ragged: float  # how far the outline wanders, in radii
    patchy: float  # how much thinner it is in patches
    fissure: float  # a straight upper border at this height, in radii (-2: none)
    noise: int  # seed of the outline and the patches

    @classmethod
    def draw(cls, rng: np.random.Generator, opacity: float) -> "Lesion":
        """A lesion at a random place in the lungs, more often low and near the chest wall."""
        dense = rng.random() < 0.5
        lobar = dense and rng.random() < 0.4
        return cls(
            kind=KINDS[int(dense)],
            side=int(rng.choice((-1, 1))),
            across=float(0.15 + 0.7 * rng.beta(2.0, 1.5)),
            down=float(0.15 + 0.8 * rng.beta(2.2, 1.3)),
            size=float(rng.uniform(0.11, 0.25) if dense else rng.uniform(0.13, 0.28)),
            opacity=opacity,
            aspect=float(rng.uniform(0.8, 1.3)),
            angle=float(rng.uniform(-0.6, 0.6)),
            edge=float(rng.uniform(0.25, 0.5) if dense else rng.uniform(0.5, 0.8)),
            ragged=float(rng.uniform(0.2, 0.4)),
            patchy=float(rng.uniform(0.1, 0.3) if dense else rng.uniform(0.3, 0.6)),
            fissure=float(rng.uniform(-0.7, -0.2) if lobar else -2.0),
            noise=int(rng.integers(2**31)),
        )


class Phantom(NamedTuple):
    """One rendered phantom with its masks; all arrays are [R, R]."""

    image: np.ndarray  # uint8
    lesion: np.ndarray  # bool: the lung inside a lesion's outline, see `render`
    lung: np.ndarray  # bool: at least half of the pixel is lung
    marker: np.ndarray  # bool: the marker covers at least a quarter of the pixel
    burden: float  # how diseased it is: the share of the lungs' air that the lesions displace


def _check_size(size: int) -> None:
    if size not in SIZES:
        raise UsageError(f"phantoms come in sizes {', '.join(map(str, SIZES))}, not {size}")


def _working_size(size: int) -> int:
    return max(2 * size, 128)


def _extent(lesion: Lesion, s: Structure, anatomy: Anatomy) -> tuple[np.ndarray, np.ndarray]:
    """How much each pixel belongs to the lesion [n, n], and the same with the lesion's patches.

    Both are at most 1, and exactly 0 away from the lesion.
    """
    rng = np.random.default_rng(lesion.noise)
    n = len(anatomy.x)
    cx, cy = s.place(lesion.side, lesion.across, lesion.down)
    dx, dy = (anatomy.x - cx) / lesion.size, (anatomy.y - cy) / lesion.size
    cos, sin = np.cos(lesion.angle), np.sin(lesion.angle)
    along, athwart = cos * dx + sin * dy, cos * dy - sin * dx
    reach = np.hypot(along / lesion.aspect, athwart * lesion.aspect)
    outline = np.tanh(0.6 * clouds(rng, n, 14) + 0.5 * clouds(rng, n, 34))
    extent = ramp((1 + lesion.edge - reach - lesion.ragged * outline) / (2 * lesion.edge))
    extent = extent * ramp((athwart - lesion.fissure) / 0.3) * (anatomy.x * lesion.side > 0)
    patches = clouds(rng, n, 14) + 0.6 * clouds(rng, n, 40)
    return extent, extent * (1 - lesion.patchy * ramp(0.5 + 0.4 * patches))


def render(s: Structure, lesions: tuple[Lesion, ...], size: int, marker: bool = False) -> Phantom:
    """Render a chest with its lesions.

    The lesion mask is the lung inside the outline of any lesion, where the soft edge is above one
    half. It depends neither on the opacity nor on the film. A faint change reaches beyond the mask,
    by at most the half-width of the edge. A lesion of opacity 0 changes nothing, and more opacity
    never makes a pixel darker.

    size: 32, 64, 128 or 256. Raises UsageError for another size.
    """
    _check_size(size)
    n = _working_size(size)
    anatomy = anatomy_of(s, n)
    left, mask = np.ones((n, n), np.float32), np.zeros((n, n), bool)
    for lesion in lesions:
        extent, profile = _extent(lesion, s, anatomy)
        left = left * (1 - lesion.opacity * DENSITY[lesion.kind] * profile)
        mask |= (extent > 0.5) & (anatomy.air > 0)
    lead = letter(s, n) if marker else np.zeros((n, n), np.float32)
    return Phantom(
        image=film(s, anatomy.water - AIR * anatomy.air * left + 4 * lead, size),
        lesion=shrink(mask, size) >= 0.5,
        lung=shrink(anatomy.air > 0, size) >= 0.5,
        marker=shrink(lead, size) >= 0.25,
        burden=float((anatomy.air * (1 - left)).sum() / anatomy.air.sum()),
    )


# ---------------------------------------------------------------------------------------------
# Samples: the numbered phantoms of a seed, and the folder that holds them


@dataclass(frozen=True)
class Sample:
    """All that determines one phantom before it is rendered."""

    index: int
    size: int
    structure: Structure
    lesions: tuple[Lesion, ...]  # empty for a healthy chest
    marker: bool

    @property
    def name(self) -> str:
        return f"phantom_{self.index:05d}"

    @property
    def label(self) -> str:
        return CLASSES[bool(self.lesions)]

    def render(self, lesions: bool = True, marker: bool = True) -> Phantom:
        """The rendered phantom. Without `lesions` it is the healthy twin; without `marker` it has
        no marker."""
        shown = self.lesions if lesions else ()
        return render(self.structure, shown, self.size, marker and self.marker)

    def row(self) -> dict[str, object]:
        """Its line of truth.csv without `burden`. `from_row` reads it back exactly."""
        path = f"images/{self.label}/{self.name}.png"
        return {
            "path": path,
            "label": self.label,
            "patient": f"document:{self.name}",  # as cxr.data.patients tells it
            "index": self.index,
            "size": self.size,
            "marker": "yes" if self.marker else "no",
            "count": len(self.lesions),
            "opacity": self.lesions[0].opacity if self.lesions else 0.0,
            "lesions": json.dumps([asdict(lesion) for lesion in self.lesions]),
            **asdict(self.structure),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> "Sample":
        """The sample in a line of truth.csv, as `csv.DictReader` reads it."""
        return cls(
            index=int(row["index"]),
            size=int(row["size"]),
            structure=Structure(**{f.name: f.type(row[f.name]) for f in fields(Structure)}),
            lesions=tuple(Lesion(**lesion) for lesion in json.loads(row["lesions"])),
            marker=row["marker"] == "yes",
        )


def phantom(index: int, seed: int, size: int, shortcut: float | None = None) -> Sample:
    """Sample number `index` (from 1) of a seed. Odd numbers are healthy, even numbers diseased.

    A diseased sample has 1 to 4 lesions of one opacity between 0.2 and 1. The marker agrees with
    the label with probability `shortcut` (None: there is no marker). Structure and lesions depend
    on neither `shortcut` nor `size`.
    """
    diseased = index % 2 == 0
    structure = Structure.draw(np.random.default_rng((seed, index, 0)))
    rng = np.random.default_rng((seed, index, 1))
    opacity = float(rng.uniform(0.2, 1.0))
    count = int(rng.integers(1, 5)) if diseased else 0
    lesions = tuple(Lesion.draw(rng, opacity) for _ in range(count))
    agrees = shortcut is not None and np.random.default_rng((seed, index, 2)).random() < shortcut
    return Sample(index, size, structure, lesions, shortcut is not None and agrees == diseased)


def write(
    out: str | Path, images: int, size: int, seed: int, shortcut: float | None = None
) -> None:
    """Write a data set of `images` phantoms with their truth into the folder `out`.

    OUT/images/{NORMAL,DISEASE}/NAME.png: the images for training. OUT/twins: each diseased image
    without its lesions. OUT/masks, OUT/lungs, OUT/markers: masks that are white on the lesions (of
    diseased images), the lungs (of all), and the marker (if there is one). OUT/truth.csv: a line
    for each image; `train-cnn` takes this file, too.

    Raises UsageError if `out` is not empty or a number is out of range, and CxrError if the folder
    cannot be written.
    """
    out = Path(out)
    _check(out, images, size, seed, shortcut)
    folders = [*(f"images/{label}" for label in CLASSES), "twins", "masks", "lungs", "markers"]
    try:
        for folder in folders:
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CxrError(f"{out}: cannot be made: {error.strerror}") from error
    rows = []
    with console.progress("phantoms", images) as bar:
        for index in range(1, images + 1):
            sample = phantom(index, seed, size, shortcut)
            rows.append({**sample.row(), "burden": _write_sample(out, sample).burden})
            bar.advance()
    with replacing(out / "truth.csv") as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def _check(out: Path, images: int, size: int, seed: int, shortcut: float | None) -> None:
    if images < 2:
        raise UsageError(f"--images {images}: at least 2 are needed, one of each class")
    _check_size(size)
    if seed < 0:
        raise UsageError(f"--seed {seed}: must be 0 or more")
    if shortcut is not None and not 0 <= shortcut <= 1:
        raise UsageError(f"--shortcut {shortcut}: must be a probability, from 0 to 1")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder that is new or empty")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; name a folder that is new or empty")


def _write_sample(out: Path, sample: Sample) -> Phantom:
    shown = sample.render()
    name = f"{sample.name}.png"
    write_png(out / "images" / sample.label / name, shown.image)
    write_png(out / "lungs" / name, shown.lung * np.uint8(255))
    if sample.lesions:
        write_png(out / "twins" / name, sample.render(lesions=False).image)
        write_png(out / "masks" / name, shown.lesion * np.uint8(255))
    if sample.marker:
        write_png(out / "markers" / name, shown.marker * np.uint8(255))
    return shown
