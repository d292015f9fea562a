"""What the terminal shows: progress, tables and warnings, all on stderr but the tables."""

from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

out = Console()
err = Console(stderr=True)


class Bar:
    """One running progress bar; `advance` counts units, `note` shows a short text beside it."""

    def __init__(self, progress: Progress, task: int):
        self._progress, self._task = progress, task

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


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
    with Progress(*columns, console=err, disable=quiet) as bars:
        yield Bar(bars, bars.add_task(description, total=total, completed=done, note=""))


class _Rate(TextColumn):
    def __init__(self, unit: str):
        super().__init__("")
        self.unit = unit

    def render(self, task):
        return f"{task.speed:.1f} {self.unit}/s" if task.speed else ""


def table(title: str, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Print a small table on stdout; every cell is shown through `str`."""
    grid = Table(title=Text(title), title_justify="left")  # Text: a name may hold [brackets]
    for name in header:
        grid.add_column(name, overflow="fold")  # nothing is cut
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    out.print(grid)


def say(line: str) -> None:
    """One plain line on stderr, never wrapped."""
    err.print(line, soft_wrap=True, highlight=False, markup=False)


def warn(line: str) -> None:
    """One line on stderr that begins with `warning:`."""
    say(f"warning: {line}")
