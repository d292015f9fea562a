"""The journal of an evaluation: `cases.jsonl` in its folder, what has been measured so far.

The first line says what is evaluated. Each other line is one entry: a digest of the first line, the
stage (`case`: an image explained and judged), the image's path within the data, the value, and a
checksum. The checksum shows whether a line was cut short by a crash or changed.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from cxr import UsageError, console
from cxr.datasets import Dataset
from cxr.files import write_text

NAME = "cases.jsonl"
FINISHED = "finished"  # the stage of the last entry
ROWS = 4096  # images hashed at once


class Journal:
    """Entries by stage and row of the image, in memory and, with `folder`, in a file.

    subject: what is evaluated (digests of model and data, options), fit for JSON.
    """

    def __init__(
        self,
        data: Dataset,
        folder: str | Path | None = None,
        subject: dict | None = None,
        resume: bool = False,
    ) -> None:
        """Raises UsageError if `folder` holds an unfinished evaluation and `resume` is off. With
        `resume`, raises UsageError if it holds none, or one of another subject."""
        self.images = image_names(data)
        self.entries: dict[tuple[str, str], Any] = {}
        self.path = Path(folder) / NAME if folder is not None else None
        self.subject = subject or {}
        self.run = _digest(json.dumps(self.subject, sort_keys=True).encode())[:16]
        if self.path is not None:
            self._open(resume)

    def get(self, stage: str, row: int | None = None) -> Any:
        """The value of a stage for the image of a row, or without a row for all images. None if
        there is no such value."""
        return self.entries.get((stage, self._image(row)))

    def of_images(self, stage: str) -> dict[str, Any]:
        """The values of a stage by the images' names."""
        return {image: value for (own, image), value in self.entries.items() if own == stage}

    def add(self, stage: str, values: dict[int | None, Any]) -> None:
        """Add values by their rows. They are on the disk when this returns."""
        entries = {(stage, self._image(row)): value for row, value in values.items()}
        self.entries |= entries
        if self.path is not None:
            with open(self.path, "a") as file:
                file.writelines(_line(self.run, *key, value) for key, value in entries.items())
                file.flush()
                os.fsync(file.fileno())

    def once(self, stage: str, make: Callable[[], Any]) -> Any:
        """The value of a stage for all images. If there is none, it is made and added first."""
        if self.get(stage) is None:
            self.add(stage, {None: make()})
        return self.get(stage)

    def finish(self) -> None:
        """Mark the evaluation as finished, so that the next one may begin in this folder."""
        if self.get(FINISHED) is None:
            self.add(FINISHED, {None: True})

    def _image(self, row: int | None) -> str:
        return "" if row is None else self.images[row]

    def _open(self, resume: bool) -> None:
        if resume and not self.path.exists():
            raise UsageError(
                f"{self.path.parent} holds no evaluation to resume: leave --resume out"
            )
        if self.path.exists():
            subject, entries, damaged = _read(self.path)
            if resume:
                self._take(subject, entries, damaged)
            elif not any(stage == FINISHED for _, stage, _, _ in entries):
                raise UsageError(
                    f"{self.path.parent} holds an evaluation that was stopped: go on with --resume, "
                    f"choose another --out, or remove {self.path} to begin anew"
                )
            else:
                console.say(f"{self.path}: replaced, as that evaluation is finished")
        lines = [_line(self.run, *key, value) for key, value in self.entries.items()]
        write_text(self.path, "".join([json.dumps({"subject": self.subject}) + "\n", *lines]))

    def _take(self, subject: dict, entries: list[tuple], damaged: int) -> None:
        """Take over the entries of the file. Raises UsageError if they are of another subject."""
        if any(run != self.run for run, *_ in entries):
            names = [name for name in self.subject if subject.get(name) != self.subject[name]]
            raise UsageError(
                f"{self.path} is of another {', '.join(names) or 'evaluation'}: resume with the "
                "same model, data and options, or choose another --out"
            )
        if damaged:
            console.warn(
                f"{self.path}: {damaged} damaged line{'s' * (damaged > 1)} dropped; what "
                f"{'they' if damaged > 1 else 'it'} held is measured again"
            )
        self.entries = {(stage, image): value for _, stage, image, value in entries}


def _line(run: str, stage: str, image: str, value: Any) -> str:
    entry = {"run": run, "stage": stage, "image": image, "value": value}
    return json.dumps(entry | {"crc": zlib.crc32(json.dumps(entry).encode())}) + "\n"


def _read(path: Path) -> tuple[dict, list[tuple[str, str, str, Any]], int]:
    """The subject, the entries (run, stage, image, value), and the number of damaged lines."""
    subject, entries, damaged = {}, [], 0
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            entry = json.loads(line)
            if number == 0 and isinstance(entry["subject"], dict):
                subject = entry["subject"]
                continue
            plain = {name: entry[name] for name in ("run", "stage", "image", "value")}
            if zlib.crc32(json.dumps(plain).encode()) != entry["crc"]:
                raise ValueError("checksum")
            entries.append(tuple(plain.values()))
        except (ValueError, KeyError, TypeError):
            damaged += 1
    return subject, entries, damaged


def image_names(data: Dataset) -> list[str]:
    """Each image's path below the folder that all images share. It does not change if that folder
    is moved."""
    paths = [os.path.abspath(path) for path in data.paths]
    shared = os.path.commonpath(paths)
    return [os.path.relpath(path, shared) for path in paths]


def data_digest(data: Dataset) -> str:
    """A digest of a data set's names, labels, patients, splits and pixels."""
    columns = (image_names(data), data.labels.tolist(), list(data.patients), list(data.splits))
    described = json.dumps(columns, default=str).encode()
    pixels = (
        np.ascontiguousarray(data.images[first : first + ROWS])
        for first in range(0, len(data), ROWS)
    )
    return _digest(described, *pixels)


def network_digest(*networks: nn.Module) -> str:
    """A digest of the parameters and buffers of networks."""
    tensors = (item for network in networks for item in network.state_dict().items())
    return _digest(*(part for name, t in tensors for part in (name.encode(), _bytes(t))))


def files_digest(files: Iterable[Path]) -> str:
    """A digest of the names and contents of files."""
    return _digest(*(part for file in files for part in (file.name.encode(), file.read_bytes())))


def places_digest(places: dict) -> str:
    """A digest of mask files, or of boxes by the image's stem."""
    files = [place for place in places.values() if isinstance(place, Path)]
    boxes = {stem: place for stem, place in places.items() if not isinstance(place, Path)}
    described = json.dumps(boxes, sort_keys=True).encode() if boxes else b""
    return _digest(files_digest(files).encode(), described)


def _bytes(tensor) -> np.ndarray:
    return tensor.detach().cpu().double().contiguous().numpy()


def _digest(*parts: bytes | np.ndarray) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()
