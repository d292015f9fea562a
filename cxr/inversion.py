"""Inversion: find the codes of an image (`w1`, detail, `z2`) and the direction of its path."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import losses
from cxr.checkpoints import Model
from cxr.device import half_precision, rng
from cxr.layers import settled
from cxr.networks import Generator
from cxr.sampling import DOSES


@dataclass(frozen=True)
class Config:
    """Numbers of the search. Images are in [-1, 1], responses are logits."""

    rate: float = 0.03  # learning rate of `w1`; z2, detail and direction get a third of it
    betas: tuple[float, float] = (0.9, 0.99)  # of Adam: the few steps ask at five doses in turn
    aside: float = 0.3  # distance of the restarts from the encoder's codes, standard deviations
    directions: int = 8  # random directions of disease that are tried on a healthy image
    tried_dose: float = 0.7  # the dose at which they are tried: clearly diseased, not extreme
    tried_change: float = 10.0  # weight of their change against one logit of missing response
    image: float = 4.0  # weight of the distance between image and reconstruction
    response: float = 0.3  # weight of the difference between their logits
    path_diseased: float = 0.1  # weight of the path's response, for an image that shows disease
    path_healthy: float = 1.0  # for a healthy one: less finds changes that only this CNN sees
    change: float = 1.0  # weight of the change along the path: no more than a dose needs
    away: float = 20.0  # weight of leaving the first `w1`: a structure that moves hides disease
    tried: int = 6  # steps after which the best restart alone is refined
    detail: float = 100.0  # weight of the detail: it holds only what no `w1` can draw


CONFIG = Config()
TURNS = (0.0, 0.75, 0.25, 1.0, 0.5)  # the doses at which the steps ask: neighbours far apart


@dataclass
class Codes:
    """The codes of an image: K restarts, the best one first, with one noise."""

    w1: Tensor  # [K, layers, w]
    z2: Tensor  # [K, z2]
    detail: Tensor  # [K, C, S, S], the part of the structure that no `w1` can draw
    noise: list[Tensor]  # [1, 1, H, W] for each layer
    direction: Tensor | None = None  # [K, z2], any length: a healthy image's path; else that of z2

    @classmethod
    def together(cls, several: Sequence["Codes"]) -> "Codes":
        """The codes of several images as one, with the noise of the first image."""
        kinds = zip(*((c.w1, c.z2, c.detail, c.u) for c in several))
        w1, z2, detail, direction = map(torch.cat, kinds)
        return cls(w1, z2, detail, several[0].noise, direction)

    @property
    def best(self) -> "Codes":
        """The best restart alone."""
        return self.ranked(slice(1))

    def ranked(self, order: Tensor | slice) -> "Codes":
        """The restarts in this order."""
        direction = None if self.direction is None else self.direction[order]
        return Codes(self.w1[order], self.z2[order], self.detail[order], self.noise, direction)

    def split(self, restarts: int) -> list["Codes"]:
        """The codes of each image, of which there are so many in turn."""
        return [self.ranked(slice(i, i + restarts)) for i in range(0, len(self.w1), restarts)]

    def beside(self, others: "Codes") -> "Codes":
        """These restarts, then the others."""
        parts = zip(self.free, others.free)
        w1, z2, detail, *direction = (torch.cat(pair) for pair in parts)
        return Codes(w1, z2, detail, self.noise, *direction)

    @property
    def free(self) -> list[Tensor]:
        """The tensors that an inversion looks for."""
        return [t for t in (self.w1, self.z2, self.detail, self.direction) if t is not None]

    @property
    def u(self) -> Tensor:
        """The directions of the paths, unit vectors [K, z2]."""
        return F.normalize(self.z2 if self.direction is None else self.direction)

    def draw(self, generator: nn.Module, z2: Tensor) -> Tensor:
        """Draw the structures of the K restarts with the diseases `z2` [m K, z2]: the first K codes
        belong to the K restarts in order, so do the next K, and so on. Returns images
        [m K, 1, R, R], not clipped."""
        m, noise = len(z2) // len(self.w1), [eps.expand(len(z2), -1, -1, -1) for eps in self.noise]
        return generator(self.w1.repeat(m, 1, 1), z2, noise, self.detail.repeat(m, 1, 1, 1))


@dataclass(frozen=True)
class Inversion:
    """The result of `invert`, the best restart first."""

    codes: Codes
    reconstructions: Tensor  # [K, 1, R, R] in [-1, 1]
    walks: Tensor  # [K, 5, 1, R, R] in [-1, 1], each restart's images at `DOSES`


class Path:
    """The images of the best restart from dose 0 to dose 1. Each dose is drawn once and kept."""

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
) -> list[Inversion]:
    """Find the codes of images with the encoder, then refine them by `refine` steps of gradient
    descent from several starting points, after 6 of them the best alone. The first starting point
    is the encoder's codes. What no `w1` can draw goes into a detail of the structure, which is the
    same at all doses.

    Many codes draw nearly the same image. The descent prefers codes with a path on which the
    classifier gives the logits that the doses name; each step asks at one dose. The path of a
    diseased image goes through the image's own disease. The path of a healthy image starts in the
    direction, the encoder's or a random one, that convinces the classifier with the least change.

    x: [B, 1, R, R] in [-1, 1]; logit: the classifier's logits [B] of x, all of one verdict; encoded:
    the encoder's `w1` [B, layers, w] and `z2` [B, z2] of x. Each image is inverted as if alone.
    """
    random = rng(seed, 2)
    noise = model.generator.noise(1, random)
    w1, z2 = encoded
    aside = CONFIG.aside * torch.randn(restarts, *w1.shape[1:], generator=random).to(x.device)
    turn = CONFIG.aside * torch.randn(restarts, z2.shape[1], generator=random).to(x.device)
    aside[0], turn[0] = 0, 0
    start = (w1[:, None] + aside * w1.std((1, 2))[:, None, None, None]).flatten(0, 1)
    turned = z2[:, None] + turn * (z2.norm(dim=1)[:, None, None] + 0.1)
    detail = model.generator.detail(len(start))
    codes = Codes(start.clone(), within(turned.flatten(0, 1)), detail, noise)
    with settled(model.generator):
        if logit[0] <= 0:
            nearest = [nearest_disease(each.best, model, seed) for each in codes.split(restarts)]
            codes.direction = torch.cat(nearest).repeat_interleave(restarts, 0)
        target = logit.clamp(*model.info["logits"])
        codes = descend(x, target, codes, start, model, refine)
        return [
            _inversion(*part, model)
            for part in zip(
                x.split(1), target.split(1), codes.split(restarts), start.split(restarts)
            )
        ]


@torch.no_grad()
def _inversion(x: Tensor, target: Tensor, codes: Codes, start: Tensor, model: Model) -> Inversion:
    """What the restarts of one image found, the best first."""
    loss, drawn = inversion_loss(x, target, codes, start, model, DOSES)
    order, drawn = loss.argsort(), drawn.clamp(-1, 1)
    return Inversion(codes.ranked(order), drawn[0, order], drawn[1:, order].transpose(0, 1))


def descend(
    x: Tensor, target: Tensor, codes: Codes, start: Tensor, model: Model, steps: int
) -> Codes:
    """The codes of B images, K restarts of each in turn, optimised with Adam: all for the first
    steps, then each image's best alone. The learning rate falls to 0 over the second half of the
    steps."""
    restarts = len(start) // len(x)
    dropped, order, optimiser = None, None, _optimiser(codes)
    asked = [t.repeat_interleave(restarts, 0) for t in (x, target)] + [start]
    for step in range(steps):
        if step == CONFIG.tried and restarts > 1:
            order = _ranks(x, target, codes, start, model)  # [B, K]
            best, others = order[:, 0], order[:, 1:].flatten()
            dropped, asked = codes.ranked(others), [x, target, start[best]]
            codes, optimiser = _alone(codes, optimiser, best)
        for group, rate in zip(optimiser.param_groups, (CONFIG.rate, CONFIG.rate / 3)):
            group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        x_asked, target_asked, first = asked
        dose = TURNS[step % len(TURNS)]
        loss, _ = inversion_loss(x_asked, target_asked, codes, first, model, (dose,))
        optimiser.zero_grad()
        loss.sum().backward(inputs=codes.free)
        optimiser.step()
        with torch.no_grad():
            codes.z2.copy_(within(codes.z2))
    with torch.no_grad():
        if dropped is None:
            return codes
        back = torch.cat([order[:, 0], order[:, 1:].flatten()]).argsort()
        return codes.beside(dropped).ranked(back)


@torch.no_grad()
def _ranks(x: Tensor, target: Tensor, codes: Codes, start: Tensor, model: Model) -> Tensor:
    """The rows [B, K] of each image's restarts, the best first."""
    restarts = len(start) // len(x)
    parts = zip(x.split(1), target.split(1), codes.split(restarts), start.split(restarts))
    losses = [inversion_loss(*part, model, DOSES)[0] for part in parts]
    return torch.stack([i * restarts + loss.argsort() for i, loss in enumerate(losses)])


def _optimiser(codes: Codes) -> torch.optim.Adam:
    for latent in codes.free:
        latent.requires_grad_()
    groups = [{"params": codes.free[:1]}, {"params": codes.free[1:]}]
    return torch.optim.Adam(groups, betas=CONFIG.betas)


def _alone(
    codes: Codes, optimiser: torch.optim.Adam, rows: Tensor
) -> tuple[Codes, torch.optim.Adam]:
    """The codes of these restarts, and an optimiser that goes on with what is known of them."""
    with torch.no_grad():
        kept = codes.ranked(rows)
    following = _optimiser(kept)
    for before, after in zip(codes.free, kept.free):
        state = optimiser.state[before]
        following.state[after] = {
            "step": state["step"],
            "exp_avg": state["exp_avg"][rows],
            "exp_avg_sq": state["exp_avg_sq"][rows],
        }
    return kept, following


def within(z2: Tensor) -> Tensor:
    """`z2` [K, z2], shortened to length 1 where its dose is above 1."""
    return z2 / z2.norm(dim=1, keepdim=True).clamp_min(1.0)


def inversion_loss(
    x: Tensor, target: Tensor, codes: Codes, start: Tensor, model: Model, doses: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The loss [K] of each restart, summed over n `doses`, and its images [1 + n, K, 1, R, R]: the
    reconstruction, then the path at the doses, not clipped. x, target: of all restarts, [1, 1, R, R]
    and [1], or of each, [K, 1, R, R] and [K].

    The loss has six terms: the distance of the reconstruction from the image; the difference of
    their logits; the distance of the path's logits from those that the doses name (at dose 0 a
    healthy one, so that no structure hides disease); the change along the path; the distance of
    `w1` from its starting point, because a structure that moves hides disease that other
    classifiers still see; and the size of the detail. `Config` has the weights; docs/ablations.md
    says what each term is for.
    """
    k, n = len(codes.w1), len(doses)
    drawn = codes.draw(
        model.generator, torch.cat([codes.z2, *(codes.u * dose for dose in doses)])
    )  # [(1 + n) K, 1, R, R]
    named = model.logit(torch.tensor(doses, device=x.device)).repeat_interleave(k)
    wanted = torch.cat([target.expand(k), named])
    answers = F.smooth_l1_loss(roughly(drawn, model), wanted, reduction="none")
    response, path = answers[:k], answers[k:]
    image = losses.image(drawn[:k], x.expand_as(drawn[:k]))
    change = (drawn[k:] - drawn[:k].repeat(n, 1, 1, 1)).abs().mean((1, 2, 3))
    away = (codes.w1 - start).square().mean((1, 2))
    detail = codes.detail.square().mean((1, 2, 3))
    firmness = torch.where(target > 0, CONFIG.path_diseased, CONFIG.path_healthy)
    along = (firmness * path.view(n, k) + CONFIG.change * change.view(n, k)).sum(0)
    fixed = CONFIG.image * image + CONFIG.response * response
    fixed = fixed + CONFIG.away * away + CONFIG.detail * detail
    return n * fixed + along, drawn.unflatten(0, (1 + n, k))


def roughly(x: Tensor, model: Model) -> Tensor:
    """The classifier's logits [N], of a CNN of the user's own in bf16 where the hardware multiplies in
    it: good enough to descend by, not to be shown. Such a CNN is large, and its answers are most of
    an explanation's time; ours would gain little."""
    if "foreign" not in model.info:
        return model.classifier(x)
    with half_precision(x.device):
        return model.classifier(x).float()


def sampled_directions(codes: Codes, seed: int) -> Tensor:
    """Random unit directions [D, z2] of disease, the same for every image."""
    drawn = torch.randn(CONFIG.directions, codes.z2.shape[1], generator=rng(seed, 3))
    return F.normalize(drawn).to(codes.z2.device)


@torch.no_grad()
def nearest_disease(codes: Codes, model: Model, seed: int) -> Tensor:
    """The direction [1, z2] of disease, the encoder's or a random one, that convinces the
    classifier best with the least change."""
    u = torch.cat([codes.u[:1], sampled_directions(codes, seed)])
    ends = torch.cat([torch.zeros_like(u[:1]), u * CONFIG.tried_dose])
    x = codes.best.draw(model.generator, ends)
    named = model.logit(torch.tensor(CONFIG.tried_dose, device=u.device)).expand(len(u))
    response = F.smooth_l1_loss(model.classifier(x[1:]), named, reduction="none")
    change = (x[1:] - x[:1]).abs().mean((1, 2, 3))
    return u[(response + CONFIG.tried_change * change).argmin()][None]
