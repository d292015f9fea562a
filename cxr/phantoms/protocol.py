"""The phantom protocol: is the explanation right where the truth is known?

The protocol makes phantoms, trains a CNN and a GAN on them with the ordinary training loops, and
compares explanations of held-out phantoms with the truth. In the *lesion arm*, disease means
lesions. In a *shortcut arm*, a marker in a corner agrees with the label more or less often. First
the protocol finds out what the CNN relies on: it draws each image again without its lesions, and
without its marker, and asks the CNN again. The explanation is scored against what the CNN relies
on, not against the disease. The controls are in `controls`. Every stage has a folder under OUT. An
interrupted stage is resumed, and a complete one is skipped.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cxr import UsageError, metrics
from cxr.evaluation.evaluate import write
from cxr.evaluation.intervals import nested, statistic_of
from cxr.evaluation.measures import PHANTOMS
from cxr.evaluation.registry import find
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
    """A statistic of columns, {value, low, high, n}. For several arms, the value is the mean over
    arms, `seeds` has the value of each arm, and the interval is a bootstrap over all images.

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
    """Every figure of the rows of one arm, or of several seeds of an arm, nested by its key."""
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
# The whole protocol


def run_arm(arm: Arm) -> tuple[list[Row], str]:
    """Run one arm. Returns its rows and the sign that its CNN relies on."""
    arm.folder.mkdir(parents=True, exist_ok=True)
    arm.make()
    cnn = arm.folder / "reliance.json"
    rows = kept(cnn, lambda: reliance(arm, arm.train_cnn()))
    sign = relied_on(rows)
    rows += kept(arm.folder / "explained.json", lambda: explained(arm, arm.train_gan(), sign))
    return rows, sign


def evaluate(out: str | Path, plan: Plan, device: str = "cpu") -> dict:
    """Run the whole protocol. `evaluation.json` in `out` is written again after each arm.

    Raises UsageError if `out` holds the protocol of another plan, and CxrError if a training fails.
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
    """Write the plan to `out`. Raises UsageError if there is another plan."""
    file, text = out / "plan.json", json.dumps(asdict(plan), indent=1) + "\n"
    if file.exists() and file.read_text() != text:
        raise UsageError(f"{out} holds a protocol begun with other numbers: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
