"""Looks up the measures, and says which are missing: intervals, tables, plots, notes and the
documentation follow from their declarations in `measures`.

This module imports neither torch nor numpy, so that documents can be made from it quickly.
"""

from collections.abc import Iterator

from cxr.evaluation.measures import (
    COMPARED,
    EVALUATION,
    INTERVALS,
    MEASURES,
    METHODS,
    NEEDS,
    Measure,
)

NAMED = ("source", "scanner", "finding")  # parts whose rows are called as the user calls them


def title_of(method: str, part: str = "") -> str:
    """The title of a heat map; a source, scanner or finding, by its part, keeps its name, and what
    else there is has it without underscores."""
    if method in METHODS:
        return METHODS[method].title
    return method if part in NAMED else method.replace("_", " ")


def find(*names: str) -> Measure:
    """The measure of a figure with these names: ("localisation", "edges", "ap") is an instance of
    localisation.*.ap.

    A stage of the cascade, ("randomisation", METHOD, "3"), belongs to randomisation.*. Raises
    KeyError if no such measure is declared.
    """
    starred = (names[0], "*", *names[2:])
    for key in (names, starred, starred[:2]):
        if ".".join(key) in MEASURES:
            return MEASURES[".".join(key)]
    raise KeyError(f"no measure {'.'.join(names)} is declared")


def of_part(part: str) -> list[Measure]:
    return [measure for measure in MEASURES.values() if measure.part == part]


def compares_methods(part: str) -> bool:
    """Whether a part has figures for each heat map, source, scanner or finding."""
    return part in COMPARED


def not_measured(numbers: dict) -> list[str]:
    """A line for each reason why measures of `evaluate` are missing from its numbers.

    The reason is the first need that is certainly not met, because it is the only need of another
    missing measure. If there is none, it is the last need, because all needs before it are met.
    """
    absent = [measure for measure in EVALUATION if not _holds(numbers, measure.key.split("."))]
    unmet = {measure.needs[0] for measure in absent if len(measure.needs) == 1}
    reasons: dict[str, list[str]] = {}
    for measure in absent:
        if measure.needs:
            need = next((need for need in measure.needs if need in unmet), measure.needs[-1])
            reasons.setdefault(need, []).append(measure.key)
    return [
        f"not measured: {', '.join(_grouped(keys, numbers))} ({NEEDS[need]})"
        for need, keys in reasons.items()
    ]


def _holds(numbers: dict, names: list[str]) -> bool:
    if not names:
        return True
    name, *rest = names
    parts = numbers.values() if name == "*" else [numbers[name]] if name in numbers else []
    return any(_holds(part, rest) for part in parts)


def _grouped(keys: list[str], numbers: dict) -> list[str]:
    """The keys. For a part that is missing completely, only the name of the part."""
    names = (key if key.split(".")[0] in numbers else key.split(".")[0] for key in keys)
    return list(dict.fromkeys(names))


def markdown() -> str:
    """The measures as Markdown tables, one for each part, for the documentation."""
    return "\n".join(_markdown())


def _markdown() -> Iterator[str]:
    for part in dict.fromkeys(measure.part for measure in MEASURES.values()):
        yield from (f"### {part}", "", "| key | measure | unit | better | kind | what it means |")
        yield "|---|---|---|---|---|---|"
        for m in of_part(part):
            cells = (f"`{m.key}`", m.title, m.unit or "-", m.better or "-", m.kind, m.meaning)
            yield f"| {' | '.join(cells)} |"
        yield ""
    yield from ("### Intervals", "", "| kind | 95% interval |", "|---|---|")
    yield from (f"| {kind} | {interval} |" for kind, interval in INTERVALS.items())
    yield ""
