"""The figures of an evaluation show what the numbers say."""

import numpy as np
import pytest
import torch

from cxr.evaluation import plots
from cxr.evaluation.measures import METHODS
from cxr.explanation import Explanation
from cxr.inversion import Inversion

pytest.importorskip("matplotlib")


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "n": 9}


def explanation():
    x = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Explanation(
        classes=("NORMAL", "SICK"),
        image=x[:1],
        lung=x[:1] > 0,
        logit=torch.tensor([2.2]),
        inversion=Inversion(codes=None, reconstructions=x[1:2], walks=None),
        encoded=x[1:2],
        directions=None,
        doses=torch.tensor([0.0, 0.5, 1.0]),
        frames=x[2:],
        overlay=None,
        overlaid=x[2:],
        logits=torch.tensor([-2.2, 0.0, 0.8]),
        overlaid_logits=torch.tensor([-2.0, 0.0, 0.8]),
        maps={"latent_ig": x[0, 0], "edges": x[1, 0], "grad_cam": x[2, 0].abs()},
        numbers={"original": {"probability": 0.9}, "reconstruction": {"probability": 0.8}}
        | {"probability": [0.1, 0.5, 0.7]},
    )


@pytest.fixture
def material():
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    logits = random.normal(2 * labels - 1, 1)
    responses = np.linspace(-3, 3, 17) + random.normal(0, 0.3, (8, 17))
    examples = [(0, explanation()), (1, explanation())]
    return plots.Material(("NORMAL", "SICK"), logits, labels, (-3, 3), responses, examples)


def test_only_what_the_numbers_hold_is_drawn(material, tmp_path):
    auroc = {"classifier": {"auroc": figure(0.9, 0.8, 1)}}
    plots.draw(tmp_path / "few", auroc, material)
    names = {"classifier", "response", "examples"}
    assert {path.stem for path in (tmp_path / "few").iterdir()} == names
    material.responses, material.examples = np.empty((0, 0)), []
    numbers = {
        "classifier": {"auroc": figure(None)},  # a class is missing
        "localisation": {method: {"ap": figure(0.1, 0, 0.2)} for method in METHODS},
        "randomisation": {method: figure(1, 1, 1) for method in METHODS},
    }
    plots.draw(tmp_path / "others", numbers, material)
    names = {"localisation", "dependence"}
    assert {path.stem for path in (tmp_path / "others").iterdir()} == names


def test_the_same_numbers_make_the_same_file(material, tmp_path):
    material.responses, material.examples = np.empty((0, 0)), []
    numbers = {"classifier": {"auroc": figure(0.9, 0.8, 1)}}
    svg = [plots.draw(tmp_path / name, numbers, material) for name in ("a", "b")]
    assert svg[0] == svg[1] and "AUROC 0.900" in svg[0]["classifier"]  # text stays text
    a, b = (tmp_path / name / "classifier.png" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch):
    lines = []
    monkeypatch.setattr(plots.console, "warn", lines.append)
    assert plots.installed() and not lines
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert not plots.installed()
    (line,) = lines
    assert "pip install 'cxrgan[plots]'" in line and "\n" not in line


def test_the_roc_passes_through_every_threshold():
    logits, labels = np.array([-2.0, -1, -1, 1, 2]), np.array([0, 0, 1, 0, 1])
    roc, _ = plots.classifier(logits, labels, figure(0.75, 0.5, 1)).axes
    curve, point, _ = (line.get_xydata() for line in roc.lines)
    known = [(0, 0), (0, 1 / 2), (1 / 3, 1 / 2), (2 / 3, 1), (1, 1)]
    assert np.allclose(curve[::-1], known)
    assert np.allclose(point, [(1 / 3, 1 / 2)])
    assert "0.750" in roc.texts[0].get_text()


def test_reliability_sets_the_share_of_diseased_against_the_probability():
    probabilities = np.repeat([0.02, 0.5, 0.98], (10, 4, 10))
    labels = np.concatenate([np.zeros(10), [1, 0, 0, 0], np.ones(10)]).astype(int)
    logits = np.log(probabilities / (1 - probabilities))
    _, axes = plots.classifier(logits, labels, figure(1, 1, 1)).axes
    assert np.allclose(axes.lines[0].get_xydata(), [(0.02, 0), (0.5, 0.25), (0.98, 1)])
    heights = [bar.get_height() for bar in axes.patches]
    assert np.isclose(sum(heights), 1) and np.isclose(heights[7], 4 / 24)


def test_wilsons_interval_is_the_published_one():
    """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    share, n = np.array([81, 15, 0, 1]) / (263, 148, 20, 29), np.array([263, 148, 20, 29])
    low, high = plots._wilson(share, n)
    assert np.allclose(low, [0.2553, 0.0624, 0, 0.0061], atol=5e-5)
    assert np.allclose(high, [0.3662, 0.1605, 0.1611, 0.1718], atol=5e-5)


def test_the_response_shows_the_median_the_spread_and_what_the_doses_name(material):
    left, right = plots.response(material.responses, material.named).axes
    median, named = (line.get_ydata() for line in left.lines)
    assert np.allclose(median, np.median(material.responses, 0))
    assert np.allclose(named, np.linspace(-3, 3, 17))
    outer = left.collections[0].get_datalim(left.transData).extents[[1, 3]]
    low, high = np.percentile(material.responses, (5, 95), axis=0)
    assert np.allclose(outer, [low.min(), high.max()])
    assert np.allclose(right.lines[0].get_ydata(), 1 / (1 + np.exp(-median)))


def test_bars_carry_their_intervals_and_our_maps_come_first():
    part = {
        "edges": {"ap": figure(0.1, 0.0, 0.2)},
        "latent_ig": {"ap": figure(0.6, 0.5, 0.8), "pointing": figure(1, 1, 1)},
        "grad_cam": {"ap": figure(None)},
    }
    facets = plots.facets("localisation", part)
    assert [list(own) for _, own in facets] == [["edges", "latent_ig", "grad_cam"], ["latent_ig"]]
    axes, _ = plots.bars(facets).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["latent IG", "Grad-CAM", "edges"]
    widths = {bar.get_y() + 0.35: bar.get_width() for bar in axes.patches}
    assert np.allclose([widths[0], widths[2]], [0.6, 0.1]) and np.isnan(widths[1])
    (segments,) = (lines.get_segments() for lines in axes.collections)
    assert np.allclose(segments[0], [(0.5, 0), (0.8, 0)])
    assert np.allclose(segments[2], [(0.0, 2), (0.2, 2)])


def test_examples_show_our_map_and_grad_cam_in_every_row(material):
    cells = plots.examples(material.examples, material.classes).axes
    titles = [axes.get_title() for axes in cells]
    ends = ["original", "reconstruction", "healthy end", "diseased end"]
    assert titles == [*ends, "latent IG", "Grad-CAM", *[""] * 6]
    assert [axes.get_ylabel() for axes in cells[::6]] == ["NORMAL", "SICK"]
    notes = [axes.texts[0].get_text() for axes in cells[:4]]
    assert notes == ["P 0.90", "P 0.80", "P 0.10", "P 0.70"]


def test_a_classifier_without_grad_cam_still_has_examples():
    e = explanation()
    del e.maps["grad_cam"]
    assert len(plots.examples([(0, e)], ("NORMAL", "SICK")).axes) == 5
