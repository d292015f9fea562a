import collections
import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_images import write_dicom

from cxr import (
    CxrError,
    UsageError,
    belief,
    checkpoints,
    explain,
    film,
    inversion,
    losses,
    report,
)
from cxr.cnn.adapter import adapt
from cxr.cnn.fingerprint import fingerprint

QUICK = {"frames": 5, "restarts": 2, "refine": 3, "device": "cpu"}


class Brightness(torch.nn.Module):
    """A classifier whose truth is known: the mean grey, around a threshold."""

    def __init__(self, threshold=0.0, gain=40.0):
        super().__init__()
        self.threshold, self.gain = threshold, gain
        self.conv = torch.nn.Conv2d(1, 1, 1, bias=False)
        torch.nn.init.ones_(self.conv.weight)

    def forward(self, x):
        return self.gain * (self.conv(x).mean((1, 2, 3)) - self.threshold)


class Two(torch.nn.Module):
    """The logits of two classes, from one for the second, or turned round."""

    def __init__(self, one, sign):
        super().__init__()
        self.one, self.sign = one, sign

    def forward(self, x):
        z = self.sign * self.one(x)
        return torch.stack([-z / 2, z / 2], 1)


class Scale(torch.nn.Module):
    """A classifier without a convolution."""

    def forward(self, x):
        return 8 * x.mean((1, 2, 3))


@pytest.fixture
def bright(model):
    """The untrained tiny model, with the classifier whose truth is known."""
    torch.manual_seed(0)
    networks = {**model.networks, "classifier": Brightness().requires_grad_(False)}
    return checkpoints.Model(networks, dict(model.info), dict(model.buffers))


def test_each_of_several_images_is_explained_as_if_alone(bright):
    greys = (
        np.random.default_rng(1).normal(0, 20, (4, 32, 32))
        + np.array([150, 90, 140, 100])[:, None, None]
    )
    pictures = list(greys.clip(0, 255).astype(np.uint8))
    options = {name: value for name, value in QUICK.items() if name != "device"}
    together = explain.explain_group(pictures, bright, **options)
    assert [e.diseased for e in together] == [True, False, True, False]
    for picture, e in zip(pictures, together):
        alone = explain.explain(picture, bright, **QUICK)
        torch.testing.assert_close(e.logits, alone.logits, atol=1e-3, rtol=0)
        torch.testing.assert_close(e.overlaid_logits, alone.overlaid_logits, atol=1e-3, rtol=0)
        assert e.numbers.keys() == alone.numbers.keys() and e.maps.keys() == alone.maps.keys()
        for name, heat in e.maps.items():
            torch.testing.assert_close(heat, alone.maps[name], atol=1e-3, rtol=1e-3)


def test_how_many_at_once_is_bounded_by_the_classifiers_memory(bright, monkeypatch):
    assert explain.at_once(bright) == 4
    monkeypatch.setattr(explain.cost, "at_once", lambda network, x, budget: 9)  # with a gradient
    assert explain.at_once(bright) == 2
    monkeypatch.setattr(explain.cost, "at_once", lambda network, x, budget: 1)
    assert explain.at_once(bright) == 1


@pytest.mark.parametrize("gib, most, budget", [(8, 16, 1), (24, 48, 1.5), (141, 64, 8.8125)])
def test_on_a_gpu_its_memory_bounds_how_many(bright, monkeypatch, gib, most, budget):
    given = []
    monkeypatch.setattr(explain.cost, "memory", lambda device: gib * 2**30)
    monkeypatch.setattr(explain.cost, "at_once", lambda *given_: given.append(given_[2]) or 10**6)
    assert explain.at_once(bright) == most
    assert given == [budget * 2**30]


def test_an_answer_is_called_as_its_own_cnn_calls_it(bright, tmp_path):
    """Not as the GAN's, whose classes may be others; and a CNN that falls along the path is said."""
    x = np.random.default_rng(0).normal(150, 20, (32, 32)).clip(0, 255).astype(np.uint8)
    assert json.dumps(explain.explain(x, bright, **QUICK | {"frames": np.int64(5)}).numbers)
    for sign, named in ((1, ("Healthy", "Edema")), (-1, ("Edema", "Healthy"))):
        net = Two(bright.classifier, sign)
        found = explain.explain(x, bright, classifier=adapt(net, None, 1, output="logits", target=1,
            value_range=(-1, 1), classes=named), **QUICK)  # fmt: skip
        assert found.classes == named
        html = report.page(found)
        assert f"probability of {named[1]}" in html and "SICK" not in html
        rise = found.numbers["logit"][-1] - found.numbers["logit"][0]
        falls = any("is --target the healthy class?" in line for line in found.warnings)
        assert falls == (rise < -1)


@pytest.fixture(params=["diseased", "healthy"])
def image(request):
    level = 150 if request.param == "diseased" else 90
    noise = np.random.default_rng(0).normal(level, 20, (8, 8)).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(noise).resize((32, 32), Image.BICUBIC))


def test_explanation_folder_holds_what_is_promised(bright, image, tmp_path):
    e = explain.explain(image, bright, **QUICK)
    e.write(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "index.html", "thumbnail.png", "explanation.gif", "panel.png", "panel.svg", "response.csv", "explanation.json",
        "latents.safetensors",
    }  # fmt: skip
    numbers = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert len(numbers["probability"]) == len(numbers["logit"]) == len(numbers["dose"]) == 5
    assert {"psnr", "ssim", "probability_gap"} <= numbers["reconstruction"].keys()
    assert {"probability", "flipped", "l1_original", "l1_reconstruction"} <= (
        numbers["counterfactual"].keys()
    )
    assert numbers["restarts"]["spread"] >= 0 and "torch" in numbers["versions"]
    assert "no diagnosis" in numbers["use"]
    assert numbers["image"] is None and numbers["warnings"] == e.warnings
    rows = list(csv.DictReader((tmp_path / "out" / "response.csv").open()))
    assert [float(r["dose"]) for r in rows] == [0, 0.25, 0.5, 0.75, 1]
    tensors = load_file(tmp_path / "out" / "latents.safetensors")
    assert tensors["frames"].shape == (5, 1, 32, 32) and tensors["maps.latent_ig"].shape == (32, 32)
    with Image.open(tmp_path / "out" / "explanation.gif") as gif:
        assert gif.n_frames == 5


def test_frames_are_reproduced_from_the_saved_codes(bright, image, tmp_path):
    e = explain.explain(image, bright, **QUICK)
    e.write(tmp_path)
    t = load_file(tmp_path / "latents.safetensors")
    noise = [t[f"noise.{i}"] for i in range(len(e.codes.noise))]
    for dose, frame in zip(t["doses"], t["frames"], strict=True):
        again = bright.generator(
            t["w1"][:1], t["directions"][:1] * dose, noise, t["detail"][:1]
        ).clamp(-1, 1)
        torch.testing.assert_close(again[0], frame, atol=1e-5, rtol=0)
    copy = bright.generator(t["w1"][:1], t["z2"][:1], noise, t["detail"][:1]).clamp(-1, 1)
    torch.testing.assert_close(copy, t["reconstructions"][:1], atol=1e-5, rtol=0)


class Counter:
    """How often a network was shown each picture, with a gradient or without."""

    def __init__(self, network, which):
        self.seen = collections.Counter()
        network.register_forward_hook(
            lambda module, inputs, output: self.count(which(inputs, output))
        )

    def count(self, pictures):
        kind = torch.is_grad_enabled()
        self.seen.update((kind, p.detach().numpy().tobytes()) for p in pictures)


def test_no_picture_is_drawn_twice_and_no_question_asked_twice(bright, image):
    """What the descents ask with a gradient is new at each step and not counted."""
    drawn = Counter(bright.generator, lambda inputs, output: output)
    asked = Counter(bright.classifier, lambda inputs, output: inputs[0])
    e = explain.explain(image, bright, **QUICK)
    plain = [count for (gradient, _), count in drawn.seen.items() if not gradient]
    assert len(plain) > QUICK["frames"] and set(plain) == {1}
    ended = e.image.numpy().tobytes(), e.reconstructions[:1].numpy().tobytes()
    # Its logit comes with its gradient. To find a convolution, a user's classifier is run once more;
    # and the overlay on a healthy image is at dose 0 the image itself.
    assert asked.seen[False, ended[0]] == 1 + (not e.diseased)
    assert asked.seen[False, ended[1]] == 1
    for frame in e.frames:
        assert asked.seen[False, frame.numpy().tobytes()] == 1


def test_every_frame_is_scored_by_the_classifier_itself(bright, image):
    e = explain.explain(image, bright, **QUICK)
    torch.testing.assert_close(e.logits, bright.classifier(e.frames))
    assert e.numbers["logit"] == pytest.approx(e.logits.tolist())


@pytest.mark.parametrize("shade", [60, 200])
def test_latent_integrated_gradient_sums_to_the_change_of_the_logit(bright, shade):
    picture = np.random.default_rng(0).normal(shade, 30, (32, 32)).clip(0, 255).astype(np.uint8)
    e = explain.explain(picture, bright, **QUICK)
    assert e.diseased == (shade == 200)
    assert e.numbers["completeness_error"] < 0.01
    counterfactual = e.overlaid[e.numbers["counterfactual"]["frame"]][None]
    ends = (counterfactual, e.image) if e.diseased else (e.image, counterfactual)  # by their doses
    change = bright.classifier(torch.cat(ends)).diff().item()
    assert e.maps["latent_ig"].sum().item() == pytest.approx(change, rel=0.01, abs=0.002)


def test_a_healthy_image_gets_several_directions_and_a_diseased_one_its_own(bright, image):
    e = explain.explain(image, bright, **QUICK)
    diseased = e.diseased
    assert len(e.numbers["directions"]) == (0 if diseased else inversion.CONFIG.directions + 1)
    assert e.numbers["counterfactual"]["frame"] == (0 if diseased else 4)
    assert all(d["accepted"] == (d["probability"] > 0.5) for d in e.numbers["directions"])


def test_one_restart_has_no_spread(bright, image):
    e = explain.explain(image, bright, **{**QUICK, "restarts": 1})
    assert e.numbers["restarts"]["spread"] is None


def test_a_dose_never_exceeds_one(bright, image):
    e = explain.explain(image, bright, **{**QUICK, "restarts": 8, "refine": 0})
    assert max(e.numbers["restarts"]["doses"]) <= 1 + 1e-6


def test_refinement_brings_the_reconstruction_nearer(bright, image):
    quick = {**QUICK, "restarts": 1}
    before = explain.explain(image, bright, **{**quick, "refine": 0})
    after = explain.explain(image, bright, **{**quick, "refine": 40})

    def loss(e):
        return losses.image(e.reconstructions[:1], e.image).item()

    assert loss(after) < 0.9 * loss(before)


def test_refinement_finds_a_detail_that_brings_the_reconstruction_nearer(bright, image):
    e = explain.explain(image, bright, **{**QUICK, "refine": 40})
    plain = dataclasses.replace(e.codes, detail=torch.zeros_like(e.codes.detail))
    without = plain.best.draw(bright.generator, e.codes.z2[:1]).clamp(-1, 1)
    near, far = (losses.image(copy, e.image).item() for copy in (e.reconstructions[:1], without))
    assert near < 0.98 * far


def test_refinement_brings_the_path_to_the_logits_that_its_doses_name(bright, image):
    before = explain.explain(image, bright, **{**QUICK, "refine": 0})
    after = explain.explain(image, bright, **{**QUICK, "refine": 40})
    assert after.numbers["logit_gap"] < 0.8 * before.numbers["logit_gap"]


def test_same_seed_same_explanation(bright, image):
    a, b = (explain.explain(image, bright, **QUICK) for _ in range(2))
    assert torch.equal(a.frames, b.frames) and a.numbers == b.numbers


def test_the_counterfactual_is_the_image_changed_within_the_saved_mask(bright, image, tmp_path):
    e = explain.explain(image, bright, **QUICK)
    e.write(tmp_path)
    mask = load_file(tmp_path / "latents.safetensors")["mask"][0]
    place = e.numbers["counterfactual"]["frame"]
    expected = mask * e.frames[place] + (1 - mask) * e.image[0]
    torch.testing.assert_close(e.overlaid[place], expected, atol=1e-5, rtol=0)
    assert e.numbers["counterfactual"]["l1_overlaid"] == pytest.approx(
        (e.image[0] - expected).abs().mean().item() / 2, abs=1e-5
    )


def test_doubts_are_said_where_the_explanation_cannot_be_believed(bright, image):
    bright.info["thresholds"] = {"ssim": 1.0, "likeness": 1.0}
    bright.buffers["mean_image"] = torch.rand(1, 1, 32, 32)
    lines = explain.explain(image, bright, **QUICK).warnings
    assert any("does not look like the radiographs" in line for line in lines)
    assert any("SSIM" in line and "1.00" in line for line in lines)
    bright.info["thresholds"], bright.info["foreign"] = {}, "other.py:f"
    lines = explain.explain(image, bright, **QUICK).warnings
    assert any("dose axis is the GAN's" in line for line in lines)
    assert not any("radiographs the" in line or "encoder's SSIM" in line for line in lines)


def test_another_classifier_can_be_explained(model_file, own_classifier):
    loaded = explain.load_explainer(model_file, f"{own_classifier}:bright", "cpu")
    x = torch.rand(1, 1, 32, 32)
    assert loaded.classifier(x).item() == pytest.approx(20 * (x.mean().item() + 0.1), rel=1e-4)
    assert "foreign" not in explain.load_explainer(model_file, None, "cpu").info
    assert loaded.info["foreign"] == f"{own_classifier}:bright"


def test_a_classifier_that_the_model_was_trained_with_but_does_not_keep_is_its_own(
    model, own_classifier
):
    networks = {name: net for name, net in model.networks.items() if name != "classifier"}
    bare = checkpoints.Model(networks, dict(model.info), model.buffers)
    loaded = explain.load_explainer(bare, f"{own_classifier}:bright", "cpu")
    assert "foreign" not in loaded.info and loaded.info["logits"] == model.info["logits"]
    own = checkpoints.load_classifier(f"{own_classifier}:bright", 32).classifier
    for network, foreign in ((own, False), (model.classifier, True)):
        bare.info["fingerprint"] = fingerprint(network, 32)
        loaded = explain.load_explainer(bare, f"{own_classifier}:bright", "cpu")
        assert ("foreign" in loaded.info) is foreign


def test_the_models_own_classifier_is_recognised(model_file, classifier_file, model):
    file = explain.load_explainer(model_file, str(classifier_file), "cpu")
    module = explain.load_explainer(model_file, model.classifier, "cpu")
    for loaded in (file, module):
        assert "foreign" not in loaded.info


def test_the_dose_runs_between_the_logits_of_another_classifier(bright):
    spans = []
    for gain in (4, 40, -4, -40):  # brighter or darker with the dose, whatever the generator does
        bright.networks["classifier"], bright.info["logits"] = Brightness(gain=gain), [-9.0, 9.0]
        explain.rescale(bright)
        spans.append(bright.info["logits"])
    rising = [span for span in spans if span != [-9.0, 9.0]]
    assert len(rising) == 2 and rising[0][0] < rising[0][1]
    assert rising[1] == pytest.approx([10 * end for end in rising[0]], rel=1e-4)


def test_no_grad_around_it_does_no_harm(bright, image):
    with torch.no_grad():
        e = explain.explain(image, bright, **QUICK)
    assert torch.equal(e.frames, explain.explain(image, bright, **QUICK).frames)


def test_an_overlay_that_does_not_flip_the_verdict_is_doubted(bright, image):
    e = explain.explain(image, bright, **QUICK)
    e.numbers["counterfactual"] |= {"flipped": True, "flipped_overlaid": False}
    assert any("the overlay does not change" in line for line in belief.refusals(e.numbers, bright))


def test_files_arrays_and_tensors_are_taken_alike(bright, image, tmp_path):
    film.write_png(tmp_path / "x.png", image)
    tensor = torch.from_numpy(image / np.float32(127.5) - 1)[None, None]
    for other in (tmp_path / "x.png", tensor):
        torch.testing.assert_close(explain.prepare(other, bright), explain.prepare(image, bright))
    with pytest.raises(UsageError, match="must be uint8"):
        explain.prepare(image.astype(float), bright)
    with pytest.raises(UsageError, match="must be"):
        explain.prepare(torch.zeros(1, 1, 16, 16), bright)
    for wrong in (tensor * 127, tensor * torch.nan, (tensor * 127).byte()):
        with pytest.raises(UsageError, match="from -1 to 1"):
            explain.prepare(wrong, bright)


def test_wrong_counts_are_refused(bright, image):
    for bad in ({"frames": 1}, {"restarts": 0}, {"refine": -1}):
        with pytest.raises(UsageError, match="at least"):
            explain.explain(image, bright, **{**QUICK, **bad})


def test_a_classifier_alone_cannot_be_explained(classifier_file):
    with pytest.raises(CxrError, match="train-gan"):
        explain.load_explainer(classifier_file, None, "cpu")


def test_a_classifier_of_other_classes_is_refused(model, model_file, tmp_path):
    info = model.info | {"classes": ["NORMAL", "COVID"]}
    other = tmp_path / "other.safetensors"
    checkpoints.Model({"classifier": model.classifier}, info, model.buffers).save(other)
    with pytest.raises(CxrError, match="--classifier tells NORMAL from COVID, the model"):
        explain.load_explainer(model_file, str(other), "cpu")


def test_the_sample_is_of_the_model_that_is_named(model_file):
    for name in checkpoints.shipped():
        assert explain.sample_image(name).name.startswith(name)
    for other in (None, str(model_file)):
        assert explain.sample_image(other).name.startswith(explain.default_model())


def test_the_pixel_spacing_of_a_dicom_file_is_kept(bright, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4096, (48, 64), np.uint16)
    write_dicom(tmp_path / "x.dcm", pixels, PixelSpacing=[0.2, 0.2])
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for name, expected in (("x.dcm", [0.2, 0.2]), ("x.png", None)):
        e = explain.explain(tmp_path / name, bright, **QUICK)
        assert e.numbers["pixel_spacing"] == expected


def test_within_the_lungs_the_overlay_changes_nothing_else(bright, image, monkeypatch):
    marked = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    marked[..., 8:20, 6:26] = True
    monkeypatch.setattr(explain.lungs, "find", lambda x: marked)
    e = explain.explain(image, bright, refine=1, within="lungs")
    beyond = explain.lungs.around(marked)[0, 0] == 0
    assert beyond.any() and torch.equal(e.counterfactual()[beyond], e.image[0, 0][beyond])
    assert e.numbers["options"]["within"] == "lungs"
    free = explain.explain(image, bright, refine=1)
    outside, bounded = (n.numbers["counterfactual"]["outside_lung_overlaid"] for n in (free, e))
    assert bounded < outside


def test_without_lungs_nothing_can_be_bounded_by_them(bright, image, monkeypatch):
    monkeypatch.setattr(explain.lungs, "find", lambda x: torch.zeros_like(x, dtype=torch.bool))
    with pytest.raises(CxrError, match="no lungs are found in it: leave --within out"):
        explain.explain(image, bright, refine=0, within="lungs")
    found = explain.explain(image, bright, refine=0).numbers["counterfactual"]
    assert found["outside_lung"] is None and found["outside_lung_overlaid"] is None


def test_a_missing_grad_cam_is_told_with_its_reason(bright, image):
    bright.networks["classifier"] = Scale()
    e = explain.explain(image, bright, **QUICK)
    assert "grad_cam" not in e.maps
    assert any("a map is missing: Grad-CAM: this classifier has no conv" in w for w in e.warnings)
    bright.networks["classifier"] = Brightness().requires_grad_(False)
    e = explain.explain(image, bright, **QUICK)
    assert "grad_cam" in e.maps and e.numbers["missing_maps"] == []


def test_a_classifier_that_hardly_answers_is_not_believed(bright, image):
    bright.networks["classifier"] = Brightness(gain=0.5).requires_grad_(False)
    numbers = explain.explain(image, bright, **QUICK).numbers
    rise = numbers["logit"][-1] - numbers["logit"][0]
    line = f"the classifier hardly answers to this disease: its logit rises by {rise:.2f} from"
    assert rise < 1 and not numbers["believe"]
    assert any(warning.startswith(line) for warning in numbers["warnings"])
    answering = belief.refusals(numbers | {"logit": [-1.0, 2.0]}, bright)
    assert not any("hardly answers" in line for line in answering)
