"""By how much a place moves a classifier: `python benchmarks/places.py MODEL DATA`.

A band (1/8 of the image's height, 1/2 of its width: 6% of it) of each test image is replaced by the
same band of another image, of the other class or, as a control, of its own. Printed is the mean of
how far the logit moves towards the other class, over all test images and five draws.
"""

import click
import numpy as np

from cxr.checkpoints import load_model
from cxr.datasets import open_dataset
from cxr.train_cnn import predict

DRAWS = 5


@click.command(help=__doc__)
@click.argument("model")
@click.argument("data")
def main(model: str, data: str) -> None:
    held = load_model(model)
    info, R = held.info, held.info["size"]
    images = open_dataset(data, R, info["fit"], info["classes"][0], fold=info.get("fold", 0))
    rows = images.rows("test")
    x, labels = images.images[rows], images.labels[rows]
    before = predict(held.classifier, x, "cpu")
    columns = slice(R // 4, R // 4 + R // 2)
    for place, top in (
        ("upper edge", 0),
        ("centre", (R - R // 8) // 2),
        ("lower edge", R - R // 8),
    ):
        for name, other in (("other", True), ("same", False)):
            moved = []
            for seed in range(DRAWS):
                random = np.random.default_rng(seed)
                pools = [np.flatnonzero((labels != c) == other) for c in (0, 1)]
                source = np.array([random.choice(pools[label]) for label in labels])
                changed = x.copy()
                band = np.s_[:, ..., top : top + R // 8, columns]
                changed[band] = x[source][band]
                moved.append((predict(held.classifier, changed, "cpu") - before) * (1 - 2 * labels))
            print(f"{place}, from the {name} class: {np.mean(moved):.2f}")


if __name__ == "__main__":
    main()
