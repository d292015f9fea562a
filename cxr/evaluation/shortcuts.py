"""Does a classifier look at the lungs? Its AUROC without them and on them alone, and how it does by
source and by scanner, where the data name them."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from cxr import lungs, metrics
from cxr.classifier import batches
from cxr.datasets import Dataset

FEW = 20  # images: sources and scanners with fewer are put together
VERSIONS = ("", "_without_lungs", "_lungs_alone")  # of the images


@torch.no_grad()
def shortcuts(classifier: nn.Module, data: Dataset, split: str, device: torch.device) -> dict:
    """The parts `shortcut`, `source` and `scanner` of the evaluation, without those that the data
    do not define. Images in which no lungs are found are left out of the first."""
    rows = data.rows(split)
    logits, found = _answers(classifier, data, split, device)
    labels, patients = data.labels[rows], np.array([data.patients[row] for row in rows])

    def figure(statistic, version: str, inside: np.ndarray) -> dict | None:
        if version:
            inside = inside & found
        seen = labels[inside]
        whole = statistic is metrics.auroc
        if not inside.any() or (whole and seen.min() == seen.max()):
            return None
        return metrics.bootstrap(statistic, patients[inside], logits[version][inside], seen)

    everywhere = np.full(len(rows), True)
    parts = {"shortcut": {f"auroc{v}": figure(metrics.auroc, v, everywhere) for v in VERSIONS[1:]}}
    for kind, names in (("source", data.sources), ("scanner", data.scanners)):
        named = _named([names[row] for row in rows]) if names else []
        parts[kind] = {
            name: _some({f"auroc{v}": figure(metrics.auroc, v, inside) for v in VERSIONS})
            | _rates(logits[""][inside], labels[inside], patients[inside])
            for name, inside in named
        }
    return _some({part: _some(figures) for part, figures in parts.items()})


def _answers(
    classifier, data: Dataset, split: str, device
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The logits [N] of each version of the images, and whether lungs are found in them."""
    logits: dict[str, list] = {version: [] for version in VERSIONS}
    found = []
    for x in batches(data.pictures(split), device, 64):
        lung = lungs.find(x)
        found.append(lung.flatten(1).any(1))
        versions = (x, lungs.blanked(x, lung), lungs.alone(x, lung))
        for name, version in zip(VERSIONS, versions):
            logits[name].append(classifier(version).float())
    whole = {name: torch.cat(parts).cpu().numpy() for name, parts in logits.items()}
    return whole, torch.cat(found).cpu().numpy()


def _named(names: Sequence[str | None]) -> list[tuple[str, np.ndarray]]:
    """Each source, and its images, bool [N], by their number. Small ones are put together, and so are
    images whose source is not named; empty where there is one source alone."""
    counts = Counter(name for name in names if name is not None)
    large = [name for name, n in counts.most_common() if n >= FEW]
    each = [(name, np.array([n == name for n in names])) for name in large]
    unnamed = np.array([name is None for name in names])
    rest = np.array([name not in large for name in names]) & ~unnamed
    each += [(f"others ({len(counts) - len(large)})", rest), ("not named", unnamed)]
    return [(name, inside) for name, inside in each if inside.any()] if len(counts) > 1 else []


def _rates(logits: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> dict[str, dict]:
    """Sensitivity and specificity, where there is a diseased, a healthy image."""
    rates = metrics.rates(logits >= 0, labels, patients)
    return {name: rate for name, rate in rates.items() if rate["n"]}


def _some(figures: dict) -> dict:
    return {name: figure for name, figure in figures.items() if figure}
