"""The phantom protocol: is the explanation right where the truth is known?

Synthetic chests are made, the CNN and the GAN are trained on them by the ordinary loops, and the
explanation of held-out ones is scored against what was drawn. *Lesion arm*: disease is lesions.
*Shortcut arm*: a corner marker agrees with the label more or less often. What the CNN relies on is
found out first, by rendering an image again without its lesions, without its marker, and asking the
CNN again; its explanation is scored against that, not against the disease. The controls stand in
`controls`. Every stage is a folder under OUT, resumed when interrupted and skipped when complete.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cxr import UsageError, metrics
from cxr.evaluation.evaluate import write
from cxr.evaluation.intervals import nested, statistic_of
from cxr.evaluation.registry import PHANTOMS, find
from cxr.explanation import versions
from cxr.files import write_text
from cxr.phantoms import controls
from cxr.phantoms.arm import Arm, Plan, Row, explained, kept, reliance, relied_on

SHORTCUTS = (1.0, 0.5, 0.9)  # how often the marker agrees with the label


# ---------------------------------------------------------------------------------------------
# Figures with intervals


def figure(
    statistic: Callable[..., float], arms: Sequence[list[Row]], columns: Sequence[str]
) -> dict | None:
    """A statistic of columns, {value, low, high, n} and, of several arms, each one's value as
    `seeds`; the value is their mean, the interval a bootstrap over images in every arm.

    None if no image has all columns.
    """
    rows = [
        (k, *(row[name] for name in columns))
        for k, arm in enumerate(arms)
        for row in arm
        if all(np.isfinite(row.get(name, np.nan)) for name in columns)
    ]
    if not rows:
        return None
    arm, *values = np.array(rows).T
    if len(arms) == 1:
        return metrics.bootstrap(statistic, range(len(rows)), *values)

    def each(arm: np.ndarray, *values: np.ndarray) -> list[float]:
        parts = [[v[arm == k] for v in values] for k in range(len(arms))]
        return [float(statistic(*part)) if len(part[0]) else np.nan for part in parts]

    def mean(arm: np.ndarray, *values: np.ndarray) -> float:
        return float(np.mean(each(arm, *values)))

    ends = metrics.ENDS.get(statistic)
    whole = metrics.bootstrap(mean, range(len(rows)), arm, *values, ends=ends)
    return whole | {"seeds": each(arm, *values)}


def summary(arms: Sequence[list[Row]]) -> dict:
    """Every figure of one arm's rows, or of several seeds', nested by its key."""
    rows = [row for arm in arms for row in arm]
    keys = dict.fromkeys(key for row in rows for key in row if not key.startswith("raw/"))
    wanted = {tuple(key.split("/")): (key,) for key in keys}
    wanted |= {tuple(m.key.split(".")): m.columns for m in PHANTOMS if m.columns}
    figures = {
        names: figure(statistic_of(find(*names)), arms, columns)
        for names, columns in wanted.items()
    }
    return nested({k: f for k, f in figures.items() if f and np.isfinite(f["value"])})


# ---------------------------------------------------------------------------------------------
# The whole


def run_arm(arm: Arm) -> tuple[list[Row], str]:
    """One arm from its phantoms to its rows, and what its CNN relies on."""
    arm.folder.mkdir(parents=True, exist_ok=True)
    arm.make()
    cnn = arm.folder / "reliance.json"
    rows = kept(cnn, lambda: reliance(arm, arm.train_cnn()))
    sign = relied_on(rows)
    rows += kept(arm.folder / "explained.json", lambda: explained(arm, arm.train_gan(), sign))
    return rows, sign


def evaluate(out: str | Path, plan: Plan, device: str = "cpu") -> dict:
    """The whole protocol; `evaluation.json` in `out` is written anew after each arm.

    Raises UsageError if `out` holds another plan's protocol, CxrError where a training fails.
    """
    out = Path(out)
    claim(out, plan)
    about = {"plan": asdict(plan), "relies_on": {}, "versions": versions()}
    numbers: dict = {"phantoms": {}, "controls": {}, "about": about}
    lesion = [
        Arm(out / f"lesion-{k}", plan, plan.seed + k, device=device) for k in range(plan.seeds)
    ]
    done: list[list[Row]] = []

    def lesions(arm: Arm) -> None:
        rows, about["relies_on"][arm.folder.name] = run_arm(arm)
        done.append(rows)
        numbers["phantoms"]["lesion"] = summary(done)
        write(numbers, out)

    lesions(lesion[0])
    for shortcut in SHORTCUTS:
        arm = Arm(out / f"shortcut-{shortcut}", plan, plan.seed, shortcut, device)
        rows, about["relies_on"][arm.folder.name] = run_arm(arm)
        numbers["phantoms"][arm.folder.name] = summary([rows])
        write(numbers, out)
    numbers["controls"]["real"] = numbers["phantoms"]["lesion"]
    for name, rows in controls.run(lesion[0]):
        numbers["controls"][name] = summary([rows])
        write(numbers, out)
    for arm in lesion[1:]:
        lesions(arm)
    return numbers


def claim(out: Path, plan: Plan) -> None:
    """Note the plan in `out`; UsageError if another is noted there."""
    file, text = out / "plan.json", json.dumps(asdict(plan), indent=1) + "\n"
    if file.exists() and file.read_text() != text:
        raise UsageError(f"{out} holds a protocol begun with other numbers: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
