"""Random lungs and reconstructions of a generator: drawn, measured, and shown on a sheet."""

import statistics

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cxr import appearance, film, metrics
from cxr.checkpoints import Model
from cxr.classifier import to_uint8
from cxr.device import rng
from cxr.networks import Generator

DOSES = (0.0, 0.25, 0.5, 0.75, 1.0)
HEADS = tuple(f"disease {dose:g}" for dose in DOSES)  # of a sheet's columns


def draw_codes(G: Generator, n: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Random codes: structures `w1` [n, layers, w], directions `u` [n, z2] of disease, and noise,
    [n, 1, H, W] per layer."""
    random, device = rng(seed, 0), G.const.device
    z1 = torch.randn(n, G.config.z1, generator=random).to(device)
    u = F.normalize(torch.randn(n, G.config.z2, generator=random)).to(device)
    return G.M1(z1), u, G.noise(n, random)


def walk(G: Generator, w1: Tensor, u: Tensor, noise: list[Tensor], doses=DOSES) -> Tensor:
    """Images [n, doses, 1, R, R] in [-1, 1]: each structure with the same noise at every dose."""
    return torch.stack([G(w1, u * dose, noise).clamp(-1, 1) for dose in doses], 1)


@torch.no_grad()
def measure_fakes(model: Model, n: int = 64, seed: int = 0) -> dict[str, float]:
    """What the classifier says of `n` random lungs along their paths.

    The share of lungs called healthy at dose 0 and of those called diseased at dose 1; the share of
    steps from one dose to the next at which the logit rises; the median distance between the logit
    that a dose names and the classifier's logit; `spread`, the standard deviation of the lungs at
    dose 0 and dose 1 across structures; and `appearance`, how far they are from real images: the
    largest median over the doses, if the model has the reference.
    """
    x = walk(model.generator, *draw_codes(model.generator, n, seed))
    logits = torch.stack([model.classifier(x[:, i]) for i in range(x.shape[1])], 1)  # [n, doses]
    named = model.logit(torch.tensor(DOSES, device=logits.device))
    far = [appearance.distances(x[:, i], model.buffers) for i in range(x.shape[1])]
    real = {} if None in far else {"appearance": max(map(statistics.median, far))}
    return real | {
        "healthy_at_zero": (logits[:, 0] < 0).float().mean().item(),
        "diseased_at_full": (logits[:, -1] > 0).float().mean().item(),
        "rising": (logits.diff(dim=1) > 0).float().mean().item(),
        "logit_gap": (logits - named).abs().median().item(),
        "spread": x[:, [0, -1]].std(0).mean().item(),
    }


@torch.no_grad()
def measure_inversions(model: Model, x: Tensor, labels: Tensor) -> dict[str, float]:
    """How well the encoder alone inverts real images [N, 1, R, R]: the median and the 5th
    percentile of SSIM, the median probability gap, and the share of diseased images that the
    classifier calls healthy when their `z2` is set to zero."""
    w1, z2 = model.encoder(x)
    noise = model.generator.noise(len(x), rng(1))
    reconstruction = model.generator(w1, z2, noise).clamp(-1, 1)
    healthy = model.generator(w1, torch.zeros_like(z2), noise).clamp(-1, 1)[labels == 1]
    gap = model.classifier(reconstruction).sigmoid() - model.classifier(x).sigmoid()
    ssim = metrics.ssim(x, reconstruction)
    return {
        "ssim": ssim.median().item(),
        "ssim_low": ssim.quantile(0.05).item(),
        "probability_gap": gap.abs().median().item(),
        "inverted_healthy": (model.classifier(healthy) < 0).float().mean().item(),
    }


@torch.no_grad()
def sheet(model: Model, originals: Tensor, seed: int = 0) -> np.ndarray:
    """A sheet uint8 [H, W, 3] with a row for each of `originals` [n, 1, R, R]: a random structure at
    all doses, then the original, its reconstruction, and the reconstruction at dose 0."""
    drawn = walk(model.generator, *draw_codes(model.generator, len(originals), seed))
    w1, z2 = model.encoder(originals)
    noise = model.generator.noise(len(originals), rng(1))
    parts = [originals] + [model.generator(w1, z, noise) for z in (z2, torch.zeros_like(z2))]
    rows = torch.cat([drawn, torch.stack(parts, 1)], 1)[:, :, 0]  # [n, doses + 3, R, R]
    return film.grid(
        to_uint8(rows), [*HEADS, "a real image", "drawn by the GAN", "drawn, disease 0"]
    )


@torch.no_grad()
def lungs(G: Generator, images: int, seed: int) -> np.ndarray:
    """Random lungs, each at every one of `DOSES`: uint8 [images, len(DOSES), R, R]."""
    return to_uint8(walk(G, *draw_codes(G, images, seed))[:, :, 0])
