"""The long stages stop when asked to, lose nothing, and go on to the same end."""

import signal

import numpy as np
import pytest

from cxr import Interrupted, UsageError, datasets
from cxr.evaluation import evaluate, inputs, stages
from cxr.evaluation.cases import Judge
from cxr.evaluation.journal import NAME, Journal

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def few(bright, monkeypatch):
    """Groups of two images, all of which are randomised."""
    monkeypatch.setattr(inputs, "load_model", lambda *a: bright)
    monkeypatch.setattr(stages, "GROUP", 2)
    monkeypatch.setattr(stages, "RANDOMISED", 4)
    monkeypatch.setattr(stages, "TUNED", 1)
    monkeypatch.setattr(evaluate.plots, "installed", lambda: False)


@pytest.fixture
def run(few, xrays, masks, oracle):
    """Evaluates four images into a folder."""

    def evaluation(out, **options):
        options = {"limit": 4, "refine": 1, "masks": masks[0], "oracle": oracle} | options
        return evaluate.evaluate("bright", xrays, "test", out, **options)

    return evaluation


def stopping(monkeypatch, method, after, number=signal.SIGINT):
    """A signal at a judge's call number `after` of a method; returns the list of how many were asked
    in each call."""
    unchanged, counts = getattr(Judge, method), []

    def stopped(self, *args):
        counts.append(len(args[0]))
        if len(counts) == after:
            signal.raise_signal(number)
        return unchanged(self, *args)

    monkeypatch.setattr(Judge, method, stopped)
    return counts


@pytest.mark.parametrize(
    "method, after, words",
    [("judge", 1, "after 2 of 4 images"), ("randomisation", 1, "randomisation of 2 of 4 images")],
)
def test_a_resumed_evaluation_ends_like_one_without_a_stop(
    run, tmp_path, monkeypatch, method, after, words
):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopping(patch, method, after, signal.SIGTERM)
        part = run(tmp_path / "part")
    assert part["about"]["stopped"] and words in " ".join(part["about"]["notes"])
    assert part["reconstruction"]["psnr"]["n"] == (2 if method == "judge" else 4)
    counts = stopping(monkeypatch, "of", after=-1)
    assert run(tmp_path / "part", resume=True) == whole
    # two images still to be explained, the first two again for what comes later: of all four, five
    # explanations for their stability and a cascade of two stages; or two again for their cascades
    assert sum(counts) == (2 + 2 + 4 * (5 + 2) if method == "judge" else 2 + 2 * 2)
    assert (tmp_path / "part" / "evaluation.json").read_bytes() == (
        tmp_path / "whole" / "evaluation.json"
    ).read_bytes()
    assert "stopped" not in whole["about"]


def test_nothing_is_measured_twice_after_the_end(run, tmp_path, monkeypatch):
    whole = run(tmp_path)
    for method in ("explain", "judge", "randomisation", "tune"):
        monkeypatch.setattr(Judge, method, lambda *a: pytest.fail("measured again"))
    monkeypatch.setattr(evaluate, "classifier_metrics", lambda *a: pytest.fail("again"))
    assert run(tmp_path, resume=True) == whole


def test_a_group_that_was_kept_in_part_is_measured_as_a_whole(run, tmp_path, monkeypatch):
    whole = run(tmp_path)
    lines = (tmp_path / NAME).read_text().splitlines(keepends=True)
    cases = [line for line in lines if '"stage": "case"' in line]
    kept = [line for line in lines if line not in cases[3:] and "finished" not in line]
    (tmp_path / NAME).write_text("".join(kept))
    counts = stopping(monkeypatch, "explain", after=-1)
    assert run(tmp_path, resume=True) == whole and sum(counts) == 2


def test_a_stop_before_the_first_image_keeps_what_was_tuned(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "TUNED", 2)
    monkeypatch.setattr(stages, "GROUP", 1)
    with monkeypatch.context() as patch:
        stopping(patch, "tune", 1)
        with pytest.raises(Interrupted, match="before an image was explained"):
            run(tmp_path)
    counts = stopping(monkeypatch, "tune", after=-1)
    assert run(tmp_path, resume=True)["reconstruction"]["psnr"]["n"] == 4
    assert counts == [1]


@pytest.mark.parametrize("change", [{"refine": 2}, {"limit": 3}, {"seed": 1}, {"oracle": None}])
def test_other_options_are_not_mixed_with_what_was_kept(run, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        stopping(patch, "judge", 1)
        run(tmp_path)
    with pytest.raises(UsageError, match="is of another"):
        run(tmp_path, resume=True, **change)
    with pytest.raises(UsageError, match="go on with --resume"):
        run(tmp_path, **change)


def test_resume_takes_a_folder(run):
    with pytest.raises(UsageError, match="name it with --out"):
        run(None, resume=True)


def test_thresholds_are_best_on_validation_images(judged, monkeypatch):
    judge, _, _ = judged
    curve = np.zeros(len(stages.heatmaps.THRESHOLDS))
    curve[6] = 1
    monkeypatch.setattr(Judge, "tune", lambda self, rows: [{"edges": curve}] * len(rows))
    assert stages.tuned_thresholds(judge) == {"edges": pytest.approx(0.35)}


def test_examples_are_the_first_of_each_class_healthy_ones_above(judged, xrays):
    judge, _, e = judged
    data = datasets.open_dataset(xrays, 32)
    rows = np.random.default_rng(0).permutation(data.rows("all"))[:10]
    shown = stages.examples(judge, rows, dict.fromkeys(rows, e))
    labels = [label for label, _ in shown]
    assert labels == sorted(labels) and len(shown) == stages.SHOWN and 0 < sum(labels) < 6


def test_randomisation_is_kept_image_by_image(judged, monkeypatch):
    judge, row, e = judged
    kept = Journal(judge.data)
    monkeypatch.setattr(Judge, "randomisation", lambda *a: [{("randomisation", "edges", "1"): 0.5}])
    first = stages.again(judge, "randomisation", judge.randomisation, [row], {row: e}, kept, [])
    monkeypatch.setattr(Judge, "randomisation", lambda *a: pytest.fail("again"))
    measure = "randomisation", judge.randomisation
    assert stages.again(judge, *measure, [row], {}, kept, []) == first
    assert stages.again(judge, *measure, [row - 1], {}, kept, [signal.SIGINT]) == []
