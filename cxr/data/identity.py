"""Whether data are those of an earlier run: digests of images, labels, splits and marks."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cxr.data.patients import SPLITS
from cxr.datasets import Dataset


def of_pictures(pictures: np.ndarray) -> Tensor:
    """A digest of each of N pictures, int64 [N]."""
    found = (hashlib.blake2b(picture.tobytes(), digest_size=8).digest() for picture in pictures)
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in found])


def of_rows(data: Dataset, marks: tuple[np.ndarray, np.ndarray] | None = None) -> dict[str, Tensor]:
    """What the state of a run keeps of its data, [N] each: a digest of the pixels, the label, the
    split, and a digest of what is marked, as of `places.marked`."""
    kept = {
        "data.pixels": of_pictures(data.images),
        "data.labels": torch.from_numpy(data.labels.astype("uint8")),
        "data.splits": torch.tensor([SPLITS.index(s) for s in data.splits], dtype=torch.uint8),
    }
    return kept if marks is None else kept | {"data.marks": of_pictures(marks[0])}


def differences(before: dict[str, Tensor], now: dict[str, Tensor], data: Dataset) -> str:
    """In what the rows of now are not those of before; nothing if they are the same."""
    old, new = before["data.pixels"], now["data.pixels"]
    if len(new) != len(old):
        more = "more" if len(new) > len(old) else "fewer"
        return f"{abs(len(new) - len(old))} images {more} than the {len(old)} of then"
    a, b = old.argsort(stable=True), new.argsort(stable=True)
    if not torch.equal(old[a], new[b]):
        a = b = torch.arange(len(new))  # others lie in their places
    found = []
    for name in (name for name in now if name in before):  # an older state has fewer
        rows = (before[name][a] != now[name][b]).nonzero()[:, 0]
        if len(rows):
            first = Path(data.paths[b[rows].min()]).name
            what = name.removeprefix("data.")
            found.append(f"{what} of {len(rows)} images differ (the first: {first})")
    if not found and not torch.equal(old, new):
        found = ["the images are the same, in another order"]
    return ", ".join(found)


def of_data(data: Dataset) -> dict[str, str]:
    """What a model file keeps of its data: a digest of the images, and one of them with their
    splits, in whatever order they lie."""
    pixels = of_pictures(data.images).tolist()
    split = [f"{image} {split}" for image, split in zip(pixels, data.splits)]
    found = {"images": map(str, pixels), "splits": split}
    return {
        name: hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=8).hexdigest()
        for name, lines in found.items()
    }


def trained_on(info: dict, data: Dataset) -> str:
    """Whether a model with this `info` was trained on these data: "no", "yes", or "resplit" where
    their splits were others then. Data are the same if their name or all of their images are."""
    then, now = info["provenance"].get("digests"), of_data(data)
    then = then if isinstance(then, dict) else {}  # an older model has none
    same = then.get("images") == now["images"]
    named = {data.name, Path(data.name).stem}  # of a folder `a.b`, older models have `a`
    if not same and info["provenance"].get("data") not in named:
        return "no"
    otherwise = info.get("split", data.rule) != data.rule
    return "resplit" if otherwise or (same and then.get("splits") != now["splits"]) else "yes"
