"""Which patient an image is of, and which split that patient falls into."""

import hashlib
import re
from pathlib import Path

from cxr import CxrError, UsageError

# Public sets that have the patient anywhere in the path: name, pattern, an example and its patient.
PATIENT_PATHS = (
    ("CheXpert", r"(?:^|/)patient(\d+)/", "train/patient00042/study1/view1_frontal.jpg", "00042"),
    ("MIMIC-CXR", r"(?:^|/)p(\d{8})/", "files/p10/p10000032/s50414267/02aa804e.jpg", "10000032"),
    ("BIMCV", r"(?:^|/)sub-(\w+?)[_/]", "sub-S03044/ses-E07985/sub-S03044_dx.png", "S03044"),
    ("Open-I", r"(?:^|/)CXR(\d+)_", "images/CXR12_IM-0133-1001.png", "12"),
    ("RICORD", r"(?:^|/)MIDRC-RICORD-\w+-(\d+-\d+)", "MIDRC-RICORD-1C-419639-000082/1.dcm",
     "419639-000082"),
    ("Stony Brook", r"(?:^|/)(A\d{6})/", "Stony/A000801/12-30-1900/1.dcm", "A000801"),
)  # fmt: skip

# A name is matched whole and without its extension. Each pattern has its own prefix, so that
# person12 and 00000012_000 stay two patients.
PATIENT_NAMES = (
    ("person", re.compile(r"person(\d+)_.*", re.IGNORECASE)),  # Kermany, pneumonia
    ("IM", re.compile(r"(?:NORMAL2-)?IM-(\d+)(?:-.*)?", re.IGNORECASE)),  # Kermany, normal
    ("NIH", re.compile(r"(\d{8})_\d{3}")),  # NIH ChestX-ray8
)


# What publishers and collectors append to a document's name, outermost last; stripped repeatedly.
# A bare number is no suffix: covid-19-pneumonia-2 and covid-19-pneumonia-12 are two case reports.
DOCUMENT_SUFFIX = re.compile(
    r"""(?: [-_.\ ]+ (?: day[-_\ ]?\d+ | \d+[-_\ ]?(?:hour|day|week)s? | admission  # when
                       | (?:figure|fig|fx|gr)[-_.\ ]?\d+ | f\d\d? | g\d{3}          # figure
                       | [a-z]                                                      # panel
                       | pa | ap | lateral | lrg | html )                           # view, size
          | (?<=\d)[a-z]                                                            # fig1a, case2b
          | \.(?:pdf|webp)\b.* )$                                                   # page, panel
    """,
    re.IGNORECASE | re.VERBOSE,
)


def patient_of(path: str | Path, pattern: str | None = None) -> str:
    """The patient to whom a file belongs, told from its name.

    With `pattern`, a regular expression, it is the first group where the pattern is found in the
    file's name, else in the path as given (in a folder: from the class on). Without, it is
    told by `PATIENT_PATHS`, then by `PATIENT_NAMES`; else names that differ only in a `DOCUMENT_SUFFIX` are one document
    and so one patient, wherever the files lie: renaming a class moves nobody to another split.

    Raises UsageError if the pattern is no regular expression or has no group, CxrError if a
    path does not match it.
    """
    path = Path(path)
    if pattern is not None:
        return _patient_by_pattern(path, pattern)
    for kind, known, _, _ in PATIENT_PATHS:
        if match := re.search(known, path.as_posix()):
            return f"{kind}:{match[1]}"
    for kind, known in PATIENT_NAMES:
        if match := known.fullmatch(path.stem):
            return f"{kind}:{int(match[1])}"
    document = path.stem
    while (shorter := DOCUMENT_SUFFIX.sub("", document)) not in ("", document):
        document = shorter
    return f"document:{document.casefold()}"


def _patient_by_pattern(path: Path, pattern: str) -> str:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"--patient-pattern {pattern}: not a regular expression ({error})"
        ) from None
    if not compiled.groups:
        raise UsageError(
            f"--patient-pattern {pattern}: put the part that names the patient in parentheses"
        )
    for text in (path.name, path.as_posix()):
        if (match := compiled.search(text)) and match[1]:
            return match[1]
    raise CxrError(f"{path.as_posix()}: --patient-pattern {pattern} finds no patient in this name")


SPLITS = ("train", "val", "test")


SPLIT_RULE = (
    "u = first 8 bytes of sha256(patient) / 2^64 + fold / 10, modulo 1; "
    "u < 0.8 train, u < 0.9 val, else test"
)


def split_of(patient: str, fold: int = 0) -> str:
    """The split of a patient, "train" (80%), "val" or "test" (10% each): see `SPLIT_RULE`. Each
    patient is in the test split of one of the ten folds, 0 to 9."""
    digest = hashlib.sha256(patient.encode("utf-8", "surrogateescape")).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    u = (u + fold / 10) % 1
    return "train" if u < 0.8 else "val" if u < 0.9 else "test"
