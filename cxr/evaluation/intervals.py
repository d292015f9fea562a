"""Turns the figures of single images into means with intervals, nested as in `evaluation.json`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cxr import metrics
from cxr.evaluation import heatmaps
from cxr.evaluation.measures import SHARE, Measure
from cxr.evaluation.registry import find

Figures = dict[tuple[str, ...], float]  # of one image; a key holds the names in evaluation.json


def mean_pearson(*columns: np.ndarray) -> float:
    """The mean correlation of the columns of the first half with those of the second half."""
    pairs = zip(columns[: len(columns) // 2], columns[len(columns) // 2 :])
    return float(np.mean([metrics.pearson(a, b) for a, b in pairs]))


def statistic_of(measure: Measure) -> Callable[..., float]:
    """The function from a measure's columns to its value."""
    if measure.statistic == "mean":
        return metrics.share if measure.kind == SHARE else np.mean
    return {
        "auroc": metrics.auroc,
        "spearman": metrics.spearman,
        "mean_pearson": mean_pearson,
    }[measure.statistic]


def intervals(figures: Sequence[Figures], patients: Sequence[str]) -> dict:
    """The mean of each figure with its interval, nested. n counts the images that define a figure.
    A figure that no image defines is left out. The measure's kind decides on the interval."""
    numbers = {}
    for names in dict.fromkeys(names for image in figures for names in image):
        values = np.array([image.get(names, np.nan) for image in figures])
        defined = np.isfinite(values)
        if defined.any():
            statistic = statistic_of(find(*names))
            numbers[names] = metrics.bootstrap(
                statistic, np.array(patients)[defined], values[defined]
            )
    return nested(numbers)


def nested(flat: dict[tuple[str, ...], Any]) -> dict:
    """{("a", "b"): value} as {"a": {"b": value}}."""
    whole: dict = {}
    for (*parts, name), value in flat.items():
        inner = whole
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return whole


def last_stage(cascade: dict[str, dict]) -> dict:
    """The correlation after full randomisation, with the correlation of the magnitudes as
    `magnitude` and the means of all stages as `cascade`. NaN if a map is constant and has no
    ranks."""
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    stages = [cascade.get(str(stage), nothing) for stage in range(1, heatmaps.STAGES + 1)]
    return stages[-1] | {
        "magnitude": cascade.get("magnitude", nothing),
        "cascade": [stage["value"] for stage in stages],
    }


def without_nan(value):
    """The same value with None for every number that JSON cannot hold (NaN, infinities)."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
