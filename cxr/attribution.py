"""Heat maps that ask the classifier for its gradient: where does the logit come from?

A classifier is any `nn.Module` from images [N, 1, R, R] in [-1, 1] to a logit [N], in eval mode. It
is only read: no gradient is left on its parameters and no hook stays behind.

An integral's completeness error is |sum(map) - change| / max(|change|, FLOOR), where change is the
difference of the logit between the two ends.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import CxrError
from cxr.cnn import cost

TOLERANCE = 0.01  # completeness error at which an integral counts as converged
MAX_STEPS = 1024
FLOOR = 0.1  # logits; a smaller change is no change, and an error relative to it would be noise
PIXELS_AT_ONCE = 2**19  # bounds the images' own memory: 128 of 64 x 64 pixels, 8 of 256 x 256


def gradient(classifier: nn.Module, x: Tensor) -> Tensor:
    """The signed gradient of the logit (Simonyan et al. 2013, without the absolute value).

    x: [N, 1, R, R] in [-1, 1]. Returns float32 [N, R, R], logits per unit of intensity.
    Raises CxrError where the classifier breaks its contract (see `_logit`).
    """
    return _slopes(classifier, x)[:, 0].float()


def gradient_and_grad_cam(
    classifier: nn.Module, x: Tensor, layer: nn.Module | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logit [N], `gradient` [N, R, R] and `grad_cam` [N, R, R], from one pass through the
    classifier. Without a layer there is no Grad-CAM."""
    if layer is None:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logit = _logit(classifier, x)
            (slopes,) = torch.autograd.grad(logit.sum(), x)
        return logit.detach(), slopes[:, 0].float(), None
    logit, slopes, output, weights = _slopes_at(classifier, x, layer)
    return logit, slopes[:, 0].float(), _cam(output, weights, x)


def grad_cam(classifier: nn.Module, x: Tensor, layer: nn.Module | None = None) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017): ReLU(sum_c mean(d logit / d A_c) A_c), upsampled to R.

    x: [N, 1, R, R] in [-1, 1]; layer: a module of the classifier with output A [N, C, h, w], by
    default `last_convolution`. Returns float32 [N, R, R], never negative (bilinear upsampling).
    Raises CxrError if there is no such layer or the logit does not depend on it.
    """
    layer = last_convolution(classifier, x) if layer is None else layer
    _, _, output, slopes = _slopes_at(classifier, x, layer)
    return _cam(output, slopes, x)


def _cam(output: Tensor, slopes: Tensor, x: Tensor) -> Tensor:
    weights = slopes.mean((2, 3), keepdim=True)  # [N, C, 1, 1]
    maps = F.relu((weights * output).sum(1, keepdim=True))  # [N, 1, h, w]
    return F.interpolate(maps.float(), x.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def _slopes_at(
    classifier: nn.Module, x: Tensor, layer: nn.Module
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logit [N], its gradient with respect to `x`, the layer's output [N, C, h, w], and the
    gradient with respect to that output."""
    outputs = []

    def keep(module, inputs, output):
        outputs.append(output)
        return output.clone()  # an in-place activation after the layer must not change our copy

    with torch.enable_grad(), layer.register_forward_hook(keep):
        x = x.detach().requires_grad_()
        logit = _logit(classifier, x)
        slope, *slopes = torch.autograd.grad(logit.sum(), [x, *outputs], allow_unused=True)
    if not slopes or slopes[-1] is None:
        raise CxrError("Grad-CAM: the logit does not depend on this layer; choose another")
    return logit.detach(), slope, outputs[-1].detach(), slopes[-1]


def last_convolution(classifier: nn.Module, x: Tensor) -> nn.Module:
    """The last convolution to run whose output has more than one pixel, found by running x[:1].

    A convolution is a module with a 4-D `weight` and a 4-D output, whatever its class.
    x: [N, 1, R, R] in [-1, 1]. Raises CxrError if the classifier has none, or none but in the first
    half of its layers, as a vision transformer, whose last map says little of the answer.
    """
    ran, last = 0, None  # layers with weights, in the order in which they run

    def note(module, inputs, output):
        nonlocal ran, last
        ran += 1
        is_map = isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1
        if module.weight.ndim == 4 and is_map:
            last = ran, module

    with torch.no_grad(), ExitStack() as hooks:
        for module in classifier.modules():
            if isinstance(module, torch.jit.ScriptModule):  # which takes no hook
                continue
            if isinstance(getattr(module, "weight", None), Tensor):
                hooks.enter_context(module.register_forward_hook(note))
        classifier(x[:1])
    if last is None:
        raise CxrError(
            "Grad-CAM: this classifier has no convolution that puts out a map, or, as a file of "
            "TorchScript or torch.export, lets no one see it"
        )
    if last[0] < ran / 2:
        raise CxrError(
            f"Grad-CAM: the last convolution is layer {last[0]} of {ran}; what the others make of its "
            "map, Grad-CAM does not see"
        )
    return last[1]


def integrated_gradients(
    classifier: nn.Module,
    x: Tensor,
    baseline: Tensor,
    steps: int = 16,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
    logit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Integrated gradients (Sundararajan et al. 2017) along the straight line of images.

    The map is (x - baseline) times the mean gradient on the line, by Clenshaw-Curtis quadrature with
    `steps` at first, an even number. The steps of an image are doubled until its completeness error is under
    `tolerance` or `max_steps` is reached; what was asked is not asked again. Use a blurred or a mean
    image as the baseline. A constant image does not work with a network that normalises the contrast
    of its input, as ours does: the integral hardly converges.

    x: [N, 1, R, R] in [-1, 1]; baseline: the same, or [1, 1, R, R] for all images; logit: the
    classifier's logit [N] on `x`, if it is known.
    Returns maps float32 [N, R, R] and their completeness errors float32 [N], whether or not they
    are under `tolerance`.
    """
    x, baseline = x.detach(), baseline.detach().expand_as(x)
    logit = _logits(classifier, x) if logit is None else logit.detach().float()
    change = logit - _logits(classifier, baseline)  # [N]
    found = [
        _line_integral(classifier, *ends, span, steps, tolerance, max_steps)
        for *ends, span in zip(x, baseline, change)
    ]
    maps, errors = zip(*found)
    return torch.stack(maps), torch.stack(errors)


def latent_integrated_gradients(
    classifier: nn.Module,
    path: Callable[[Tensor], Tensor],
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
    logits: Tensor | None = None,
) -> tuple[Tensor, float, int]:
    """Integrated gradients along a path of generated images: sum_k grad f . (x_{k+1} - x_k).

    The gradient of the logit f in step k is the mean of the gradients at the two ends of the step
    (trapezoidal rule). The grid of t is even and has 16 steps at first. The steps are doubled until
    the completeness error is under `tolerance` or `max_steps` is reached; what was asked on a coarser
    grid is not asked again. The map is never rescaled to fit.

    path: a function from t [K] in [0, 1], on the CPU, to images [K, 1, R, R] in [-1, 1], on the
    classifier's device; logits: the classifier's logits [2] at the ends of the path, if they are
    known.
    Returns the map float32 [R, R], the completeness error, and the number of steps. The map sums to
    f(path(1)) - f(path(0)), up to the completeness error, which may be above `tolerance`.
    """
    with torch.no_grad():
        ends = path(torch.tensor([0.0, 1.0]))  # [2, 1, R, R]
    logits = _logits(classifier, ends) if logits is None else logits.detach().float()
    change = logits.diff()  # [1]
    steps, t = min(16, max_steps), torch.linspace(0, 1, min(16, max_steps) + 1)
    images, slopes = _along(classifier, path, t, ends.shape[-2:].numel())
    while True:
        heat = ((slopes[1:] + slopes[:-1]) / 2 * images.diff(dim=0)).sum(0)[0].float()
        error = _completeness_error(heat[None], change).item()
        if error < tolerance or 2 * steps > max_steps:
            return heat, error, steps
        between = (torch.arange(steps) + 0.5) / steps
        steps *= 2
        new = _along(classifier, path, between, ends.shape[-2:].numel())
        images, slopes = (_interleaved(*pair) for pair in zip((images, slopes), new))


def smooth(heat: Tensor, sigma: float) -> Tensor:
    """A map [R, R] blurred by a Gaussian of `sigma` pixels, which is reflected at the border so
    that the sum of the map does not change."""
    size = heat.shape[-1]
    ramp = torch.arange(size, device=heat.device, dtype=heat.dtype)
    apart = ramp[:, None] - ramp
    mirrored = [apart, ramp[:, None] + ramp + 1, ramp[:, None] + ramp + 1 - 2 * size]
    kernel = sum((-(d / sigma).square() / 2).exp() for d in mirrored)  # [R, R], symmetric
    kernel = kernel / kernel.sum(1, keepdim=True)
    return kernel.T @ heat @ kernel


def magnitude(heat: Tensor) -> Tensor:
    """The strength of a map [R, R] at each place, without its sign: the absolute value, smoothed by
    a Gaussian of R / 32 pixels because a gradient changes its sign from pixel to pixel."""
    return smooth(heat.detach().abs(), heat.shape[-1] / 32)


def _line_integral(
    classifier: nn.Module,
    x: Tensor,
    baseline: Tensor,
    change: Tensor,
    steps: int,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """The map [R, R] and its completeness error of one image [1, R, R]; change: of the logit."""

    def ask(part: Tensor) -> Tensor:
        part = part.to(x).view(-1, 1, 1, 1)
        return _slopes(classifier, baseline + part * (x - baseline))

    def asked(t: Tensor) -> Tensor:
        return torch.cat(list(_in_parts(classifier, t, x.shape[-2:].numel(), ask)))

    steps = min(steps, max_steps)
    slopes = asked(_bent(steps))
    while True:
        mean = torch.einsum("k, kchw -> chw", _clenshaw_curtis(steps).to(slopes), slopes)
        heat = ((x - baseline) * mean)[0].float()
        error = _completeness_error(heat[None], change[None])[0]
        if error < tolerance or 2 * steps > max_steps:
            return heat, error
        steps *= 2
        slopes = _interleaved(slopes, asked(_bent(steps)[1::2]))


def _bent(steps: int) -> Tensor:
    """The nodes [steps + 1] of Clenshaw-Curtis quadrature on [0, 1]."""
    return (1 - torch.linspace(0, torch.pi, steps + 1, dtype=torch.float64).cos()) / 2


def _clenshaw_curtis(steps: int) -> Tensor:
    """Their weights [steps + 1], whose sum is 1, of an even number of steps (Waldvogel 2006)."""
    k = torch.arange(1, steps // 2 + 1, dtype=torch.float64)
    share = torch.where(k == steps // 2, 1.0, 2.0) / (4 * k.square() - 1)
    turns = torch.arange(steps + 1, dtype=torch.float64)[:, None] * k * (2 * torch.pi / steps)
    weights = (1 - turns.cos() @ share) / steps
    weights[[0, -1]] /= 2
    return weights


def _along(classifier: nn.Module, path: Callable, t: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """The images at the places t [K] of a path, of so many pixels, and the gradients at them, both
    [K, 1, R, R]."""

    def ask(part: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            images = path(part)
        return images, _slopes(classifier, images)

    parts = zip(*_in_parts(classifier, t, pixels, ask))
    return tuple(torch.cat(part) for part in parts)


def _interleaved(a: Tensor, b: Tensor) -> Tensor:
    """a0, b0, a1, b1, ..., of K + 1 and K rows."""
    both = torch.empty(len(a) + len(b), *a.shape[1:], dtype=a.dtype, device=a.device)
    both[::2], both[1::2] = a, b
    return both


def _in_parts(classifier: nn.Module, t: Tensor, pixels: int, ask: Callable) -> Iterator:
    """What `ask` gives for the first of t [K] alone, at which it is counted what the classifier
    keeps for its gradient, then for as many at once as memory allows."""
    with cost.counted(classifier) as kept:
        first = ask(t[:1])
    yield first
    chunk = min(PIXELS_AT_ONCE // pixels, cost.budget(t.device) // max(1, kept()))
    for part in t[1:].split(max(1, chunk)) if len(t) > 1 else ():
        yield ask(part)


def _completeness_error(maps: Tensor, change: Tensor) -> Tensor:
    """The completeness error [N] (see the module) of maps [N, R, R] for logit changes [N]."""
    return (maps.sum((1, 2)) - change).abs() / change.abs().clamp(min=FLOOR)


def _logit(classifier: nn.Module, x: Tensor) -> Tensor:
    """The classifier's logit [N]; raises CxrError if its shape or its gradient is missing."""
    logit = classifier(x)
    if logit.shape != x.shape[:1]:
        raise CxrError(
            f"the classifier gave {list(logit.shape)} for {len(x)} images; "
            "it must give one logit per image, shape [N]"
        )
    if x.requires_grad and not logit.requires_grad:
        raise CxrError(
            "the classifier's logit has no gradient; remove no_grad() and detach() from its forward"
        )
    return logit


def _logits(classifier: nn.Module, x: Tensor) -> Tensor:
    """Logits float32 [N] in chunks, without gradients."""
    with torch.no_grad():
        return torch.cat([_logit(classifier, part) for part in x.split(_chunk(x))]).float()


def _slopes(classifier: nn.Module, x: Tensor) -> Tensor:
    """d logit / d x, [N, 1, R, R], for the whole batch at once."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(_logit(classifier, x).sum(), x)[0]


def _chunk(x: Tensor) -> int:
    """How many images of this size the classifier gets at once."""
    return max(1, PIXELS_AT_ONCE // x.shape[-2:].numel())
