"""The inputs of an evaluation: options, model, data, independent classifier, masks."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cxr import UsageError
from cxr.checkpoints import Model, load_model, with_discriminator
from cxr.classifier import to_tensor
from cxr.cnn.own import is_own
from cxr.data.places import Places, find_places, mask_files
from cxr.data.spreadsheet import Reading
from cxr.datasets import Dataset, left_out, open_dataset
from cxr.device import prepare
from cxr.evaluation import journal
from cxr.evaluation.findings import Findings, load_findings
from cxr.explain import second_classifier, with_classifier
from cxr.explanation import versions


@dataclass(frozen=True)
class Options(Reading):
    """How to evaluate, and how the data are read: `negative` or `positive`, if its classes are not
    called what the model's are.

    masks, lungs : folders with a mask of the disease, of the lungs, called like its image
    boxes : in place of masks, a table of boxes around the disease, as `boxes_of` takes it
    classifier : another classifier than the model's, or a user's own that the model was trained
        with but does not keep, as `load_classifier` takes it
    target, classifier_input : of a classifier of one's own, as `load_classifier` takes them
    oracle : an independently trained classifier, as `load_classifier` takes it
    findings : CNNs of other findings, as `load_findings` takes them
    limit : how many images of the split are explained, drawn by chance; by default all
    refine, within : as of `explain`
    resume : go on with the evaluation in the folder
    """

    masks: str | Path | None = None
    boxes: str | Path | None = None
    lungs: str | Path | None = None
    classifier: str | None = None
    target: str | None = None
    classifier_input: str | None = None
    oracle: str | None = None
    findings: tuple[str, ...] = ()
    limit: int | None = None
    refine: int = 60
    within: str | None = None
    seed: int = 0
    device: str = "auto"
    resume: bool = False


@dataclass(frozen=True)
class Inputs:
    """All inputs, opened before anything is measured."""

    model: Model
    data: Dataset
    oracle: nn.Module | None  # the independent classifier
    findings: Findings | None  # others than the one explained
    masks: Places  # of the disease
    lungs: Places
    device: torch.device

    def subject(self, split: str, options: Options) -> dict:
        """A description of what is evaluated. Results of two subjects must not be mixed."""
        return {
            "model": [
                journal.network_digest(*self.model.networks.values()),
                json.dumps(self.model.info, sort_keys=True, default=str),
            ],
            "classifier": _source(options.classifier),
            "target": options.target,
            "classifier input": options.classifier_input,
            "independent classifier": None
            if self.oracle is None
            else [journal.network_digest(self.oracle), _source(options.oracle)],
            "findings": self.findings
            and [journal.network_digest(self.findings), *map(_source, options.findings)],
            "data": journal.data_digest(self.data),
            "masks": journal.places_digest(self.masks),
            "lung masks": journal.places_digest(self.lungs),
            "split": split,
            "limit": options.limit,
            "refine": options.refine,
            "within": options.within,
            "seed": options.seed,
            "version": versions(),
        }


def open_inputs(model: str | Path, data: str | Path, options: Options) -> Inputs:
    """Open all inputs. Raises UsageError if they do not fit each other, and CxrError for a bad
    model, data set or classifier."""
    device = prepare(options.device)
    loaded = with_discriminator(load_model(model, device), device)
    if options.classifier:
        loaded = with_classifier(
            loaded, options.classifier, options.target, options.classifier_input
        )
        same_patients("--classifier", loaded.info.get("foreign_fold"), loaded)
    if len(loaded.info["classes"]) > 2:
        raise UsageError(
            f"{model} tells {', '.join(loaded.info['classes'])} apart, and train-cnn has measured it; "
            "evaluate takes the GAN of one class (train-gan --target)"
        )
    _ = loaded.classifier  # says itself what to do where it is missing
    dataset = _open_data(loaded, data, options)
    return Inputs(
        model=loaded,
        data=dataset,
        oracle=load_oracle(options.oracle, loaded, dataset, device) if options.oracle else None,
        findings=load_findings(options.findings, loaded),
        masks=find_places(options.masks, options.boxes, dataset),
        lungs=mask_files(options.lungs, "--lungs", dataset),
        device=device,
    )


def _open_data(model: Model, data: str | Path, options: Options) -> Dataset:
    """The data set, prepared as the model's training images were."""
    info = model.info
    prepared = info["size"], info["fit"], info.get("fold", 0)
    asked = left_out(info, data) | options.asked(info)
    dataset = open_dataset(data, *prepared, **asked)
    named = options.negative or options.positive
    if not named and dataset.classes != tuple(info["classes"]):
        raise UsageError(
            f"{data} holds {' and '.join(dataset.classes)}, the model tells "
            f"{' from '.join(info['classes'])}: if they mean the same, name the healthy class "
            "with --negative; with --positive, too, other classes are left out"
        )
    return dataset


def same_patients(option: str, fold: int | None, model: Model) -> None:
    """Raises UsageError if a classifier of another fold has seen the model's test patients."""
    tested = model.info.get("fold", 0)
    if fold not in (None, tested):
        raise UsageError(
            f"{option} was tested on fold {fold}, the model on {tested}: it has seen the model's "
            f"test patients; train one with --fold {tested}"
        )


def load_oracle(spec: str, model: Model, data: Dataset, device: torch.device) -> nn.Module:
    """The independent classifier. Raises UsageError if it cannot judge this model."""
    target = None if is_own(spec) else model.info.get("target")
    other = second_classifier(spec, model, "--oracle", target)
    same_patients("--oracle", other.info.get("fold"), model)
    with torch.no_grad():
        x = to_tensor(data.images[:8], device)
        if torch.allclose(other.classifier(x), model.classifier(x)):
            raise UsageError(
                "--oracle is the model's own classifier: train another, with another preset and "
                "--seed"
            )
    return other.classifier


def _source(spec: str | None) -> str | None:
    """A digest of the code of FILE.py:FUNCTION, and FUNCTION: equal parameters may belong to other
    code."""
    if spec is None or ".py:" not in spec:
        return None
    file, _, function = spec.rpartition(":")
    return f"{journal.files_digest([Path(file)])}:{function}"
