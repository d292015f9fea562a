"""What explaining an image found: its numbers, the doubts they raise, its pictures and files."""

import base64
import html
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cxr import UsageError, __version__, appearance, attribution, film, metrics, report
from cxr.belief import PICTURES
from cxr.checkpoints import Model, save
from cxr.classifier import likeness, to_uint8
from cxr.files import replacing_folder, write_text
from cxr.film import Sheet
from cxr.inversion import Codes, Inversion
from cxr.overlay import Overlay
from cxr.sampling import DOSES

NOT_BELIEVED = "do not believe this explanation"
NOTES = {"difference": "\nred: gets brighter"}  # of a map whose red does not speak for the disease
WRITTEN = {
    *("index.html", "panel.png", "panel.svg", "thumbnail.png", "response.csv"),
    *("explanation.json", "latents.safetensors"),
    *(f"explanation.{kind}" for kind in ("gif", "webp", "mp4")),
}
CLUTTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # of systems that show folders
CHANGED = 0.05  # of the grey range: a pixel that changes by more has changed


@dataclass(frozen=True)
class Traversal:
    """An image's path from healthy to diseased, drawn and asked; R is the model's size, F the number
    of frames, K of restarts."""

    classes: tuple[str, str]
    image: Tensor  # [1, 1, R, R] in [-1, 1]
    lung: Tensor  # bool [1, 1, R, R], its lungs, nothing where none are found
    logit: Tensor  # [1], the classifier's on it
    inversion: Inversion  # K of them, best first
    encoded: Tensor  # [1, 1, R, R], the reconstruction by the encoder alone
    directions: Tensor  # [D, z2], unit vectors; the path follows the first
    doses: Tensor  # [F], from 0 to 1
    frames: Tensor  # [F, 1, R, R], along the doses
    logits: Tensor  # [F], the classifier's on each frame
    overlay: Overlay  # the path on the image, where the classifier needs it
    overlaid: Tensor  # [F, 1, R, R], its frames
    overlaid_logits: Tensor  # [F]

    @property
    def diseased(self) -> bool:
        """Whether the classifier calls the image diseased."""
        return self.logit.item() > 0

    @property
    def codes(self) -> Codes:
        """The latents of the restarts, best first."""
        return self.inversion.codes

    @property
    def reconstructions(self) -> Tensor:
        """The restarts' reconstructions [K, 1, R, R], best first."""
        return self.inversion.reconstructions


@dataclass(frozen=True, repr=False)
class Explanation(Traversal):
    """What `explain` found: the path, the heat maps and the numbers."""

    maps: dict[str, Tensor]  # [R, R] each
    numbers: dict  # what goes into explanation.json

    @property
    def warnings(self) -> list[str]:
        """Lines that say where the explanation cannot be believed, or only with care."""
        return self.numbers["warnings"]

    @property
    def believe(self) -> bool:
        """Whether it lies above all floors, see `refusals`."""
        return self.numbers["believe"]

    @property
    def banner(self) -> str:
        """What is written over every picture of it: nothing, if it may be believed."""
        return "" if self.believe else NOT_BELIEVED

    def __repr__(self) -> str:
        n, diseased = self.numbers, self.classes[1]
        flips = "the verdict flips" if n["counterfactual"]["flipped_overlaid"] else "no flip"
        turned, ssim = n["counterfactual"]["probability_overlaid"], n["reconstruction"]["ssim"]
        doubt = "" if self.believe else f"{NOT_BELIEVED}: "
        lines = (
            f"{doubt}{n['image'] or 'image'}: {diseased} {n['original']['probability']:.2f}",
            f"counterfactual {turned:.2f} ({flips}), SSIM of the reconstruction {ssim:.2f}",
            f"warnings: {'; '.join(self.warnings) or 'none'}",
        )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The panel and the numbers, for a notebook."""
        shown = base64.b64encode(film.png(self.panel())).decode()
        return (
            f"<pre>{html.escape(repr(self))}</pre>"
            f'<img style="max-width: 100%" alt="panel" src="data:image/png;base64,{shown}">'
        )

    def show(self) -> None:
        """Open the panel in the system's image viewer."""
        Image.fromarray(self.panel()).show()

    def write(self, folder: str | Path, kind: str = "gif", fps: float = 8) -> None:
        """Write the explanation folder: page, film, panel, CSV, JSON and safetensors. The folder of
        an earlier explanation is replaced whole, once all is written.

        kind: of the film, gif, webp, mp4 or none; fps: its frames in a second. Raises CxrError,
        UsageError if such a film cannot be written here, or the folder holds anything else.
        """
        film.check_film(kind)
        if other := foreign(folder):
            raise UsageError(f"{folder} holds {other}, which is of no explanation: choose another")
        with replacing_folder(folder) as draft:
            self._write_files(draft, kind, fps)

    def _write_files(self, folder: Path, kind: str, fps: float) -> None:
        if kind != "none":
            film.write_film(folder / f"explanation.{kind}", self.film(), fps)
        film.write_png(folder / "panel.png", self.panel())
        write_text(folder / "panel.svg", film.panel_svg(self.sheet()))
        columns = ("dose", "logit", "probability", "probability_overlaid")
        rows = zip(*(self.numbers[key] for key in columns))
        lines = [",".join(columns)] + [f"{d:.4f},{z:.4f},{p:.6f},{o:.6f}" for d, z, p, o in rows]
        write_text(folder / "response.csv", "\n".join(lines) + "\n")
        write_text(folder / "index.html", report.page(self))
        film.write_png(folder / "thumbnail.png", report.thumbnail(self))
        write_text(folder / "explanation.json", json.dumps(self.numbers, indent=1) + "\n")
        noise = {f"noise.{i}": eps for i, eps in enumerate(self.codes.noise)}
        tensors = {"w1": self.codes.w1, "z2": self.codes.z2, "detail": self.codes.detail}
        tensors |= {"directions": self.directions, **noise}
        tensors |= {
            "image": self.image,
            "reconstructions": self.reconstructions,
            "frames": self.frames,
        }
        tensors |= {"overlaid": self.overlaid, "mask": self.overlay.mask}
        tensors |= {"doses": self.doses, "logits": self.logits}
        tensors |= {f"maps.{name}": value for name, value in self.maps.items()}
        save(folder / "latents.safetensors", tensors, {"classes": self.classes})

    def film(self) -> list[np.ndarray]:
        """The frames of the film, uint8 RGB."""
        n, image = self.numbers, to_uint8(self.image[0, 0])
        scene = film.Scene(
            *(image, n["original"]["probability"], self.drawn("latent_ig")),
            *(self.classes[1], self.overlay.own, self.banner),
        )
        return film.film(
            scene,
            to_uint8(self.frames[:, 0]),
            to_uint8(self.overlaid[:, 0]),
            self.doses.tolist(),
            list(zip(n["probability"], n["probability_overlaid"])),
        )

    def panel(self) -> np.ndarray:
        """One picture, uint8 RGB: the verdict, what turns it and where above; the rest below."""
        return film.panel(self.sheet())

    def sheet(self) -> Sheet:
        """What the panel shows."""
        n, image = self.numbers, to_uint8(self.image[0, 0])
        answers, changed = n["probability"], n["counterfactual"]["probability_overlaid"]
        pictures = (
            ("GAN's copy", n["reconstruction"]["probability"], self.reconstructions[0, 0]),
            ("GAN's copy, healthy", answers[0], self.frames[0, 0]),
            ("GAN's copy, diseased", answers[-1], self.frames[-1, 0]),
        )
        top = np.percentile(np.abs(self.drawn("latent_ig")), 99.5)
        answer, most = f"probability of {self.classes[1]}", f"up to {top:.2g} logits a pixel"
        large = (
            (f"the original\n{answer} {n['original']['probability']:.2f}", image, None),
            (
                f"the original, changed\n{answer} {changed:.2f}",
                to_uint8(self.counterfactual()),
                None,
            ),
            (f"where its answer comes from\nlatent IG, {most}", image, self.drawn("latent_ig")),
        )
        small = [(f"{name}\nprobability {p:.2f}", to_uint8(x), None) for name, p, x in pictures]
        small += [
            (film.TITLES[name] + self._note(name), image, self.drawn(name))
            for name in self.maps
            if name != "latent_ig"
        ]
        about = (
            "The original is changed only where this classifier needs it; the GAN's copies are drawn "
            "whole, and no X-rays. Probabilities are the classifier's. Red is where its answer comes "
            "from, right or wrong, and need not be where disease is. SSIM of the copy "
            f"{n['reconstruction']['ssim']:.2f}, completeness error {n['completeness_error']:.3f}."
        )
        lines = (about, *(f"Warning: {line}." for line in self.warnings))
        return Sheet(report.sentence(self), large, small, lines, self.banner)

    def _note(self, name: str) -> str:
        """A second line under the title of a map in the panel."""
        return NOTES.get(name, "") if self.maps[name].any() else "\nno place speaks for it"

    def drawn(self, name: str) -> np.ndarray:
        """A map [R, R] as pictures show it: with its signs, smoothed by a Gaussian of R / 32."""
        heat = self.maps[name].detach()
        return attribution.smooth(heat, len(heat) / 32).cpu().numpy()

    def counterfactual(self) -> Tensor:
        """The image [R, R], turned into the other class where the classifier needs it."""
        return self.overlaid[self.numbers["counterfactual"]["frame"], 0]


def foreign(folder: str | Path) -> str | None:
    """The name of something in a folder that no explanation wrote, and that must not be replaced."""
    if not os.path.isdir(folder):
        return None
    held = {entry.name for entry in os.scandir(folder)}
    own = WRITTEN if "explanation.json" in held else set()
    return min(held - own - CLUTTER, default=None)


@torch.no_grad()
def measure(t: Traversal, model: Model) -> dict:
    """The numbers of a path for explanation.json."""
    logits = t.logits
    change = (logits[-1] - logits[0]).abs().clamp_min(1e-6)
    mean = model.buffers.get("mean_image")
    return {
        "use": "research only, no diagnosis",
        "model": str(model.path),
        "classifier": model.info.get("foreign", "the model's own"),
        "classes": list(t.classes),
        "original": {"probability": t.logit.sigmoid().item(), "logit": t.logit.item()},
        "found_dose": t.codes.z2[0].norm().item(),
        "dose": t.doses.tolist(),
        "logit": logits.tolist(),
        "probability": logits.sigmoid().tolist(),
        "probability_overlaid": t.overlaid_logits.sigmoid().tolist(),
        "logit_gap": (logits - model.logit(t.doses)).abs().median().item(),
        "largest_jump": (logits.diff().abs().max() / change).item(),
        "reconstruction": _reconstruction(t, model),
        "counterfactual": _counterfactual(t),
        "appearance": _appearance(t, model),
        "restarts": _restarts(t),
        "directions": [] if t.diseased else _directions(t, model),
        "likeness": None if mean is None else likeness(t.image, mean).item(),
        "versions": versions(),
    }


def _reconstruction(t: Traversal, model: Model) -> dict[str, float]:
    """How well the best inversion stands for the image; `ssim_encoder` is the encoder's alone,
    which the model file's threshold was set for."""
    x, best = t.image, t.reconstructions[:1]
    probability = model.classifier(best).sigmoid().item()
    return {
        "probability": probability,
        "probability_gap": abs(probability - t.logit.sigmoid().item()),
        "psnr": metrics.psnr(x, best).item(),
        "ssim": metrics.ssim(x, best).item(),
        "ssim_encoder": metrics.ssim(x, t.encoded).item(),
    }


def _counterfactual(t: Traversal) -> dict:
    """The path's end that is of the other class, as drawn and as the overlay (`overlaid`)."""
    frame = 0 if t.diseased else len(t.doses) - 1
    end, reconstruction = t.frames[frame], t.reconstructions[0]
    logit, overlaid_logit = t.logits[frame], t.overlaid_logits[frame]
    return {
        "frame": frame,
        "probability": logit.sigmoid().item(),
        "probability_overlaid": overlaid_logit.sigmoid().item(),
        "flipped": (logit.item() > 0) != t.diseased,
        "flipped_overlaid": (overlaid_logit.item() > 0) != t.diseased,
        "l1_original": _l1(t.image - end),
        "l1_reconstruction": _l1(reconstruction - end),
        "changed_pixels": _changed(reconstruction, end),
        "l1_overlaid": _l1(t.image - t.overlaid[frame]),
        "changed_overlaid": _changed(t.image[0], t.overlaid[frame]),
        "outside_lung": _outside(reconstruction - end, t.lung),
        "outside_lung_overlaid": _outside(t.image[0] - t.overlaid[frame], t.lung),
    }


def _appearance(t: Traversal, model: Model) -> dict[str, float] | None:
    """How far pictures look from real ones, see `appearance`; None for a model file without the
    reference."""
    limit, end = model.info["thresholds"].get("appearance"), 0 if t.diseased else -1
    middle = t.inversion.walks[0, len(DOSES) // 2]
    pictures = [t.image[0], t.frames[0], middle, t.frames[-1]]
    found = appearance.distances(torch.stack([*pictures, t.overlaid[end]]), model.buffers)
    if found is None or limit is None:
        return None
    return dict(zip(PICTURES, found)) | {"limit": limit}


def _outside(change: Tensor, lung: Tensor) -> float | None:
    """The share of a change [1, R, R] outside the lungs, None if none are found."""
    if not lung.any():
        return None
    return share(change.abs(), ~lung[0])


def _restarts(t: Traversal) -> dict:
    """How far the restarts agree: `spread` is the mean standard deviation of the differences that
    their paths make, over their mean size, None for one alone."""
    walks, reconstructions = t.inversion.walks, t.reconstructions
    diseased_ends = reconstructions if t.diseased else walks[:, -1]
    differences = diseased_ends - walks[:, 0]
    size = differences.abs().mean().clamp_min(1e-6)
    spread = differences.std(0, correction=0).mean() / size
    return {
        "count": len(reconstructions),
        "spread": spread.item() if len(reconstructions) > 1 else None,
        "doses": t.codes.z2.norm(dim=1).tolist(),
        "ssim": metrics.ssim(t.image.expand_as(reconstructions), reconstructions).tolist(),
    }


def _directions(t: Traversal, model: Model) -> list[dict]:
    """What each disease direction does to a healthy image at full dose; the first is shown."""
    others = t.codes.best.draw(model.generator, t.directions[1:]).clamp(-1, 1)
    logits = torch.cat([t.logits[-1:], model.classifier(others)])
    probabilities = logits.sigmoid().tolist()
    ends = torch.cat([t.frames[-1:], others])
    return [
        {"probability": p, "accepted": p > 0.5, "l1": _l1(end - t.frames[0])}
        for p, end in zip(probabilities, ends)
    ]


def share(size: Tensor, where: Tensor) -> float:
    """The share of a sum that lies in a mask."""
    return (size[where].sum() / size.sum().clamp_min(1e-12)).item()


def _changed(x: Tensor, y: Tensor) -> float:
    """The share of pixels that have changed."""
    return ((x - y).abs() > 2 * CHANGED).float().mean().item()


def _l1(difference: Tensor) -> float:
    """Mean absolute difference, as a share of the grey range."""
    return difference.abs().mean().item() / 2


def versions() -> dict[str, str]:
    """The versions that the numbers were made with."""
    return {
        "cxrgan": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
