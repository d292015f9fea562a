"""Find an image's codes: `w1`, its detail and `z2`, and which way its path goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import metrics
from cxr.checkpoints import Model
from cxr.device import rng
from cxr.sampling import DOSES

RATE = 0.03  # of the refinement of `w1`; of the rest a third
DIRECTIONS = 8  # of disease, tried on a healthy image


@dataclass
class Codes:
    """An inversion: latents of K restarts, best first, under one noise."""

    w1: Tensor  # [K, layers, w]
    z2: Tensor  # [K, z2]
    way: Tensor  # [K, z2], of any length: where the path goes; `z2` itself for a diseased image
    detail: Tensor  # [K, C, S, S], of the structure: what no `w1` draws
    noise: list[Tensor]  # [1, 1, H, W] for each layer

    @classmethod
    def together(cls, several: Sequence["Codes"]) -> "Codes":
        """Several images' codes as one, under the noise of the first."""
        kinds = zip(*((c.w1, c.z2, c.way, c.detail) for c in several))
        return cls(*map(torch.cat, kinds), several[0].noise)

    @property
    def best(self) -> "Codes":
        """The best restart alone."""
        return self.ranked(slice(1))

    def ranked(self, order: Tensor | slice) -> "Codes":
        """The restarts in this order."""
        kept = (t[order] for t in (self.w1, self.z2, self.way, self.detail))
        return Codes(*kept, self.noise)

    @property
    def u(self) -> Tensor:
        """The ways as unit vectors [K, z2]."""
        return F.normalize(self.way)

    def draw(self, generator: nn.Module, z2: Tensor) -> Tensor:
        """The restarts' lungs with the diseases `z2` [m K, z2], restart after restart, m times:
        images [m K, 1, R, R], not clipped."""
        m, noise = len(z2) // len(self.w1), [eps.expand(len(z2), -1, -1, -1) for eps in self.noise]
        return generator(self.w1.repeat(m, 1, 1), z2, noise, self.detail.repeat(m, 1, 1, 1))

    def along(self, generator: nn.Module, doses: Tensor) -> Tensor:
        """The best restart's path: images [N, 1, R, R] in [-1, 1] at doses [N]."""
        return self.best.draw(generator, doses[:, None] * self.u[:1]).clamp(-1, 1)


@torch.enable_grad()
def invert(x: Tensor, model: Model, restarts: int, refine: int, seed: int) -> Codes:
    """Find the codes of an image [1, 1, R, R]: the encoder, then `refine` steps of gradient
    descent from several beginnings, the encoder's own among them. What no `w1` draws, the descent
    puts into a detail of the structure, which all doses share.

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
    codes = Codes(start.clone(), z2, z2, model.generator.detail(restarts), noise)
    free = [codes.w1, codes.z2, codes.detail]
    if logit <= 0:
        codes.way = nearest_disease(codes, model, seed).repeat(restarts, 1)
        free.append(codes.way)
    for latent in free:
        latent.requires_grad_()
    target = logit.clamp(*model.info["logits"])
    optimiser = torch.optim.Adam([{"params": free[:1]}, {"params": free[1:]}])
    for step in range(refine):
        for group, rate in zip(optimiser.param_groups, (RATE, RATE / 3)):
            group["lr"] = rate * min(1.0, 2 * (1 - step / refine))
        loss = inversion_loss(x, target, codes, start, model, DOSES[step % len(DOSES)])
        optimiser.zero_grad()
        loss.sum().backward(inputs=free)
        optimiser.step()
        with torch.no_grad():
            z2.copy_(within(z2))
    with torch.no_grad():
        loss = sum(inversion_loss(x, target, codes, start, model, dose) for dose in DOSES)
        return codes.ranked(loss.argsort())


def within(z2: Tensor) -> Tensor:
    """`z2` [K, z2], shortened where its dose exceeds 1."""
    return z2 / z2.norm(dim=1, keepdim=True).clamp_min(1.0)


def inversion_loss(
    x: Tensor, target: Tensor, codes: Codes, start: Tensor, model: Model, dose: float
) -> Tensor:
    """What each restart still lacks [K]: the image; the classifier's response to it; its response
    along the path at this dose, at 0 a healthy one, so that no structure hides disease; a path that
    changes little; nearness to where `w1` began, which is dear, since a structure that moves hides
    disease that other classifiers still see (benchmarks/trials.md); and little detail.

    A healthy image shows no disease to go by: there the path's response has to weigh more, or the
    least change convinces this classifier alone (benchmarks/trials.md)."""
    k = len(codes.w1)
    both = codes.draw(model.generator, torch.cat([codes.z2, codes.u * dose]))
    named = model.logit(torch.full_like(target, dose)).expand(k)
    response, path = F.smooth_l1_loss(
        model.classifier(both), torch.cat([target.expand(k), named]), reduction="none"
    ).chunk(2)
    image = torch.stack([metrics.image_distance(copy[None], x) for copy in both[:k]])
    change = (both[k:] - both[:k]).abs().mean((1, 2, 3))
    away = (codes.w1 - start).square().mean((1, 2))
    detail = codes.detail.square().mean((1, 2, 3))
    firmness = torch.where(target > 0, 0.1, 1.0)  # diseased, healthy
    return 4 * image + 0.3 * response + firmness * path + change + 20 * away + 100 * detail


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
    x = codes.best.draw(model.generator, ends)
    named = model.logit(torch.tensor(dose, device=u.device)).expand(len(u))
    response = F.smooth_l1_loss(model.classifier(x[1:]), named, reduction="none")
    return u[(response + 10 * (x[1:] - x[:1]).abs().mean((1, 2, 3))).argmin()][None]
