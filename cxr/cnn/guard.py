"""While a user's own code runs: what it prints or raises is shown as its own, with the line of its
file."""

import contextlib
import io
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from cxr import CxrError

ADVICE = {
    r"Expected more than 1 value per channel": "batch norm is in training mode: do not call train()",
    r"to have (\d+) channels, but got 1 ": "wrap it in cxrgan.adapt(module, channels=...)",
    r"shapes cannot be multiplied|size is too small": "wrap it in cxrgan.adapt(module, size=...)",
    r"same device": "have each tensor registered by register_buffer, so that it moves along",
    r"CUDA enabled|No CUDA GPUs|NVIDIA driver": "leave .cuda() out: --device moves the CNN",
    r"must (have|be) the same (d?type)|same dtype|should be the same": "call .float() on it",
}


@contextlib.contextmanager
def guard(file: Path, spec: str, shown: set[str] | None = None) -> Iterator[None]:
    """While a user's code runs: what it prints comes line by line under its file's name, and what
    it raises as a CxrError with the line of its file."""
    echo = _Echo(file.name, set() if shown is None else shown)
    try:
        with contextlib.redirect_stdout(echo), contextlib.redirect_stderr(echo):
            yield
    except CxrError as error:
        place = _place(error, file) or ("" if str(file) in str(error) else spec)
        raise type(error)(f"{place}: {error}" if place else str(error)) from error
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        place = _place(error, file)
        raise CxrError(f"{spec} failed: {told(error)}" + f" ({place})" * bool(place)) from error
    finally:
        echo.close()


class _Echo(io.TextIOBase):
    """A stream whose lines go to stderr under a name, each once."""

    def __init__(self, name: str, shown: set[str]):
        self.name, self.shown, self.rest, self.out = name, shown, "", sys.stderr

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).replace("\r", "\n").split("\n")
        for line in lines:
            if line.strip() and line not in self.shown:
                self.shown.add(line)
                print(f"{self.name}: {line}", file=self.out, flush=True)
        return len(text)

    def close(self) -> None:
        if self.rest:
            self.write("\n")
        super().close()


def _place(error: BaseException, file: Path) -> str:
    """The file and the line where a user's code failed; empty where it was not theirs."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{Path(error.filename).name}, line {error.lineno}"
    folder, frames = file.resolve().parent, traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        path = Path(frame.filename).resolve()
        if path == file.resolve() or path.parent == folder:
            return f"{path.name}, line {frame.lineno}"
    return ""


def told(error: BaseException) -> str:
    """An error in one line, with advice where its cause is known."""
    if isinstance(error, SystemExit):
        return f"it ended the program (sys.exit, status {error.code})"
    text = str(error)
    if "loading state_dict" in text:
        return _lacking_keys(text)
    line = f"{type(error).__name__}: {' '.join(text.split())}"
    line = line if len(line) < 500 else f"{line[:500]}..."
    found = [advice for pattern, advice in ADVICE.items() if re.search(pattern, text)]
    return "; ".join([line.rstrip("."), *found[:1]])


def _lacking_keys(text: str) -> str:
    """What load_state_dict says, with the keys named and a prefix recognised."""
    lists = {
        kind: re.findall(r'"([^"]+)"', "".join(re.findall(rf"{kind} key\(s\)[^:]*: (.*)", text)))
        for kind in ("Missing", "Unexpected")
    }
    missing, unexpected = lists["Missing"], lists["Unexpected"]
    parts = [f"{k.lower()} keys: {_few(names)}" for k, names in lists.items() if names]
    parts += [" ".join(line.split()) for line in text.splitlines() if "size mismatch" in line][:3]
    for key in missing[:1]:
        found = [name.removesuffix(key) for name in unexpected if name.endswith("." + key)]
        if found and all(name.startswith(found[0]) for name in unexpected):
            who = ", as DataParallel saves them" if found[0] == "module." else ""
            parts.append(
                f"the file's keys begin with `{found[0]}`{who}: load "
                f"{{k.removeprefix('{found[0]}'): v for k, v in state.items()}}"
            )
    return "load_state_dict: " + "; ".join(parts)


def _few(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
