"""torchvision's ResNet-18 at 224 pixels, trained from random weights: someone else's CNN, for
docs/resnet18.md. `net` is what `--classifier benchmarks/resnet18.py:net` calls.

    python benchmarks/resnet18.py DATA OUT [--images 20000]

OUT gets resnet18.safetensors; CXRGAN_RESNET18 tells `net` where it is.
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file

from cxr import IMAGENET, adapt, augment, datasets, metrics
from cxr.classifier import predict, to_tensor
from cxr.device import half_precision, rng

SIZE, BATCH, RATE, REPORT = 224, 32, 1e-3, 128  # RATE: of AdamW; REPORT: steps


def net() -> torch.nn.Module:
    """The trained network, as a user's own file would return it."""
    module = torchvision.models.resnet18(weights=None, num_classes=1)
    module.load_state_dict(load_file(os.environ["CXRGAN_RESNET18"]))
    return adapt(module, **IMAGENET)


def main(data: str, out: Path, images: int) -> None:
    torch.manual_seed(0)
    dataset = datasets.open_dataset(data, SIZE)
    module = torchvision.models.resnet18(weights=None, num_classes=1)
    network = adapt(module.to(memory_format=torch.channels_last), **IMAGENET)
    optimiser = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
    classes, total = dataset.by_class("train"), images // BATCH
    for step in range(total):
        rows = datasets.balanced_batch(classes, BATCH, 0, step)
        changes = augment.draw(BATCH, 0.7, rng(0, step), augment.CLASSIFIER)
        x = augment.apply(to_tensor(dataset.images[rows]), changes)
        y = torch.from_numpy(dataset.labels[rows]).float()
        with half_precision(torch.device("cpu")):
            logits = network.train()(x)
        loss = F.binary_cross_entropy_with_logits(logits.float(), 0.95 * y + 0.025)
        optimiser.zero_grad()
        loss.backward()
        share = (step + 1) / total
        optimiser.param_groups[0]["lr"] = (
            RATE * min(1, 20 * share) * (1 + math.cos(math.pi * share)) / 2
        )
        optimiser.step()
        if (step + 1) % REPORT == 0 or step + 1 == total:
            print(
                f"{(step + 1) * BATCH} images, loss {loss.item():.3f}, {scores(network, dataset, 'val')}",
                flush=True,
            )
            weights = {name: value.contiguous() for name, value in module.state_dict().items()}
            save_file(weights, out / "resnet18.safetensors")
    print("test", scores(network, dataset, "test"))


def scores(network: torch.nn.Module, dataset: datasets.Dataset, split: str) -> str:
    """AUROC, accuracy and the number of images of a split, as a text."""
    labels = dataset.labels[dataset.rows(split)]
    logits = predict(network.eval(), dataset.pictures(split), "cpu")
    auroc, accuracy = metrics.auroc(logits, labels), np.mean((logits > 0) == labels)
    return f"{split} AUROC {auroc:.4f}, accuracy {accuracy:.4f}, n {len(labels)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    options = parser.parse_args()
    main(options.data, options.out, options.images)
