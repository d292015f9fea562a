"""Write the tables of README.md, docs/results.md and the models' cards from the JSON beside this file.

python benchmarks/tables.py [--check]
"""

import fnmatch
import json
import re
import sys
from pathlib import Path

from cxr.evaluation import registry

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"pneumonia": "pneumonia", "covid": "COVID-19"}
MEASURES = {
    value.key: value
    for values in vars(registry).values()
    if isinstance(values, tuple)
    for value in values
    if isinstance(value, registry.Measure)
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
        f"faithfulness.{method}.{way}"
        for method in ("latent_ig", "integrated_gradients", "grad_cam", "centre")
        for way in ("deletion", "insertion")
    ),
    "randomisation.latent_ig",
    "randomisation.difference",
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


def interval(figure: dict) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def table(keys, models, named: bool = False) -> str:
    """A line for each of the keys, with its key in the file if `named`."""
    found = {model: numbers(model) for model in models}
    lines = ["| | " + " | ".join(f"{MODELS[model]} | n" for model in models) + " |"]
    lines.append("|---|" + "---|---|" * len(models))
    for key in keys:
        figures = [found[model][key] for model in models]
        cells = " | ".join(f"{interval(one)} | {one.get('n', '')}" for one in figures)
        name = f"`{key}`: " if named else ""
        lines.append(f"| {name}{heading(key)} | {cells} |")
    return "\n".join(lines)


def pages() -> dict[Path, str]:
    """The table of each page, as it should be."""
    both = tuple(MODELS)
    tables = {
        ROOT / "README.md": table(HEADLINE, both),
        ROOT / "docs" / "results.md": table(RESULTS, both),
    }
    cards = {ROOT / "weights" / f"{m}-128.md": table(numbers(m), (m,), named=True) for m in MODELS}
    return tables | cards


def filled(text: str, body: str) -> str:
    """`text` with `body` between its markers."""
    new, count = re.subn(
        r"(<!-- table: \w+ -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{body}\n{match[2]}",
        text,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{count} tables between markers, not 1")
    return new


def stale() -> dict[Path, str]:
    """{page: its new text} of the pages that are not what the JSON says."""
    new = {page: filled(page.read_text(), body) for page, body in pages().items()}
    return {page: text for page, text in new.items() if text != page.read_text()}


if __name__ == "__main__":
    changed = stale()
    if "--check" in sys.argv[1:]:
        names = ", ".join(str(page.relative_to(ROOT)) for page in changed)
        sys.exit(f"not what the JSON says: {names}; run benchmarks/tables.py" if changed else 0)
    for page, text in changed.items():
        page.write_text(text)
