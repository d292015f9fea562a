"""Every measure is declared once, and all else follows."""

import subprocess
import sys

import pytest

from cxr import metrics
from cxr.classifier import PERTURBATIONS
from cxr.evaluation import measures, registry
from cxr.evaluation.measures import EVALUATION, MEASURES, NEEDS
from cxr.evaluation.registry import find


def test_declarations_are_whole():
    for key, measure in MEASURES.items():
        assert measure.kind in measures.INTERVALS and measure.better in ("more", "less", ""), key
        assert set(measure.needs) <= NEEDS.keys(), key
        assert measure.meaning.endswith(".") and measure.title, key
        assert bool(measure.columns) == (measure.statistic != "mean"), key
    assert len({(m.part, m.title) for m in MEASURES.values()}) == len(MEASURES)


def test_the_classifiers_measures_are_of_the_kinds_whose_intervals_they_get():
    kinds = {metrics.share_ends: measures.SHARE, metrics.auroc_ends: measures.AUROC}
    for name in ("auroc", "accuracy"):
        assert find("classifier", name).kind == kinds[metrics.ENDS[getattr(metrics, name)]]
    assert metrics.calibration_error not in metrics.ENDS
    for change in PERTURBATIONS[1:]:
        assert find("classifier", f"auroc_{change}").kind == measures.AUROC


def test_a_measure_is_found_under_any_method_and_stage():
    assert find("localisation", "anything", "ap").key == "localisation.*.ap"
    assert find("randomisation", "edges").key == "randomisation.*"
    assert find("randomisation", "edges", "4").key == "randomisation.*"
    assert find("randomisation", "edges", "magnitude").key == "randomisation.*.magnitude"
    for names in (("localisation", "edges", "guess"), ("path", "guess"), ("localisation",)):
        with pytest.raises(KeyError):
            find(*names)


def whole():
    """Numbers that hold every measure of an evaluation."""
    numbers = {}
    for measure in EVALUATION:
        inner = numbers
        for name in measure.key.split("."):
            inner = inner.setdefault(name, {})
    return numbers


def without(*parts):
    numbers = whole()
    for part, name in (part.split(".") for part in parts):
        numbers[part].pop(name)
    return numbers


def test_nothing_is_said_of_what_is_measured():
    assert registry.not_measured(whole()) == []


def test_a_missing_measure_is_named_with_its_reason():
    numbers = without("disentanglement.swap")
    (line,) = registry.not_measured(numbers)
    assert line == (
        "not measured: disentanglement.swap (the CNN calls all neighbouring pairs alike)"
    )
    numbers = whole()
    del numbers["localisation"]["*"]["iou_tuned"]
    (line,) = registry.not_measured(numbers)
    assert line.startswith("not measured: localisation.*.iou_tuned (it is tuned on")
    numbers = whole()
    del numbers["localisation"]
    (line,) = registry.not_measured(numbers)
    assert line.startswith("not measured: localisation (") and "--masks" in line


def test_the_reason_is_the_first_need_that_is_not_met():
    of_both = [m.key for m in EVALUATION if "independent" in m.needs and m.part != "generator"]
    numbers = without(*of_both)
    del numbers["generator"]
    (line,) = registry.not_measured(numbers)
    assert line.startswith("not measured: generator, counterfactual.oracle_validity, ")
    assert line.endswith("(no independent classifier is given (--oracle))")
    numbers = whole()
    del numbers["generator"]
    (line,) = registry.not_measured(numbers)
    assert "`features`" in line
    names = "disentanglement.inverted_healthy", "disentanglement.oracle_inverted_healthy"
    (line,) = registry.not_measured(without(*names))
    assert line == f"not measured: {', '.join(names)} (no explained image is diseased)"


def test_the_documentation_holds_every_measure():
    text = registry.markdown()
    assert all(f"| `{key}` |" in text for key in MEASURES)
    assert all(kind in text for kind in measures.INTERVALS.values())
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert {row.count(" | ") for row in rows} == {5}


def test_the_registry_needs_no_torch():
    code = "import sys, cxr.evaluation.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
