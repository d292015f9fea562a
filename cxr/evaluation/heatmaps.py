"""Scores of heat maps: the definition and the source of each.

A heat map is [R, R]. A place is a mask, bool [R, R]. A score that its input does not define is NaN.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import metrics
from cxr.device import rng

SHARES = 16  # steps of deletion and insertion, each of the same share of the pixels
STAGES = 5  # of the randomisation
THRESHOLDS = np.arange(1, 20) / 20  # shares of a map's maximum; the best one is chosen
WINDOW = 11  # pixels, of SSIM


def average_precision(heat: np.ndarray, place: np.ndarray) -> float:
    """Average precision over pixels: the sum over the map's levels of (gain in recall) x
    (precision). Pixels with equal values form one level. A random map scores the share of the image
    that the place covers."""
    order = np.argsort(-heat, axis=None, kind="stable")
    heat, hits = heat.ravel()[order], np.cumsum(place.ravel()[order])
    last = np.append(np.flatnonzero(np.diff(heat)), heat.size - 1)  # of each level
    gains = np.diff(hits[last], prepend=0)
    return float((gains * hits[last] / (last + 1)).sum() / hits[-1]) if hits[-1] else float("nan")


def pointing(heat: np.ndarray, place: np.ndarray) -> float:
    """The pointing game (Zhang et al. 2016): 1 if the maximum lies in the place, else 0. There is
    no tolerance around the place. Of several maxima, the share that lies in the place."""
    return float(place[heat == heat.max()].mean())


def otsu(heat: np.ndarray) -> float:
    """The threshold with the largest variance between the pixels above and below it, over 256 bins
    (Otsu 1979). The map's maximum if the map is constant."""
    counts, edges = np.histogram(heat, 256)
    middles = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above, moment = heat.size - below, np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = moment[:-1] / below - (moment[-1] - moment[:-1]) / above
    variance = np.nan_to_num(below * above * apart**2)
    return float(edges[1:-1][variance.argmax()] if heat.min() < heat.max() else heat.max())


def iou(marked: np.ndarray, place: np.ndarray) -> float:
    """Intersection over union of two masks; 0 if nothing is marked."""
    union = (marked | place).sum()
    return float((marked & place).sum() / union) if union else float("nan")


def iou_curve(heat: np.ndarray, place: np.ndarray) -> np.ndarray:
    """IoU of a place and a map without negative values, cut at each of THRESHOLDS."""
    share = heat / max(heat.max(), 1e-12)
    return np.array([iou(share >= threshold, place) for threshold in THRESHOLDS])


def localisation(heat: np.ndarray, place: np.ndarray) -> dict[str, float]:
    """How well a map without negative values finds a place: average precision and AUROC over
    pixels, pointing game, share of its sum inside, IoU at Otsu's threshold."""
    return {
        "ap": average_precision(heat, place),
        "auroc": metrics.auroc(heat.ravel(), place.ravel()),
        "pointing": pointing(heat, place),
        "mass": float(heat[place].sum() / max(heat.sum(), 1e-12)),
        "iou_otsu": iou(heat > otsu(heat), place),
    }


@torch.no_grad()
def deletion_insertion(
    classifier: nn.Module, x: Tensor, heat: Tensor, baseline: Tensor
) -> tuple[float, float]:
    """Deletion and insertion (Petsiuk et al. 2018): the area under P(disease) while the pixels of
    `x` are replaced by those of `baseline` (deletion) or the reverse (insertion), in the order of
    the map, its highest values first.

    A true map has a low deletion, because the disease is soon gone, and a high insertion. The area
    uses 17 shares of the pixels from 0 to 1. The order of equal values is random but always the
    same. x, baseline: [1, 1, R, R] in [-1, 1]; heat: [R, R].
    """
    chance = torch.randperm(heat.numel(), generator=rng(0)).to(x.device)
    order = chance[heat.flatten()[chance].argsort(descending=True, stable=True)]
    shares = torch.linspace(0, 1, SHARES + 1, device=x.device)
    taken = _taken(order, shares).view(-1, *x.shape[1:])  # [S, 1, R, R]
    steps = torch.cat([torch.where(taken, baseline, x), torch.where(taken, x, baseline)])
    deletion, insertion = classifier(steps).sigmoid().chunk(2)
    return torch.trapezoid(deletion, shares).item(), torch.trapezoid(insertion, shares).item()


@torch.no_grad()
def cout(classifier: nn.Module, x: Tensor, y: Tensor, diseased: bool) -> float:
    """The counterfactual transition score (Khorram & Fuxin 2022, section 4), -1 to 1: the area under
    the probability of the counterfactual's class minus that of the image's, while the pixels of `x`
    become those of `y`, the ones that differ most first, in 16 shares.

    x, y: image and counterfactual, [1, 1, R, R]; diseased: the classifier's verdict on `x`.
    """
    order = (x - y).abs().flatten().argsort(descending=True, stable=True)
    shares = torch.linspace(0, 1, SHARES + 1, device=x.device)
    taken = _taken(order, shares).view(-1, *x.shape[1:])
    probability = classifier(torch.where(taken, y, x)).sigmoid()
    area = 2 * torch.trapezoid(probability, shares).item() - 1
    return -area if diseased else area


def _taken(order: Tensor, shares: Tensor) -> Tensor:
    """Which pixels [S, P] are among the first of each share [S], in an order [P] of them."""
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return rank < (shares * len(order))[:, None]


def randomised(classifier: nn.Module, stage: int, seed: int = 0) -> nn.Module:
    """The classifier after a stage of the cascading randomisation (Adebayo et al. 2018). Stage 1
    randomises the last layer alone, each later stage more layers before it, stage STAGES all.

    The weights of a layer are shuffled within each of its tensors instead of drawn again. This
    removes what was learnt and keeps the logit's scale. Layers are in the order of `modules()`.
    """
    network, random = copy.deepcopy(classifier), rng(seed, stage)
    layers = [m for m in network.modules() if next(m.parameters(recurse=False), None) is not None]
    count = 1 + round((len(layers) - 1) * (stage - 1) / (STAGES - 1))
    for layer in layers[::-1][:count]:
        for weight in layer.parameters(recurse=False):
            order = torch.randperm(weight.numel(), generator=random).to(weight.device)
            weight.data.copy_(weight.data.flatten()[order].view(weight.shape))
    return network


def trivial_maps(x: Tensor, seed: int) -> dict[str, Tensor]:
    """Maps that ask no classifier, [R, R] each: a Gaussian at the centre (sigma R / 6), the
    magnitude of the image's gradient, and noise. x: [1, 1, R, R]."""
    size = x.shape[-1]
    ramp = torch.linspace(-3, 3, size, device=x.device)
    bell = (-ramp.square() / 2).exp()
    down, across = torch.gradient(x[0, 0])
    return {
        "centre": bell[:, None] * bell,
        "edges": torch.hypot(down, across),
        "random": torch.rand(size, size, generator=rng(seed)).to(x.device),
    }


def ssim_where(x: Tensor, y: Tensor, kept: Tensor) -> float:
    """The mean SSIM (see `metrics.ssim`) of two images over the windows whose middle pixel is in
    `kept`. NaN if there is no such window.

    The windows lie on a grid of R / 32 pixels. x, y: [1, 1, R, R] in [-1, 1]; kept: bool [R, R].
    """
    stride = max(1, x.shape[-1] // 32)
    patches = [F.unfold(t, WINDOW, stride=stride)[0].T for t in (x, y)]  # [windows, 121]
    middles = slice(WINDOW // 2, x.shape[-1] - WINDOW // 2, stride)
    kept = kept[middles, middles].flatten()
    a, b = (p[kept].reshape(-1, 1, WINDOW, WINDOW) for p in patches)
    return metrics.ssim(a, b).mean().item()
