"""A CNN of the user's own: a function in a Python file, or a file that holds a network whole.

Whatever the user's code raises or prints is shown as its own, with the line of its file. A pickle
is never read.
"""

import copy
import importlib.util
import re
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cxr import CxrError, UsageError, console
from cxr.cnn import adapter, contract, cost, programs
from cxr.cnn.adapter import IMAGENET, Adapted, Answer
from cxr.cnn.guard import guard

FOREIGN = (".pt2", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".onnx", ".h5", ".keras")
FORMS = {
    "python": "Python: its author's code, which may do whatever you may",
    "torchscript": "TorchScript: its author's program, in a language of tensors; no Python",
    "export": "torch.export: a graph of tensor operations; none of its author's code",
}
SEVERAL = {
    "logits": "the logits of one softmax",
    "probabilities": "probabilities",
}


def is_own(spec: str) -> bool:
    """Whether a `--classifier` names a CNN of the user's, not a model file."""
    file, colon, _ = spec.rpartition(":")
    if (colon and file.endswith(".py")) or spec.lower().endswith((".py", *FOREIGN)):
        return True
    return zipfile.is_zipfile(spec)


def load(
    spec: str,
    size: int,
    device: str | torch.device = "cpu",
    target: str | None = None,
    given: str | None = None,
) -> "Own":
    """The CNN of FILE.py:FUNCTION, of a torch.export program or of a TorchScript file.

    target: which of its answers, by name or number; given: what it takes, as `read_input` reads
    it; size: of the pictures it is tried with, in pixels. Whether it keeps to the contract, the
    module `contract` tells.
    Raises CxrError, UsageError where the file, the function or an option is not as it has to be.
    """
    file, function = split(spec)
    with guard(file, spec):
        module, said = run(file, function) if function else programs.read(file)
        given = given or said
        if not function and given is None:
            raise UsageError(
                f"{spec} does not say what it takes: give --classifier-input "
                "SIZE,CHANNELS,LOW,HIGH or --classifier-input imagenet"
            )
        whole = wrap(settle(module), size, target, given)
        return Own(whole, file, spec).to(device).requires_grad_(False)


def load_every(spec: str, size: int, device: str | torch.device) -> tuple["Own", list[str]]:
    """The CNN of FILE.py:FUNCTION with all of its answers: images [N, 1, R, R] to logits [N, K], and
    their names; an answer without one goes by its number. Of a softmax over two classes the second
    alone is an answer, since the first says nothing else. The contract is checked on the first.

    Raises CxrError, UsageError where the file, the function or the answers are not as they have to
    be.
    """
    file, function = split(spec)
    if not function:
        raise UsageError(f"{spec}: give several findings as FILE.py:FUNCTION, or as a model file")
    with guard(file, spec), torch.no_grad():
        module = settle(run(file, function)[0])
        plain = not isinstance(module, Adapted)
        if plain:
            answer = Answer(kind(module, nn.Identity(), size), None, adapter.names_of(module))
            module = Adapted(nn.Identity(), module, answer)
        y = module.to(device).module(module.before(contract.pictures(size, 2).to(device)))
        if not isinstance(y, Tensor) or y.ndim not in (1, 2):
            raise CxrError(f"the CNN gives {adapter.described(y)}, not a tensor [N] or [N, K]")
    output, classes = module.answer.output, module.answer.classes
    count = 1 if y.ndim == 1 else y.shape[1]
    first = Answer(output, 0, classes) if count > 1 else Answer(output, None, ())
    asked = Own(Adapted(module.before, module.module, first), file, spec).requires_grad_(False)
    contract.keep_to(asked, spec, size, device)
    names = classes or [str(place) for place in range(count)]
    if len(names) != count:
        raise CxrError(f"{spec}: the CNN gives {count} answers and has {len(names)} classes")
    if plain and count > 1 and output != "logit":
        console.say(
            f"{spec}: its {count} answers are taken for {SEVERAL[output]}; if they are not, say "
            "cxrgan.adapt(module, output=...)"
        )
    softmax = output == "logits" or (
        output == "probabilities" and torch.allclose(y.sum(-1), torch.ones(()).to(y))
    )
    places = [1] if softmax and count == 2 else range(count)
    every = Own(adapter.Every(module, places), file, spec)
    return every.requires_grad_(False), [names[place] for place in places]


def of_module(module: nn.Module, device: str | torch.device) -> "Own":
    """A copy of a module in eval mode, asked as a file's is."""
    name = name_of(module)
    copied = settle(copy.deepcopy(module))
    return Own(copied, Path(name), name).to(device).requires_grad_(False)


def name_of(module: nn.Module) -> str:
    """The class of the user's own module, within what `adapt` put around it."""
    return type(module.module if isinstance(module, Adapted) else module).__name__


def split(spec: str) -> tuple[Path, str]:
    """The file and the function, empty for a file that holds a network."""
    file, _, function = spec.rpartition(":") if ".py:" in spec else (spec, "", "")
    if not Path(file).is_file():
        raise UsageError(f"{spec}: there is no file {file}")
    if file.endswith(".py") and not function:
        names = re.findall(r"^def (\w+)\(\)", Path(file).read_text(errors="replace"), re.MULTILINE)
        raise UsageError(
            f"{file}: say which function makes the network, as {file}:{(names or ['FUNCTION'])[0]}"
        )
    return Path(file), function


def form(spec: str) -> str:
    """What kind of thing the file is, and whether its author's code runs."""
    if ".py:" in spec:
        return FORMS["python"]
    names = programs.members(Path(spec))
    return FORMS["torchscript" if programs.is_torchscript(names) else "export"]


def run(file: Path, function: str) -> tuple[nn.Module, None]:
    """What FUNCTION of a Python file returns; it runs as a script without arguments would."""
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("own", file))
    sys.modules["own"] = module  # dataclasses look their module up
    sys.path.insert(0, str(file.resolve().parent))  # its neighbours
    words, sys.argv = sys.argv, [str(file)]  # cxrgan's are not its own
    try:
        module.__spec__.loader.exec_module(module)
        if not callable(getattr(module, function, None)):
            names = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == "own"]
            raise CxrError(
                f"{file} has no attribute '{function}' that makes a network; it has "
                f"{', '.join(names) or 'no function at all'}"
            )
        network = getattr(module, function)()
    finally:
        sys.argv = words
    if isinstance(network, dict):
        raise CxrError(f"{file}:{function} returns a dict: build the module and load_state_dict it")
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise CxrError(f"{file}:{function} returns a {kind}, not a torch.nn.Module")
    return network, None


def settle(module: nn.Module) -> nn.Module:
    """The module in eval mode; an exported program stays as it was exported."""
    try:
        return module.eval()
    except NotImplementedError:  # torch says so, and leaves the modules behind it as they were
        for part in module.modules():
            part.training = False
        return module


def wrap(module: nn.Module, size: int, target: str | None, given: str | None) -> nn.Module:
    """The module with what `--target` and `--classifier-input` ask for around it."""
    if target is None and given is None:
        return module
    if isinstance(module, Adapted):
        if given is not None:
            raise UsageError("--classifier-input: the module's adapt() says already what it takes")
        names = module.answer.classes
        aim = Answer(module.answer.output, adapter.find_target(target, names), names)
        return settle(Adapted(module.before, module.module, aim))
    takes = read_input(given) if given else {}
    if isinstance(module, programs.Exported):
        programs.fits(module, takes["channels"], takes["size"])
    before = adapter.inputs(**takes) if given else nn.Identity()
    names = adapter.names_of(module)
    answer = Answer(kind(module, before, size), adapter.find_target(target, names), names)
    return settle(Adapted(before, module, answer))


@torch.no_grad()
def kind(module: nn.Module, before: nn.Module, size: int) -> str:
    """What a module with several answers gives: probabilities where all lie within [0, 1]; else a
    logit for each of its `pathologies`; else the logits of one softmax. One answer: a logit."""
    weight = next(module.parameters(), torch.zeros(()))
    y = module(before.to(weight.device)(contract.pictures(size).to(weight.device)))
    if not isinstance(y, Tensor) or y.ndim < 2 or y[0].numel() == 1:
        return "logit"
    if y.min() >= 0 and y.max() <= 1:
        return "probabilities"
    several = hasattr(module, "pathologies") or hasattr(module, "targets")
    return "logit" if several else "logits"


def read_input(text: str) -> dict:
    """`--classifier-input`: `imagenet`, or SIZE,CHANNELS,LOW,HIGH, as arguments of `inputs`."""
    if text == "imagenet":
        return dict(IMAGENET)
    try:
        size, channels, low, high = text.split(",")
        return {
            "size": int(size),
            "channels": int(channels),
            "value_range": (float(low), float(high)),
        }
    except ValueError:
        raise UsageError(
            f"--classifier-input {text}: say SIZE,CHANNELS,LOW,HIGH, as 224,3,0,1, or imagenet"
        ) from None


class Own(nn.Module):
    """A user's CNN as it is asked: images are clipped to [-1, 1], and so many shown at once as
    memory allows; what its code raises or prints is told to be its own."""

    def __init__(self, network: nn.Module, file: Path, spec: str):
        super().__init__()
        self.network, self.file, self.spec = network, file, spec
        self.shown: set[str] = set()  # lines that it has printed: each is shown once
        self.limits: dict[tuple, int] = {}  # images at once, by size

    @property
    def named(self) -> bool:
        """Whether it names its answers."""
        return isinstance(self.network, Adapted) and bool(self.network.answer.classes)

    @property
    def told(self) -> tuple[str, str] | None:
        """What it tells apart, as `Answer.told`."""
        return self.network.answer.told if isinstance(self.network, Adapted) else None

    def forward(self, x: Tensor) -> Tensor:
        with guard(self.file, self.spec, self.shown):
            x = x.clamp(-1, 1)
            parts = x.split(self.limit(x))
            if len(parts) == 1:
                return self.network(x)
            if torch.is_grad_enabled() and x.requires_grad:  # their graphs would not fit together
                again = {"use_reentrant": False, "preserve_rng_state": False}
                return torch.cat([checkpoint(self.network, part, **again) for part in parts])
            return torch.cat([self.network(part) for part in parts])

    def limit(self, x: Tensor) -> int:
        """How many images of this size are shown at once; twice what heat maps ask for."""
        size = tuple(x.shape[1:])
        if len(x) == 1:
            return 1
        if size not in self.limits:
            self.limits[size] = cost.at_once(self.network, x[:1], 2 * cost.budget(x.device))
        return self.limits[size]

    def train(self, mode: bool = True) -> "Own":
        return self  # it is explained as it answers in use
