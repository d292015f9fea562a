"""Which files in a folder are images: told by their content, not by their names."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from cxr import CxrError, console

DICOM = (".dcm", ".dicom")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2"),
    *DICOM,
)  # files called so are taken for images unopened; should one be none, it counts as unreadable
MAGIC = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(b"GIF87a", b"GIF89a"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
)
EXPLAINED = {"explanation.json", "panel.png", "thumbnail.png"}  # a folder of an explanation
MASKS = re.compile(r"(?:.*[ _-])?masks?", re.IGNORECASE)  # a folder of masks beside `images`


@dataclass
class Scan:
    """What a folder holds: `files`, sorted, and how many things were left out, by their kind."""

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def report(self, folder: str | Path) -> None:
        """Say what was left out; nothing if all was taken."""
        if self.left_out:
            kinds = ", ".join(
                f"{number:,} {kind}" for kind, number in self.left_out.most_common(12)
            )
            more = len(self.left_out) - 12
            console.say(f"{folder}: left out {kinds}{f' and {more} other kinds' * (more > 0)}")


def scan(folder: str | Path) -> Scan:
    """The images below a folder. Hidden files are left out, and folders of masks that lie beside a
    folder `images`. A linked folder is followed once, and only if it lies outside: what lies inside
    is found where it lies. Raises CxrError if the folder cannot be listed."""
    found, top = Scan(), os.path.realpath(folder)
    followed, waiting = [top], [Path(folder)]
    while waiting:
        current = waiting.pop()
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            if current == Path(folder):
                raise CxrError(f"{folder}: cannot be listed: {error.strerror}") from None
            found.left_out["folders that cannot be listed"] += 1
            continue
        named = {entry.name.lower() for entry in entries}
        if EXPLAINED <= named and current != Path(folder):
            found.left_out["explanations that cxrgan wrote"] += 1
            continue
        images = "images" in named
        for entry in entries:
            kind = _kind(entry, images)
            if kind == "folder" and entry.is_symlink():
                target = os.path.realpath(entry)
                if any(_within(target, known) or _within(known, target) for known in followed):
                    kind = "linked folders that are in it already"
                else:
                    followed.append(target)
            if kind == "folder":
                waiting.append(Path(entry.path))
            elif kind == "image":
                found.files.append(Path(entry.path))
            else:
                found.left_out[kind] += 1
    found.files.sort()
    return found


def _kind(entry: os.DirEntry, images: bool) -> str:
    """ "folder", "image", or why it is left out; `images`: whether a folder of that name is near."""
    if entry.name.startswith("."):
        return "hidden"
    try:
        folder, file = entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself
        return "broken links"
    if folder:
        return "folders of masks" if images and MASKS.fullmatch(entry.name) else "folder"
    if not file:
        return "broken links" if entry.is_symlink() else "pipes or devices"
    suffix = Path(entry.name).suffix.lower()
    if suffix in SUFFIXES or (entry.name != "DICOMDIR" and is_image(entry.path)):
        return "image"
    return console.plain(suffix or ("DICOMDIR" if entry.name == "DICOMDIR" else "without a suffix"))


def is_image(path: str | Path) -> bool:
    """Whether a file begins as an image does."""
    try:
        size = os.path.getsize(path)
        if not size:  # reading one of /proc may never end
            return False
        with open(path, "rb") as file:
            head = file.read(132)
    except OSError:
        return False
    return (
        head.startswith(MAGIC)
        or (head.startswith(b"BM") and int.from_bytes(head[2:6], "little") == size)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or is_dicom_head(head)
    )


def is_dicom_head(head: bytes) -> bool:
    """Whether these first 132 bytes are of a DICOM file, with its preamble or without."""
    bare = head[:2] in (b"\x02\0", b"\x08\0") and head[3:4] == b"\0"  # its first element
    return head[128:] == b"DICM" or bare


def file_name(path: str | Path) -> str:
    """A file's name without its folders, which may be Windows'."""
    return str(path).replace("\\", "/").rpartition("/")[2]


def stem(path: str | Path) -> str:
    """A file's name without its folders and without the suffix of an image: `7.1` of `a/7.1.png` and
    of `7.1`."""
    name = file_name(path)
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix[1:].isalpha() or suffix.lower() in SUFFIXES else name


def names_apart(paths: Sequence[Path], free: Callable[[str, Path], bool]) -> list[str]:
    """A folder's name for each image: its stem, with its own folder's name or a number where
    another image has that name already or it is not `free` for this one. It is never hidden, and
    never leaves its folder."""
    names, taken = [], {"index.html"}  # as a file system that ignores case sees them
    for path in paths:
        own, parent = (_folder_name(s) for s in (stem(path), path.absolute().parent.name))
        tries = chain((own, f"{parent}_{own}"), (f"{own}_{n}" for n in count(2)))
        name = next(name for name in tries if name.casefold() not in taken and free(name, path))
        taken.add(name.casefold())
        names.append(name)
    return names


def _folder_name(name: str) -> str:
    """The name without control characters, separators, dots in front, and what is too long."""
    kept = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name)
    kept = kept.encode(errors="replace")[:100].decode(errors="ignore")
    return kept.strip(". ") or "image"


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))
