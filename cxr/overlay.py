"""The overlay: the original image, changed along the path only where the classifier needs it.

The generator cannot draw everything in an image. If the path's difference were added to the image,
a lesion that the generator did not draw would stay there. Instead, the image is turned into what
the generator draws of the other class, but only inside a soft mask. Gradient descent finds the mask
with the least change to which the classifier answers as it does to the whole change (after the
preservation game of Fong & Vedaldi 2017, section 4, here between an image and its counterfactual).
The answer has to be the same under noise. A change that a little noise undoes is an adversarial
pattern and does not convince another classifier.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr.device import rng

CELLS = 16  # of the mask along each side: a coarse mask makes no adversarial pattern
STEPS = 60  # of the gradient descent
AT_ONCE = 10  # images that are only asked: no more memory than a question with a gradient needs
PRICE = 0.6  # weight of the share of the change, against the share of the response that is missing
NOISE = 0.1  # standard deviation; images are in [-1, 1]


@dataclass
class Overlay:
    """An image, changed along a path of doses inside a mask.

    At the image's own dose it is `image` itself. At the end of the other class it is
    `mask * generated + (1 - mask) * image`. Away from the other class, the path's difference,
    multiplied by the mask, is added to `image`.
    """

    image: Tensor  # [1, 1, R, R]
    along: Callable[[Tensor], Tensor]  # doses [N] to generated images [N, 1, R, R]
    own: float  # the image's dose; 0 if the classifier calls it healthy
    mask: Tensor | float = 1.0  # [1, 1, R, R]

    @property
    def other(self) -> float:
        """The dose at the path's end of the other class."""
        return 0.0 if self.own else 1.0

    @cached_property
    def drawn(self) -> Tensor:
        """The reconstruction [1, 1, R, R]: the image as the generator draws it."""
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
    region: Tensor | float = 1.0,
) -> Overlay:
    """The overlay on an image [1, 1, R, R], with the mask that the classifier needs. along, own: as
    in `Overlay`; logit: the classifier's logit [1] of the image; region: where the image may change,
    [1, 1, R, R] in [0, 1]."""
    whole = Overlay(image, along, own, region)
    with torch.no_grad():
        end = whole(torch.tensor([whole.other], device=image.device))
    return Overlay(image, along, own, region * needed(image, end, classifier, logit))


def needed(x: Tensor, y: Tensor, classifier: nn.Module, logit: Tensor) -> Tensor:
    """The mask [1, 1, R, R] in [0, 1] with the least change that is needed: where `x` [1, 1, R, R]
    has to become `y` so that the classifier answers as it answers to `y`. logit: the classifier's
    logit [1] of `x`."""
    noises = NOISE * torch.randn(STEPS, *x.shape, generator=rng(0)).to(x.device)
    with torch.no_grad():
        response = (classifier(y) - logit).abs().clamp_min(1e-6)
        answers = torch.cat([classifier(y + part[:, 0]) for part in noises.split(AT_ONCE)])
    whole = (y - x).abs().sum().clamp_min(1e-6)
    with torch.enable_grad():
        cells = torch.full((1, 1, CELLS, CELLS), 2.0, device=x.device).requires_grad_()
        optimiser = torch.optim.Adam([cells], 0.2)
        for noise, asked in zip(noises, answers):
            change = _mask(cells, x) * (y - x)
            lacking = (classifier(x + change + noise) - asked).abs() / response
            loss = lacking + PRICE * change.abs().sum() / whole
            optimiser.zero_grad()
            loss.sum().backward(inputs=[cells])
            optimiser.step()
        return _mask(cells, x).detach()


def _mask(cells: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(cells.sigmoid(), x.shape[2:], mode="bilinear", align_corners=False)
