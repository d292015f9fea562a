"""Write the tables of README.md, docs/results.md and the models' cards from the JSON beside this file.

python benchmarks/tables.py [--check]
"""

import fnmatch
import json
import sys
from pathlib import Path

from cxr.evaluation import measures, registry

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"pneumonia": "pneumonia", "covid": "COVID-19"}
STUDIES = {  # pages of docs/, and the columns of their tables
    "three-classes": {"bacterial": "BACTERIAL", "viral": "VIRAL", "normal": "NORMAL"},
    "resnet18": {"resnet18": "ResNet-18"},
}
MEASURES = {
    value.key: value
    for values in vars(measures).values()
    if isinstance(values, tuple)
    for value in values
    if isinstance(value, measures.Measure)
}
HEADLINE = (
    "classifier.auroc",
    "counterfactual.validity",
    "counterfactual.oracle_validity",
    "counterfactual.validity_overlaid",
    "counterfactual.oracle_validity_overlaid",
    "counterfactual.sparsity_overlaid",
    "reconstruction.ssim",
    "path.logit_gap",
)
RESULTS = (
    *HEADLINE,
    "counterfactual.sparsity",
    "disentanglement.oracle_inverted_healthy",
    "reconstruction.probability_gap",
    "path.largest_jump",
    "path.spearman",
    "generator.fid_ratio",
    *(
        f"faithfulness.{method}.{order}"
        for method in ("latent_ig", "integrated_gradients", "grad_cam", "centre")
        for order in ("deletion", "insertion")
    ),
    "randomisation.latent_ig",
    "randomisation.difference",
)
STUDY = (
    *HEADLINE,
    "reconstruction.probability_gap",
    "path.spearman",
    "disentanglement.structure_ssim",
    "counterfactual.outside_lung_overlaid",
    "shortcut.auroc_without_lungs",
    "shortcut.auroc_lungs_alone",
    "gate.believed",
)
PHANTOMS = (  # the columns: experiment, its name in the file, measure
    ("lesions", "lesion", "localisation.*.ap"),
    ("lesions", "lesion", "localisation.*.pointing"),
    ("letter", "shortcut-1.0", "marker.*.mass"),
)


def numbers(model: str) -> dict[str, dict]:
    """{key: {value, low, high, n}} of one model; maps have no n in the printed tables."""
    return json.loads((ROOT / "benchmarks" / f"{model}-128.json").read_text())["numbers"]


def heading(key: str) -> str:
    """A measure's title, unit and better direction, with the heat map's name where it has one."""
    patterns = [pattern for pattern in MEASURES if fnmatch.fnmatchcase(key, pattern)]
    measure = MEASURES[max(patterns, key=len)]  # the closest: `*` alone would take dots, too
    method = f"{registry.title_of(key.split('.')[1])}: " if "*" in measure.key else ""
    better = f" ({measure.better} is better)" if measure.better else ""
    return f"{method}{measure.heading}{better}"


def interval(figure: dict, digits: int = 3) -> str:
    value, low, high = (f"{figure[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def table(keys, models: dict[str, str], named: bool = False) -> str:
    """A line for each of the keys, with its key in the file if `named`; columns: {model: title}."""
    figures = {model: numbers(model) for model in models}
    lines = ["| | " + " | ".join(f"{title} | n" for title in models.values()) + " |"]
    lines.append("|---|" + "---|---|" * len(models))
    for key in keys:
        row = [figures[model][key] for model in models]
        cells = " | ".join(f"{interval(figure)} | {figure.get('n', '')}" for figure in row)
        name = f"`{key}`: " if named else ""
        lines.append(f"| {name}{heading(key)} | {cells} |")
    return "\n".join(lines)


def phantoms() -> str:
    """A line for each heat map, the best at finding lesions first, a column for each of PHANTOMS."""
    arms = json.loads((ROOT / "benchmarks" / "phantoms-32.json").read_text())["phantoms"]
    columns, titles = [], []
    for experiment, arm, key in PHANTOMS:
        part, name = key.split(".*.")
        columns.append({method: all_of[name] for method, all_of in arms[arm][part].items()})
        n = columns[-1]["latent_ig"]["n"]
        titles.append(f"{experiment}: {MEASURES[key].heading} (n = {n})")
    lines = [f"| map | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    methods = sorted(measures.METHODS.keys() & columns[0].keys())
    for method in sorted(methods, key=lambda method: -columns[0][method]["value"]):
        cells = " | ".join(interval(column[method], 2) for column in columns)
        lines.append(f"| {registry.title_of(method)} | {cells} |")
    return "\n".join(lines)


def pages() -> dict[Path, dict[str, str]]:
    """The tables of each page by their names, as they should be."""
    results = ROOT / "docs" / "results.md"
    tables = {
        ROOT / "README.md": {"headline": table(HEADLINE, MODELS)},
        results: {"results": table(RESULTS, MODELS), "phantoms": phantoms()},
    }
    cards = {
        ROOT / "weights" / f"{m}-128.md": {"measures": table(numbers(m), {m: title}, named=True)}
        for m, title in MODELS.items()
    }
    studies = {
        ROOT / "docs" / f"{page}.md": {"results": table(STUDY, models)}
        for page, models in STUDIES.items()
    }
    return tables | cards | studies


def filled(text: str, tables: dict[str, str]) -> str:
    """`text` with each of the tables between the markers of its name."""
    for name, body in tables.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        if text.count(start) != 1:
            raise ValueError(f"{text.count(start)} tables named {name}, not 1")
        before, after = text.split(start)
        _, end, rest = after.partition(end)
        if not end:
            raise ValueError(f"the table {name} has no end")
        text = f"{before}{start}{body}\n{end}{rest}"
    return text


def stale() -> dict[Path, str]:
    """{page: its new text} of the pages that are not what the JSON says."""
    new = {page: filled(page.read_text(), tables) for page, tables in pages().items()}
    return {page: text for page, text in new.items() if text != page.read_text()}


if __name__ == "__main__":
    changed = stale()
    if "--check" in sys.argv[1:]:
        names = ", ".join(str(page.relative_to(ROOT)) for page in changed)
        sys.exit(f"not what the JSON says: {names}; run benchmarks/tables.py" if changed else 0)
    for page, text in changed.items():
        page.write_text(text)
