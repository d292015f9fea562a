"""What explaining an image found: its numbers, the doubts they raise, its pictures and files."""

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cxr import __version__, attribution, film, metrics
from cxr.checkpoints import Model, save
from cxr.classifier import likeness, to_uint8
from cxr.files import write_text
from cxr.inversion import Codes
from cxr.overlay import Overlay

CHANGED = 0.05  # of the grey range: a pixel that changes by more has changed


@dataclass
class Explanation:
    """What `explain` found; R is the model's size, F the number of frames, K of restarts."""

    classes: tuple[str, str]
    image: Tensor  # [1, 1, R, R] in [-1, 1]
    original: float  # the classifier's logit on it
    codes: Codes  # K inversions, best first
    copies: Tensor  # [K, 1, R, R], their reconstructions
    directions: Tensor  # [D, z2], unit vectors; the path follows the first
    doses: Tensor  # [F], from 0 to 1
    frames: Tensor  # [F, 1, R, R], along the doses
    overlay: Overlay  # the path laid over the image, where the classifier needs it
    overlaid: Tensor  # [F, 1, R, R], its frames
    logits: Tensor  # [F], the classifier's on each frame of the path
    maps: dict[str, Tensor] = field(default_factory=dict)  # [R, R] each
    numbers: dict = field(default_factory=dict)  # what goes into explanation.json

    @property
    def warnings(self) -> list[str]:
        """Lines that say where the explanation cannot be believed."""
        return self.numbers["warnings"]

    @property
    def sick(self) -> bool:
        """Whether the classifier calls the image diseased."""
        return self.original > 0

    def write(self, folder: str | Path) -> None:
        """Write the explanation folder: GIF, panel, CSV, JSON and safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        film.write_gif(folder / "explanation.gif", self.film(), 0.12)
        film.write_png(folder / "panel.png", self.panel())
        columns = ("dose", "logit", "probability", "probability_overlaid")
        rows = zip(*(self.numbers[key] for key in columns))
        lines = [",".join(columns)] + [f"{d:.4f},{z:.4f},{p:.6f},{o:.6f}" for d, z, p, o in rows]
        write_text(folder / "response.csv", "\n".join(lines) + "\n")
        write_text(folder / "explanation.json", json.dumps(self.numbers, indent=1) + "\n")
        noise = {f"noise.{i}": eps for i, eps in enumerate(self.codes.noise)}
        tensors = {"w1": self.codes.w1, "z2": self.codes.z2, "detail": self.codes.detail}
        tensors |= {"directions": self.directions, **noise}
        tensors |= {"image": self.image, "reconstructions": self.copies, "frames": self.frames}
        tensors |= {"overlaid": self.overlaid, "mask": self.overlay.mask}
        tensors |= {"doses": self.doses, "logits": self.logits}
        tensors |= {f"maps.{name}": value for name, value in self.maps.items()}
        save(folder / "latents.safetensors", tensors, {"classes": self.classes})

    def film(self) -> list[np.ndarray]:
        """The frames of the GIF, uint8 RGB."""
        return film.film(
            to_uint8(self.frames[:, 0]),
            to_uint8(self.overlaid[:, 0]),
            self.doses.tolist(),
            list(zip(self.numbers["probability"], self.numbers["probability_overlaid"])),
            positive=self.classes[1],
            found=self.overlay.own,
        )

    def panel(self) -> np.ndarray:
        """One picture, uint8 RGB: images above, heat maps below."""
        n, probability = self.numbers, self.numbers["probability"]
        image = to_uint8(self.image[0, 0])
        pictures = [
            ("original", n["original"]["probability"], self.image[0, 0]),
            ("reconstruction", n["reconstruction"]["probability"], self.copies[0, 0]),
            ("healthy end", probability[0], self.frames[0, 0]),
            ("diseased end", probability[-1], self.frames[-1, 0]),
            ("counterfactual", n["counterfactual"]["probability_overlaid"], self.counterfactual()),
        ]
        tiles = [(f"{name}\nP {p:.2f}", to_uint8(x), None, False) for name, p, x in pictures]
        signed = {"difference", "latent_ig", "gradient", "integrated_gradients"}
        for name in self.maps:
            tiles.append((name.replace("_", " "), image, self.drawn(name), name in signed))
        caption = (
            f"{self.classes[1]} as this classifier sees it. "
            f"SSIM of the reconstruction {n['reconstruction']['ssim']:.2f}, "
            f"completeness error {n['completeness_error']:.3f}. The counterfactual is the original, "
            "changed within a mask sought for this classifier."
        )
        return film.panel(tiles, "\n".join([caption, *(f"Warning: {w}." for w in self.warnings)]))

    def drawn(self, name: str) -> np.ndarray:
        """A map [R, R] as pictures show it: with its signs, smoothed by a Gaussian of R / 32."""
        heat = self.maps[name].detach()
        return attribution.smooth(heat, len(heat) / 32).cpu().numpy()

    def counterfactual(self) -> Tensor:
        """The image [R, R], turned into the other class where the classifier needs it."""
        return self.overlaid[self.numbers["counterfactual"]["frame"], 0]


@torch.no_grad()
def measure(found: Explanation, model: Model) -> dict:
    """The numbers of explanation.json but the completeness error."""
    logits, laid = found.logits, model.classifier(found.overlaid)
    change = (logits[-1] - logits[0]).abs().clamp_min(1e-6)
    mean = model.buffers.get("mean_image")
    return {
        "use": "research only, no diagnosis",
        "model": str(model.path),
        "classifier": model.info.get("foreign", "the model's own"),
        "classes": list(found.classes),
        "original": {"probability": _sigmoid(found.original), "logit": found.original},
        "found_dose": found.codes.z2[0].norm().item(),
        "dose": found.doses.tolist(),
        "logit": logits.tolist(),
        "probability": logits.sigmoid().tolist(),
        "probability_overlaid": laid.sigmoid().tolist(),
        "logit_gap": (logits - model.logit(found.doses)).abs().median().item(),
        "largest_jump": (logits.diff().abs().max() / change).item(),
        "reconstruction": _reconstruction(found, model),
        "counterfactual": _counterfactual(found, laid),
        "restarts": _restarts(found, model),
        "directions": [] if found.sick else _directions(found, model),
        "likeness": None if mean is None else likeness(found.image, mean).item(),
        "versions": versions(),
    }


def _reconstruction(found: Explanation, model: Model) -> dict[str, float]:
    """How well the best inversion stands for the image; `ssim_encoder` is the encoder's alone,
    which the model file's threshold was set for."""
    x, copy = found.image, found.copies[:1]
    probability = model.classifier(copy).sigmoid().item()
    encoded = model.generator(*model.encoder(x), found.codes.noise).clamp(-1, 1)
    return {
        "probability": probability,
        "probability_gap": abs(probability - _sigmoid(found.original)),
        "psnr": metrics.psnr(x, copy).item(),
        "ssim": metrics.ssim(x, copy).item(),
        "ssim_encoder": metrics.ssim(x, encoded).item(),
    }


def _counterfactual(found: Explanation, laid: Tensor) -> dict:
    """The path's end that is of the other class, alone and laid over the image (`overlaid`);
    `laid` are the logits [F] of the latter."""
    frame = 0 if found.sick else len(found.doses) - 1
    end, logit = found.frames[frame], found.logits[frame].item()
    return {
        "frame": frame,
        "probability": _sigmoid(logit),
        "probability_overlaid": _sigmoid(laid[frame].item()),
        "flipped": (logit > 0) != found.sick,
        "flipped_overlaid": (laid[frame].item() > 0) != found.sick,
        "l1_original": _l1(found.image - end),
        "l1_reconstruction": _l1(found.copies[0] - end),
        "changed_pixels": _changed(found.copies[0], end),
        "l1_overlaid": _l1(found.image - found.overlaid[frame]),
        "changed_overlaid": _changed(found.image[0], found.overlaid[frame]),
    }


def _restarts(found: Explanation, model: Model) -> dict:
    """How far the restarts agree: `spread` is the mean standard deviation of the differences that
    their paths make, over their mean size, None for one alone."""
    codes, copies = found.codes, found.copies
    z2 = codes.z2 if found.sick else codes.u
    ends = [codes.draw(model.generator, z).clamp(-1, 1) for z in (z2, 0 * z2)]
    maps = ends[0] - ends[1]
    spread = maps.std(0, correction=0).mean() / maps.abs().mean().clamp_min(1e-6)
    return {
        "count": len(copies),
        "spread": spread.item() if len(copies) > 1 else None,
        "doses": codes.z2.norm(dim=1).tolist(),
        "ssim": metrics.ssim(found.image.expand_as(copies), copies).tolist(),
    }


def _directions(found: Explanation, model: Model) -> list[dict]:
    """What each disease direction does to a healthy image at full dose; the first is shown."""
    u, codes = found.directions, found.codes
    z2 = torch.cat([torch.zeros_like(u[:1]), u])
    x = codes.best.draw(model.generator, z2).clamp(-1, 1)
    probabilities = model.classifier(x[1:]).sigmoid().tolist()
    return [
        {"probability": p, "accepted": p > 0.5, "l1": _l1(full - x[0])}
        for p, full in zip(probabilities, x[1:])
    ]


def _changed(x: Tensor, y: Tensor) -> float:
    """The share of pixels that have changed."""
    return ((x - y).abs() > 2 * CHANGED).float().mean().item()


def _l1(difference: Tensor) -> float:
    """Mean absolute difference, as a share of the grey range."""
    return difference.abs().mean().item() / 2


def _sigmoid(logit: float) -> float:
    return torch.tensor(logit).sigmoid().item()


def doubts(numbers: dict, model: Model) -> list[str]:
    """Lines that say where the explanation cannot be believed."""
    lines, n, limits = [], numbers["reconstruction"], model.info.get("thresholds", {})
    if numbers["likeness"] is not None and numbers["likeness"] < limits.get("likeness", -1):
        lines.append("this does not look like the radiographs the model was trained on")
    if n["probability_gap"] > 0.1:
        lines.append(
            f"the reconstruction does not stand for the image: the classifier gives it "
            f"{n['probability']:.2f}, the image {numbers['original']['probability']:.2f}"
        )
    if n["ssim_encoder"] < limits.get("ssim", 0):
        lines.append(
            "the reconstruction does not stand for the image: the encoder's SSIM is "
            f"{n['ssim_encoder']:.2f}, under validation's {limits['ssim']:.2f}"
        )
    if not numbers["counterfactual"]["flipped"]:
        lines.append("the path does not change the classifier's verdict")
    elif not numbers["counterfactual"]["flipped_overlaid"]:
        lines.append("laid over the image, the path does not change the classifier's verdict")
    if "foreign" in model.info:
        lines.append("another classifier than the GAN's is explained: the dose axis is the GAN's")
    return lines


def versions() -> dict[str, str]:
    """Of what the numbers were made with."""
    return {
        "cxrgan": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
