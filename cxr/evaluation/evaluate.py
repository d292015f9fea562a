"""Can classifier, GAN and explanations be trusted? This module writes `evaluation.json`.

`inputs` opens the inputs, `cases` judges single images, `stages` runs the long stages, `realism`
compares random lungs with real ones, and `measures` declares all measures.
"""

import json
from pathlib import Path

import numpy as np

from cxr import UsageError
from cxr.classifier import classifier_metrics, predict
from cxr.data.identity import trained_on
from cxr.datasets import Dataset
from cxr.evaluation import page, plots, realism, registry, tables
from cxr.evaluation.cases import Judge
from cxr.evaluation.inputs import Inputs, Options, open_inputs
from cxr.evaluation.intervals import without_nan
from cxr.evaluation.journal import Journal
from cxr.evaluation.realism import CHUNK, drawn_rows, pools
from cxr.evaluation.shortcuts import shortcuts
from cxr.evaluation.stages import Measured, measure
from cxr.explanation import versions
from cxr.files import only_writer, write_text

SEEN = {  # how training used each split of the model's own data set
    "train": "it was trained on these very patients: the numbers flatter it",
    "val": "these patients chose its weights and its temperature: the numbers flatter it a little",
    "all": "it was trained on most of these patients: the numbers flatter it",
}
RESPLIT = (
    "its data were split otherwise when it was trained: it may have seen some of these patients"
)
EXPLAINER = {"encoder", "generator"}


def evaluate(
    model: str | Path,
    data: str | Path,
    split: str = "test",
    out: str | Path | None = None,
    **options,
) -> dict:
    """Measure a model on a split of a data set. Images are prepared as for its training.

    Parameters
    ----------
    model : a model file or a shipped model's name
    data : as in `open_dataset`
    out : a folder for `evaluation.json`, its tables as `evaluation.md`, all of it as a page,
        `index.html`, `figures/`, and `cases.jsonl`, the figures of each image, which grows during
        the evaluation; by default nothing is written
    options : the fields of `Options`

    Returns {part: {name: {value, low, high, n}}, "about": {...}}, fit for JSON; NaN is None. The
    registry says what each number means and which interval it has. n counts images. A part is left
    out if an input for it is missing; a note in `about` says so. After Ctrl-C or SIGTERM the
    numbers are those of the images so far, and `about` has an entry `stopped`.

    Raises UsageError if the data have other classes than the model, or if `out` holds a stopped
    evaluation (with `resume`: if it holds no evaluation of these inputs); CxrError for a bad model,
    data set or classifier.
    """
    options = Options(**options)
    if options.resume and out is None:
        raise UsageError("only what was written into a folder can be resumed: name it with --out")
    inputs = open_inputs(model, data, options)
    if out is None:
        return _measure(inputs, split, options, Journal(inputs.data), False)[0]
    with only_writer(out):
        return _measure_into(Path(out), inputs, split, options)


def _measure_into(out: Path, inputs: Inputs, split: str, options: Options) -> dict:
    """Measure, and write numbers, tables and figures into a folder."""
    draws = plots.installed()  # warns now if matplotlib is missing, not after hours of explaining
    journal = Journal(inputs.data, out, inputs.subject(split, options), options.resume)
    numbers, measured = _measure(inputs, split, options, journal, draws)
    write(numbers, out)
    title, drawn = f"{inputs.data.name}, {split}", None
    write_text(out / "evaluation.md", tables.markdown(title, numbers))
    if draws:
        drawn = plots.draw(out / "figures", numbers, _material(inputs, split, measured))
    write_text(out / "index.html", page.page(title, numbers, _cases(inputs.data, journal), drawn))
    if "stopped" not in numbers["about"]:
        journal.finish()
    return numbers


def _cases(data: Dataset, journal: Journal) -> dict[str, dict]:
    """The class and the figures of each explained image, by its name."""
    classes = dict(zip(journal.images, (data.classes[label] for label in data.labels)))
    cases = journal.of_images("case").items()
    return {name: {"class": classes[name], "figures": case["figures"]} for name, case in cases}


def _measure(
    inputs: Inputs, split: str, options: Options, journal: Journal, draws: bool
) -> tuple[dict, Measured]:
    """All parts and `about`, fit for JSON, and the material for plots. draws: whether to include
    examples."""
    numbers = _set_numbers(inputs, split, options, journal)
    measured = Measured()
    if EXPLAINER <= inputs.model.networks.keys():
        judge = Judge(
            *(inputs.model, inputs.data, inputs.oracle, inputs.masks, inputs.lungs),
            *(options.refine, options.seed, options.within, inputs.findings),
        )
        rows = drawn_rows(inputs.data, split, options.limit, options.seed)
        measured = measure(judge, rows, split, journal, draws)
    numbers |= measured.numbers
    about = _about(inputs, split, options)
    if "generator" in numbers:
        about["feature_space"] = f"pooled features of {options.oracle}"
    if measured.stopped:
        go_on = "" if journal.path is None else ": go on with the same command and --resume"
        about["stopped"] = True
        about["notes"].append(f"stopped after {measured.stopped}{go_on}")
    if measured.numbers:
        about["notes"] += registry.not_measured(numbers)
    else:
        path = inputs.model.path
        about["notes"].append(f"{path} holds no GAN: only the classifier is measured")
    return without_nan(numbers | {"about": about}), measured


def _set_numbers(inputs: Inputs, split: str, options: Options, journal: Journal) -> dict:
    """The parts that are measured on a whole split: the classifier and, if the independent
    classifier has features, the generator."""
    model, data = inputs.model, inputs.data
    numbers = {
        "classifier": journal.once(
            "classifier", lambda: classifier_metrics(model.classifier, data, split, inputs.device)
        )
    }
    numbers |= journal.once(
        "shortcuts", lambda: shortcuts(model.classifier, data, split, inputs.device)
    )
    if EXPLAINER <= model.networks.keys() and pools(inputs.oracle, data, inputs.device):
        numbers["generator"] = journal.once(
            "generator", lambda: realism.distances(model, inputs.oracle, data, split, options.seed)
        )
    return numbers


def write(numbers: dict, out: str | Path) -> Path:
    """Write `evaluation.json` into the folder `out`, completely or not at all. Returns its path."""
    path = Path(out) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(numbers, indent=1) + "\n")
    return path


def _material(inputs: Inputs, split: str, measured: Measured) -> plots.Material:
    """What the plots need besides the numbers."""
    model, data = inputs.model, inputs.data
    rows = data.rows(split)
    logits = [
        predict(model.classifier, data.images[part], inputs.device)
        for part in np.array_split(rows, -(-len(rows) // CHUNK))
    ]
    return plots.Material(
        classes=data.classes,
        logits=np.concatenate(logits),
        labels=data.labels[rows],
        named=model.info.get("logits"),
        responses=measured.responses,
        examples=measured.examples,
    )


def _about(inputs: Inputs, split: str, options: Options) -> dict:
    model, data = inputs.model, inputs.data
    rows = data.rows(split)
    known = trained_on(model.info, data)
    notes = [SEEN[split]] if known != "no" and split in SEEN else []
    if known == "resplit" and split != "all":
        notes.append(RESPLIT)
    return {
        "model": str(model.path),
        "classifier": model.info.get("foreign", "the model's own"),
        "data": data.name,
        "split": split,
        "classes": list(data.classes),
        "images": [int(np.sum(data.labels[rows] == label)) for label in (0, 1)],
        "patients": len({data.patients[row] for row in rows}),
        "notes": notes,
        "versions": versions(),
        "oracle": options.oracle,
        "findings": list(options.findings),
        "feature_space": None,
        "seeds": {"evaluation": options.seed},
    }
