"""cxrgan from Python: `import cxrgan`, then `cxrgan.explain(image, classifier=my_module)`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cxr import CxrError, UsageError, images, sampling
from cxr import explain as explainer
from cxr.checkpoints import Model, load_model
from cxr.cnn.adapter import IMAGENET, Adapted, adapt
from cxr.explanation import Explanation

__all__ = ["IMAGENET", "CxrError", "Explanation", "adapt", "explain", "load_model", "sample"]

OneImage: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
OVER = 0.1  # beyond its range, as resizing leaves it: clipped
SEARCH = ("frames", "restarts", "refine", "within", "seed", "timer")
ADAPTS = ("size", "channels", "mean", "std", "value_range", "output", "target", "classes")


def explain(
    image: OneImage | Sequence[OneImage],
    model: str | Path | Model | None = None,
    *,
    classifier: nn.Module | str | None = None,
    **options,
) -> Explanation | list[Explanation]:
    """Explain what a classifier sees in an X-ray, or in each of several.

    Parameters
    ----------
    image : a file; a PIL image, read as its file is; an array or a tensor of greys or colours,
        [H, W], [H, W, 3], [1, H, W], [1, 3, H, W], or [3, H, W] of equal channels; integers from 0
        to 255 (uint16 and what goes beyond get the contrast of a file), or floats in [0, 1] (in
        [-1, 1] if the least is below -0.5); or a list or a batch [N, ...] of them
    model : a model file, a shipped model's name, or a `Model`; by default `pneumonia`
    classifier : your CNN, a module or `FILE.py:FUNCTION`; by default the model's own. A module is
        copied and put into eval mode
    options : those of `adapt` (size, channels, mean, std, value_range, output, target, classes)
        say what your module takes and answers, `classifier_input` what a file's does; those of
        `cxr.explain.explain` (frames, restarts, refine, within, seed, device) how it is explained

    Returns an `Explanation`, or a list of them for a list or a batch. Raises CxrError, UsageError.
    """
    known = {*ADAPTS, *SEARCH, "classifier_input", "device"}
    if unknown := options.keys() - known:
        raise UsageError(f"no option {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if not (classifier is None or isinstance(classifier, nn.Module | str | Path)):
        raise UsageError(
            f"classifier is a torch.nn.Module or FILE.py:FUNCTION, not a {type(classifier).__name__}"
            + ("; call it" if callable(classifier) else "")
        )
    wraps = {name: options.pop(name) for name in ADAPTS if name in options}
    if isinstance(classifier, nn.Module):
        if "classifier_input" in options:
            raise UsageError("classifier_input is for a file: say what a module takes with adapt's")
        if wraps and isinstance(classifier, Adapted):
            raise UsageError("the module is adapted already: say it all in one adapt()")
        classifier = adapt(classifier, **wraps) if wraps else classifier
    elif wraps.keys() - {"target"}:
        raise UsageError(f"{', '.join(wraps)}: only for a classifier that is a torch.nn.Module")
    elif wraps:
        options |= wraps
    asked = (options.pop(name, None) for name in ("target", "classifier_input"))
    classifier = str(classifier) if isinstance(classifier, Path) else classifier
    loaded = explainer.load_explainer(model, classifier, options.pop("device", "auto"), *asked)
    if not (isinstance(image, list | tuple) or _is_batch(image)):
        return explainer.explain(_alone(image), loaded, **options)
    pictures, many = [_picture(one) for one in image], explainer.at_once(loaded)
    groups = (pictures[first : first + many] for first in range(0, len(pictures), many))
    return [e for group in groups for e in explainer.explain_group(group, loaded, **options)]


@torch.no_grad()
def sample(model: str | Path | Model | None = None, n: int = 8, seed: int = 0) -> np.ndarray:
    """Random lungs, each from healthy to diseased: uint8 [n, doses, R, R]. Raises CxrError."""
    loaded = model if isinstance(model, Model) else load_model(model or explainer.default_model())
    return sampling.lungs(loaded.generator, n, seed)


def _is_batch(image: object) -> bool:
    """Whether an array or a tensor holds several images."""
    if not isinstance(image, np.ndarray | Tensor):
        return False
    colour = image.ndim > 2 and (image.shape[-1] in (3, 4) or image.shape[-3] in (1, 3))
    return image.ndim == 4 or (image.ndim == 3 and not colour)


def _alone(image: OneImage) -> str | Path | np.ndarray:
    """One picture, as `_picture`; raises UsageError where [3, H, W] may be three."""
    three = isinstance(image, np.ndarray | Tensor) and image.ndim == 3 and len(image) == 3
    if three and image.shape[-1] not in (3, 4) and bool((image != image[:1]).any()):
        raise UsageError(
            f"{list(image.shape)}: three pictures, or one in colour? Give a list, or [1, 3, H, W]"
        )
    return _picture(image)


def _picture(image: OneImage) -> str | Path | np.ndarray:
    """A file as it is; anything else as grey uint8 [H, W]."""
    if isinstance(image, str | Path):
        return image
    if isinstance(image, Image.Image):
        pixels = images.grey(image)
        return pixels if pixels.dtype == np.uint8 else _grey(images.unit(_finite(pixels)))
    if isinstance(image, Tensor):
        image = (
            image.detach().cpu().float().numpy()
            if image.is_floating_point()
            else image.cpu().numpy()
        )
    if not isinstance(image, np.ndarray):
        raise UsageError(
            f"an image is a file, a PIL image, an array or a tensor, not {type(image).__name__}"
        )
    return _grey(image)


def _finite(pixels: np.ndarray) -> np.ndarray:
    """The pixels; raises CxrError if one is no number."""
    if not np.isfinite(pixels).all():
        raise CxrError("the image contains NaN or infinite values")
    return pixels


def _grey(pixels: np.ndarray) -> np.ndarray:
    """[H, W], [1 or 3, H, W] or [H, W, 3 or 4] of uint8, uint16 or floats, as uint8 [H, W]."""
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim == 3 and pixels.shape[-1] in (1, 3, 4):
        luma = pixels[..., :3] @ images.LUMA if pixels.shape[-1] > 1 else pixels[..., 0]
        pixels = luma.round().astype(pixels.dtype) if pixels.dtype.kind in "iu" else luma
    if pixels.ndim != 2:
        raise UsageError(f"an image is [H, W], [H, W, 3] or [1, H, W], not {list(pixels.shape)}")
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "iuf":
        raise UsageError(f"an image is of integers or floats, not of {pixels.dtype}")
    shallow = pixels.dtype.kind in "iu" and pixels.dtype != np.uint16  # 8 bits in a wider type
    if shallow and 0 <= pixels.min(initial=0) and pixels.max(initial=0) <= 255:
        return pixels.astype(np.uint8)
    if _finite(pixels).dtype.kind != "f":
        return np.uint8(np.rint(255 * images.unit(pixels)))
    low, high = float(pixels.min()), float(pixels.max())
    signed = -1 - OVER <= low <= -0.5 and high <= 1 + OVER
    if not (signed or -OVER <= low <= high <= 1 + OVER):
        raise UsageError(
            f"the image has values from {low:g} to {high:g}: give floats in [0, 1], or uint8"
        )
    return np.uint8(np.rint(255 * ((pixels + 1) / 2 if signed else pixels).clip(0, 1)))
