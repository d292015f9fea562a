"""The tables that commands print. Titles, units and better directions come from the registry."""

from collections.abc import Iterator, Sequence

from cxr import console
from cxr.console import number
from cxr.evaluation.registry import NAMED, compares_methods, find, title_of

Table = tuple[str, tuple[str, ...], list[tuple]]  # title, header, rows


def evaluation(title: str, numbers: dict[str, dict]) -> None:
    """Print a table of the figures, and another table for each part that compares methods."""
    for table in of_evaluation(title, numbers):
        console.table(*table)


def markdown(title: str, numbers: dict[str, dict]) -> str:
    """The tables of `evaluation` as Markdown, for a model card or a paper."""
    lines = []
    for name, header, rows in of_evaluation(title, numbers):
        lines += [f"{name}", "", _row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
    return "\n".join(lines)


def _row(cells: Sequence) -> str:
    escaped = (str(cell).replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def of_evaluation(title: str, numbers: dict[str, dict]) -> Iterator[Table]:
    """The table of all figures, then one for each part that compares methods or sources."""
    rows, by_method = [], {}
    for part, figures in numbers.items():
        if compares_methods(part):
            by_method[part] = figures
        elif part != "about":
            rows += [_figure(part, name, figure) for name, figure in figures.items()]
    yield title, ("part", "measure", "better", "value", "95% interval", "images"), rows
    for part, methods in by_method.items():
        yield compared(part, part, methods)


def _figure(part: str, name: str, figure: dict) -> tuple:
    measure = find(part, name)
    interval = f"{number(figure['low'])} to {number(figure['high'])}"
    value = number(figure["value"])
    return part, measure.heading, measure.better or "-", value, interval, figure["n"]


def protocol(numbers: dict[str, dict]) -> None:
    """Print the phantom protocol: a table for each arm or control and each part that compares
    methods, and one table of all other figures with a column for each arm and control."""
    arms = numbers["phantoms"] | {f"control: {k}": v for k, v in numbers["controls"].items()}
    for name, parts in arms.items():
        for part in ("localisation", "marker"):
            if part in parts:
                console.table(*compared(f"{part}, {name}", part, parts[part]))
    rows = {key: {} for parts in arms.values() for key in flat(parts)}
    for name, parts in arms.items():
        for key, figure in flat(parts).items():
            rows[key][name] = spread(figure)
    cells = [(key, *(row.get(name, "-") for name in arms)) for key, row in rows.items()]
    console.table("phantoms", ("figure", *arms), cells)


def compared(title: str, part: str, methods: dict[str, dict]) -> Table:
    """The table of a part, with a row for each method and a column for each measure."""
    rows = {method: measures(part, method, figures) for method, figures in methods.items()}
    headings = list(dict.fromkeys(heading for row in rows.values() for heading in row))
    cells = [
        (title_of(method, part), *(spread(row.get(heading)) for heading in headings))
        for method, row in rows.items()
    ]
    return title, (part if part in NAMED else "method", *headings), cells


def measures(part: str, method: str, figures: dict) -> dict[str, dict]:
    """A method's figures by their headings. `figures` may itself be a figure that holds others."""
    named = {(part, method): figures} if "value" in figures else {}
    named |= {
        (part, method, name): figure
        for name, figure in figures.items()
        if isinstance(figure, dict) and "value" in figure
    }
    return {_heading(*names): figure for names, figure in named.items()}


def _heading(*names: str) -> str:
    measure = find(*names)
    return f"{measure.heading}; {measure.better} is better" if measure.better else measure.heading


def flat(parts: dict, *names: str) -> dict[str, dict]:
    """The figures by their keys, joined by dots, without those that compare methods."""
    if "value" in parts:
        return {".".join(names): parts}
    figures = {}
    for name, part in parts.items():
        if names or not compares_methods(name):
            figures |= flat(part, *names, name)
    return figures


def spread(figure: dict | None, digits: int = 2) -> str:
    """A figure as the text of a narrow cell: value (low to high)."""
    value, low, high = ((figure or {}).get(key) for key in ("value", "low", "high"))
    if value is None:
        return "-"
    told = f"{value:.{digits}f}"
    return told if low is None else f"{told} ({low:.{digits}f} to {high:.{digits}f})"
