"""Does a CNN keep to the contract? Asked on some of the user's own images, before hours are spent."""

import time

import numpy as np
import torch
from torch import Tensor, nn

from cxr import UsageError, attribution, metrics
from cxr.checkpoints import load_classifier, load_model
from cxr.classifier import predict, to_tensor
from cxr.cnn import contract, cost, own
from cxr.cnn.adapter import Resize
from cxr.data.spreadsheet import Reading
from cxr.datasets import Dataset, open_dataset
from cxr.device import prepare
from cxr.explain import default_model
from cxr.sampling import draw_codes, walk

TRIED = 8  # images that the contract is checked on
JUDGED = 200  # images that the AUROC is of, at most
ASKED = {"gradient": 430, "plain": 120}  # images in an explanation: counted on the four samples


def check_cnn(
    spec: str,
    data: str | None = None,
    size: int | None = None,
    target: str | None = None,
    classifier_input: str | None = None,
    device: str = "auto",
    **reading: str | None,
) -> dict:
    """Check a CNN on DATA, or on random lungs of the model that ships.

    Parameters are those of `load_classifier`, `reading` those of `open_dataset`; size: R, that of
    the GAN; a model file has its own, any other CNN 128 by default.

    Returns {"form": what the file is, and whether its author's code runs; "checks": {name: the line
    that says what to change, or None}; "failed": their count; "auroc": {value, low, high, n} or
    None; "numbers": {name: text}}, fit for JSON. Raises CxrError where the CNN cannot be run,
    UsageError for another size than a model file's.
    """
    device, fit = prepare(device), "crop"
    if own.is_own(spec):
        size = size or 128
        network, form = own.load(spec, size, device, target, classifier_input), own.form(spec)
    else:
        model = load_classifier(spec, size or 128, device, target, classifier_input)
        if size not in (None, model.info["size"]):
            raise UsageError(f"{spec} sees {model.info['size']} pixels: leave --size out")
        size, fit = model.info["size"], model.info.get("fit", fit)
        network, form = model.classifier, "a model file: no code"
        if "target" in model.info:  # against the rest, unless the options say otherwise
            reading = Reading(**reading).asked(model.info)
    dataset = data and open_dataset(data, size, fit, **reading)
    x = _images(dataset, size, device)
    checks, auroc, numbers = contract.breaches(network, x), None, {}
    if not any(checks.values()):
        if dataset:
            checks["the classes told apart"], auroc = _told_apart(network, dataset, device)
        numbers = _costs(network, x)
    failed = sum(line is not None for line in checks.values())
    return {"form": form, "checks": checks, "failed": failed, "auroc": auroc, "numbers": numbers}


def _images(dataset: Dataset | None, size: int, device: torch.device) -> Tensor:
    """Images [TRIED, 1, R, R] of both classes: the first of the data, else random lungs."""
    if dataset:
        rows = np.concatenate([r[: TRIED // 2] for r in dataset.by_class("all")])
        return to_tensor(dataset.images[rows], device)
    model = load_model(default_model(), device)
    with torch.no_grad():
        codes = draw_codes(model.generator, TRIED // 2, 0)
        return Resize(size)(walk(model.generator, *codes, doses=(0.0, 1.0)).flatten(0, 1))


def _told_apart(
    network: nn.Module, dataset: Dataset, device: torch.device
) -> tuple[str | None, dict]:
    """What to change where the CNN does not tell the classes apart, and its AUROC on a drawn half
    of each."""
    random = np.random.default_rng(0)
    classes = dataset.by_class("all")
    rows = np.concatenate([random.permutation(r)[: JUDGED // 2] for r in classes])
    labels, patients = dataset.labels[rows], [dataset.patients[row] for row in rows]
    scores = predict(network, dataset.images[rows], device)
    auroc = metrics.bootstrap(metrics.auroc, patients, scores, labels)
    found = f"AUROC {auroc['value']:.2f} ({auroc['low']:.2f} to {auroc['high']:.2f})"
    healthy, diseased = dataset.classes
    if auroc["high"] < 0.5:
        return f"{found}: a high logit must mean {diseased}; turn its sign or --target", auroc
    if auroc["low"] <= 0.5:
        line = f"{found}: it may not tell {diseased} from {healthy} at all; look at what its input"
        return f"{line} was in training (size, range, mean and std) and at --target", auroc
    return None, auroc


def _costs(network: nn.Module, x: Tensor) -> dict[str, str]:
    """What one explanation and each 1,000 images of a GAN's training take of the CNN's time."""
    with torch.enable_grad(), cost.counted(network) as kept:
        network(x[:1].detach().requires_grad_())
    start = time.perf_counter()
    attribution.gradient(network, x)
    with_gradient = (time.perf_counter() - start) / len(x)
    start = time.perf_counter()
    with torch.no_grad():
        network(x)
    plain = (time.perf_counter() - start) / len(x)
    explanation = ASKED["gradient"] * with_gradient + ASKED["plain"] * plain
    training = 1.5 * 1000 * with_gradient  # the fakes, and half as many reconstructions
    return {
        "memory it keeps for an image": f"{kept() / 2**20:.1f} MB",
        "its share of one explanation": f"about {explanation:.0f} s",
        "its share of train-gan": f"about {training:.0f} s for each 1,000 --images",
    }
