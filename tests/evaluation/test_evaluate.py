"""An evaluation: its parts, its data, and what it refuses."""

import dataclasses
import functools
import json
import signal

import numpy as np
import pytest
import torch

from cxr import CxrError, UsageError, datasets, film, metrics, train_cnn
from cxr.checkpoints import Model
from cxr.evaluation import cases, evaluate, heatmaps, plots, realism
from cxr.networks import Classifier, ClassifierConfig

FIGURES = {
    "classifier": {"auroc", "accuracy", "sensitivity", "specificity", "ece"},
    "reconstruction": {"psnr", "ssim", "probability_gap", "rejected"},
    "counterfactual": {
        *("validity", "oracle_validity", "l1_original", "l1_reconstruction", "sparsity"),
        *("validity_overlaid", "oracle_validity_overlaid", "l1_overlaid", "sparsity_overlaid"),
        *("outside_lung", "outside_lung_overlaid", "outside_area"),
    },
    "generator": {"kid", "kid_real", "fid", "fid_real", "fid_ratio"},
    "path": {"spearman", "logit_gap", "largest_jump", "realism_mid"},
    "disentanglement": {
        *("healthy_at_zero", "diseased_at_full", "structure_ssim", "inverted_healthy"),
        *("oracle_healthy_at_zero", "oracle_diseased_at_full", "oracle_inverted_healthy"),
        "outside_lung_ssim",
    },
}
TRIVIAL = {"centre", "edges", "random", "mean_difference", "lung_mask"}
METHODS = TRIVIAL | {"difference", "latent_ig", "gradient", "integrated_gradients", "grad_cam"}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few of what is many only for precision's sake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(realism, "DRAWN", realism.CHUNK)
        patch.setattr(realism, "HALVINGS", 10)
        patch.setattr(heatmaps, "STAGES", 2)
        patch.setattr(metrics, "bootstrap", functools.partial(metrics.bootstrap, samples=40))
        yield


@pytest.fixture(scope="module")
def numbers(classifier_file, xrays):
    return evaluate.evaluate(classifier_file, xrays, "val")


def saved(model, path, **info):
    """A model file with the classifier alone."""
    classifier = {"classifier": model.classifier}
    Model(classifier, {**model.info, **info}, model.buffers).save(path)
    return path


@pytest.fixture(scope="module")
def oracle(model, tmp_path_factory):
    """Another classifier than the model's, in a file."""
    torch.manual_seed(1)
    network = Classifier(ClassifierConfig((16, 24), 1)).eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("oracle") / "model.safetensors"
    Model({"classifier": network}, model.info, model.buffers).save(path)
    return str(path)


class Brightness(torch.nn.Module):
    """A classifier that asks how bright the image is."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1, bias=False)
        torch.nn.init.constant_(self.conv.weight, 1 / 9)

    def forward(self, x):
        return 40 * self.conv(x).mean((1, 2, 3))


@pytest.fixture(scope="module")
def bright(model):
    """The untrained tiny model, with a classifier that finds both classes in `xrays`."""
    networks = {**model.networks, "classifier": Brightness().requires_grad_(False)}
    return Model(networks, dict(model.info), model.buffers, "bright")


@pytest.fixture(scope="module")
def masks(xrays, tmp_path_factory):
    """A mask for every diseased image: the place of its disease, and its lungs."""
    folders = tmp_path_factory.mktemp("masks"), tmp_path_factory.mktemp("lungs")
    for folder, rows in zip(folders, (slice(8, 16), slice(8, 20))):
        mask = np.zeros((32, 32), np.uint8)
        mask[rows, rows] = 255
        for path in (xrays / "SICK").iterdir():
            film.write_png(folder / path.name, mask)
    return folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole") / "evaluation"


@pytest.fixture(scope="module")
def whole(bright, oracle, masks, xrays, folder):
    """All parts, of four images, written into `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load_model", lambda *a: bright)
        patch.setattr(evaluate, "RANDOMISED", 2)
        patch.setattr(evaluate, "TUNED", 1)
        options = {"masks": masks[0], "lungs": masks[1], "oracle": oracle}
        return evaluate.evaluate("bright", xrays, "test", folder, limit=4, refine=1, **options)


def test_every_part_has_its_figures(whole):
    for part, names in FIGURES.items():
        assert names <= set(whole[part]), part
        for name in names:
            figure = whole[part][name]
            assert set(figure) == {"value", "low", "high", "n"} and figure["n"] > 0, name
            assert figure["low"] <= figure["high"]
    assert whole["reconstruction"]["ssim"]["n"] == whole["path"]["spearman"]["n"] == 4
    assert whole["disentanglement"]["healthy_at_zero"]["n"] == realism.DRAWN
    assert set(whole["localisation"]) == set(whole["faithfulness"]) == METHODS
    for method in METHODS:
        names = {"ap", "auroc", "pointing", "iou_otsu", "iou_tuned"}
        assert set(whole["localisation"][method]) == names
        assert set(whole["faithfulness"][method]) == {"deletion", "insertion"}
    (note,) = whole["about"]["notes"]
    assert note == (
        "not measured: disentanglement.swap (the CNN calls all neighbouring pairs alike)"
    )
    assert whole["about"]["feature_space"].startswith("pooled features")
    json.dumps(whole, allow_nan=False)


def test_numbers_and_figures_are_written_where_they_are_asked_for(whole, folder):
    pytest.importorskip("matplotlib")
    assert json.loads((folder / "evaluation.json").read_text()) == whole
    names = {"classifier", "response", "localisation", "dependence", "examples"}
    assert {path.name for path in (folder / "figures").iterdir()} == {f"{n}.png" for n in names}
    table = (folder / "evaluation.md").read_text()
    auroc = whole["classifier"]["auroc"]
    assert f"| classifier | auroc | {auroc['value']:.4f} |" in table
    assert all(f"| {name} |" in table for name in whole["randomisation"])


def test_without_matplotlib_the_numbers_are_written_alone(
    classifier_file, xrays, tmp_path, monkeypatch
):
    monkeypatch.setattr(plots, "installed", lambda: False)
    evaluate.evaluate(classifier_file, xrays, "val", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "evaluation.md"}


def test_a_classifier_alone_has_its_own_figure(classifier_file, xrays, tmp_path):
    pytest.importorskip("matplotlib")
    evaluate.evaluate(classifier_file, xrays, "val", tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["classifier.png"]


def test_maps_that_never_ask_the_classifier_survive_its_randomisation(whole):
    for method in TRIVIAL & set(whole["randomisation"]):
        figure = whole["randomisation"][method]
        assert figure["value"] == figure["low"] == pytest.approx(1)
        assert figure["cascade"] == pytest.approx([1] * heatmaps.STAGES)
    assert {"centre", "edges", "latent_ig"} <= set(whole["randomisation"])
    assert len(whole["randomisation"]["latent_ig"]["cascade"]) == heatmaps.STAGES


def test_a_classifier_alone_gives_its_part_and_says_so(numbers):
    assert set(numbers) == {"classifier", "about"}
    (note,) = numbers["about"]["notes"]
    assert note.endswith("holds no GAN: only the classifier is measured")


def test_what_lacks_is_left_out_with_a_note_each(bright, xrays, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *a: bright)
    monkeypatch.setattr(evaluate, "RANDOMISED", 0)
    found = evaluate.evaluate("bright", xrays, "val", limit=1, refine=0)
    assert not {"generator", "localisation", "randomisation"} & set(found)
    assert not {"oracle_validity", "outside_lung"} & set(found["counterfactual"])
    notes = " ".join(found["about"]["notes"])
    for option in ("--oracle", "--masks", "--lungs"):
        assert notes.count(option) == 1


def test_after_ctrl_c_what_has_been_explained_is_measured(bright, xrays, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda *a: bright)
    monkeypatch.setattr(evaluate, "GROUP", 1)
    explain = evaluate.Judge.explain

    def interrupted(self, row, model=None):
        signal.raise_signal(signal.SIGINT)
        return explain(self, row, model)

    monkeypatch.setattr(evaluate.Judge, "explain", interrupted)
    found = evaluate.evaluate("bright", xrays, "val", tmp_path, limit=3, refine=0)
    assert found["counterfactual"]["validity"]["n"] == 1 and "randomisation" not in found
    assert any("after 1 of 3 images" in note for note in found["about"]["notes"])
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found


def test_an_oracle_without_features_judges_all_but_the_generators_distances(
    bright, xrays, own_classifier, monkeypatch
):
    monkeypatch.setattr(evaluate, "load_model", lambda *a: bright)
    monkeypatch.setattr(evaluate, "RANDOMISED", 0)
    oracle = f"{own_classifier}:bright"
    found = evaluate.evaluate("bright", xrays, "val", oracle=oracle, limit=2, refine=0)
    assert "generator" not in found and found["about"]["feature_space"] is None
    assert found["counterfactual"]["oracle_validity"]["n"] == 2
    assert found["disentanglement"]["oracle_healthy_at_zero"]["n"] == realism.DRAWN
    (note,) = (note for note in found["about"]["notes"] if "generator" in note)
    assert note == "not measured: generator (the oracle has no method `features` to [N, C])"


def test_random_lungs_are_called_by_the_oracle_itself(bright):
    def sick(x):
        return torch.ones(len(x))

    found = evaluate.random_lungs(bright, 0, sick)
    assert found["oracle_healthy_at_zero"]["value"] == 0
    assert found["oracle_diseased_at_full"]["value"] == 1
    assert found.items() > evaluate.random_lungs(bright, 0).items()


def test_an_oracle_that_cannot_judge_is_refused(model, model_file, xrays, tmp_path):
    with pytest.raises(UsageError, match="is the model's own classifier"):
        evaluate.evaluate(model_file, xrays, oracle=str(model_file))
    other = saved(model, tmp_path / "size", size=64)
    with pytest.raises(UsageError, match="sees 64 pixels, the model 32: train one with --size 32"):
        evaluate.evaluate(model_file, xrays, oracle=str(other))
    other = saved(model, tmp_path / "classes", classes=["NORMAL", "COVID"])
    with pytest.raises(UsageError, match="tells NORMAL from COVID"):
        evaluate.evaluate(model_file, xrays, oracle=str(other))
    other = saved(model, tmp_path / "fold", fold=4)
    for option in ("oracle", "classifier"):
        with pytest.raises(UsageError, match=f"--{option} was tested on fold 4, the model on 0"):
            evaluate.evaluate(model_file, xrays, **{option: str(other)})


def test_features_of_another_kind_are_not_compared(xrays):
    data, cpu = datasets.open_dataset(xrays, 32), torch.device("cpu")
    for features in (torch.nn.Conv2d(3, 8, 1), torch.nn.Identity()):
        other = torch.nn.Module()
        other.features = features
        assert not evaluate.pools(other, data, cpu)
    assert not evaluate.pools(None, data, cpu)


def test_masks_of_other_images_are_refused(model_file, xrays, tmp_path):
    film.write_png(tmp_path / "stranger.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(UsageError, match="--masks .*no file there is called like an image"):
        evaluate.evaluate(model_file, xrays, masks=tmp_path)
    data = datasets.open_dataset(xrays, 32)
    twice = dataclasses.replace(data, paths=("a/one.png", "b/one.png"))
    film.write_png(tmp_path / "one.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(CxrError, match="two images are called one"):
        cases.mask_files(tmp_path, "--masks", twice)
    (tmp_path / "left").mkdir()
    film.write_png(tmp_path / "left" / "one.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(CxrError, match="are called alike"):
        cases.mask_files(tmp_path, "--masks", twice)


@pytest.fixture(scope="module")
def judged(bright, xrays, masks):
    """A judge with masks, a diseased row and its explanation."""
    data = datasets.open_dataset(xrays, 32)
    files = [cases.mask_files(folder, "--masks", data) for folder in masks]
    own = cases.Judge(bright, data, None, *files, refine=1)
    row = int(data.rows("test")[-1])
    return own, row, own.explain(row)


def test_change_outside_the_lungs_is_a_share_of_the_change(judged):
    own, row, e = judged
    end = e.frames[e.numbers["counterfactual"]["frame"]][0]
    change = (e.reconstructions[0, 0] - end).abs()
    inside = change[8:20, 8:20].sum() / change.sum()
    found = own.counterfactual(e, row)["counterfactual", "outside_lung"]
    assert found == pytest.approx(1 - inside.item(), rel=1e-4)
    area = own.counterfactual(e, row)["counterfactual", "outside_area"]
    assert area == pytest.approx(1 - 12**2 / 32**2)


def test_what_surrounds_the_lungs_is_compared_outside_their_mask(judged):
    own, row, e = judged
    ends = e.frames.clone()
    ends[0], ends[-1] = e.image, e.image
    ends[-1, 0, 13:15, 13:15] += 0.5  # deep in the lungs
    changed = dataclasses.replace(e, frames=ends)
    same = own.disentanglement(changed, row)
    assert same["disentanglement", "outside_lung_ssim"] == pytest.approx(1, abs=1e-3)
    ends[-1, 0, :6] += 0.5
    moved = own.disentanglement(changed, row)
    assert moved["disentanglement", "outside_lung_ssim"] < 0.99


def test_the_oracle_says_itself_whether_an_inverted_lung_is_healthy(judged):
    own, row, e = judged
    for oracle, verdict in ((torch.ones, 0), (lambda n: -torch.ones(n), 1)):
        asked = dataclasses.replace(own, oracle=lambda x, oracle=oracle: oracle(len(x)))
        found = asked.disentanglement(e, row)
        assert found["disentanglement", "oracle_inverted_healthy"] == verdict
    healthy = int(own.data.rows("test")[0])
    assert not any("inverted" in name for _, name in own.disentanglement(e, healthy))


def test_path_figures_of_a_path_that_is_known(judged):
    _, _, e = judged
    logits = torch.linspace(-2, 2, len(e.doses))
    logits[[3, 4]] = logits[[4, 3]]
    known = dataclasses.replace(e, logits=logits)
    found = cases.path(known)["path", "spearman"]
    n = len(logits)
    assert found == pytest.approx(1 - 6 * 2 / (n * (n**2 - 1)))


def test_swapped_codes_are_scored_only_where_the_classes_differ(judged, xrays):
    own, _, e = judged
    dark = own.explain(int(own.data.rows("test")[0]))
    assert all(np.isnan(own.swap([e, e])))
    dose = {"classifier": lambda x: x.mean((1, 2, 3)), "generator": Disease()}
    model = Model({**own.model.networks, **dose}, own.model.info, own.model.buffers)
    e, dark = (
        dataclasses.replace(found, codes=dataclasses.replace(found.codes, z2=z2))
        for found, z2 in ((e, torch.full((1, 4), 0.5)), (dark, torch.full((1, 4), -0.5)))
    )
    assert dataclasses.replace(own, model=model).swap([e, dark]) == [1, 1]


class Disease(torch.nn.Module):
    """A generator whose picture is its `z2` alone."""

    const = torch.zeros(1)

    def forward(self, w1, z2, noise, detail=None):
        return z2.mean(1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_realism_of_mid_frames_is_less_where_the_discriminator_says_so(judged):
    own, _, e = judged

    class Middle(torch.nn.Module):
        def forward(self, x, dose):
            return -((dose >= 0.25) & (dose <= 0.75)).float()

    networks = {**own.model.networks, "discriminator": Middle()}
    critic = Model(networks, own.model.info, own.model.buffers)
    assert dataclasses.replace(own, model=critic).realism_mid([e, e]) == [-1, -1]


def test_a_reconstruction_is_rejected_for_its_gap_or_the_encoders_ssim(judged):
    own, _, e = judged
    n = e.numbers["reconstruction"]

    def rejected(limit, **changes):
        info = own.model.info | {"thresholds": {"ssim": limit}}
        strict = Model(own.model.networks, info, own.model.buffers)
        found = dataclasses.replace(e, numbers=e.numbers | {"reconstruction": n | changes})
        figures = dataclasses.replace(own, model=strict).reconstruction(found)
        return figures["reconstruction", "rejected"]

    assert rejected(-1, probability_gap=0.09) == 0
    assert rejected(-1, probability_gap=0.11) == 1
    assert rejected(0.5, probability_gap=0.0, ssim_encoder=0.4) == 1


def test_deletion_turns_an_image_into_the_nearest_that_is_called_healthy(judged):
    own, _, e = judged
    assert len(own.healthy) and (own.model.classifier(own.healthy) < 0).all()
    distances = (own.healthy - e.image).abs().square().flatten(1).mean(1)
    assert torch.equal(own.nearest_healthy(e.image)[0], own.healthy[distances.argmin()])
    none = dataclasses.replace(own, data=dataclasses.replace(own.data, labels=own.data.labels + 1))
    assert none.nearest_healthy(e.image) is None


def test_class_difference_is_the_difference_of_the_training_means(xrays):
    data = datasets.open_dataset(xrays, 32)
    healthy, diseased = (data.images[rows].mean(0) / 127.5 for rows in data.by_class("train"))
    np.testing.assert_allclose(cases.class_difference(data), diseased - healthy, atol=1e-5)
    none = dataclasses.replace(data, splits=np.full(len(data), "test"))
    assert cases.class_difference(none) is None


def test_figures_are_means_over_the_images_that_define_them():
    key = ("localisation", "edges", "ap")
    rows = [{key: 0.0}, {key: 1.0}, {}, {key: np.nan}, {("path", "spearman"): np.nan}]
    found = evaluate.intervals(rows, list("abcde"))
    assert found == {"localisation": {"edges": {"ap": {"value": 0.5, "low": 0, "high": 1, "n": 2}}}}
    ranks, hits = ("path", "spearman"), ("counterfactual", "validity")
    found = evaluate.intervals([{ranks: 1.0, hits: 1.0}] * 5, list("abcde"))
    assert found["path"]["spearman"]["low"] == 1 > found["counterfactual"]["validity"]["low"]


def test_the_limit_draws_rows_of_both_classes(xrays):
    data = datasets.open_dataset(xrays, 32)
    rows = evaluate.drawn_rows(data, "all", 20, 0)
    assert len(set(rows)) == 20 and 4 <= data.labels[rows].sum() <= 16
    assert set(evaluate.drawn_rows(data, "test", None, 0)) == set(data.rows("test"))


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
    model, xrays, tmp_path, split, words
):
    own = saved(model, tmp_path / "own", provenance={"data": xrays.name})
    other = saved(model, tmp_path / "other", provenance={"data": "elsewhere"})
    *notes, _ = evaluate.evaluate(own, xrays, split)["about"]["notes"]
    assert words in notes[0] if words else not notes
    assert len(evaluate.evaluate(other, xrays, split)["about"]["notes"]) == 1


def test_data_are_prepared_as_the_models_were(model, xrays, tmp_path, monkeypatch):
    asked, unchanged = [], datasets.open_dataset
    monkeypatch.setattr(evaluate, "open_dataset", lambda *a: asked.append(a) or unchanged(*a))
    path = saved(model, tmp_path / "model", fit="pad", classes=["SICK", "NORMAL"])
    evaluate.evaluate(path, xrays, patient_pattern=r"(\d+)x")
    assert asked == [(xrays, 32, "pad", "SICK", r"(\d+)x", 0)]


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
    plain = evaluate.without_nan({"classifier": {"auroc": nan}, "about": {"images": [1, 2]}})
    path = evaluate.write(plain, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "evaluation.json"
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read["classifier"]["auroc"] == {"value": None, "low": None, "high": None, "n": 0}
    assert read["about"] == {"images": [1, 2]}
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]


def test_a_model_without_its_discriminator_is_measured_but_for_that(
    model, xrays, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "RANDOMISED", 0)
    networks = {k: v for k, v in model.networks.items() if k != "discriminator"}
    path = tmp_path / "shipped.safetensors"
    type(model)(networks, model.info, model.buffers).save(path, half=True)
    found = evaluate.evaluate(path, xrays, limit=2, refine=1, device="cpu")
    assert "realism_mid" not in found["path"] and "spearman" in found["path"]
    assert any("realism_mid" in note for note in found["about"]["notes"])
