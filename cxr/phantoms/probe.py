"""A reader that estimates a phantom's structure and burden from its image alone.

It is also used on generated images, for which no truth can be looked up.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from cxr.datasets import Dataset
from cxr.evaluation.measures import STRUCTURE
from cxr.phantoms.lesions import Sample

WIDTH = 0.3  # of the kernel; squared distances are divided by their mean from the mean image
RIDGE = 0.01  # weight of the penalty


@dataclass(frozen=True)
class Reader:
    """Kernel ridge regression (Gaussian kernel) from pixels to the burden and to the parameters in
    STRUCTURE, those that 32 pixels show. It is fitted on training phantoms."""

    pictures: np.ndarray  # [M, R * R], the training images, standardised
    weights: np.ndarray  # [M, 9]
    mean: np.ndarray  # [R * R], of the images in [-1, 1]
    scale: float
    offset: np.ndarray  # [9], of the parameters

    @classmethod
    def fit(cls, data: Dataset, samples: dict[str, tuple[Sample, float]]) -> "Reader":
        """Fit on the training split of phantoms. samples: their truth, by their names."""
        rows = data.rows("train")
        x = data.images[rows].reshape(len(rows), -1) / 127.5 - 1
        known = [samples[Path(data.paths[row]).stem] for row in rows]
        y = np.array([[*_structure(sample), burden] for sample, burden in known])
        mean, offset = x.mean(0), y.mean(0)
        scale = float(np.sqrt(((x - mean) ** 2).sum(1).mean()))
        x = (x - mean) / scale
        weights = np.linalg.solve(_kernel(x, x) + RIDGE * np.eye(len(x)), y - offset)
        return cls(x, weights, mean, scale, offset)

    def __call__(self, image: Tensor) -> np.ndarray:
        """The parameters [9] of one image [1, 1, R, R] in [-1, 1]."""
        x = (image.cpu().numpy().reshape(1, -1) - self.mean) / self.scale
        return (_kernel(x, self.pictures) @ self.weights + self.offset)[0]

    def columns(self, kind: str, image: Tensor) -> dict[str, float]:
        """The parameters read from an image, as columns of its row."""
        return _columns(kind, self(image))


def truth(kind: str, sample: Sample, burden: float) -> dict[str, float]:
    """The true parameters of a sample, as columns of a row."""
    return _columns(kind, [*_structure(sample), burden])


def _structure(sample: Sample) -> list[float]:
    return [getattr(sample.structure, name) for name in STRUCTURE]


def _columns(kind: str, values) -> dict[str, float]:
    return {f"raw/{kind}_{name}": float(v) for name, v in zip((*STRUCTURE, "burden"), values)}


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.exp(-WIDTH * squares)
