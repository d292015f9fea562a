"""Find an image's codes: `w1` and `z2`, and which way its path goes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr.checkpoints import Model
from cxr.monitor import DOSES
from cxr.train_gan import image_loss
from cxr.training import rng

RATE = 0.03  # of the refinement of `w1`; of the rest a third
DIRECTIONS = 8  # of disease, tried on a healthy image


@dataclass
class Codes:
    """An inversion: latents of K restarts, best first, under one noise."""

    w1: Tensor  # [K, layers, w]
    z2: Tensor  # [K, z2]
    way: Tensor  # [K, z2], of any length: where the path goes; `z2` itself for a diseased image
    noise: list[Tensor]  # [1, 1, H, W] for each layer

    def noises(self, n: int) -> list[Tensor]:
        return [eps.expand(n, -1, -1, -1) for eps in self.noise]

    @property
    def u(self) -> Tensor:
        """The ways as unit vectors [K, z2]."""
        return F.normalize(self.way)

    def along(self, generator: nn.Module, doses: Tensor) -> Tensor:
        """The best restart's path: images [N, 1, R, R] in [-1, 1] at doses [N]."""
        w1 = self.w1[:1].expand(len(doses), -1, -1)
        z2 = doses[:, None] * self.u[:1]
        return generator(w1, z2, self.noises(len(doses))).clamp(-1, 1)


@torch.enable_grad()
def invert(x: Tensor, model: Model, restarts: int, refine: int, seed: int) -> Codes:
    """Find the codes of an image [1, 1, R, R]: the encoder, then `refine` steps of gradient
    descent from several beginnings, the encoder's own among them.

    Many codes draw the image nearly alike; of these, the descent seeks those whose path has the
    classifier answer as its doses name, asking at one dose in each step. A diseased image's path
    goes through its own disease; a healthy one's begins with the direction, the encoder's or one of
    some sampled, whose disease the classifier accepts for the least change.
    """
    random = rng(seed, 2)
    noise = model.generator.noise(1, random)
    with torch.no_grad():
        w1, z2 = model.encoder(x)
        logit = model.classifier(x)
    aside = 0.3 * torch.randn(restarts, *w1.shape[1:], generator=random).to(x.device)
    turn = 0.3 * torch.randn(restarts, z2.shape[1], generator=random).to(x.device)
    aside[0], turn[0] = 0, 0
    start = w1 + aside * w1.std()
    z2 = within(z2 + turn * (z2.norm() + 0.1))
    codes = Codes(start.clone(), z2, z2, noise)
    free = [codes.w1, codes.z2]
    if logit <= 0:
        codes.way = nearest_disease(codes, model, seed).repeat(restarts, 1)
        free.append(codes.way)
    for latent in free:
        latent.requires_grad_()
    target = logit.clamp(*model.info["logits"])
    optimiser = torch.optim.Adam([{"params": free[:1]}, {"params": free[1:], "lr": RATE / 3}], RATE)
    for step in range(refine):
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - step / refine))
        loss = inversion_loss(x, target, codes, start, model, DOSES[step % len(DOSES)])
        optimiser.zero_grad()
        loss.sum().backward(inputs=free)
        optimiser.step()
        with torch.no_grad():
            z2.copy_(within(z2))
    with torch.no_grad():
        loss = sum(inversion_loss(x, target, codes, start, model, dose) for dose in DOSES)
        order = loss.argsort()
        return Codes(codes.w1[order], codes.z2[order], codes.way[order], noise)


def within(z2: Tensor) -> Tensor:
    """`z2` [K, z2], shortened where its dose exceeds 1."""
    return z2 / z2.norm(dim=1, keepdim=True).clamp_min(1.0)


def inversion_loss(
    x: Tensor, target: Tensor, codes: Codes, start: Tensor, model: Model, dose: float
) -> Tensor:
    """What each restart still lacks [K]: the image; the classifier's response to it; its response
    along the path at this dose, at 0 a healthy one, so that `w1` hides no disease; a path that
    changes little; nearness to where `w1` began."""
    k, w1 = len(codes.w1), codes.w1.repeat(2, 1, 1)
    both = model.generator(w1, torch.cat([codes.z2, codes.u * dose]), codes.noises(2 * k))
    named = model.logit(torch.full_like(target, dose)).expand(k)
    response, path = F.smooth_l1_loss(
        model.classifier(both), torch.cat([target.expand(k), named]), reduction="none"
    ).chunk(2)
    image = torch.stack([image_loss(copy[None], x) for copy in both[:k]])
    change = (both[k:] - both[:k]).abs().mean((1, 2, 3))
    away = (codes.w1 - start).square().mean((1, 2))
    return 4 * image + 0.3 * response + 0.1 * path + change + 0.1 * away


def sampled_directions(codes: Codes, seed: int) -> Tensor:
    """Some unit directions [D, z2] of disease, whatever the image."""
    drawn = torch.randn(DIRECTIONS, codes.z2.shape[1], generator=rng(seed, 3))
    return F.normalize(drawn).to(codes.z2.device)


@torch.no_grad()
def nearest_disease(codes: Codes, model: Model, seed: int, dose: float = 0.7) -> Tensor:
    """The direction [1, z2], the encoder's or a sampled one, whose disease the classifier accepts
    best for the least change."""
    u = torch.cat([codes.u[:1], sampled_directions(codes, seed)])
    ends = torch.cat([torch.zeros_like(u[:1]), u * dose])
    x = model.generator(codes.w1[:1].expand(len(ends), -1, -1), ends, codes.noises(len(ends)))
    named = model.logit(torch.tensor(dose, device=u.device)).expand(len(u))
    response = F.smooth_l1_loss(model.classifier(x[1:]), named, reduction="none")
    return u[(response + 10 * (x[1:] - x[:1]).abs().mean((1, 2, 3))).argmin()][None]
