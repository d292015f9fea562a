"""How far pictures are from real radiographs, and what follows for an explanation."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import cxrgan
from cxr import CxrError, appearance, checkpoints, explain, film, lungs, train_gan
from cxr.datasets import Dataset
from cxr.phantoms.lesions import phantom

SIZE = 64


@pytest.fixture(scope="module")
def phantoms():
    """60 synthetic X-rays, half of them held out."""
    images = np.stack([phantom(n, 5, SIZE).render().image for n in range(1, 61)])
    names = tuple(map(str, range(60)))
    splits = np.array(["train"] * 40 + ["val"] * 10 + ["test"] * 10)
    return Dataset(images, np.arange(60) % 2, names, splits, names, ("NORMAL", "SICK"), "phantoms")


def tensor(images):
    return torch.from_numpy(images)[:, None].float() / 127.5 - 1


def test_pictures_like_the_training_set_lie_within_the_limit_and_others_do_not(phantoms):
    buffers, limits = appearance.reference(phantoms)
    limit = limits["appearance"]
    assert limits["appearance_typical"] <= limit
    real = tensor(phantoms.images[phantoms.splits == "test"])
    assert np.mean(np.array(appearance.distances(real, buffers)) < limit) > 0.8
    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    blotches = torch.nn.functional.interpolate(noise, (SIZE, SIZE), mode="bicubic")
    for strange in (real + 0.5 * blotches, real.flip(2), torch.zeros(2, 1, SIZE, SIZE)):
        assert min(appearance.distances(strange.clamp(-1, 1), buffers)) > limit


def test_the_distance_of_what_it_was_fitted_to_is_one_on_average():
    features = torch.randn(4000, lungs.FEATURES, generator=torch.Generator().manual_seed(0))
    known = appearance.fit(3 * features + 2)
    assert appearance.distance(3 * features + 2, known).mean() == pytest.approx(1, abs=0.05)
    assert appearance.distance(3 * features[:1] + 20, known) > 5


def test_a_model_file_without_the_reference_is_not_judged(model):
    assert appearance.distances(torch.zeros(1, 1, 32, 32), model.buffers) is None


def test_a_damaged_reference_is_refused(model, phantoms, tmp_path):
    buffers, _ = appearance.reference(phantoms)
    networks = {"classifier": model.classifier}
    for change in (
        {"appearance.mean": torch.zeros(3)},
        {"appearance.axes": torch.zeros(2, 5)},
        {"appearance.scale": torch.full((lungs.FEATURES,), torch.nan)},
    ):
        file = tmp_path / "model.safetensors"
        checkpoints.Model(networks, model.info, {**buffers, **change}).save(file)
        with pytest.raises(CxrError, match="buffers.appearance"):
            checkpoints.load_model(file)


def test_the_sample_is_believed_and_no_bad_gans_explanation_is(tmp_path):
    """The same image, the GAN that ships and the same one with shaken weights."""
    sample, good = explain.sample_image(), checkpoints.load_model("pneumonia")
    assert explain.explain(sample, good, refine=20, frames=5).believe
    torch.manual_seed(0)
    for name, weight in good.generator.named_parameters():
        if "conv" in name:
            weight.data += weight.std() * torch.randn_like(weight)
    e = explain.explain(sample, good, refine=20, frames=5)
    assert not e.believe and "DO NOT BELIEVE" in repr(e).upper()
    assert any("do not look like real radiographs" in line for line in e.warnings)
    e.write(tmp_path / "x")
    told = json.loads((tmp_path / "x" / "explanation.json").read_text())
    assert told["believe"] is False and told["warnings"] == e.warnings
    assert "do not believe" in (tmp_path / "x" / "index.html").read_text()
    calm = cxrgan.Explanation(**{**vars(e), "numbers": {**e.numbers, "believe": True}})
    for frames, others in ((e.film(), calm.film()), ([e.panel()], [calm.panel()])):
        red = [(f[:12].astype(int) @ [1, -1, 0] > 100).mean() for f in (frames[0], others[0])]
        assert red[0] > 0.5 and red[1] == 0


@pytest.mark.parametrize("force, status", [([], 1), (["--force"], 0)])
def test_an_untrained_gan_ends_with_status_1(model_file, tmp_path, force, status):
    film.write_png(tmp_path / "x.png", phantom(1, 0, 64).render().image)
    words = ["explain", str(tmp_path / "x.png"), "--model", str(model_file), "--refine", "1"]
    out = ["--out", str(tmp_path / "out"), "--frames", "3", *force]
    result = CliRunner().invoke(cxrgan.cli, [*words, *out])
    assert result.exit_code == status, result.output
    assert "do not believe this explanation" in result.output
    assert ("1 of 1 explanations are not to be believed" in result.output) is (not force)
    assert (tmp_path / "out" / "x" / "explanation.json").is_file()


MEAN = """
import torch

class Mean(torch.nn.Module):
    def forward(self, x):
        return 20 * (x.mean((1, 2, 3)) - 0.15)

net = Mean
"""


def test_a_gan_of_64_images_is_refused(tmp_path):
    """It draws blotches, on which the CNN changes its verdict as asked."""
    (tmp_path / "own.py").write_text(MEAN)
    for n in range(1, 67):
        image, label = phantom(n, 0, 32).render().image, "SICK" if n % 2 else "NORMAL"
        image = (image * 0.7 + 75).astype(np.uint8) if n % 2 else image
        folder = tmp_path / ("data" if n <= 64 else "held out") / label
        folder.mkdir(parents=True, exist_ok=True)
        film.write_png(folder / f"p{n}.png", image)
    cnn, run = f"{tmp_path / 'own.py'}:net", str(tmp_path / "run")
    options = {"preset": "tiny", "images": 1536, "tick": 1536, "device": "cpu"}
    model = train_gan.train(train_gan.Config(str(tmp_path / "data"), cnn, **options), run)
    for path in (tmp_path / "held out").rglob("*.png"):
        e = explain.explain(path, f"{run}/model.safetensors", classifier=cnn, frames=5)
        assert not e.believe
        assert any("GAN's random lungs do not look like real" in line for line in e.warnings)
    assert model.info["metrics"]["gan"]["appearance"] > model.info["thresholds"]["appearance"]
