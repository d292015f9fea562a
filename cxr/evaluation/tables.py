"""The tables that commands print."""

from collections.abc import Iterator, Sequence

from cxr import console
from cxr.console import number

Table = tuple[str, tuple[str, ...], list[tuple]]  # title, header, rows
COMPARED = ("localisation", "faithfulness", "randomisation")  # parts with a row for each method


def evaluation(title: str, numbers: dict[str, dict]) -> None:
    """A table of the figures, and one more for each part that compares methods."""
    for table in _evaluation(title, numbers):
        console.table(*table)


def markdown(title: str, numbers: dict[str, dict]) -> str:
    """The tables of `evaluation` for a model card or a paper."""
    lines = []
    for name, header, rows in _evaluation(title, numbers):
        lines += [f"{name}", "", _row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
    return "\n".join(lines)


def _row(cells: Sequence) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _evaluation(title: str, numbers: dict[str, dict]) -> Iterator[Table]:
    parts = {part: figures for part, figures in numbers.items() if part != "about"}
    by_method = {part: parts.pop(part) for part in COMPARED if part in parts}
    rows = [
        (part, name, number(m["value"]), f"{number(m['low'])} to {number(m['high'])}", m["n"])
        for part, figures in parts.items()
        for name, m in figures.items()
    ]
    yield title, ("part", "measure", "value", "95% interval", "images"), rows
    for part, methods in by_method.items():
        if part == "randomisation":
            methods = {
                name: {"all random": figure, "magnitude": figure["magnitude"]}
                for name, figure in methods.items()
            }
        yield compared(part, methods)


def protocol(numbers: dict[str, dict]) -> None:
    """The phantom protocol: a table of localisation for each arm and control, a table of the mass
    on the marker, and one of all else, with a column for each arm and control."""
    arms = numbers["phantoms"] | {f"control: {k}": v for k, v in numbers["controls"].items()}
    for name, parts in arms.items():
        for part in ("localisation", "marker"):
            if part in parts:
                console.table(*compared(f"{part}, {name}", parts[part]))
    rows = {key: {} for parts in arms.values() for key in flat(parts)}
    for name, parts in arms.items():
        for key, found in flat(parts).items():
            rows[key][name] = spread(found)
    cells = [(key, *(own.get(name, "-") for name in arms)) for key, own in rows.items()]
    console.table("phantoms", ("figure", *arms), cells)


def compared(title: str, methods: dict[str, dict]) -> Table:
    """A table with a row for each method."""
    names = list(next(iter(methods.values())))
    rows = [(method, *(spread(own.get(name)) for name in names)) for method, own in methods.items()]
    return title, ("method", *names), rows


def flat(parts: dict, key: str = "") -> dict[str, dict]:
    """The figures by their keys, joined by dots, but for those that compare methods."""
    if "value" in parts:
        return {key: parts}
    found = {}
    for name, part in parts.items():
        if name not in (*COMPARED, "marker"):
            found |= flat(part, f"{key}.{name}" if key else name)
    return found


def spread(figure: dict | None) -> str:
    """A figure in a narrow cell: value (low to high)."""
    value, low, high = ((figure or {}).get(key) for key in ("value", "low", "high"))
    return "-" if value is None else f"{value:.2f} ({low:.2f} to {high:.2f})"
