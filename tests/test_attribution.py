import pytest
import torch
from torch import nn

from cxr import CxrError, attribution

R = 16


class Formula(nn.Module):
    """A classifier given by its formula, from [N, R * R] to [N]."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, x):
        return self.formula(x.flatten(1))


class SmallCNN(nn.Module):
    """Two convolutions, batch norm, an in-place ReLU, and a last convolution of one pixel."""

    def __init__(self, activation=nn.GELU):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.inplace = nn.ReLU(inplace=True)
        self.activation = activation()
        self.pooled = nn.Conv2d(8, 1, R // 4)

    def forward(self, x):
        x = self.activation(self.norm(self.first(x)))
        return self.pooled(self.inplace(self.second(x))).flatten()


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    return SmallCNN().eval()


@pytest.fixture
def x():
    return torch.rand(3, 1, R, R, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def baseline():
    return torch.rand(3, 1, R, R, generator=torch.Generator().manual_seed(2)) * 2 - 1


def curved_path(start, end):
    """From [1, R, R] to [1, R, R], bent and with a kink, as a leaky ReLU generator's is."""
    bend = torch.rand(start.shape, generator=torch.Generator().manual_seed(3))

    def path(t):
        t = t.view(-1, 1, 1, 1)
        return start + t**2 * (end - start) + torch.relu(t * (1 - t) - 0.1) * bend

    return path


def test_gradient_of_a_linear_classifier_is_its_weight(x):
    weight = torch.randn(R * R)
    maps = attribution.gradient(Formula(lambda v: v @ weight - 3), x)
    assert maps.shape == (3, R, R) and maps.dtype == torch.float32
    torch.testing.assert_close(maps, weight.view(1, R, R).expand(3, R, R))


def test_gradient_of_a_quadratic_classifier_is_signed_and_per_image(x):
    maps = attribution.gradient(Formula(lambda v: v.square().sum(1)), x)
    torch.testing.assert_close(maps, 2 * x[:, 0])


def test_integrated_gradients_of_a_quadratic_classifier_are_exact(x, baseline):
    square = Formula(lambda v: v.square().sum(1))
    maps, errors = attribution.integrated_gradients(square, x, baseline, steps=2)
    torch.testing.assert_close(maps, (x**2 - baseline**2)[:, 0], rtol=1e-4, atol=1e-5)
    assert errors.shape == (3,) and errors.max() < 1e-4


def test_one_baseline_serves_all_images(cnn, x, baseline):
    maps, _ = attribution.integrated_gradients(cnn, x, baseline[:1])
    repeated, _ = attribution.integrated_gradients(cnn, x, baseline[:1].repeat(3, 1, 1, 1))
    torch.testing.assert_close(maps, repeated)


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_integrated_gradients_are_complete_on_a_cnn(activation, x, baseline):
    torch.manual_seed(0)
    cnn = SmallCNN(activation).eval()
    maps, errors = attribution.integrated_gradients(cnn, x, baseline, steps=4)
    change = (cnn(x) - cnn(baseline)).detach()
    gap = (maps.sum((1, 2)) - change).abs()
    assert errors.max() < 0.01
    torch.testing.assert_close(errors, gap / change.abs().clamp(min=attribution.FLOOR))


def test_integrated_gradients_double_their_steps_only_where_needed(x, baseline):
    curved = torch.tensor([3.0, 0.0]).view(2, 1, 1, 1)  # the first image is above 2, the second not
    nodes = []

    def formula(v):
        if v.requires_grad:
            nodes.extend((v[:, 0] > 2).tolist())
        return torch.where(v[:, 0] > 2, torch.sin(9 * v).sum(1), v.sum(1))

    classifier = Formula(formula)
    _, errors = attribution.integrated_gradients(
        classifier, x[:2] / 2 + curved, baseline[:2] / 2 + curved, steps=2
    )
    assert errors.max() < 0.01
    assert nodes.count(False) == 3 and nodes.count(True) > 3
    assert nodes.count(True) in {2**k + 1 for k in range(2, 11)}  # no node is asked twice


def test_integrated_gradients_report_the_error_of_too_few_steps(x, baseline):
    wavy = Formula(lambda v: torch.sin(9 * v).sum(1))
    maps, errors = attribution.integrated_gradients(wavy, x, baseline, steps=2, max_steps=2)
    change = wavy(x) - wavy(baseline)
    gap = (maps.sum((1, 2)) - change).abs()
    assert errors.min() > 0.01
    torch.testing.assert_close(errors, gap / change.abs().clamp(min=attribution.FLOOR))


def test_latent_gradients_of_a_quadratic_classifier_are_exact_on_any_path(x):
    square = Formula(lambda v: v.square().sum(1))
    heat, error, steps = attribution.latent_integrated_gradients(square, curved_path(x[0], x[1]))
    torch.testing.assert_close(heat, (x[1] ** 2 - x[0] ** 2)[0], rtol=1e-4, atol=1e-4)
    assert error < 1e-4 and steps == 16


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_latent_gradients_are_complete_on_a_cnn(activation, x):
    torch.manual_seed(0)
    cnn = SmallCNN(activation).eval()
    heat, error, _ = attribution.latent_integrated_gradients(cnn, curved_path(x[0], x[1]))
    start, end = cnn(x[:2]).tolist()
    assert heat.shape == (R, R) and heat.dtype == torch.float32
    assert error < 0.01
    assert abs(heat.sum().item() - (end - start)) <= 0.01 * max(abs(end - start), 0.1)


def test_latent_gradients_refine_their_grid_until_complete(x):
    wavy = Formula(lambda v: torch.sin(40 * v[:, :3]).sum(1) + 5 * v[:, 3])
    path = curved_path(x[0], x[1])
    _, coarse, few = attribution.latent_integrated_gradients(wavy, path, 1e-6, max_steps=32)
    _, fine, many = attribution.latent_integrated_gradients(wavy, path, coarse / 100)
    assert few == 32 and coarse > 1e-3
    assert many > 32 and fine < coarse / 100


def test_latent_gradients_report_an_error_that_stays(x):
    wavy = Formula(lambda v: torch.sin(40 * v).sum(1))
    path = curved_path(x[0], x[1])
    heat, error, steps = attribution.latent_integrated_gradients(wavy, path, max_steps=3)
    change = (wavy(x[1:2]) - wavy(x[:1])).item()
    assert steps == 3 and error > 0.01
    assert error == pytest.approx(abs(heat.sum().item() - change) / abs(change), rel=1e-3)


def test_a_path_that_leads_nowhere_has_no_attribution_and_no_error(cnn, x):
    heat, error, _ = attribution.latent_integrated_gradients(
        cnn, lambda t: x[:1].repeat(len(t), 1, 1, 1)
    )
    assert error == 0 and not heat.any()


def test_memory_bounded_chunks_do_not_change_the_maps(cnn, x, baseline, monkeypatch):
    path = curved_path(x[0], x[1])
    whole = attribution.integrated_gradients(cnn, x, baseline)[0]
    along = attribution.latent_integrated_gradients(cnn, path)[0]
    monkeypatch.setattr(attribution, "PIXELS_AT_ONCE", 5 * R * R)
    largest = []
    cnn.register_forward_pre_hook(lambda module, inputs: largest.append(len(inputs[0])))
    parts = attribution.integrated_gradients(cnn, x, baseline)[0]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        attribution.latent_integrated_gradients(cnn, path)[0], along, rtol=1e-4, atol=1e-6
    )
    assert max(largest) == 5


def test_grad_cam_of_pooled_convolutions_is_their_weighted_sum(x):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 1),
        nn.Flatten(0),
    ).eval()
    maps = attribution.grad_cam(net, x)
    pixels = (R // 2) ** 2
    cam = torch.einsum("c,nchw->nhw", net[3].weight[0] / pixels, net[0](x)).relu().detach()
    expected = nn.functional.interpolate(cam[:, None], (R, R), mode="bilinear")[:, 0]
    assert maps.shape == (3, R, R) and maps.min() >= 0 and maps.max() > 0
    torch.testing.assert_close(maps, expected)


def test_grad_cam_takes_the_last_convolution_with_more_than_one_pixel(cnn, x):
    assert attribution.last_convolution(cnn, x) is cnn.second
    torch.testing.assert_close(
        attribution.grad_cam(cnn, x), attribution.grad_cam(cnn, x, layer=cnn.second)
    )


def test_grad_cam_sees_the_layer_before_an_in_place_activation(cnn, x):
    maps = attribution.grad_cam(cnn, x)
    cnn.inplace = nn.ReLU(inplace=False)
    torch.testing.assert_close(maps, attribution.grad_cam(cnn, x))


def test_grad_cam_without_a_convolution_says_so(x):
    with pytest.raises(CxrError, match="no convolution"):
        attribution.grad_cam(Formula(lambda v: v.sum(1)), x)


def test_a_convolution_that_only_begins_a_transformer_has_no_grad_cam(x):
    patches = nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.Flatten(2))
    mixers = [nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)) for _ in range(2)]
    net = nn.Sequential(patches, *mixers, nn.Flatten(), nn.Linear(256, 1), nn.Flatten(0))
    with pytest.raises(CxrError, match="the last convolution is layer 1 of 6"):
        attribution.grad_cam(net, torch.zeros(1, 1, 32, 32))


def test_grad_cam_of_a_layer_that_does_not_matter_says_so(cnn, x):
    cnn.unused = nn.Conv2d(1, 1, 3)
    with pytest.raises(CxrError, match="does not depend"):
        attribution.grad_cam(cnn, x, layer=cnn.unused)


@pytest.mark.parametrize("shape", [(3, 1), ()])
def test_a_logit_of_the_wrong_shape_is_named(shape, x):
    wrong = Formula(lambda v: v.sum(1).view(3, 1) if shape else v.sum())
    with pytest.raises(CxrError, match="one logit per image"):
        attribution.gradient(wrong, x)


def test_a_classifier_that_hides_its_gradient_is_named(x):
    with pytest.raises(CxrError, match="no gradient"):
        attribution.gradient(Formula(lambda v: v.sum(1).detach()), x)


def every_method(classifier, x):
    attribution.gradient(classifier, x)
    attribution.grad_cam(classifier, x)
    attribution.integrated_gradients(classifier, x, torch.zeros_like(x), steps=2, max_steps=2)
    path = curved_path(x[0], x[1])
    attribution.latent_integrated_gradients(classifier, path, max_steps=2)


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("frozen", [True, False])
def test_the_classifier_is_left_as_it_was(frozen, cnn, x):
    cnn.requires_grad_(not frozen)
    before = {name: value.clone() for name, value in cnn.state_dict().items()}
    with torch.no_grad():  # callers often hold one
        every_method(cnn, x)
    assert hooks(cnn) == 0
    assert not any(module.training for module in cnn.modules())
    assert all(p.grad is None and p.requires_grad is not frozen for p in cnn.parameters())
    assert x.grad is None and not x.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())


@pytest.mark.parametrize("layer", ["default", "given"])
def test_hooks_go_when_the_classifier_fails(layer, cnn, x):
    cnn.pooled = nn.Conv2d(5, 1, 1)  # does not fit what comes before it
    with pytest.raises(RuntimeError):
        attribution.grad_cam(cnn, x, layer=cnn.second if layer == "given" else None)
    assert hooks(cnn) == 0


def test_maps_of_a_batch_are_those_of_its_images(cnn, x, baseline):
    def maps(x, b):
        integrated = attribution.integrated_gradients(cnn, x, b)[0]
        return torch.stack([attribution.gradient(cnn, x), attribution.grad_cam(cnn, x), integrated])

    alone = [maps(x[i : i + 1], baseline[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(maps(x, baseline), torch.cat(alone, 1), rtol=1e-4, atol=1e-6)


def test_captum_finds_the_same_gradient(cnn, x):
    captum = pytest.importorskip("captum.attr")
    theirs = captum.Saliency(cnn).attribute(x.requires_grad_(), abs=False)[:, 0]
    torch.testing.assert_close(attribution.gradient(cnn, x), theirs, rtol=1e-5, atol=1e-7)


def test_captum_finds_the_same_grad_cam(cnn, x):
    captum = pytest.importorskip("captum.attr")
    coarse = captum.LayerGradCam(cnn, cnn.second).attribute(x.clone(), relu_attributions=True)
    theirs = captum.LayerAttribution.interpolate(coarse, (R, R), "bilinear")[:, 0].detach()
    assert theirs.max() > 0
    torch.testing.assert_close(attribution.grad_cam(cnn, x), theirs, rtol=1e-5, atol=1e-7)


def test_captum_finds_the_same_integrated_gradients(cnn, x, baseline):
    captum = pytest.importorskip("captum.attr")
    theirs = captum.IntegratedGradients(cnn).attribute(
        x, baseline, n_steps=512, method="gausslegendre"
    )[:, 0]
    ours, _ = attribution.integrated_gradients(cnn, x, baseline, tolerance=0, max_steps=512)
    assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()


def test_smoothing_keeps_the_sum_and_a_constant():
    heat = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    blurred = attribution.smooth(heat, 1.5)
    assert blurred.sum().item() == pytest.approx(heat.sum().item(), abs=1e-4)
    assert blurred.std() < heat.std() / 2
    torch.testing.assert_close(attribution.smooth(torch.ones(16, 16), 1.5), torch.ones(16, 16))
    torch.testing.assert_close(attribution.smooth(heat.T, 1.5), blurred.T)


def test_magnitude_counts_a_place_where_signs_alternate():
    heat = torch.zeros(32, 32)
    heat[8:12, 8:12] = torch.tensor([1.0, -1.0]).repeat(4, 2)
    found = attribution.magnitude(heat)
    assert found.min() >= 0 and found.sum().item() == pytest.approx(16, rel=1e-4)
    row, column = divmod(found.argmax().item(), 32)
    assert 8 <= row < 12 and 8 <= column < 12
    assert attribution.smooth(heat, 1.0).abs().max() < 0.5 * found.max()
    torch.testing.assert_close(attribution.magnitude(-heat), found)


@pytest.mark.parametrize("steps", [2, 8, 32])
def test_clenshaw_curtis_is_exact_for_polynomials(steps):
    t, weights = attribution._bent(steps), attribution._clenshaw_curtis(steps)
    for power in range(min(steps, 9) + 1):
        assert (weights * t**power).sum().item() == pytest.approx(1 / (power + 1), abs=1e-12)
    assert torch.equal(attribution._bent(2 * steps)[::2], t)  # a finer grid holds the coarser one
