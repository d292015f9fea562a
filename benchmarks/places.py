"""How far a place in the image moves a classifier: `python benchmarks/places.py MODEL DATA`.

A band (1/8 of the image's height, 1/2 of its width: 6% of the image) of each test image is replaced
by the same band of another image, of the other class or, as a control, of the same class. Prints
means of five draws over all test images: how far the logit moves towards the other class, the share
of verdicts that flip, and the AUROC that remains.
"""

import click
import numpy as np

from cxr.checkpoints import load_model
from cxr.classifier import predict
from cxr.datasets import open_dataset
from cxr.metrics import auroc

DRAWS = 5


@click.command(help=__doc__)
@click.argument("model")
@click.argument("data")
def main(model: str, data: str) -> None:
    held = load_model(model)
    R, info = held.info["size"], held.info
    images = open_dataset(data, R, info["fit"], info["classes"][0], fold=info.get("fold", 0))
    rows = images.rows("test")
    x, labels = images.images[rows], images.labels[rows]
    before = predict(held.classifier, x, "cpu")
    print(f"as they are: AUROC {auroc(before, labels):.3f}")
    columns = slice(R // 4, R // 4 + R // 2)
    for place, top in (
        ("upper edge", 0),
        ("centre", (R - R // 8) // 2),
        ("lower edge", R - R // 8),
    ):
        band = np.s_[:, ..., top : top + R // 8, columns]
        for kind, other in (("the other", True), ("the same", False)):
            results = []
            for seed in range(DRAWS):
                changed = x.copy()
                changed[band] = x[sources(labels, other, seed)][band]
                logits = predict(held.classifier, changed, "cpu")
                moved = (logits - before) * (1 - 2 * labels)
                flips = (logits > 0) != (before > 0)
                results.append((moved.mean(), flips.mean(), auroc(logits, labels)))
            moved, flips, area = np.mean(results, 0)
            print(
                f"{place}, from {kind} class: {moved:.2f}, {flips:.3f} flip, AUROC {area:.3f}",
                flush=True,
            )


def sources(labels: np.ndarray, other: bool, seed: int) -> np.ndarray:
    """For each image, the row of another image of the other class or of the same class."""
    random = np.random.default_rng(seed)
    everyone = np.arange(len(labels))
    return np.array(
        [
            random.choice(everyone[((labels != c) == other) & (everyone != i)])
            for i, c in enumerate(labels)
        ]
    )


if __name__ == "__main__":
    main()
