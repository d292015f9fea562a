"""The page of a training run: the curves of its log and its sample sheets, one file to open.

The sheets are not in it: it shows the files in `samples/`, beside which it lies.
"""

import contextlib
import json
from pathlib import Path

from cxr import CxrError
from cxr.files import write_text
from cxr.report import fill

ABOUT = {  # column of the log: its title, which way is good, and what it is
    "loss": ("loss", "less", "Of the classifier on training images, augmented."),
    "auroc": ("AUROC", "more", "On validation: the chance that a diseased image outranks a healthy one."),
    "auroc_robust": ("AUROC, worst change", "more", "The same under the fixed change that hurts most."),
    "ssim": ("SSIM of reconstructions", "more", "How like validation images the encoder's pictures of them are."),
    "ssim_low": ("SSIM, 5th percentile", "more", "Images below it are said to be too far from their reconstruction."),
    "probability_gap": ("gap in probability", "less", "Between the classifier's answers to images and to reconstructions."),
    "inverted_healthy": ("healthy at dose 0", "more", "Share of diseased validation images called healthy once their disease is taken away."),
    "healthy_at_zero": ("random lungs, dose 0", "more", "Share of random lungs without disease that are called healthy."),
    "diseased_at_full": ("random lungs, dose 1", "more", "Share of random lungs with most disease that are called diseased."),
    "rising": ("rising steps", "more", "Share of steps along the dose at which the logit rises."),
    "logit_gap": ("logit gap", "less", "Between the logit that a dose names and the classifier's, in logits."),
    "appearance": ("distance from real images", "less", "Of random lungs, at the dose where it is largest, to the lung finder; about 1 for real images."),
    "spread": ("variety", "more", "Standard deviation of random lungs over structures; near 0 they are all alike."),
    "D": ("discriminator's loss", "", "Falls where it tells drawn from real images; about 1.4 where it guesses."),
    "G": ("generator's loss", "", "Rises where the discriminator tells its images from real ones."),
    "sign": ("discriminator's sign", "", "How sure it is of real images; above 0.6 it learns them by heart, and augmentation grows."),
    "p": ("augmentation", "", "The probability of each change of the images that the discriminator sees."),
    "r1": ("gradient penalty", "", "The discriminator's, R1."),
    "response": ("response loss", "less", "How far the classifier is from the logits that the doses name."),
    "latent": ("latent loss", "less", "How far the encoder is from the codes that drew an image."),
    "image": ("image loss", "less", "How far reconstructions are from training images."),
    "proximity": ("proximity", "", "How much a dose changes an image."),
    "dose": ("dose loss", "less", "How far the encoder's doses are from those of the classifier."),
    "images_per_second": ("images per second", "more", "The speed since the last report."),
}  # fmt: skip


def page(folder: str | Path, title: str) -> str:
    """The HTML of a run folder. Lines of the log that are no rows are left out."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (Path(folder) / "log.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) and _is_number(row.get("images")) else []
    sheets = sorted((Path(folder) / "samples").glob("*.png"))
    names = dict.fromkeys(name for row in rows for name in row if name != "images")
    return fill("run", {"title": title, "curves": _curves(rows, names), "sheets": _named(sheets)})


def write(folder: str | Path, title: str) -> None:
    """Write the page as `index.html`. A run does not end because it cannot be written."""
    with contextlib.suppress(OSError, CxrError):
        write_text(Path(folder) / "index.html", page(folder, title))


def _curves(rows: list[dict], names: dict[str, None]) -> list[dict]:
    """The known columns in the order of ABOUT, then the others."""
    ordered = [*(n for n in ABOUT if n in names), *(n for n in names if n not in ABOUT)]
    curves = []
    for name in ordered:
        title, better, about = ABOUT.get(name, (name, "", ""))
        points = [[row["images"], row[name]] for row in rows if _is_number(row.get(name))]
        if points:
            told = {"title": title, "better": better, "about": about, "points": points}
            curves.append(told)
    return curves


def _named(sheets: list[Path]) -> list[dict]:
    """File name and number of images of each sheet, which is called by it."""
    return [
        {"file": f"samples/{p.name}", "images": int(p.stem)} for p in sheets if p.stem.isdigit()
    ]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e12  # nor NaN
