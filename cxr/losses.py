"""Losses for training the GAN, except the adversarial and the classifier's loss. Each but `image`,
which the inversion uses, too, is a mean over images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import metrics


def r1(D: nn.Module, x: Tensor, doses: Tensor) -> Tensor:
    """`E |grad_x D(x)|^2` on real images (Mescheder et al. 2018, equation 9)."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(D(x, doses).sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def latent(w1_read: Tensor, z2_read: Tensor, w1: Tensor, z2: Tensor) -> Tensor:
    """Squared distance of the codes that the encoder reads in the fakes from the codes `w1`
    [n/2, layers, w] and `z2` [n, z2] that they were drawn from, plus the squared distance between
    the two `w1` read of the same lungs. The first n/2 fakes are at dose 0, the others show the same
    lungs at another dose."""
    healthy, diseased = w1_read.chunk(2)
    structure = F.mse_loss(w1_read, torch.cat([w1, w1]).detach().float())
    disease = (z2_read - z2.detach()).square().sum(1).mean()
    return structure + disease + (healthy - diseased).square().mean()


def proximity(pairs: Tensor) -> Tensor:
    """Mean absolute difference between lungs at dose 0 and the same lungs at another dose, the
    first and the second half of `pairs` [n, 1, R, R]. It keeps the change small. Discriminator and
    classifier ask for the change that the disease needs."""
    healthy, diseased = pairs.chunk(2)
    return (diseased - healthy).abs().mean()


def image(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference [N] of images [N, 1, R, R] at three scales, plus 1 - SSIM."""
    loss = 1 - metrics.ssim(x, y)
    for _ in range(3):
        loss = loss + (x - y).abs().mean((1, 2, 3))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return loss
