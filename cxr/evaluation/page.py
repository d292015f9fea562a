"""The page of an evaluation: what failed first, then its tables, with what each measure means, and its
figures."""

import base64
from collections.abc import Sequence
from pathlib import Path

from cxr.evaluation import tables
from cxr.evaluation.registry import of_part
from cxr.report import fill

FAILS = {  # a figure of one image, the value that is a failure, and how it is told
    "gate/believed": (0, "not to be believed"),
    "reconstruction/rejected": (1, "the reconstruction is too far from the image"),
    "counterfactual/validity": (0, "the path does not turn the verdict"),
    "counterfactual/validity_overlaid": (0, "the overlay does not turn the verdict"),
    "counterfactual/oracle_validity": (0, "the path does not convince the independent classifier"),
    "counterfactual/oracle_validity_overlaid": (
        0,
        "the overlay does not convince the independent classifier",
    ),
}
SHOWN = {  # of each image
    "reconstruction/ssim": "SSIM",
    "reconstruction/probability_gap": "gap in probability",
    "path/logit_gap": "logit gap",
    "counterfactual/sparsity_overlaid": "pixels changed",
}


def page(title: str, numbers: dict, cases: Sequence[tuple[str, dict]], figures: Path) -> str:
    """The HTML of an evaluation. cases: name and figures of each image; figures: the folder of the
    plots, as SVG."""
    told = [_table(*table) for table in tables.of_evaluation(title, numbers)]
    return fill(
        "evaluation",
        {
            "title": title,
            "notes": numbers["about"]["notes"],
            "about": {key: str(numbers["about"][key]) for key in ("model", "classifier", "oracle")},
            "tables": told,
            "cases": sorted((_case(*case) for case in cases), key=lambda c: -len(c["fails"])),
            "columns": list(SHOWN.values()),
            "figures": [
                {
                    "name": path.stem,
                    "uri": f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}",
                }
                for path in sorted(figures.glob("*.svg"))
            ],
        },
    )


def _table(title: str, header: tuple, rows: list[tuple]) -> dict:
    """A table with the sentence of each measure: of a row, or of a part that compares methods."""
    if header[0] == "part":
        meanings = {
            (m.part, m.heading): m.meaning for part in {r[0] for r in rows} for m in of_part(part)
        }
        return {
            "title": title,
            "header": [*header, "what it means"],
            "rows": [[*map(str, row), meanings.get(row[:2], "")] for row in rows],
            "about": [],
        }
    about = [f"{m.heading}: {m.meaning}" for m in of_part(title)]
    return {
        "title": title,
        "header": header,
        "rows": [list(map(str, r)) for r in rows],
        "about": about,
    }


def _case(name: str, figures: dict[str, float]) -> dict:
    fails = [words for key, (value, words) in FAILS.items() if figures.get(key) == value]
    values = [figures.get(key) for key in SHOWN]
    return {"name": name, "fails": fails, "values": values}
