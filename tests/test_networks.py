import math

import pytest
import torch

from cxr.networks import PRESETS, Classifier, Discriminator, Encoder, Generator


@pytest.fixture(params=["tiny", "cxr64"])
def preset(request):
    torch.manual_seed(0)
    return PRESETS[request.param]


def test_networks_take_and_return_the_shapes_they_promise(preset):
    g, e, d = (
        Generator(preset.generator),
        Encoder(preset.encoder),
        Discriminator(preset.discriminator),
    )
    w1 = g.M1(torch.randn(4, preset.generator.z1))
    x = g(w1, torch.randn(4, preset.generator.z2), g.noise(4))
    assert x.shape == (4, 1, preset.size, preset.size)
    w1, z2 = e(x)
    assert w1.shape == (4, len(g.layers), preset.generator.w)
    assert z2.shape == (4, preset.generator.z2)
    assert g(w1, z2, g.noise(4)).shape == x.shape
    assert d(x, torch.zeros(4)).shape == (4,)
    assert Classifier(preset.classifier)(x).shape == (4,)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_named_after_their_size(name):
    preset = PRESETS[name]
    assert preset.size == 4 * 2 ** (len(preset.generator.channels) - 1)
    assert name in ("tiny", f"cxr{preset.size}")
    with torch.device("meta"):
        encoder, generator = Encoder(preset.encoder), Generator(preset.generator)
    assert encoder.config.layers == len(generator.layers)
    assert preset.size == 4 * 2 ** len(preset.encoder.channels)


def test_disease_mapping_is_zero_at_zero_and_homogeneous(preset):
    g = Generator(preset.generator).double()
    z2 = torch.randn(3, preset.generator.z2, dtype=torch.double)
    assert torch.equal(g.M2(0 * z2), torch.zeros(3, preset.generator.w, dtype=torch.double))
    torch.testing.assert_close(g.M2(0.3 * z2), 0.3 * g.M2(z2))


def test_a_zero_dose_leaves_no_trace_of_the_direction(preset):
    g = Generator(preset.generator)
    w1, noise = torch.randn(2, len(g.layers), preset.generator.w), g.noise(2)
    u = torch.randn(2, preset.generator.z2)
    torch.testing.assert_close(g(w1, 0 * u, noise), g(w1, torch.zeros_like(u), noise))
    assert (g(w1, u, noise) - g(w1, 0 * u, noise)).abs().max() > 1e-3


def test_generator_demodulates_to_unit_variance():
    """A layer's convolution is scaled so that its output's variance does not hang on the style."""
    torch.manual_seed(0)
    g = Generator(PRESETS["tiny"].generator)
    layer = g.layers[0]
    x, s = torch.randn(64, 32, 16, 16), torch.rand(64, 32) * 5 + 0.1
    weight = layer.conv.weight()
    d = (s.square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()
    y = torch.nn.functional.conv2d(x * s[:, :, None, None], weight, padding=1) * d[..., None, None]
    assert y[:, :, 1:-1, 1:-1].std().item() == pytest.approx(1, abs=0.05)


def test_noise_is_the_generators_own_and_repeats_for_a_seed(preset):
    g = Generator(preset.generator)
    a, b = (g.noise(2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert a[-1].shape == (2, 1, preset.size, preset.size)


def test_discriminator_answers_differently_for_another_dose(preset):
    d = Discriminator(preset.discriminator)
    x = torch.randn(4, 1, preset.size, preset.size)
    assert (d(x, torch.zeros(4)) - d(x, torch.ones(4))).abs().max() > 1e-3


def test_discriminator_gives_a_batch_cut_between_groups_the_same_answer(preset):
    d = Discriminator(preset.discriminator)
    x, dose = torch.randn(8, 1, preset.size, preset.size), torch.rand(8)
    whole, halves = d(x, dose), torch.cat([d(x[:4], dose[:4]), d(x[4:], dose[4:])])
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-4)


def test_classifier_ignores_exposure_and_gain(preset):
    torch.manual_seed(1)
    c = Classifier(preset.classifier).eval()
    x = torch.rand(3, 1, 64, 64) * 2 - 1
    torch.testing.assert_close(c(x), c(0.7 * x - 0.2), atol=0.02, rtol=0.05)
    assert (c(x) - c(-x)).abs().max() > 1e-3  # but not the picture


def test_classifier_divides_its_logit_by_the_temperature(preset):
    c = Classifier(preset.classifier).eval()
    x = torch.randn(2, 1, 32, 32)
    before = c(x)
    c.temperature.fill_(4)
    torch.testing.assert_close(c(x), before / 4)


def test_encoder_gives_a_dose_between_zero_and_one(preset):
    _, z2 = Encoder(preset.encoder)(torch.randn(8, 1, preset.size, preset.size))
    assert (z2.norm(dim=1) > 0).all() and (z2.norm(dim=1) < 1).all()


def test_equalised_layers_start_with_unit_gain():
    torch.manual_seed(0)
    g = Generator(PRESETS["cxr64"].generator)
    w = g.M1(torch.randn(256, 128))
    assert 0.3 < w.square().mean().sqrt().item() < 3
    assert math.isclose(
        g.layers[0].conv.weight().std().item() * math.sqrt(256 * 9), 1, rel_tol=0.05
    )


def test_layers_above_32_pixels_get_no_noise():
    torch.manual_seed(0)
    noise = Generator(PRESETS["cxr128"].generator).noise(2)
    assert [eps.shape[-1] for eps in noise] == [4, 8, 16, 32, 64, 128]
    assert all(eps.std() > 0.5 for eps in noise[:-2])
    assert not noise[-2].any() and not noise[-1].any()


def test_structures_fitted_are_the_gaussian_of_those_given():
    torch.manual_seed(0)
    g = Generator(PRESETS["tiny"].generator)
    few = torch.randn(8, g.config.layers * g.config.w)  # fewer directions than `z1` has
    given = (3 + torch.randn(4096, 8) @ few).unflatten(1, (g.config.layers, g.config.w))
    g.structure.fit(given)
    drawn = g.M1(torch.randn(4096, g.config.z1)).flatten(1)
    torch.testing.assert_close(drawn.mean(0), given.flatten(1).mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), given.flatten(1).T.cov(), atol=1.5, rtol=0)
    assert drawn.T.cov().abs().max() > 10
    g.structure.fit(given * torch.nan)
    assert g.M1(torch.randn(2, g.config.z1)).isfinite().all()


@pytest.mark.parametrize("name, size", [("cxr32", 8), ("cxr64", 16), ("cxr128", 16)])
def test_a_detail_has_16_pixels_at_most_and_moves_only_what_is_near(name, size):
    generator = Generator(PRESETS[name].generator)
    w1, noise = generator.M1(torch.randn(1, generator.config.z1)), generator.noise(1)
    detail, z2 = generator.detail(1), torch.zeros(1, generator.config.z2)
    assert detail.shape[2:] == (size, size)
    plain = generator(w1, z2, noise)
    assert torch.equal(generator(w1, z2, noise, detail), plain)
    detail[:, :, 0, 0] = 1
    moved = generator(w1, z2, noise, detail) != plain
    assert moved[..., :4, :4].any() and not moved[..., moved.shape[-1] // 2 :, :].any()
