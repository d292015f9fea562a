"""What an evaluation takes, and what it refuses."""

import copy

import pytest

from cxr import CxrError, UsageError, datasets
from cxr.checkpoints import Model
from cxr.data.patients import SPLITS, split_of
from cxr.evaluation import evaluate, inputs
from cxr.files import locked
from cxr.networks import Classifier, ClassifierConfig

pytestmark = pytest.mark.usefixtures("quick")


def test_an_oracle_that_cannot_judge_is_refused(model, model_file, saved, xrays, tmp_path):
    with pytest.raises(UsageError, match="is the model's own classifier"):
        evaluate.evaluate(model_file, xrays, oracle=str(model_file))
    other = saved(model, tmp_path / "size", size=64)
    with pytest.raises(UsageError, match="sees 64 pixels, the model 32: train one with --size 32"):
        evaluate.evaluate(model_file, xrays, oracle=str(other))
    other = saved(model, tmp_path / "classes", classes=["NORMAL", "COVID"])
    with pytest.raises(UsageError, match="tells NORMAL from COVID"):
        evaluate.evaluate(model_file, xrays, oracle=str(other))
    network = copy.deepcopy(model.classifier)
    network.head.bias += 1
    apart = Model({"classifier": network}, model.info, model.buffers)
    other = saved(apart, tmp_path / "fold", fold=4)
    for option in ("oracle", "classifier"):
        with pytest.raises(UsageError, match=f"--{option} was tested on fold 4, the model on 0"):
            evaluate.evaluate(model_file, xrays, **{option: str(other)})


def test_data_are_prepared_as_the_models_were(model, saved, xrays, tmp_path, monkeypatch):
    asked, unchanged = [], datasets.open_dataset
    monkeypatch.setattr(
        inputs, "open_dataset", lambda *a, **k: asked.append((*a, k)) or unchanged(*a, **k)
    )
    path = saved(model, tmp_path / "model", fit="pad", classes=["SICK", "NORMAL"])
    evaluate.evaluate(path, xrays, patient_pattern=r"(\d+)\.")
    named = {"negative": "SICK", "patient_pattern": r"(\d+)\."}
    assert asked == [(xrays, 32, "pad", 0, named)]


def test_other_classes_are_refused_unless_the_healthy_one_is_named(model, saved, xrays, tmp_path):
    path = saved(model, tmp_path / "model", classes=["NORMAL", "COVID"])
    with pytest.raises(
        UsageError, match="holds NORMAL and SICK, the model tells NORMAL from COVID"
    ):
        evaluate.evaluate(path, xrays)
    numbers = evaluate.evaluate(path, xrays, negative="NORMAL")
    assert numbers["about"]["classes"] == ["NORMAL", "SICK"]
    path = saved(model, tmp_path / "model", classes=["clear", "SICK"])
    with pytest.raises(UsageError, match="no such class; there are NORMAL .*, SICK"):
        evaluate.evaluate(path, xrays)


def test_a_split_without_a_class_is_refused(model_file, xrays, tmp_path):
    for name in ("NORMAL", "SICK"):
        (tmp_path / name).mkdir()
        picture = next((xrays / name).iterdir()).read_bytes()
        (tmp_path / name / f"patient1_{name}.png").write_bytes(picture)
    split = split_of("patient:1")
    other = next(name for name in SPLITS if name != split)
    with pytest.raises(CxrError, match=f"falls into the {other} split"):
        evaluate.evaluate(model_file, tmp_path, other)


def test_a_classifier_of_several_classes_is_refused(model, xrays, tmp_path):
    network = Classifier(ClassifierConfig((16, 24), 1, outputs=3))
    info = {**model.info, "classes": ["NORMAL", "SICK", "WORSE"]}
    Model({"classifier": network}, info).save(tmp_path / "many")
    with pytest.raises(UsageError, match="tells NORMAL, SICK, WORSE apart.*train-gan --target"):
        evaluate.evaluate(tmp_path / "many", xrays, negative="NORMAL")


def test_another_function_of_the_same_file_is_another_subject(several, tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def a(): ...")
    assert len({inputs._source(f"{file}:{name}") for name in "ab"}) == 2


def test_a_folder_that_another_evaluation_writes_into_is_refused(model_file, xrays, tmp_path):
    with locked(tmp_path / "run.lock"), pytest.raises(UsageError, match="is in use by process"):
        evaluate.evaluate(model_file, xrays, out=tmp_path)
