"""What a CNN has to do for its explanation to mean something; each breach is one line that says
what to change.

A classifier takes images [N, 1, R, R] in [-1, 1] and answers a logit [N].
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import CxrError
from cxr.cnn.adapter import Answer

SAME = 1e-3  # of 1 + |logit|: what arithmetic in another order may change
COPIES = 4  # of each image, to see whether it always gets one answer
LINEAR = {"AddmmBackward0", "MmBackward0", "ConvolutionBackward0", "BmmBackward0"}
AFFINE = (
    *("View", "Reshape", "Squeeze", "Select", "Slice", "Clone", "ToCopy", "Alias", "Expand"),
    *("AddBackward", "SubBackward", "RsubBackward", "MulBackward", "DivBackward", "NegBackward"),
)  # what leaves a line a line, where only one of its inputs comes from the image


@dataclass
class Asked:
    """A network and what it answers to images x [N, 1, R, R], each question asked once."""

    network: nn.Module
    x: Tensor

    @cached_property
    def logit(self) -> Tensor:
        """With its graph; [N] if the network keeps to the contract."""
        with torch.enable_grad():
            self.x = self.x.detach().requires_grad_()
            return self.network(self.x)

    @cached_property
    def slope(self) -> Tensor | None:
        """d logit / d x [N, 1, R, R], None where there is none."""
        return torch.autograd.grad(self.logit.sum(), self.x, allow_unused=True)[0]

    @torch.no_grad()
    def again(self, x: Tensor) -> Tensor:
        """The answers to other images, without a graph."""
        return self.network(x)


def form(asked: Asked) -> str | None:
    y, n = asked.logit, len(asked.x)
    if not isinstance(y, Tensor):
        return f"returns a {type(y).__name__} for {n} images, not a logit [{n}]: return its tensor"
    if y.shape != (n,):
        return f"returns {list(y.shape)} for {n} images, not a logit [{n}]: {_reshaped(y, n)}"
    if not y.is_floating_point():
        return f"returns {str(y.dtype)[6:]}, a class rather than a logit: leave argmax or > out"
    if y.device != asked.x.device:
        return f"answers on {y.device} where the images are on {asked.x.device}: take .to() out"
    return None


def _reshaped(y: Tensor, n: int) -> str:
    """What to change about answers of the wrong shape."""
    if y.numel() == n and y.ndim > 1:
        return "add .flatten()"
    if y.ndim == 2 and len(y) == n:
        return (
            "say --target NAME or NUMBER, or wrap it in cxrgan.adapt(module, output='logits', "
            "target=...)"
        )
    return "end in a pooling and a linear layer, or keep the batch apart"


def finite(asked: Asked) -> str | None:
    bad = (~asked.logit.isfinite()).sum().item()
    if bad:
        kind = "NaN" if asked.logit.isnan().any() else "infinity"
        return (
            f"answers {kind} to {bad} of {len(asked.x)} images: look for a division by zero, log(0)"
            " or weights that are not numbers"
        )
    return None


def gradient(asked: Asked) -> str | None:
    if not asked.logit.requires_grad or asked.slope is None:
        return "its logit has no gradient; take no_grad(), detach(), numpy() and argmax out"
    if not asked.slope.isfinite().all():
        return "its gradient at the image is not finite: look for sqrt(0), log(0) or 0 / 0"
    if not asked.slope.any():
        return (
            "its gradient at the image is zero everywhere: take round(), sign(), thresholds and "
            "clamps out"
        )
    return None


def repeats(asked: Asked) -> str | None:
    first = asked.logit.detach().repeat(COPIES)
    for _ in range(2):  # what is dropped by chance may be dropped again
        second = asked.again(asked.x.repeat(COPIES, 1, 1, 1))
        if _apart(first, second):
            return (
                f"gives the same image another answer each time ({_pair(first, second)}): dropout "
                "or noise is on; write F.dropout(x, training=self.training), and do not call train()"
            )
    return None


def alone(asked: Asked) -> str | None:
    whole = asked.logit.detach()
    ones = [asked.again(x[None]) for x in asked.x]
    if any(y.shape != (1,) for y in ones):
        return (
            f"returns {list(ones[0].shape)} for 1 image, not a logit [1]: say flatten() or "
            "squeeze(1), not squeeze()"
        )
    each = torch.cat(ones)
    if _apart(whole, each):
        return (
            f"answers an image in a batch otherwise than alone ({_pair(whole, each)}): batch norm "
            "is in training mode, or the batch is normalised as a whole; do not call train(), and "
            "normalise each image"
        )
    return None


def unbounded(asked: Asked) -> str | None:
    """Probabilities, told by that nothing drives the answers out of [0, 1]: neither the images nor
    black, white, and each image moved along its gradient. A last linear layer acquits."""
    part = next((m for m in asked.network.modules() if isinstance(m, Answer)), None)
    if part is not None and part.output.startswith("prob"):
        return None  # they are, and become logits
    answers, linear = [], []

    def note(_, given: tuple, answer: Tensor) -> None:  # what the CNN itself answers
        y = answer if part is None else given[0]
        answers.append(y.detach())
        linear.append(_ends_linear(y))

    x, slope = asked.x.detach(), asked.slope.sign()
    probes = torch.cat([torch.ones_like(x[:1]), -torch.ones_like(x[:1]), x, x + slope, x - slope])
    with (part or asked.network).register_forward_hook(note):
        with torch.enable_grad():
            asked.network(asked.x[:1])  # one image's graph tells how it ends
        for probe in probes.clamp(-1, 1).split(len(x)):
            asked.again(probe)
    lowest, highest = min(y.min() for y in answers), max(y.max() for y in answers)
    if lowest < 0 or highest > 1 or linear[0]:
        return None
    kind = "probabilities" if part is not None and part.output == "logits" else "probability"
    return (
        f"all answers lie within [0, 1] ({lowest:.2f} to {highest:.2f}), which looks like "
        f"probabilities: return the logit, or say cxrgan.adapt(module, output={kind!r}, ...)"
    )


CHECKS = {
    "a logit [N]": form,
    "finite": finite,
    "the same answer twice": repeats,
    "a gradient reaches the image": gradient,
    "the same answer alone and in a batch": alone,
    "logits, not probabilities": unbounded,
}


def breaches(network: nn.Module, x: Tensor) -> dict[str, str | None]:
    """For each check, by name, the line that says what to change, or None. Past a breach nothing is
    asked, since it spoils what follows; but a batch does not spoil the range of the answers.

    x: [N, 1, R, R] in [-1, 1], N of 2 or more.
    """
    asked, found = Asked(network, x), {}
    with torch.random.fork_rng(devices=[]):  # what the CNN draws is not the next one's
        for name, check in CHECKS.items():
            found[name] = check(asked)
            if found[name] and check is not alone:
                break
    return found


def keep_to(network: nn.Module, name: str, size: int, device: str | torch.device) -> None:
    """Raise CxrError with the first breach on a few pictures of `size` pixels; `name` begins it."""
    for line in breaches(network, pictures(size, 2).to(device)).values():
        if line:
            raise CxrError(f"{name}: {line}")


def pictures(size: int, n: int = 4) -> Tensor:
    """Clouds [n, 1, size, size] in [-1, 1], always the same: smooth, as lungs are, with grain."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, 1, 8, 8, generator=random)
    clouds = F.interpolate(coarse, (size, size), mode="bicubic")
    grain = torch.randn(n, 1, size, size, generator=random)
    return (0.5 * clouds + 0.1 * grain).clamp(-1, 1)


def _apart(a: Tensor, b: Tensor) -> bool:
    share = SAME if a.dtype in (torch.float32, torch.float64) else 30 * SAME
    return bool(((a - b).abs() > share * (1 + a.abs())).any())


def _pair(a: Tensor, b: Tensor) -> str:
    """The two answers that differ most."""
    i = (a - b).abs().argmax()
    return f"{a[i].item():.3f} and {b[i].item():.3f}"


def _ends_linear(y: Tensor) -> bool:
    """Whether the last operation but shifts, scales and reshapes is a linear layer, whose answers
    no interval holds."""
    node = y.grad_fn
    while node is not None and node.name().startswith(AFFINE):
        before = [earlier for earlier, _ in node.next_functions if earlier is not None]
        node = before[0] if len(before) == 1 else None
    return node is not None and node.name() in LINEAR
