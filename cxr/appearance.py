"""How far a picture is from real radiographs of a data set, as a network sees it that neither the GAN
nor the classifier has trained: the lung finder.

A GAN that draws blotches inverts an image well and turns the verdict; only how its pictures look
tells it from a good one.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cxr import lungs

if TYPE_CHECKING:
    from cxr.datasets import Dataset

AXES = 64  # most directions in which the features' spread is known; one for each four images
MOST = 1500  # training images that are looked at
WITHIN = {"appearance": 0.99, "appearance_typical": 0.9}  # shares of held-out real images
NAMES = ("mean", "scale", "axes", "variances")


def reference(data: "Dataset") -> tuple[dict[str, Tensor], dict[str, float]]:
    """What real images look like, as buffers of a model, `appearance.*`; and the limits of `distance`
    within which 99% (`appearance`) and 90% (`appearance_typical`) of the real images lie that were
    not looked at.

    These are the validation images and, so that few of them do not set a low limit by chance, half
    of the training images as seen from the other half.
    """
    rows = np.random.default_rng(0).permutation(data.rows("train"))[:MOST]
    seen = _features(data.images, rows)
    half = len(seen) // 2
    held_out = (
        distance(_features(data.images, data.rows("val")), fit(seen)),
        distance(seen[half:], fit(seen[:half])),
    )
    limits = {
        name: max(float(d.quantile(share)) for d in held_out) for name, share in WITHIN.items()
    }
    return {f"appearance.{name}": t for name, t in fit(seen).items()}, limits


def fit(features: Tensor) -> dict[str, Tensor]:
    """A Gaussian of features [N, F]: mean and scale [F], the `axes` [K, F] of the largest spread of
    the scaled features, and the `variances` [K + 1] along each and along any other direction
    (probabilistic principal components, Tipping & Bishop 1999)."""
    mean, scale = features.mean(0), features.std(0) + 1e-4
    _, spread, axes = torch.linalg.svd((features - mean) / scale, full_matrices=False)
    count = max(1, min(AXES, len(features) // 4))
    variances = spread.square() / (len(features) - 1)
    rest = variances[count:].sum() / (features.shape[1] - count)
    variances = torch.cat([variances[:count], rest[None].clamp_min(1e-4)])
    return {"mean": mean, "scale": scale, "axes": axes[:count], "variances": variances}


def distance(features: Tensor, known: dict[str, Tensor]) -> Tensor:
    """The squared Mahalanobis distance [N] of features [N, F] from a Gaussian of `fit`, divided by
    F: 1 on average for what it was fitted to."""
    apart = (features - known["mean"]) / known["scale"]
    along = apart @ known["axes"].T  # [N, K]
    *_, rest = known["variances"]
    beyond = (apart.square().sum(1) - along.square().sum(1)).clamp_min(0)
    return ((along.square() / known["variances"][:-1]).sum(1) + beyond / rest) / apart.shape[1]


def distances(x: Tensor, buffers: dict[str, Tensor]) -> list[float] | None:
    """The distance of each image [N, 1, R, R] from real ones; None if the buffers of a model have no
    reference, as an older file's."""
    known = {name: buffers.get(f"appearance.{name}") for name in NAMES}
    if any(value is None for value in known.values()):
        return None
    return distance(lungs.features(x), known).tolist()


def shapes(buffers: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes that the buffers `appearance.*` of a model file must have, if it has any."""
    if not any(name.startswith("appearance.") for name in buffers):
        return {}
    count = len(buffers.get("appearance.axes", ()))
    sizes = (lungs.FEATURES,), (lungs.FEATURES,), (count, lungs.FEATURES), (count + 1,)
    return {f"appearance.{name}": size for name, size in zip(NAMES, sizes)}


def _features(images: np.ndarray, rows: np.ndarray) -> Tensor:
    """Of the rows of images uint8 [N, R, R], 64 at a time."""
    parts = (images[rows[first : first + 64]] for first in range(0, len(rows), 64))
    return torch.cat([lungs.features(torch.from_numpy(x)[:, None] / 127.5 - 1) for x in parts])
