"""Files that hold a network whole: torch.export programs and TorchScript. A pickle is never read."""

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cxr import CxrError, UsageError

NOTE = "cxrgan-input"  # the file within a program that says what --classifier-input says
SIZES = re.compile(  # symbols, and SymPy's classes with their assumptions; no function
    r"(?:[su]\d+|'\w+'|[A-Z][A-Za-z]*|[a-z]+=(?=True|False)|\d+|[\s+\-*/(),<>])*"
)


def read(file: Path) -> tuple[nn.Module, str | None]:
    """The network of a torch.export program or a TorchScript file, and what it says it takes."""
    names, note = members(file), {NOTE: ""}
    if is_torchscript(names):
        try:
            network = torch.jit.load(str(file), "cpu", _extra_files=note)
        except RuntimeError as error:
            raise CxrError(f"{file} cannot be read as TorchScript ({one_line(error)})") from None
        said = note[NOTE]
        return network, (said.decode() if isinstance(said, bytes) else said) or None
    if not any(name.endswith("/archive_format") for name in names):
        if file.suffix.lower() == ".pt2":
            raise CxrError(f"{file} is no torch.export program: is it whole?")
        raise CxrError(
            f"{file} is a pickle, which may run any code of its author's as it is read: save the "
            "network by torch.export.save or torch.jit.save, or write FILE.py:FUNCTION that "
            "builds it and loads its weights"
        )
    _refuse_code(file)
    try:
        with _no_pickles():
            program = torch.export.load(str(file), extra_files=note)
    except Exception as error:  # noqa: BLE001 - torch raises whatever it meets
        raise CxrError(
            f"{file} cannot be read as a torch.export program ({one_line(error)})"
        ) from None
    return Exported(program), note[NOTE] or None


def members(file: Path) -> list[str]:
    """The names of what lies in an archive; raises CxrError where it is none that holds code or a
    graph."""
    if file.suffix.lower() in (".onnx", ".h5", ".keras"):
        raise CxrError(f"{file}: only PyTorch's networks can be explained, for their gradient")
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError):
        raise CxrError(
            f"{file} is no torch.export program and no TorchScript file: is it whole? Pickles are "
            "not read; write FILE.py:FUNCTION that builds the network and loads its weights"
        ) from None


def is_torchscript(names: list[str]) -> bool:
    """Whether an archive with these members is a TorchScript file."""
    code = any("/code/" in name for name in names)
    return code and any(name.endswith("/constants.pkl") for name in names)


def _refuse_code(file: Path) -> None:
    """Raise CxrError where reading a program would unpickle objects, or evaluate more than the
    arithmetic of a size, which torch has SymPy do."""
    with zipfile.ZipFile(file) as archive:
        texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    for key, value in (pair for text in texts for pair in _pairs(json.loads(text))):
        pickled = key == "path_name" and str(value).startswith(("custom_obj", "opaque_obj"))
        evaluated = key == "expr_str" and not SIZES.fullmatch(str(value))
        if pickled or evaluated or (key == "use_pickle" and value):
            raise CxrError(
                f"{file} holds pickled objects or code ({key} {value}), not tensors alone: "
                "export it without custom objects, or write FILE.py:FUNCTION"
            )


def _pairs(tree: object) -> Iterator[tuple[str, object]]:
    """Every (key, value) of nested JSON."""
    if isinstance(tree, dict):
        yield from tree.items()
        tree = list(tree.values())
    for branch in tree if isinstance(tree, list) else ():
        yield from _pairs(branch)


@contextlib.contextmanager
def _no_pickles() -> Iterator[None]:
    """Have torch.load refuse all but tensors, also where torch itself would not."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


class Exported(nn.Module):
    """A torch.export program; where it was exported for one size of the batch, shown so many
    images at a time."""

    def __init__(self, program: torch.export.ExportedProgram):
        super().__init__()
        self.program = program.module()
        own = program.graph_signature.user_inputs
        shapes = [n.meta["val"].shape for n in program.graph.nodes if n.name in own]
        if len(shapes) != 1 or len(shapes[0]) != 4:
            raise CxrError("the program must take one tensor, [N, channels, size, size]")
        self.batch, *self.shape = (n if isinstance(n, int) else None for n in shapes[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.batch is None:
            return self.program(x)
        full = -len(x) % self.batch  # what the last batch lacks
        padded = torch.cat([x, x[-1:].expand(full, *x.shape[1:])])
        return torch.cat([self.program(part) for part in padded.split(self.batch)])[: len(x)]

    def train(self, mode: bool = True) -> "Exported":
        return self  # it stays as it was exported


def fits(module: Exported, channels: int, size: int | None) -> None:
    """Raise UsageError where a program was exported for images of another shape."""
    takes, given = module.shape, [channels, size, size]
    if any(a is not None and a != b for a, b in zip(takes, given)):
        asked = f"{takes[1]},{takes[0]}"
        raise UsageError(
            f"--classifier-input says {given[1]} pixels and {given[0]} channels, the program takes "
            f"{takes[1]} pixels and {takes[0]} channels: begin with {asked}"
        )


def one_line(error: BaseException) -> str:
    """What an error says, in one line of 300 characters at most."""
    return " ".join(str(error).split())[:300] or type(error).__name__
