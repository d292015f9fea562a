import copy
import pickle

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from cxr import CxrError, UsageError, checkpoints, ops
from cxr.networks import PRESETS, Classifier, Discriminator, Encoder, Generator, grow, outgrows


def test_model_file_gives_back_the_same_answers(model, model_file):
    again = checkpoints.load_model(model_file)
    x, u = torch.randn(2, 1, 32, 32), torch.randn(2, 16)
    noise = model.generator.noise(2)
    assert torch.equal(model.classifier(x), again.classifier(x))
    assert torch.equal(model.encoder(x)[0], again.encoder(x)[0])
    w1 = model.generator.M1(torch.randn(2, 32))
    assert torch.equal(model.generator(w1, u, noise), again.generator(w1, u, noise))
    assert torch.equal(model.discriminator(x, u[:, 0]), again.discriminator(x, u[:, 0]))
    assert again.info == model.info
    assert not any(p.requires_grad for n in again.networks.values() for p in n.parameters())


def test_half_precision_file_is_read_as_fp32(model, model_file, tmp_path):
    model.save(tmp_path / "m", half=True)
    assert (tmp_path / "m").stat().st_size < 0.6 * model_file.stat().st_size
    again = checkpoints.load_model(tmp_path / "m")
    assert next(again.classifier.parameters()).dtype == torch.float32
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(again.classifier(x), model.classifier(x), atol=0.02, rtol=0.02)


def test_dose_and_logit_name_each_other(model):
    doses = torch.tensor([0.0, 0.25, 1.0])
    assert model.logit(doses).tolist() == [-3.0, -1.5, 3.0]
    torch.testing.assert_close(model.dose(model.logit(doses)), doses)
    assert model.dose(torch.tensor([-9.0, 9.0])).tolist() == [0.0, 1.0]


def test_a_missing_network_says_what_to_give(classifier_file):
    with pytest.raises(
        CxrError, match="holds no generator: give a model made by `cxrgan train-gan`"
    ):
        _ = checkpoints.load_model(classifier_file).generator


@pytest.mark.parametrize("kind", [OSError, safetensors.SafetensorError])
def test_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, kind):
    path = tmp_path / "state.safetensors"
    checkpoints.save(path, {"a": torch.ones(2)}, {"images": 1})

    def fail(*_):
        raise kind("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(CxrError, match="state.safetensors: cannot be written: disk full"):
        checkpoints.save(path, {"a": torch.zeros(2)}, {"images": 2})
    tensors, progress = checkpoints.load(path)
    assert tensors["a"].tolist() == [1, 1] and progress == {"images": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("content", [b"", b"short", pickle.dumps({"a": 1}), b"\xff" * 200])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CxrError, match="as safetensors") as caught:
        checkpoints.load_model(path)
    assert "\n" not in str(caught.value)


def test_truncated_model_file_is_refused(model_file, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(model_file.read_bytes()[:-100])
    with pytest.raises(CxrError, match="is it whole"):
        checkpoints.load_model(path)


def test_foreign_safetensors_and_formats_are_refused(tmp_path):
    checkpoints.save(tmp_path / "foreign", {"a": torch.ones(1)}, {})
    with pytest.raises(CxrError, match="not a cxrgan model"):
        checkpoints.load_model(tmp_path / "foreign")
    checkpoints.save(tmp_path / "new", {"a": torch.ones(1)}, {"format": 99, "configs": {}})
    with pytest.raises(CxrError, match="format 99"):
        checkpoints.load_model(tmp_path / "new")
    with pytest.raises(CxrError, match="no model file at nowhere"):
        checkpoints.load_model("nowhere")


def test_state_of_networks_and_optimisers_comes_back_exactly(tmp_path):
    def parts():
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        return {"n": network, "o": torch.optim.Adam(network.parameters(), 0.1)}

    def step(parts, seed):
        torch.manual_seed(seed)
        parts["n"](torch.randn(4, 3)).square().sum().backward()
        parts["o"].step()
        parts["o"].zero_grad()

    straight, resumed = parts(), parts()
    step(straight, 1)
    checkpoints.save(tmp_path / "s", checkpoints.pack(straight), {})
    checkpoints.unpack(checkpoints.load(tmp_path / "s")[0], resumed)
    step(straight, 2)
    step(resumed, 2)
    assert torch.equal(straight["n"].weight, resumed["n"].weight)


def test_a_users_own_classifier_is_taken_from_a_file(own_classifier):
    network = checkpoints.load_classifier(f"{own_classifier}:bright", 32).classifier
    assert network(torch.zeros(3, 1, 32, 32)).tolist() == pytest.approx([2.0] * 3)
    assert network(torch.full((1, 1, 32, 32), 7.0)).item() == pytest.approx(22.0)  # clipped to 1


@pytest.mark.parametrize(
    ("function", "message"),
    [("fails", "no such weights"), ("wrong_shape", "not a logit"), ("absent", "absent")],
)
def test_a_bad_classifier_of_the_users_is_named_in_one_line(own_classifier, function, message):
    with pytest.raises(CxrError, match=message) as caught:
        checkpoints.load_classifier(f"{own_classifier}:{function}", 32)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="no file"):
        checkpoints.load_classifier("absent.py:f", 32)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda info, t: info["configs"].update(oracle={}),
        lambda info, t: info["configs"]["classifier"].update(width=3),
        lambda info, t: t.pop("classifier.head.weight"),
        lambda info, t: info.pop("size"),
        lambda info, t: t["classifier.head.weight"].fill_(float("nan")),
    ],
)
def test_a_model_file_that_cannot_be_rebuilt_is_refused_in_one_line(model_file, tmp_path, spoil):
    tensors, info = checkpoints.load(model_file)
    spoil(info, tensors)
    checkpoints.save(tmp_path / "m", tensors, info)
    with pytest.raises(CxrError, match="rebuild|not numbers") as caught:
        checkpoints.load_model(tmp_path / "m")
    assert "\n" not in str(caught.value)


DEEP = {}
for _ in range(50):
    DEEP = {"deeper": DEEP}

NONSENSE = {
    "size": [-1, 0, 33, "32", 32.0, 10**6, [], None, True, 64],
    "fit": [3, "x", None, []],
    "classes": [
        [],
        ["a"],
        ["a", "a"],
        ["a", "b", "c"],
        ["a", "b", "a"],
        [0, 1],
        "ab",
        {"a": 1, "b": 2},
        None,
    ]
    + [["NORMAL", name] for name in ("", "\x1b[31mX", "a\nb", "\u202e", "\ud800", "x" * 10**5)],
    "logits": [[], [1.0], [1.0, 1.0], [5.0, -5.0], [float("nan"), 1.0], [0, float("inf")]]
    + [["a", "b"], [True, 2], [[1], 2], "12", 10**400, [0, 10**400], None],
    "thresholds": [[], "x", {"ssim": "x"}, {"likeness": float("nan")}, {"ssim": None}, None],
    "fold": [-1, 10, 1.5, "0", None, True],
    "split": [5, []],
    "provenance": [[], "x", None, DEEP],
    "metrics": [5, None],
    "configs": [[], None, 5, "x", {"oracle": {}}, {"classifier": None}, {"classifier": []}],
    "format": [2, 0, "1", None, [], float("inf")],
    "configs.classifier.channels": [[], [16], [0] * 3, [-8] * 3, [10**9] * 3, "x", [1.5] * 3]
    + [[16, 24, 32] * 50, [16, 24, True], [16, 24, 20], None],
    "configs.classifier.blocks": [0, -1, 10**9, 1.5, "1", None, 2],
    "configs.classifier.dropout": [1, -0.1, "x", float("nan"), None],
    "configs.encoder.layers": [0, 3, 10**9],
    "configs.encoder.z2": [8],
    "configs.encoder.channels": [[16, 24], [16, 24, 32, 40]],
    "configs.generator.noisy": ["x", -1, [1]],
    "configs.generator.convs": [0, 2, 10**9],
    "configs.generator.channels": [[32, 32, 24], [32, 32, 24, 16, 8]],
    "configs.discriminator.group": [0, -1, 10**9, "x"],
}


@pytest.mark.parametrize("place", NONSENSE)
def test_metadata_that_make_no_sense_are_refused_in_one_line(model_file, tmp_path, place):
    tensors, info = checkpoints.load(model_file)
    for value in NONSENSE[place]:
        spoilt = copy.deepcopy(info)
        node, (*above, last) = spoilt, place.split(".")
        for key in above:
            node = node[key]
        node[last] = value
        checkpoints.save(tmp_path / "m", tensors, spoilt)
        with pytest.raises(CxrError) as caught:
            checkpoints.load_model(tmp_path / "m")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, value


def test_names_that_are_not_known_are_left_alone(model, model_file, tmp_path):
    tensors, info = checkpoints.load(model_file)
    tensors["extra.tensor"] = torch.ones(1)
    checkpoints.save(tmp_path / "m", tensors, {**info, "extra": [1, {"a": None}]})
    assert checkpoints.load_model(tmp_path / "m").info == {**model.info, "extra": [1, {"a": None}]}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t.update({"classifier.head.bias": torch.ones(2)}), "has shape .2., not .1."),
        (lambda t: t.update({"classifier.nosuch": torch.ones(2)}), "nosuch is unknown"),
        (lambda t: t.update({"classifier.temperature": torch.tensor(1)}), "holds torch.int64"),
        (lambda t: t["classifier.temperature"].fill_(-1), "temperature must be positive"),
        (
            lambda t: [
                t["classifier.head.bias"].fill_(3e38),
                t["classifier.temperature"].fill_(0.1),
            ],
            "answer of the classifier",
        ),
        (lambda t: t["encoder.disease.weight"].fill_(3e38), "answer of the encoder"),
        (lambda t: t["generator.const"].fill_(3e38), "answer of the generator"),
        (lambda t: t["discriminator.hidden.weight"].fill_(3e38), "answer of the discriminator"),
        (
            lambda t: t.update({"buffers.mean_image": torch.ones(1, 1, 8, 8)}),
            "mean_image has shape",
        ),
        (lambda t: t["buffers.mean_image"].fill_(float("inf")), "not numbers"),
    ],
)
def test_tensors_that_do_not_fit_or_answer_are_refused(model_file, tmp_path, spoil, reason):
    tensors, info = checkpoints.load(model_file)
    spoil(tensors)
    checkpoints.save(tmp_path / "m", tensors, info)
    with pytest.raises(CxrError, match=reason) as caught:
        checkpoints.load_model(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_a_newer_format_says_to_install_a_newer_cxrgan(model_file, tmp_path):
    tensors, info = checkpoints.load(model_file)
    for number, remedy in ((2, "install a newer cxrgan"), (0, "train the model again")):
        checkpoints.save(tmp_path / "m", tensors, {**info, "format": number})
        with pytest.raises(CxrError, match=f"format {number}.*{remedy}"):
            checkpoints.load_model(tmp_path / "m")


@pytest.mark.parametrize("text", ["null", "5", "[]", '"configs"', "", "{", "[" * 10**5, "1" * 5000])
def test_metadata_that_are_no_dictionary_are_refused_in_one_line(tmp_path, text):
    save_file({"a": torch.ones(1)}, tmp_path / "m", {"cxrgan": text})
    with pytest.raises(CxrError) as caught:
        checkpoints.load_model(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_loading_a_model_draws_no_random_number(model_file):
    before = torch.get_rng_state()
    checkpoints.load_model(model_file)
    assert torch.equal(before, torch.get_rng_state())


def test_a_classifier_without_a_gradient_is_refused(tmp_path):
    (tmp_path / "helper.py").write_text("GAIN = 2.0\n")
    (tmp_path / "own.py").write_text("""
import torch
import helper
class Own(torch.nn.Module):
    def forward(self, x):
        return helper.GAIN * x.mean((1, 2, 3))
class Detached(Own):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)
""")
    assert checkpoints.load_classifier(f"{tmp_path / 'own.py'}:Own", 32).classifier is not None
    with pytest.raises(CxrError, match="has no gradient"):
        checkpoints.load_classifier(f"{tmp_path / 'own.py'}:Detached", 32)


def test_training_may_start_from_a_models_weights(model, model_file, classifier_file):
    fresh = {
        "generator": Generator(PRESETS["tiny"].generator),
        "discriminator": Discriminator(PRESETS["tiny"].discriminator),
    }
    with pytest.raises(CxrError, match="--start .*holds no discriminator, generator;"):
        checkpoints.start_from(classifier_file, fresh)
    checkpoints.start_from(model_file, fresh)
    for name, network in fresh.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, model.networks[name].state_dict()[key])


def test_a_shipped_models_discriminator_lies_beside_it(model, tmp_path):
    fresh = {"discriminator": Discriminator(PRESETS["tiny"].discriminator)}
    parts = {name: net for name, net in model.networks.items() if name != "discriminator"}
    path = tmp_path / "lungs-32.safetensors"
    checkpoints.Model(parts, model.info).save(path)
    with pytest.raises(CxrError, match="holds no discriminator; give a model file"):
        checkpoints.start_from(path, fresh)
    (tmp_path / "discriminators").mkdir()
    alone = {"discriminator": model.discriminator}
    checkpoints.Model(alone, model.info).save(tmp_path / "discriminators" / path.name, half=True)
    checkpoints.start_from(path, fresh)
    full = checkpoints.with_discriminator(checkpoints.load_model(path))
    assert full.networks.keys() == model.networks.keys()
    weight = model.discriminator.hidden.weight
    torch.testing.assert_close(fresh["discriminator"].hidden.weight, weight, rtol=1e-3, atol=1e-3)


def test_training_may_start_from_the_pneumonia_model_that_ships():
    preset = PRESETS["cxr128"]
    fresh = {
        "generator": Generator(preset.generator),
        "encoder": Encoder(preset.encoder),
        "discriminator": Discriminator(preset.discriminator),
    }
    before = {name: next(net.parameters()).clone() for name, net in fresh.items()}
    checkpoints.start_from("pneumonia", fresh)
    for name, network in fresh.items():
        assert not torch.equal(before[name], next(network.parameters())), name


def test_weights_of_another_size_are_no_start(model_file):
    other = {"classifier": Classifier(PRESETS["cxr64"].classifier)}
    with pytest.raises(CxrError, match="its classifier is of another kind"):
        checkpoints.start_from(model_file, other)


@pytest.fixture(scope="module")
def grown():
    """Networks of cxr64, and those of cxr128 that begin with their weights, by kind."""
    torch.manual_seed(0)
    small, large = PRESETS["cxr64"], PRESETS["cxr128"]
    pairs = {
        kind: (network(getattr(small, kind)).eval(), network(getattr(large, kind)).eval())
        for kind, network in (
            ("classifier", Classifier),
            ("encoder", Encoder),
            ("generator", Generator),
            ("discriminator", Discriminator),
        )
    }
    for old, new in pairs.values():
        assert outgrows(new.config, old.config) and not outgrows(old.config, new.config)
        grow(new, old)
    return pairs


def test_a_grown_generator_begins_with_the_smaller_image_enlarged(grown):
    old, new = grown["generator"]
    z1, z2, noise = torch.randn(2, 128), torch.randn(2, 16), new.noise(2)
    w1 = new.M1(z1)
    image = old(w1[:, :-1], z2, noise[:-1]) - old.image_bias
    torch.testing.assert_close(new(w1, z2, noise), ops.fir(image, up=2) + new.image_bias)
    new(w1, z2, noise).square().sum().backward()
    assert new.layers[-1].image_weight.grad.abs().max() > 0  # and may draw more


def test_grown_classifier_and_encoder_answer_nearly_as_the_smaller_ones(grown):
    coarse = torch.nn.functional.interpolate(torch.randn(16, 1, 8, 8), size=64, mode="bicubic")
    fine = ops.fir(coarse, up=2)
    for kind in ("classifier", "encoder"):
        old, new = grown[kind]
        old, new = (net.features if kind == "classifier" else net for net in (old, new))
        before, after = old(coarse), new(fine)
        if kind == "encoder":
            torch.testing.assert_close(after[0][:, -1], after[0][:, -2])
            before, after = before[0], after[0][:, :-1]
        apart = (after - before).std() / (before - before.mean(0)).std()
        assert apart < 0.5, kind


def test_what_grows_is_counted_from_the_coarsest_stage(grown):
    old, new = grown["discriminator"]
    assert torch.equal(new.blocks[1].conv0.raw, old.blocks[0].conv0.raw)
    assert torch.equal(new.blocks[-1].conv1.raw, old.blocks[-1].conv1.raw)
    assert torch.equal(new.score.weight, old.score.weight)
    assert not outgrows(PRESETS["cxr128"].discriminator, PRESETS["cxr32"].discriminator)
    assert not outgrows(PRESETS["cxr128"].encoder, PRESETS["tiny"].encoder)
