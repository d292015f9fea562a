"""Which patient an image is of, and which split that patient falls into."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from cxr import CxrError, UsageError, console

SPLITS = ("train", "val", "test")
SPLIT_RULE = (
    "u = first 8 bytes of sha256(patient) / 2^64 + fold / 10, modulo 1; "
    "u < 0.8 train, u < 0.9 val, else test"
)


class PublicSet(NamedTuple):
    """How a public collection tells its patients: by the first group that `pattern` finds in a
    path. Where `mark` is given, the names are too common to be told alone: the pattern is used only
    if some name of the same data matches the mark."""

    name: str
    prefix: str  # of a patient's name, so that person12 and 00000012_000 stay two patients
    pattern: str
    example: str
    patient: str
    mark: str | None = None
    holds: str = "patient"  # what the names tell apart


KERMANY = r"(?:^|/)(?:person\d+_(?:bacteria|virus)_|NORMAL2-IM-\d)"
UUID = r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}"
PUBLIC_SETS = (
    PublicSet("CheXpert", "CheXpert:", r"(?:^|/)patient(\d{5,})[/_]study\d",
              "train/patient00042/study1/view1_frontal.jpg", "CheXpert:00042"),
    PublicSet("MIMIC-CXR", "MIMIC:", r"(?:^|/)p(\d{8})[/_]",
              "files/p10/p10000032/s50414267/02aa804e.jpg", "MIMIC:10000032"),
    PublicSet("BIMCV", "BIMCV:", r"(?:^|/)sub-(S\d{5,})[/_]",
              "sub-S03044/ses-E07985/sub-S03044_dx.png", "BIMCV:S03044"),
    PublicSet("Open-I", "Open-I:", r"(?:^|/)(?:CXR)?(\d+)(?:_\d+)?_IM-\d{4}",
              "images/CXR12_IM-0133-1001.png", "Open-I:12"),
    PublicSet("RICORD", "RICORD:", r"(?:^|/)MIDRC-RICORD-\w+-(\d+-\d+)",
              "MIDRC-RICORD-1C-419639-000082/1.dcm", "RICORD:419639-000082"),
    PublicSet("Stony Brook", "Stony Brook:", r"(?:^|/)(A\d{6})/",
              "Stony/A000801/12-30-1900/1.dcm", "Stony Brook:A000801"),
    PublicSet("Kermany", "person:", r"(?:^|/)person0*(\d+)_(?:bacteria|virus)_[\d_]*\.",
              "PNEUMONIA/person1000_bacteria_2931.jpeg", "person:1000"),
    PublicSet("Kermany", "IM:", r"(?:^|/)(?:NORMAL2-)?IM-0*(\d+)-[\d-]*\.(?:jpe?g|png)$",
              "NORMAL/IM-0115-0001.jpeg", "IM:115", KERMANY),
    PublicSet("NIH", "NIH:", r"(?:^|/)(?=000[0-3]\d{4}_\d{3}\.)0+(\d+)_", "00001280_004.png",
              "NIH:1280"),
)  # fmt: skip
LATE_SETS = (  # whose names hold no patient: they are asked after the DICOM header
    PublicSet("RSNA", "RSNA:", rf"(?:^|/)({UUID})\.", "00436515-870c-4b36-a041-de91049b9ab4.dcm",
              "RSNA:00436515-870c-4b36-a041-de91049b9ab4", None, "image"),
    PublicSet("VinDr", "VinDr:", r"(?:^|/)([0-9a-f]{32})\.",
              "train/000434271f63a053c4128a0ba6352c7f.dicom",
              "VinDr:000434271f63a053c4128a0ba6352c7f", None, "image"),
    PublicSet("PadChest", "PadChest:", r"(?:^|/)(\d{36,46})_[\w-]+\.",
              "216840111366964012819207061112010307142602253_04-014-084.png",
              "PadChest:216840111366964012819207061112010307142602253", None, "study"),
)  # fmt: skip

# Names that say patient by themselves, in any collection; with the folders above, since two
# hospitals may count from 1.
SPEAKING = re.compile(
    r"^(.*/|)(?:sub-([A-Za-z0-9]+)|patient[-_ ]?(\d+))(?=[/_.\- ])", re.IGNORECASE
)

# What publishers append to a document's name, outermost last, in Cohen's collection of figures of
# articles. A bare number is none: covid-19-pneumonia-2 and covid-19-pneumonia-12 are two reports.
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
COHEN = re.compile(  # names of its articles; the folder that holds three of them is of this set
    r"^(?:1-s2\.0-S\d|nejm\w*\d|ryct\.|kjr-\d|jkms-\d|lancet-case|auntminnie-|covid-19-pneumonia-\d"
    r"|SARS-10\.|radiol\.|all14-fig|gr\d+_lrg|.*main\.pdf-\d|.*_Fig\d+_HTML|\d+_2020_\d+_Fig)",
    re.IGNORECASE,
)
COHEN_NAMES = 3  # such names in a folder


class Told(NamedTuple):
    """A patient, and by what he or she was told."""

    patient: str
    rule: str


Rule = Callable[[str, str], Told | None]  # of a name and its path


def tell_patients(
    names: Sequence[str],
    paths: Sequence[str],
    given: Sequence[Told | None] | None = None,
    pattern: str | None = None,
    header: Callable[[int], str | None] = lambda place: None,
) -> list[Told]:
    """The patient of each image.

    names: paths with forward slashes, as the data set has them, without the folders of the class
    and the split; paths: with them; given: what a table says, which goes first; pattern: a regular expression, whose first group in
    the file's name, else in the path, is the patient; header: the PatientID in the DICOM file at a
    place in `names`, asked only where the path tells nothing. A file about which nothing is known
    is a patient of its own, called by its name, or by its path where another has the same name.

    Raises UsageError if the pattern is no regular expression or has no group, CxrError if a path
    does not match it.
    """
    told = list(given) if given else [None] * len(names)
    rules = _rules(names, paths) if pattern is None else [_pattern_rule(pattern)]
    for place, name in enumerate(names):
        answers = (rule(name, paths[place]) for rule in rules)
        told[place] = told[place] or next(filter(None, answers), None)
    unknown = [place for place, found in enumerate(told) if found is None]
    with console.progress("headers", len(unknown), quiet=len(unknown) < 1000) as bar:
        for place in unknown:
            patient = header(place)
            late = (rule(names[place], paths[place]) for rule in map(_set_rule, LATE_SETS))
            told[place] = (
                Told(f"DICOM:{patient}", "DICOM's PatientID")
                if patient
                else next(filter(None, late), None)
            )
            bar.advance()
    stems = Counter(_stem(name) for name in names)
    return [
        found
        or Told(
            f"document:{_stem(name)}" if stems[_stem(name)] == 1 else f"file:{path}",
            "each file is one",
        )
        for found, name, path in zip(told, names, paths)
    ]


def _rules(names: Sequence[str], paths: Sequence[str]) -> list[Rule]:
    """What tells a patient from a name and a path of these data, in the order of asking."""
    early = [_set_rule(s) for s in PUBLIC_SETS if _is_there(s, names)]
    return [*early, _cohen_rule(paths), _speaking]


def _is_there(public: PublicSet, names: Sequence[str]) -> bool:
    return public.mark is None or any(re.search(public.mark, name) for name in names)


def _set_rule(public: PublicSet) -> Rule:
    pattern = re.compile(public.pattern)

    def tell(name: str, _: str) -> Told | None:
        match = pattern.search(name)
        return match and Told(f"{public.prefix}{match[1]}", f"the names of {public.name}")

    return tell


def _cohen_rule(paths: Sequence[str]) -> Rule:
    """Names that differ only in a suffix are one document, and so one patient; in the folders of
    Cohen's collection alone."""
    marks = Counter(_folder(path) for path in paths if COHEN.match(PurePosixPath(path).name))
    folders = {folder for folder, count in marks.items() if count >= COHEN_NAMES}

    def tell(_: str, path: str) -> Told | None:
        if _folder(path) not in folders:
            return None
        document = PurePosixPath(path).stem
        while (shorter := DOCUMENT_SUFFIX.sub("", document)) not in ("", document):
            document = shorter
        return Told(f"document:{document.casefold()}", "the names of Cohen")

    return tell


def _speaking(name: str, _: str) -> Told | None:
    match = SPEAKING.match(name)
    return match and Told(f"patient:{match[1]}{match[2] or match[3]}", "the paths")


def _pattern_rule(pattern: str) -> Rule:
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

    def tell(_: str, path: str) -> Told:
        for text in (PurePosixPath(path).name, path):
            if (match := compiled.search(text)) and match[1]:
                return Told(match[1], "--patient-pattern")
        raise CxrError(f"{path}: --patient-pattern {pattern} finds no patient in this name")

    return tell


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _stem(name: str) -> str:
    return PurePosixPath(name).stem.casefold()


def report(names: Sequence[str], told: Sequence[Told]) -> None:
    """Say how many patients there are and how they were told, with an example of each rule; warn
    where that looks wrong."""
    rules = Counter(t.rule for t in told)
    first = {t.rule: (name, t.patient) for name, t in zip(reversed(names), reversed(told))}
    parts = []
    for rule, count in rules.most_common():
        name, patient = first[rule]
        number = f" ({count:,})" if len(rules) > 1 else ""
        example = f"{'/'.join(name.split('/')[-3:])} is patient {patient.replace(':', '')}"
        parts.append(f"{rule}{number}: {example}")
    patients = Counter(t.patient for t in told)
    console.say(
        f"{len(told):,} images of {len(patients):,} patients, told by {'; '.join(parts)}"
        if rules.keys() != {"each file is one"}
        else f"{len(told):,} images of as many patients: nothing tells who is who"
    )
    _warn(names, told, patients)


def _warn(names: Sequence[str], told: Sequence[Told], patients: Counter) -> None:
    alone = sum(t.rule == "each file is one" for t in told)
    if alone:
        console.warn(
            f"{alone:,} images count as a patient each; if a patient has several, say so by "
            "--patient-column or --patient-pattern, or all figures will be too good"
        )
    for public in LATE_SETS:
        if count := sum(t.rule == f"the names of {public.name}" for t in told):
            console.warn(
                f"the names of {public.name} tell apart the {public.holds}, not the patient: {count:,} "
                "images; if its table has the patient, take that"
            )
    patient, count = patients.most_common(1)[0]
    if count > 10 and count > len(told) / 10:
        console.warn(
            f"patient {patient.replace(':', '')} has {count:,} of {len(told):,} images: is that one "
            "patient? If not, say --patient-column or --patient-pattern"
        )
    folders = defaultdict(set)
    for name, t in zip(names, told):
        if "/" in name and t.rule.startswith(
            ("the names", "the paths", "--")
        ):  # by a part of the path
            key = t.patient.partition(":")[2] or t.patient
            folders[t.patient].add(_folder(name).partition(key)[0])
    spread, places = max(folders.items(), key=lambda f: len(f[1]), default=("", ()))
    if len(places) > 3:
        console.warn(
            f"patient {spread.replace(':', '')} lies in {len(places)} folders, such as "
            f"{' and '.join(sorted(places)[:2])}: is that one patient?"
        )


def split_of(patient: str, fold: int = 0) -> str:
    """The split of a patient, "train" (80%), "val" or "test" (10% each): see `SPLIT_RULE`. Each
    patient is in the test split of one of the ten folds, 0 to 9."""
    digest = hashlib.sha256(patient.encode("utf-8", "surrogateescape")).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    u = (u + fold / 10) % 1
    return "train" if u < 0.8 else "val" if u < 0.9 else "test"
