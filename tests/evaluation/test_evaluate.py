"""The whole of an evaluation: its parts, its files, its notes."""

import json
import re
import signal

import numpy as np
import pytest

from cxr import datasets, metrics, train_cnn
from cxr.evaluation import evaluate, heatmaps, inputs, intervals, plots, realism, registry, stages

FIGURES = {
    "classifier": {"auroc", "accuracy", "sensitivity", "specificity", "ece"},
    "reconstruction": {"psnr", "ssim", "probability_gap", "rejected"},
    "counterfactual": {
        *("validity", "oracle_validity", "l1_original", "l1_reconstruction", "sparsity"),
        *("validity_overlaid", "oracle_validity_overlaid", "l1_overlaid", "sparsity_overlaid"),
        *("outside_lung", "outside_lung_overlaid", "outside_area", "cout", "cout_overlaid"),
        *("perceptual", "perceptual_overlaid", "composition", "reversibility"),
        *("findings_turned", "findings_turned_overlaid", "correlation_difference"),
    },
    "shortcut": {"auroc_without_lungs", "auroc_lungs_alone"},
    "generator": {"kid", "kid_real", "fid", "fid_real", "fid_ratio"},
    "path": {"spearman", "logit_gap", "largest_jump", "realism_mid"},
    "disentanglement": {
        *("healthy_at_zero", "diseased_at_full", "structure_ssim", "inverted_healthy"),
        *("oracle_healthy_at_zero", "oracle_diseased_at_full", "oracle_inverted_healthy"),
        *("outside_lung_ssim", "lung_overlap"),
    },
}
TRIVIAL = {"centre", "edges", "random", "mean_difference", "lung_mask"}
MAPS = {"difference", "latent_ig", "gradient", "integrated_gradients", "grad_cam"}
METHODS = TRIVIAL | MAPS | {"overlay"}

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def numbers(quick, classifier_file, xrays):
    return evaluate.evaluate(classifier_file, xrays, "val")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "evaluation"


@pytest.fixture(scope="module")
def whole(quick, bright, oracle, several, masks, xrays, folder):
    """All parts, of four images, written into `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "load_model", lambda *a: bright)
        patch.setattr(stages, "RANDOMISED", 2)
        patch.setattr(stages, "TUNED", 1)
        options = {"masks": masks[0], "lungs": masks[1], "oracle": oracle}
        options["findings"] = (several,)
        return evaluate.evaluate("bright", xrays, "test", folder, limit=4, refine=1, **options)


def test_every_part_has_its_figures(whole):
    for part, names in FIGURES.items():
        assert names <= set(whole[part]), part
        for name in names:
            figure = whole[part][name]
            assert set(figure) == {"value", "low", "high", "n"} and figure["n"] > 0, name
            if figure["low"] is None:  # one image says nothing of others
                assert figure["n"] == 1 and figure["high"] is None
            else:
                assert figure["low"] <= figure["high"]
    assert whole["reconstruction"]["ssim"]["n"] == whole["path"]["spearman"]["n"] == 4
    assert whole["disentanglement"]["healthy_at_zero"]["n"] == realism.DRAWN
    assert set(whole["localisation"]) == set(whole["faithfulness"]) == METHODS
    for method in METHODS:
        names = {"ap", "auroc", "pointing", "mass", "iou_otsu", "iou_tuned"}
        assert set(whole["localisation"][method]) == names
        assert set(whole["faithfulness"][method]) == {"deletion", "insertion"}
    assert MAPS - set(whole["stability"]) <= {"grad_cam"}  # empty where nothing speaks for disease
    assert set(whole["finding"]) == {"Effusion", "Mass"}
    notes = whole["about"]["notes"]
    swap = "not measured: disentanglement.swap (the CNN calls all neighbouring pairs alike)"
    assert swap in notes and len(notes) == 4  # no sources, no scanners, and nothing is believed
    assert whole["gate"]["believed"]["value"] == 0
    assert whole["about"]["feature_space"].startswith("pooled features")
    json.dumps(whole, allow_nan=False)


def test_numbers_and_figures_are_written_where_they_are_asked_for(whole, folder):
    pytest.importorskip("matplotlib")
    assert json.loads((folder / "evaluation.json").read_text()) == whole
    names = {"classifier", "response", "localisation", "dependence", "examples"}
    assert {path.name for path in (folder / "figures").iterdir()} == {f"{n}.png" for n in names}
    table = (folder / "evaluation.md").read_text()
    auroc = whole["classifier"]["auroc"]
    assert f"| classifier | AUROC | more | {auroc['value']:.4f} |" in table
    assert all(f"| {registry.title_of(name)} |" in table for name in whole["randomisation"])
    html = (folder / "index.html").read_text()
    assert html.count('<svg xmlns="http://www.w3.org/2000/svg"') == len(names)
    told = json.loads(re.search(r'"application/json">(.*?)</script>', html)[1])
    assert len(told["images"]) == 4 and {row["class"] for row in told["images"]} == {
        "NORMAL",
        "SICK",
    }
    parts = {part["title"] for part in told["parts"] + told["compared"]}
    assert parts == whole.keys() - {"about"}


def test_without_matplotlib_the_numbers_are_written_alone(
    classifier_file, xrays, tmp_path, monkeypatch
):
    monkeypatch.setattr(plots, "installed", lambda: False)
    evaluate.evaluate(classifier_file, xrays, "val", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "cases.jsonl",
        "run.lock",
        "evaluation.json",
        "evaluation.md",
        "index.html",
    }
    assert "matplotlib is missing" in (tmp_path / "index.html").read_text()


def test_a_classifier_alone_has_its_own_figure(classifier_file, xrays, tmp_path):
    pytest.importorskip("matplotlib")
    evaluate.evaluate(classifier_file, xrays, "val", tmp_path)
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"classifier.png"}


def test_maps_that_never_ask_the_classifier_survive_its_randomisation(whole):
    for method in TRIVIAL & set(whole["randomisation"]):
        figure = whole["randomisation"][method]
        assert figure["value"] == pytest.approx(1) and figure["low"] == pytest.approx(1)
        assert figure["cascade"] == pytest.approx([1] * heatmaps.STAGES)
    assert {"centre", "edges", "latent_ig"} <= set(whole["randomisation"])
    assert len(whole["randomisation"]["latent_ig"]["cascade"]) == heatmaps.STAGES


def test_a_classifier_alone_gives_its_part_and_says_so(numbers):
    assert set(numbers) == {"classifier", "shortcut", "about"}
    (note,) = numbers["about"]["notes"]
    assert note.endswith("holds no GAN: only the classifier is measured")


def test_what_lacks_is_left_out_with_a_note_each(bright, xrays, monkeypatch):
    monkeypatch.setattr(inputs, "load_model", lambda *a: bright)
    monkeypatch.setattr(stages, "RANDOMISED", 0)
    found = evaluate.evaluate("bright", xrays, "val", limit=1, refine=0)
    assert not {"generator", "localisation", "randomisation"} & set(found)
    assert not {"oracle_validity", "perceptual"} & set(found["counterfactual"])
    notes = " ".join(found["about"]["notes"])
    for option in ("--oracle", "--masks"):
        assert notes.count(option) == 1


def test_after_ctrl_c_what_has_been_explained_is_measured(bright, xrays, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_model", lambda *a: bright)
    monkeypatch.setattr(stages, "GROUP", 1)
    explain = evaluate.Judge.explain

    def interrupted(self, rows):
        signal.raise_signal(signal.SIGINT)
        return explain(self, rows)

    monkeypatch.setattr(evaluate.Judge, "explain", interrupted)
    found = evaluate.evaluate("bright", xrays, "val", tmp_path, limit=3, refine=0)
    assert found["counterfactual"]["validity"]["n"] == 1 and "randomisation" not in found
    assert any("after 1 of 3 images" in note for note in found["about"]["notes"])
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found


def test_an_oracle_without_features_judges_all_but_the_generators_distances(
    bright, xrays, own_classifier, monkeypatch
):
    monkeypatch.setattr(inputs, "load_model", lambda *a: bright)
    monkeypatch.setattr(stages, "RANDOMISED", 0)
    oracle = f"{own_classifier}:bright"
    found = evaluate.evaluate("bright", xrays, "val", oracle=oracle, limit=2, refine=0)
    assert "generator" not in found and found["about"]["feature_space"] is None
    assert found["counterfactual"]["oracle_validity"]["n"] == 2
    assert found["disentanglement"]["oracle_healthy_at_zero"]["n"] == realism.DRAWN
    (note,) = (note for note in found["about"]["notes"] if "generator" in note)
    assert note.startswith("not measured: generator, counterfactual.perceptual,")
    assert note.endswith("(the independent classifier has no method `features` to [N, C])")


def test_numbers_are_the_classifiers_own_on_that_split(numbers, model, xrays):
    data = datasets.open_dataset(xrays, 32)
    rows = data.rows("val")
    logits = train_cnn.predict(model.classifier, data.images[rows], "cpu")
    auroc = numbers["classifier"]["auroc"]
    assert auroc["value"] == pytest.approx(metrics.auroc(logits, data.labels[rows]))
    assert auroc["low"] <= auroc["value"] <= auroc["high"] and auroc["n"] == len(rows)
    assert {"accuracy", "sensitivity", "specificity", "ece"} < set(numbers["classifier"])


def test_about_says_what_was_measured(numbers, classifier_file, xrays):
    about = numbers["about"]
    assert about["model"] == str(classifier_file)
    assert (about["data"], about["split"]) == (xrays.name, "val")
    assert about["classes"] == ["NORMAL", "SICK"]
    assert sum(about["images"]) == about["patients"]
    assert {"cxrgan", "torch"} <= set(about["versions"])


@pytest.mark.parametrize(
    "split, words", [("train", "trained on"), ("all", "trained on"), ("val", "chose"), ("test", "")]
)
def test_a_split_the_model_has_seen_is_noted_only_for_its_own_data(
    model, saved, xrays, tmp_path, split, words
):
    own = saved(model, tmp_path / "own", provenance={"data": xrays.name})
    other = saved(model, tmp_path / "other", provenance={"data": "elsewhere"})
    *notes, _ = evaluate.evaluate(own, xrays, split)["about"]["notes"]
    assert words in notes[0] if words else not notes
    assert len(evaluate.evaluate(other, xrays, split)["about"]["notes"]) == 1


def test_what_is_no_number_becomes_null_in_the_file(tmp_path):
    nan = {"value": float("nan"), "low": np.nan, "high": float("inf"), "n": 0}
    plain = intervals.without_nan({"classifier": {"auroc": nan}, "about": {"images": [1, 2]}})
    path = evaluate.write(plain, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "evaluation.json"
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read["classifier"]["auroc"] == {"value": None, "low": None, "high": None, "n": 0}
    assert read["about"] == {"images": [1, 2]}
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]


def test_a_model_without_its_discriminator_is_measured_but_for_that(
    model, xrays, tmp_path, monkeypatch
):
    monkeypatch.setattr(stages, "RANDOMISED", 0)
    networks = {k: v for k, v in model.networks.items() if k != "discriminator"}
    path = tmp_path / "shipped.safetensors"
    type(model)(networks, model.info, model.buffers).save(path, half=True)
    found = evaluate.evaluate(path, xrays, limit=2, refine=1, device="cpu")
    assert "realism_mid" not in found["path"] and "spearman" in found["path"]
    assert any("realism_mid" in note for note in found["about"]["notes"])
