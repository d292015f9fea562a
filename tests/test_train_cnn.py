import numpy as np
import pytest

from cxr import checkpoints, datasets, film, train_cnn, train_gan


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Noise, with a bright square somewhere in the diseased ones."""
    folder, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for name in ("NORMAL", "SICK"):
        (folder / name).mkdir()
        for number in range(150):
            picture = rng.normal(100, 20, (32, 32))
            if name == "SICK":
                row, column = rng.integers(4, 20, 2)
                picture[row : row + 8, column : column + 8] += 60
            picture = picture.clip(0, 255).astype(np.uint8)
            film.write_png(folder / name / f"{name}{number}.png", picture)
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


def test_training_stops_when_validation_no_longer_improves(squares, tmp_path, monkeypatch):
    monkeypatch.setattr(train_cnn.metrics, "auroc", lambda scores, labels: 0.5)
    monkeypatch.setattr(train_cnn.metrics, "bootstrap", lambda *a, **k: {})
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
