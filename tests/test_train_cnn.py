import json

import numpy as np
import pytest
import torch

from cxr import (
    UsageError,
    augment,
    checkpoints,
    datasets,
    explain,
    film,
    train_cnn,
    train_gan,
)
from cxr.cnn import check
from cxr.device import rng
from cxr.evaluation.inputs import Options, open_inputs
from cxr.training import World


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Noise, with a bright square somewhere in the diseased ones."""
    folder, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    boxes = ["name,x,y,width,height"]
    for name in ("NORMAL", "SICK"):
        (folder / name).mkdir()
        for number in range(150):
            picture = rng.normal(100, 20, (32, 32))
            if name == "SICK":
                row, column = rng.integers(4, 20, 2)
                picture[row : row + 8, column : column + 8] += 60
                boxes.append(f"{name}{number}.png,{column / 32},{row / 32},0.25,0.25")
            picture = picture.clip(0, 255).astype(np.uint8)
            film.write_png(folder / name / f"{name}{number}.png", picture)
    boxes[-10:] = ["elsewhere.png,0,0,1,1"]  # the last ten are not marked
    folder.with_suffix(".csv").write_text("\n".join(boxes))
    return folder


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "cnn"
    config = train_cnn.Config(
        data=str(squares), preset="tiny", batch=32, images=3000, tick=1000, device="cpu"
    )
    return train_cnn.train(config, out), out


def test_training_learns_to_tell_the_classes_apart(trained):
    metrics = trained[0].info["metrics"]["classifier"]
    assert metrics["auroc"]["value"] > 0.9
    assert metrics["auroc"]["low"] <= metrics["auroc"]["value"] <= metrics["auroc"]["high"]
    assert {"accuracy", "sensitivity", "specificity", "ece", "auroc_gamma", "auroc_blur",
            "auroc_crop", "auroc_noise"} <= metrics.keys()  # fmt: skip


def test_boxes_teach_the_classifier_where_to_look(squares, tmp_path, capsys):
    boxes = squares.with_suffix(".csv")
    config = train_cnn.Config(
        data=str(squares), preset="tiny", boxes=str(boxes), batch=32, images=2048, tick=512
    )
    model = train_cnn.train(config, tmp_path / "cnn")
    said = " ".join(capsys.readouterr().err.split())
    assert "140 images are marked; of 10 diseased ones no place is known" in said
    assert "marks of images that are not in squares" in said
    rows = [json.loads(line) for line in (tmp_path / "cnn" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["where"] < 0.7 * rows[0]["where"]
    assert model.info["provenance"]["classifier"]["boxes"] == boxes.name
    assert set(model.networks) == {"classifier"}  # what says where is for training alone


def test_marks_move_with_their_images_and_unknown_ones_count_for_nothing(squares, monkeypatch):
    data = datasets.open_dataset(squares, 32)
    masks = np.random.default_rng(0).integers(0, 256, (len(data), 32, 32), np.uint8)
    known = np.arange(len(data)) % 2 == 0
    config = train_cnn.Config(str(squares), preset="tiny", batch=8)
    cpu = torch.device("cpu")
    trainer = train_cnn.Trainer(config, data, cpu, World(cpu), (masks, known))
    changes = augment.draw(8, 1.0, rng(0), augment.CLASSIFIER)
    shown = {}
    monkeypatch.setattr(
        trainer.locator, "loss", lambda m, k: shown.update(masks=m, known=k) or m.sum()
    )
    trainer.where(np.arange(8), changes)
    quiet = changes | {
        n: changes[n] * 0 for n in ("brightness", "contrast", "gamma", "blur", "noise")
    }
    quiet["erase"] = quiet["erase"] * 0
    moved = augment.apply(torch.from_numpy(masks[:8]).float()[:, None] / 127.5 - 1, quiet)
    torch.testing.assert_close(shown["masks"], (moved + 1) / 2, atol=1e-3, rtol=0)
    assert shown["known"].tolist() == known[:8].tolist()
    trainer.locator = train_cnn.Locator(trainer.network)
    trainer.network(torch.randn(2, 1, 32, 32))
    loss = trainer.locator.loss(torch.ones(2, 1, 32, 32), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor(np.log(2), dtype=torch.float32))


def test_masks_and_boxes_at_once_are_refused(squares):
    config = train_cnn.Config(str(squares), masks=str(squares), boxes="b.csv", preset="tiny")
    with pytest.raises(UsageError, match="give one"):
        train_cnn.train(config, "nowhere")


def test_model_file_holds_the_model_that_was_measured(trained, squares):
    model, out = trained
    again = checkpoints.load_model(out / "model.safetensors")
    data = datasets.open_dataset(squares, 32)
    a, b = (
        train_cnn.predict(m.classifier, data.images[data.rows("test")], "cpu")
        for m in (model, again)
    )
    assert np.array_equal(a, b)
    assert again.info["classes"] == ["NORMAL", "SICK"] and again.info["size"] == 32
    assert again.info["provenance"]["classifier"]["seen"] >= 3000
    assert again.buffers["mean_image"].shape == (1, 1, 32, 32)


def test_the_gan_takes_that_classifier(trained, squares, tmp_path):
    config = train_gan.Config(
        str(squares), str(trained[1] / "model.safetensors"), "tiny", batch=16, images=32, tick=32
    )
    model = train_gan.train(config, tmp_path / "gan")
    again = checkpoints.load_model(tmp_path / "gan" / "model.safetensors")
    assert set(again.networks) == {"classifier", "encoder", "generator", "discriminator"}
    assert again.info["logits"] == model.info["logits"] and again.info["thresholds"]["ssim"] < 1
    assert (tmp_path / "gan" / "samples" / "00000032.png").exists()


def test_predictions_do_not_hang_on_the_chunk(trained):
    x = np.random.default_rng(0).integers(0, 255, (300, 32, 32), dtype=np.uint8)
    classifier = trained[0].classifier
    whole = train_cnn.predict(classifier, x, "cpu")
    parts = np.concatenate([train_cnn.predict(classifier, x[i::2], "cpu") for i in (0, 1)])
    np.testing.assert_allclose(whole[::2], parts[:150], atol=1e-4)


def test_the_rate_warms_up_and_falls_to_nothing():
    assert train_cnn.schedule(0) < 0.01
    assert train_cnn.schedule(0.03) > 0.99
    assert train_cnn.schedule(1.0) == pytest.approx(0, abs=1e-9)


def test_training_stops_when_validation_no_longer_improves(squares, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_cnn.metrics, "auroc", lambda scores, labels: 0.5)
    numbers = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 30}
    monkeypatch.setattr(train_cnn.metrics, "bootstrap", lambda *a, **k: numbers)
    steps = []
    step = train_cnn.Trainer.step
    monkeypatch.setattr(train_cnn.Trainer, "step", lambda self: steps.append(1) or step(self))
    options = {"preset": "tiny", "batch": 16, "tick": 32, "patience": 2, "device": "cpu"}
    trainer_best = 0.6  # never reached again
    report = train_cnn.Trainer.report
    monkeypatch.setattr(
        train_cnn.Trainer,
        "report",
        lambda self: self.progress.update(best=trainer_best) or report(self),
    )
    train_cnn.train(train_cnn.Config(str(squares), images=960, **options), tmp_path / "run")
    assert len(steps) == 4  # two ticks of two steps
    said = " ".join(capsys.readouterr().err.split())
    assert "ended after 64 images: no better AUROC on validation for the last 64" in said


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Noise, with a bright square above, below or nowhere, and a CNN of the three classes."""
    folder, rng = tmp_path_factory.mktemp("three"), np.random.default_rng(0)
    for name in ("ABOVE", "BELOW", "NORMAL"):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(100):
            picture = rng.normal(100, 20, (32, 32))
            if name != "NORMAL":
                row, column = rng.integers(0, 8) + 16 * (name == "BELOW"), rng.integers(4, 20)
                picture[row : row + 8, column : column + 8] += 60
            picture = picture.clip(0, 255).astype(np.uint8)
            film.write_png(folder / "data" / name / f"{name}{number}.png", picture)
    config = train_cnn.Config(
        str(folder / "data"), "tiny", batch=32, images=9600, tick=3200, classes="many", device="cpu"
    )
    return train_cnn.train(config, folder / "cnn"), folder


def test_three_classes_are_told_apart_each_from_the_rest(three):
    model, folder = three
    assert model.info["classes"] == ["NORMAL", "ABOVE", "BELOW"]
    numbers = model.info["metrics"]["classifier"]
    assert list(numbers) == model.info["classes"]
    assert all(of_class["auroc"]["value"] > 0.9 for of_class in numbers.values())
    again = checkpoints.load_model(folder / "cnn" / "model.safetensors")
    x = torch.zeros(2, 1, 32, 32)
    assert again.classifier(x).shape == (2, 3)
    assert torch.equal(again.classifier(x), model.classifier(x))


@pytest.mark.parametrize("target", ["ABOVE", "2"])
def test_a_target_is_answered_for_with_its_log_odds(three, target):
    model, folder = three
    aimed = checkpoints.load_classifier(
        str(folder / "cnn" / "model.safetensors"), 32, target=target
    )
    place = 2 if target == "2" else 1
    x = torch.rand(4, 1, 32, 32) * 2 - 1
    p = model.classifier(x).softmax(1)[:, place]
    torch.testing.assert_close(aimed.classifier(x).sigmoid(), p, atol=1e-5, rtol=1e-4)
    assert aimed.info["target"] == model.info["classes"][place]
    assert aimed.info["classes"][1] == aimed.info["target"]
    assert aimed.info["metrics"]["classifier"]["auroc"]["value"] > 0.9


def test_the_target_is_asked_for_and_has_to_be_a_class(three, trained):
    file = str(three[1] / "cnn" / "model.safetensors")
    with pytest.raises(UsageError, match="NORMAL, ABOVE, BELOW apart: say one with --target"):
        checkpoints.load_classifier(file, 32)
    with pytest.raises(UsageError, match="target TB: no such class"):
        checkpoints.load_classifier(file, 32, target="TB")
    two = str(trained[1] / "model.safetensors")
    with pytest.raises(UsageError, match="tells NORMAL from SICK, no more"):
        checkpoints.load_classifier(two, 32, target="TB")
    assert checkpoints.load_classifier(two, 32, target="SICK").info["classes"] == ["NORMAL", "SICK"]


def test_a_classifier_of_three_without_figures_can_be_aimed_too(three, tmp_path):
    for number, metrics in enumerate(({}, {"classifier": 3}, {"classifier": {"ABOVE": 1}})):
        model = checkpoints.load_model(three[1] / "cnn" / "model.safetensors")
        model.info["metrics"] = metrics
        model.save(tmp_path / f"{number}.safetensors")
        aimed = checkpoints.load_classifier(
            str(tmp_path / f"{number}.safetensors"), 32, target="BELOW"
        )
        assert aimed.info["target"] == "BELOW" and aimed.info["metrics"] == {}


def test_a_model_file_is_checked_on_classes_of_other_names(three, trained, squares, tmp_path):
    (tmp_path / "data").mkdir()
    for name, other in (("NORMAL", "healthy"), ("SICK", "ill")):
        (tmp_path / "data" / other).symlink_to(squares / name)
    two, many = (str(f / "model.safetensors") for f in (trained[1], three[1] / "cnn"))
    assert check.check_cnn(two, str(tmp_path / "data"), 32)["auroc"]["value"] > 0.9
    found = check.check_cnn(many, str(three[1] / "data"), 32, target="BELOW")
    assert found["failed"] == 0 and found["auroc"]["value"] > 0.9


def test_a_gan_explains_the_target_against_the_rest(three):
    _, folder = three
    file = str(folder / "cnn" / "model.safetensors")
    config = train_gan.Config(
        str(folder / "data"), file, "tiny", target="BELOW", batch=16, images=32, tick=32
    )
    train_gan.train(config, folder / "gan")
    model = checkpoints.load_model(folder / "gan" / "model.safetensors")
    assert model.info["classes"] == ["ABOVE+NORMAL", "BELOW"] and model.info["target"] == "BELOW"
    assert model.classifier.config.target == 2
    below = next((folder / "data" / "BELOW").iterdir())
    found = explain.explain(below, model, refine=1)
    assert found.numbers["classes"] == ["ABOVE+NORMAL", "BELOW"] and found.logit.item() > 0
    inputs = open_inputs(folder / "gan" / "model.safetensors", folder / "data", Options())
    assert inputs.data.classes == ("ABOVE+NORMAL", "BELOW")
    assert inputs.data.labels.sum() == 100
    with pytest.raises(UsageError, match="own classifier"):  # the same one, aimed alike
        open_inputs(folder / "gan" / "model.safetensors", folder / "data", Options(oracle=file))


def test_a_classifier_of_two_classes_can_begin_one_of_three(three, trained, capsys):
    start = str(trained[1] / "model.safetensors")
    config = train_cnn.Config(
        str(three[1] / "data"), "tiny", start=start, batch=32, images=32, tick=32, classes="many"
    )
    trainer = train_cnn.Trainer(
        config,
        datasets.open_dataset(config.data, 32, classes="many"),
        torch.device("cpu"),
        World("cpu"),
    )
    old, new = (n.state_dict() for n in (trained[0].classifier, trainer.network))
    assert torch.equal(old["trunk.0.weight"], new["trunk.0.weight"])
    assert new["head.weight"].shape[0] == 3
