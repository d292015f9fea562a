"""The classifier's part of an evaluation: its shape, its data, and what it refuses."""

import json

import numpy as np
import pytest

from cxr import CxrError, UsageError, datasets, evaluate, measures, train_cnn
from cxr.checkpoints import Model


@pytest.fixture(scope="module")
def numbers(model_file, xrays):
    return evaluate.evaluate(model_file, xrays, "val")


def saved(model, path, **info):
    Model(model.networks, {**model.info, **info}, model.buffers).save(path)
    return path


def test_numbers_are_the_classifiers_own_on_that_split(numbers, model, xrays):
    data = datasets.open_dataset(xrays, 32)
    rows = data.rows("val")
    logits = train_cnn.predict(model.classifier, data.images[rows], "cpu")
    auroc = numbers["classifier"]["auroc"]
    assert auroc["value"] == pytest.approx(measures.auroc(logits, data.labels[rows]))
    assert auroc["low"] <= auroc["value"] <= auroc["high"] and auroc["n"] == len(rows)
    assert {"accuracy", "sensitivity", "specificity", "ece"} < set(numbers["classifier"])


def test_about_says_what_was_measured(numbers, model_file, xrays):
    about = numbers["about"]
    assert about["model"] == str(model_file)
    assert (about["data"], about["split"]) == (xrays.name, "val")
    assert about["classes"] == ["NORMAL", "SICK"]
    assert sum(about["images"]) == about["patients"]
    assert {"cxrgan", "torch"} <= set(about["versions"])


@pytest.mark.parametrize(
    "split, words", [("train", "trained on"), ("all", "trained on"), ("val", "chose"), ("test", "")]
)
def test_a_split_the_model_has_seen_is_noted_only_for_its_own_data(
    model, xrays, tmp_path, split, words
):
    own = saved(model, tmp_path / "own", provenance={"data": xrays.name})
    other = saved(model, tmp_path / "other", provenance={"data": "elsewhere"})
    notes = evaluate.evaluate(own, xrays, split)["about"]["notes"]
    assert words in notes[0] if words else not notes
    assert not evaluate.evaluate(other, xrays, split)["about"]["notes"]


def test_data_are_prepared_as_the_models_were(model, xrays, tmp_path, monkeypatch):
    asked, unchanged = [], datasets.open_dataset
    monkeypatch.setattr(evaluate, "open_dataset", lambda *a: asked.append(a) or unchanged(*a))
    path = saved(model, tmp_path / "model", fit="pad", classes=["SICK", "NORMAL"])
    evaluate.evaluate(path, xrays, patient_pattern=r"(\d+)x")
    assert asked == [(xrays, 32, "pad", "SICK", r"(\d+)x")]


def test_other_classes_are_refused_unless_the_healthy_one_is_named(model, xrays, tmp_path):
    path = saved(model, tmp_path / "model", classes=["NORMAL", "COVID"])
    with pytest.raises(
        UsageError, match="holds NORMAL and SICK, the model tells NORMAL from COVID"
    ):
        evaluate.evaluate(path, xrays)
    numbers = evaluate.evaluate(path, xrays, negative="NORMAL")
    assert numbers["about"]["classes"] == ["NORMAL", "SICK"]
    path = saved(model, tmp_path / "model", classes=["clear", "SICK"])
    with pytest.raises(UsageError, match="no such class; there are NORMAL, SICK"):
        evaluate.evaluate(path, xrays)


def test_a_split_without_a_class_is_refused(model_file, xrays, tmp_path):
    for name in ("NORMAL", "SICK"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.png").write_bytes(next((xrays / name).iterdir()).read_bytes())
    split = datasets.split_of(datasets.patient_of("one.png"))
    other = next(name for name in datasets.SPLITS if name != split)
    with pytest.raises(CxrError, match=f"falls into the {other} split"):
        evaluate.evaluate(model_file, tmp_path, other)


def test_what_is_no_number_becomes_null_in_the_file(tmp_path):
    nan = {"value": float("nan"), "low": np.nan, "high": float("inf"), "n": 0}
    plain = evaluate._without_nan({"classifier": {"auroc": nan}, "about": {"images": [1, 2]}})
    path = evaluate.write(plain, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "evaluation.json"
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read["classifier"]["auroc"] == {"value": None, "low": None, "high": None, "n": 0}
    assert read["about"] == {"images": [1, 2]}
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]
