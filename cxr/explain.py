"""Explain a classifier on one image: invert the image, move it from healthy to diseased, and make
heat maps.

The encoder finds the codes of the image and gradient descent refines them. Doses of disease from 0
to 1 in one direction give the film twice: as the generator draws it, and as an overlay on the
image. The classifier gives a logit for every frame.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cxr import CxrError, UsageError, attribution, images, inversion, lungs, weights_folder
from cxr.belief import verdict
from cxr.checkpoints import Model, load_classifier, load_model, shipped
from cxr.classifier import to_tensor
from cxr.cnn import cost
from cxr.cnn.fingerprint import fingerprint, same
from cxr.cnn.own import name_of
from cxr.device import prepare as prepare_device
from cxr.device import rng
from cxr.explanation import Explanation, Traversal, measure
from cxr.inversion import Inversion, invert, roughly, sampled_directions
from cxr.networks import Classifier
from cxr.overlay import lay_over
from cxr.sampling import draw_codes, walk

Timer = Callable[[str], contextlib.AbstractContextManager]


def untimed(part: str) -> contextlib.AbstractContextManager:
    """A timer that measures nothing."""
    return contextlib.nullcontext()


def explain(
    image: str | Path | np.ndarray | Tensor,
    model: str | Path | Model | None = None,
    *,
    classifier: str | nn.Module | None = None,
    target: str | None = None,
    classifier_input: str | None = None,
    frames: int = 17,
    restarts: int = 2,
    refine: int = 60,
    within: str | None = None,
    seed: int = 0,
    device: str = "auto",
    timer: Timer = untimed,
) -> Explanation:
    """Explain what a classifier sees in an image.

    Parameters
    ----------
    image : a file, a uint8 array [H, W], or a tensor [1, 1, R, R] in [-1, 1]
    model : a model file, a shipped model's name, or a `Model`; by default `pneumonia`
    classifier, target, classifier_input : another classifier than the model's, as `load_classifier`
        takes it
    frames : number of frames from dose 0 to dose 1
    restarts, refine : starting points of the inversion, the best of which is shown; gradient steps
    within : "lungs": the overlay changes the image in the lungs alone; by default anywhere
    seed : random seed of the noise and the restarts
    device : the device for a model that is loaded from a file; a `Model` stays on its device
    timer : a function from the name of a part to a context manager around it, for benchmarks

    Raises CxrError for an image that cannot be used and for a model without a generator.
    """
    options = {"classifier": classifier, "target": target, "classifier_input": classifier_input}
    model = load_explainer(model, device=device, **options)
    search = {"frames": frames, "restarts": restarts, "refine": refine, "seed": seed}
    return explain_group([image], model, within=within, timer=timer, **search)[0]


def explain_group(
    pictures: Sequence[str | Path | np.ndarray | Tensor],
    model: Model,
    frames: int = 17,
    restarts: int = 2,
    refine: int = 60,
    within: str | None = None,
    seed: int = 0,
    timer: Timer = untimed,
) -> list[Explanation]:
    """Explain several images at once, each as `explain` would alone, up to rounding errors, which
    the search makes larger (docs/how-it-works.md); how many pay is `at_once`. Parameters and errors
    are those of `explain`."""
    frames, restarts, refine, seed = map(int, (frames, restarts, refine, seed))
    options = {"frames": frames, "restarts": restarts, "refine": refine, "seed": seed}
    options |= {"within": within, "fit": model.info["fit"], "at_once": len(pictures)}
    if frames < 2 or restarts < 1 or refine < 0:
        raise UsageError("at least 2 frames, 1 restart and 0 steps of refinement are needed")
    with timer("prepare"):
        x = torch.cat([prepare(picture, model) for picture in pictures])
        lung = lungs.find(x)
        regions = [_region(one, within) for one in lung.split(1)]
    with timer("gradient"), exactly():
        logits, plain_maps, missing = at_image(x, model)
    traversals: dict[int, Traversal] = {}
    for alike in (logits > 0, ~(logits > 0)):
        rows = alike.nonzero()[:, 0]
        if len(rows):
            asked = x[rows], lung[rows], logits[rows], [regions[row] for row in rows]
            found = traverse(*asked, model, frames, restarts, refine, seed, timer)
            traversals |= zip(rows.tolist(), found)
    explanations = []
    for row, picture in enumerate(pictures):
        own = {name: maps[row] for name, maps in plain_maps.items()}
        found = traversals[row], picture, model, own, missing
        explanations.append(_conclude(*found, options, timer))
    return explanations


def _conclude(
    traversal: Traversal,
    picture: str | Path | np.ndarray | Tensor,
    model: Model,
    plain_maps: dict[str, Tensor],
    missing: list[str],
    options: dict,
    timer: Timer,
) -> Explanation:
    """The explanation of one image, from its path. options: with which it was found."""
    with timer("heat_maps"), exactly():
        maps, error = heat_maps(traversal, model, plain_maps)
    with timer("measure"):
        named = str(picture) if isinstance(picture, (str, Path)) else None
        numbers = {"image": named, "file": named and os.path.abspath(named)}
        numbers |= measure(traversal, model) | {"completeness_error": error}
        spacing = images.pixel_spacing(picture) if named else None
        numbers |= {"options": options, "missing_maps": missing, "pixel_spacing": spacing}
    return Explanation(**vars(traversal), maps=maps, numbers=numbers | verdict(numbers, model))


@torch.no_grad()
def at_once(model: Model) -> int:
    """How many images are best explained at once: 4 on a CPU, whose threads else wait for each other;
    on a GPU one for each half GiB of its memory, 64 at most; or as few as the classifier's memory
    asks for."""
    size, most = model.info["size"], min(64, cost.memory(model.device) >> 29) or 4
    x = (2 * torch.rand(1, 1, size, size, generator=rng(0)) - 1).to(model.device)
    asked = 4  # images with a gradient in a step for each: two restarts, each with two
    fitting = cost.at_once(model.classifier, x, cost.budget(model.device)) // asked
    return max(1, min(most, fitting))


def _region(lung: Tensor, within: str | None) -> Tensor | float:
    """Where the overlay may change an image. lung: bool [1, 1, R, R]; within: as of `explain`."""
    if within is None:
        return 1.0
    if within != "lungs":
        raise UsageError(f"within is lungs or nothing, not {within!r}")
    if not lung.any():
        raise CxrError("no lungs are found in it: leave --within out")
    return lungs.around(lung)


def exactly() -> contextlib.AbstractContextManager:
    """A context without TF32, whose rounding errors would spoil an integral's completeness on any
    grid."""
    return torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)


def traverse(
    x: Tensor,
    lung: Tensor,
    logits: Tensor,
    regions: Sequence[Tensor | float],
    model: Model,
    frames: int,
    restarts: int,
    refine: int,
    seed: int,
    timer: Timer,
) -> list[Traversal]:
    """Invert images [B, 1, R, R] with known logits [B], all of one verdict, and draw the path of each
    twice: as the generator draws it, and as an overlay on the image, of which its region may change
    (see `lay_over`). lung: of the images, bool [B, 1, R, R]."""
    with timer("invert"):
        with torch.no_grad():
            codes = model.encoder(x)
        inverted = invert(x, logits, codes, model, restarts, refine, seed)
        paths = [inversion.Path(one, model.generator) for one in inverted]
        doses = torch.linspace(0, 1, frames, device=x.device)
        with torch.no_grad():
            encoded = model.generator(*codes, inverted[0].codes.noise).clamp(-1, 1)
            drawn = [path(doses) for path in paths]
            answers = [model.classifier(frames) for frames in drawn]
    with timer("lay_over"):
        found = [max(one.codes.z2[0].norm().item(), 1e-6) for one in inverted]
        own = found if logits[0] > 0 else [0.0] * len(x)
        overlays = lay_over(x, paths, own, partial(roughly, model=model), logits, regions)
        with torch.no_grad():
            overlaid = [overlay(doses) for overlay in overlays]
            overlaid_logits = [model.classifier(frames) for frames in overlaid]
    told = tuple(model.info.get("told") or model.info["classes"])
    each = zip(
        *(x.split(1), lung.split(1), logits.split(1), inverted, encoded.split(1)),
        *(map(partial(_directions, seed=seed), logits, inverted), [doses] * len(x)),
        *(drawn, answers, overlays, overlaid, overlaid_logits),
    )
    return [Traversal(told, *parts) for parts in each]


def _directions(logit: Tensor, inverted: Inversion, seed: int) -> Tensor:
    """The directions of an image's path [D, z2], unit vectors: its own, and for a healthy image all
    that were tried."""
    own = inverted.codes.u[:1]
    return own if logit > 0 else torch.cat([own, sampled_directions(inverted.codes, seed)])


def load_explainer(
    model: str | Path | Model | None,
    classifier: str | nn.Module | None,
    device: str,
    target: str | None = None,
    classifier_input: str | None = None,
) -> Model:
    """A model with all networks that an explanation needs, and the classifier to be explained."""
    if isinstance(model, Model):
        loaded = model
    else:
        loaded = load_model(model or default_model(), prepare_device(device))
    if classifier is not None:
        loaded = with_classifier(loaded, classifier, target, classifier_input)
    elif target is not None or classifier_input is not None:
        raise UsageError("--target and --classifier-input need --classifier, a CNN of your own")
    loaded.require("classifier", "encoder", "generator")
    return loaded


def with_classifier(
    model: Model,
    spec: str | nn.Module,
    target: str | None = None,
    classifier_input: str | None = None,
) -> Model:
    """The model with the classifier of `spec`, as `load_classifier` takes it, in its own's place.

    A model file does not keep a CNN of the user's own that the GAN was trained with, but its
    fingerprint. A CNN with the GAN's fingerprint, or for a GAN of an older cxrgan any CNN, counts
    as the model's own. Raises UsageError for a classifier of another size or other classes.
    """
    other = second_classifier(spec, model, "--classifier", target, classifier_input)
    networks = model.networks | {"classifier": other.classifier}
    told = getattr(other.classifier, "told", None)  # else as the GAN's classes
    info = model.info | ({"told": told} if told and told[1] != model.info["classes"][1] else {})
    if trained_for(model, other.classifier):
        own = info if getattr(other.classifier, "named", False) else model.info
        return Model(networks, own, model.buffers, model.path)
    named = spec if isinstance(spec, str) else name_of(spec)
    about = {
        "foreign": named if target is None else f"{named}, target {target}",
        "foreign_fold": other.info.get("fold"),
    }
    foreign = Model(networks, info | about, model.buffers, model.path)
    rescale(foreign)
    return foreign


def trained_for(model: Model, network: nn.Module) -> bool:
    """Whether the GAN of a model was trained for this CNN, as far as can be told."""
    known, size = model.info.get("fingerprint"), model.info["size"]
    if known is None and "classifier" not in model.networks:
        return True
    known = known or fingerprint(model.classifier, size, model.device)
    return same(known, fingerprint(network, size, model.device))


def second_classifier(
    spec: str | nn.Module,
    model: Model,
    option: str,
    target: str | None = None,
    classifier_input: str | None = None,
) -> Model:
    """A classifier beside the model's, as `load_classifier` takes it. Raises UsageError for one of
    another size, fit or other classes than the model's."""
    size, classes = model.info["size"], model.info["classes"]
    other = load_classifier(spec, size, model.device, target, classifier_input)
    same_pictures(option, other, model)
    if other.info.get("classes", classes) != classes:
        raise UsageError(
            f"{option} tells {' from '.join(other.info['classes'])}, the model "
            f"{' from '.join(classes)}: take one that was trained on the same classes"
        )
    return other


def same_pictures(option: str, other: Model, model: Model) -> None:
    """Raises UsageError if a classifier was trained on pictures made otherwise than the model's."""
    size, fit = model.info["size"], model.info["fit"]
    if other.info.get("size", size) != size:
        raise UsageError(
            f"{option} sees {other.info['size']} pixels, the model {size}: train one with "
            f"--size {size}"
        )
    if other.info.get("fit", fit) != fit:
        raise UsageError(
            f"{option} was trained with --fit {other.info['fit']}, the model with --fit {fit}: train "
            f"one with --fit {fit}"
        )


@torch.no_grad()
def rescale(model: Model) -> None:
    """Set the logits of dose 0 and dose 1 for another classifier: its median logits on random lungs
    at these doses. Nothing is set if the second is not higher. Then the path does not change the
    classifier's verdict, and `doubts` says so."""
    x = walk(model.generator, *draw_codes(model.generator, 64, 0), doses=(0.0, 1.0))
    low, high = (model.classifier(end).median().item() for end in x.unbind(1))
    if low < high:
        model.info["logits"] = [low, high]


def default_model() -> str:
    """The shipped model that is used when none is named: `pneumonia`."""
    names = list(shipped())
    if not names:
        raise CxrError("no model ships with this copy: give one with --model")
    return "pneumonia" if "pneumonia" in names else names[0]


def sample_image(model: str | None = None) -> Path:
    """A synthetic X-ray that ships, drawn by the generator of the shipped model of this name, or
    else of the default model."""
    name = model if model in shipped() else default_model()
    samples = sorted((weights_folder() / "samples").glob(f"{name}*.png"))
    if not samples:
        raise CxrError("no sample ships with this copy: give an image")
    return samples[0]


def prepare(image: str | Path | np.ndarray | Tensor, model: Model) -> Tensor:
    """The image as the model's networks need it: [1, 1, R, R] in [-1, 1], on their device."""
    size, fit = model.info["size"], model.info["fit"]
    device = model.device
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


def at_image(x: Tensor, model: Model) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """The classifier's logits [B] on images [B, 1, R, R], the maps [B, R, R] that need these images
    alone, the gradient and, where the classifier allows it, Grad-CAM; and why one is missing."""
    classifier, layer, missing = model.classifier, None, []
    if isinstance(classifier, Classifier):
        layer = classifier.trunk  # its output is pooled into the logit
    else:
        try:
            layer = attribution.last_convolution(classifier, x)
        except CxrError as error:
            missing.append(str(error))
    logits, slopes, cams = attribution.gradient_and_grad_cam(classifier, x, layer)
    maps = {"gradient": slopes}
    if cams is not None:
        maps["grad_cam"] = cams
    return logits, maps, missing


def heat_maps(
    t: Traversal, model: Model, plain: dict[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Maps [R, R] by name, and the completeness error of the latent integrated gradient. plain: the
    maps of `at_image`.

    The path of a diseased image is the overlay from dose 0 to the image's own dose, so it ends at
    the original. The path of a healthy image runs from dose 0 to dose 1 and begins at the original.
    """
    x, overlay = t.image, t.overlay
    span = overlay.own or 1.0
    ends = (t.overlaid_logits[:1], t.logit) if t.diseased else (t.logit, t.overlaid_logits[-1:])
    latent, error, _ = attribution.latent_integrated_gradients(
        model.classifier, lambda s: overlay(span * s.to(x.device)), logits=torch.cat(ends)
    )
    first, last = overlay.along(torch.tensor([0.0, span], device=x.device))
    baseline = model.buffers.get("mean_image", x.mean().expand_as(x))
    ig, _ = attribution.integrated_gradients(model.classifier, x, baseline, logit=t.logit)
    maps = {
        "latent_ig": latent,
        "difference": (last - first)[0],
        "gradient": plain["gradient"],
        "integrated_gradients": ig[0],
    }
    return maps | plain, error
