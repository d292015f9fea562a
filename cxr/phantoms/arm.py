"""One arm of the phantom protocol: phantoms, a CNN, a GAN, and the figures of each phantom."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr import console, metrics, train_cnn, train_gan
from cxr.checkpoints import Model, load_model
from cxr.classifier import predict, to_tensor
from cxr.data.places import mask_files
from cxr.datasets import Dataset, open_dataset
from cxr.device import prepare
from cxr.evaluation.cases import Judge, path
from cxr.evaluation.stages import tuned_thresholds
from cxr.explanation import Explanation
from cxr.files import write_text
from cxr.networks import PRESETS
from cxr.phantoms import lesions, probe
from cxr.phantoms.lesions import Sample
from cxr.phantoms.probe import Reader

SIGNS = ("lesion", "marker")  # what a CNN may rely on
MASKS = {"lesion": "masks", "marker": "markers"}  # the folders of their masks
Row = dict[str, float]  # an image's figures; those with `raw/` only serve to compute others


@dataclass(frozen=True)
class Plan:
    """The size of the protocol. The defaults take about two hours on 2 cores at 32 pixels."""

    preset: str = "cxr32"
    seed: int = 0
    seeds: int = 3  # of the lesion arm
    phantoms: int = 6_000  # in a data set; 80% are for training
    cnn: int = 160_000  # images that the training of a CNN sees
    gan: int = 64_000  # images that the training of a GAN sees
    explained: int = 96  # most test images of a data set to explain
    refine: int = 60  # steps of each inversion

    @property
    def size(self) -> int:
        return PRESETS[self.preset].size


@dataclass(frozen=True)
class Arm:
    """One data set with its CNN and its GAN, in a folder of their own."""

    folder: Path
    plan: Plan
    seed: int
    shortcut: float | None = None
    device: str = "cpu"

    @property
    def data(self) -> Path:
        return self.folder / "phantoms"

    @property
    def cnn(self) -> Path:
        return self.folder / "cnn"

    @property
    def gan(self) -> Path:
        return self.folder / "gan"

    def make(self) -> None:
        """Make the phantoms, completely or not at all."""
        if not self.data.exists():
            unfinished = self.folder / "phantoms.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            lesions.write(unfinished, self.plan.phantoms, self.plan.size, self.seed, self.shortcut)
            unfinished.replace(self.data)

    def samples(self) -> dict[str, tuple[Sample, float]]:
        """Each phantom and its burden, by the phantom's name."""
        with open(self.data / "truth.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return {s.name: (s, float(r["burden"])) for r in rows for s in [Sample.from_row(r)]}

    def dataset(self) -> Dataset:
        return open_dataset(self.data / "images", self.plan.size)

    def load(self, run: Path) -> Model:
        """The model in a run folder."""
        return load_model(run / "model.safetensors", prepare(self.device))

    def logits(self, model: Model, images: np.ndarray) -> np.ndarray:
        return predict(model.classifier, images, prepare(self.device))

    def train_cnn(self, data: Path | None = None, out: Path | None = None) -> Model:
        data, out = data or self.data / "images", out or self.cnn
        plan = self.plan
        config = train_cnn.Config(
            str(data), plan.preset, images=plan.cnn, seed=self.seed, device=self.device
        )
        return train_cnn.train(config, str(out), resume=begun(out))

    def gan_config(self, data: Path | None = None, cnn: Path | None = None, **options):
        data, cnn = data or self.data / "images", (cnn or self.cnn) / "model.safetensors"
        return train_gan.Config(
            str(data),
            str(cnn),
            self.plan.preset,
            batch=32,  # this and the next: as for the published figures of phantoms
            proximity=1.0,
            images=self.plan.gan,
            seed=self.seed,
            device=self.device,
            **options,
        )

    def train_gan(self) -> Model:
        train_gan.train(self.gan_config(), str(self.gan), resume=begun(self.gan))
        return self.load(self.gan)


def begun(folder: Path) -> bool:
    """Whether a run folder holds something to resume. A complete run may be resumed, too."""
    return (folder / "state.safetensors").exists()


# ---------------------------------------------------------------------------------------------
# What the CNN relies on


def reliance(arm: Arm, model: Model) -> list[Row]:
    """For every test image: its label, its logit, how far the logit falls and whether the verdict
    flips when the same phantom is drawn without its lesions, or without its marker."""
    data, samples = arm.dataset(), arm.samples()
    rows = data.rows("test")
    logits = arm.logits(model, data.images[rows])
    table = []
    with console.progress("reliance", len(rows)) as bar:
        for row, logit in zip(rows, logits):
            sample, _ = samples[Path(data.paths[row]).stem]
            figures = {"raw/label": float(data.labels[row]), "raw/logit": float(logit)}
            shown = {"lesion": bool(sample.lesions), "marker": sample.marker}
            for sign in (sign for sign in SIGNS if shown[sign]):
                without = sample.render(lesions=sign != "lesion", marker=sign != "marker").image
                after = float(arm.logits(model, without[None])[0])
                figures[f"reliance/{sign}/drop"] = float(logit) - after
                if logit > 0:
                    figures[f"reliance/{sign}/flips"] = float(after <= 0)
            table.append(figures)
            bar.advance()
    return table


def relied_on(rows: Sequence[Row]) -> str:
    """The sign whose removal lowers the logit most, on average over the images that have it."""
    drops = {
        sign: np.mean([row[key] for row in rows if key in row] or [-np.inf])
        for sign in SIGNS
        for key in [f"reliance/{sign}/drop"]
    }
    return max(drops, key=drops.get)


# ---------------------------------------------------------------------------------------------
# What the explanation is worth


def explained(arm: Arm, model: Model, sign: str, real: Model | None = None) -> list[Row]:
    """The figures of up to `plan.explained` test images.

    sign: the sign whose masks localisation is scored against; real: the CNN that judges, by default
    the model's own. Localisation is scored on images that have the sign and that the CNN calls
    diseased. The map of an image that it calls healthy shows where disease would appear, and no
    mask is right for that.
    """
    data, samples = arm.dataset(), arm.samples()
    masks = mask_files(arm.data / MASKS[sign], sign, data)
    markers = mask_files(arm.data / "markers", "marker", data) if arm.shortcut is not None else {}
    judge = Judge(model, data, masks=masks, refine=arm.plan.refine)
    judge.thresholds = tuned_thresholds(judge)
    rows = np.random.default_rng(arm.seed).permutation(data.rows("test"))[: arm.plan.explained]
    known = [samples[Path(data.paths[row]).stem] for row in rows]
    table, explanations = [], []
    with console.progress("explain", len(rows)) as bar:
        for row, (sample, burden) in zip(rows, known):
            (e,) = judge.explain([row])
            figures = of_judge(judge, e, row, markers)
            figures |= dose_figures(e, (real or model).classifier, burden, bool(sample.lesions))
            table.append(
                figures | (twin_figures(e, sample) if sample.lesions and e.diseased else {})
            )
            explanations.append(e)
            bar.advance()
    reader = Reader.fit(data, samples)
    for figures, read in zip(table, swapped(model, reader, explanations, known)):
        figures |= read
    return table


def of_judge(judge: Judge, e: Explanation, row: int, markers: dict[str, Path]) -> Row:
    """The figures that `evaluate` takes of any explanation, and the marker's share of the map if
    there is a marker."""
    figures = judge.reconstruction(e) | judge.counterfactual(e, row) | path(e)
    figures |= judge.of_maps(e, row)
    joined = {"/".join(key): value for key, value in figures.items()}
    place = judge.place(markers, row)
    if place is not None and e.diseased:
        joined |= marker_share(judge.maps(e, row), place)
        latent = e.maps["latent_ig"].cpu()  # its sum is the change of the logit
        on_marker = latent[torch.from_numpy(place)].sum()
        joined["marker/latent_ig/share"] = (on_marker / latent.sum()).item()
    return joined


def swapped(
    model: Model, reader: Reader, explanations: list[Explanation], known: list[tuple[Sample, float]]
) -> Iterator[Row]:
    """What the reader reads from each image and from its lungs with the disease of the next image,
    with the truth of both."""
    for e, other, truth, other_truth in zip(
        explanations, explanations[1:] + explanations[:1], known, known[1:] + known[:1]
    ):
        with torch.no_grad():
            mixed = e.codes.best.draw(model.generator, other.codes.z2[:1]).clamp(-1, 1)
        row = reader.columns("real", e.image) | reader.columns("mixed", mixed)
        yield row | probe.truth("true", *truth) | probe.truth("other", *other_truth)


def dose_figures(e: Explanation, real: nn.Module, burden: float, diseased: bool) -> Row:
    """The response of the CNN that judges: Spearman's correlation along the path, and whether it
    gives the other class to the path's end of the other class. For a diseased image, also the
    columns for the relation of dose and burden."""
    with torch.no_grad():
        along, logit = real(e.frames), real(e.image).item()
    end = along[0 if logit > 0 else -1].item()
    row = {
        "real_cnn/path_spearman": metrics.spearman(e.doses.cpu().numpy(), along.cpu().numpy()),
        "real_cnn/validity": float((end > 0) != (logit > 0)),
    }
    if diseased:
        row |= {"raw/burden": burden, "raw/dose": e.numbers["found_dose"], "raw/own": logit}
    return row


def twin_figures(e: Explanation, sample: Sample) -> Row:
    """PSNR and SSIM against the exact healthy twin: of the path's healthy end, of the overlay's
    healthy end, and, for comparison, of the original."""
    twin = to_tensor(sample.render(lesions=False).image[None], e.image.device)
    shown = {"healthy_end": e.frames[:1], "overlaid": e.overlaid[:1], "original": e.image}
    row = {f"twin/{name}/psnr": metrics.psnr(x, twin).item() for name, x in shown.items()}
    return row | {f"twin/{name}/ssim": metrics.ssim(x, twin).item() for name, x in shown.items()}


def marker_share(maps: dict[str, Tensor], place: np.ndarray) -> Row:
    """The share of each map's mass (absolute values) that lies on the marker (`mass`), and that
    lies on it or within R / 32 pixels (`mass_near`). `chance`: the same for an even map."""
    r = max(1, len(place) // 32)
    on = torch.from_numpy(place)
    near = F.max_pool2d(on[None].float(), 2 * r + 1, 1, r)[0] > 0
    row = {"marker/chance/mass": place.mean(), "marker/chance/mass_near": near.float().mean()}
    for name, heat in maps.items():
        mass = heat.detach().abs().double().cpu()
        total = mass.sum().clamp_min(1e-12)
        row[f"marker/{name}/mass"] = mass[on].sum() / total
        row[f"marker/{name}/mass_near"] = mass[near].sum() / total
    return {name: float(value) for name, value in row.items()}


def kept(file: Path, make: Callable[[], list[Row]]) -> list[Row]:
    """The rows in a file. If there is no file, they are made and written first."""
    if not file.exists():
        write_text(file, json.dumps(make()))
    return json.loads(file.read_text())
