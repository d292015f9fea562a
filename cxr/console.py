"""What the terminal shows: progress, tables and warnings, all on stderr but the tables."""

import json
import math
import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cxr import plain

out = Console()
err = Console(stderr=True)


class Bar:
    """One running progress bar; `advance` counts units, `note` shows a short text beside it."""

    def __init__(self, progress: Progress, task: int):
        self._progress, self._task = progress, task

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=plain(text))


@contextmanager
def progress(
    description: str, total: int, done: int = 0, unit: str = "images", quiet: bool = False
):
    """A progress bar with count, rate and time left; yields a `Bar`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    mixed = sys.stdout.isatty()  # else what is piped would go to the bar's terminal
    with Progress(*columns, console=err, disable=quiet, redirect_stdout=mixed) as bars:
        yield Bar(bars, bars.add_task(description, total=total, completed=done, note=""))


class _Rate(TextColumn):
    def __init__(self, unit: str):
        super().__init__("")
        self.unit = unit

    def render(self, task):
        return f"{task.speed:.1f} {self.unit}/s" if task.speed else ""


def table(title: str, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Print a small table on stdout; every cell is shown through `str`."""
    grid = Table(title=Text(plain(title)), title_justify="left")  # Text: names hold [brackets]
    for name in header:
        grid.add_column(Text(plain(name)), overflow="fold")  # nothing is cut
    for row in rows:
        grid.add_row(*(Text(plain(cell)) for cell in row))
    out.print(grid)


def listed(names: Iterable[str], most: int = 12) -> str:
    """Names with commas between them, long ones cut, and how many there are beyond `most`."""
    names = [name if len(name) <= 60 else f"{name[:59]}…" for name in map(str, names)]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def say(line: str) -> None:
    """One plain line on stderr, never wrapped."""
    err.print(plain(line), soft_wrap=True, highlight=False, markup=False)


def warn(line: str) -> None:
    """One line on stderr that begins with `warning:`."""
    say(f"warning: {line}")


def classifier(title: str, metrics: dict[str, dict]) -> None:
    """The table of metrics that carry an interval: {name: {value, low, high, n}}."""
    rows = [
        (name, number(m["value"]), f"{number(m['low'])} to {number(m['high'])}", m["n"])
        for name, m in metrics.items()
    ]
    table(title, ("classifier", "value", "95% interval", "images"), rows)


def alarm(line: str) -> None:
    """One line on stderr, white on red where there are colours."""
    err.print(f" {plain(line)} ", style="bold white on red", soft_wrap=True, markup=False)


def explanation(path: Path, folder: Path, numbers: dict) -> None:
    p = f"P({numbers['classes'][1]})"
    rows = [
        ("believe it", "yes" if numbers["believe"] else "no: see the warnings"),
        (f"{p}, original", number(numbers["original"]["probability"])),
        (f"{p}, reconstruction", number(numbers["reconstruction"]["probability"])),
        (f"{p}, healthy end", number(numbers["probability"][0])),
        (f"{p}, diseased end", number(numbers["probability"][-1])),
        (f"{p}, counterfactual", number(numbers["counterfactual"]["probability_overlaid"])),
        ("its pixels changed", number(numbers["counterfactual"]["changed_overlaid"])),
        ("dose found", number(numbers["found_dose"])),
        ("verdict flipped", "yes" if numbers["counterfactual"]["flipped_overlaid"] else "no"),
        ("SSIM of the reconstruction", number(numbers["reconstruction"]["ssim"])),
        ("spread over restarts", number(numbers["restarts"]["spread"])),
        ("completeness error", number(numbers["completeness_error"])),
        ("written to", folder),
        ("to look at", folder / "index.html"),
    ]
    table(path.name, ("explanation", ""), rows)


def explained(path: Path, folder: Path, numbers: dict, replaced: bool, as_json: bool) -> None:
    """One image's result: its warnings, what it replaced, and its table."""
    if not numbers["believe"]:
        alarm(f"{path}: do not believe this explanation")
    for line in numbers["warnings"]:
        warn(f"{path}: {line}")
    if replaced:
        say(f"{folder}: the folder that was there has been replaced")
    if not as_json:
        explanation(path, folder, numbers)


def checks(cnn: str, numbers: dict) -> None:
    """What `check_cnn` found, and a line for each check that failed."""
    rows = [("the file", numbers["form"])]
    rows += [(name, "no" if line else "yes") for name, line in numbers["checks"].items()]
    if auroc := numbers["auroc"]:
        told = f"{auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f})"
        rows.append((f"AUROC on {auroc['n']} images", told))
    table(click.format_filename(cnn), ("CNN", ""), [*rows, *numbers["numbers"].items()])
    for line in filter(None, numbers["checks"].values()):
        say(f"error: {cnn}: {line}")


def data(title: str, numbers: dict) -> None:
    """What `check` found: a table of classes and splits, one of sizes and depths, and what is odd."""
    healthy, diseased = numbers["classes"]
    rows = [
        (split, *(f"{n:,} of {m:,}" for n, m in zip(numbers["images"][split], patients)))
        for split, patients in numbers["patients"].items()
    ]
    table(title, ("images of patients", healthy, diseased), rows)
    kinds = [(name, f"{count:,}") for name, count in (numbers["sizes"] | numbers["depths"]).items()]
    kinds += [(f"odd: {name}", f"{odd['count']:,}") for name, odd in numbers["odd"].items()]
    table(title, ("files", "images"), kinds)
    for name, odd in numbers["odd"].items():
        shown = odd["images"][:6]
        more = odd["count"] - len(shown)
        names = listed("/".join(Path(path).parts[-3:]) for path in shown)
        say(f"{name}: {names}{f' and {more:,} more' * (more > 0)}")
    for split, counts in numbers["images"].items():
        for name, count in zip(numbers["classes"], counts):
            if not count:
                warn(f"the {split} split has no image of {name}: training would refuse this")


def number(value: float | None) -> str:
    """Four decimals, or a dash for what is no number."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def quiet_unless_first() -> bool:
    """Of the processes that torchrun starts only the first one prints; whether this is it."""
    first = os.environ.get("RANK", "0") == "0"
    out.quiet = err.quiet = not first
    return first


def follow(*words: str, **options) -> None:
    """Say which command comes next; options that are None are left out."""
    for name, value in options.items():
        if value is not None:
            words += ("--" + name.replace("_", "-"), str(value))
    say(f"next:  {shlex.join(('cxrgan', *words))}")


def print_json(numbers: dict | list) -> None:
    click.echo(json.dumps(numbers, indent=1))
