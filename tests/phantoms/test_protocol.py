"""The phantom protocol: its figures on known input, and a small run of the whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import cxrgan
from cxr import UsageError, datasets, explain, metrics
from cxr.evaluation import evaluate
from cxr.phantoms import arm as arms
from cxr.phantoms import controls, lesions, probe, protocol
from cxr.phantoms.arm import Arm, Plan

SMALL = Plan("tiny", seeds=1, phantoms=200, cnn=10_240, gan=64, explained=5, refine=1)
PARTS = {
    *("cnn", "reliance", "reconstruction", "counterfactual", "path", "real_cnn", "localisation"),
    *("faithfulness", "twin", "dose", "swap"),
}


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """Phantoms with a marker on every diseased one; nothing is trained."""
    arm = Arm(tmp_path_factory.mktemp("arm"), Plan(phantoms=160), seed=3, shortcut=1.0)
    arm.make()
    return arm


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small run of the whole: its folder and its numbers."""
    out = tmp_path_factory.mktemp("protocol")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "SHORTCUTS", (1.0,))
        patch.setattr(evaluate, "TUNED", 2)
        return out, protocol.evaluate(out, SMALL)


def leaves(numbers, key=""):
    if "value" in numbers:
        yield key, numbers
    else:
        for name, part in numbers.items():
            yield from leaves(part, f"{key}/{name}")


# ---------------------------------------------------------------------------------------------
# Figures


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


def test_the_sign_that_lowers_the_logit_most_is_relied_on():
    rows = [
        {"reliance/lesion/drop": 1.0},
        {"reliance/lesion/drop": 0.0, "reliance/marker/drop": 0.8},
    ]
    assert arms.relied_on(rows) == "marker"
    assert arms.relied_on(rows[:1]) == "lesion"


def test_marker_share_is_chance_for_a_flat_map_and_one_for_the_marker():
    place = np.zeros((32, 32), bool)
    place[2:4, 5:9] = True
    maps = {"flat": -torch.ones(32, 32), "marker": torch.from_numpy(place).float()}
    row = arms.marker_share(maps, place)
    assert row["marker/flat/mass"] == pytest.approx(8 / 1024)
    assert row["marker/flat/mass"] == pytest.approx(row["marker/chance/mass"])
    assert row["marker/flat/mass_near"] == pytest.approx(24 / 1024)
    assert row["marker/marker/mass"] == row["marker/marker/mass_near"] == 1


# ---------------------------------------------------------------------------------------------
# Phantoms and controls


def test_an_unfinished_folder_of_phantoms_is_made_anew(tmp_path):
    arm = Arm(tmp_path, Plan(phantoms=4), seed=0)
    (tmp_path / "phantoms.tmp").mkdir()
    (tmp_path / "phantoms.tmp" / "truth.csv").write_text("cut sh")
    arm.make()
    assert len(arm.samples()) == 4 and not (tmp_path / "phantoms.tmp").exists()


def test_structure_and_burden_are_read_from_held_out_pictures(arm):
    data, samples = arm.dataset(), arm.samples()
    reader = probe.Reader.fit(data, samples)
    true, read = [], []
    for row in np.flatnonzero(data.splits != "train"):
        sample, burden = samples[Path(data.paths[row]).stem]
        true.append([getattr(sample.structure, name) for name in probe.STRUCTURE] + [burden])
        read.append(reader(arms.to_tensor(data.images[row : row + 1])))
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(np.transpose(true), np.transpose(read))]
    assert np.mean(found[:-1]) > 0.6 and found[-1] > 0.3


def test_swapped_reading_tells_kept_from_leaked():
    rng = np.random.default_rng(0)
    names = [*probe.STRUCTURE, "burden"]
    rows = []
    for own, other in zip(rng.normal(size=(40, 9)), rng.normal(size=(40, 9))):
        mixed = [*own[:-1], other[-1]]  # the structure of one, the burden of the other
        kinds = {"real": own, "true": own, "other": other, "mixed": mixed}
        rows.append({f"raw/{k}_{n}": v for k, of in kinds.items() for n, v in zip(names, of)})
    swap = protocol.summary([rows])["swap"]
    assert swap["structure"]["kept"]["value"] == pytest.approx(1)
    assert swap["burden"]["moved"]["value"] == pytest.approx(1)
    assert abs(swap["structure"]["leaked"]["value"]) < 0.3
    assert abs(swap["burden"]["leaked"]["value"]) < 0.4


def test_relabelled_images_stay_in_their_splits(arm, tmp_path):
    data = arm.dataset()
    flipped = controls.relabelled(data, 1 - data.labels, tmp_path / "flipped.csv")
    again = datasets.open_dataset(flipped, 32)
    assert again.patients == data.patients and (again.splits == data.splits).all()
    np.testing.assert_array_equal(again.labels, 1 - data.labels)
    np.testing.assert_array_equal(again.images, data.images)


def test_a_standardised_cnn_has_the_spread_of_the_real_one(arm):
    model = trials_model(arm)
    images = arm.dataset().images
    wanted = np.random.default_rng(0).normal(-1, 4, 500)
    controls.standardise(model, arm.logits(model, images), wanted)
    logits = arm.logits(model, images)
    assert np.median(logits) == pytest.approx(0, abs=0.05)
    assert logits.std() == pytest.approx(wanted.std(), rel=0.01)


def trials_model(arm):
    torch.manual_seed(0)
    network = controls.Classifier(controls.PRESETS["tiny"].classifier).eval().requires_grad_(False)
    network.temperature.fill_(1.7)
    return controls.Model({"classifier": network}, {})


# ---------------------------------------------------------------------------------------------
# The whole


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
    alone = metrics.psnr(*(arms.to_tensor(x) for x in pair)).item()
    assert 15 < alone < 60 and 15 < twin["original"]["psnr"]["value"] < 60
    assert twin["overlaid"]["ssim"]["value"] > twin["healthy_end"]["ssim"]["value"]


def test_an_arm_goes_on_where_it_stopped_and_ends_the_same(small, monkeypatch):
    out, _ = small
    monkeypatch.setattr(evaluate, "TUNED", 2)
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


def test_a_swap_keeps_the_detail_which_is_of_the_structure(model, monkeypatch):
    mine, theirs = (
        explain.explain(image, model, refine=0)
        for image in np.random.default_rng(0).integers(0, 255, (2, 32, 32), np.uint8)
    )
    monkeypatch.setattr(arms.probe, "truth", lambda *_: {})

    class Reader:
        def columns(self, name, x):
            return {name: x}

    def mixed():
        known = [(None, 0.0)] * 2
        return next(arms.swapped(model, Reader(), [mine, theirs], known))["mixed"]

    without = mixed()
    mine.codes.detail += 1
    assert not torch.equal(mixed(), without)
