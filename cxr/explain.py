"""Explain a classifier on one image: invert it, move it from healthy to diseased, ask why.

The image is inverted by the encoder and refined by gradient descent. Disease of dose 0 to 1 in one
direction gives the film, as the generator draws it and laid over the image; the classifier is asked
at every frame.
"""

import contextlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cxr import CxrError, UsageError, attribution, images
from cxr.checkpoints import Model, load_classifier, load_model, shipped, weights_folder
from cxr.classifier import to_tensor
from cxr.device import find_device
from cxr.explanation import Explanation, doubts, measure
from cxr.inversion import invert, sampled_directions
from cxr.networks import Classifier
from cxr.overlay import lay_over
from cxr.sampling import draw_codes, walk


def explain(
    image: str | Path | np.ndarray | Tensor,
    model: str | Path | Model | None = None,
    *,
    classifier: str | None = None,
    frames: int = 17,
    restarts: int = 2,
    refine: int = 60,
    seed: int = 0,
    device: str = "auto",
) -> Explanation:
    """Explain what a classifier sees in an image.

    Parameters
    ----------
    image : a file, a uint8 array [H, W], or a tensor [1, 1, R, R] in [-1, 1]
    model : a model file, a shipped model's name, or a `Model`; by default `pneumonia`
    classifier : another classifier than the model's, as `load_classifier` takes it
    frames : number of frames from dose 0 to dose 1
    restarts : inversions from different beginnings; the best is shown, their spread reported
    refine : gradient steps after the encoder
    seed : of the noise and of the restarts
    device : where a model is loaded to; a `Model` stays where it is

    Raises CxrError for an image that cannot be used and for a model without a generator.
    """
    if frames < 2 or restarts < 1 or refine < 0:
        raise UsageError("at least 2 frames, 1 restart and 0 steps of refinement are needed")
    model = load_explainer(model, classifier, device)
    x = prepare(image, model)
    codes = invert(x, model, restarts, refine, seed)
    doses = torch.linspace(0, 1, frames, device=x.device)
    with torch.no_grad():
        original = model.classifier(x).item()
        copies = codes.draw(model.generator, codes.z2).clamp(-1, 1)

    along = partial(codes.along, model.generator)
    directions = codes.u[:1]
    if original <= 0:
        directions = torch.cat([directions, sampled_directions(codes, seed)])
    own = max(codes.z2[0].norm().item(), 1e-6) if original > 0 else 0.0
    overlay = lay_over(x, along, own, model.classifier)
    with torch.no_grad():
        path, overlaid = along(doses), overlay(doses)
        logits = model.classifier(path)
    found = Explanation(
        tuple(model.info["classes"]), x, original, codes, copies, directions, doses, path,
        overlay, overlaid, logits,
    )  # fmt: skip
    exact = {"enabled": torch.backends.cudnn.enabled, "allow_tf32": False}
    with torch.backends.cudnn.flags(**exact):  # TF32's rounding no finer grid would mend
        found.maps, error = heat_maps(found, model)
    named = str(image) if isinstance(image, (str, Path)) else None
    found.numbers = {"image": named, **measure(found, model), "completeness_error": error}
    found.numbers["warnings"] = doubts(found.numbers, model)
    return found


def load_explainer(model: str | Path | Model | None, classifier: str | None, device: str) -> Model:
    """A model with all networks that an explanation needs, and the classifier to be explained."""
    if isinstance(model, Model):
        loaded = model
    else:
        loaded = load_model(model or default_model(), find_device(device))
    if classifier:
        loaded = with_classifier(loaded, classifier)
    for name in ("classifier", "encoder", "generator"):
        getattr(loaded, name)  # each says itself what to do where it is missing
    return loaded


def with_classifier(model: Model, spec: str) -> Model:
    """The model with the classifier of `spec`, as `load_classifier` takes it, in its own's place.

    A model does not keep a CNN of the user's that it was trained with: given to such a model, it
    is its own. Raises CxrError for one of another size or other classes.
    """
    size = model.info["size"]
    other = load_classifier(spec, size, model.generator.const.device)
    if other.info.get("size", size) != size:
        raise CxrError(
            f"--classifier sees {other.info['size']} pixels, the model {size}: "
            "train one at the model's size"
        )
    classes = model.info["classes"]
    if other.info.get("classes", classes) != classes:
        raise CxrError(
            f"--classifier tells {' from '.join(other.info['classes'])}, the model "
            f"{' from '.join(classes)}: take one that was trained on the same classes"
        )
    networks = model.networks | {"classifier": other.classifier}
    if "classifier" not in model.networks:
        return Model(networks, model.info, model.buffers, model.path)
    about = {"foreign": spec, "foreign_fold": other.info.get("fold")}
    foreign = Model(networks, model.info | about, model.buffers, model.path)
    rescale(foreign)
    return foreign


@torch.no_grad()
def rescale(model: Model) -> None:
    """Let the dose run between another classifier's logits: its medians on random lungs of dose 0
    and 1. If the latter is not the higher, its path will not flip, which `doubts` says."""
    x = walk(model.generator, *draw_codes(model.generator, 64, 0), doses=(0.0, 1.0))
    low, high = (model.classifier(end).median().item() for end in x.unbind(1))
    if low < high:
        model.info["logits"] = [low, high]


def default_model() -> str:
    """The shipped model that is used when none is named: `pneumonia`, whose explanations show
    disease, where those of `covid` show that its classes come from different sources."""
    names = list(shipped())
    if not names:
        raise CxrError("no model ships with this copy: give one with --model")
    return "pneumonia" if "pneumonia" in names else names[0]


def sample_image(model: str | None = None) -> Path:
    """A synthetic X-ray that ships, drawn from a shipped model's generator, else the default's."""
    name = model if model in shipped() else default_model()
    found = sorted((weights_folder() / "samples").glob(f"{name}*.png"))
    if not found:
        raise CxrError("no sample ships with this copy: give an image")
    return found[0]


def prepare(image: str | Path | np.ndarray | Tensor, model: Model) -> Tensor:
    """The image as the model's networks take it: [1, 1, R, R] in [-1, 1], on their device."""
    size, fit = model.info["size"], model.info["fit"]
    device = model.generator.const.device
    if isinstance(image, Tensor):
        if image.shape != (1, 1, size, size):
            raise UsageError(f"a tensor must be [1, 1, {size}, {size}], not {list(image.shape)}")
        if not (image.is_floating_point() and image.abs().max() <= 1.001):  # nor if it is NaN
            raise UsageError("a tensor must hold grey values from -1 to 1")
        return image.detach().to(device).float()
    if isinstance(image, np.ndarray):
        if image.ndim != 2 or image.dtype != np.uint8:
            raise UsageError(f"an array must be uint8 [H, W], not {image.dtype} {image.shape}")
        return to_tensor(images.square(image / np.float32(255), size, fit)[None], device)
    return to_tensor(images.load(image, size, fit)[None], device)


def heat_maps(found: Explanation, model: Model) -> tuple[dict[str, Tensor], float]:
    """Maps [R, R] by name, and the completeness error of the latent integrated gradient.

    Its path is the one from dose 0 to the dose found (to 1 where the image is healthy), laid over
    the original, so that it ends (begins) in the original itself.
    """
    x, overlay = found.image, found.overlay
    span = overlay.own or 1.0
    latent, error, _ = attribution.latent_integrated_gradients(
        model.classifier, lambda t: overlay(span * t.to(x.device))
    )
    with torch.no_grad():
        first, last = overlay.along(torch.tensor([0.0, span], device=x.device))
    baseline = model.buffers.get("mean_image", x.mean().expand_as(x))
    ig, _ = attribution.integrated_gradients(model.classifier, x, baseline)
    maps = {
        "latent_ig": latent,
        "difference": (last - first)[0],
        "gradient": attribution.gradient(model.classifier, x)[0],
        "integrated_gradients": ig[0],
    }
    ours = isinstance(model.classifier, Classifier)
    with contextlib.suppress(CxrError):  # a classifier of the user's may have no convolution
        layer = model.classifier.trunk if ours else None  # ours: what is pooled into the logit
        maps["grad_cam"] = attribution.grad_cam(model.classifier, x, layer)[0]
    return maps, error
