"""What the explanation of each image is worth: all figures that are taken image by image."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cxr import CxrError, UsageError, images, metrics
from cxr.attribution import magnitude
from cxr.checkpoints import Model
from cxr.classifier import to_tensor
from cxr.datasets import Dataset
from cxr.evaluation import heatmaps
from cxr.explain import explain
from cxr.explanation import CHANGED, Explanation
from cxr.inversion import Codes

REJECTED = 0.1  # a reconstruction's gap in probability above which it does not stand for the image
HEALTHY = 256  # training images at most that deletion may turn an image into
GROUP = 4  # images judged at once; a discriminator compares so many
Figures = dict[tuple[str, ...], float]  # by the keys that lead to them in evaluation.json


@dataclass
class Judge:
    """Explains rows of a data set and measures each explanation.

    A figure that an image does not define is NaN.
    """

    model: Model
    data: Dataset
    oracle: nn.Module | None = None
    masks: dict[str, Path] = field(
        default_factory=dict
    )  # where the disease is, by the image's stem
    lungs: dict[str, Path] = field(default_factory=dict)
    refine: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        self.device = self.model.generator.const.device
        self.mean_difference = class_difference(self.data)
        self.healthy = self.healthy_images()  # [H, 1, R, R]
        self.thresholds: dict[str, float] = {}

    def explain(self, row: int, model: Model | None = None) -> Explanation:
        x = to_tensor(self.data.images[row : row + 1], self.device)
        return explain(x, model or self.model, refine=self.refine, seed=self.seed)

    def judge(self, rows: np.ndarray, found: list[Explanation]) -> list[Figures]:
        """The figures of each of some rows, at most GROUP, by their explanations."""
        figures = []
        for row, e in zip(rows, found):
            own = self.reconstruction(e) | self.counterfactual(e, row)
            own |= path(e) | self.disentanglement(e, row) | self.of_maps(e, row)
            figures.append(own)
        for own, mid, swapped in zip(figures, self.realism_mid(found), self.swap(found)):
            own["path", "realism_mid"] = mid
            own["disentanglement", "swap"] = swapped
        return figures

    def reconstruction(self, e: Explanation) -> Figures:
        """`rejected`: the probability gap is above 0.1, or the encoder's SSIM under validation's
        5th percentile."""
        n = e.numbers["reconstruction"]
        limit = self.model.info["thresholds"].get("ssim", -1)
        rejected = n["probability_gap"] > REJECTED or n["ssim_encoder"] < limit
        figures = {name: n[name] for name in ("psnr", "ssim", "probability_gap")}
        figures["rejected"] = float(rejected)
        return _under("reconstruction", figures)

    @torch.no_grad()
    def counterfactual(self, e: Explanation, row: int) -> Figures:
        """The path's end of the other class: validity, that this CNN (the oracle) gives it that
        class; L1 from the original and from the reconstruction; `sparsity`, the share of pixels
        that change by more than 0.05; all `overlaid`: of the original changed only where the CNN
        needs it; `outside_lung`, the share of the change there, and
        `outside_area`, the share of the image, which a change without any aim would give."""
        n = e.numbers["counterfactual"]
        end = e.frames[n["frame"]]
        laid = e.overlaid[n["frame"]]
        figures = {name: n[name] for name in ("l1_original", "l1_reconstruction", "l1_overlaid")}
        figures |= {"validity": float(n["flipped"]), "sparsity": n["changed_pixels"]}
        figures["validity_overlaid"] = float(n["flipped_overlaid"])
        figures["sparsity_overlaid"] = n["changed_overlaid"]
        if self.oracle is not None:
            for name, x in (("oracle_validity", end), ("oracle_validity_overlaid", laid)):
                figures[name] = float((self.oracle(x[None]).item() > 0) != e.diseased)
        lung = self.place(self.lungs, row)
        if lung is not None:
            for name, change in (
                ("", e.reconstructions[0] - end),
                ("_overlaid", e.image[0] - laid),
            ):
                size = change[0].abs().cpu().numpy()
                figures["outside_lung" + name] = float(size[~lung].sum() / max(size.sum(), 1e-12))
            figures["outside_area"] = float(np.mean(~lung))
        return _under("counterfactual", figures)

    @torch.no_grad()
    def disentanglement(self, e: Explanation, row: int) -> Figures:
        """`structure_ssim`: of the path's two ends, where they agree to 0.05 of the range, and
        `outside_lung_ssim`, outside the lungs; `inverted_healthy`: a diseased image's lungs are
        called healthy at dose 0, by this CNN and by the oracle.

        The overlap of the ends' own lungs is not measured: it takes a network that finds lungs,
        and one that finds them under disease. That what surrounds them stays is asked instead.
        """
        ends = e.frames[:1], e.frames[-1:]
        same = (ends[0] - ends[1])[0, 0].abs() <= 2 * CHANGED
        figures = {"structure_ssim": heatmaps.ssim_where(*ends, same)}
        lung = self.place(self.lungs, row)
        if lung is not None:
            outside = torch.from_numpy(~lung).to(self.device)
            figures["outside_lung_ssim"] = heatmaps.ssim_where(*ends, outside)
        if self.data.labels[row]:
            figures["inverted_healthy"] = float(e.logits[0] < 0)
            if self.oracle is not None:
                figures["oracle_inverted_healthy"] = float(self.oracle(ends[0]).item() < 0)
        return _under("disentanglement", figures)

    @torch.no_grad()
    def realism_mid(self, found: list[Explanation]) -> list[float]:
        """The discriminator's mean score of each path's frames from dose 0.25 to 0.75, less that
        of its two ends: 0 or more where mid frames look as real. A frame is scored among the same
        frames of the other paths, as in training among other lungs."""
        if "discriminator" not in self.model.networks:
            return [float("nan")] * len(found)
        doses = found[0].doses
        frames = torch.stack([e.frames for e in found], 1)  # [F, n, 1, R, R]
        marks = torch.stack(
            [self.model.discriminator(x, d.expand(len(x))) for x, d in zip(frames, doses)]
        )  # [F, n]
        middle = (doses >= 0.25) & (doses <= 0.75)
        return (marks[middle].mean(0) - marks[[0, -1]].mean(0)).tolist()

    @torch.no_grad()
    def swap(self, found: list[Explanation]) -> list[float]:
        """Each image's lungs with the next one's `z2`: 1 if the CNN then calls it as it calls the
        next one's reconstruction, 0 if as its own; NaN where it calls both alike."""
        lungs = Codes.together([e.codes.best for e in found])
        own, mixed = (
            self.model.classifier(lungs.draw(self.model.generator, z).clamp(-1, 1)) > 0
            for z in (lungs.z2, lungs.z2.roll(-1, 0))
        )
        donor = own.roll(-1)
        return torch.where(own == donor, torch.nan, (mixed == donor).float()).tolist()

    def maps(self, e: Explanation, row: int) -> dict[str, Tensor]:
        """The explanation's maps and the baselines that ask no classifier, [R, R] each, signed."""
        maps = e.maps | heatmaps.trivial_maps(e.image, int(row))
        if self.mean_difference is not None:
            maps["mean_difference"] = self.mean_difference.to(self.device)
        lung = self.place(self.lungs, row)
        if lung is not None:
            maps["lung_mask"] = torch.from_numpy(lung).to(self.device).float()
        return maps

    def of_maps(self, e: Explanation, row: int) -> Figures:
        """Of an image that the CNN calls diseased: localisation, if it has a mask, faithfulness.

        Elsewhere a map does not point at disease. Every map counts by its `magnitude`.
        """
        if not e.diseased:
            return {}
        place, figures = self.place(self.masks, row), {}
        baseline = self.nearest_healthy(e.image)
        for name, heat in self.maps(e, row).items():
            heat = magnitude(heat)
            if place is not None:
                plain = heat.cpu().numpy()
                figures |= _under("localisation", heatmaps.localisation(plain, place), name)
                if name in self.thresholds:
                    cut = plain >= self.thresholds[name] * max(plain.max(), 1e-12)
                    figures["localisation", name, "iou_tuned"] = heatmaps.iou(cut, place)
            if baseline is not None:
                areas = heatmaps.deletion_insertion(self.model.classifier, e.image, heat, baseline)
                both = dict(zip(("deletion", "insertion"), areas))
                figures |= _under("faithfulness", both, name)
        return figures

    @torch.no_grad()
    def healthy_images(self) -> Tensor:
        """Healthy training images that the CNN calls healthy, the first 256."""
        rows = np.flatnonzero((self.data.splits == "train") & (self.data.labels == 0))[:HEALTHY]
        x = to_tensor(self.data.images[rows], self.device)
        called = [self.model.classifier(part) < 0 for part in x.split(64) if len(part)]
        return x[torch.cat(called)] if called else x

    def nearest_healthy(self, x: Tensor) -> Tensor | None:
        """The one of them with the least squared difference from `x`, into which deletion turns it.

        A constant, a blurred or the mean image would not do: such a CNN may call them diseased,
        and then nothing is deleted. The path's own healthy end would favour the path's maps.
        """
        if not len(self.healthy):
            return None
        place = (self.healthy - x).square().mean((1, 2, 3)).argmin()
        return self.healthy[place : place + 1]

    def tune(self, row: int) -> dict[str, np.ndarray]:
        """The IoU of each map of a validation image at every threshold."""
        e, place = self.explain(row), self.place(self.masks, row)
        return {
            name: heatmaps.iou_curve(magnitude(heat).cpu().numpy(), place)
            for name, heat in self.maps(e, row).items()
        }

    def randomisation(self, e: Explanation, row: int) -> Figures:
        """Spearman of each map with the one of ever more randomised CNNs, the inversion redone with
        each (Adebayo et al. 2018), with signs; keys ("randomisation", METHOD, stage). At the end
        also of their magnitudes, ("randomisation", METHOD, "magnitude")."""
        maps, figures = self.maps(e, row), {}
        for stage in range(1, heatmaps.STAGES + 1):
            classifier = heatmaps.randomised(self.model.classifier, stage, self.seed)
            networks = self.model.networks | {"classifier": classifier}
            other = Model(networks, self.model.info, self.model.buffers, self.model.path)
            for name, heat in self.maps(self.explain(row, other), row).items():
                pair = maps[name], heat
                figures["randomisation", name, str(stage)] = alike(*pair)
                if stage == heatmaps.STAGES:
                    figures["randomisation", name, "magnitude"] = alike(*map(magnitude, pair))
        return figures

    def place(self, files: dict[str, Path], row: int) -> np.ndarray | None:
        """The mask of a row's image, bool [R, R], prepared as the image was; None where there is no
        file or nothing on it."""
        path = files.get(Path(self.data.paths[row]).stem)
        if path is None:
            return None
        mask = images.load_mask(path, self.model.info["size"], self.model.info["fit"])
        return mask if mask.any() else None


def path(e: Explanation) -> Figures:
    """Along the path, a figure each: Spearman of dose and logit; the median gap between the logit
    a dose names and the one given; the largest step from frame to frame as a share of the whole."""
    figures = {name: e.numbers[name] for name in ("logit_gap", "largest_jump")}
    figures["spearman"] = metrics.spearman(e.doses.cpu().numpy(), e.logits.cpu().numpy())
    return _under("path", figures)


def alike(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two maps."""
    return metrics.spearman(*(heat.detach().cpu().numpy() for heat in (a, b)))


def class_difference(data: Dataset) -> Tensor | None:
    """The mean diseased less the mean healthy training image, [R, R]; None if a class has none."""
    if not all(data.counts()["train"]):
        return None
    healthy, diseased = (
        torch.stack(
            [_total(data.images[part]) for part in np.array_split(rows, -(-len(rows) // 256))]
        ).sum(0)
        / len(rows)
        for rows in data.by_class("train")
    )
    return diseased - healthy


def mask_files(folder: str | Path | None, option: str, data: Dataset) -> dict[str, Path]:
    """The masks in a folder by their stems, which are the images'.

    Raises UsageError if none belongs to an image, CxrError if two masks or two images share a stem.
    """
    if folder is None:
        return {}
    files: dict[str, Path] = {}
    for path in images.find_images(folder):
        if path.stem in files:
            raise CxrError(
                f"{option} {folder}: {files[path.stem]} and {path} are called alike; "
                "keep one, with all of the mask in it"
            )
        files[path.stem] = path
    stems = [Path(name).stem for name in data.paths if Path(name).stem in files]
    if not stems:
        raise UsageError(f"{option} {folder}: no file there is called like an image of {data.name}")
    if twice := [stem for stem in set(stems) if stems.count(stem) > 1]:
        raise CxrError(f"{option} {folder}: two images are called {twice[0]}; rename one")
    return files


def _under(part: str, figures: dict[str, float], *method: str) -> Figures:
    return {(part, *method, name): value for name, value in figures.items()}


def _total(pictures: np.ndarray) -> Tensor:
    return to_tensor(pictures).sum((0, 1))
