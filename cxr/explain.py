"""Explain a classifier on one image: invert it, move it from healthy to diseased, measure, write.

The image is inverted by the encoder and refined by gradient descent; scaling `z2` from dose 0 to
1 gives the film, and the classifier is asked at every frame.
"""

import contextlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cxr import CxrError, UsageError, __version__, attribution, figures, images, measures
from cxr.checkpoints import Model, load_classifier, load_model, save, shipped, weights_folder
from cxr.inversion import Codes, disease_directions, invert
from cxr.monitor import to_uint8, walk
from cxr.train_cnn import likeness, to_tensor
from cxr.training import find_device

CHANGED = 0.05  # of the grey range: a pixel that changes by more has changed


@dataclass
class Explanation:
    """What `explain` found; R is the model's size, F the number of frames."""

    image: Tensor  # [1, 1, R, R] in [-1, 1]
    reconstruction: Tensor  # [1, 1, R, R]
    frames: Tensor  # [F, 1, R, R], along doses
    overlaid: Tensor  # [F, 1, R, R], the path's difference laid over the image
    doses: Tensor  # [F], from 0 to 1
    logits: Tensor  # [F], the classifier's on each frame
    maps: dict[str, Tensor]  # [R, R] each
    codes: Codes
    classes: tuple[str, str]
    numbers: dict  # what goes into explanation.json
    warnings: list[str]

    def write(self, folder: str | Path) -> None:
        """Write the explanation folder: GIF, panel, CSV, JSON and safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        images.write_gif(folder / "explanation.gif", self.film(), 0.12)
        images.write_png(folder / "panel.png", self.panel())
        rows = zip(*(self.numbers[key] for key in ("dose", "logit", "probability")))
        lines = ["dose,logit,probability"] + [f"{d:.4f},{z:.4f},{p:.6f}" for d, z, p in rows]
        write_text(folder / "response.csv", "\n".join(lines) + "\n")
        write_text(folder / "explanation.json", json.dumps(self.numbers, indent=1) + "\n")
        noise = {f"noise.{i}": eps for i, eps in enumerate(self.codes.noise)}
        tensors = {"w1": self.codes.w1, "z2": self.codes.z2, **noise, "image": self.image}
        tensors |= {"reconstruction": self.reconstruction, "frames": self.frames}
        tensors |= {"overlaid": self.overlaid, "doses": self.doses, "logits": self.logits}
        tensors |= {f"maps.{name}": value for name, value in self.maps.items()}
        save(folder / "latents.safetensors", tensors, {"classes": self.classes})

    def film(self) -> list[np.ndarray]:
        """The frames of the GIF, uint8 RGB."""
        return figures.film(
            to_uint8(self.frames[:, 0]),
            self.doses.tolist(),
            self.numbers["probability"],
            positive=self.classes[1],
            found=self.numbers["found_dose"],
        )

    def panel(self) -> np.ndarray:
        """One picture, uint8 RGB: images above, heat maps below."""
        n, probability = self.numbers, self.numbers["probability"]
        image = to_uint8(self.image[0, 0])
        pictures = [
            (f"original\nP {n['original']['probability']:.2f}", image),
            (
                f"reconstruction\nP {n['reconstruction']['probability']:.2f}",
                self.reconstruction[0, 0],
            ),
            (f"healthy end\nP {probability[0]:.2f}", self.frames[0, 0]),
            (f"diseased end\nP {probability[-1]:.2f}", self.frames[-1, 0]),
            (
                f"counterfactual\nP {n['counterfactual']['probability_overlaid']:.2f}",
                self.counterfactual(),
            ),
        ]
        tiles = [
            (name, x if isinstance(x, np.ndarray) else to_uint8(x), None, False)
            for name, x in pictures
        ]
        signed = {"difference", "latent_ig", "gradient", "integrated_gradients"}
        for name, heat in self.maps.items():
            tiles.append((name.replace("_", " "), image, heat.cpu().numpy(), name in signed))
        caption = (
            f"{self.classes[1]} as this classifier sees it. "
            f"SSIM of the reconstruction {n['reconstruction']['ssim']:.2f}, "
            f"completeness error {n['completeness_error']:.3f}. The counterfactual is the original "
            "with the path's difference laid over it."
        )
        return figures.panel(tiles, caption)

    def counterfactual(self) -> Tensor:
        """The image [R, R] with the path's difference to the other class laid over it."""
        return self.overlaid[self.numbers["counterfactual"]["frame"], 0]


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
    model : a model file, a shipped model's name, or a `Model`; by default the shipped one
    classifier : another classifier than the model's, as `load_classifier` takes it
    frames : number of frames from dose 0 to dose 1
    restarts : inversions from different beginnings; the best is shown, their spread reported
    refine : gradient steps after the encoder

    Raises CxrError for an image that cannot be used and for a model without a generator.
    """
    if frames < 2 or restarts < 1 or refine < 0:
        raise UsageError("at least 2 frames, 1 restart and 0 steps of refinement are needed")
    model = load_explainer(model, classifier, device)
    x = prepare(image, model)
    codes = invert(x, model, restarts, refine, seed)
    doses = torch.linspace(0, 1, frames, device=x.device)
    with torch.no_grad():
        copies = model.generator(codes.w1, codes.z2, codes.noises(restarts)).clamp(-1, 1)
        original = model.classifier(x)
        directions = disease_directions(original, codes, model, seed)
        path = walk(model.generator, codes.w1[:1], directions[:1], codes.noises(1), doses)[0]
        overlaid = (x + path - copies[:1]).clamp(-1, 1)
        logits = model.classifier(path)
    with torch.backends.cudnn.flags(allow_tf32=False):  # whose rounding no finer grid mends
        maps, error = heat_maps(x, codes, directions[:1], model)
    numbers = measure(x, copies, path, overlaid, doses, logits, codes, directions, model)
    numbers["completeness_error"] = error
    notes = doubts(x, numbers, model)
    return Explanation(
        x, copies[:1], path, overlaid, doses, logits, maps, codes,
        tuple(model.info["classes"]), numbers, notes,
    )  # fmt: skip


def load_explainer(model: str | Path | Model | None, classifier: str | None, device: str) -> Model:
    """A model with all networks that an explanation needs, and the classifier to be explained."""
    where = find_device(device)
    loaded = model if isinstance(model, Model) else load_model(model or default_model(), where)
    if classifier:
        size = loaded.info["size"]
        other = load_classifier(classifier, size, loaded.generator.const.device)
        if other.info.get("size", size) != size:
            raise CxrError(
                f"--classifier sees {other.info['size']} pixels, the model {size}: "
                "train one at the model's size"
            )
        networks = loaded.networks | {"classifier": other.classifier}
        loaded = Model(networks, loaded.info | {"foreign": classifier}, loaded.buffers, loaded.path)
    for name in ("classifier", "encoder", "generator"):
        getattr(loaded, name)  # each says itself what to do where it is missing
    return loaded


def default_model() -> str:
    """The shipped model that `explain` uses when none is named."""
    names = list(shipped())
    if not names:
        raise CxrError("no model ships with this copy: give one with --model")
    return "covid" if "covid" in names else names[0]


def sample_image() -> Path:
    """A synthetic X-ray that ships, drawn from the default model's generator."""
    found = sorted((weights_folder() / "samples").glob(f"{default_model()}*.png"))
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
        return image.to(device).float()
    if isinstance(image, np.ndarray):
        if image.ndim != 2 or image.dtype != np.uint8:
            raise UsageError(f"an array must be uint8 [H, W], not {image.dtype} {image.shape}")
        return to_tensor(images.square(image / np.float32(255), size, fit)[None], device)
    return to_tensor(images.load(image, size, fit)[None], device)


def heat_maps(x: Tensor, codes: Codes, u: Tensor, model: Model) -> tuple[dict[str, Tensor], float]:
    """Maps [R, R] by name, and the completeness error of the latent integrated gradient.

    The latent path runs from dose 0 to the dose found, or to 1 where the image is healthy.
    """
    sick = model.classifier(x).item() > 0
    full = codes.z2[:1].norm() if sick else torch.ones((), device=x.device)

    def along(t: Tensor) -> Tensor:
        w1 = codes.w1[:1].expand(len(t), -1, -1)
        return model.generator(w1, t[:, None] * full * u, codes.noises(len(t))).clamp(-1, 1)

    latent, error, _ = attribution.latent_integrated_gradients(model.classifier, along)
    with torch.no_grad():
        ends = along(torch.tensor([0.0, 1.0], device=x.device))
    baseline = model.buffers.get("mean_image", x.mean().expand_as(x))
    ig, _ = attribution.integrated_gradients(
        model.classifier, x, baseline, tolerance=0.05, max_steps=128
    )
    maps = {
        "difference": (ends[1] - ends[0])[0],
        "latent_ig": latent,
        "gradient": attribution.gradient(model.classifier, x)[0],
        "integrated_gradients": ig[0],
    }
    with contextlib.suppress(CxrError):  # a classifier of the user's may have no convolution
        layer = getattr(model.classifier, "trunk", None)  # ours: what is pooled into the logit
        maps["grad_cam"] = attribution.grad_cam(model.classifier, x, layer)[0]
    return maps, error


@torch.no_grad()
def measure(x, copies, path, overlaid, doses, logits, codes, directions, model) -> dict:
    """Every number of the explanation, JSON-able; evaluation.json's definitions."""
    original, copied = model.classifier(x), model.classifier(copies)
    probability, sick = original.sigmoid().item(), original.item() > 0
    frame = 0 if sick else len(doses) - 1  # of the counterfactual
    ends = model.generator(codes.w1, torch.zeros_like(codes.z2), codes.noises(len(copies)))
    change = logits[-1] - logits[0]
    laid = model.classifier(overlaid)
    return {
        "use": "research only, no diagnosis",
        "model": str(model.path),
        "classifier": model.info.get("foreign", "the model's own"),
        "classes": model.info["classes"],
        "original": {"probability": probability, "logit": original.item()},
        "found_dose": codes.z2[0].norm().item(),
        "dose": doses.tolist(),
        "logit": logits.tolist(),
        "probability": logits.sigmoid().tolist(),
        "probability_overlaid": laid.sigmoid().tolist(),
        "logit_gap": (logits - model.logit(doses)).abs().median().item(),
        "largest_jump": (logits.diff().abs().max() / change.abs().clamp_min(1e-6)).item(),
        "reconstruction": {
            "probability": copied[0].sigmoid().item(),
            "psnr": measures.psnr(x, copies[:1]).item(),
            "ssim": measures.ssim(x, copies[:1]).item(),
            "probability_gap": (copied[0].sigmoid() - original[0].sigmoid()).abs().item(),
        },
        "counterfactual": {
            "frame": frame,
            "probability": logits[frame].sigmoid().item(),
            "probability_overlaid": laid[frame].sigmoid().item(),
            "flipped": bool((logits[frame] > 0) != sick),
            "flipped_overlaid": bool((laid[frame] > 0) != sick),
            "l1_original": _l1(x, path[frame]),
            "l1_reconstruction": _l1(copies[0], path[frame]),
            "changed_pixels": ((copies[0] - path[frame]).abs() > 2 * CHANGED).float().mean().item(),
        },
        "restarts": {
            "count": len(copies),
            "spread": _spread(copies - ends.clamp(-1, 1)),
            "dose_spread": codes.z2.norm(dim=1).std(correction=0).item(),
            "ssim": measures.ssim(x.expand_as(copies), copies).tolist(),
        },
        "directions": _directions(directions, codes, model) if not sick else [],
        "likeness": likeness(x, model.buffers["mean_image"]).item() if model.buffers else None,
        "versions": {
            "cxrgan": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _directions(directions: Tensor, codes: Codes, model: Model) -> list[dict[str, float]]:
    """What each disease direction does to a healthy image at full dose; the first is shown."""
    w1 = codes.w1[:1].expand(len(directions), -1, -1)
    noise = codes.noises(len(directions))
    full = model.generator(w1, directions, noise).clamp(-1, 1)
    change = full - model.generator(w1, torch.zeros_like(directions), noise).clamp(-1, 1)
    probabilities = model.classifier(full).sigmoid().tolist()
    return [{"probability": p, "l1": _l1(c, 0 * c)} for p, c in zip(probabilities, change)]


def _l1(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference, as a share of the grey range."""
    return (a - b).abs().mean().item() / 2


def _spread(differences: Tensor) -> float:
    """How far the restarts' difference maps [K, 1, R, R] disagree: their mean standard deviation
    over their mean size."""
    size = differences.abs().mean().clamp_min(1e-6)
    return (differences.std(0, correction=0).mean() / size).item()


def doubts(x: Tensor, numbers: dict, model: Model) -> list[str]:
    """Lines that say where the explanation cannot be believed."""
    lines, n, limits = [], numbers["reconstruction"], model.info.get("thresholds", {})
    if numbers["likeness"] is not None and numbers["likeness"] < limits.get("likeness", -1):
        lines.append("this does not look like the radiographs the model was trained on")
    if n["probability_gap"] > 0.1:
        lines.append(
            f"the reconstruction does not stand for the image: the classifier gives it "
            f"{n['probability']:.2f}, the image {numbers['original']['probability']:.2f}"
        )
    if n["ssim"] < limits.get("ssim", 0):
        lines.append(
            f"the reconstruction does not stand for the image: SSIM {n['ssim']:.2f}, "
            f"under {limits['ssim']:.2f}"
        )
    if not numbers["counterfactual"]["flipped"]:
        lines.append("the path does not change the classifier's verdict")
    if "foreign" in model.info:
        lines.append("another classifier than the GAN's is explained: the dose axis is the GAN's")
    return lines


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with images.replacing(path) as temporary:
        temporary.write_text(text)
