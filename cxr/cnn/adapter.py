"""What lies between any CNN and the one logit that is explained.

Images come as [N, 1, R, R] in [-1, 1], of the GAN's size R. The CNN gets them as it was trained:
[N, channels, size, size] in its own range. Its answers, one or many, become a logit [N]. All of it
has a gradient.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import CxrError, UsageError
from cxr.data.listing import joined
from cxr.layers import against_rest

IMAGENET = {
    "size": 224,
    "channels": 3,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "value_range": (0.0, 1.0),
}
OUTPUTS = ("logit", "probability", "logits", "probabilities")
SLACK = 1e-3  # rounding may take a probability so far out of [0, 1]
EPS = 1e-6  # a probability is taken for no nearer to 0 or 1 than this: its logit is within 13.9


def adapt(
    module: nn.Module,
    size: int | None = 224,
    channels: int = 3,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    output: str = "logit",
    target: str | int | None = None,
    classes: Sequence[str] | None = None,
) -> "Adapted":
    """A CNN as `cxrgan` asks it: images [N, 1, R, R] in [-1, 1] to the target's logit [N].

    Parameters
    ----------
    module : takes [N, channels, size, size]; answers [N], [N, 1] or [N, K]
    size : pixels a side that the CNN was trained on, whatever R is; None for any size
    channels : the grey image is repeated in each
    mean, std : subtracted, then divided by, after `value_range`; one number or one per channel
    value_range : what black and white were in the CNN's training, before `mean` and `std`
    output : what the CNN answers. "logit": a logit for each finding on its own, or only one;
        "probability": the same after a sigmoid; "logits": of one softmax over K classes, which
        becomes the log-odds of the target against the rest; "probabilities": after the softmax
    target : which of K answers, by its name or number; not for a CNN with one answer
    classes : the names of the answers; by default the module's own `classes` or `pathologies`

    `IMAGENET` holds what most torchvision and timm models take: `adapt(net, **IMAGENET, ...)`.
    Raises UsageError where these do not fit together.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"adapt takes a torch.nn.Module, not {type(module).__name__}")
    classes = names_of(module) if classes is None else list(classes)
    before = inputs(size, channels, mean, std, value_range)
    return Adapted(before, module, Answer(output, find_target(target, classes), classes))


class Adapted(nn.Module):
    """What prepares the image, the CNN, and what makes its answers a logit."""

    def __init__(self, before: nn.Module, module: nn.Module, answer: "Answer"):
        super().__init__()
        self.before, self.module, self.answer = before, module, answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.module(self.before(x)))  # [N]

    def train(self, mode: bool = True) -> "Adapted":
        with suppress(NotImplementedError):  # an exported program stays as it was exported
            super().train(mode)
        return self


def inputs(
    size: int | None = None,
    channels: int = 1,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> nn.Sequential:
    """Images [N, 1, R, R] in [-1, 1] to what a CNN was trained on; see `adapt`."""
    low, high = value_range
    if not low < high:
        raise UsageError(f"value_range ({low:g}, {high:g}): the lower end comes first")
    if channels < 1 or (size is not None and size < 1):
        raise UsageError(f"size {size} and channels {channels} must be 1 or more")
    shift, scale = _each(mean, channels, "mean", 0.0), _each(std, channels, "std", 1.0)
    if (scale <= 0).any():
        raise UsageError("std must be above 0")
    return nn.Sequential(Resize(size), Range(low, high), Channels(channels), Norm(shift, scale))


def _each(value, channels: int, name: str, default: float) -> Tensor:
    values = torch.as_tensor(default if value is None else value, dtype=torch.float32).flatten()
    if len(values) not in (1, channels):
        raise UsageError(f"{name} has {len(values)} numbers for {channels} channels")
    return values.view(1, -1, 1, 1)


class Every(nn.Module):
    """An adapted CNN with a logit for each of some of its answers [N, len(places)]."""

    def __init__(self, adapted: Adapted, places: Sequence[int]):
        super().__init__()
        self.adapted, self.places = adapted, places

    def forward(self, x: Tensor) -> Tensor:
        answer = self.adapted.answer
        y = answer.each(self.adapted.module(self.adapted.before(x)))  # [N, K]
        return torch.stack([answer.logit(y, place) for place in self.places], 1)


class Resize(nn.Module):
    """[N, C, R, R] to [N, C, size, size], bilinear and antialiased."""

    def __init__(self, size: int | None):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if self.size is None or x.shape[-1] == self.size:
            return x
        return F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)


class Range(nn.Module):
    """[-1, 1] to [low, high]."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        return self.low + (x + 1) * ((self.high - self.low) / 2)


class Channels(nn.Module):
    """[N, 1, H, W] to [N, channels, H, W], the same grey in each."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, self.channels, -1, -1)


class Norm(nn.Module):
    """(x - mean) / std, for each channel."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Answer(nn.Module):
    """A CNN's answers [N], [N, 1] or [N, K] to the logit [N] of one of them."""

    def __init__(self, output: str, target: int | None, classes: Sequence[str]):
        super().__init__()
        if output not in OUTPUTS:
            raise UsageError(f"output {output!r}: say one of {', '.join(OUTPUTS)}")
        self.output, self.target, self.classes = output, target, list(classes)

    def forward(self, y: Tensor) -> Tensor:
        y = self.each(y)
        return self.logit(y, self.column(y))

    def each(self, y: Tensor) -> Tensor:
        """The answers as [N, K]."""
        if not isinstance(y, Tensor) or y.ndim == 0:
            raise CxrError(f"the CNN gives {described(y)}, not a tensor [N] or [N, K]{_inside(y)}")
        return y.float()[:, None].flatten(1)

    def logit(self, y: Tensor, chosen: int) -> Tensor:
        """The logit [N] of one of the answers [N, K]."""
        if self.output == "logits":
            return against_rest(y, chosen)
        if self.output == "logit":
            return y[:, chosen]
        if (outside := (y[:, chosen] < -SLACK) | (y[:, chosen] > 1 + SLACK)).any():
            found = y[:, chosen][outside][0].item()
            raise CxrError(
                f"the CNN answers {found:.3g}, which is no probability: say output='logit' or 'logits'"
            )
        return log_odds(y[:, chosen])

    @property
    def told(self) -> tuple[str, str] | None:
        """What a logit below and above 0 speaks for; an answer without a name goes by its number.
        None for a CNN with one answer that has no name."""
        names, place = self.classes, self.target
        place = 0 if place is None and len(names) == 1 else place
        if place is None:
            return None
        if place >= len(names) or not names[place]:
            return "another answer", f"answer {place}"
        name = names[place]
        softmax = self.output in ("logits", "probabilities")
        return joined({*names} - {name}, f"no {name}") if softmax else f"no {name}", name

    def column(self, y: Tensor) -> int:
        """Which column of `y` [N, K] is the target's; raises CxrError where none can be."""
        given, known = y.shape[1], ", ".join(filter(None, self.classes))
        if given == 1:
            if self.target is not None:
                raise CxrError("the CNN gives one answer for an image: leave the target out")
            if self.output == "logits":
                raise CxrError("one answer is no softmax: say output='logit'")
            return 0
        if self.target is None:
            raise CxrError(
                f"the CNN gives {given} answers for an image: say which is the target"
                + (f", one of {known}" if known else f", 0 to {given - 1}")
            )
        if self.classes and len(self.classes) != given:
            raise CxrError(f"the CNN gives {given} answers and has {len(self.classes)} classes")
        if self.target >= given:
            raise CxrError(f"target {self.target}: the CNN's answers are 0 to {given - 1}")
        return self.target


def log_odds(p: Tensor) -> Tensor:
    """The logit of probabilities, finite and with a finite gradient at 0 and 1, too."""
    kept = p + (p.clamp(EPS, 1 - EPS) - p).detach()  # the gradient is the unclamped one's
    return torch.log(kept) - torch.log1p(-kept)


def names_of(module: nn.Module) -> list[str]:
    """The names of a module's answers: its `classes`, or TorchXRayVision's `pathologies` or
    `targets`."""
    for attribute in ("classes", "pathologies", "targets"):
        names = getattr(module, attribute, None)
        if isinstance(names, Sequence) and not isinstance(names, str):
            return [str(name) for name in names]
    return []


def find_target(target: str | int | None, classes: Sequence[str]) -> int | None:
    """The number of the answer called `target`; a number is one already. Raises UsageError."""
    if target is None:
        return None
    if target in classes:
        if list(classes).count(target) > 1:
            raise UsageError(f"target {target}: several classes are called so; give a number")
        return list(classes).index(target)
    if isinstance(target, int) or target.isdecimal():
        number = int(target)
        if number < 0 or (classes and number >= len(classes)):
            raise UsageError(f"target {number}: there are {len(classes) or 'only'} classes from 0")
        return number
    if not classes:
        raise UsageError(f"target {target}: the CNN does not name its answers; give a number")
    raise UsageError(
        f"target {target}: no such class; there are {', '.join(filter(None, classes))}"
    )


def _inside(value: object) -> str:
    """What to do about a dictionary or several tensors in place of one."""
    if isinstance(value, dict):
        names = ", ".join(str(name) for name in list(value)[:6])
        return f": return one of {names}, in a module around it"
    return ": return one of them, in a module around it" if isinstance(value, tuple | list) else ""


def described(value: object) -> str:
    """A value's shape, or its kind where it has none."""
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
