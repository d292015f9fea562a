"""The plots of an evaluation, for print, drawn with matplotlib if it is installed."""

import importlib.util
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr import console, film, metrics
from cxr.classifier import to_uint8
from cxr.evaluation.measures import ASKS, METHODS
from cxr.evaluation.registry import find, title_of
from cxr.explanation import Explanation
from cxr.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.5, 7.0  # widths in inches
INK, RULE = "#26282c", "#aab0b8"
OURS, ASKING, BLIND = "#1f5fa8", "#8496ab", "#d3d7dd"
SIDE = 256  # of an example, in pixels
COLOURS = dict(zip(ASKS, (OURS, ASKING, BLIND)))  # of a method, by what it asks
POINTS = {"fmt": "none", "ecolor": INK, "elinewidth": 0.7}  # draws an interval without its value
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "cxrgan",  # the same figure has the same ids
}
Facet = tuple[str, dict[str, dict]]  # a title, and each method's figure {value, low, high, n}


@dataclass
class Material:
    """Data for the plots that `evaluation.json` does not hold."""

    classes: Sequence[str]
    logits: np.ndarray  # [N], the classifier's, of all images of the split
    labels: np.ndarray  # [N]
    named: tuple[float, float]  # the logits that dose 0 and dose 1 name
    responses: np.ndarray  # [images, F], the logits along each path
    examples: list[tuple[int, Explanation]]  # labels and explanations


def installed() -> bool:
    """Whether matplotlib is installed. If not, a warning says how to install it."""
    if importlib.util.find_spec("matplotlib"):
        return True
    console.warn("figures are left out, matplotlib is missing: pip install 'cxrgan[plots]'")
    return False


def draw(folder: str | Path, numbers: dict, material: Material) -> dict[str, str]:
    """Write every plot for which there are numbers as PNG, each completely or not at all. Returns
    them as SVG."""
    import matplotlib

    folder, drawn = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(numbers, material):
            with replacing(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", metadata={"Software": None})
            svg = io.StringIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            drawn[name] = svg.getvalue()
    return drawn


def _figures(numbers: dict, material: Material) -> Iterator[tuple[str, "Figure"]]:
    auroc = numbers["classifier"]["auroc"]
    if auroc["value"] is not None:  # both classes have images
        yield "classifier", classifier(material.logits, material.labels, auroc)
    if len(material.responses):
        yield "response", response(material.responses, material.named)
    if "localisation" in numbers:
        yield "localisation", bars(facets("localisation", numbers["localisation"]))
    dependence = facets("faithfulness", numbers.get("faithfulness", {}))
    if "randomisation" in numbers:
        dependence.append((_title("randomisation", "*"), numbers["randomisation"]))
    if dependence:
        yield "dependence", bars(dependence)
    if material.examples:
        yield "examples", examples(material.examples, material.classes)


def classifier(logits: np.ndarray, labels: np.ndarray, auroc: dict) -> "Figure":
    """The ROC curve and the reliability diagram. logits, labels: [N]; auroc: {value, low, high,
    n}."""
    figure, pair = _axes(1, 2, 2.05)
    _roc(pair[0], logits, labels, auroc)
    _reliability(pair[1], metrics.sigmoid(logits), labels)
    for axes in pair:
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=0.6, zorder=1)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    figure.legend(loc="outside lower center", ncols=3, handlelength=1)
    return figure


def _roc(axes: "Axes", logits: np.ndarray, labels: np.ndarray, auroc: dict) -> None:
    """Draw the ROC curve, the area under it, and the point at probability 0.5."""
    groups = [np.sort(logits[labels == label]) for label in (0, 1)]
    levels = np.unique(logits)
    alarms, hits = (
        np.append(1 - np.searchsorted(group, levels) / len(group), 0) for group in groups
    )
    axes.plot(alarms, hits, color=OURS, clip_on=False)
    point = [np.mean(group >= 0) for group in groups]
    axes.plot(*point, "o", c=OURS, mfc="white", ms=3.5, clip_on=False, label="at probability 0.5")
    text = f"AUROC {auroc['value']:.3f}\n{auroc['low']:.3f} to {auroc['high']:.3f}"
    axes.text(0.97, 0.05, f"{text}\n{auroc['n']} images", ha="right", fontsize=6.5)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")


def _reliability(axes: "Axes", probabilities: np.ndarray, labels: np.ndarray) -> None:
    """Draw the share of diseased images with Wilson's 95% interval for each bin of the calibration
    error. Bars show the share of all images in each bin."""
    bins = np.minimum((probabilities * metrics.BINS).astype(int), metrics.BINS - 1)
    counts = np.bincount(bins, minlength=metrics.BINS)
    centres = (np.arange(metrics.BINS) + 0.5) / metrics.BINS
    width = 0.9 / metrics.BINS
    axes.bar(centres, counts / len(bins), width, color=BLIND, label="share of all images")
    n = counts[counts > 0]
    mean, share = (
        np.bincount(bins, values, metrics.BINS)[counts > 0] / n
        for values in (probabilities, labels)
    )
    axes.errorbar(mean, share, np.abs(_wilson(share, n) - share), **POINTS)
    axes.plot(mean, share, "o", c=OURS, ms=3, clip_on=False, label="share of diseased")
    axes.set(xlabel="probability given", ylabel="share")


def _wilson(share: np.ndarray, n: np.ndarray, z: float = 1.96) -> np.ndarray:
    """The ends [2, ...] of Wilson's (1927) interval of a share among n images."""
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (share + z**2 / (2 * n) + np.stack([-half, half])) / (1 + z**2 / n)


def response(logits: np.ndarray, named: tuple[float, float]) -> "Figure":
    """Logit and probability along the path: their spread over images, and the line that the doses
    name. logits: [images, F]; named: the logits of dose 0 and dose 1."""
    figure, pair = _axes(1, 2, 2.0)
    doses = np.linspace(0, 1, logits.shape[1])
    levels = np.percentile(logits, (5, 25, 50, 75, 95), axis=0)  # [5, F]
    line = named[0] + doses * (named[1] - named[0])
    for axes, scale, label in zip(pair, (np.asarray, metrics.sigmoid), ("logit", "probability")):
        lowest, low, middle, high, highest = scale(levels)
        axes.fill_between(doses, lowest, highest, color=OURS, alpha=0.15, linewidth=0)
        axes.fill_between(doses, low, high, color=OURS, alpha=0.3, linewidth=0)
        axes.plot(doses, middle, color=OURS)
        axes.plot(doses, scale(line), "--", color=INK, linewidth=0.7)
        axes.set(xlim=(0, 1), xticks=(0, 0.5, 1), xlabel="dose", ylabel=label)
    pair[1].set(ylim=(0, 1), yticks=(0, 0.5, 1))
    shown = dict(
        zip(
            (f"median of {len(logits)} images", "named by the dose", "5% to 95%", "25% to 75%"),
            (*pair[0].lines, *pair[0].collections),
        )
    )
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2)
    return figure


def facets(part: str, methods: dict[str, dict[str, dict]]) -> list[Facet]:
    """A facet for each measure, from {METHOD: {measure: figure}}."""
    names = dict.fromkeys(name for figures in methods.values() for name in figures)
    return [
        (
            _title(part, "*", name),
            {method: figures[name] for method, figures in methods.items() if name in figures},
        )
        for name in names
    ]


def _title(*names: str) -> str:
    """A measure's title on short lines. If less is better, it says so."""
    measure = find(*names)
    return textwrap.fill(measure.title + ", less is better" * (measure.better == "less"), 20)


def bars(facets: Sequence[Facet]) -> "Figure":
    """A bar with its 95% interval for each method, our maps first. Three facets in a row."""
    names = dict.fromkeys(method for _, figures in facets for method in figures)
    methods = sorted(names, key=lambda method: ASKS.index(_asks(method)))
    columns, rows = min(3, len(facets)), -(-len(facets) // 3)
    figure, cells = _axes(rows, columns, rows * (0.45 + 0.13 * len(methods)) + 0.2)
    for axes, (title, figures) in zip(cells, facets):
        _bars(axes, [(method, figures.get(method, {})) for method in methods])
        axes.set_title(title)
        axes.tick_params(axis="y", length=0, labelleft=axes.get_subplotspec().is_first_col())
    for axes in cells[len(facets) :]:
        axes.set_axis_off()
    figure.legend(*cells[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _bars(axes: "Axes", rows: Sequence[tuple[str, dict]]) -> None:
    """Draw one facet: rows of (method, {value, low, high}) from top to bottom."""
    places, asked = np.arange(len(rows)), np.array([_asks(method) for method, _ in rows])
    value, low, high = (
        np.array([figure.get(key) for _, figure in rows], float) for key in ("value", "low", "high")
    )
    for asks, colour in COLOURS.items():
        if (asked == asks).any():
            axes.barh(places[asked == asks], value[asked == asks], 0.7, color=colour, label=asks)
    axes.errorbar(value, places, xerr=np.maximum((value - low, high - value), 0), **POINTS)
    if np.nanmin(low, initial=0) < 0:
        axes.axvline(0, color=RULE, linewidth=0.5)
    axes.set_yticks(places, [title_of(method) for method, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=3)


def examples(rows: Sequence[tuple[int, Explanation]], classes: Sequence[str]) -> "Figure":
    """A plot as wide as a page, with a row for each (label, explanation): the images of the path,
    our map and Grad-CAM."""
    tiles = [_tiles(e) for _, e in rows]
    figure, cells = _axes(len(rows), len(tiles[0]), PAGE / len(tiles[0]) * len(rows) + 0.4, PAGE)
    for axes, (name, picture, note) in zip(cells, (tile for row in tiles for tile in row)):
        axes.imshow(picture)
        axes.set(xticks=(), yticks=())
        axes.spines[:].set_visible(False)
        if note:
            box = {"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 1.5}
            place = {"transform": axes.transAxes, "color": "white", "fontsize": 9, "bbox": box}
            axes.text(0.04, 0.05, note, **place)
        if axes.get_subplotspec().is_first_row():
            axes.set_title(name, fontsize=10)
    for axes, (label, _) in zip(cells[:: len(tiles[0])], rows):
        axes.set_ylabel(classes[label], fontsize=10)
    legend = f"P: probability of {classes[1]}. {tiles[0][4][0]}: red raises it, blue lowers it."
    figure.supxlabel(legend, fontsize=9)
    return figure


def _tiles(e: Explanation) -> list[tuple[str, np.ndarray, str]]:
    """The name, picture (uint8 [H, W, 3]) and note of each column."""
    shown = {
        "original": (e.image[0], e.numbers["original"]["probability"]),
        "reconstruction": (e.reconstructions[0], e.numbers["reconstruction"]["probability"]),
        "healthy end": (e.frames[0], e.numbers["probability"][0]),
        "diseased end": (e.frames[-1], e.numbers["probability"][-1]),
    }
    tiles = [
        (name, film.overlay(to_uint8(x[0]), None, False, SIDE), f"P {p:.2f}")
        for name, (x, p) in shown.items()
    ]
    original = to_uint8(e.image[0, 0])
    ours = next(iter(e.maps))
    for name in [ours, *({"grad_cam"} & e.maps.keys())]:
        picture = film.overlay(original, e.drawn(name), name == ours, SIDE)
        tiles.append((title_of(name), picture, ""))
    return tiles


def _asks(method: str) -> str:
    """What a map asks, one of ASKS. A map that is not declared is one of ours."""
    return METHODS[method].asks if method in METHODS else ASKS[0]


def _axes(rows: int, columns: int, height: float, width: float = COLUMN) -> tuple:
    """A figure of this size in inches, and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()
