"""Figures of images as figures with intervals."""

import numpy as np
import pytest

from cxr import metrics
from cxr.evaluation import intervals
from cxr.evaluation.measures import MEASURES


def test_figures_are_means_over_the_images_that_define_them():
    key = ("localisation", "edges", "ap")
    rows = [{key: 0.0}, {key: 1.0}, {}, {key: np.nan}, {("path", "spearman"): np.nan}]
    numbers = intervals.intervals(rows, list("abcde"))
    figure = {"value": 0.5, "low": 0, "high": 1, "n": 2}
    assert numbers == {"localisation": {"edges": {"ap": figure}}}


@pytest.mark.parametrize(
    "names, low",
    [
        (("counterfactual", "validity"), 0.025 ** (1 / 5)),  # shares: exact
        (("localisation", "edges", "pointing"), 0.025 ** (1 / 5)),
        (("path", "spearman"), 1),  # a correlation and scores: as their resamples
        (("randomisation", "edges", "3"), 1),
        (("randomisation", "edges", "magnitude"), 1),
        (("localisation", "edges", "auroc"), 1),
        (("localisation", "edges", "iou_otsu"), 1),
    ],
)
def test_the_interval_where_all_images_agree_follows_from_the_kind(names, low):
    numbers = intervals.intervals([{names: 1.0}] * 5, list("abcde"))
    for name in names:
        numbers = numbers[name]
    assert numbers["low"] == pytest.approx(low) and numbers["high"] == 1


def test_a_figure_that_is_not_declared_is_refused():
    with pytest.raises(KeyError, match="path.guess"):
        intervals.intervals([{("path", "guess"): 1.0}], ["a"])


def test_each_declared_statistic_is_a_function_of_its_columns():
    random = np.random.default_rng(0)
    for measure in MEASURES.values():
        columns = [random.integers(0, 2, 50) for _ in measure.columns or (0,)]
        assert np.isfinite(intervals.statistic_of(measure)(*columns)), measure.key


def test_mean_pearson_pairs_the_columns_of_both_halves():
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    mean = intervals.mean_pearson(a, b, a, -b)
    assert mean == pytest.approx(0)
    assert intervals.mean_pearson(a, b) == pytest.approx(metrics.pearson(a, b))


def test_names_are_nested():
    flat = {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert intervals.nested(flat) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_the_last_stage_keeps_the_means_of_all(monkeypatch):
    monkeypatch.setattr(intervals.heatmaps, "STAGES", 3)
    figure = {"value": 0.1, "low": 0, "high": 1, "n": 4}
    cascade = {"1": figure | {"value": 0.9}, "3": figure, "magnitude": figure}
    last = intervals.last_stage(cascade)
    assert last["value"] == 0.1 and last["magnitude"] == figure
    assert last["cascade"][::2] == [0.9, 0.1] and np.isnan(last["cascade"][1])
