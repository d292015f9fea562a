import pytest
import torch
from torch import nn

from cxr import checkpoints, explain, inversion
from cxr.inversion import Codes, Path, invert


class Brightness(nn.Module):
    def forward(self, x):
        return 40 * x.mean((1, 2, 3))


@pytest.fixture
def bright(model):
    networks = {**model.networks, "classifier": Brightness()}
    return checkpoints.Model(networks, dict(model.info), dict(model.buffers))


@pytest.fixture(params=[0.3, -0.3], ids=["diseased", "healthy"])
def x(request):
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return (request.param + 0.2 * noise).clamp(-1, 1)


def inverted(x, model, restarts=2, refine=3, seed=0):
    with torch.no_grad():
        asked = x, model.classifier(x), model.encoder(x), model
        return invert(*asked, restarts, refine, seed)[0]


def test_a_healthy_image_gets_a_direction_of_its_own_and_a_diseased_one_goes_by_its_disease(
    bright, x
):
    codes = inverted(x, bright).codes
    if x.mean() > 0:
        assert codes.direction is None
        torch.testing.assert_close(codes.u, nn.functional.normalize(codes.z2))
    else:
        assert codes.direction.shape == codes.z2.shape
        torch.testing.assert_close(codes.u, nn.functional.normalize(codes.direction))


def test_reconstructions_and_walks_are_what_the_codes_draw(bright, x):
    found = inverted(x, bright)
    codes = found.codes
    drawn = codes.draw(bright.generator, codes.z2).clamp(-1, 1)
    torch.testing.assert_close(found.reconstructions, drawn, atol=1e-5, rtol=0)
    for place, dose in enumerate(inversion.DOSES):
        drawn = codes.draw(bright.generator, dose * codes.u).clamp(-1, 1)
        torch.testing.assert_close(found.walks[:, place], drawn, atol=1e-5, rtol=0)


def test_without_steps_the_first_codes_are_the_encoders(bright, x):
    found = inverted(x, bright, restarts=1, refine=0)
    w1, z2 = bright.encoder(x)
    assert torch.equal(found.codes.w1, w1) and torch.equal(found.codes.z2, z2)
    assert not found.codes.detail.any()


def test_the_best_restart_lacks_the_least(bright, x):
    codes = inverted(x, bright, restarts=4, refine=2).codes
    start = bright.encoder(x)[0].expand_as(codes.w1)
    target = bright.classifier(x).clamp(*bright.info["logits"])
    lacking, _ = inversion.inversion_loss(x, target, codes, start, bright, inversion.DOSES)
    free = inversion.Config(away=0.0)  # the restarts began elsewhere, so leave that term out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion, "CONFIG", free)
        lacking, _ = inversion.inversion_loss(x, target, codes, start, bright, inversion.DOSES)
    assert lacking.argmin() == 0


def test_the_loss_of_several_doses_is_the_sum_of_each(bright, x):
    codes = inverted(x, bright).codes
    target, start = bright.classifier(x), codes.w1.clone()
    whole, drawn = inversion.inversion_loss(x, target, codes, start, bright, inversion.DOSES)
    each = [
        inversion.inversion_loss(x, target, codes, start, bright, (d,)) for d in inversion.DOSES
    ]
    torch.testing.assert_close(whole, sum(loss for loss, _ in each), atol=1e-4, rtol=1e-5)
    assert drawn.shape == (1 + len(inversion.DOSES), 2, 1, 32, 32)


def test_a_dose_beyond_one_is_shortened_to_one_and_others_are_kept():
    z2 = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(inversion.within(z2), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_a_path_draws_each_dose_once(bright, x):
    found, drawn = inverted(x, bright), []
    bright.generator.register_forward_hook(lambda *a: drawn.append(len(a[2])))
    path = Path(found, bright.generator)
    first = path(torch.tensor([0.0, 0.1, 0.1, 1.0]))
    again = path(torch.tensor([0.1, 0.0]))
    assert drawn == [1]  # 0 and 1 are known from the inversion
    assert torch.equal(again, first[[1, 0]])
    torch.testing.assert_close(first[:1], found.walks[:1, 0])


def test_several_images_codes_are_joined_under_the_first_ones_noise(bright, x):
    one, two = inverted(x, bright).codes.best, inverted(-x, bright).codes.best
    both = Codes.together([one, two])
    assert torch.equal(both.w1, torch.cat([one.w1, two.w1])) and both.noise is one.noise
    torch.testing.assert_close(both.u, torch.cat([one.u, two.u]))


def test_each_of_several_images_gets_the_codes_that_it_gets_alone(bright, x):
    sign = 1 if x.mean() > 0 else -1
    images = torch.cat([x, 0.8 * x + 0.1 * sign, x.flip(3)])
    with torch.no_grad():
        asked = images, bright.classifier(images), bright.encoder(images), bright
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inversion, "CONFIG", inversion.Config(tried=2))
            together = invert(*asked, restarts=2, refine=6, seed=0)
            alone = [inverted(one, bright, refine=6) for one in images.split(1)]
    for found, expected in zip(together, alone, strict=True):
        for a, b in zip(found.codes.free, expected.codes.free, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.walks, expected.walks, atol=1e-4, rtol=0)


class Precise(nn.Module):
    """Tells in which precision its convolution computed."""

    def __init__(self):
        super().__init__()
        self.conv, self.kinds = nn.Conv2d(1, 1, 1), []

    def forward(self, x):
        y = self.conv(x)
        self.kinds.append(y.dtype)
        return y.mean((1, 2, 3))


def test_a_cnn_of_ones_own_is_asked_in_bf16_where_it_pays_but_only_to_descend_by(model):
    precise = Precise()
    half = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    for facts, expected in (({}, torch.float32), ({"foreign": "own"}, half)):
        networks = {**model.networks, "classifier": precise}
        asked = checkpoints.Model(networks, model.info | facts, dict(model.buffers))
        logits = inversion.roughly(torch.rand(2, 1, 8, 8), asked)
        assert precise.kinds.pop() == expected and logits.dtype == torch.float32
    e = explain.explain_group([torch.rand(1, 1, 32, 32)], asked, frames=3, refine=1)[0]
    assert precise.kinds.count(torch.float32) > 3 and precise.kinds[0] == torch.float32
    assert e.logits.dtype == torch.float32
