"""Labelled folders or a CSV of X-rays -> packed arrays, patient-wise splits, balanced batches."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxr import CxrError, UsageError, cache, console, images
from cxr.patients import SPLITS, patient_of, split_of

PATIENT_COLUMNS = {"patient", "patientid", "patientkey", "subject", "subjectid", "sub"}
NEGATIVE_NAMES = {"normal", "negative", "nofinding", "healthy", "control", "0"}


@dataclass(frozen=True)
class Pictures:
    """The images of some rows, which are read when a slice of them is asked for."""

    images: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.images[self.rows[part]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images of two classes, decoded and split by patient; row i is the same image throughout.

    images: uint8 [N, R, R], read-only and memory-mapped; labels: int64 [N], 1 is positive;
    patients, splits ("train", "val" or "test") and paths: one per image; classes: the negative
    and the positive class, the latter joined by "+" where there are several; name: for tables.
    """

    images: np.ndarray
    labels: np.ndarray
    patients: tuple[str, ...]
    splits: np.ndarray
    paths: tuple[str, ...]
    classes: tuple[str, str]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def by_class(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows (int64) of the negative and of the positive images in `split`, or in "all".

        Raises UsageError for an unknown split, CxrError if a class has no image in this one.
        """
        if split not in (*SPLITS, "all"):
            raise UsageError(f"no split {split!r}: use train, val, test or all")
        inside = np.full(len(self), True) if split == "all" else self.splits == split
        negative, positive = (np.flatnonzero(inside & (self.labels == c)) for c in (0, 1))
        for label, rows in enumerate((negative, positive)):
            if not len(rows):
                raise CxrError(self._lacks(label, split))
        return negative, positive

    def pictures(self, split: str) -> Pictures:
        """The images of `split`, or of "all"."""
        return Pictures(self.images, self.rows(split))

    def rows(self, split: str) -> np.ndarray:
        """Rows (int64, ascending) of `split`, or of "all"; raises what `by_class` raises."""
        return np.sort(np.concatenate(self.by_class(split)))

    def counts(self) -> dict[str, tuple[int, int]]:
        """The number of (negative, positive) images in each split."""
        return {
            split: tuple(int(np.sum((self.splits == split) & (self.labels == c))) for c in (0, 1))
            for split in SPLITS
        }

    def _lacks(self, label: int, split: str) -> str:
        own = np.flatnonzero(self.labels == label)
        patients = len({self.patients[row] for row in own})
        return (
            f"{self.name}: none of the {len(own)} images ({patients} patients) of class "
            f"{self.classes[label]} falls into the {split} split; add patients, or say with "
            "--patient-pattern where a name holds the patient"
        )


def open_dataset(
    data: str | Path,
    size: int,
    fit: str = "crop",
    negative: str | None = None,
    patient_pattern: str | None = None,
    fold: int = 0,
) -> Dataset:
    """Open a folder with one sub-folder per class, or a CSV with columns path,label[,patient].

    Images are decoded once, to `size` x `size` pixels by `images.load(path, size, fit)`, into a
    cache. `negative` names the healthy class against all the rest; by default it is known by its
    name (NORMAL, no_finding, healthy...). For `patient_pattern` see `patient_of`; a patient named
    in the CSV goes first. `fold` is of `split_of`. Unreadable images are counted and left out with a warning.

    Raises UsageError if DATA does not exist, the negative class cannot be told or the pattern is
    unfit; CxrError if the CSV is malformed, there are fewer than two classes, or one is left empty.
    """
    data = Path(data)
    if data.is_dir():
        items = list(_folder_items(data, patient_pattern))
    elif data.is_file():
        items = list(_csv_items(data, patient_pattern))
    else:
        raise UsageError(f"{data}: no such folder or CSV file")
    classes = sorted({item.label for item in items})
    if len(classes) < 2:
        raise CxrError(
            f"{data}: two classes are needed, images of {len(classes)} found ({', '.join(classes)})"
            "; expected is a sub-folder for each class, or a CSV of path,label"
        )
    healthy = _negative_class(classes, negative)
    pixels, bad = cache.packed([item.path for item in items], size, fit)
    _report_bad(items, bad, classes)
    items = [item for row, item in enumerate(items) if row not in bad]
    patients = tuple(item.patient for item in items)
    return Dataset(
        images=pixels,
        labels=np.array([item.label != healthy for item in items], dtype=np.int64),
        patients=patients,
        splits=np.array([split_of(patient, fold) for patient in patients]),
        paths=tuple(item.path for item in items),
        classes=(healthy, "+".join(name for name in classes if name != healthy)),
        name=data.stem,
    )


def balanced_batch(
    rows_by_class: tuple[np.ndarray, np.ndarray], batch: int, seed: int, step: int
) -> np.ndarray:
    """Rows of one training batch, half from each class, shuffled: int64 [batch].

    A pure function of its arguments, so that a resumed run needs no sampler state. Each class is
    drawn without replacement, in an order that is new on every pass through it. Of an odd batch,
    the classes have the larger half in turn.
    """
    half, odd = divmod(batch, 2)
    drawn = []
    for label, rows in enumerate(rows_by_class):
        first, last = (half * s + odd * ((s + 1 - label) // 2) for s in (step, step + 1))
        passes, places = np.divmod(np.arange(first, last), len(rows))
        for number in np.unique(passes):
            order = np.random.default_rng((seed, label, int(number))).permutation(rows)
            drawn.append(order[places[passes == number]])
    return np.random.default_rng((seed, 2, step)).permutation(np.concatenate(drawn))


class _Item(NamedTuple):
    path: str
    label: str
    patient: str


def _folder_items(data: Path, pattern: str | None) -> Iterator[_Item]:
    """Every image below each class's folder, in an order that no file system decides."""
    for folder in sorted(data.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            found = images.find_images(folder)
        except CxrError:  # notes or leftovers: no class
            continue
        for path in found:
            yield _Item(str(path), folder.name, patient_of(path.relative_to(data), pattern))


def _csv_items(table: Path, pattern: str | None) -> Iterator[_Item]:
    seen = set()
    for number, line in _csv_lines(table):
        name, label = line["path"], line["label"]
        if not name or not label:
            raise CxrError(f"{table}, line {number}: path and label must both be filled in")
        if name in seen:
            raise CxrError(f"{table}, line {number}: {name} is listed twice; keep one of the lines")
        seen.add(name)
        patient = line.get("patient") or patient_of(name, pattern)
        yield _Item(str(table.parent / name), label, patient)


def _csv_lines(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: value}) for each line below the header, stripped of blanks."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [_column(name) for name in next(reader, [])]
            if missing := [name for name in ("path", "label") if name not in header]:
                raise CxrError(
                    f"{table}: the first line lacks the column {' and '.join(missing)}; it must "
                    f"read path,label[,patient], and reads {','.join(header)[:80] or '(nothing)'}"
                )
            for line in filter(None, reader):
                cells = [cell.strip() for cell in line] + [""] * (len(header) - len(line))
                yield reader.line_num, dict(zip(header, cells))
    except (csv.Error, UnicodeDecodeError) as error:
        raise CxrError(f"{table}: not a CSV file in UTF-8 ({error})") from None


def _column(name: str) -> str:
    """A column's name as we call it: `patient` under its usual names, others in small letters."""
    name = name.strip().lower()
    return "patient" if re.sub(r"[\W_]", "", name) in PATIENT_COLUMNS else name


def _negative_class(classes: Sequence[str], negative: str | None) -> str:
    listed = ", ".join(classes)
    if negative is not None:
        if negative not in classes:
            raise UsageError(f"--negative {negative}: no such class; there are {listed}")
        return negative
    known = [name for name in classes if re.sub(r"[\W_]", "", name).lower() in NEGATIVE_NAMES]
    if len(known) != 1:
        raise UsageError(f"which class is healthy? Say --negative CLASS, one of: {listed}")
    return known[0]


def _report_bad(items: Sequence[_Item], bad: dict[int, str], classes: Sequence[str]) -> None:
    if not bad:
        return
    first = ", ".join(items[row].path for row in list(bad)[:10])
    more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
    console.warn(
        f"{len(bad)} of {len(items)} images cannot be read and are left out: {first}{more} "
        f"(the first: {next(iter(bad.values()))})"
    )
    left = {item.label for row, item in enumerate(items) if row not in bad}
    if empty := [name for name in classes if name not in left]:
        raise CxrError(f"no readable image is left of class {', '.join(empty)}")
