"""Find an image's codes: `w1`, `z2` and, for a healthy image, where disease may come from."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr.checkpoints import Model
from cxr.train_gan import image_loss
from cxr.training import rng

RATE = 0.03  # of the refinement
DIRECTIONS = 8  # of disease, tried on a healthy image


@dataclass
class Codes:
    """An inversion: latents of K restarts, best first, under one noise."""

    w1: Tensor  # [K, layers, w]
    z2: Tensor  # [K, z2]
    noise: list[Tensor]  # [1, 1, H, W] for each layer

    def noises(self, n: int) -> list[Tensor]:
        return [eps.expand(n, -1, -1, -1) for eps in self.noise]

    def along(self, generator: nn.Module, u: Tensor, doses: Tensor) -> Tensor:
        """Images [N, 1, R, R] in [-1, 1] of the best restart's lungs with the disease `u` [1, z2],
        a unit vector, at doses [N]."""
        w1 = self.w1[:1].expand(len(doses), -1, -1)
        return generator(w1, doses[:, None] * u, self.noises(len(doses))).clamp(-1, 1)


def invert(x: Tensor, model: Model, restarts: int, refine: int, seed: int) -> Codes:
    """Find the codes of an image [1, 1, R, R]: the encoder, then `refine` steps of gradient
    descent from several beginnings, the encoder's own among them."""
    random = rng(seed, 2)
    noise = model.generator.noise(1, random)
    with torch.no_grad():
        w1, z2 = model.encoder(x)
        target = model.classifier(x).clamp(*model.info["logits"])
    aside = 0.3 * torch.randn(restarts, *w1.shape[1:], generator=random).to(x.device)
    turn = 0.3 * torch.randn(restarts, z2.shape[1], generator=random).to(x.device)
    aside[0], turn[0] = 0, 0
    start = w1 + aside * w1.std()
    w1, z2 = start.clone().requires_grad_(), within(z2 + turn * (z2.norm() + 0.1)).requires_grad_()
    codes = Codes(w1, z2, noise)
    optimiser = torch.optim.Adam([{"params": [w1]}, {"params": [z2], "lr": RATE / 3}], RATE)
    for step in range(refine):
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - step / refine))
        loss = inversion_loss(x, target, codes, start, model)
        w1.grad, z2.grad = torch.autograd.grad(loss.sum(), [w1, z2])
        optimiser.step()
        z2.data = within(z2.data)
    with torch.no_grad():
        order = inversion_loss(x, target, codes, start, model).argsort()
        return Codes(w1[order], z2[order], noise)


def within(z2: Tensor) -> Tensor:
    """`z2` [K, z2], shortened where its dose exceeds 1."""
    return z2 / z2.norm(dim=1, keepdim=True).clamp_min(1.0)


def inversion_loss(x: Tensor, target: Tensor, codes: Codes, start: Tensor, model: Model) -> Tensor:
    """What each restart still lacks [K]: the image; the classifier's response to it; a healthy
    response once `z2` is zero, so that `w1` hides no disease; nearness to where `w1` began."""
    k, w1, z2 = len(codes.w1), codes.w1.repeat(2, 1, 1), codes.z2
    both = model.generator(w1, torch.cat([z2, torch.zeros_like(z2)]), codes.noises(2 * k))
    healthy = torch.full_like(target, model.info["logits"][0]).expand(k)
    named = torch.cat([target.expand(k), healthy])
    response, cleared = F.smooth_l1_loss(model.classifier(both), named, reduction="none").chunk(2)
    image = torch.stack([image_loss(copy[None], x) for copy in both[:k]])
    return (
        4 * image + 0.3 * response + 0.1 * cleared + 0.1 * (codes.w1 - start).square().mean((1, 2))
    )


def disease_directions(original: float, codes: Codes, model: Model, seed: int) -> Tensor:
    """Unit directions [D, z2] in which disease may come, the one to be shown first.

    A diseased image has its own. A healthy one has none: several are sampled, and from the one
    that needs the least change gradient descent finds the nearest that the classifier accepts.
    """
    found = F.normalize(codes.z2[:1])
    if original > 0:
        return found
    sampled = torch.randn(DIRECTIONS, found.shape[1], generator=rng(seed, 3)).to(found.device)
    u = torch.cat([found, F.normalize(sampled)]).detach()
    with torch.enable_grad():
        best = u[_direction_loss(u, codes, model).argmin()][None].clone().requires_grad_()
        optimiser = torch.optim.Adam([best], 0.05)
        for _ in range(20):
            (best.grad,) = torch.autograd.grad(
                _direction_loss(F.normalize(best), codes, model), best
            )
            optimiser.step()
    return torch.cat([F.normalize(best.detach()), u[1:]])


def _direction_loss(u: Tensor, codes: Codes, model: Model, dose: float = 0.7) -> Tensor:
    """The classifier's distance from what the dose names, and the change it costs: [K]."""
    ends = torch.cat([torch.zeros_like(u[:1]), u * dose])
    x = model.generator(codes.w1[:1].expand(len(ends), -1, -1), ends, codes.noises(len(ends)))
    named = model.logit(torch.tensor(dose, device=u.device)).expand(len(u))
    response = F.smooth_l1_loss(model.classifier(x[1:]), named, reduction="none")
    return response + 10 * (x[1:] - x[:1]).abs().mean((1, 2, 3))
