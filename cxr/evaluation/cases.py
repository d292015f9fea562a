"""How good the explanation of each image is: all measures that are taken image by image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from cxr import lungs, metrics
from cxr.attribution import magnitude
from cxr.belief import rejections
from cxr.checkpoints import Model
from cxr.classifier import to_tensor
from cxr.data.places import Places, place_of
from cxr.datasets import Dataset
from cxr.device import rng
from cxr.evaluation import heatmaps
from cxr.evaluation.findings import Findings, answers
from cxr.evaluation.intervals import Figures
from cxr.evaluation.realism import pools
from cxr.explain import at_once, explain_group
from cxr.explanation import CHANGED, Explanation, share
from cxr.inversion import Codes

HEALTHY = 256  # most healthy training images from which a baseline for deletion is chosen
DRAWS = 3  # of the noise under which a map should not move
NOISE = 0.01  # its standard deviation, of the range
GROUP = 4  # images judged at once, as many as a discriminator compares


@dataclass
class Judge:
    """Explains rows of a data set and measures each explanation.

    A figure is NaN if the image does not define it. oracle: the independent classifier; masks: where
    the disease is, by the stem of the image's name; lungs: the same of the lungs, which are found
    where no mask is given; findings: CNNs of other findings; refine, within, seed: as of `explain`.
    """

    model: Model
    data: Dataset
    oracle: nn.Module | None = None
    masks: Places = field(default_factory=dict)
    lungs: Places = field(default_factory=dict)
    refine: int = 60
    seed: int = 0
    within: str | None = None
    findings: Findings | None = None

    def __post_init__(self) -> None:
        self.device = self.model.generator.const.device
        self.mean_difference = class_difference(self.data)
        self.healthy = self.healthy_images()  # [H, 1, R, R]
        self.thresholds: dict[str, float] = {}
        self.apart = typical_distance(self.oracle, self.data, self.device)

    @cached_property
    def many(self) -> int:
        """How many images are explained at once."""
        return at_once(self.model)

    def explain(self, rows: Sequence[int]) -> list[Explanation]:
        return self.of(to_tensor(self.data.images[list(rows)], self.device))

    def of(self, x: Tensor, model: Model | None = None) -> list[Explanation]:
        """The explanations of images [B, 1, R, R]."""
        options = {"refine": self.refine, "within": self.within, "seed": self.seed}
        groups = (group.split(1) for group in x.split(self.many))
        return [e for g in groups for e in explain_group(g, model or self.model, **options)]

    def judge(self, rows: np.ndarray, explanations: list[Explanation]) -> list[Figures]:
        """The figures of each row, from its explanation; at most GROUP rows."""
        group = []
        for row, e in zip(rows, explanations):
            figures = self.reconstruction(e) | self.counterfactual(e, row)
            figures |= path(e) | self.disentanglement(e, row) | self.of_maps(e, row)
            figures |= self.gate(e)
            group.append(figures)
        compared = zip(group, self.realism_mid(explanations), self.swap(explanations))
        for figures, mid, swapped in compared:
            figures["path", "realism_mid"] = mid
            figures["disentanglement", "swap"] = swapped
        return group

    def reconstruction(self, e: Explanation) -> Figures:
        """How near the reconstruction is to the image, and whether it is rejected."""
        n = e.numbers["reconstruction"]
        figures = {name: n[name] for name in ("psnr", "ssim", "probability_gap")}
        figures["rejected"] = float(bool(rejections(e.numbers, self.model)))
        return _under("reconstruction", figures)

    @torch.no_grad()
    def counterfactual(self, e: Explanation, row: int) -> Figures:
        """Figures of the counterfactual, which is the path's end of the other class, and of its
        overlay (`overlaid`). The registry says what each figure means."""
        n = e.numbers["counterfactual"]
        end = e.frames[n["frame"]]
        overlaid = e.overlaid[n["frame"]]
        figures = {name: n[name] for name in ("l1_original", "l1_reconstruction", "l1_overlaid")}
        figures |= {"validity": float(n["flipped"]), "sparsity": n["changed_pixels"]}
        figures["validity_overlaid"] = float(n["flipped_overlaid"])
        figures["sparsity_overlaid"] = n["changed_overlaid"]
        if self.oracle is not None:
            for name, x in (("oracle_validity", end), ("oracle_validity_overlaid", overlaid)):
                figures[name] = float((self.oracle(x[None]).item() > 0) != e.diseased)
        for name, x in (("", end), ("_overlaid", overlaid)):
            figures["cout" + name] = heatmaps.cout(
                self.model.classifier, e.image, x[None], e.diseased
            )
            if self.apart:
                a, b = (self.oracle.features(t) for t in (e.image, x[None]))
                figures["perceptual" + name] = ((a - b).norm() / self.apart).item()
        lung = self.lung(e, row)
        if lung is not None:
            outside = torch.from_numpy(~lung).to(self.device)[None]
            changes = {"": e.reconstructions[0] - end, "_overlaid": e.image[0] - overlaid}
            for name, change in changes.items():
                figures["outside_lung" + name] = share(change.abs(), outside)
            figures["outside_area"] = outside.float().mean().item()
        return _under("counterfactual", figures)

    @torch.no_grad()
    def gate(self, e: Explanation) -> Figures:
        """Whether the explanation is to be believed, and whether its overlay convinces the independent
        classifier, told apart by that."""
        figures = {"believed": float(e.believe)}
        if self.oracle is not None:
            overlaid = self.oracle(e.counterfactual()[None, None]).item()
            name = "convinces_believed" if e.believe else "convinces_refused"
            figures[name] = float((overlaid > 0) != e.diseased)
        return _under("gate", figures)

    @torch.no_grad()
    def disentanglement(self, e: Explanation, row: int) -> Figures:
        """Whether the structure stays the same along the path, and whether dose 0 is healthy."""
        ends = e.frames[:1], e.frames[-1:]
        same = (ends[0] - ends[1])[0, 0].abs() <= 2 * CHANGED
        figures = {"structure_ssim": heatmaps.ssim_where(*ends, same)}
        lung = self.lung(e, row)
        if lung is not None:
            outside = torch.from_numpy(~lung).to(self.device)
            figures["outside_lung_ssim"] = heatmaps.ssim_where(*ends, outside)
        found = (lungs.find(end)[0, 0].cpu().numpy() for end in ends)
        figures["lung_overlap"] = heatmaps.iou(*found)
        if self.data.labels[row]:
            figures["inverted_healthy"] = float(e.logits[0] < 0)
            if self.oracle is not None:
                figures["oracle_inverted_healthy"] = float(self.oracle(ends[0]).item() < 0)
        return _under("disentanglement", figures)

    @torch.no_grad()
    def realism_mid(self, explanations: list[Explanation]) -> list[float]:
        """The discriminator's mean score of each path's frames from dose 0.25 to 0.75, minus its
        mean score of the path's two ends. It is 0 or more if the middle frames look as real as the
        ends. The discriminator sees the same frame of all paths as one batch, as in training it
        sees different lungs."""
        if "discriminator" not in self.model.networks:
            return [float("nan")] * len(explanations)
        doses = explanations[0].doses
        frames = torch.stack([e.frames for e in explanations], 1)  # [F, n, 1, R, R]
        scores = torch.stack(
            [self.model.discriminator(x, d.expand(len(x))) for x, d in zip(frames, doses)]
        )  # [F, n]
        middle = (doses >= 0.25) & (doses <= 0.75)
        return (scores[middle].mean(0) - scores[[0, -1]].mean(0)).tolist()

    @torch.no_grad()
    def swap(self, explanations: list[Explanation]) -> list[float]:
        """Draw each image's lungs with the `z2` of the next image. The figure is 1 if the CNN gives
        them the class of the next image's reconstruction, and 0 if it gives them the class of their
        own reconstruction. It is NaN if both classes are the same."""
        lungs = Codes.together([e.codes.best for e in explanations])
        verdict, mixed = (
            self.model.classifier(lungs.draw(self.model.generator, z).clamp(-1, 1)) > 0
            for z in (lungs.z2, lungs.z2.roll(-1, 0))
        )
        donor = verdict.roll(-1)
        return torch.where(verdict == donor, torch.nan, (mixed == donor).float()).tolist()

    def maps(self, e: Explanation, row: int) -> dict[str, Tensor]:
        """The explanation's maps, what its overlay changes, and the maps that ask no classifier,
        [R, R] each, with signs."""
        maps = e.maps | {"overlay": e.image[0, 0] - e.counterfactual()}
        maps |= heatmaps.trivial_maps(e.image, int(row))
        if self.mean_difference is not None:
            maps["mean_difference"] = self.mean_difference.to(self.device)
        lung = self.lung(e, row)
        if lung is not None:
            maps["lung_mask"] = torch.from_numpy(lung).to(self.device).float()
        return maps

    def of_maps(self, e: Explanation, row: int) -> Figures:
        """Localisation, if the image has a mask, and faithfulness of each map.

        Only for images that the CNN calls diseased, because other maps do not point at disease. The
        `magnitude` of each map is scored.
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
        """Those of the first 256 healthy training images that the CNN calls healthy."""
        rows = np.flatnonzero((self.data.splits == "train") & (self.data.labels == 0))[:HEALTHY]
        x = to_tensor(self.data.images[rows], self.device)
        called = [self.model.classifier(part) < 0 for part in x.split(64) if len(part)]
        return x[torch.cat(called)] if called else x

    def nearest_healthy(self, x: Tensor) -> Tensor | None:
        """The healthy image with the least squared difference from `x`, the baseline of deletion.

        A constant image, a blurred image and the mean image are no baselines: if the CNN calls them
        diseased, nothing is deleted. The path's own healthy end would favour the path's maps.
        """
        if not len(self.healthy):
            return None
        place = (self.healthy - x).square().mean((1, 2, 3)).argmin()
        return self.healthy[place : place + 1]

    def tune(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """The IoU of each map of each validation image at every threshold."""
        return [
            {
                name: heatmaps.iou_curve(magnitude(heat).cpu().numpy(), self.place(self.masks, row))
                for name, heat in self.maps(e, row).items()
            }
            for e, row in zip(self.explain(rows), rows)
        ]

    def randomisation(self, explanations: list[Explanation], rows: Sequence[int]) -> list[Figures]:
        """Spearman's correlation of each map of each image with the map of a CNN with more and more
        randomised layers (Adebayo et al. 2018). The inversion is repeated for each of these CNNs.
        Keys: ("randomisation", METHOD, stage); in the last stage also ("randomisation", METHOD,
        "magnitude") for the magnitudes of the maps."""
        each = list(zip(explanations, rows))
        maps, figures = [self.maps(e, row) for e, row in each], [{} for _ in rows]
        x = torch.cat([e.image for e in explanations])
        for stage in range(1, heatmaps.STAGES + 1):
            classifier = heatmaps.randomised(self.model.classifier, stage, self.seed)
            networks = self.model.networks | {"classifier": classifier}
            other = Model(networks, self.model.info, self.model.buffers, self.model.path)
            for e, row, before, found in zip(self.of(x, other), rows, maps, figures):
                for name, heat in self.maps(e, row).items():
                    pair = before[name], heat
                    found["randomisation", name, str(stage)] = alike(*pair)
                    if stage == heatmaps.STAGES:
                        found["randomisation", name, "magnitude"] = alike(*map(magnitude, pair))
        return figures

    def stability(self, explanations: list[Explanation], rows: Sequence[int]) -> list[Figures]:
        """How far each image is from its reconstruction's reconstruction (composition) and from where
        its counterfactual's own explanation leads back (reversibility), and how far each map moves
        under noise. Five more explanations of each image are made for this."""
        asked = [e.reconstructions[:1] for e in explanations]
        for draw in range(DRAWS):
            for e, row in zip(explanations, rows):
                noise = torch.randn(e.image.shape, generator=rng(self.seed, int(row), draw))
                asked.append((e.image + 2 * NOISE * noise.to(self.device)).clamp(-1, 1))
        ends = [e.frames[e.numbers["counterfactual"]["frame"]][None] for e in explanations]
        found, n = self.of(torch.cat(asked + ends)), len(rows)
        again, *noisy, back = (found[first : first + n] for first in range(0, len(found), n))
        figures = []
        for i, e in enumerate(explanations):
            home = back[i].frames[(back[i].doses - e.overlay.own).abs().argmin()]
            pairs = {"composition": again[i].reconstructions[0], "reversibility": home}
            far = {name: (x - e.image[0]).abs().mean().item() / 2 for name, x in pairs.items()}
            moved = {
                ("stability", name, "max_sensitivity"): max(
                    apart(draw[i].maps[name], heat) for draw in noisy
                )
                for name, heat in e.maps.items()
            }
            figures.append(_under("counterfactual", far) | moved)
        return figures

    def features(self, e: Explanation) -> dict[str, list[float]]:
        """The independent classifier's features of the counterfactual and of its overlay; empty if it
        has none."""
        if not self.apart:
            return {}
        frame = e.numbers["counterfactual"]["frame"]
        with torch.no_grad():
            ends = self.oracle.features(torch.stack([e.frames[frame], e.overlaid[frame]]))
        return dict(zip(("fid", "fid_overlaid"), ends.float().tolist()))

    def answers(self, e: Explanation) -> list[list[float]]:
        """The answers of CNN and findings; empty without CNNs of findings."""
        if self.findings is None:
            return []
        return answers(self.model.classifier, self.findings, e)

    def lung(self, e: Explanation, row: int) -> np.ndarray | None:
        """The lungs of a row's image, bool [R, R]: its mask, else those that are found in it. None
        if there are none."""
        lung = self.place(self.lungs, row)
        if lung is None:
            lung = e.lung[0, 0].cpu().numpy()
        return lung if lung.any() else None

    def place(self, places: Places, row: int) -> np.ndarray | None:
        """The mask of a row's image, bool [R, R], prepared as the image was. None if there is none
        or it is empty."""
        info = self.model.info
        return place_of(places, self.data.paths[row], info["size"], info["fit"])


def path(e: Explanation) -> Figures:
    """Figures of the path: Spearman's correlation of dose and logit; the median distance between
    the logit that a dose names and the CNN's logit; the largest step of the logit from frame to
    frame, as a share of its whole change."""
    figures = {name: e.numbers[name] for name in ("logit_gap", "largest_jump")}
    figures["spearman"] = metrics.spearman(e.doses.cpu().numpy(), e.logits.cpu().numpy())
    return _under("path", figures)


@torch.no_grad()
def typical_distance(oracle: nn.Module | None, data: Dataset, device: torch.device) -> float:
    """The mean distance of two images of different patients in the features of the independent
    classifier, over 64 random pairs; 0 if it has no features."""
    if not pools(oracle, data, device):
        return 0.0
    rows = np.random.default_rng(0).permutation(len(data))[:128]
    x = oracle.features(to_tensor(data.images[rows], device)).float()
    half = len(x) // 2
    a, b = x[:half], x[half : 2 * half]
    other = [data.patients[i] != data.patients[j] for i, j in zip(rows[:half], rows[half:])]
    return (a - b).norm(dim=1)[torch.tensor(other)].mean().item() if any(other) else 0.0


def apart(moved: Tensor, heat: Tensor) -> float:
    """How far a map has moved, as a share of its length; NaN of an empty map."""
    return ((moved - heat).norm() / heat.norm()).item() if heat.any() else float("nan")


def alike(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two maps [R, R]."""
    return metrics.spearman(*(heat.detach().cpu().numpy() for heat in (a, b)))


def class_difference(data: Dataset) -> Tensor | None:
    """The mean diseased training image minus the mean healthy one, [R, R]. None if a class has no
    training images."""
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


def _under(part: str, figures: dict[str, float], *method: str) -> Figures:
    return {(part, *method, name): value for name, value in figures.items()}


def _total(pictures: np.ndarray) -> Tensor:
    return to_tensor(pictures).sum((0, 1))
