"""How heat maps are scored: each measure, its definition and its source.

A heat map is [R, R]; a place (a mask) is bool [R, R]. A measure that its input does not define is
NaN.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import metrics
from cxr.device import rng

SHARES = 16  # of the pixels, removed one after the other
STAGES = 5  # of the cascade
THRESHOLDS = np.arange(1, 20) / 20  # of a map's maximum, among which one is tuned
WINDOW = 11  # of SSIM


def average_precision(heat: np.ndarray, place: np.ndarray) -> float:
    """Sum over the map's levels of (gain of recall) x (precision), pixel by pixel; equal pixels
    come in together. By chance it is the share of the image that the place takes."""
    order = np.argsort(-heat, axis=None, kind="stable")
    heat, hits = heat.ravel()[order], np.cumsum(place.ravel()[order])
    last = np.append(np.flatnonzero(np.diff(heat)), heat.size - 1)  # of each level
    gains = np.diff(hits[last], prepend=0)
    return float((gains * hits[last] / (last + 1)).sum() / hits[-1]) if hits[-1] else float("nan")


def pointing(heat: np.ndarray, place: np.ndarray) -> float:
    """The pointing game (Zhang et al. 2016): 1 if the maximum lies in the place, else 0, without
    their tolerance; of several maxima the share that does."""
    return float(place[heat == heat.max()].mean())


def otsu(heat: np.ndarray) -> float:
    """The threshold above which pixels differ most from those below, between-class variance over
    256 bins (Otsu 1979); the map's maximum if it is constant."""
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
    """IoU of a map, at least 0, cut at each of THRESHOLDS of its maximum."""
    share = heat / max(heat.max(), 1e-12)
    return np.array([iou(share >= threshold, place) for threshold in THRESHOLDS])


def localisation(heat: np.ndarray, place: np.ndarray) -> dict[str, float]:
    """How well a map, at least 0, finds a place: pixel AP and AUROC, pointing game, IoU at Otsu's
    threshold."""
    return {
        "ap": average_precision(heat, place),
        "auroc": metrics.auroc(heat.ravel(), place.ravel()),
        "pointing": pointing(heat, place),
        "iou_otsu": iou(heat > otsu(heat), place),
    }


@torch.no_grad()
def deletion_insertion(
    classifier: nn.Module, x: Tensor, heat: Tensor, baseline: Tensor
) -> tuple[float, float]:
    """Deletion and insertion (Petsiuk et al. 2018): the area under P(disease) as the pixels, those
    the map ranks highest first, are taken from `x` into `baseline`'s place, or the reverse.

    A true map has a low deletion, as the disease soon is gone, and a high insertion. 17 shares of
    the pixels from 0 to 1; among equal pixels chance decides, always the same.
    x, baseline: [1, 1, R, R] in [-1, 1]; heat: [R, R].
    """
    chance = torch.randperm(heat.numel(), generator=rng(0)).to(x.device)
    order = chance[heat.flatten()[chance].argsort(descending=True, stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=x.device)
    shares = torch.linspace(0, 1, SHARES + 1, device=x.device)
    taken = (rank < (shares * len(order))[:, None]).view(-1, *x.shape[1:])  # [S, 1, R, R]
    steps = torch.cat([torch.where(taken, baseline, x), torch.where(taken, x, baseline)])
    deletion, insertion = classifier(steps).sigmoid().chunk(2)
    return torch.trapezoid(deletion, shares).item(), torch.trapezoid(insertion, shares).item()


def randomised(classifier: nn.Module, stage: int, seed: int = 0) -> nn.Module:
    """The classifier after a stage of the cascade (Adebayo et al. 2018), 1 to STAGES: 1 the last
    layer alone, then ever more layers before it, at last all.

    A layer's weights are shuffled within each of its tensors instead of drawn anew: what was
    learnt is gone, the scale of the logit is kept. Layers go by their order in `modules()`.
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
    """Maps that ask no classifier, [R, R] each: a Gaussian at the centre (sigma R / 6), the size
    of the image's gradient, noise. x: [1, 1, R, R]."""
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
    """SSIM (see `metrics.ssim`) of two images, over windows whose middle pixel is kept; NaN if
    there is none.

    The windows lie on a grid of R / 32 pixels. x, y: [1, 1, R, R] in [-1, 1]; kept: bool [R, R].
    """
    stride = max(1, x.shape[-1] // 32)
    patches = [F.unfold(t, WINDOW, stride=stride)[0].T for t in (x, y)]  # [windows, 121]
    middles = slice(WINDOW // 2, x.shape[-1] - WINDOW // 2, stride)
    kept = kept[middles, middles].flatten()
    a, b = (p[kept].reshape(-1, 1, WINDOW, WINDOW) for p in patches)
    return metrics.ssim(a, b).mean().item()
