"""The page of a training: curves of its log, and its sheets of samples as a film over training.

The sheets lie beside the page, in `samples/`, and are not copied into it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cxr.classifier import useless
from cxr.report import fill

TRAINED = {"train-cnn": "the classifier", "train-gan": "the GAN"}


@dataclass(frozen=True)
class Column:
    """A column of `log.jsonl`."""

    name: str
    title: str
    better: str  # "more", "less", "steady", or "" for what only describes
    about: str
    share: bool = False  # drawn from 0 to 1


# fmt: off
GROUPS = {
    "How well it tells the classes apart": (
        Column("auroc", "AUROC", "more",
            "The chance that a diseased validation image gets a higher logit than a healthy one; 0.5 is "
            "guessing."),
        Column("auroc_robust", "AUROC, images altered", "more",
            "The mean of that and of the AUROC of images with another gamma, blurred, cropped, or with "
            "noise. The weights with the highest value are kept."),
    ),
    "What the classifier says of random lungs": (
        Column("healthy_at_zero", "called healthy at 0", "more",
            "Share of random lungs that it calls healthy at amount of disease 0.", True),
        Column("appearance", "distance from real images", "less",
            "Of random lungs from the training images, as a network sees it that has not trained with "
            "them; about 1 for real images. Too far, and no explanation is to be believed."),
        Column("diseased_at_full", "called diseased at 1", "more",
            "Share of them that it calls diseased at amount of disease 1.", True),
        Column("rising", "rising steps", "more",
            "Share of steps to more disease at which its answer rises.", True),
        Column("logit_gap", "logit gap", "less",
            "How far its logit is from the one that the amount of disease names; median, in logits."),
    ),
    "How well real images are redrawn": (
        Column("ssim", "SSIM", "more",
            "Structural similarity of validation images and what the GAN draws of them; 1 is equal. "
            "Median."),
        Column("ssim_low", "SSIM, the worst", "more",
            "The 5th percentile: one image in twenty is redrawn worse than this."),
        Column("probability_gap", "probability gap", "less",
            "How differently the classifier answers to an image and to what is drawn of it. Median."),
        Column("inverted_healthy", "called healthy at 0, real images", "more",
            "Share of diseased images that it calls healthy once they are redrawn at amount 0.", True),
    ),
    "Does it keep its variety?": (
        Column("spread", "spread of random lungs", "",
            "How much random lungs differ: standard deviation of a pixel. Near 0 all look alike, and "
            "training stops."),
    ),
    "Generator against discriminator": (
        Column("D", "loss of the discriminator", "steady",
            "Low where it tells drawn from real images; 1.39 where it cannot. A fall to 0 means that "
            "the generator has lost."),
        Column("G", "loss of the generator", "steady",
            "Low where the discriminator takes drawn images for real; 0.69 where it cannot tell. A "
            "steep rise means that the generator has lost."),
        Column("sign", "overfitting sign", "less",
            "How surely the discriminator knows real images, from -1 to 1; near 1 it knows them by "
            "heart."),
        Column("p", "augmentation", "",
            "The chance of each change made to what the discriminator sees; it grows while the "
            "overfitting sign is too high, to 0.8 at most.", True),
        Column("r1", "gradient penalty", "steady",
            "The squared gradient of the discriminator at real images, which is kept small."),
    ),
    "What training makes small": (
        Column("loss", "loss", "less",
            "How far the answers to training images are from their labels. It goes on falling when "
            "nothing more is learnt about other patients: the AUROC tells."),
        Column("where", "place", "less",
            "How far the classifier is from saying where the disease is, of training images of which "
            "that is known, healthy ones among them."),
        Column("response", "answer", "less",
            "How far the classifier's logit is from the one that is asked for; weighted."),
        Column("latent", "codes", "less",
            "How far the codes that the encoder reads in drawn images are from those they were drawn "
            "from; weighted."),
        Column("image", "images", "less",
            "How far what is drawn of training images is from them; weighted."),
        Column("proximity", "change", "less",
            "How much images change with the amount of disease; weighted. At 0 no disease would be "
            "drawn."),
        Column("dose", "amount of disease", "less",
            "How far the amount that the encoder finds is from the classifier's answer, squared."),
    ),
    "Speed": (
        Column("images_per_second", "images per second", "more",
            "Training images seen in a second."),
    ),
}
OTHER = "More columns of the log"
TESTED = {
    "auroc": ("AUROC", "chance that an image of this class gets a higher logit than another"),
    "accuracy": ("accuracy", "share of the images called right"),
    "sensitivity": ("sensitivity", "share of the images of this class that are called so"),
    "specificity": ("specificity", "share of the other images that are not"),
    "ece": ("calibration error", "how far its probabilities are from the shares that are right"),
    "auroc_gamma": ("AUROC, gamma 0.7", "of the images made brighter"),
    "auroc_blur": ("AUROC, blurred", "of the images blurred over 5 x 5 pixels"),
    "auroc_crop": ("AUROC, cropped", "of their inner 90%"),
    "auroc_noise": ("AUROC, noise", "of the images with noise, 5% of the range"),
}
# fmt: on


def page(
    folder: str | Path, command: str, config: dict, tested: dict[str, dict] | None = None
) -> str:
    """The HTML of a run folder; `command` is `train-cnn` or `train-gan`, `config` its options;
    tested: the metrics on held-out patients, {class: {name: {value, low, high, n}}}, at the end.

    Lines of the log that cannot be read are counted, and what is no finite number is left out of
    its curve. Raises OSError if the log is there but cannot be read.
    """
    rows, damaged = _rows(Path(folder) / "log.jsonl")
    seen = rows[-1]["images"] if rows else 0
    warnings = (
        [f"{damaged} line{'s' * (damaged > 1)} of log.jsonl cannot be read"] if damaged else []
    )
    warnings += [
        f"for {name}, this classifier is useless: {why}"
        for name, numbers in (tested or {}).items()
        if (why := useless(numbers))
    ]
    share = min(seen / config["images"], 1) if config["images"] else 1
    facts = {
        "sentence": f"Training of {TRAINED[command]}: {seen:,} of {config['images']:,} images seen",
        "folder": Path(folder).absolute().name,
        "share": share,
        "first": f"{min(config['tick'], config['images']):,}",
        "warnings": warnings,
        "images": [row["images"] for row in rows],
        "tested": tested and _tested(tested),
        "groups": list(_groups(rows)),
        "sheets": _sheets(Path(folder) / "samples", seen),
        "options": [(name, str(value)) for name, value in config.items() if value is not None],
    }
    return fill("run", facts)


def _tested(tested: dict[str, dict]) -> dict:
    """The table of the metrics on held-out patients: the heads of its columns, and its rows."""
    first = next(iter(tested.values()))["auroc"]
    rows = [
        [title, *(_interval(numbers[key]) for numbers in tested.values()), about]
        for key, (title, about) in TESTED.items()
    ]
    return {"heads": [f"{first['n']:,} images", *tested, "what it is"], "rows": rows}


def _interval(figure: dict) -> str:
    value, low, high = (
        "-" if (v := figure[name]) is None or math.isnan(v) else f"{v:.3f}"
        for name in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"


def _rows(path: Path) -> tuple[list[dict], int]:
    """The rows of a log, and how many lines are damaged. None for a number that is not finite."""
    rows, damaged = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = {name: _finite(value) for name, value in json.loads(line).items()}
            row["images"] + 0
            rows.append(row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            damaged += 1
    return rows, damaged


def _finite(value: object) -> float | None:
    """Five digits of a number, None for anything else."""
    if type(value) is int and abs(value) < 2**53:
        return value
    return float(f"{value:.5g}") if type(value) is float and math.isfinite(value) else None


def _groups(rows: list[dict]) -> Iterator[dict]:
    """The charts under each heading, for the columns that the rows have."""
    names = dict.fromkeys(name for row in rows for name in row if name != "images")
    known = {column.name for columns in GROUPS.values() for column in columns}
    other = tuple(Column(name, name, "", "") for name in names if name not in known)
    for heading, columns in {**GROUPS, OTHER: other}.items():
        charts = [
            vars(column) | {"values": [row.get(column.name) for row in rows]}
            for column in columns
            if column.name in names
        ]
        if charts:
            yield {"heading": heading, "charts": charts}


def _sheets(folder: Path, seen: int) -> list[dict]:
    """The sheets so far, in order; a resumed run may have left later ones."""
    found = sorted((int(f.stem), f.name) for f in folder.glob("*.png") if f.stem.isdecimal())
    return [
        {"images": images, "file": f"samples/{name}"} for images, name in found if images <= seen
    ]
