"""Where the lungs are: a small network that marks them in a chest X-ray, healthy or diseased.

It ships as `weights/lungs.safetensors`; its card says how it was trained and how well it marks.
"""

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cxr import CxrError, weights_folder
from cxr.norm import NormReLU

LEAST = 0.04  # share of an image: what is smaller are no lungs
SURE = 0.925  # mean probability of the marked pixels: radiographs have 0.94 and more
STRAY = 0.005  # share of the marked pixels on each side that a box leaves out: specks
MARGIN = 0.08  # around the lungs' box, as a share of its longer side
SOFT = 1 / 32  # of the image's side: how far `within` fades out beyond the lungs


@dataclass(frozen=True)
class LungFinderConfig:
    size: int = 128  # pixels a side that the network works at, whatever the image's size
    channels: tuple[int, ...] = (16, 24, 40, 64, 96)  # one stage each, each at half the size


FEATURES = 2 * sum(LungFinderConfig.channels)


class LungFinder(nn.Module):
    """A U-Net (Ronneberger et al. 2015) from chest X-rays to the logit of each pixel being lung.

    Each image is brought to zero mean and unit variance first, so that exposure says nothing.
    """

    def __init__(self, config: LungFinderConfig):
        super().__init__()
        self.config, channels = config, config.channels
        self.stem = nn.Conv2d(1, channels[0], 3, padding=1)
        self.down = nn.ModuleList(map(Stage, (channels[0], *channels), channels))
        pairs = itertools.pairwise(channels)
        self.up = nn.ModuleList(Stage(fine + coarse, fine) for fine, coarse in pairs)
        self.head = nn.Conv2d(channels[0], 1, 1)

    def stages(self, x: Tensor) -> list[Tensor]:
        """What the encoder's stages see in images [N, 1, H, W]: [N, channels[n], S / 2^n, S / 2^n]."""
        size = (self.config.size,) * 2
        small = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = small.mean((1, 2, 3), keepdim=True), small.std((1, 2, 3), keepdim=True)
        h, kept = self.stem((small - mean) / (std + 1e-3)), []
        for number, stage in enumerate(self.down):
            h = stage(F.avg_pool2d(h, 2) if number else h)
            kept.append(h)
        return kept

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, H, W], any scale of grey, to logits [N, 1, H, W]."""
        *kept, h = self.stages(x)
        for stage, finer in zip(reversed(self.up), reversed(kept)):
            h = F.interpolate(h, scale_factor=2, mode="nearest")
            h = stage(torch.cat([finer, h], 1))
        logits = self.head(h)  # [N, 1, S, S]
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)


class Stage(nn.Sequential):
    """Two normalised 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int):
        layers = {  # by the names in the file that ships
            "0": nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            "1": NormReLU(outputs),
            "3": nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            "4": NormReLU(outputs),
        }
        super().__init__(OrderedDict(layers))


@lru_cache
def finder(device: torch.device) -> LungFinder:
    """The lung finder that ships, frozen. Raises CxrError if this copy is without it."""
    path = weights_folder() / "lungs.safetensors"
    if not path.is_file():
        raise CxrError(f"{path.name} does not ship with this copy: the lungs cannot be found")
    network = LungFinder(LungFinderConfig())
    network.load_state_dict({key: t.float() for key, t in load_file(path).items()})
    return network.to(device).eval().requires_grad_(False)


@torch.no_grad()
def find(x: Tensor) -> Tensor:
    """The lungs, bool [N, 1, R, R], of images [N, 1, R, R]. Nothing is marked in an image where less
    than 4% would be, or where the network is not sure, as in a picture of something else."""
    chance = torch.cat([finder(x.device)(part.float()) for part in x.split(32)]).sigmoid()
    marked = chance > 0.5
    area = marked.float().mean((1, 2, 3), keepdim=True)
    sure = (chance * marked).mean((1, 2, 3), keepdim=True) / area.clamp_min(1e-6)
    return marked & (area >= LEAST) & (sure >= SURE)


@torch.no_grad()
def features(x: Tensor) -> Tensor:
    """What images [N, 1, R, R] look like to the lung finder: the mean and the standard deviation of
    each channel of its encoder, [N, FEATURES]."""
    parts = []
    for part in x.split(32):
        stages = finder(x.device).stages(part.float())
        parts.append(torch.cat([t for h in stages for t in (h.mean((2, 3)), h.std((2, 3)))], 1))
    return torch.cat(parts)


def extent(lung: Tensor) -> list[tuple[int, int]]:
    """The first row of the lungs of one image and the one after their last, and the same of the
    columns; specks are left out. lung: bool [H, W]. Raises CxrError where nothing is marked."""
    if not lung.any():
        raise CxrError("no lungs are found in it")
    ends = []
    for axis in (1, 0):
        share = lung.sum(axis).cumsum(0) / lung.sum()
        ends.append((int((share < STRAY).sum()), int((share < 1 - STRAY).sum()) + 1))
    return ends


def box(lung: Tensor) -> tuple[int, int, int]:
    """The square around the lungs of one image, (top, left, side) in pixels, with a margin of 8% of
    the lungs' longer side; moved, or else made smaller, to lie inside the image.

    lung: bool [H, W]. Raises CxrError where nothing is marked.
    """
    ends = extent(lung)
    longer = max(last - first for first, last in ends)
    side = min(round(longer * (1 + 2 * MARGIN)), *lung.shape)
    middles = ((first + last - side) // 2 for first, last in ends)
    top, left = (min(max(m, 0), whole - side) for m, whole in zip(middles, lung.shape))
    return top, left, side


def blanked(x: Tensor, lung: Tensor) -> Tensor:
    """Images [N, 1, R, R] with the rectangle around the lungs, and 8% beyond, in a middle grey:
    whatever a classifier still tells, it does not tell from the lungs, nor from their outline.
    lung: bool [N, 1, R, R]; an image in which none are marked stays as it is."""
    x = x.clone()
    for image, marked in zip(x, lung[:, 0]):
        if marked.any():
            rows, columns = extent(marked)
            room = round(MARGIN * max(last - first for first, last in (rows, columns)))
            place = [slice(max(first - room, 0), last + room) for first, last in (rows, columns)]
            image[0][tuple(place)] = 0.0
    return x


def alone(x: Tensor, lung: Tensor) -> Tensor:
    """Images [N, 1, R, R] of the lungs alone: all that is not `around` them is in a middle grey."""
    return around(lung) * x


def around(lung: Tensor) -> Tensor:
    """Where an explanation may change an image: 1 in the lungs [N, 1, R, R], fading to 0 within R /
    16 pixels beyond them; all of an image in which none are marked."""
    reach = max(1, round(lung.shape[-1] * SOFT))
    wide = F.max_pool2d(lung.float(), 2 * reach + 1, 1, reach)
    soft = F.avg_pool2d(F.pad(wide, (reach,) * 4, mode="replicate"), 2 * reach + 1, 1)
    any_lung = lung.flatten(1).any(1).view(-1, 1, 1, 1)
    return torch.where(any_lung, soft, torch.ones_like(soft))
