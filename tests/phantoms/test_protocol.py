"""The phantom protocol: its figures on known input, and a small run of the whole."""

import json

import numpy as np
import pytest

import cxrgan
from cxr import UsageError, metrics
from cxr.classifier import to_tensor
from cxr.evaluation import stages
from cxr.phantoms import lesions, protocol
from cxr.phantoms.arm import Arm, Plan

SMALL = Plan("tiny", seeds=1, phantoms=200, cnn=10_240, gan=64, explained=5, refine=1)
PARTS = {
    *("cnn", "reliance", "reconstruction", "counterfactual", "path", "real_cnn", "localisation"),
    *("faithfulness", "twin", "dose", "swap"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small run of the whole: its folder and its numbers."""
    out = tmp_path_factory.mktemp("protocol")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "SHORTCUTS", (1.0,))
        patch.setattr(stages, "TUNED", 2)
        return out, protocol.evaluate(out, SMALL)


def leaves(numbers, key=""):
    if "value" in numbers:
        yield key, numbers
    else:
        for name, part in numbers.items():
            yield from leaves(part, f"{key}/{name}")


def test_a_figure_of_several_seeds_is_the_mean_of_theirs():
    arms = [[{"a": 1.0}, {"a": 3.0}], [{"a": 10.0}, {"b": 7.0}, {"a": np.nan}]]
    found = protocol.figure(np.mean, arms, "a")
    assert found["value"] == 6 and found["seeds"] == [2, 10] and found["n"] == 3
    assert found["low"] < 6 < found["high"]
    assert "seeds" not in protocol.figure(np.mean, arms[:1], "a")
    assert protocol.figure(np.mean, arms, "c") is None


def test_raw_columns_are_material_and_no_figures():
    rows = [{"raw/logit": x, "raw/label": float(x > 0), "twin/original/psnr": x} for x in (-1, 2)]
    numbers = protocol.summary([rows])
    assert numbers["cnn"]["auroc"]["value"] == 1
    assert numbers["twin"]["original"]["psnr"]["value"] == 0.5
    assert set(numbers) == {"cnn", "twin"}


def test_every_arm_and_control_has_its_figures(small):
    _, numbers = small
    assert set(numbers["phantoms"]) == {"lesion", "shortcut-1.0"}
    assert set(numbers["controls"]) == {"real", "no_cnn", "untrained", "shuffled"}
    assert PARTS <= set(numbers["phantoms"]["lesion"])
    assert set(numbers["controls"]["no_cnn"]) >= {"real_cnn", "twin", "dose", "swap"}
    for key, found in leaves({k: numbers[k] for k in ("phantoms", "controls")}):
        assert {"value", "low", "high", "n"} <= set(found) and found["n"] > 0, key
        assert np.isfinite(found["value"]), key
    json.dumps(numbers, allow_nan=False)


def test_what_the_cnn_relies_on_is_found_out(small):
    _, numbers = small
    assert numbers["about"]["relies_on"] == {"lesion-0": "lesion", "shortcut-1.0": "marker"}
    drops = numbers["phantoms"]["shortcut-1.0"]["reliance"]
    assert drops["marker"]["drop"]["low"] > drops["lesion"]["drop"]["high"]
    assert "marker" not in numbers["phantoms"]["lesion"]["reliance"]


def test_chance_is_the_area_of_the_marker_and_of_the_mask(small):
    _, numbers = small
    marker = numbers["phantoms"]["shortcut-1.0"]["marker"]
    assert 0.003 < marker["chance"]["mass"]["value"] < 0.02
    assert marker["random"]["mass"]["value"] == pytest.approx(
        marker["chance"]["mass"]["value"], rel=0.5
    )


def test_the_twin_of_reference_is_the_truth(small):
    """The untouched original differs from its twin by the lesions alone."""
    _, numbers = small
    twin = numbers["phantoms"]["lesion"]["twin"]
    sample = lesions.phantom(2, SMALL.seed, 32)
    pair = (sample.render(lesions=shown).image[None] for shown in (True, False))
    alone = metrics.psnr(*(to_tensor(x) for x in pair)).item()
    assert 15 < alone < 60 and 15 < twin["original"]["psnr"]["value"] < 60
    assert twin["overlaid"]["ssim"]["value"] > twin["healthy_end"]["ssim"]["value"]


def test_an_arm_goes_on_where_it_stopped_and_ends_the_same(small, monkeypatch):
    out, _ = small
    monkeypatch.setattr(stages, "TUNED", 2)
    arm = Arm(out / "shortcut-1.0", SMALL, SMALL.seed, 1.0)
    complete = protocol.run_arm(arm)
    (arm.folder / "explained.json").unlink()
    assert protocol.run_arm(arm) == complete


def test_numbers_are_written(small):
    out, numbers = small
    assert json.loads((out / "evaluation.json").read_text()) == numbers


def test_another_plan_is_refused(small):
    with pytest.raises(UsageError, match="another --out"):
        protocol.evaluate(small[0], Plan())


def test_the_command_prints_a_table_of_every_arm(small, monkeypatch, capsys):
    out, numbers = small
    monkeypatch.setattr(protocol, "evaluate", lambda *a: numbers)
    with pytest.raises(SystemExit) as stop:
        cxrgan.cli(["evaluate-phantoms", "--out", str(out)])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "localisation, lesion" in shown and "marker, shortcut-1.0" in shown
