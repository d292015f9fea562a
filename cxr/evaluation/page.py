"""The page of an evaluation: what fails, all measures and the plots, one HTML file that needs no
network."""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from cxr.evaluation import tables
from cxr.evaluation.measures import Measure
from cxr.evaluation.registry import compares_methods, find, of_part, title_of
from cxr.evaluation.tables import spread
from cxr.report import fill

LACKING = "not measured"  # how the notes on what an input is missing for begin
CHANCE, MOST = "a CNN that guesses has 0.5", "nine in ten"
HALF = "a map that stays as it was when the CNN's layers are shuffled does not explain it"
RANDOM = "as good as a map that asks nothing: random pixels"
# What a measure has to reach, and why: a number, or the key of another figure.
BARS: dict[str, tuple[float | str, str]] = {
    **{f"classifier.{name}": (0.5, CHANCE) for name in ("auroc", "auroc_gamma", "auroc_blur")},
    **{f"classifier.{name}": (0.5, CHANCE) for name in ("auroc_crop", "auroc_noise")},
    "generator.fid_ratio": (2, "twice as far from real images as other real images are"),
    "reconstruction.rejected": (0.1, "one in ten"),
    "reconstruction.probability_gap": (0.1, "the gap from which a reconstruction is rejected"),
    "counterfactual.validity": (0.9, MOST),
    "counterfactual.validity_overlaid": (0.9, MOST),
    "counterfactual.oracle_validity": (0.9, MOST),
    "counterfactual.oracle_validity_overlaid": (0.9, MOST),
    "counterfactual.outside_lung": ("counterfactual.outside_area", "a change spread evenly"),
    "counterfactual.outside_lung_overlaid": (
        "counterfactual.outside_area",
        "a change spread evenly",
    ),
    "path.largest_jump": (0.25, "a quarter of the way in one step"),
    "path.spearman": (0.9, "the answer hardly follows the amount of disease below it"),
    "path.realism_mid": (0, "as real as the path's ends"),
    "disentanglement.healthy_at_zero": (0.9, MOST),
    "disentanglement.diseased_at_full": (0.9, MOST),
    "disentanglement.oracle_healthy_at_zero": (0.9, MOST),
    "disentanglement.oracle_diseased_at_full": (0.9, MOST),
    "disentanglement.inverted_healthy": (0.9, MOST),
    "disentanglement.oracle_inverted_healthy": (0.9, MOST),
    "disentanglement.swap": (0.9, MOST),
    "localisation.latent_ig.ap": ("localisation.random.ap", RANDOM),
    "faithfulness.latent_ig.deletion": ("faithfulness.random.deletion", RANDOM),
    "faithfulness.latent_ig.insertion": ("faithfulness.random.insertion", RANDOM),
    "randomisation.latent_ig": (0.5, HALF),
    "randomisation.latent_ig.magnitude": (0.5, HALF),
}
FAILED = {  # figures of an image, with the value that is a failure
    ("counterfactual/validity", 0): "the verdict does not flip",
    ("counterfactual/validity_overlaid", 0): "the overlay does not flip it",
    ("reconstruction/rejected", 1): "reconstruction rejected",
    ("gate/believed", 0): "not to be believed",
}
SHOWN = (  # figures of an image
    *("reconstruction.ssim", "reconstruction.probability_gap", "path.logit_gap"),
    "counterfactual.sparsity_overlaid",
)
PLOTS = {
    "classifier": "The classifier. Left, its ROC curve: the nearer to the upper left corner, the "
    "better. Right, how often images with a probability are diseased: on the diagonal, it can be "
    "believed.",
    "response": "The answer along the path: logit and probability from no disease (dose 0) to "
    "the full amount (dose 1). They should follow the dashed line, which the amount of disease names.",
    "localisation": "Do the maps find the disease? Their agreement with its masks.",
    "dependence": "Do the maps depend on the CNN? A map that explains it is low in deletion, high in "
    "insertion, and changes when the CNN's layers are shuffled.",
    "examples": "Examples: the first images of each class, not selected.",
}
SVG = "http://www.w3.org/2000/svg"
ELEMENTS = {"svg", "g", "defs", "clipPath", "path", "rect", "use", "text", "tspan", "image"}
PAINT = {"fill", "stroke", "opacity", "clip-path", "font-size", "text-anchor"} | {
    f"{kind}-{name}"
    for kind, names in {
        "stroke": ("width", "dasharray", "dashoffset", "linecap", "linejoin", "opacity"),
        "fill": ("opacity", "rule"),
        "clip": ("rule",),
    }.items()
    for name in names
}
ATTRIBUTES = PAINT | {"d", "x", "y", "width", "height", "transform", "viewBox"}


def page(title: str, numbers: dict, cases: dict[str, dict], plots: dict[str, str] | None) -> str:
    """The HTML of an evaluation.

    numbers: as in `evaluation.json`; cases: by the image's name, its class and its figures
    {"class", "figures"}; plots: SVG by the plot's name, None if none could be drawn.
    """
    about, rows = numbers["about"], [_image(name, case) for name, case in cases.items()]
    rows.sort(key=lambda row: -len(row["failed"]))
    facts = {
        "sentence": _sentence(title, about, rows),
        "model": Path(about["model"]).name,
        "warnings": [note for note in about["notes"] if not note.startswith(LACKING)],
        "lacking": [note for note in about["notes"] if note.startswith(LACKING)],
        "missed": sorted(missed(numbers), key=lambda row: row[2]),  # missed, then not certain
        "images": rows,
        "columns": [(find(*key.split(".")).title, key) for key in SHOWN],
        "parts": list(_parts(numbers)),
        "compared": [_compared(part, numbers[part]) for part in numbers if compares_methods(part)],
        "versions": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    }
    drawn = "".join(_figure(name, svg) for name, svg in (plots or {}).items())
    if plots is None:
        drawn = "<p>Left out, as matplotlib is missing: pip install 'cxrgan[plots]'</p>"
    return fill("evaluation", facts, FIGURES=drawn or "<p>There is nothing to draw.</p>")


def _sentence(title: str, about: dict, rows: list[dict]) -> str:
    failed = sum(row["odd"] for row in rows)
    images = f"{sum(about['images']):,} images of {about['patients']:,} patients"
    explained = f"; {failed} of {len(rows)} explanations failed" if rows else ""
    stopped = " Stopped before its end." if "stopped" in about else ""
    return f"Evaluation on {title}: {images}{explained}.{stopped}"


def missed(numbers: dict) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Rows for the figures that do not reach their bars: measure, value, verdict, bar, images,
    meaning. The verdict is `missed` where the whole interval lies on the wrong side."""
    for key, (bar, why) in BARS.items():
        figure, measure = _at(numbers, key), find(*key.split("."))
        bar = _at(numbers, bar).get("value") if isinstance(bar, str) else bar
        if figure.get("value") is None or bar is None:
            continue
        ends = [figure["value"] if end is None else end for end in (figure["low"], figure["high"])]
        worst, best = ends if measure.better == "more" else ends[::-1]
        sign = 1 if measure.better == "more" else -1
        if sign * (worst - bar) > 0:
            continue
        verdict = "not certain" if sign * (best - bar) > 0 else "missed"
        should = f"{'above' if sign > 0 else 'below'} {bar:.3g}: {why}"
        value, n = spread(figure, 3), str(figure["n"])
        yield _titled(key, measure), value, verdict, should, n, _meaning(measure)


def _at(numbers: dict, key: str) -> dict:
    """The figure of a key, empty if there is none."""
    for name in key.split("."):
        numbers = numbers.get(name, {})
    return numbers


def _titled(key: str, measure: Measure) -> str:
    part, method, *_ = key.split(".")
    return (
        f"{title_of(method, part)}, {measure.title}" if compares_methods(part) else measure.heading
    )


def _meaning(measure: Measure) -> str:
    """What a measure means, with what it refers to."""
    lines = []
    for other in of_part(measure.part):
        lines = [*lines, other.meaning] if other.meaning.startswith("The same") else [other.meaning]
        if other == measure:
            return lines[0] if lines[0] == lines[-1] else f"{lines[0]} {lines[-1]}"
    raise KeyError(measure.key)


def _image(name: str, case: dict) -> dict:
    """A row of the table of images."""
    figures = case["figures"]
    failed = [words for (key, bad), words in FAILED.items() if figures.get(key) == bad]
    values = {key: figures.get(key.replace(".", "/")) for key in SHOWN}
    words = " ".join((name, case["class"], *failed))
    row = {"name": name, "class": case["class"], "failed": failed}
    return row | {"words": words, "odd": bool(failed)} | values


def _parts(numbers: dict) -> Iterator[dict]:
    """The tables of parts that compare no methods."""
    for part, figures in numbers.items():
        if part != "about" and not compares_methods(part):
            measures = [(find(part, name), figure) for name, figure in figures.items()]
            rows = [
                (m.heading, spread(figure, 3), str(figure["n"]), m.better, _meaning(m))
                for m, figure in measures
            ]
            yield {"title": part, "rows": rows}


def _compared(part: str, methods: dict[str, dict]) -> dict:
    """The table of a part that compares methods: a row for each, a column for each measure."""
    title, header, rows = tables.compared(part, part, methods)
    figures = [tables.measures(part, *method).values() for method in methods.items()]
    counts = [str(max((figure["n"] for figure in row), default=0)) for row in figures]
    about = [(m.title, m.better, _meaning(m)) for m in of_part(part)]
    return {
        "title": title,
        "header": [*header, "images"],
        "rows": [(*row, n) for row, n in zip(rows, counts)],
        "about": [row for row in about if any(row[0] in name for name in header)],
    }


def _figure(name: str, svg: str) -> str:
    about = PLOTS[name]
    drawn = inline(name, svg, about)
    return f'<figure class="{name}"><div class="wide">{drawn}</div><figcaption>{about}</figcaption></figure>'


def inline(name: str, svg: str, title: str) -> str:
    """An SVG file as an element of a page: of the elements and attributes only those that draw, and
    the ids begin with `name`, so that they differ from those of other files."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(svg)
    _clean(root, name)
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "plot", "role": "img"}
    root.attrib |= {"aria-label": title, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    return ElementTree.tostring(root, "us-ascii").decode()


def _clean(element: ElementTree.Element, name: str) -> None:
    """Drop what does not draw, from an element and all in it, and put its name before each id."""
    for child in list(element):
        if child.tag in {f"{{{SVG}}}{kind}" for kind in ELEMENTS}:
            _clean(child, name)
        else:
            element.remove(child)
    kept = {}
    for key, value in [*element.attrib.items(), *_style(element.get("style", ""))]:
        plain = key.rpartition("}")[2]
        if plain == "id":
            kept["id"] = f"{name}-{value}"
        elif plain == "href" and value.startswith("#"):
            kept["href"] = f"#{name}-{value[1:]}"
        elif (plain == "href" and value.startswith("data:image/png;base64,")) or (
            plain in ATTRIBUTES and "url(" not in value
        ):
            kept[plain] = value
        elif plain == "clip-path" and value.startswith("url(#"):
            kept[plain] = f"url(#{name}-{value[5:]}"
    element.attrib = kept


def _style(style: str) -> Iterator[tuple[str, str]]:
    """A style's properties as attributes, which a strict policy of the page allows."""
    for declared in filter(None, style.split(";")):
        key, _, value = (part.strip() for part in declared.partition(":"))
        if key == "font":  # size and family
            key, value = "font-size", re.search(r"[\d.]+", value)[0]
        yield key, value
