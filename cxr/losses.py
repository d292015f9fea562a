"""The losses of the GAN's training beside the adversarial and the classifier's, each a mean over
images; the inversion shares the last one."""

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
    """The encoder finds the codes `w1` [n/2, layers, w] and `z2` [n, z2] in the fakes, lungs at
    dose 0 and then the same at a dose, and one `w1` whatever the dose."""
    healthy, diseased = w1_read.chunk(2)
    structure = F.mse_loss(w1_read, torch.cat([w1, w1]).detach().float())
    disease = (z2_read - z2.detach()).square().sum(1).mean()
    return structure + disease + (healthy - diseased).square().mean()


def proximity(pairs: Tensor) -> Tensor:
    """Mean absolute difference of lungs [n, 1, R, R] at dose 0, the first half, and the same at a
    dose: discriminator and classifier want the disease there, nothing wants more to move."""
    healthy, diseased = pairs.chunk(2)
    return (diseased - healthy).abs().mean()


def image(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of images [N, 1, R, R] at three scales, and what SSIM lacks of 1."""
    loss = 1 - metrics.ssim(x, y).mean()
    for _ in range(3):
        loss = loss + (x - y).abs().mean()
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return loss
