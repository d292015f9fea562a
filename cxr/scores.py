"""What explanation and generator are scored by: each measure, its definition and its source.

A heat map is [R, R]; a place (a mask) is bool [R, R]. A measure that its input does not define is
NaN.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import measures
from cxr.training import rng

HALVINGS = 100  # of the real images, for the spread of FID and KID
SUBSET = 1000  # images at most of a kind at once there, as Binkowski et al. have it
SHARES = 16  # of the pixels, removed one after the other
STAGES = 5  # of the cascade
THRESHOLDS = np.arange(1, 20) / 20  # of a map's maximum, among which one is tuned
WINDOW = 11  # of SSIM


def fid(x: Tensor, y: Tensor) -> float:
    """Frechet inception distance (Heusel et al. 2017), here of any network's features.

    |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x^1/2 S_y S_x^1/2)^1/2), the distance of the Gaussians with
    the features' means and covariances; the bracket has the eigenvalues of S_x S_y and is
    symmetric. x: [N, C], y: [M, C]. Its bias grows as N shrinks: compare at equal N alone.
    """
    x, y = x.double(), y.double()
    s_x, s_y = torch.cov(x.T), torch.cov(y.T)  # [C, C]
    values, vectors = torch.linalg.eigh(s_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_y @ root).clamp_min(0).sqrt().sum()
    means = (x.mean(0) - y.mean(0)).square().sum()
    return (means + s_x.trace() + s_y.trace() - 2 * cross).item()


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel inception distance (Binkowski et al. 2018), here of any network's features.

    The unbiased squared maximum mean discrepancy under the kernel (a.b / C + 1)^3: 0 on average,
    and so below 0 half of the time, for one distribution. x: [N, C], y: [M, C].
    """
    x, y = x.double(), y.double()
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return (sum(within) - 2 * xy.mean()).item()


def against_reals(
    measure: Callable[[Tensor, Tensor], float],
    fakes: Tensor,
    reals: Tensor,
    patients: Sequence,
    labels: np.ndarray,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """A distance of fakes from reals, of reals from other patients' reals at equal n, and the
    ratio of the two.

    The patients of each class are halved at random 100 times: one half's images are the reference,
    the other's the floor, cut to equal n in each class, 1000 at most; the fakes are those with the
    floor's doses. The values are means over the halvings, the ratio that of the means: the mean of
    the ratios would be of those halvings whose floor is nearly 0. Low and high are the 2.5th and
    97.5th percentile, the ratio's over the mean floor. No bootstrap: an image drawn twice would
    pass for a narrower distribution.

    fakes, reals: [N, C] features, row by row of one dose; patients, labels: [N]. Returns {value,
    low, high, n} of each.
    """
    random = np.random.default_rng(seed)
    found = []
    for _ in range(HALVINGS):
        first, others = halves(np.asarray(patients), labels, random)
        n = len(first)
        reference = reals[first]
        pair = [measure(x[others], reference) if n > 1 else np.nan for x in (fakes, reals)]
        found.append((*pair, n))
    of_fakes, of_reals, sizes = np.array(found).T
    figures = []
    with np.errstate(divide="ignore", invalid="ignore"):  # of a floor that is 0
        for values in (of_fakes, of_reals, of_fakes / of_reals.mean()):
            low, high = np.percentile(values, [2.5, 97.5])
            figures.append({"value": float(values.mean()), "low": float(low), "high": float(high)})
    return tuple(figure | {"n": int(np.median(sizes))} for figure in figures)


def halves(
    patients: np.ndarray, labels: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of rows, of different patients, as many of each class in both; of larger ones 1000
    rows each by chance."""
    names, place, group = np.unique(patients, return_index=True, return_inverse=True)
    chosen = np.zeros(len(names), bool)
    for label in np.unique(labels):  # of each patient's first image
        of_class = random.permutation(np.flatnonzero(labels[place] == label))
        chosen[of_class[: len(of_class) // 2]] = True
    pairs = []
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        inside = chosen[group[rows]]
        n = min(inside.sum(), (~inside).sum())
        pairs.append([rows[inside][:n], rows[~inside][:n]])
    both = np.concatenate(pairs, 1)  # [2, n]
    return tuple(both[:, random.permutation(both.shape[1])[:SUBSET]])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation (Spearman 1904), ties sharing their mean rank; NaN if a or b is constant."""
    a, b = _ranks(a), _ranks(b)
    if not (a.std() and b.std()):
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, level, counts = np.unique(np.ravel(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[level.ravel()]


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


def iou(found: np.ndarray, place: np.ndarray) -> float:
    """Intersection over union of two masks; 0 if nothing is found."""
    union = (found | place).sum()
    return float((found & place).sum() / union) if union else float("nan")


def iou_curve(heat: np.ndarray, place: np.ndarray) -> np.ndarray:
    """IoU of a map, at least 0, cut at each of THRESHOLDS of its maximum."""
    share = heat / max(heat.max(), 1e-12)
    return np.array([iou(share >= threshold, place) for threshold in THRESHOLDS])


def localisation(heat: np.ndarray, place: np.ndarray) -> dict[str, float]:
    """How well a map, at least 0, finds a place: pixel AP and AUROC, pointing game, IoU at Otsu's
    threshold."""
    return {
        "ap": average_precision(heat, place),
        "auroc": measures.auroc(heat.ravel(), place.ravel()),
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
    """SSIM (see `measures.ssim`) of two images, over windows whose middle pixel is kept; NaN if
    there is none.

    The windows lie on a grid of R / 32 pixels. x, y: [1, 1, R, R] in [-1, 1]; kept: bool [R, R].
    """
    stride = max(1, x.shape[-1] // 32)
    patches = [F.unfold(t, WINDOW, stride=stride)[0].T for t in (x, y)]  # [windows, 121]
    middles = slice(WINDOW // 2, x.shape[-1] - WINDOW // 2, stride)
    kept = kept[middles, middles].flatten()
    a, b = (p[kept].reshape(-1, 1, WINDOW, WINDOW) for p in patches)
    return measures.ssim(a, b).mean().item()
