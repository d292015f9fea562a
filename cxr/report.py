"""The page of an explanation: one HTML file that needs no network and opens from a USB stick.

Images and numbers lie in it. Its one script and its one style are named by their digests in a strict
content security policy, and whatever comes from files is only ever shown as text.
"""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr import film
from cxr.classifier import to_uint8

if TYPE_CHECKING:
    from cxr.explanation import Explanation

PAGES = Path(__file__).parent / "pages"  # templates, with their scripts and their style
INDEX = b"<title>cxrgan: explanations</title>"  # of the table of all
LOGITS = ("latent_ig", "integrated_gradients")  # maps whose sum is a difference of logits
ABOUT = {
    "latent_ig": "Read this first: where the classifier's answer comes from, right or wrong; it "
    "need not be where disease is. All of it, before it is smoothed for the eye, sums to the change of the "
    "logit.",
    "difference": "What gets brighter and darker from healthy to diseased. It hardly asks the "
    "classifier.",
    "gradient": "Where the smallest change of grey would change the answer.",
    "integrated_gradients": "What each place adds to the answer on the way from the average image.",
    "grad_cam": "Roughly where the last layer looked; it has no scale.",
}


def page(e: "Explanation") -> str:
    """The HTML of an explanation, complete."""
    return fill("report", facts(e))


def index(folder: str | Path) -> str:
    """The HTML of a table of the explanations that lie in a folder, each with a link to its page;
    files that are damaged, or of another kind, are counted."""
    files = sorted(Path(folder).glob("*/explanation.json"))
    rows = []
    for file in files:
        with suppress(ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            rows.append(_row(json.loads(file.read_text()), file.parent.name))
    shown = Counter(row["name"] for row in rows)
    for row in rows:
        row["name"] = row["path"] if shown[row["name"]] > 1 else row["name"]
    return fill("index", {"rows": rows, "unreadable": len(files) - len(rows)})


def _row(n: dict, folder: str) -> dict:
    """What the table shows of an explanation; raises one of the errors above if it is none."""
    values = {
        "before": n["original"]["probability"],
        "after": n["counterfactual"]["probability_overlaid"],
        "dose": n["found_dose"],
        "ssim": n["reconstruction"]["ssim"],
    }
    spread = n["restarts"]["spread"]
    for value in (*values.values(), *([] if spread is None else [spread])):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(value)
    warnings = n["warnings"]
    if not (isinstance(warnings, list) and all(isinstance(line, str) for line in warnings)):
        raise ValueError(warnings)
    about = {"warnings": warnings, "spread": spread, "folder": folder}
    about["believe"] = n.get("believe") is not False  # which an older one does not say
    path = Path(n["image"] or folder)
    names = {"name": path.name, "path": str(Path(path.absolute().parent.name, path.name))}
    return {**names, "disease": n["classes"][1], "made": made(n), **values, **about}


def made(n: dict) -> str:
    """With what an explanation was made. n: its numbers."""
    own = n["classifier"] == "the model's own"
    return Path(n["model"]).stem + ("" if own else f", {n['classifier']}")


def thumbnail(e: "Explanation") -> np.ndarray:
    """The original, the counterfactual and the first map side by side: uint8 [64, 192, 3]."""
    image, changed = to_uint8(e.image[0, 0]), to_uint8(e.counterfactual())
    name = next(iter(e.maps))
    tiles = [(image, None), (changed, None), (image, e.drawn(name))]
    return np.concatenate([film.overlay(x, heat, True, 64) for x, heat in tiles], 1)


def fill(name: str, told: object, **drawn: str) -> str:
    """A template with its style, its script, the facts that it shows, and HTML that is drawn."""
    style, *scripts = (PAGES / n for n in ("style.css", "shared.js", f"{name}.js"))
    style, script = style.read_text(), "".join(path.read_text() for path in scripts)
    data = json.dumps(told, ensure_ascii=True, allow_nan=False)
    for sign in "<>&":  # else a name could end the element
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    parts = {"STYLE": style, "SCRIPT": script, "DATA": data, **drawn}
    parts |= {"STYLE_HASH": _digest(style), "SCRIPT_HASH": _digest(script)}
    # in one pass, since a name may hold a $
    return re.sub(r"\$([A-Z_]+)", lambda m: parts[m[1]], (PAGES / f"{name}.html").read_text())


@lru_cache
def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def facts(e: "Explanation") -> dict:
    """All that the page shows, fit for JSON; pictures are data URIs of PNG files."""
    n = e.numbers
    return {
        "size": e.image.shape[-1],
        "file": Path(n["image"]).name if n["image"] else "",
        "made": f"{made(n)}, seed {n['options']['seed']}, cxrgan {n['versions']['cxrgan']}.",
        "disease": e.classes[1],
        "sentence": sentence(e),
        "banner": e.banner,
        "warnings": e.warnings,
        "doses": n["dose"],
        "found": e.overlay.own,
        "start": n["counterfactual"]["frame"],
        "original_p": n["original"]["probability"],
        "drawn_p": n["probability"],
        "overlaid_p": n["probability_overlaid"],
        "turns": turnings(n["dose"], n["probability_overlaid"]),
        "original": _uri(to_uint8(e.image[0, 0])),
        "drawn": _uri(np.concatenate(list(to_uint8(e.frames[:, 0])), 1)),
        "overlaid": _uri(np.concatenate(list(to_uint8(e.overlaid[:, 0])), 1)),
        "maps": [_map(e, name) for name in e.maps],
        "spread": _spread(e),
        "numbers": _numbers(e),
    }


def turnings(doses: list[float], probabilities: list[float]) -> list[float]:
    """The doses at which the probability passes 0.5."""
    steps = pairwise(zip(doses, probabilities))
    return [a + (b - a) * (0.5 - p) / (q - p) for (a, p), (b, q) in steps if (p > 0.5) != (q > 0.5)]


def sentence(e: "Explanation") -> str:
    n, disease = e.numbers, e.classes[1]
    before, after = n["original"]["probability"], n["counterfactual"]["probability_overlaid"]
    called, other = (disease, e.classes[0]) if e.diseased else e.classes
    change = "without what it reads as disease" if e.diseased else "with disease added to it"
    return (
        f"The classifier calls this image {called}, not {other}: probability of {disease} {before:.2f}; "
        f"the same image {change}: {after:.2f}."
    )


def _map(e: "Explanation", name: str) -> dict:
    """A heat map as grey levels: 128 is nothing where it has signs, 0 where it has none."""
    heat = e.drawn(name)
    signed = bool(heat.min() < 0)
    top = max(float(np.percentile(np.abs(heat), 99.5)), 1e-12)
    scaled = (heat / top).clip(-1, 1)
    levels = 128 + 127 * scaled if signed else 255 * scaled
    unit = " logits a pixel, smoothed" if name in LOGITS else ""
    less, more = f"less {e.classes[1]}", f"more {e.classes[1]}"
    if name == "grad_cam":
        more, unit = f"most {e.classes[1]}", " (no scale)"
    if name == "difference":
        less, more = "darker with disease", "brighter with disease"
    return {
        "name": film.TITLES[name],
        "signed": signed,
        "low": f"{less}, {-top:.2g}{unit}",
        "high": f"{more}, {top:.2g}{unit}" if heat.any() else "no place speaks for it",
        "about": ABOUT[name],
        "png": _uri(np.uint8(np.rint(levels))),
    }


def _spread(e: "Explanation") -> str | None:
    """Where the restarts' changes disagree: their standard deviation; None for a single one."""
    walks = e.inversion.walks
    if len(walks) < 2:
        return None
    ends = e.reconstructions if e.diseased else walks[:, -1]
    apart = (ends - walks[:, 0]).std(0, correction=0)[0]
    return _uri(np.uint8((255 * apart / apart.max().clamp_min(1e-6)).cpu().numpy()))


def _numbers(e: "Explanation") -> list[tuple[str, str, str]]:
    """Rows of the table: a number's name, its value, and what it says."""
    n = e.numbers
    spread = n["restarts"]["spread"]
    rows = [
        ("SSIM of the reconstruction", n["reconstruction"]["ssim"],
         "How like the original the GAN's picture of it is; 1 is equal, under 0.7 it is not believed."),
        ("gap in probability", n["reconstruction"]["probability_gap"],
         "How differently the classifier answers to that picture; above 0.1 the path is of another image."),
        ("amount of disease found", n["found_dose"],
         "How much disease the GAN found in the original, from 0 to 1. No measure of how ill the patient is."),
        ("pixels changed", n["counterfactual"]["changed_overlaid"],
         "The share of the original that was changed to turn the verdict, or to try."),
        ("largest jump", n["largest_jump"],
         "The largest step of the answer between two frames, as a share of the whole change; near 1 it leaps."),
        ("completeness error", n["completeness_error"],
         "How far the latent IG map is from summing to the change of the logit; 0 is exact."),
    ]  # fmt: skip
    if spread is not None:
        words = (
            "How far repeated searches disagree, relative to the change itself; at 0 they agree."
        )
        rows.append(("spread over restarts", spread, words))
    return [(name, f"{value:.3f}", about) for name, value, about in rows]


def _uri(pixels: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(film.png(pixels)).decode()}"
