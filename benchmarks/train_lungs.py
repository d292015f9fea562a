"""Trains the lung finder that ships: `python benchmarks/train_lungs.py MASKS OUT`.

MASKS holds `images/` and `masks/`, files of the same names. Writes `lungs.safetensors` into OUT, in
half precision, and goes on where it stopped.
"""

import copy
import math
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cxr import augment, images
from cxr.classifier import to_tensor
from cxr.data.patients import split_of, tell_patients
from cxr.data.places import place_of
from cxr.device import rng
from cxr.evaluation.heatmaps import iou
from cxr.lungs import LungFinder, LungFinderConfig
from cxr.phantoms.lesions import phantom

SIZE, BATCH, REAL, REPORT = 128, 16, 12, 125  # REAL: of a batch; REPORT: steps
PHANTOMS, SEED = 1000, 7
RANGES = augment.Ranges(
    rotate=0.12,
    scale=0.18,
    aspect=0.10,
    shift=0.08,
    brightness=0.15,
    contrast=0.3,
    gamma=0.35,
    blur=1.0,
    noise=0.06,
    erase=0.3,
)


@click.command(help=__doc__)
@click.argument("masks", type=Path)
@click.argument("out", type=Path)
@click.option("--images", "total", default=60_000, help="That training sees.")
def main(masks: Path, out: Path, total: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    x, m, splits = real(masks)
    px, pm = synthetic()
    train = np.flatnonzero(splits == "train")
    torch.manual_seed(0)
    network = LungFinder(LungFinderConfig()).train()
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
    parts, step, steps = {"net": network, "ema": ema, "opt": optimiser}, 0, total // BATCH
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt")
        step = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    while step < steps:
        random = np.random.default_rng((0, step))
        a = random.choice(train, REAL, replace=False)
        b = random.integers(len(px), size=BATCH - REAL)
        pictures, lung = changed(
            to_tensor(np.concatenate([x[a], px[b]])),
            torch.from_numpy(np.concatenate([m[a], pm[b]]))[:, None].float(),
            rng(0, step),
        )
        rate = 2e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = rate
        loss = lung_loss(network(pictures), lung)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        kept = 0.5 ** (BATCH / min(4000, step * BATCH / 4))
        with torch.no_grad():
            for p, q in zip(ema.parameters(), network.parameters()):
                p.lerp_(q, 1 - kept)
        if step % REPORT == 0 or step == steps:
            print(step * BATCH, f"loss {loss.item():.3f}", scores(ema, x, m, splits == "val"))
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"step": step}, out / "state.tmp")
            (out / "state.tmp").rename(out / "state.pt")
    half = {name: value.half().contiguous() for name, value in ema.state_dict().items()}
    save_file(half, out / "lungs.safetensors", {"format": "pt"})
    print("test", scores(ema, x, m, splits == "test"))


def lung_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of each pixel, and what the overlap of the masks lacks (soft Dice, Milletari et
    al. 2016). logits, masks (in [0, 1]): [N, 1, R, R]."""
    found = logits.sigmoid()
    overlap = 2 * (found * masks).sum((1, 2, 3)) / (found + masks).sum((1, 2, 3)).clamp_min(1)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - overlap).mean()


def real(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 and masks bool [N, R, R], and the split of each, by patient."""
    files = sorted((folder / "images").iterdir())
    names = [path.name for path in files]
    x = [images.load(path, SIZE, "pad") for path in files]
    masks = {path.stem: folder / "masks" / path.name for path in files}
    m = [place_of(masks, path, SIZE, "pad") for path in files]
    splits = [split_of(told.patient) for told in tell_patients(names, names)]
    return np.array(x), np.array(m), np.array(splits)


def synthetic() -> tuple[np.ndarray, np.ndarray]:
    """Phantoms uint8 and their lungs bool, [N, R, R]."""
    drawn = [phantom(number, SEED, SIZE).render() for number in range(1, PHANTOMS + 1)]
    return np.array([d.image for d in drawn]), np.array([d.lung for d in drawn])


def changed(x: Tensor, m: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and masks [N, 1, R, R], both mirrored and moved; the images clouded, shaded, inverted."""
    mirrored = (torch.rand(len(x), generator=random) < 0.5)[:, None, None, None]
    x, m = (torch.where(mirrored, t.flip(3), t) for t in (x, m))
    x = (x + clouds(len(x), random) * (0.6 - x).clamp_min(0) * 1.2).clamp(-1, 1)
    c = augment.draw(len(x), 0.8, random, RANGES)
    x = augment.apply(x, c)
    moved = augment.move(
        m * 2 - 1, c["rotate"], c["scale"], c["aspect"], c["shift_x"], c["shift_y"]
    )
    inverted = (torch.rand(len(x), generator=random) < 0.05)[:, None, None, None]
    return torch.where(inverted, -x, x), ((moved + 1) / 2).clamp(0, 1)


def clouds(n: int, random: torch.Generator) -> Tensor:
    """Soft opacities [n, 1, R, R] in [0, 1], in two images of five."""
    coarse = torch.randn(n, 1, 6, 6, generator=random)
    soft = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False)
    strength, here = (torch.rand(n, 1, 1, 1, generator=random) for _ in range(2))
    return (soft - 0.5).clamp(0, 1) * strength * (here < 0.4)


@torch.no_grad()
def scores(network: LungFinder, x: np.ndarray, m: np.ndarray, rows: np.ndarray) -> str:
    found = torch.cat([network(to_tensor(one[None])) > 0 for one in x[rows]])
    values = np.array([iou(*pair) for pair in zip(found[:, 0].numpy(), m[rows])])
    return f"IoU {values.mean():.4f}, least {values.min():.4f}, n {len(values)}"


if __name__ == "__main__":
    main()
