"""The long stages of an evaluation. They go image by image and keep results in the journal at once.

Ctrl-C and SIGTERM end a stage after the images that are being measured.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from cxr import Interrupted, console
from cxr.evaluation import heatmaps
from cxr.evaluation.cases import GROUP, Judge
from cxr.evaluation.findings import changes
from cxr.evaluation.intervals import Figures, intervals, last_stage
from cxr.evaluation.journal import Journal
from cxr.evaluation.realism import counterfactual_distances, random_lungs
from cxr.explanation import Explanation
from cxr.options import stopping

TUNED = 32  # most validation images for the threshold of a map
REPEATED = 8  # most images that are explained five more times
RANDOMISED = 16  # most images for the randomisation; each is explained once in every stage
SHOWN = 6  # examples in a plot


@dataclass(frozen=True)
class Measured:
    """The results of all stages. They are empty for a model without a GAN."""

    numbers: dict = field(default_factory=dict)  # {part: {name: {value, low, high, n}}}
    responses: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    # [images, F], the logits along each path
    examples: list[tuple[int, Explanation]] = field(default_factory=list)  # label, explanation
    stopped: str = ""  # how much was measured, if not all


def measure(
    judge: Judge, rows: np.ndarray, split: str, journal: Journal, draws: bool = False
) -> Measured:
    """Measure explanations of the rows, and random lungs. draws: whether to keep examples for a
    plot.

    After Ctrl-C, the numbers are those of the images so far. Raises Interrupted if there are none.
    """
    with stopping("group of images") as caught:
        if split in ("test", "train"):  # thresholds tuned on what is measured would flatter it
            judge.thresholds = tuned_thresholds(judge, journal, caught)
        cases, explanations = explained(judge, rows, journal, caught)
        first = rows[: min(len(cases), RANDOMISED)]
        kept = explanations, journal, caught
        repeated = again(judge, "stability", judge.stability, first[:REPEATED], *kept)
        stages = again(judge, "randomisation", judge.randomisation, first, *kept)
    patients = [judge.data.patients[row] for row in rows[: len(cases)]]
    figures = [_figures(case["figures"]) for case in cases]
    for case, extra in zip(figures, repeated):
        case |= extra
    numbers = intervals(figures, patients)
    numbers["counterfactual"] |= counterfactual_distances(
        *(judge.oracle, judge.data, split, judge.seed),
        {name: [case["features"][name] for case in cases] for name in cases[0]["features"]},
        np.array([case["diseased"] for case in cases]),
    )
    if judge.findings is not None:
        asked = [case["findings"] for case in cases]
        for part, extra in changes(judge.findings.names, asked, patients).items():
            numbers[part] = numbers.get(part, {}) | extra
    lungs = journal.once(
        "random lungs", lambda: random_lungs(judge.model, judge.seed, judge.oracle)
    )
    numbers["disentanglement"] = lungs | numbers.get("disentanglement", {})
    cascades = intervals(stages, patients[: len(stages)]).get("randomisation", {})
    if cascades:
        numbers["randomisation"] = {m: last_stage(stage) for m, stage in cascades.items()}
    stopped = ""
    if len(cases) < len(rows):
        stopped = f"{len(cases)} of {len(rows)} images"
    elif len(stages) < len(first):
        stopped = f"the randomisation of {len(stages)} of {len(first)} images"
    responses = np.array([case["logits"] for case in cases], np.float32)
    shown = examples(judge, first, explanations) if draws else []
    return Measured(numbers, responses, shown, stopped)


def tuned_thresholds(
    judge: Judge, journal: Journal | None = None, caught: list[int] | None = None
) -> dict[str, float]:
    """For each kind of map, the share of its maximum with the best mean IoU over at most 32
    validation images that have a mask. Empty if none has a mask. Raises Interrupted if a signal is
    `caught`."""
    journal = journal or Journal(judge.data)
    candidates = np.flatnonzero(judge.data.splits == "val") if judge.masks else []
    rows = [row for row in candidates if judge.place(judge.masks, row) is not None][:TUNED]
    curves: dict[str, list[list[float]]] = {}
    with console.progress("tune", len(rows), quiet=not rows) as bar:
        for group in _groups(rows):
            if caught:
                raise Interrupted(
                    "stopped before an image was explained: go on with the same command and "
                    "--resume"
                )
            if missing := [row for row in group if journal.get("tuning", row) is None]:
                tuned = ({k: v.tolist() for k, v in curve.items()} for curve in judge.tune(missing))
                journal.add("tuning", dict(zip(missing, tuned)))
            for row in group:
                for name, curve in journal.get("tuning", row).items():
                    curves.setdefault(name, []).append(curve)
            bar.advance(len(group))
    best = {name: np.mean(curve, 0).argmax() for name, curve in curves.items()}
    return {name: float(heatmaps.THRESHOLDS[place]) for name, place in best.items()}


def explained(
    judge: Judge, rows: np.ndarray, journal: Journal, caught: list[int]
) -> tuple[list[dict], dict[int, Explanation]]:
    """What is kept of each row, {"figures", "logits", "diseased", "features", "findings"}, and those explanations
    that are used again. The others are not kept because they are large.

    Rows are judged in groups because some figures compare the images of a group. Therefore a whole
    group is measured, or the whole group is taken from the journal.
    """
    cases: list[dict] = []
    explanations: dict[int, Explanation] = {}
    with console.progress("explain", len(rows)) as bar:
        for group in _groups(rows):
            if any(journal.get("case", row) is None for row in group):
                if caught and cases:
                    break
                paths = judge.explain(group)
                journal.add("case", dict(zip(group, _cases(judge, group, paths))))
                explanations |= list(zip(group, paths))[: max(RANDOMISED - len(cases), 0)]
            cases += [journal.get("case", row) for row in group]
            bar.advance(len(group))
    return cases, explanations


def again(
    judge: Judge,
    stage: str,
    measure: Callable[[list[Explanation], Sequence[int]], list[Figures]],
    rows: np.ndarray,
    explanations: dict[int, Explanation],
    journal: Journal,
    caught: list[int],
) -> list[Figures]:
    """The figures of each row that a later stage measures, from its explanation."""
    figures = []
    with console.progress(stage, len(rows)) as bar:
        for group in _groups(rows):
            if missing := [row for row in group if journal.get(stage, row) is None]:
                if caught:
                    break
                unknown = [row for row in missing if row not in explanations]
                explanations |= zip(unknown, judge.explain(unknown) if unknown else ())
                measured = measure([explanations[row] for row in missing], missing)
                journal.add(stage, dict(zip(missing, map(_joined, measured))))
            figures += [_figures(journal.get(stage, row)) for row in group]
            bar.advance(len(group))
    return figures


def examples(
    judge: Judge, rows: np.ndarray, explanations: dict[int, Explanation]
) -> list[tuple[int, Explanation]]:
    """Labels and explanations for a plot. They are not selected: they are the first images of each
    class in turn, sorted with the healthy ones first."""
    labels = judge.data.labels
    classes = [[row for row in rows if labels[row] == label] for label in (0, 1)]
    turns = [row for pair in zip_longest(*classes) for row in pair if row is not None][:SHOWN]
    return [
        (int(labels[row]), explanations.get(row) or judge.explain([row])[0])
        for row in sorted(turns, key=labels.item)
    ]


def _groups(rows: Sequence[int]) -> list[Sequence[int]]:
    """The rows, as many at a time as are measured together."""
    return [rows[first : first + GROUP] for first in range(0, len(rows), GROUP)]


def _cases(judge: Judge, group: np.ndarray, paths: list[Explanation]) -> list[dict]:
    return [
        {
            "figures": _joined(figures),
            "logits": e.logits.tolist(),
            "diseased": e.diseased,
            "features": judge.features(e),
            "findings": judge.answers(e),
        }
        for figures, e in zip(judge.judge(group, paths), paths)
    ]


def _joined(figures: Figures) -> dict[str, float]:
    """Figures with each key as one string, for a file. Figures that are not finite are left out."""
    return {"/".join(key): float(v) for key, v in figures.items() if math.isfinite(v)}


def _figures(joined: dict[str, float]) -> Figures:
    return {tuple(key.split("/")): value for key, value in joined.items()}
