"""Images in the form a classifier takes, its logits, and how good it is.

A classifier is any `nn.Module` from images [N, 1, R, R] in [-1, 1] to a logit [N], in eval mode. One
of K classes answers [N, K] until a target is chosen (`checkpoints.aim`).
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import augment, metrics
from cxr.datasets import Dataset, Pictures
from cxr.device import rng
from cxr.layers import against_rest

PERTURBATIONS = ("clean", "gamma", "blur", "crop", "noise")


def batches(
    images: np.ndarray | Pictures, device: str | torch.device, size: int = 256
) -> Iterator[Tensor]:
    """Yield uint8 images [N, R, R], memory-mapped or not, as tensors of at most `size` images."""
    for first in range(0, len(images), size):
        yield to_tensor(images[first : first + size], device)


@torch.no_grad()
def predict(
    classifier: nn.Module,
    images: np.ndarray | Pictures,
    device: str | torch.device,
    change: str = "clean",
) -> np.ndarray:
    """Logits [N] or [N, K] in fp32 of uint8 images [N, R, R]. change: one of PERTURBATIONS."""
    logits = [classifier(perturb(x, change)).float() for x in batches(images, device)]
    return torch.cat(logits).cpu().numpy()


def perturb(x: Tensor, change: str) -> Tensor:
    """Images [N, 1, R, R] changed in a fixed way: gamma 0.7, a 5x5 blur, a crop to 90%, or noise
    with a standard deviation of 0.05 of the range."""
    zeros = torch.zeros(len(x), device=x.device)
    if change == "gamma":
        return augment.shade(x, zeros, zeros, zeros + math.log(0.7))
    if change == "blur":
        return augment.blurred(x)
    if change == "crop":
        return augment.move(x, zeros, zeros - math.log(0.9), zeros, zeros, zeros)
    if change == "noise":
        return x + 0.1 * torch.randn(1, *x.shape[1:], generator=rng(0)).to(x.device)
    return x


def to_tensor(images: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """uint8 [N, R, R] to float32 [N, 1, R, R] in [-1, 1]."""
    return torch.from_numpy(np.array(images)).to(device)[:, None].float() / 127.5 - 1


def classifier_metrics(
    classifier: nn.Module, data: Dataset, split: str, device: str | torch.device
) -> dict:
    """AUROC, accuracy, sensitivity, specificity and calibration error on a split, and the AUROC
    under each perturbation. Returns {name: {value, low, high, n}} with intervals over patients; of
    several classes {class: the same, against the rest}."""
    rows = data.rows(split)
    images, labels = data.pictures(split), data.labels[rows]
    patients = np.array([data.patients[row] for row in rows])
    logits = {change: predict(classifier, images, device, change) for change in PERTURBATIONS}
    if len(data.classes) == 2:
        return _numbers(logits, labels, patients)
    return {
        name: _numbers({c: odds(y, place) for c, y in logits.items()}, labels == place, patients)
        for place, name in enumerate(data.classes)
    }


def _numbers(logits: dict[str, np.ndarray], labels: np.ndarray, patients: np.ndarray) -> dict:
    def interval(statistic, scores: np.ndarray) -> dict:
        return metrics.bootstrap(statistic, patients, scores, labels)

    probabilities = metrics.sigmoid(logits["clean"])
    return {
        "auroc": interval(metrics.auroc, logits["clean"]),
        "accuracy": interval(metrics.accuracy, probabilities),
        **metrics.rates(probabilities >= 0.5, labels, patients),
        "ece": interval(metrics.calibration_error, probabilities),
    } | {f"auroc_{c}": interval(metrics.auroc, logits[c]) for c in PERTURBATIONS[1:]}


def odds(logits: np.ndarray, place: int) -> np.ndarray:
    """The log-odds [N] of one class against the rest, of logits [N, K]."""
    return against_rest(torch.from_numpy(logits), place).numpy()


def mean_auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    """The AUROC of logits [N]; of [N, K], the mean over the classes, each against the rest."""
    if logits.ndim == 1:
        return metrics.auroc(logits, labels)
    places = range(logits.shape[1])
    return float(np.mean([metrics.auroc(odds(logits, p), labels == p) for p in places]))


def metrics_by_class(info: dict) -> dict[str, dict]:
    """The classifier's metrics in a model's `info`, for each class that it tells from the rest."""
    numbers, classes = info["metrics"]["classifier"], info["classes"]
    return {classes[1]: numbers} if len(classes) == 2 else {name: numbers[name] for name in classes}


def useless(numbers: dict) -> str | None:
    """Why a classifier with these metrics cannot be worth an explanation, None if it may be. An
    interval that is missing, as of a single patient, reaches everywhere."""
    auroc = numbers["auroc"]
    low = auroc["low"]
    if low is None or not low > 0.5:  # nor if it is no number
        return f"its AUROC of {auroc['value']:.2f} may be chance: the interval reaches 0.5"
    for name in ("sensitivity", "specificity"):
        if not numbers[name]["value"] > 0:
            return f"its {name} is 0: it gives all images the same answer"
    return None


def mean_image(data: Dataset) -> Tensor:
    """The mean [1, 1, R, R] of the training images."""
    pictures = data.pictures("train")
    parts = [x.sum(0, keepdim=True) for x in batches(pictures, "cpu")]
    return torch.stack(parts).sum(0) / len(pictures)


def likeness(x: Tensor, mean: Tensor) -> Tensor:
    """Correlation [N] of images [N, 1, R, R] with the mean training image, both at 16x16 pixels. It
    is low for a CT slice, a photograph, or a radiograph that is inverted or upside down."""
    a, b = (F.adaptive_avg_pool2d(t.float(), 16).flatten(1) for t in (x, mean))
    a, b = (t - t.mean(1, keepdim=True) for t in (a, b))
    return F.cosine_similarity(a, b)


def likeness_threshold(data: Dataset, mean: Tensor) -> float:
    """The 1st percentile of the validation images' likeness."""
    parts = [likeness(x, mean) for x in batches(data.pictures("val"), "cpu")]
    return float(torch.cat(parts).quantile(0.01))


def to_uint8(x: Tensor) -> np.ndarray:
    """A tensor in [-1, 1] as a uint8 array in [0, 255], clipped and rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
