"""Differentiable augmentation of images: geometry, intensity, blur, noise and erasing.

For the classifier, it imitates the differences between hospitals. For the discriminator, it keeps a
small data set from being memorised (Karras et al. 2020, ADA): each change is applied with
probability `p`. Images are never flipped, because the heart is on one side.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranges:
    """The size of each change: the standard deviation of a normal distribution unless a comment
    says otherwise."""

    rotate: float = 0.10  # radians
    scale: float = 0.12  # of the logarithm
    aspect: float = 0.08  # of the logarithm
    shift: float = 0.05  # of the image's width
    brightness: float = 0.12  # of the range [0, 1]
    contrast: float = 0.20  # of the logarithm
    gamma: float = 0.25  # of the logarithm
    blur: float = 1.0  # largest share of the blurred image, drawn uniformly
    noise: float = 0.04  # of the range [-1, 1]
    erase: float = 0.0  # largest side of an erased box, as a share of the width


CLASSIFIER = Ranges(erase=0.35)
DISCRIMINATOR = Ranges(brightness=0.08, contrast=0.12, gamma=0.12)
LIGHT = Ranges(0.03, 0.03, 0.02, 0.03, 0.03, 0.05, 0.05, 0.5, 0.03)


def draw(n: int, p: float, rng: torch.Generator, ranges: Ranges) -> dict[str, Tensor]:
    """Random changes for `n` images, each applied with probability `p`. Tensors [n] on the CPU."""

    def normal(scale: float) -> Tensor:
        return torch.randn(n, generator=rng) * scale * chosen()

    def chosen() -> Tensor:
        return (torch.rand(n, generator=rng) < p).float()

    changes = {
        name: normal(getattr(ranges, name))
        for name in ("rotate", "scale", "aspect", "brightness", "contrast", "gamma")
    }
    changes["shift_x"], changes["shift_y"] = normal(ranges.shift), normal(ranges.shift)
    changes["blur"] = torch.rand(n, generator=rng) * ranges.blur * chosen()
    changes["noise"] = torch.rand(n, generator=rng) * 2 * ranges.noise * chosen()
    changes["seed"] = torch.randint(2**31, (n,), generator=rng)
    if ranges.erase:
        changes["erase"] = torch.rand(n, 4, generator=rng)
        changes["erase"][:, 2:] *= ranges.erase * chosen()[:, None]
    return changes


def ready(changes: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Drawn changes with the noise itself, [n, 1, size, size], in place of its strength and seed."""
    noise = _noise(size, changes["noise"], changes["seed"])
    return {k: v for k, v in changes.items() if k != "seed"} | {"noise": noise}


def apply(x: Tensor, changes: dict[str, Tensor]) -> Tensor:
    """Apply changes, as drawn or ready, to `x` [n, 1, R, R] in [-1, 1]; differentiable with respect
    to `x`. Of changes that are ready and on its device, nothing is copied and no value is read."""
    changes = ready(changes, x.shape[-1]) if "seed" in changes else changes
    c = {k: v.to(x.device) for k, v in changes.items()}
    x = move(x, c["rotate"], c["scale"], c["aspect"], c["shift_x"], c["shift_y"])
    x = shade(x, c["brightness"], c["contrast"], c["gamma"])
    x = x + c["blur"][:, None, None, None] * (blurred(x) - x)
    if "erase" in c:
        x = x * (1 - _boxes(c["erase"], x.shape[-1]))
    return x + c["noise"]


def move(x: Tensor, rotate: Tensor, scale: Tensor, aspect: Tensor, dx: Tensor, dy: Tensor):
    """Rotate (in radians), scale and stretch (by logarithms) and shift (by shares of the width)."""
    cos, sin = rotate.cos(), rotate.sin()
    a, b = (-scale - aspect).exp(), (-scale + aspect).exp()
    rows = [torch.stack([a * cos, -a * sin, 2 * dx], 1), torch.stack([b * sin, b * cos, 2 * dy], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), x.shape, align_corners=False)
    return F.grid_sample(x, grid, "bilinear", "reflection", align_corners=False)


def shade(x: Tensor, brightness: Tensor, contrast: Tensor, gamma: Tensor) -> Tensor:
    """Change the brightness (as a share of the range), contrast and gamma (by logarithms)."""
    y = ((x + 1) / 2).clamp_min(1e-4) ** gamma.exp()[:, None, None, None]
    mean = y.mean((1, 2, 3), keepdim=True)
    y = (y - mean) * contrast.exp()[:, None, None, None] + mean
    return (y + brightness[:, None, None, None]) * 2 - 1


def blurred(x: Tensor) -> Tensor:
    """Images blurred by a 5x5 binomial filter."""
    taps = _binomial(x.device)
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(F.conv2d(x, taps.view(1, 1, 1, 5)), taps.view(1, 1, 5, 1))


@cache  # what is made from Python's numbers would have to be copied to a GPU at each call
def _binomial(device: torch.device) -> Tensor:
    return torch.tensor([1.0, 4, 6, 4, 1], device=device) / 16


def _noise(size: int, strength: Tensor, seeds: Tensor) -> Tensor:
    """Gaussian noise [n, 1, size, size] for each image from its own seed, if its strength [n] is
    not 0."""
    noise = torch.zeros(len(strength), 1, size, size)
    for row in strength.nonzero()[:, 0].tolist():
        random = torch.Generator().manual_seed(int(seeds[row]))
        noise[row] = torch.randn(1, size, size, generator=random) * strength[row]
    return noise


def _boxes(erase: Tensor, size: int) -> Tensor:
    """Masks [n, 1, R, R] of boxes given as (centre x, centre y, width, height), in shares of the
    image's width."""
    grid = (torch.arange(size, device=erase.device) + 0.5) / size
    inside = [(grid - erase[:, i, None]).abs() < erase[:, i + 2, None] / 2 for i in (0, 1)]
    return (inside[1][:, None, :, None] & inside[0][:, None, None, :]).float()


class Adaptive(nn.Module):
    """Adaptive augmentation: more of it while the discriminator is too sure of the reals (Karras et
    al. 2020, ADA, section 3). aim: of the mean sign of its answers; move: of `p` in a step, to 0.8
    at most."""

    def __init__(self, aim: float, move: float):
        super().__init__()
        self.aim, self.move = aim, move
        self.register_buffer("sign", torch.zeros(()))
        self.register_buffer("p", torch.zeros(()))  # the probability of each augmentation

    @torch.no_grad()
    def see(self, sign: Tensor) -> None:
        """Take note of the mean sign of a step. Reads no value back."""
        self.sign.lerp_(sign, 0.05)
        self.p.add_((self.sign - self.aim).sign(), alpha=self.move).clamp_(0.0, 0.8)
