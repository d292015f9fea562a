"""Explain many images, several at once: each result is written and told when it is there, and none
ends the others."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from cxr import UsageError, console, explain, report
from cxr.checkpoints import Model
from cxr.cnn import cost
from cxr.data.folders import names_apart
from cxr.explanation import Explanation, foreign
from cxr.files import write_text
from cxr.film import check_film
from cxr.options import reason


def explain_all(
    paths: Sequence[Path],
    model: Model,
    out: str | Path,
    stopped: Sequence[int],
    quiet: bool,
    film: str = "gif",
    fps: float = 8,
    **options,
) -> list[dict]:
    """Explain images into a folder each, below `out`, until `stopped` holds a signal.

    quiet: print no table; film, fps: as of `Explanation.write`. Returns the numbers of each image in
    turn; those of one that failed hold its "image" and its "error".
    """
    check_film(film)
    results, began = [], time.perf_counter()
    bars = console.progress("explain", len(paths), quiet=len(paths) < 2)
    many = explain.at_once(model) if len(paths) > 1 else 1
    named = list(zip(paths, names_apart(paths, partial(_free, Path(out)))))
    with bars as bar, cost.timed(model.classifier) as asked:
        for first in range(0, len(named), many):
            group = named[first : first + many]
            found = _explained([path for path, _ in group], model, options)
            for (path, name), explanation in zip(group, found):
                folder = Path(out) / name
                results.append(_written(path, folder, explanation, film, fps, quiet))
                bar.advance()
            if stopped:
                break
    if done := sum("error" not in numbers for numbers in results):
        seconds = time.perf_counter() - began
        share = f"{asked() / seconds:.0%} of the time was the CNN's"
        console.say(f"{done} explained in {seconds:.1f} s, {share}")
        if len(results) == len(paths):
            _list_all(Path(out))
    return results


def _free(out: Path, name: str, path: Path) -> bool:
    """Whether an image's explanation may be called so: nothing is there, or an earlier one of the
    same file."""
    folder = out / name
    if not os.path.lexists(folder):
        return True
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if not folder.is_dir() or foreign(folder):
            return False
        if not (folder / "explanation.json").exists():
            return True
        told = json.loads((folder / "explanation.json").read_text())
        return told.get("file", told["image"]) == os.path.abspath(path)
    return False  # it cannot be read


def _list_all(out: Path) -> None:
    """Write the table of the explanations in a folder, where there are several and no other page
    lies in its place."""
    page = out / "index.html"
    if len(list(out.glob("*/explanation.json"))) < 2:
        return
    if page.exists() and report.INDEX not in page.read_bytes()[:2000]:
        console.warn(
            f"{page} is another page and stays: the table of all explanations is not written"
        )
        return
    write_text(page, report.index(out))
    console.say(f"all explanations: {page}")


def _explained(paths: Sequence[Path], model: Model, options: dict) -> list[Explanation | Exception]:
    """The explanation of each image, or why there is none. If a group fails, each is tried alone."""
    try:
        return explain.explain_group(paths, model, **options)
    except UsageError:
        raise  # the other images would say the same
    except Exception as error:  # noqa: BLE001 - the other images are still explained
        if len(paths) == 1:
            return [error]
        return [one for path in paths for one in _explained([path], model, options)]


def _written(
    path: Path, folder: Path, found: Explanation | Exception, film: str, fps: float, quiet: bool
) -> dict:
    """The numbers of an image whose explanation is written and told, or its error."""
    numbers = {}
    try:
        if isinstance(found, Exception):
            raise found
        numbers, replaced = found.numbers, (folder / "explanation.json").exists()
        found.write(folder, film, fps)
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 - the other images are still explained
        why = reason(error).removeprefix(f"{path}: ")
        console.say(f"error: {path}: {why}")
        return {**numbers, "image": str(path), "error": why}
    console.explained(path, folder, numbers, replaced, quiet)
    return numbers


def conclude(results: Sequence[dict], count: int, stopped: Sequence[int], force: bool) -> int:
    """Say how many of `count` images were explained, which failed, and which explanations are not to
    be believed; returns the exit status. force: those are no failure."""
    failed = [numbers for numbers in results if "error" in numbers]
    if failed and count > 1:
        names = ", ".join(f"{Path(n['image']).name} ({n['error']})" for n in failed)
        done = f"{len(results) - len(failed)} of {count} explained"
        console.say(f"{done}; {len(failed)} failed: {names}")
    if stopped and len(results) < count:
        console.say(f"interrupted: {len(results)} of {count} images were done")
        return 128 + stopped[0]
    done = [numbers for numbers in results if "error" not in numbers]
    doubtful = [numbers for numbers in done if not numbers["believe"]]
    if doubtful and not force:
        console.say(
            f"{len(doubtful)} of {len(done)} explanations are not to be believed (status 1; "
            "--force: 0)"
        )
    return 1 if failed or (doubtful and not force) else 0
