"""What else a counterfactual changes: other networks' verdicts on other findings, before and after.

A disease that is drawn with a larger heart, or as another machine would show it, changes more than it
should. The measures follow two of faces' attributes: MNAC (Rodriguez et al. 2021, arXiv 2103.10226), here
without the finding that is explained, and CD (Jeanneret et al. 2022, arXiv 2203.15636). CD is there the sum
over attributes, of an oracle's verdicts and against the correlation of labels; here there are labels of one
finding alone, so it is a mean over the other findings, of logits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cxr import UsageError, console, metrics
from cxr.checkpoints import Model, load_model
from cxr.cnn import own
from cxr.explain import same_pictures
from cxr.explanation import Explanation
from cxr.layers import against_rest

VERSIONS = (("reconstruction", ""), ("counterfactual", ""), ("counterfactual", "_overlaid"))


class Findings(nn.Module):
    """CNNs of findings, asked together: images [N, 1, R, R] in [-1, 1] to logits [N, K], one for each
    of `names`."""

    def __init__(self, networks: Sequence[nn.Module], names: Sequence[Sequence[str]]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.named = names  # of each network's answers

    @property
    def names(self) -> list[str]:
        return [name for names in self.named for name in names if name]

    def forward(self, x: Tensor) -> Tensor:
        answers = [network(x) for network in self.networks]
        kept = [y[:, [bool(name) for name in names]] for y, names in zip(answers, self.named)]
        return torch.cat(kept, 1)


class EachClass(nn.Module):
    """A model file's classifier with a logit [N, K] for each class: its log-odds against the rest;
    of two classes, for the diseased one alone."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        y = self.classifier(x)
        if y.ndim == 1:
            return y[:, None]
        return torch.stack([against_rest(y, place) for place in range(y.shape[1])], 1)


def load_findings(specs: Sequence[str], model: Model) -> Findings | None:
    """The CNNs of findings, of model files or FILE.py:FUNCTION; None without one. Answers without a
    name, and those that are called like what the model tells apart, are left out, and said to be.
    Raises UsageError where none is left, or two are called alike; CxrError for a bad CNN."""
    if not specs:
        return None
    loaded = [_load(spec, model) for spec in specs]
    explained = {name.casefold() for name in model.info["classes"]}
    given = [name for _, names in loaded for name in names]
    dropped = [name for name in given if name.casefold() in explained]
    named = [[n if n not in dropped else "" for n in names] for _, names in loaded]
    findings = Findings([network for network, _ in loaded], named)
    names = findings.names
    if not names:
        raise UsageError("--findings: they name nothing but what is explained; give other findings")
    plain = [name.casefold() for name in names]
    if twice := {name for name in names if plain.count(name.casefold()) > 1}:
        raise UsageError(
            f"--findings: {', '.join(sorted(twice))} comes twice; leave one out, or name what it is "
            "with cxrgan.adapt(module, classes=[...])"
        )
    left = f"; left out, since the model tells them apart: {', '.join(dropped)}" if dropped else ""
    left += f"; answers without a name: {given.count('')}" if "" in given else ""
    console.say(f"other findings: {', '.join(names)}{left}")
    return findings


def _load(spec: str, model: Model) -> tuple[nn.Module, list[str]]:
    """A network with an answer [N, K], and the K names."""
    if own.is_own(spec):
        return own.load_every(spec, model.info["size"], model.device)
    other = load_model(spec, model.device)
    same_pictures(f"--findings {spec}", other, model)
    classes = other.info["classes"]
    return EachClass(other.classifier), classes if len(classes) > 2 else classes[1:]


@torch.no_grad()
def answers(classifier: nn.Module, findings: Findings, e: Explanation) -> list[list[float]]:
    """The explained CNN's logit and the findings' logits [4, 1 + K] of the image, its reconstruction,
    the path's other end and its overlay."""
    frame = e.numbers["counterfactual"]["frame"]
    x = torch.stack([e.image[0], e.reconstructions[0], e.frames[frame], e.overlaid[frame]])
    return torch.cat([classifier(x)[:, None], findings(x)], 1).tolist()


def changes(names: Sequence[str], asked: Sequence, patients: Sequence[str]) -> dict[str, dict]:
    """What the `answers` [n, 4, 1 + K] to n images of these patients add to the numbers: the part
    `finding`, and figures of the parts `reconstruction` and `counterfactual`."""
    image, *others = np.array(asked, float).transpose(1, 0, 2)
    for name, column in zip(names, image.T[1:]):
        if len(image) > 1 and not np.ptp(column):
            console.warn(f"{name} is answered alike for all images: it tells nothing")
    parts: dict[str, dict] = {"finding": {name: {} for name in names}}
    for (part, kind), after in zip(VERSIONS, others):
        turned = ((image > 0) != (after > 0))[:, 1:].astype(float)  # [n, K]
        figures = parts.setdefault(part, {})
        figures[f"findings_turned{kind}"] = metrics.bootstrap(np.mean, patients, turned.sum(1))
        if part == "counterfactual":
            found = metrics.bootstrap(correlation_difference, patients, image, after - image)
            figures[f"correlation_difference{kind}"] = reflected(found)
        for name, hits in zip(names, turned.T):
            figure = metrics.bootstrap(metrics.share, patients, hits)
            parts["finding"][name][f"turned_by_{part}{kind}"] = figure
    return parts


def correlation_difference(image: np.ndarray, moved: np.ndarray) -> float:
    """How differently findings move with the explained one than they go with it in the images: over
    the findings, the mean absolute difference of the two correlations. image, moved: [n, 1 + K].
    A finding that does not vary has none, and is left out; NaN without any."""
    varied = (np.ptp(image, 0) > 0) & (np.ptp(moved, 0) > 0)  # nor if one is no number
    if not varied[0] or varied.sum() < 2:
        return float("nan")
    image, moved = (np.corrcoef(columns[:, varied].T)[0, 1:] for columns in (image, moved))
    return float(np.abs(image - moved).mean())


def reflected(figure: dict[str, float]) -> dict[str, float]:
    """A figure of at least 0 with the basic bootstrap interval (Davison & Hinkley 1997, section 5.2).
    Resamples of a mean of absolute values lie above it, so that their percentiles never reach 0."""
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    return figure | {"low": max(2 * value - high, 0.0), "high": max(2 * value - low, 0.0)}
