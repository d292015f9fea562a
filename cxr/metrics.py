"""The standard measures, each with its definition, and how sure one may be of them.

`labels` are 0 (negative) or 1 (positive), [N]. A measure that the data do not define (no image of
the class it asks about) is NaN.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

BINS = 15
TEMPERATURES = (0.05, 20.0)


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a positive scores above a negative, a tie counting half (Mann-Whitney).

    scores: [N], any monotone scale. NaN if a class is missing or a score is NaN.
    """
    scores, positive = np.asarray(scores), np.asarray(labels) == 1
    pairs = positive.sum() * (~positive).sum()
    if pairs == 0 or np.isnan(scores).any():
        return float("nan")
    _, level, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[level]  # ties share their mean rank, from 1
    lowest = positive.sum() * (positive.sum() + 1) / 2
    return float((ranks[positive].sum() - lowest) / pairs)


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of images called right; a probability of 0.5 or more calls an image positive."""
    return _mean(_called(probabilities) == (np.asarray(labels) == 1))


def sensitivity(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of the positive images called positive (probability 0.5 or more)."""
    return _mean(_called(probabilities)[np.asarray(labels) == 1])


def specificity(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of the negative images called negative (probability under 0.5)."""
    return _mean(~_called(probabilities)[np.asarray(labels) == 0])


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error of the positive class (Naeini et al. 2015; Guo et al. 2017).

    Sum over 15 bins of equal width on [0, 1] of (share of images in the bin) times |mean
    probability - share of positives|. Equal width, as in most papers, so that figures compare.
    """
    probabilities, labels = np.asarray(probabilities, float), np.asarray(labels)
    if len(labels) == 0:
        return float("nan")
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, probabilities - labels)).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T in [0.05, 20] whose sigmoid(logit / T) has the least cross-entropy (Guo et al. 2017).

    The targets are Platt's (1999), (P + 1) / (P + 2) and 1 / (M + 2) for P positives and M
    negatives: on a set without a single error plain labels would ask for T = 0, certainty that a
    finite set cannot give. logits, labels: [N] of the validation images. 1 if there are none.
    """
    logits, positive = np.asarray(logits, float), np.asarray(labels) == 1
    if len(logits) == 0:
        return 1.0
    high, low = (positive.sum() + 1) / (positive.sum() + 2), 1 / ((~positive).sum() + 2)
    targets = np.where(positive, high, low)
    coldest, hottest = np.log(TEMPERATURES)
    for _ in range(50):  # the loss is convex in 1 / T: bisect the sign of its slope
        middle = (coldest + hottest) / 2
        scaled = logits * np.exp(-middle)
        slope = np.sum((_sigmoid(scaled) - targets) * logits)
        coldest, hottest = (coldest, middle) if slope < 0 else (middle, hottest)
    return float(np.exp((coldest + hottest) / 2))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(range^2 / mean squared error), range 2.

    x, y: [N, 1, R, R] in [-1, 1]. Returns [N]; infinite for equal images.
    """
    return 10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): 11 x 11 Gaussian window, sigma 1.5.

    K1 = 0.01, K2 = 0.03, population covariance, mean over the windows that lie wholly inside. The
    measure is meant for intensities from zero, so the images are moved to [0, 1], data range 1.
    x, y: [N, 1, R, R] in [-1, 1], R at least 11. Returns [N], differentiable.
    """
    x, y = (x.float() + 1) / 2, (y.float() + 1) / 2
    mx, my, mxx, myy, mxy = _blur(torch.cat([x, y, x * x, y * y, x * y], 1)).unbind(1)  # [N, r, r]
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    structure = (2 * (mxy - mx * my) + c2) / (mxx - mx**2 + myy - my**2 + c2)
    return (luminance * structure).mean((1, 2))


def bootstrap(
    statistic: Callable[..., float],
    groups: Sequence,
    *arrays: np.ndarray,
    samples: int = 1000,
    seed: int = 0,
    shares: bool = True,
) -> dict[str, float]:
    """A statistic with its 95% percentile interval over patients (Efron 1979, cluster bootstrap).

    Patients are drawn with replacement, each with all of its rows. statistic: from the arrays' rows
    to a float; a resample where it is NaN (say, for want of a class) is skipped. groups: the
    patient of each row, [N]; arrays: [N, ...] each. Returns value (of the data themselves), low,
    high and n, the number of rows; all NaN but n if there is none. Where every resample gives 0 or
    every one 1, the other end is the exact one of a share of the patients (Clopper & Pearson 1934),
    unless `shares` is False.
    """
    arrays = [np.asarray(array) for array in arrays]
    _, patient, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if len(patient) == 0:
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    order = np.argsort(patient, kind="stable")  # rows, patient after patient
    starts = np.cumsum(counts) - counts  # where in it each patient begins
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(samples):
        drawn = rng.integers(len(counts), size=len(counts))
        size = counts[drawn]
        shift = np.repeat(starts[drawn] - (np.cumsum(size) - size), size)
        rows = order[shift + np.arange(size.sum())]
        values.append(statistic(*(array[rows] for array in arrays)))
    values = np.array(values)[~np.isnan(values)]
    low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (np.nan, np.nan)
    value = float(statistic(*arrays))
    if shares and low == high and value in (0, 1):
        rare = 1 - 0.025 ** (1 / len(counts))
        low, high = (0.0, rare) if value == 0 else (1 - rare, 1.0)
    return {"value": value, "low": float(low), "high": float(high), "n": len(patient)}


def _called(probabilities: np.ndarray) -> np.ndarray:
    return np.asarray(probabilities) >= 0.5


def _mean(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(logits / 2)) / 2  # does not overflow


def _blur(x: Tensor) -> Tensor:
    """The Gaussian mean of every whole 11 x 11 window: [N, C, R, R] -> [N, C, R - 10, R - 10].

    Sums of shifted images, not a convolution: a GPU would run that in TF32 or bf16, whose rounding
    drowns the difference E[x^2] - E[x]^2.
    """
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = (weights / weights.sum()).tolist()
    for axis in (2, 3):
        length = x.shape[axis] - 10
        x = sum(weight * x.narrow(axis, i, length) for i, weight in enumerate(weights))
    return x


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation (Spearman 1904), ties sharing their mean rank; NaN if a or b is constant."""
    a, b = _ranks(a), _ranks(b)
    if not (a.std() and b.std()):
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, level, counts = np.unique(np.ravel(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[level.ravel()]
