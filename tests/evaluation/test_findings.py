"""Other findings: which CNNs are taken, and what is counted of their answers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cxr import CxrError, UsageError, metrics
from cxr.checkpoints import Model
from cxr.evaluation.findings import changes, correlation_difference, load_findings, reflected
from cxr.networks import Classifier, ClassifierConfig

PATIENTS = list("abcdef")


def test_verdicts_that_turn_are_counted():
    image = [2.0, 1.0, -1.0]  # the explained CNN's logit, and two findings'
    asked = [
        [image, image, [-2.0, -1.0, 1.0], [-2.0, 1.0, -1.0]],
        [image, image, [-2.0, 1.0, 1.0], [-2.0, 1.0, 1.0]],
        [image, [2.0, -1.0, -1.0], image, image],
        [image, image, image, image],
    ]
    parts = changes(["A", "B"], asked, PATIENTS[:4])
    value = {name: figure["value"] for name, figure in parts["counterfactual"].items()}
    assert value["findings_turned"] == (2 + 1) / 4 and value["findings_turned_overlaid"] == 1 / 4
    assert parts["reconstruction"]["findings_turned"]["value"] == 1 / 4
    turned = {
        name: [figure["value"] for figure in figures.values()]
        for name, figures in parts["finding"].items()
    }
    assert turned == {"A": [0.25, 0.25, 0.0], "B": [0.0, 0.5, 0.25]}


def test_findings_may_move_as_they_go_with_the_explained_one():
    along = np.random.default_rng(0).normal(size=(6, 1))
    image = np.concatenate([along, along, -along], 1)
    assert correlation_difference(image, 3 * image) == pytest.approx(0)
    moved = np.concatenate([along, -along, -along], 1)
    assert correlation_difference(image, moved) == pytest.approx((2 + 0) / 2)


def test_a_finding_that_never_varies_takes_no_other_with_it():
    image = np.random.default_rng(0).normal(size=(20, 3))
    image[:, 2] = -13.8
    moved = np.stack([image[:, 0], -image[:, 1], image[:, 2] * 0], 1)
    both = correlation_difference(image, moved)
    assert both == pytest.approx(correlation_difference(image[:, :2], moved[:, :2]))
    assert np.isnan(correlation_difference(image[:, [0, 2]], moved[:, [0, 2]]))


def test_the_interval_of_a_correlation_difference_may_reach_0():
    """The findings move just as they go: the truth is 0, and the value above it by chance."""
    random, covered = np.random.default_rng(0), 0
    for _ in range(20):
        own, rest = random.normal(size=(2, 40, 1)), random.normal(size=(2, 40, 5))
        image, moved = np.concatenate([own, own + rest], 2)
        found = metrics.bootstrap(correlation_difference, np.arange(40), image, moved)
        figure = reflected(found)
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"]
        covered += figure["low"] < 0.02
    assert covered >= 12
    asked = np.stack([image, image, image + moved, image + moved], 1)
    numbers = changes(list("ABCDE"), asked, np.arange(40))["counterfactual"]
    assert numbers["correlation_difference"] == pytest.approx(figure)


def test_findings_of_ones_own_go_by_their_names(model, several):
    findings = load_findings((several,), model)
    assert findings.names == ["Effusion", "Mass"]  # one has no name, and SICK is explained
    x = torch.rand(3, 1, 32, 32) * 2 - 1
    mean, left = x.mean((1, 2, 3)), x[..., :16].mean((1, 2, 3))
    torch.testing.assert_close(findings(x), torch.stack([mean, left - mean], 1))


def test_model_files_give_each_class_against_the_rest(model, several, tmp_path, capsys):
    network = Classifier(ClassifierConfig((16, 24), 1, outputs=3)).eval()
    info = {**model.info, "classes": ["NORMAL", "FLUID", "VIRUS"]}
    Model({"classifier": network}, info).save(tmp_path / "three")
    two = Model({"classifier": model.classifier}, {**model.info, "classes": ["NORMAL", "COVID"]})
    two.save(tmp_path / "two")
    findings = load_findings((str(tmp_path / "three"), str(tmp_path / "two"), several), model)
    assert findings.names == ["FLUID", "VIRUS", "COVID", "Effusion", "Mass"]
    told = capsys.readouterr().err
    assert "apart: NORMAL, sick; answers without a name: 1\n" in told
    x = torch.rand(2, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        y, answers = network(x), findings(x)
        torch.testing.assert_close(answers[:, 2], model.classifier(x))
    odds = y.softmax(1)[:, 1].log() - (1 - y.softmax(1)[:, 1]).log()
    torch.testing.assert_close(answers[:, 0], odds, rtol=1e-4, atol=1e-4)


def test_what_cannot_tell_of_findings_is_refused(model, saved, several, tmp_path):
    assert load_findings((), model) is None
    for info, words in (
        ({"size": 64}, "sees 64 pixels, the model 32: train one with --size 32"),
        ({"fit": "lungs"}, "with --fit lungs, the model with --fit crop"),
    ):
        path = str(saved(model, tmp_path / "other", classes=["NORMAL", "COVID"], **info))
        with pytest.raises(UsageError, match=words):
            load_findings((path,), model)
    own = str(saved(model, tmp_path / "own"))
    with pytest.raises(UsageError, match="nothing but what is explained"):
        load_findings((own,), model)
    with pytest.raises(UsageError, match="Effusion, Mass comes twice; .* name what it is"):
        load_findings((several, several), model)
    with pytest.raises(UsageError, match="give several findings as FILE.py:FUNCTION"):
        (tmp_path / "net.pt2").write_bytes(b"")
        load_findings((str(tmp_path / "net.pt2"),), model)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('"", ', "", "gives 4 answers and has 3 classes"),
        ("[mean,", "[mean / 0,", "NaN|infinity"),
        ("[mean,", "[mean + torch.randn(()),", "another answer each time"),
        ("left - mean], 1)", "left - mean], 1).sigmoid()", "look.* like probabilities"),
        ("left - mean], 1)", "left - mean], 1)[..., None, None]", r"\[2, 4, 1, 1\], not a tensor"),
        ("left - mean], 1)", "left - mean], 1)[:, :, None].unbind(1)", "a tuple, not a tensor"),
    ],
)
def test_findings_keep_to_the_contract_of_a_cnn(model, several, tmp_path, old, new, words):
    text = Path(several.split(":")[0]).read_text()
    wrapped = text.replace("return Several()", "return cxrgan.adapt(Several(), None, 1)")
    (tmp_path / "bad.py").write_text("import cxrgan\n" + wrapped.replace(old, new))
    with pytest.raises(CxrError, match=f"bad.py:several.*({words})"):
        load_findings((f"{tmp_path / 'bad.py'}:several",), model)


def test_a_softmax_over_two_classes_tells_one_finding(model, several, tmp_path):
    text = Path(several.split(":")[0]).read_text().replace("pathologies", "classes")
    two = text.replace(", left - mean], 1)", ", left - mean], 1)[:, 2:]").replace(
        '"Effusion", "", ', ""
    )
    (tmp_path / "two.py").write_text(two.replace('"sick"', '"no Mass"'))
    findings = load_findings((f"{tmp_path / 'two.py'}:several",), model)
    assert findings.names == ["Mass"]
    x = torch.rand(3, 1, 32, 32) * 2 - 1
    mean, left = x.mean((1, 2, 3)), x[..., :16].mean((1, 2, 3))
    torch.testing.assert_close(findings(x), (left - mean - (mean - 2))[:, None])
