"""Can classifier, GAN and explanation be believed: `evaluation.json`, put together and written.

Single images are judged in `cases`, heat maps in `heatmaps`, random lungs in `realism`.
"""

import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cxr import UsageError, console, metrics
from cxr.checkpoints import Model, load_classifier, load_model, with_discriminator
from cxr.classifier import classifier_metrics, predict, to_tensor
from cxr.datasets import Dataset, open_dataset
from cxr.device import find_device
from cxr.evaluation import heatmaps, plots, realism, tables
from cxr.evaluation.cases import GROUP, Figures, Judge, mask_files
from cxr.evaluation.realism import CHUNK, drawn_rows, pools, random_lungs
from cxr.explain import with_classifier
from cxr.explanation import Explanation, versions
from cxr.files import write_text
from cxr.training import interruptible

SEEN = {  # how the model's own data set was used, split by split
    "train": "it was trained on these very patients: the numbers flatter it",
    "val": "these patients chose its weights and its temperature: the numbers flatter it a little",
    "all": "it was trained on most of these patients: the numbers flatter it",
}
EXPLAINER = {"encoder", "generator"}
TUNED = 32  # validation images at most, for the threshold of a map
RANDOMISED = 16  # images at most, each explained once for every stage of the cascade
SHOWN = 6  # examples in a figure


def evaluate(
    model: str | Path,
    data: str | Path,
    split: str = "test",
    out: str | Path | None = None,
    *,
    masks: str | Path | None = None,
    lungs: str | Path | None = None,
    classifier: str | None = None,
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
    out : a folder for `evaluation.json`, its tables as `evaluation.md`, and `figures/`; by default
        nothing is written
    classifier : another classifier than the model's, or a user's own that the model was trained
        with but does not keep, as `load_classifier` takes it
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
    loaded = with_discriminator(load_model(model, device), device)
    if classifier:
        loaded = with_classifier(loaded, classifier)
        same_patients("--classifier", loaded.info.get("foreign_fold"), loaded)
    _ = loaded.classifier  # says itself what to do where it is missing
    dataset = _open(loaded, data, negative, patient_pattern)
    other = load_oracle(oracle, loaded, dataset, device) if oracle else None
    places = mask_files(masks, "--masks", dataset), mask_files(lungs, "--lungs", dataset)
    if out is not None:  # what could fail in the end is tried before the hours of explaining
        Path(out).mkdir(parents=True, exist_ok=True)
    draws = out is not None and plots.installed()
    numbers = {"classifier": classifier_metrics(loaded.classifier, dataset, split, device)}
    about = _about(loaded, dataset, split)
    about |= {"oracle": oracle, "feature_space": None, "seeds": {"evaluation": seed}}
    responses, kept = np.empty((0, 0)), {}
    if EXPLAINER <= loaded.networks.keys():
        if pools(other, dataset, device):
            numbers["generator"] = realism.realism(loaded, other, dataset, split, seed)
            about["feature_space"] = f"pooled features of {oracle}"
        judge = Judge(loaded, dataset, other, *places, refine, seed)
        rows = drawn_rows(dataset, split, limit, seed)
        of_explanations, responses, kept = explained(judge, rows, split)
        numbers |= of_explanations
        if len(responses) < len(rows):
            about["notes"].append(
                f"stopped by Ctrl-C after {len(responses)} of {len(rows)} images; no randomisation"
            )
    about["notes"] += _gaps(numbers, loaded, other)
    numbers = without_nan(numbers | {"about": about})
    if out is not None:
        write(numbers, out)
        write_text(
            Path(out) / "evaluation.md", tables.markdown(f"{dataset.name}, {split}", numbers)
        )
    if draws:
        material = _material(loaded, dataset, split, responses, kept, device)
        plots.draw(Path(out) / "figures", numbers, material)
    return numbers


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


def same_patients(option: str, fold: int | None, model: Model) -> None:
    """UsageError if a CNN of another fold was trained on the model's test patients."""
    own = model.info.get("fold", 0)
    if fold not in (None, own):
        raise UsageError(
            f"{option} was tested on fold {fold}, the model on {own}: it has seen the model's test "
            f"patients; train one with --fold {own}"
        )


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
    same_patients("--oracle", other.info.get("fold"), model)
    with torch.no_grad():
        x = to_tensor(data.images[:8], device)
        if torch.allclose(other.classifier(x), model.classifier(x)):
            raise UsageError(
                "--oracle is the model's own classifier: train another, with another preset and "
                "--seed"
            )
    return other.classifier


def explained(
    judge: Judge, rows: np.ndarray, split: str
) -> tuple[dict, np.ndarray, dict[int, Explanation]]:
    """All parts that come from explanations, and what random lungs show.

    Returns them, the logits along each path [images, F], and the first 16 explanations by row.
    Ctrl-C ends the explaining: what is there is measured, and nothing is randomised.
    """
    if split in ("test", "train"):  # of thresholds tuned on what is measured nothing is learnt
        judge.thresholds = tuned_thresholds(judge)
    figures: list[Figures] = []
    responses: list[np.ndarray] = []
    kept: dict[int, Explanation] = {}  # all others are forgotten: they are large
    with interruptible() as caught, console.progress("explain", len(rows)) as bar:
        for first in range(0, len(rows), GROUP):
            if caught and figures:
                break
            part = rows[first : first + GROUP]
            found = [judge.explain(row) for row in part]
            figures += judge.judge(part, found)
            responses += [e.logits.cpu().numpy() for e in found]
            kept |= list(zip(part, found))[: RANDOMISED - len(kept)]
            bar.advance(len(part))
    patients = [judge.data.patients[row] for row in rows[: len(figures)]]
    numbers = intervals(figures, patients)
    disentangled = random_lungs(judge.model, judge.seed, judge.oracle)
    numbers["disentanglement"] = disentangled | numbers.get("disentanglement", {})
    randomised = {} if caught else kept
    with console.progress("randomise", len(randomised)) as bar:
        stages = []
        for row, e in randomised.items():
            stages.append(judge.randomisation(e, row))
            bar.advance()
    cascades = intervals(stages, patients[: len(stages)]).get("randomisation", {})
    if cascades:
        numbers["randomisation"] = {name: last_stage(of) for name, of in cascades.items()}
    return numbers, np.array(responses), kept


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
            inner[name] = metrics.bootstrap(
                np.mean,
                np.array(patients)[kept],
                values[kept],
                shares=key[0] != "randomisation" and name != "spearman",  # correlations are none
            )
    return numbers


def last_stage(cascade: dict[str, dict]) -> dict:
    """The correlation after full randomisation, that of the magnitudes as `magnitude`, and the
    means of all stages as `cascade`; None where a map is constant and has no ranks."""
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    stages = [cascade.get(str(stage), nothing) for stage in range(1, heatmaps.STAGES + 1)]
    return stages[-1] | {
        "magnitude": cascade.get("magnitude", nothing),
        "cascade": [stage["value"] for stage in stages],
    }


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
    return {name: float(heatmaps.THRESHOLDS[place]) for name, place in best.items()}


def _gaps(numbers: dict, model: Model, oracle: nn.Module | None) -> list[str]:
    """One line for each part that is left out, and why."""
    if "reconstruction" not in numbers:
        return [f"{model.path} holds no GAN: only the classifier is measured"]
    methods = numbers.get("localisation", {"difference": {}})["difference"]
    disentangled = numbers["disentanglement"]
    gaps = [
        (oracle is None, "generator, all that begins with oracle_", "no --oracle is given"),
        (
            oracle is not None and "generator" not in numbers,
            "generator",
            "the oracle has no method `features` to [N, C]",
        ),
        (
            "outside_lung" not in numbers["counterfactual"],
            "counterfactual.outside_lung, disentanglement.outside_lung_ssim",
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
    return [f"not measured: {parts} ({why})" for lacks, parts, why in gaps if lacks]


def write(numbers: dict, out: str | Path) -> Path:
    """Write `evaluation.json` into the folder `out`, whole or not at all; returns its path."""
    path = Path(out) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(numbers, indent=1) + "\n")
    return path


def _material(
    model: Model,
    data: Dataset,
    split: str,
    responses: np.ndarray,
    kept: dict[int, Explanation],
    device: torch.device,
) -> plots.Material:
    """What the figures need beside the numbers. The examples are not chosen: they are the first
    explained of each class in turn, the healthy ones above."""
    rows = data.rows(split)
    logits = [
        predict(model.classifier, data.images[part], device)
        for part in np.array_split(rows, -(-len(rows) // CHUNK))
    ]
    groups = [[row for row in kept if data.labels[row] == label] for label in (0, 1)]
    turns = [row for pair in zip_longest(*groups) for row in pair if row is not None][:SHOWN]
    examples = [(int(data.labels[row]), kept[row]) for row in sorted(turns, key=data.labels.item)]
    named = model.info.get("logits")
    return plots.Material(
        data.classes, np.concatenate(logits), data.labels[rows], named, responses, examples
    )


def _about(model: Model, data: Dataset, split: str) -> dict:
    rows = data.rows(split)
    own = model.info["provenance"].get("data") == data.name
    return {
        "model": str(model.path),
        "classifier": model.info.get("foreign", "the model's own"),
        "data": data.name,
        "split": split,
        "classes": list(data.classes),
        "images": [int(np.sum(data.labels[rows] == label)) for label in (0, 1)],
        "patients": len({data.patients[row] for row in rows}),
        "notes": [SEEN[split]] if own and split in SEEN else [],
        "versions": versions(),
    }


def without_nan(value):
    """The same with None for every number that is none."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
