"""All that is random in a step of the GAN's training, drawn on the CPU from (seed, step) alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cxr import augment, datasets
from cxr.classifier import to_tensor
from cxr.datasets import Dataset
from cxr.device import rng
from cxr.networks import Generator


class Batch(NamedTuple):
    """One process's share of a step's draws; n is its batch, a multiple of 16.

    The reals are `n/2` healthy then `n/2` diseased. The fakes come in pairs of one structure:
    `n/2` of dose 0, then the same lungs and noise at a dose; half of the structures are drawn,
    half are those the encoder finds in real images.
    """

    reals: Tensor  # [n, 1, R, R]
    real_doses: Tensor  # [n]
    real_logits: Tensor  # [n], the classifier's, within the range that doses name
    z1: Tensor  # [n/4, z1]
    z2: Tensor  # [n/2, z2]
    noise: list[Tensor]  # [n/2, 1, H, W] for each layer
    noise_real: list[Tensor]  # [n/2, 1, H, W], of the reconstructions
    augment_reals: dict[str, Tensor]
    augment_fakes: dict[str, Tensor]
    augment_response: dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """What the steps draw from."""

    data: Dataset
    doses: np.ndarray  # [N], of every image
    logits: np.ndarray  # [N]
    generator: Generator  # of which only the sizes count
    batch: int  # of all processes together
    seed: int
    share: Callable[[Tensor, int], Tensor]  # `World.share`

    def draw(self, step: int, p: float) -> Batch:
        """A step's draws, the same for every process; this one's share of them, on the CPU. p: the
        probability of each of the discriminator's augmentations. Raises CxrError where a class has no
        training image."""
        share, n, random = self.share, self.batch, rng(self.seed, step)
        classes = self.data.by_class("train")
        rows = datasets.balanced_batch(classes, n, self.seed, step)
        rows = rows[np.argsort(self.data.labels[rows], kind="stable")]  # healthy, then diseased
        rows = share(torch.from_numpy(rows), 2).numpy()
        z1 = share(torch.randn(n // 4, self.generator.config.z1, generator=random), 1)
        u = F.normalize(torch.randn(n // 2, self.generator.config.z2, generator=random))
        dose = torch.rand(n // 2, generator=random)
        seen = torch.randint(len(classes[1]), (n // 4,), generator=random)
        dose.view(-1, 4)[:, 1:3] = torch.from_numpy(self.doses[classes[1]])[seen].view(-1, 2)
        changes = [
            (augment.draw(n, p, random, augment.DISCRIMINATOR), 2),
            (augment.draw(n, p, random, augment.DISCRIMINATOR), 4),
            (augment.draw(n, 0.5, random, augment.LIGHT), 4),
        ]
        drawn = self.generator.noise(n // 2, random, "cpu")
        noise = [[share(eps, k) for eps in drawn] for k in (2, 1)]
        size = self.data.images.shape[-1]
        augmentations = (
            augment.ready({k: share(v, blocks) for k, v in change.items()}, size)
            for change, blocks in changes
        )
        reals = to_tensor(self.data.images[rows])
        known = (torch.from_numpy(numbers[rows]) for numbers in (self.doses, self.logits))
        return Batch(reals, *known, z1, share(u * dose[:, None], 2), *noise, *augmentations)
