import pytest
import torch

from cxr import overlay

SIZE = 32


class Patch(torch.nn.Module):
    """A classifier that looks at one place alone: the mean grey of a square."""

    def forward(self, x):
        return 10 * x[..., 8:14, 18:24].mean((1, 2, 3))


class Brittle(Patch):
    """Answers elsewhere, too, but to an even grey alone: a little noise undoes it."""

    def forward(self, x):
        unevenness = x[..., 20:28, 4:12].flatten(1).var(1)
        return super().forward(x) - 3 * torch.exp(-unevenness / 0.003)


@pytest.fixture
def image():
    return torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) - 0.2


def lay_over(image, along, own, classifier, region=1.0):
    """The overlay on one image, with the logit that its caller knows."""
    logit = classifier(image)
    return overlay.lay_over(image, [along], [own], classifier, logit, [region])[0]


def path(doses):
    """Everything grows brighter with the dose."""
    return (doses - 0.5).view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE)


@pytest.mark.parametrize("own", [0.0, 0.7])
def test_an_image_is_itself_at_its_own_dose_and_generated_at_the_other_end(image, own):
    laid = overlay.Overlay(image, path, own)
    other = 0.0 if own else 1.0
    frames = laid(torch.tensor([own, other]))
    torch.testing.assert_close(frames[:1], image)
    torch.testing.assert_close(frames[1:], path(torch.tensor([other])))


def test_beyond_its_own_dose_an_image_keeps_what_the_generator_cannot_draw(image):
    doses = torch.tensor([0.8, 1.0])
    expected = image + path(doses) - path(torch.tensor([0.7]))
    torch.testing.assert_close(overlay.Overlay(image, path, 0.7)(doses), expected.clamp(-1, 1))


def test_the_mask_keeps_to_what_the_classifier_looks_at(image):
    classifier = Patch()
    laid = lay_over(image, path, 0.7, classifier)
    inside = laid.mask[0, 0, 9:13, 19:23].mean()
    away = laid.mask[0, 0, :, :12].max()
    assert inside > 0.9 and away < 0.1
    end = laid(torch.tensor([0.0]))
    whole = path(torch.tensor([0.0]))
    assert classifier(end).item() == pytest.approx(classifier(whole).item(), rel=0.1)
    assert (end - image).abs().sum() < 0.15 * (whole - image).abs().sum()


def test_an_undrawn_lesion_goes_with_the_disease(image):
    """The generator's own path ends healthy everywhere, but never drew the lesion."""
    lesion = image.clone()
    lesion[..., 8:14, 18:24] += 0.8
    laid = lay_over(lesion, path, 0.7, Patch())(torch.tensor([0.0]))
    assert Patch()(laid).item() < 0


def test_the_mask_does_not_rely_on_what_a_little_noise_undoes(image, monkeypatch):
    mask = lay_over(image, path, 0.7, Brittle()).mask[0, 0]
    assert mask[9:13, 19:23].mean() > 0.9
    assert mask[22:26, 6:10].mean() < 0.5
    monkeypatch.setattr(overlay, "NOISE", 0.0)
    assert lay_over(image, path, 0.7, Brittle()).mask[0, 0, 22:26, 6:10].mean() > 0.9


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_mask_does_not_depend_on_the_scale_of_the_logits(image, scale):
    class Scaled(Patch):
        def forward(self, x):
            return scale * super().forward(x)

    masks = [lay_over(image, path, 0.7, of).mask for of in (Patch(), Scaled())]
    torch.testing.assert_close(*masks, atol=0.02, rtol=0)


def test_each_of_several_images_gets_the_overlay_that_it_gets_alone(image):
    images = torch.cat([image, image.flip(3), image.square()])
    own, region = [0.7, 0.4, 0.9], torch.ones_like(image)
    region[..., :12] = 0
    regions = [1.0, 1.0, region]
    logits = Patch()(images)
    together = overlay.lay_over(images, [path] * 3, own, Patch(), logits, regions)
    for i, found in enumerate(together):
        alone = lay_over(images[i : i + 1], path, own[i], Patch(), regions[i])
        assert found.own == alone.own and torch.equal(found.image, alone.image)
        torch.testing.assert_close(found.mask, alone.mask, atol=1e-3, rtol=0)


def test_nothing_to_change_is_no_error(image):
    mask = overlay.needed(image, image, Patch(), Patch()(image))
    assert torch.isfinite(mask).all()


def test_an_overlay_changes_nothing_outside_its_region(image):
    region = torch.zeros(1, 1, SIZE, SIZE)
    region[..., 4:20, 10:30] = 1
    laid = lay_over(image, path, 0.8, Patch(), region)
    outside = region == 0
    assert torch.equal(laid(torch.tensor([0.0]))[outside], image[outside])
    assert laid.mask[..., 8:14, 18:24].mean() > 0.9  # what the classifier looks at does change
