"""Find an image's codes: `w1`, its detail and `z2`, and the direction of its path."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import losses
from cxr.checkpoints import Model
from cxr.device import rng
from cxr.networks import Generator
from cxr.sampling import DOSES


@dataclass(frozen=True)
class Config:
    """How the search goes. Images are in [-1, 1], responses are logits."""

    rate: float = 0.03  # step size for `w1`; z2, detail and direction get a third of it
    aside: float = 0.3  # restarts begin this many standard deviations away from the encoder's codes
    directions: int = 8  # random directions of disease that are tried on a healthy image
    tried_dose: float = 0.7  # the dose at which they are tried: clearly diseased, not extreme
    tried_change: float = 10.0  # weight of their change against one logit of missing response
    image: float = 4.0  # weight of image distance: the reconstruction has to be of this image
    response: float = 0.3  # weight of the reconstruction's response: the classifier sees it alike
    path_diseased: float = 0.1  # weight of the path's response, for an image that shows disease
    path_healthy: float = (
        1.0  # for one that shows none: else a change for this classifier alone wins
    )
    change: float = 1.0  # weight of the path's change: no more than a dose needs
    away: float = 20.0  # weight of leaving the first `w1`: a structure that moves hides disease
    detail: float = 100.0  # weight of the detail: only what no `w1` draws


CONFIG = Config()


@dataclass
class Codes:
    """An inversion: latents of K restarts, best first, under one noise."""

    w1: Tensor  # [K, layers, w]
    z2: Tensor  # [K, z2]
    detail: Tensor  # [K, C, S, S], of the structure: what no `w1` draws
    noise: list[Tensor]  # [1, 1, H, W] for each layer
    way: Tensor | None = None  # [K, z2], of any length: a healthy image's path; else it goes by z2

    @classmethod
    def together(cls, several: Sequence["Codes"]) -> "Codes":
        """Several images' codes as one, under the noise of the first."""
        kinds = zip(*((c.w1, c.z2, c.detail, c.u) for c in several))
        w1, z2, detail, way = map(torch.cat, kinds)
        return cls(w1, z2, detail, several[0].noise, way)

    @property
    def best(self) -> "Codes":
        """The best restart alone."""
        return self.ranked(slice(1))

    def ranked(self, order: Tensor | slice) -> "Codes":
        """The restarts in this order."""
        way = None if self.way is None else self.way[order]
        return Codes(self.w1[order], self.z2[order], self.detail[order], self.noise, way)

    @property
    def u(self) -> Tensor:
        """The directions of the paths, unit vectors [K, z2]."""
        return F.normalize(self.z2 if self.way is None else self.way)

    def draw(self, generator: nn.Module, z2: Tensor) -> Tensor:
        """The restarts' lungs with the diseases `z2` [m K, z2], restart after restart, m times:
        images [m K, 1, R, R], not clipped."""
        m, noise = len(z2) // len(self.w1), [eps.expand(len(z2), -1, -1, -1) for eps in self.noise]
        return generator(self.w1.repeat(m, 1, 1), z2, noise, self.detail.repeat(m, 1, 1, 1))


@dataclass(frozen=True)
class Inversion:
    """What `invert` finds, best restart first."""

    codes: Codes
    reconstructions: Tensor  # [K, 1, R, R] in [-1, 1]
    walks: Tensor  # [K, 5, 1, R, R] in [-1, 1], each restart's images at `DOSES`


class Path:
    """The best restart's images from dose 0 to dose 1; each dose is drawn once and kept."""

    def __init__(self, inversion: Inversion, generator: Generator):
        self.codes, self.generator = inversion.codes.best, generator
        self._drawn: dict[float, Tensor] = dict(zip(DOSES, inversion.walks[0]))

    @torch.no_grad()
    def __call__(self, doses: Tensor) -> Tensor:
        """Images [N, 1, R, R] in [-1, 1] at doses [N]."""
        device = self.codes.z2.device
        missing = [dose for dose in dict.fromkeys(doses.tolist()) if dose not in self._drawn]
        if missing:
            z2 = torch.tensor(missing, device=device)[:, None] * self.codes.u
            drawn = self.codes.draw(self.generator, z2).clamp(-1, 1)
            self._drawn |= dict(zip(missing, drawn.unbind()))
        return torch.stack([self._drawn[dose] for dose in doses.tolist()])


@torch.enable_grad()
def invert(
    x: Tensor,
    logit: Tensor,
    encoded: tuple[Tensor, Tensor],
    model: Model,
    restarts: int,
    refine: int,
    seed: int,
) -> Inversion:
    """Find the codes of an image: the encoder, then `refine` steps of gradient descent from several
    beginnings, the encoder's own among them. What no `w1` draws, the descent puts into a detail of
    the structure, which all doses share.

    Many codes draw the image nearly alike. Of these, the descent seeks those whose path has the
    classifier answer as its doses name, asking at one dose in each step. A diseased image's path
    goes through its own disease. A healthy one's begins with the direction, the encoder's or one of
    some sampled, whose disease the classifier accepts for the least change.

    x: [1, 1, R, R] in [-1, 1]; logit: [1], the classifier's on it; encoded: the encoder's `w1`
    [1, layers, w] and `z2` [1, z2] of it.
    """
    random = rng(seed, 2)
    noise = model.generator.noise(1, random)
    w1, z2 = encoded
    aside = CONFIG.aside * torch.randn(restarts, *w1.shape[1:], generator=random).to(x.device)
    turn = CONFIG.aside * torch.randn(restarts, z2.shape[1], generator=random).to(x.device)
    aside[0], turn[0] = 0, 0
    start = w1 + aside * w1.std()
    z2 = within(z2 + turn * (z2.norm() + 0.1))
    codes = Codes(start.clone(), z2, model.generator.detail(restarts), noise)
    if logit <= 0:
        codes.way = nearest_disease(codes, model, seed).repeat(restarts, 1)
    target = logit.clamp(*model.info["logits"])
    descend(x, target, codes, start, model, refine)
    with torch.no_grad():
        loss, drawn = inversion_loss(x, target, codes, start, model, DOSES)
        order, drawn = loss.argsort(), drawn.clamp(-1, 1)
        return Inversion(codes.ranked(order), drawn[0, order], drawn[1:, order].transpose(0, 1))


def descend(
    x: Tensor, target: Tensor, codes: Codes, start: Tensor, model: Model, steps: int
) -> None:
    """Adam on the codes, in place; the rate falls to 0 over the second half of the steps."""
    others = [t for t in (codes.z2, codes.detail, codes.way) if t is not None]
    free = [codes.w1, *others]
    for latent in free:
        latent.requires_grad_()
    optimiser = torch.optim.Adam([{"params": free[:1]}, {"params": others}])
    for step in range(steps):
        for group, rate in zip(optimiser.param_groups, (CONFIG.rate, CONFIG.rate / 3)):
            group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        dose = DOSES[step % len(DOSES)]
        loss, _ = inversion_loss(x, target, codes, start, model, (dose,))
        optimiser.zero_grad()
        loss.sum().backward(inputs=free)
        optimiser.step()
        with torch.no_grad():
            codes.z2.copy_(within(codes.z2))


def within(z2: Tensor) -> Tensor:
    """`z2` [K, z2], shortened where its dose exceeds 1."""
    return z2 / z2.norm(dim=1, keepdim=True).clamp_min(1.0)


def inversion_loss(
    x: Tensor, target: Tensor, codes: Codes, start: Tensor, model: Model, doses: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """What each restart still lacks [K], summed over n `doses`, and what it draws,
    [1 + n, K, 1, R, R]: its reconstruction, then its path at the doses; not clipped.

    It lacks the image; the classifier's response to it; that response along the path, at dose 0 a
    healthy one, so that no structure hides disease; a path that changes little; a `w1` near the
    first one, since a structure that moves hides disease that other classifiers still see; and
    little detail. `Config` has the weights; docs/ablations.md says what each gave.
    """
    k, n = len(codes.w1), len(doses)
    drawn = codes.draw(
        model.generator, torch.cat([codes.z2, *(codes.u * dose for dose in doses)])
    )  # [(1 + n) K, 1, R, R]
    named = model.logit(torch.tensor(doses, device=x.device)).repeat_interleave(k)
    wanted = torch.cat([target.expand(k), named])
    answers = F.smooth_l1_loss(model.classifier(drawn), wanted, reduction="none")
    response, path = answers[:k], answers[k:]
    image = torch.stack([losses.image(one[None], x) for one in drawn[:k]])
    change = (drawn[k:] - drawn[:k].repeat(n, 1, 1, 1)).abs().mean((1, 2, 3))
    away = (codes.w1 - start).square().mean((1, 2))
    detail = codes.detail.square().mean((1, 2, 3))
    firmness = torch.where(target > 0, CONFIG.path_diseased, CONFIG.path_healthy)
    along = (firmness * path + CONFIG.change * change).view(n, k).sum(0)
    fixed = CONFIG.image * image + CONFIG.response * response
    fixed = fixed + CONFIG.away * away + CONFIG.detail * detail
    return n * fixed + along, drawn.unflatten(0, (1 + n, k))


def sampled_directions(codes: Codes, seed: int) -> Tensor:
    """Some unit directions [D, z2] of disease, whatever the image."""
    drawn = torch.randn(CONFIG.directions, codes.z2.shape[1], generator=rng(seed, 3))
    return F.normalize(drawn).to(codes.z2.device)


@torch.no_grad()
def nearest_disease(codes: Codes, model: Model, seed: int) -> Tensor:
    """The direction [1, z2], the encoder's or a sampled one, whose disease the classifier accepts
    best for the least change."""
    u = torch.cat([codes.u[:1], sampled_directions(codes, seed)])
    ends = torch.cat([torch.zeros_like(u[:1]), u * CONFIG.tried_dose])
    x = codes.best.draw(model.generator, ends)
    named = model.logit(torch.tensor(CONFIG.tried_dose, device=u.device)).expand(len(u))
    response = F.smooth_l1_loss(model.classifier(x[1:]), named, reduction="none")
    change = (x[1:] - x[:1]).abs().mean((1, 2, 3))
    return u[(response + CONFIG.tried_change * change).argmin()][None]
