"""Can classifier, GAN and explanation be believed: `evaluation.json`, put together and written.

The figures of single images are in `judge`, the definitions in `scores` and `measures`.
"""

import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cxr import CxrError, UsageError, __version__, console, measures, scores
from cxr.checkpoints import Model, load_classifier, load_model
from cxr.datasets import Dataset, open_dataset
from cxr.explain import write_text
from cxr.judge import GROUP, Figures, Judge, mask_files
from cxr.monitor import draw_codes, walk
from cxr.train_cnn import classifier_metrics, to_tensor
from cxr.training import find_device

SEEN = {  # how the model's own data set was used, split by split
    "train": "it was trained on these very patients: the numbers flatter it",
    "val": "these patients chose its weights and its temperature: the numbers flatter it a little",
    "all": "it was trained on most of these patients: the numbers flatter it",
}
EXPLAINER = {"encoder", "generator"}
DRAWN = 512  # random lungs, for disentanglement
TUNED = 32  # validation images at most, for the threshold of a map
RANDOMISED = 16  # images at most, each explained once for every stage of the cascade
CHUNK = 64  # images generated at once


def evaluate(
    model: str | Path,
    data: str | Path,
    split: str = "test",
    *,
    masks: str | Path | None = None,
    lungs: str | Path | None = None,
    oracle: str | None = None,
    limit: int | None = None,
    refine: int = 60,
    seed: int = 0,
    negative: str | None = None,
    patient_pattern: str | None = None,
    device: str = "auto",
) -> dict:
    """Measure a model on a split of a data set, prepared as its training images were.

    Parameters
    ----------
    model : a model file or a shipped model's name
    data, patient_pattern : as in `open_dataset`
    masks, lungs : folders with a mask of the disease, of the lungs, called like its image
    oracle : an independently trained classifier, as `load_classifier` takes it
    limit : how many images of the split are explained, drawn by chance; by default all
    refine : steps of each inversion
    negative : the healthy class of DATA, if its classes are not called what the model's are

    Returns {part: {name: {value, low, high, n}}, "about": {...}}, fit for JSON: what is not a
    number is None. A part for which something lacks is left out, and a note in `about` says so.
    The intervals are 95% bootstraps over patients but for `generator` (see `against_reals`); n
    counts images. Raises UsageError if the data hold other classes than the model tells apart,
    CxrError for a bad model, data set or oracle.
    """
    device = find_device(device)
    loaded = load_model(model, device)
    if "classifier" not in loaded.networks:
        raise CxrError(f"{model} holds no classifier: its GAN was trained with one of your own")
    dataset = _open(loaded, data, negative, patient_pattern)
    other = load_oracle(oracle, loaded, dataset, device) if oracle else None
    places = mask_files(masks, "--masks", dataset), mask_files(lungs, "--lungs", dataset)
    numbers = {"classifier": classifier_metrics(loaded.classifier, dataset, split, device)}
    about = _about(loaded, dataset, split)
    about |= {"oracle": oracle, "feature_space": None, "seeds": {"evaluation": seed}}
    if EXPLAINER <= loaded.networks.keys():
        if hasattr(other, "features"):
            numbers["generator"] = realism(loaded, other, dataset, split, seed)
            about["feature_space"] = f"pooled features of {oracle}"
        judge = Judge(loaded, dataset, other, *places, refine, seed)
        numbers |= explained(judge, drawn_rows(dataset, split, limit, seed), split)
    about["notes"] += _gaps(numbers, loaded, other)
    return _without_nan(numbers | {"about": about})


def _open(model: Model, data: str | Path, negative: str | None, pattern: str | None) -> Dataset:
    info = model.info
    dataset = open_dataset(
        data,
        info["size"],
        info["fit"],
        negative or info["classes"][0],
        pattern,
        info.get("fold", 0),
    )
    if negative is None and dataset.classes != tuple(info["classes"]):
        raise UsageError(
            f"{data} holds {' and '.join(dataset.classes)}, the model tells "
            f"{' from '.join(info['classes'])}: if they mean the same, name the healthy class "
            "with --negative"
        )
    return dataset


def load_oracle(spec: str, model: Model, data: Dataset, device: torch.device) -> nn.Module:
    """The independent classifier; UsageError if it cannot judge this model."""
    size, classes = model.info["size"], model.info["classes"]
    other = load_classifier(spec, size, device)
    if other.info.get("size", size) != size:
        raise UsageError(
            f"--oracle sees {other.info['size']} pixels, the model {size}: train one with "
            f"--size {size}"
        )
    if other.info.get("classes", classes) != classes:
        raise UsageError(
            f"--oracle tells {' from '.join(other.info['classes'])}, the model "
            f"{' from '.join(classes)}: train one on the same data"
        )
    with torch.no_grad():
        x = to_tensor(data.images[:8], device)
        if torch.allclose(other.classifier(x), model.classifier(x)):
            raise UsageError(
                "--oracle is the model's own classifier: train another, with another preset and "
                "--seed"
            )
    return other.classifier


def drawn_rows(data: Dataset, split: str, limit: int | None, seed: int) -> np.ndarray:
    """The rows to be explained, in an order in which the classes mix."""
    return np.random.default_rng(seed).permutation(data.rows(split))[:limit]


def explained(judge: Judge, rows: np.ndarray, split: str) -> dict:
    """All parts that come from explanations, and what random lungs show."""
    if split in ("test", "train"):  # of thresholds tuned on what is measured nothing is learnt
        judge.thresholds = tuned_thresholds(judge)
    figures: list[Figures] = []
    with console.progress("explain", len(rows)) as bar:
        for first in range(0, len(rows), GROUP):
            part = rows[first : first + GROUP]
            figures += judge.judge(part)
            bar.advance(len(part))
    patients = [judge.data.patients[row] for row in rows]
    numbers = intervals(figures, patients)
    disentangled = random_lungs(judge.model, judge.seed)
    numbers["disentanglement"] = disentangled | numbers.get("disentanglement", {})
    few = rows[:RANDOMISED]
    with console.progress("randomise", len(few)) as bar:
        stages = []
        for row in few:
            stages.append(judge.randomisation(row))
            bar.advance()
    cascades = intervals(stages, patients[: len(few)]).get("randomisation", {})
    if cascades:
        numbers["randomisation"] = {name: last_stage(of) for name, of in cascades.items()}
    return numbers


def intervals(figures: Sequence[Figures], patients: Sequence[str]) -> dict:
    """The mean of each figure with its interval, nested by the figure's keys; n counts the images
    that define it, and a figure that none defines is left out."""
    numbers: dict = {}
    for key in dict.fromkeys(key for own in figures for key in own):
        values = np.array([own.get(key, np.nan) for own in figures])
        kept = np.isfinite(values)
        if kept.any():
            *parts, name = key
            inner = numbers
            for part in parts:
                inner = inner.setdefault(part, {})
            inner[name] = measures.bootstrap(np.mean, np.array(patients)[kept], values[kept])
    return numbers


def last_stage(cascade: dict[str, dict]) -> dict:
    """The correlation after full randomisation, and the means of all stages as `cascade`; None
    where a map is constant and has no ranks."""
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    stages = [cascade.get(str(stage), nothing) for stage in range(1, scores.STAGES + 1)]
    return stages[-1] | {"cascade": [stage["value"] for stage in stages]}


def tuned_thresholds(judge: Judge) -> dict[str, float]:
    """For each kind of map the share of its maximum at which the mean IoU is best, over at most 32
    validation images that have a mask; empty if none has."""
    candidates = np.flatnonzero(judge.data.splits == "val") if judge.masks else []
    rows = [row for row in candidates if judge.place(judge.masks, row) is not None][:TUNED]
    curves: dict[str, list[np.ndarray]] = {}
    with console.progress("tune", len(rows), quiet=not rows) as bar:
        for row in rows:
            for name, curve in judge.tune(row).items():
                curves.setdefault(name, []).append(curve)
            bar.advance()
    best = {name: np.mean(of, 0).argmax() for name, of in curves.items()}
    return {name: float(scores.THRESHOLDS[place]) for name, place in best.items()}


@torch.no_grad()
def random_lungs(model: Model, seed: int) -> dict[str, dict]:
    """Shares of 512 random lungs that are called healthy at dose 0, diseased at dose 1."""
    logits = []
    for first in range(0, DRAWN, CHUNK):
        codes = draw_codes(model.generator, CHUNK, seed + first)
        x = walk(model.generator, *codes, doses=(0.0, 1.0))
        logits.append(model.classifier(x.flatten(0, 1)).unflatten(0, (CHUNK, 2)))
    zero, full = torch.cat(logits).cpu().numpy().T
    each = np.arange(DRAWN)
    return {
        "healthy_at_zero": measures.bootstrap(np.mean, each, (zero < 0).astype(float)),
        "diseased_at_full": measures.bootstrap(np.mean, each, (full > 0).astype(float)),
    }


@torch.no_grad()
def realism(model: Model, oracle: nn.Module, data: Dataset, split: str, seed: int) -> dict:
    """KID and FID of random lungs from a split's images, and of its images from each other, by the
    oracle's pooled features. There are as many fakes as reals, with the doses of the reals."""
    rows, device = data.rows(split), model.generator.const.device
    reals, fakes = [], []
    for number, part in enumerate(np.array_split(rows, -(-len(rows) // CHUNK))):
        x = to_tensor(data.images[part], device)
        diseased = torch.from_numpy(data.labels[part]).to(device)
        reals.append(oracle.features(x).float())
        lungs = _lungs(model, model.dose(model.classifier(x)) * diseased, seed + number)
        fakes.append(oracle.features(lungs).float())
    kinds = torch.cat(fakes), torch.cat(reals)
    patients = np.array([data.patients[row] for row in rows])
    numbers = {}
    for name, measure in (("kid", scores.kid), ("fid", scores.fid)):
        of_fakes, of_reals = scores.against_reals(measure, *kinds, patients, seed)
        numbers |= {name: of_fakes, f"{name}_real": of_reals}
    return numbers


def _lungs(model: Model, doses: Tensor, seed: int) -> Tensor:
    """Random lungs [N, 1, R, R], one of each dose [N]."""
    w1, u, noise = draw_codes(model.generator, len(doses), seed)
    return model.generator(w1, u * doses[:, None], noise).clamp(-1, 1)


def _gaps(numbers: dict, model: Model, oracle: nn.Module | None) -> list[str]:
    """One line for each part that is left out, and why."""
    if "reconstruction" not in numbers:
        return [f"{model.path} holds no GAN: only the classifier is measured"]
    methods = numbers.get("localisation", {"difference": {}})["difference"]
    disentangled = numbers["disentanglement"]
    gaps = [
        (oracle is None, "generator and counterfactual.oracle_validity", "no --oracle is given"),
        (
            oracle is not None and "generator" not in numbers,
            "generator",
            "the oracle has no method `features`",
        ),
        (
            "outside_lung" not in numbers["counterfactual"],
            "counterfactual.outside_lung",
            "no image explained has a lung mask (--lungs)",
        ),
        (not methods, "localisation", "no image explained has a mask of its disease (--masks)"),
        (
            methods and "iou_tuned" not in methods,
            "localisation.*.iou_tuned",
            "it is tuned on other validation images that have a mask, and there are none",
        ),
        (
            "inverted_healthy" not in disentangled,
            "disentanglement.inverted_healthy",
            "no image explained is diseased",
        ),
        (
            "realism_mid" not in numbers["path"],
            "path.realism_mid",
            "the model file holds no discriminator",
        ),
        (
            "swap" not in disentangled,
            "disentanglement.swap",
            "the CNN calls all neighbouring pairs alike",
        ),
        (
            "faithfulness" not in numbers,
            "faithfulness",
            "no image explained is called diseased, or no training image healthy",
        ),
    ]
    return [f"{part} is left out: {why}" for lacks, part, why in gaps if lacks]


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
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
