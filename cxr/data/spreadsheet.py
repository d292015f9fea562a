"""Tables of images as public sets and spreadsheets ship them: which column is which, which file a
line names, and what it says of the image."""

import codecs
import csv
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from cxr import CxrError, UsageError, console
from cxr.data.folders import scan
from cxr.data.patients import SPLITS, Told

# A column's usual names, in small letters without blanks and signs; a later group is looked at only
# if no name of an earlier one is there.
COLUMNS = {
    "path": (
        ("path",),
        ("filepath", "filename", "file", "imagepath", "imageindex", "imageid", "image", "imagename",
         "imagefile", "imgpath", "img", "xrayimagename", "dicomid", "dicompath", "pngpath"),
        ("id", "sopinstanceuid"),
    ),
    "label": (
        ("label",),
        ("labels", "findinglabels", "finding", "findings", "target", "class", "classname",
         "diagnosis", "category", "disease"),
    ),
    "patient": (
        ("patient",),
        ("patientid", "patientkey", "subject", "subjectid", "sub"),
    ),
    "split": (("split",), ("subset", "partition", "datasettype")),
    "source": (("source",),),
    "scanner": (("scanner",),),
}  # fmt: skip
GROUPS = ("source", "scanner")
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val",
               "validation": "val", "dev": "val", "test": "test", "testing": "test"}  # fmt: skip
MISSING = {"", "nan", "na", "n/a", "#n/a", "<na>", "null"}  # as programs write what is not there
UNCERTAIN = MISSING | {"-1"}  # labels that say neither yes nor no
YES_NO = {"yes": "1", "true": "1", "no": "0", "false": "0"}
BINARY = {"0", "1"} | UNCERTAIN
FIELD = 2**17  # characters of the first line at most
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16",
         b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}  # fmt: skip


class Row(NamedTuple):
    """One image.

    name: its path as the data name it, with forward slashes; path: its file; findings: what it
    shows, None where that is uncertain; told: its patient, if a table says; split, source, scanner:
    if one says.
    """

    name: str
    path: str
    findings: frozenset[str] | None
    told: Told | None = None
    split: str | None = None
    source: str | None = None
    scanner: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a data set is read.

    negative, positive: the names of the healthy and of the diseased class; one is enough: all else
    is the other; classes: "many", each class for itself. path_column, label_column, patient_column: of a table, where their names do not
    say it; patient_pattern: a regular expression, as of `tell_patients`; leave_out: SOURCE or
    scanner of a table, as `source=NAME`, whose patients are all in the test split.
    """

    negative: str | None = None
    positive: str | None = None
    path_column: str | None = None
    label_column: str | None = None
    patient_column: str | None = None
    patient_pattern: str | None = None
    leave_out: str | None = None
    classes: str | None = None

    def asked(self, info: dict | None = None) -> dict[str, str]:
        """The options that were given, by name; where they name no class, those of a model's `info`:
        its target against the rest, else its healthy class against all others."""
        named = {field.name: getattr(self, field.name) for field in fields(Reading)}
        if info and self.positive is None and self.negative is None:
            target = info.get("target")
            named |= {"positive": target} if target else {"negative": info["classes"][0]}
        return {name: value for name, value in named.items() if value is not None}


def read_table(table: Path, reading: Reading) -> list[Row]:
    """The images of a table, one row each: lines of the same image are merged.

    Raises CxrError if the table is malformed, UsageError where an option has to say what a column
    is.
    """
    lines = read_lines(table)
    _, header = next(lines, (1, []))
    columns = _Columns(table, header, reading)
    merged: dict[str, list[tuple[int, dict[str, str]]]] = {}
    count = 0
    for count, (number, cells) in enumerate(lines, 1):
        values = columns.pick(cells)
        if not (name := values["path"].replace("\\", "/")):
            raise CxrError(f"{table}, line {number}: the column {columns.called('path')} is empty")
        merged.setdefault(name, []).append((number, values))
    if count > len(merged):
        console.say(
            f"{table}: {count:,} lines are of {len(merged):,} images: those of one are merged"
        )
    paths = _find_files(table, list(merged))
    splits = columns.splits(merged.values())
    return [
        Row(
            *(name, path, columns.findings(group), columns.patient(group), split),
            *(columns.first(kind, group) for kind in GROUPS),
        )
        for (name, group), path, split in zip(merged.items(), paths, splits)
    ]


def read_lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells without blanks around them) of the header and of each line below it, of a
    table in any usual encoding, with commas, semicolons or tabs. Raises CxrError."""
    try:
        with open(table, newline="", encoding=_encoding(table)) as file:
            first = file.readline(FIELD)
            if first.lower().startswith("sep="):  # as Excel says it
                delimiter = first[4:5]
            else:
                delimiter = max(",;\t", key=first.count)
                file.seek(0)
            reader = csv.reader(file, delimiter=delimiter)
            for cells in filter(None, reader):
                yield reader.line_num, [cell.strip() for cell in cells]
    except (csv.Error, UnicodeError, TypeError) as error:
        raise CxrError(f"{table}: not a CSV table ({error})") from None


def _encoding(table: Path) -> str:
    """Of a text file: by its mark, UTF-8 if it is that, else Latin-1, which is said. Raises CxrError
    if it is no text."""
    with open(table, "rb") as file:
        head = file.read(2**12)
        for mark, name in MARKS.items():
            if head.startswith(mark):
                return name
        for name, other in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
            if other.count(0) > 0.9 * len(other) > 0:  # the upper halves of Latin letters
                return name
        decoder = codecs.getincrementaldecoder("utf-8")()
        file.seek(0)
        try:
            while chunk := file.read(2**16):
                if b"\0" in chunk:
                    raise CxrError(f"{table}: not a CSV table, but a binary file")
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            console.say(f"{table}: not UTF-8; read as Latin-1")
            return "latin-1"
    return "utf-8"


class _Columns:
    """Which column of a table is which, by their usual names or by the options."""

    def __init__(self, table: Path, header: Sequence[str], reading: Reading):
        self.table, self.header = table, list(header)
        self.place = {
            kind: self._find(kind, getattr(reading, f"{kind}_column", None)) for kind in COLUMNS
        }
        if self.place["path"] is None:  # RSNA calls an image by its patient
            plain = [name.lower() for name in self.header]
            self.place["path"] = plain.index("patientid") if "patientid" in plain else None
        names = (reading.positive, reading.negative)
        self.flags = [name for name in names if name in self.header and not reading.label_column]
        self.place |= {name: self.header.index(name) for name in self.flags}
        self._require("path", "an image's file")
        if not self.flags:
            self._require("label", "the class", " (or --positive NAME, a column of 0 and 1)")

    def _find(self, kind: str, option: str | None) -> int | None:
        if option is not None:
            if option not in self.header:
                raise UsageError(
                    f"--{kind}-column {option}: {self.table} has no such column; it has {self._all()}"
                )
            return self.header.index(option)
        plain = [re.sub(r"[\W_]", "", name).lower() for name in self.header]
        for names in COLUMNS[kind]:
            places = [place for place, name in enumerate(plain) if name in names]
            if len(places) > 1:
                listed = " or ".join(self.header[place] for place in places)
                raise UsageError(
                    f"{self.table}: is the {kind} in column {listed}? Say --{kind}-column"
                    if f"{kind}_column" in Reading.__dataclass_fields__
                    else f"{self.table}: is the {kind} in column {listed}? Keep one of them"
                )
            if places:
                return places[0]
        return None

    def _require(self, kind: str, what: str, other: str = "") -> None:
        if self.place[kind] is None:
            raise UsageError(
                f"{self.table}: which column names {what}? Say --{kind}-column{other}; it has "
                f"{self._all()}"
            )

    def _all(self) -> str:
        return console.listed(self.header) or "no columns"

    def called(self, kind: str) -> str:
        return self.header[self.place[kind]]

    def pick(self, cells: Sequence[str]) -> dict[str, str]:
        """The cells that matter, by kind; those that a short line lacks are empty."""
        places = {kind: place for kind, place in self.place.items() if place is not None}
        return {k: cells[place] if place < len(cells) else "" for k, place in places.items()}

    def findings(self, group: Sequence[tuple[int, dict[str, str]]]) -> frozenset[str] | None:
        """What all lines of an image say together; None if all of them are uncertain."""
        if self.flags:
            return self._flagged(group)
        cells = [_number(values["label"]) for _, values in group]
        certain = [cell for cell in cells if cell.lower() not in UNCERTAIN]
        return frozenset(name for cell in certain for name in _several(cell)) or None

    def _flagged(self, group: Sequence[tuple[int, dict[str, str]]]) -> frozenset[str] | None:
        yes, sure = set(), False
        for name in self.flags:
            for number, values in group:
                cell = _number(values[name])
                cell = YES_NO.get(cell.lower(), cell)
                if cell.lower() not in BINARY:
                    raise CxrError(
                        f"{self.table}, line {number}: the column {name} holds {cell[:40]!r}, not 0, "
                        "1, yes, no, -1 or nothing; say --label-column if it is not the one"
                    )
                yes |= {name} if cell == "1" else set()
                sure |= cell == "0" and name == self.flags[0]
        return frozenset(yes) if yes or sure else None

    def patient(self, group: Sequence[tuple[int, dict[str, str]]]) -> Told | None:
        if self.place["patient"] is None:
            return None
        named = {
            values["patient"]: number
            for number, values in group
            if values["patient"].lower() not in MISSING
        }
        if len(named) > 1:
            (a, _), (b, line), *_ = named.items()
            image = group[0][1]["path"]
            raise CxrError(
                f"{self.table}, line {line}: {image} is of patient {b}, and of {a} above"
            )
        rule = f"column {self.called('patient')} of the table"
        return Told(next(iter(named)), rule) if named else None

    def first(self, kind: str, group: Sequence[tuple[int, dict[str, str]]]) -> str | None:
        """What the first line that says anything says of an image."""
        return next((value for _, values in group if (value := values.get(kind))), None)

    def splits(self, groups: Iterable[Sequence[tuple[int, dict[str, str]]]]) -> list[str | None]:
        """What the column of splits says of each image; nothing, and so told, if it says others."""
        groups = list(groups)
        if self.place["split"] is None:
            return [None] * len(groups)
        found = [{SPLIT_NAMES.get(v["split"].lower(), v["split"]) for _, v in g} for g in groups]
        odd = {name for names in found for name in names} - set(SPLITS)
        odd |= {" and ".join(sorted(names)) for names in found if len(names) > 1}
        if odd:
            console.warn(
                f"{self.table}: the column {self.called('split')} is not used: it holds "
                f"{console.listed(sorted(odd))}, not train, val and test alone"
            )
            return [None] * len(groups)
        return [names.pop() for names in found]


def _number(cell: str) -> str:
    """`1.0` as `1`."""
    return match[1] if (match := re.fullmatch(r"([-+]?\d+)\.0*", cell)) else cell


def _several(cell: str) -> list[str]:
    """The findings of `A|B` or of `['A', 'B']`."""
    if cell.startswith("[") and cell.endswith("]"):
        return [part.strip(" '\"") for part in cell[1:-1].split(",") if part.strip(" '\"")]
    return [part.strip() for part in cell.split("|") if part.strip()]


def _find_files(table: Path, names: Sequence[str]) -> list[str]:
    """The file of each name: relative to the table, without folders in front that are not there, or
    anywhere below the table's folder if it is a bare name, with or without its suffix. A name whose
    file is not found stays as it is. Raises CxrError if a bare name may be two files."""
    paths, missing = [], []
    for place, name in enumerate(names):
        parts = name.split("/")
        tries = (table.parent / "/".join(parts[first:]) for first in range(min(len(parts), 12)))
        found = next((path for path in tries if os.path.exists(path) and not path.is_dir()), None)
        paths.append(str(found or table.parent / name))
        if not found and len(parts) == 1:
            missing.append(place)
    if not missing:
        return paths
    named = defaultdict(list)
    for file in scan(table.parent).files:
        for key in {file.name, file.stem}:
            named[key].append(str(file))
    for place in missing:
        files = named.get(names[place], ())
        if len(files) > 1:
            raise CxrError(
                f"{table}: {names[place]} may be {files[0]} or {files[1]}; give the path"
            )
        paths[place] = files[0] if files else paths[place]
    return paths
