"""The overlay: the original image, changed along the path only where the classifier needs it.

The generator cannot draw everything in an image. If the path's difference were added to the image,
a lesion that the generator did not draw would stay there. Instead, the image is turned into what
the generator draws of the other class, but only inside a soft mask. Gradient descent finds the mask
with the least change to which the classifier answers as it does to the whole change (after the
preservation game of Fong & Vedaldi 2017, section 4, here between an image and its counterfactual).
The answer has to be the same under noise. A change that a little noise undoes is an adversarial
pattern and does not convince another classifier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cxr.device import rng

CELLS = 16  # of the mask along each side: a coarse mask makes no adversarial pattern
STEPS = 60  # of the gradient descent
NOISES = 30  # patterns of noise, which the steps take in turn; fewer are learnt by heart
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
    images: Tensor,
    paths: Sequence[Callable[[Tensor], Tensor]],
    own: Sequence[float],
    classifier: Callable[[Tensor], Tensor],
    logits: Tensor,
    regions: Sequence[Tensor | float],
) -> list[Overlay]:
    """The overlays on images [B, 1, R, R], each with the mask that the classifier needs.

    paths, own: `along` and `own` of each `Overlay`; logits: the classifier's [B] on the images;
    regions: where each image may change, [1, 1, R, R] in [0, 1]."""
    whole = [Overlay(*one) for one in zip(images.split(1), paths, own, regions)]
    with torch.no_grad():
        ends = torch.cat([one(one.image.new_tensor([one.other])) for one in whole])
    masks = needed(images, ends, classifier, logits)
    return [replace(one, mask=one.mask * mask) for one, mask in zip(whole, masks.split(1))]


def needed(x: Tensor, y: Tensor, classifier: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The masks [B, 1, R, R] in [0, 1] with the least change that is needed: where each `x`
    [B, 1, R, R] has to become `y` so that the classifier answers as it answers to `y`. logits: the
    classifier's logits [B] of `x`."""
    noises = NOISE * torch.randn(NOISES, 1, *x.shape[1:], generator=rng(0)).to(x.device)
    with torch.no_grad():
        response = (classifier(y) - logits).abs().clamp_min(1e-6)
        shown = (y + noises).flatten(0, 1).split(AT_ONCE)
        answers = torch.cat([classifier(part) for part in shown]).view(NOISES, len(y))
    whole = (y - x).abs().sum((1, 2, 3)).clamp_min(1e-6)
    with torch.enable_grad():
        cells = torch.full((len(x), 1, CELLS, CELLS), 2.0, device=x.device).requires_grad_()
        optimiser = torch.optim.Adam([cells], 0.2)
        for step in range(STEPS):
            turn = step % NOISES
            change = _mask(cells, x) * (y - x)
            lacking = (classifier(x + change + noises[turn]) - answers[turn]).abs() / response
            loss = lacking + PRICE * change.abs().sum((1, 2, 3)) / whole
            optimiser.zero_grad()
            loss.sum().backward(inputs=[cells])
            optimiser.step()
        return _mask(cells, x).detach()


def _mask(cells: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(cells.sigmoid(), x.shape[2:], mode="bilinear", align_corners=False)
