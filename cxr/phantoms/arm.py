"""One arm of the phantom protocol: phantoms, a CNN, a GAN, and what each picture says of them."""

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
from cxr.datasets import Dataset, open_dataset
from cxr.device import prepare
from cxr.evaluation.cases import Judge, mask_files, path
from cxr.evaluation.evaluate import tuned_thresholds
from cxr.explanation import Explanation
from cxr.files import write_text
from cxr.networks import PRESETS
from cxr.phantoms import lesions, probe
from cxr.phantoms.lesions import Sample
from cxr.phantoms.probe import Reader

SIGNS = ("lesion", "marker")  # what a CNN may rely on
MASKS = {"lesion": "masks", "marker": "markers"}  # the folders of where they are
Row = dict[str, float]  # an image's figures; what begins with `raw/` is only material for others


@dataclass(frozen=True)
class Plan:
    """How much of everything; the defaults take about two hours on 2 cores at 32 pixels."""

    preset: str = "cxr32"
    seed: int = 0
    seeds: int = 3  # of the lesion arm
    phantoms: int = 6_000  # of a data set, 80% of them to train on
    cnn: int = 160_000  # images that the training of a CNN sees
    gan: int = 64_000  # and of a GAN
    explained: int = 96  # test images of each data set, at most
    refine: int = 60  # steps of each inversion

    @property
    def size(self) -> int:
        return PRESETS[self.preset].size


@dataclass(frozen=True)
class Arm:
    """One data set, CNN and GAN under a folder of their own."""

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
        """The phantoms, whole or not at all."""
        if not self.data.exists():
            unfinished = self.folder / "phantoms.tmp"
            shutil.rmtree(unfinished, ignore_errors=True)
            lesions.write(unfinished, self.plan.phantoms, self.plan.size, self.seed, self.shortcut)
            unfinished.replace(self.data)

    def samples(self) -> dict[str, tuple[Sample, float]]:
        """Each phantom and its burden, by its name."""
        with open(self.data / "truth.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return {s.name: (s, float(r["burden"])) for r in rows for s in [Sample.from_row(r)]}

    def dataset(self) -> Dataset:
        return open_dataset(self.data / "images", self.plan.size)

    def load(self, run: Path) -> Model:
        """The model of a run's folder."""
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
            batch=32,  # what the phantoms' figures were made with, as is the next
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
    """Whether a run's folder holds something to resume; a complete run resumes to its end."""
    return (folder / "state.safetensors").exists()


# ---------------------------------------------------------------------------------------------
# What the CNN relies on


def reliance(arm: Arm, model: Model) -> list[Row]:
    """For every test image: its label, its logit, and by how much the logit falls, and whether the
    verdict flips, when its lesions or its marker are left out of the same picture."""
    data, samples = arm.dataset(), arm.samples()
    rows = data.rows("test")
    logits = arm.logits(model, data.images[rows])
    found = []
    with console.progress("reliance", len(rows)) as bar:
        for row, logit in zip(rows, logits):
            sample, _ = samples[Path(data.paths[row]).stem]
            own = {"raw/label": float(data.labels[row]), "raw/logit": float(logit)}
            shown = {"lesion": bool(sample.lesions), "marker": sample.marker}
            for sign in (sign for sign in SIGNS if shown[sign]):
                without = sample.render(lesions=sign != "lesion", marker=sign != "marker").image
                after = float(arm.logits(model, without[None])[0])
                own[f"reliance/{sign}/drop"] = float(logit) - after
                if logit > 0:
                    own[f"reliance/{sign}/flips"] = float(after <= 0)
            found.append(own)
            bar.advance()
    return found


def relied_on(rows: Sequence[Row]) -> str:
    """The sign whose removal lowers the logit most, over the images that carry it."""
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

    sign: what localisation is scored against; real: the CNN that judges, by default the model's
    own. Localisation is of images that carry the sign and that the CNN calls diseased: the map of
    one that it calls healthy shows where disease would come, and no mask is true of that.
    """
    data, samples = arm.dataset(), arm.samples()
    masks = mask_files(arm.data / MASKS[sign], sign, data)
    markers = mask_files(arm.data / "markers", "marker", data) if arm.shortcut is not None else {}
    judge = Judge(model, data, masks=masks, refine=arm.plan.refine)
    judge.thresholds = tuned_thresholds(judge)
    rows = np.random.default_rng(arm.seed).permutation(data.rows("test"))[: arm.plan.explained]
    known = [samples[Path(data.paths[row]).stem] for row in rows]
    found, explanations = [], []
    with console.progress("explain", len(rows)) as bar:
        for row, (sample, burden) in zip(rows, known):
            e = judge.explain(row)
            own = of_judge(judge, e, row, markers)
            own |= dose_figures(e, (real or model).classifier, burden, bool(sample.lesions))
            found.append(own | (twin_figures(e, sample) if sample.lesions and e.diseased else {}))
            explanations.append(e)
            bar.advance()
    reader = Reader.fit(data, samples)
    for own, more in zip(found, swapped(model, reader, explanations, known)):
        own |= more
    return found


def of_judge(judge: Judge, e: Explanation, row: int, markers: dict[str, Path]) -> Row:
    """What `evaluate` measures of any explanation, and the marker's share where there is one."""
    figures = judge.reconstruction(e) | judge.counterfactual(e, row) | path(e)
    figures |= judge.of_maps(e, row)
    own = {"/".join(key): value for key, value in figures.items()}
    place = judge.place(markers, row)
    if place is not None and e.diseased:
        own |= marker_share(judge.maps(e, row), place)
        latent = e.maps["latent_ig"].cpu()  # sums to the change of the logit
        own["marker/latent_ig/share"] = (
            latent[torch.from_numpy(place)].sum() / latent.sum()
        ).item()
    return own


def swapped(
    model: Model, reader: Reader, explanations: list[Explanation], known: list[tuple[Sample, float]]
) -> Iterator[Row]:
    """What is read from each image and from its lungs with the next one's disease, and the truth."""
    for own, other, mine, theirs in zip(
        explanations, explanations[1:] + explanations[:1], known, known[1:] + known[:1]
    ):
        with torch.no_grad():
            mixed = own.codes.best.draw(model.generator, other.codes.z2[:1]).clamp(-1, 1)
        row = reader.columns("real", own.image) | reader.columns("mixed", mixed)
        yield row | probe.truth("true", *mine) | probe.truth("other", *theirs)


def dose_figures(e: Explanation, real: nn.Module, burden: float, ill: bool) -> Row:
    """The response of the CNN that judges: Spearman along the path; whether the end of the other
    class than it gives the image is of that class; and what the relation of dose and burden needs.
    """
    with torch.no_grad():
        along, own = real(e.frames), real(e.image).item()
    end = along[0 if own > 0 else -1].item()
    row = {
        "real_cnn/path_spearman": metrics.spearman(e.doses.cpu().numpy(), along.cpu().numpy()),
        "real_cnn/validity": float((end > 0) != (own > 0)),
    }
    if ill:
        row |= {"raw/burden": burden, "raw/dose": e.numbers["found_dose"], "raw/own": own}
    return row


def twin_figures(e: Explanation, sample: Sample) -> Row:
    """PSNR and SSIM against the exact healthy twin: of the explanation's healthy end, of the path's
    difference laid over the image, and of the untouched image, the point of reference."""
    twin = to_tensor(sample.render(lesions=False).image[None], e.image.device)
    shown = {"healthy_end": e.frames[:1], "overlaid": e.overlaid[:1], "original": e.image}
    row = {f"twin/{name}/psnr": metrics.psnr(x, twin).item() for name, x in shown.items()}
    return row | {f"twin/{name}/ssim": metrics.ssim(x, twin).item() for name, x in shown.items()}


def marker_share(maps: dict[str, Tensor], place: np.ndarray) -> Row:
    """The share of each map's mass (absolute values) that lies on the marker, and on it or within
    R / 32 pixels of it; `chance` is the share of the image's area."""
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
    """Rows from their file, made and written first if there is none."""
    if not file.exists():
        write_text(file, json.dumps(make()))
    return json.loads(file.read_text())
