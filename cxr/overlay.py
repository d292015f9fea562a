"""The path laid over the original, in as few places as the classifier needs.

The generator cannot draw all of an image. Added to the image, the path's difference leaves a lesion
that was not drawn where it is; so on the way to the other class the image is turned into what the
generator draws there, but only within a soft mask, found by gradient descent: the least change
that has the classifier answer as it answers to the whole (after the preservation game of Fong &
Vedaldi 2017, section 4, played between an image and its counterfactual). It has to answer so under
noise, too: what a little noise undoes is an adversarial pattern, and convinces no other classifier.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr.device import rng

CELLS = 16  # of the mask along each side: a coarse one is no adversarial pattern
STEPS = 60  # of its descent
PRICE = 0.6  # of the whole change, in units of the whole response
NOISE = 0.1  # its standard deviation, where images are in [-1, 1]


@dataclass
class Overlay:
    """An image changed along a path of doses where `mask` allows it.

    `image` itself at its own dose; towards the other class, `mask * generated + (1 - mask) * image`
    at the end; the other way, the path's difference is added to it, where `mask` allows it.
    """

    image: Tensor  # [1, 1, R, R]
    along: Callable[[Tensor], Tensor]  # doses [N] to generated images [N, 1, R, R]
    own: float  # the image's dose; 0 for one that is called healthy
    mask: Tensor | float = 1.0  # [1, 1, R, R]

    @property
    def other(self) -> float:
        """The dose at the other class's end of the path."""
        return 0.0 if self.own else 1.0

    @cached_property
    def drawn(self) -> Tensor:
        """What the generator draws of the image itself, [1, 1, R, R]."""
        return self.along(self.image.new_tensor([self.own]))

    def __call__(self, doses: Tensor) -> Tensor:
        """Images [N, 1, R, R] in [-1, 1] at doses [N]."""
        share = ((doses - self.own) / (self.other - self.own)).clamp(0, 1).view(-1, 1, 1, 1)
        change = self.along(doses) - self.drawn + share * (self.drawn - self.image)
        return (self.image + self.mask * change).clamp(-1, 1)


def lay_over(
    image: Tensor,
    along: Callable[[Tensor], Tensor],
    own: float,
    classifier: nn.Module,
    logit: Tensor,
) -> Overlay:
    """The path over an image [1, 1, R, R] with the mask that the classifier needs. logit: [1], the
    classifier's of the image."""
    whole = Overlay(image, along, own)
    with torch.no_grad():
        end = whole(torch.tensor([whole.other], device=image.device))
    return Overlay(image, along, own, needed(image, end, classifier, logit))


def needed(x: Tensor, y: Tensor, classifier: nn.Module, logit: Tensor) -> Tensor:
    """Where `x` [1, 1, R, R] has to become `y` for the classifier to answer as it answers to `y`:
    a mask [1, 1, R, R] in [0, 1] that changes as little as it can. logit: [1], the classifier's of
    `x`."""
    with torch.no_grad():
        response = (classifier(y) - logit).abs().clamp_min(1e-6)
    whole, random = (y - x).abs().sum().clamp_min(1e-6), rng(0)
    with torch.enable_grad():
        cells = torch.full((1, 1, CELLS, CELLS), 2.0, device=x.device).requires_grad_()
        optimiser = torch.optim.Adam([cells], 0.2)
        for _ in range(STEPS):
            noise = NOISE * torch.randn(x.shape, generator=random).to(x.device)
            with torch.no_grad():
                asked = classifier(y + noise)
            change = _mask(cells, x) * (y - x)
            lacking = (classifier(x + change + noise) - asked).abs() / response
            loss = lacking + PRICE * change.abs().sum() / whole
            optimiser.zero_grad()
            loss.sum().backward(inputs=[cells])
            optimiser.step()
        return _mask(cells, x).detach()


def _mask(cells: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(cells.sigmoid(), x.shape[2:], mode="bilinear", align_corners=False)
