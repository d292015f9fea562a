"""Statistics of classifiers and images, with 95% intervals.

`labels` [N] are 0 (negative) or 1 (positive). A measure is NaN if the data do not define it, for
example because a class has no images.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

BINS = 15
TEMPERATURES = (0.05, 20.0)
Z = 1.959964  # the 97.5% point of the normal distribution


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The probability that a positive scores above a negative; a tie counts half (Mann-Whitney).

    scores: [N], on any monotone scale. NaN if a class is missing or a score is NaN.
    """
    scores, positive = np.asarray(scores), np.asarray(labels) == 1
    pairs = positive.sum() * (~positive).sum()
    if pairs == 0 or np.isnan(scores).any():
        return float("nan")
    lowest = positive.sum() * (positive.sum() + 1) / 2
    return float((ranks(scores)[positive].sum() - lowest) / pairs)


def share(hits: np.ndarray) -> float:
    """The mean of [N] values that are 0 or 1: the share of images for which something holds."""
    return float(np.mean(hits)) if len(hits) else float("nan")


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of images classified correctly; a probability of 0.5 or more means positive."""
    return share(_called(probabilities) == (np.asarray(labels) == 1))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error of the positive class (Naeini et al. 2015; Guo et al. 2017).

    Sum over 15 bins of equal width on [0, 1] of (share of images in the bin) times |mean
    probability - share of positives|. Most papers use bins of equal width, too.
    """
    probabilities, labels = np.asarray(probabilities, float), np.asarray(labels)
    if len(labels) == 0:
        return float("nan")
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, probabilities - labels)).sum() / len(labels))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T in [0.05, 20] with the least cross-entropy of sigmoid(logit / T), or of softmax(logits
    / T) (Guo et al. 2017).

    The targets are those of Platt (1999): of K classes, an image's own gets (M + 1) / (M + K) and
    each other 1 / (M + K), where M images are of its own. With plain labels, a set without errors
    would give T = 0, which means certainty. A finite set cannot justify that. logits: [N] or [N, K]
    of the validation images, labels: [N]. Returns 1 if there are none.
    """
    logits, labels = np.asarray(logits, float), np.asarray(labels, int)
    if len(logits) == 0:
        return 1.0
    if logits.ndim == 1:
        logits = np.stack([np.zeros_like(logits), logits], 1)  # its softmax is the sigmoid
    places = logits.shape[1]
    own = np.bincount(labels, minlength=places)[labels, None]
    targets = (np.eye(places)[labels] * own + 1) / (own + places)
    coldest, hottest = np.log(TEMPERATURES)
    for _ in range(50):  # the loss is convex in 1 / T: bisect the sign of its slope
        middle = (coldest + hottest) / 2
        scaled = logits * np.exp(-middle)
        shares = np.exp(scaled - scaled.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        slope = np.sum((shares - targets) * logits)
        coldest, hottest = (coldest, middle) if slope < 0 else (middle, hottest)
    return float(np.exp((coldest + hottest) / 2))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(range^2 / mean squared error), range 2.

    x, y: [N, 1, R, R] in [-1, 1]. Returns [N]; infinite for equal images.
    """
    return 10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): 11 x 11 Gaussian window, sigma 1.5.

    K1 = 0.01, K2 = 0.03, population covariance, mean over the windows that lie wholly inside. SSIM
    is defined for intensities of at least 0, so the images are mapped to [0, 1] (data range 1).
    x, y: [N, 1, R, R] in [-1, 1], R at least 11. Returns [N], differentiable.
    """
    x, y = (x.float() + 1) / 2, (y.float() + 1) / 2
    mx, my, mxx, myy, mxy = _blur(torch.cat([x, y, x * x, y * y, x * y], 1)).unbind(1)  # [N, r, r]
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    structure = (2 * (mxy - mx * my) + c2) / (mxx - mx**2 + myy - my**2 + c2)
    return (luminance * structure).mean((1, 2))


Ends = Callable[..., tuple[float, float]]  # from value, patients, *arrays to low, high


def bootstrap(
    statistic: Callable[..., float],
    groups: Sequence,
    *arrays: np.ndarray,
    samples: int = 1000,
    seed: int = 0,
    ends: Ends | None = None,
) -> dict[str, float]:
    """A statistic with its 95% percentile interval over patients (Efron 1979, cluster bootstrap).

    Patients are drawn with replacement, each with all of its rows. statistic: a function from rows
    of the arrays to a float; a resample in which it is NaN (for example because a class is missing)
    is skipped. groups: the patient of each row, [N]; arrays: [N, ...] each. Returns value (of the
    data themselves), low, high and n, the number of rows. Without rows, all but n are NaN; of one patient alone,
    low and high are.

    If all resamples give 0, or all give 1, the bootstrap interval has no width and would claim
    certainty. Then `ends` computes the interval, by default the function for this statistic in
    ENDS. A statistic without such a function keeps the bootstrap interval.
    """
    arrays = [np.asarray(array) for array in arrays]
    _, patient, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if len(patient) == 0:
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    drawn = np.random.default_rng(seed).integers(len(counts), size=(samples, len(counts)))
    if statistic in (np.mean, share) and arrays[0].ndim == 1:  # sums of patients are enough
        sums = np.bincount(patient, arrays[0])
        values = sums[drawn].sum(1) / counts[drawn].sum(1)
    else:
        values = [statistic(*part) for part in _resamples(drawn, patient, counts, arrays)]
    values = np.array(values)[~np.isnan(values)]
    known = len(values) and len(counts) > 1  # one patient says nothing of others
    low, high = np.percentile(values, [2.5, 97.5]) if known else (np.nan, np.nan)
    value = float(statistic(*arrays))
    ends = ends or ENDS.get(statistic)
    if ends and (low == high or not known) and value in (0, 1):
        low, high = ends(value, patient, *arrays)
    return {"value": value, "low": float(low), "high": float(high), "n": len(patient)}


def _resamples(
    drawn: np.ndarray, patient: np.ndarray, counts: np.ndarray, arrays: Sequence[np.ndarray]
) -> Iterator[list[np.ndarray]]:
    """The arrays' rows of the patients in each row of `drawn`. patient: of each row of the arrays;
    counts: how many rows each has."""
    order = np.argsort(patient, kind="stable")  # the rows, sorted by patient
    starts = np.cumsum(counts) - counts  # where each patient begins in `order`
    for patients in drawn:
        size = counts[patients]
        shift = np.repeat(starts[patients] - (np.cumsum(size) - size), size)
        rows = order[shift + np.arange(size.sum())]
        yield [array[rows] for array in arrays]


def rates(called: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> dict[str, dict]:
    """Sensitivity and specificity with their intervals, each over the images and patients of its own
    class. called: bool [N], whether an image is called positive; patients: [N]."""
    right = {"sensitivity": (labels == 1, called), "specificity": (labels == 0, ~called)}
    return {
        name: bootstrap(share, patients[own], hits[own].astype(float))
        for name, (own, hits) in right.items()
    }


def share_ends(value: float, patients: np.ndarray, *arrays: np.ndarray) -> tuple[float, float]:
    """The exact 95% interval of a share of patients that is 0 or 1 (Clopper & Pearson 1934)."""
    rare = 1 - 0.025 ** (1 / len(np.unique(patients)))
    return (0.0, rare) if value == 0 else (1 - rare, 1.0)


def auroc_ends(value: float, patients: np.ndarray, *arrays: np.ndarray) -> tuple[float, float]:
    """The 95% score interval of an AUROC that is 0 or 1. The last array has the labels.

    The standard errors of the bootstrap, of DeLong (1988) and of Hanley & McNeil (1982) are all 0
    there. Newcombe (2006, Statistics in Medicine 25:559, method 5) instead asks which true AUROC A
    is still compatible with the data: |value - A| = z sqrt(V(A)), where V is the variance of Hanley
    & McNeil at A for distributions of exponential type. The numbers of positives and negatives are
    numbers of patients, not of images.
    """
    positive, negative = (len(np.unique(patients[arrays[-1] == label])) for label in (1, 0))
    more = (positive + negative) / 2 - 1
    low, high = 0.0, 1.0  # bisection for A if the value is 1; the case 0 is its mirror image
    for _ in range(60):
        middle = (low + high) / 2
        spread = 1 + more * ((1 - middle) / (2 - middle) + middle / (1 + middle))
        near = 1 - middle < Z**2 * middle * spread / (positive * negative)
        low, high = (low, middle) if near else (middle, high)
    return (low, 1.0) if value == 1 else (0.0, 1 - low)


ENDS: dict[Callable[..., float], Ends] = {
    share: share_ends,
    accuracy: share_ends,
    auroc: auroc_ends,
}


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation (Spearman 1904) with mean ranks for ties; NaN if a or b is constant."""
    return pearson(ranks(a), ranks(b))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation (Pearson 1895) of a [N] and b [N]; NaN if a or b is constant."""
    if not len(a) or (a == a[0]).all() or (b == b[0]).all():
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, from 1, as a flat array; equal values get their mean rank."""
    _, level, counts = np.unique(np.ravel(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[level.ravel()]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logit)), computed without overflow."""
    return (1 + np.tanh(logits / 2)) / 2


def _called(probabilities: np.ndarray) -> np.ndarray:
    return np.asarray(probabilities) >= 0.5


def _blur(x: Tensor) -> Tensor:
    """The Gaussian mean of every whole 11 x 11 window: [N, C, R, R] -> [N, C, R - 10, R - 10].

    It adds shifted images instead of using a convolution. A GPU would compute a convolution in TF32
    or bf16, whose rounding errors exceed the difference E[x^2] - E[x]^2.
    """
    weights = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = (weights / weights.sum()).tolist()
    for axis in (2, 3):
        length = x.shape[axis] - 10
        x = sum(weight * x.narrow(axis, i, length) for i, weight in enumerate(weights))
    return x
