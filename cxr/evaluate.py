"""How good is the classifier: the numbers of `evaluation.json` and what they are numbers of."""

import json
import math
import platform
from pathlib import Path

import numpy as np
import torch

from cxr import CxrError, UsageError, __version__
from cxr.checkpoints import Model, load_model
from cxr.datasets import Dataset, open_dataset
from cxr.explain import write_text
from cxr.train_cnn import classifier_metrics
from cxr.training import find_device

SEEN = {  # how the model's own data set was used, split by split
    "train": "it was trained on these very patients: the numbers flatter it",
    "val": "these patients chose its weights and its temperature: the numbers flatter it a little",
    "all": "it was trained on most of these patients: the numbers flatter it",
}


def evaluate(
    model: str | Path,
    data: str | Path,
    split: str = "test",
    *,
    negative: str | None = None,
    patient_pattern: str | None = None,
    device: str = "auto",
) -> dict:
    """Measure a model's classifier on a split of a data set, prepared as its training images were.

    model: a model file or a shipped model's name; data, patient_pattern: as in `open_dataset`.
    negative: the healthy class of DATA, if its classes are not called what the model's are.

    Returns {"classifier": {name: {value, low, high, n}}, "about": {...}}, fit for JSON: what is
    not a number is None. The intervals are 95% bootstraps over patients, n counts images. Raises UsageError if
    the data hold other classes than the model tells apart, CxrError for a bad model or data set.
    """
    device = find_device(device)
    loaded = load_model(model, device)
    if "classifier" not in loaded.networks:
        raise CxrError(f"{model} holds no classifier: its GAN was trained with one of your own")
    info = loaded.info
    dataset = open_dataset(
        data, info["size"], info["fit"], negative or info["classes"][0], patient_pattern
    )
    if negative is None and dataset.classes != tuple(info["classes"]):
        raise UsageError(
            f"{data} holds {' and '.join(dataset.classes)}, the model tells "
            f"{' from '.join(info['classes'])}: if they mean the same, name the healthy class "
            "with --negative"
        )
    numbers = {
        "classifier": classifier_metrics(loaded.classifier, dataset, split, device),
        "about": _about(loaded, dataset, split),
    }
    return _without_nan(numbers)


def write(numbers: dict, out: str | Path) -> Path:
    """Write `evaluation.json` into the folder `out`, whole or not at all; returns its path."""
    path = Path(out) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(numbers, indent=1) + "\n")
    return path


def _about(model: Model, data: Dataset, split: str) -> dict:
    rows = data.rows(split)
    own = model.info["provenance"].get("data") == data.name
    return {
        "model": str(model.path),
        "data": data.name,
        "split": split,
        "classes": list(data.classes),
        "images": [int(np.sum(data.labels[rows] == label)) for label in (0, 1)],
        "patients": len({data.patients[row] for row in rows}),
        "notes": [SEEN[split]] if own and split in SEEN else [],
        "versions": {
            "cxrgan": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
