import dataclasses

import pytest
import torch

from cxr import augment

NOTHING = augment.Ranges(*[0.0] * len(dataclasses.fields(augment.Ranges)))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(n=3, size=32):
    x = torch.randn(n, 1, 4, 4, generator=rng())
    return torch.nn.functional.interpolate(x, size, mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize(("p", "ranges"), [(0.0, augment.CLASSIFIER), (1.0, NOTHING)])
def test_nothing_changes_without_probability_or_range(p, ranges):
    x = smooth()
    torch.testing.assert_close(
        augment.apply(x, augment.draw(3, p, rng(), ranges)), x, atol=1e-3, rtol=0
    )


def test_same_changes_give_the_same_images_and_a_share_of_them_its_rows():
    x, changes = smooth(4), augment.draw(4, 1.0, rng(), augment.CLASSIFIER)
    whole = augment.apply(x, changes)
    half = augment.apply(x[2:], {name: values[2:] for name, values in changes.items()})
    assert torch.equal(whole, augment.apply(x, changes))
    torch.testing.assert_close(whole[2:], half)


def test_probability_is_the_share_of_images_changed():
    changes = augment.draw(4000, 0.3, rng(), augment.DISCRIMINATOR)
    for name in ("rotate", "gamma", "blur", "noise", "shift_x"):
        assert (changes[name] != 0).float().mean().item() == pytest.approx(0.3, abs=0.03), name


def test_gradient_reaches_the_image():
    x = (0.8 * smooth(2)).requires_grad_()
    y = augment.apply(x, augment.draw(2, 1.0, rng(1), augment.DISCRIMINATOR))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all() and (gradient > 0).float().mean() > 0.7


def test_shift_moves_to_the_named_side_and_scale_enlarges():
    x, zero = torch.full((1, 1, 33, 33), -1.0), torch.zeros(1)
    x[..., 16, 16] = 1
    moved = augment.move(x, zero, zero, zero, torch.tensor([4 / 33]), zero)
    assert divmod(moved.argmax().item(), 33) == (16, 12)
    disc = ((torch.arange(33) - 16)[:, None] ** 2 + (torch.arange(33) - 16) ** 2 < 36)[None, None]
    disc = disc.float() * 2 - 1
    larger = augment.move(disc, zero, torch.tensor([0.5]), zero, zero, zero)
    assert (larger > 0).sum() > 2 * (disc > 0).sum()


def test_erased_boxes_stay_within_their_largest_side():
    changes = augment.draw(200, 1.0, rng(), augment.CLASSIFIER)
    boxes = augment._boxes(changes["erase"], 64)
    assert 0 < boxes.flatten(1).sum(1).max() <= (0.36 * 64) ** 2
    assert (boxes.flatten(1).sum(1) > 0).float().mean() > 0.8


def test_shade_keeps_the_order_of_greys():
    ramp = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    y = augment.shade(ramp, torch.tensor([0.1]), torch.tensor([0.3]), torch.tensor([-0.4]))
    assert (y.flatten().diff() > 0).all()
