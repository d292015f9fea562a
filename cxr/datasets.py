"""Labelled folders or tables of X-rays -> packed arrays, patient-wise splits, balanced batches."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cxr import CxrError, UsageError, console
from cxr.data import cache
from cxr.data.listing import Item, list_data
from cxr.data.patients import SPLIT_RULE, SPLITS
from cxr.data.spreadsheet import Reading


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
    """Images of two classes or more, decoded and split by patient; row i is the same image
    throughout.

    images: uint8 [N, R, R], read-only and memory-mapped; labels: int64 [N], places in `classes`;
    patients, splits ("train", "val" or "test") and paths: one per image; classes: of two the
    negative comes first; name: for tables; rule: how the splits were made; unreadable: {path:
    reason} of the images that are not among these; sources, scanners: one per image, None where the
    data do not say it.
    """

    images: np.ndarray
    labels: np.ndarray
    patients: tuple[str, ...]
    splits: np.ndarray
    paths: tuple[str, ...]
    classes: tuple[str, ...]
    name: str
    rule: str = SPLIT_RULE
    unreadable: dict[str, str] = field(default_factory=dict)
    sources: tuple[str | None, ...] = ()
    scanners: tuple[str | None, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def by_class(self, split: str) -> tuple[np.ndarray, ...]:
        """Rows (int64) of each class's images in `split`, or in "all".

        Raises UsageError for an unknown split, CxrError if a class has no image in this one.
        """
        if split not in (*SPLITS, "all"):
            raise UsageError(f"no split {split!r}: use train, val, test or all")
        inside = np.full(len(self), True) if split == "all" else self.splits == split
        places = range(len(self.classes))
        found = tuple(np.flatnonzero(inside & (self.labels == place)) for place in places)
        for label, rows in enumerate(found):
            if not len(rows):
                raise CxrError(self._lacks(label, split))
        return found

    def pictures(self, split: str) -> Pictures:
        """The images of `split`, or of "all"."""
        return Pictures(self.images, self.rows(split))

    def rows(self, split: str) -> np.ndarray:
        """Rows (int64, ascending) of `split`, or of "all"; raises what `by_class` raises."""
        return np.sort(np.concatenate(self.by_class(split)))

    def counts(self) -> dict[str, tuple[int, ...]]:
        """The number of each class's images in each split."""
        places = range(len(self.classes))
        return {
            split: tuple(int(np.sum(self.labels[self.splits == split] == p)) for p in places)
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
    data: str | Path, size: int, fit: str = "crop", fold: int = 0, **reading: str | None
) -> Dataset:
    """Open a folder with one sub-folder per class, or a table with a column of paths and one of
    labels.

    Images are decoded once, to `size` x `size` pixels by `images.load(path, size, fit)`, into a
    cache. `fold` is of `split_of`; `reading` has the fields of `Reading`, such as `negative`, the
    healthy class. What is left out, how the patients were told, and images that stand in two
    classes or splits are said.

    Raises UsageError if DATA does not exist or an option has to say how to read it; CxrError if it
    is malformed, there are fewer than two classes, or one is left without a readable image.
    """
    listing = list_data(Path(data), Reading(**reading), fold)
    items = listing.items
    pixels, bad = cache.packed([item.path for item in items], size, fit)
    _report_bad(items, bad, listing.classes)
    unreadable = {items[row].path: reason for row, reason in bad.items()}
    items = [item for row, item in enumerate(items) if row not in bad]
    dataset = Dataset(
        images=pixels,
        labels=np.array([item.label for item in items], dtype=np.int64),
        patients=tuple(item.patient for item in items),
        splits=np.array([item.split for item in items]),
        paths=tuple(item.path for item in items),
        classes=listing.classes,
        name=name_of(data),
        rule=listing.rule,
        unreadable=unreadable,
        sources=tuple(item.source for item in items),
        scanners=tuple(item.scanner for item in items),
    )
    _report_twins(dataset)
    return dataset


def name_of(data: str | Path) -> str:
    """The name of a data set: of its folder, or of its table without the suffix."""
    path = Path(os.path.abspath(data))  # of "." and ".." too
    return path.name if path.is_dir() else path.stem


def left_out(info: dict, data: str | Path) -> dict[str, str]:
    """The option `leave_out` with which a model was trained, which is said, where DATA is called as
    its data set was. info: of the model."""
    told = info.get("leave_out")
    name = name_of(data)
    if not told or info["provenance"].get("data") not in (name, Path(name).stem):  # older models'
        return {}
    console.say(f'--leave-out {told}, as in the training of the model; --leave-out "" leaves none')
    return {"leave_out": told}


def balanced_batch(
    rows_by_class: tuple[np.ndarray, ...], batch: int, seed: int, step: int
) -> np.ndarray:
    """Rows of one training batch, as many from each class, shuffled: int64 [batch].

    A pure function of its arguments, so that a resumed run needs no sampler state. Each class is
    drawn without replacement, in an order that is new on every pass through it. Where the classes
    cannot share a batch evenly, they have the larger parts in turn.
    """
    drawn, count = [], len(rows_by_class)
    for label, rows in enumerate(rows_by_class):
        first, last = ((batch * s + count - 1 - label) // count for s in (step, step + 1))
        passes, places = np.divmod(np.arange(first, last), len(rows))
        for number in np.unique(passes):
            order = np.random.default_rng((seed, label, int(number))).permutation(rows)
            drawn.append(order[places[passes == number]])
    return np.random.default_rng((seed, count, step)).permutation(np.concatenate(drawn))


def _report_bad(items: Sequence[Item], bad: dict[int, str], classes: Sequence[str]) -> None:
    if not bad:
        return
    first = ", ".join(items[row].path for row in list(bad)[:10])
    more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
    console.warn(
        f"{len(bad)} of {len(items)} images cannot be read and are left out: {first}{more} "
        f"(the first: {next(iter(bad.values()))})"
    )
    left = {item.label for row, item in enumerate(items) if row not in bad}
    if empty := [name for label, name in enumerate(classes) if label not in left]:
        raise CxrError(f"no readable image is left of class {', '.join(empty)}")


def twins(dataset: Dataset) -> list[list[int]]:
    """Groups of rows whose pictures are identical, to the pixel."""
    rows = defaultdict(list)
    for row, image in enumerate(dataset.images):
        rows[hashlib.blake2b(np.ascontiguousarray(image), digest_size=16).digest()].append(row)
    return [group for group in rows.values() if len(group) > 1]


def _report_twins(dataset: Dataset) -> None:
    """Warn of identical pictures that stand in two classes or two splits."""
    groups = twins(dataset)
    for what, values in (("classes", dataset.labels), ("splits", dataset.splits)):
        apart = [group for group in groups if len({values[row] for row in group}) > 1]
        if apart:
            a = apart[0][0]
            b = next(row for row in apart[0] if values[row] != values[a])
            console.warn(
                f"{len(apart):,} identical pictures stand in two {what}: the first are "
                f"{dataset.paths[a]} and {dataset.paths[b]}"
            )
