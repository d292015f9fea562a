"""What a data set holds, before a pixel is decoded: images, their class, patient and split."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cxr import CxrError, UsageError, console
from cxr.data import dicom, patients
from cxr.data.folders import DICOM, SUFFIXES, is_image, scan
from cxr.data.patients import SPLIT_RULE, SPLITS, split_of
from cxr.data.spreadsheet import GROUPS, SPLIT_NAMES, Reading, Row, read_table

NEGATIVE_NAMES = {"normal", "negative", "nofinding", "healthy", "control", "0"}
LONGEST = 60  # characters of several classes' names together


class Item(NamedTuple):
    path: str
    label: int  # the class's place
    patient: str
    split: str
    source: str | None = None
    scanner: str | None = None


@dataclass(frozen=True)
class Listing:
    """items: one per image; classes: the healthy and the diseased one's name, or each one's; rule:
    how the splits were made."""

    items: list[Item]
    classes: tuple[str, ...]
    rule: str


def list_data(data: Path, reading: Reading, fold: int = 0) -> Listing:
    """List a folder with one sub-folder per class (or per split, with the classes within), or a
    table; say how the patients were told, and what is left out.

    Raises UsageError if DATA does not exist or an option has to say how to read it, CxrError if it
    is malformed or holds fewer than two classes.
    """
    if data.is_dir():
        if columns := [name for name in reading.asked() if name.endswith("_column")]:
            option = "--" + columns[0].replace("_", "-")
            raise UsageError(f"{option} is of a table, and {data} is a folder: leave it out")
        rows, names = _folder_rows(data)
    elif data.is_file():
        rows = _split_by_path(read_table(data, reading))
        names = [_bare(row) for row in rows]
    else:
        raise UsageError(f"{data}: no such folder or CSV file")
    if reading.patient_pattern and reading.patient_column:
        raise UsageError("--patient-column and --patient-pattern both name the patient: give one")
    rows = _one_case(data, rows)
    classes, labels = _classify(data, rows, reading)
    told = patients.tell_patients(  # of all rows: leaving a class out moves nobody
        names,
        [row.name for row in rows],
        None if reading.patient_pattern else [row.told for row in rows],
        reading.patient_pattern,
        lambda place: _patient_id(rows[place].path),
    )
    kept = [place for place, label in enumerate(labels) if label is not None]
    rows, names, told = ([values[place] for place in kept] for values in (rows, names, told))
    patients.report(names, told)
    splits, rule = _splits(data, rows, [t.patient for t in told], fold)
    items = [
        Item(row.path, labels[place], t.patient, split, row.source, row.scanner)
        for row, place, t, split in zip(rows, kept, told, splits)
    ]
    if reading.leave_out:
        items, rule = (
            _leave_out(data, items, reading.leave_out),
            f"{rule}; {reading.leave_out}: test",
        )
    return Listing(items, classes, rule)


def _leave_out(data: Path, items: list[Item], what: str) -> list[Item]:
    """The items, with all patients of a source or a scanner (`source=NAME`) in the test split."""
    kind, _, name = what.partition("=")
    if kind not in GROUPS or not name:
        raise UsageError(f"--leave-out {what}: say source=NAME or scanner=NAME")
    counts = Counter(value for item in items if (value := getattr(item, kind)))
    if not counts:
        raise UsageError(f"--leave-out {what}: {data} has no column {kind}")
    if name not in counts:
        raise UsageError(f"--leave-out {what}: {data} has no such {kind}; {_have(counts)}")
    patients = {item.patient for item in items if getattr(item, kind) == name}
    left = [item for item in items if item.patient in patients]
    console.say(
        f"{data}: the {len(left):,} images of the {len(patients):,} patients of {kind} {name} are "
        "left out of the training, and in the test split"
    )
    return [i._replace(split="test") if i.patient in patients else i for i in items]


def _patient_id(path: str) -> str | None:
    """The PatientID of a DICOM file, None for other files."""
    picture = path.lower().endswith(SUFFIXES[: -len(DICOM)])
    if picture or not os.path.isfile(path) or not is_image(path):
        return None
    with suppress(CxrError, OSError):  # what cannot be read is told when it is decoded
        return dicom.patient_id(Path(path))


def _bare(row: Row) -> str:
    """A table's path without folders that are called like a split or like the image's class."""
    *folders, file = row.name.split("/")
    drop = {name.lower() for name in row.findings or ()} | SPLIT_NAMES.keys()
    return "/".join([*(f for f in folders if f.lower() not in drop), file])


# Folders


def _folder_rows(data: Path) -> tuple[list[Row], list[str]]:
    """The images below each class's folder, and their names without class and split."""
    found = scan(data)
    parts = [file.relative_to(data).parts for file in found.files]
    split_at = _split_level(parts)
    level = 1 if split_at == 0 else 0  # of the class's folder
    rows, names = [], []
    for file, part in zip(found.files, parts):
        deep = len(part) > max(level, split_at or 0) + 1
        split = SPLIT_NAMES.get(part[split_at].lower()) if deep and split_at is not None else None
        if not deep or (split_at is not None and split is None):
            found.left_out["images outside the folders of the classes"] += 1
            continue
        rest = [p for place, p in enumerate(part) if place not in (level, split_at)]
        rows.append(Row("/".join(part), str(file), frozenset([part[level]]), None, split))
        names.append("/".join(rest))
    found.report(data)
    return rows, names


def _split_level(parts: Sequence[tuple[str, ...]]) -> int | None:
    """Where in the paths the ready-made split is: 0 in train/NORMAL, 1 in NORMAL/train; None if
    there are not two of them."""
    for level in (0, 1):
        folders = {part[level].lower() for part in parts if len(part) > level + 1}
        splits = {SPLIT_NAMES.get(name) for name in folders} - {None}
        if len(splits) > 1 and (level == 0 or None not in map(SPLIT_NAMES.get, folders)):
            return level
    return None


def _split_by_path(rows: Sequence[Row]) -> list[Row]:
    """A table's rows, with the split that all of their paths name at one place, if they do."""
    if any(row.split for row in rows):
        return list(rows)
    parts = [[SPLIT_NAMES.get(part.lower()) for part in row.name.split("/")[:-1]] for row in rows]
    for level in range(min(map(len, parts), default=0)):
        splits = [part[level] for part in parts]
        if None not in splits and len(set(splits)) > 1:
            return [row._replace(split=split) for row, split in zip(rows, splits)]
    return list(rows)


# Classes


def _classify(
    data: Path, rows: Sequence[Row], reading: Reading
) -> tuple[tuple[str, ...], list[int | None]]:
    """The names of the classes, and each row's label: of two, 1 is diseased, 0 healthy; None is left
    out."""
    counts = Counter(name for row in rows for name in row.findings or ())
    if reading.classes == "many":
        return _each_class(data, rows, reading, counts)
    positive, negative = (_known(data, reading, o, counts) for o in ("positive", "negative"))
    if positive is None and negative is None:
        negative, positive = _two_classes(data, rows, counts)
    elif positive is not None and positive == negative:
        raise UsageError(f"--positive and --negative are both {positive}")
    labels = [_label(row.findings, positive, negative) for row in rows]
    _report_left_out(data, rows, labels)
    missing = [name for label, name in ((0, negative), (1, positive)) if label not in labels]
    if missing:
        kind = "healthy" if 0 not in labels else "diseased"
        raise CxrError(f"{data}: two classes are needed, and no image is {kind}; {_have(counts)}")
    used = {name for row, l in zip(rows, labels) if l == 0 for name in row.findings}
    negative = negative or joined(used, f"no {positive}")
    used = {name for row, l in zip(rows, labels) if l == 1 for name in row.findings} - {negative}
    return (negative, positive or joined(used, f"not {negative}")), labels


def _one_case(data: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows, with classes that differ in case alone called as most of their images are, which is
    said."""
    counts = Counter(name for row in rows for name in row.findings or ())
    spelt: dict[str, list[str]] = defaultdict(list)
    for name, _ in counts.most_common():
        spelt[name.casefold()].append(name)
    alike = [names for names in spelt.values() if len(names) > 1]
    for names in alike:
        told = _counted(Counter({name: counts[name] for name in names}))
        console.warn(f"{data}: {told} differ in case alone: taken for one class, {names[0]}")
    called = {name: names[0] for names in alike for name in names}
    return [
        row._replace(findings=row.findings and frozenset(called.get(n, n) for n in row.findings))
        for row in rows
    ]


def _known(data: Path, reading: Reading, option: str, counts: Counter[str]) -> str | None:
    name = getattr(reading, option)
    if name is None or name in counts:
        return name
    alike = [known for known in counts if known.casefold() == name.casefold()]
    if not alike:
        raise UsageError(f"--{option} {name}: {data} has no such class; {_have(counts)}")
    return alike[0]


def _two_classes(data: Path, rows: Sequence[Row], counts: Counter[str]) -> tuple[str, str]:
    """The healthy and the diseased class where there are just two."""
    if len(counts) < 2:
        raise CxrError(
            f"{data}: two classes are needed; {_have(counts)}; expected is a sub-folder for each "
            "class, or a table with a column of paths and one of labels"
        )
    if len(counts) > 2:
        raise UsageError(
            f"{data} has {len(counts):,} classes: {_counted(counts)}; say --negative CLASS for the "
            "healthy one against all others, --positive CLASS for the diseased one, or train a "
            "classifier of them all with `train-cnn --classes many`"
        )
    if both := next((row.name for row in rows if len(row.findings or ()) > 1), None):
        raise CxrError(f"{data}: {both} is of both classes, {' and '.join(sorted(counts))}")
    healthy = [name for name in counts if sounds_healthy(name)]
    if len(healthy) != 1:
        raise UsageError(f"{data}: which class is healthy? Say --negative CLASS; {_have(counts)}")
    return healthy[0], next(name for name in counts if name != healthy[0])


def _each_class(
    data: Path, rows: Sequence[Row], reading: Reading, counts: Counter[str]
) -> tuple[tuple[str, ...], list[int | None]]:
    """All classes, one that sounds healthy first, and each row's."""
    if reading.negative or reading.positive:
        raise UsageError(
            "--classes many takes each class for itself: leave --negative and --positive out"
        )
    if len(counts) < 3:
        raise UsageError(f"--classes many: {data} does not hold three classes; {_have(counts)}")
    told = [row for row in rows if row.findings is not None]
    if both := next((row for row in told if len(row.findings) != 1), None):
        shows = " and ".join(sorted(both.findings)) or "no class"
        raise CxrError(
            f"{data}: {both.name} is of {shows}; --classes many needs one for each image"
        )
    names = sorted(counts, key=lambda name: (not sounds_healthy(name), name))
    labels = [None if row.findings is None else names.index(*row.findings) for row in rows]
    _report_left_out(data, rows, labels)
    return tuple(names), labels


def sounds_healthy(name: str) -> bool:
    """Whether a class of this name is of healthy images."""
    return re.sub(r"[\W_]", "", name).lower() in NEGATIVE_NAMES


def _label(findings: frozenset[str] | None, positive: str | None, negative: str | None):
    if findings is None:
        return None
    if positive is None:
        return int(findings != {negative})
    if positive in findings:
        return 1
    return 0 if negative is None or negative in findings else None


def _report_left_out(data: Path, rows: Sequence[Row], labels: Sequence[int | None]) -> None:
    uncertain = sum(row.findings is None for row in rows)
    others = Counter(
        "+".join(sorted(row.findings)) or "none of the findings"
        for row, label in zip(rows, labels)
        if label is None and row.findings is not None
    )
    if uncertain:
        console.say(
            f"{data}: left out {uncertain:,} images whose label is uncertain (-1, NA or empty)"
        )
    if others:
        console.say(
            f"{data}: left out {others.total():,} images of other classes: {_counted(others)}"
        )


def _have(counts: Counter[str]) -> str:
    return f"there are {_counted(counts)}" if counts else "there are none"


def _counted(counts: Counter[str]) -> str:
    return console.listed([f"{name[:60]} ({n:,})" for name, n in counts.most_common()])


def joined(names: set[str], short: str) -> str:
    """The names with `+` between them, or what is short."""
    whole = "+".join(sorted(names))
    return whole if 0 < len(whole) <= LONGEST else short


# Splits


def _splits(
    data: Path, rows: Sequence[Row], told: Sequence[str], fold: int
) -> tuple[list[str], str]:
    """Each row's split and how it was made: ready, or by the rule. A ready-made set without
    validation or test patients has them drawn by the rule out of the training patients."""
    drawn = [split_of(patient, fold) for patient in told]
    there = {row.split for row in rows} - {None}
    if not there:
        return drawn, SPLIT_RULE
    lacking = [split for split in SPLITS if split not in there]
    if fold and not lacking:
        raise UsageError(f"--fold {fold}: {data} comes with its own splits; leave --fold out")
    splits = [
        d if row.split == "train" and d in lacking else row.split for row, d in zip(rows, drawn)
    ]
    counts = Counter(splits)
    console.say(
        f"{data} comes with its own splits: {', '.join(f'{s} {counts[s]:,}' for s in SPLITS)}"
        + (f" ({' and '.join(lacking)} drawn by patient out of train)" if lacking else "")
    )
    _warn_of_shared(told, splits)
    return splits, "as the data came" + (
        f"; {' and '.join(lacking)}: {SPLIT_RULE}" if lacking else ""
    )


def _warn_of_shared(told: Sequence[str], splits: Sequence[str]) -> None:
    places = defaultdict(set)
    for patient, split in zip(told, splits):
        places[patient].add(split)
    shared = [patient for patient, found in places.items() if len(found) > 1]
    if shared:
        where = " and ".join(s for s in SPLITS if s in places[shared[0]])
        console.warn(
            f"{len(shared):,} patients stand in two splits (the first: "
            f"{shared[0].replace(':', '')}, in {where}): figures will be too good"
        )
