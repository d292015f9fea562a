"""The GAN's training loop: lungs from `z1`, disease from `z2`, supervised by a frozen classifier.

After Dravid & Katsaggelos 2021 (arXiv 2111.00116), with the dose trained: `z2 = dose * u`, and the
dose is the classifier's own response. One step generates once, updates the discriminator on the
result, then generator and encoder on the same graph.
"""

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import (
    CxrError,
    UsageError,
    appearance,
    augment,
    classifier,
    console,
    datasets,
    film,
    graphs,
    losses,
    sampling,
)
from cxr.belief import LEAST_RISE
from cxr.checkpoints import Model, load_classifier, start_from
from cxr.classifier import predict, to_tensor
from cxr.cnn.fingerprint import fingerprint
from cxr.data import identity
from cxr.data.spreadsheet import Reading
from cxr.datasets import Dataset
from cxr.device import half_precision, prepare
from cxr.draws import Batch, Source
from cxr.graphs import Ahead, Recorded
from cxr.networks import PRESETS, Discriminator, Encoder, Generator
from cxr.train_cnn import provenance
from cxr.training import Run, World, loop, update_ema

FIT_EVERY = 128  # steps between fits of the random structures to those found
ADAPT_EVERY = 16  # steps of one probability of an augmentation, settled half as many before


@dataclass(frozen=True)
class Config(Reading):
    data: str
    classifier: str
    preset: str = "cxr64"
    target: str | None = None  # of the classifier's classes
    classifier_input: str | None = None
    start: str | None = None  # a model whose weights are the first
    batch: int | None = None  # as many as fit, see `fitting`
    images: int = 400_000  # that training sees
    tick: int = 8_192  # images between reports and saved states
    rate: float = 2e-3
    r1: float = 0.5  # weight of the gradient penalty
    r1_every: int = 16  # steps
    response: float = 0.1  # weight of the classifier's loss
    latent: float = 1.0  # weight of latent reconstruction and structure consistency
    image: float = 0.5  # weight of image reconstruction
    proximity: float = 0.1  # weight of the change that a dose makes
    ema: int = 10_000  # images over which half of the average is renewed
    overfit: float = 0.6  # aim of the discriminator's overfitting sign, for adaptive augmentation
    seed: int = 0
    device: str = "auto"


def train(config: Config, out: str, resume: bool = False) -> Model:
    """Train the GAN of a classifier; `out` receives the run folder with `model.safetensors`.

    Raises CxrError where the classifier does not fit or training fails; `Interrupted` at Ctrl-C.
    """
    device = prepare(config.device)
    world = World(device)
    if config.batch is None:
        batch = world.size * fitting(PRESETS[config.preset].size, device)
        config = dataclasses.replace(config, batch=batch)
    if config.batch % (16 * world.size):
        raise UsageError(f"--batch {config.batch}: a multiple of {16 * world.size} is needed here")
    asked = config.classifier, PRESETS[config.preset].size, device
    model = load_classifier(*asked, config.target, config.classifier_input)
    model.info["fingerprint"] = fingerprint(model.classifier, asked[1], device)
    data = open_data(config, model)
    if "mean_image" not in model.buffers:  # a user's own classifier comes without
        mean = classifier.mean_image(data)
        model.buffers["mean_image"] = mean.to(device)
        model.info["thresholds"]["likeness"] = classifier.likeness_threshold(data, mean)
    with Run(out, config, data, resume, world) as run:
        real, limits = appearance.reference(data)
        model.info["thresholds"] |= limits
        model.buffers |= {name: value.to(device) for name, value in real.items()}
        trainer = Trainer(config, data, model, device, world, run)
        if resume:
            trainer.restore()
        loop(trainer, run, "train-gan")
    world.close()
    return trainer.model


def fitting(size: int, device: torch.device) -> int:
    """The images in a batch by default: 16 on a CPU; on a GPU 64, or fewer where its memory is small.
    A step needs 6,000 bytes for each pixel (measured on a CPU in fp32); two kinds are recorded."""
    if device.type != "cuda":
        return 16
    memory = 0.8 * torch.cuda.get_device_properties(device).total_memory
    return next((n for n in (64, 32) if n * size**2 * 2 * 6_000 <= memory), 16)


def open_data(config: Config, model: Model) -> Dataset:
    """The data set, prepared as the classifier's was."""
    size = model.info.setdefault("size", PRESETS[config.preset].size)
    if size != PRESETS[config.preset].size:
        raise UsageError(f"the classifier sees {size} pixels: choose the preset of that size")
    prepared = size, model.info.setdefault("fit", "crop"), model.info.get("fold", 0)
    left = datasets.left_out(model.info, config.data)
    asked = left | config.asked(model.info if "classes" in model.info else None)
    data = datasets.open_dataset(config.data, *prepared, **asked)
    classes = model.info.setdefault("classes", list(data.classes))
    if classes != list(data.classes):
        told, held = (" and ".join(names) for names in (classes, data.classes))
        raise UsageError(f"the classifier tells {told} apart, the data hold {held}")
    if identity.trained_on(model.info, data) == "resplit":
        console.warn(
            f"{data.name} was split otherwise when the classifier was trained: patients held out "
            "then may be trained on now; give both the same --patient-column, --patient-pattern "
            f"and --leave-out{_reading(model.info)}"
        )
    return data


def _reading(info: dict) -> str:
    """How the classifier's patients were told and split, in words; nothing if nothing was said."""
    options = info["provenance"].get("classifier")
    names = ("patient_column", "patient_pattern", "leave_out")
    given = {n: options[n] for n in names if isinstance(options, dict) and options.get(n)}
    told = (f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    return f" (then: {' '.join(told)})" if given else ""


@dataclass
class Fakes:
    images: Tensor  # [n, 1, R, R]
    w1: Tensor  # [n/2, layers, w]
    z2: Tensor  # [n, z2]
    doses: Tensor  # [n], the lengths of `z2`
    originals: Tensor  # [n/2, 1, R, R], healthy and diseased in turn
    original_logits: Tensor  # [n/2], the classifier's on them, within the range that doses name
    reconstructions: Tensor  # [n/2, 1, R, R], of the originals
    encoded_doses: Tensor  # [n/2], the doses that the encoder finds in the originals


class Trainer:
    """The networks, their optimisers and one step of training."""

    def __init__(self, config: Config, data: Dataset, model: Model, device, world: World, run: Run):
        self.config, self.data, self.device = config, data, device
        self.world, self.run = world, run
        self.model = model  # its classifier, and the logits between which the dose runs
        self.classifier = model.classifier
        self.doses, self.logits = self.read_classifier()
        torch.manual_seed(config.seed)
        preset = PRESETS[config.preset]
        self.G = Generator(preset.generator).to(device)
        self.E = Encoder(preset.encoder).to(device)
        self.D = Discriminator(preset.discriminator).to(device)
        self.classes = data.by_class("train")
        if config.start:
            networks = {"generator": self.G, "encoder": self.E, "discriminator": self.D}
            start_from(config.start, networks)
        self.G_ema, self.E_ema = (
            copy.deepcopy(n).eval().requires_grad_(False) for n in (self.G, self.E)
        )
        self.both = [*self.G.parameters(), *self.E.parameters()]
        on_gpu = dict.fromkeys(("fused", "capturable"), True) if device.type == "cuda" else {}
        Adam, AdamW = (partial(o, **on_gpu) for o in (torch.optim.Adam, torch.optim.AdamW))
        self.opt_G = Adam(self.G.parameters(), config.rate, betas=(0.0, 0.99))
        self.opt_E = AdamW(self.E.parameters(), config.rate / 4, betas=(0.9, 0.99))
        self.opt_D = Adam(self.D.parameters(), config.rate, betas=(0.0, 0.99))
        self.precision = half_precision(device)
        self.adaptive = augment.Adaptive(config.overfit, config.batch / 200_000).to(device)
        known = data, self.doses, self.logits, self.G, config.batch, config.seed, world.share
        self.draws = Ahead(Source(*known).draw, device.type == "cuda")
        self.recorded = Recorded(self.work, device, graphs.wanted(device, world.size))
        self.progress = {"images": 0, "p": 0.0, "next_p": 0.0, "logits": model.info["logits"]}
        model.networks |= {"generator": self.G_ema, "encoder": self.E_ema, "discriminator": self.D}
        validation = [rows[:64] for rows in data.by_class("val")]
        self.validation = interleave(*map(torch.from_numpy, trim(*validation))).numpy()

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "G": self.G, "E": self.E, "D": self.D, "G_ema": self.G_ema, "E_ema": self.E_ema,
            "opt_G": self.opt_G, "opt_E": self.opt_E, "opt_D": self.opt_D, "adaptive": self.adaptive,
        }  # fmt: skip

    def restore(self) -> None:
        """Go on from the saved state, if the classifier is still the same."""
        begun = self.progress
        self.progress = self.run.restore(self.parts(), begun)
        if not np.allclose(begun["logits"], self.progress["logits"], atol=0.01):
            raise UsageError("this run was begun with another classifier")

    @property
    def step_number(self) -> int:
        return self.progress["images"] // self.config.batch

    def read_classifier(self) -> tuple[np.ndarray, np.ndarray]:
        """The dose of every image [N]: 0 for a healthy one, else the classifier's response, which
        also settles between which logits the dose runs; and its logits [N], within that range."""
        logits = predict(self.classifier, self.data.images, self.device)
        healthy, diseased = (logits[rows] for rows in self.data.by_class("train"))
        low, high = float(np.median(healthy)), float(np.quantile(diseased, 0.98))
        if high - low < LEAST_RISE:
            raise CxrError(
                f"the classifier hardly tells the classes apart (median healthy logit {low:.2f}, "
                f"diseased 98th percentile {high:.2f}): train a better one, say on more --images"
            )
        self.model.info["logits"] = [low, high]
        doses = self.model.dose(torch.from_numpy(logits)).numpy()
        doses = np.where(self.data.labels == 1, doses, 0.0).astype(np.float32)
        return doses, logits.clip(low, high)

    @torch.no_grad()
    def fit_structures(self, G: Generator, E: Encoder) -> None:
        """Have the generator draw its random structures from the Gaussian of those that the encoder
        finds in 1,024 training images, as many of each class."""
        rows = datasets.balanced_batch(self.classes, 1024, self.config.seed, 0)
        x = to_tensor(self.data.images[rows], self.device)
        with self.precision:
            w1 = torch.cat([E(part)[0] for part in x.split(64)])
        G.structure.fit(w1)

    def step(self) -> dict[str, Tensor]:
        """One step of all three networks; returns its terms for the log."""
        config, step = self.config, self.step_number
        if step % FIT_EVERY == 0:
            self.fit_structures(self.G, self.E)
        if step % ADAPT_EVERY == 0:
            self.progress["p"] = self.progress["next_p"]
        if step % ADAPT_EVERY == ADAPT_EVERY // 2:
            self.progress["next_p"] = self.adaptive.p.item()
        known = ("p", "next_p")  # of this turn's steps, and of the next one's
        batch = self.draws(
            *(
                (s, self.progress[known[s // ADAPT_EVERY - step // ADAPT_EVERY]])
                for s in range(step, step + graphs.THREADS + 1)
            )
        )
        terms = self.recorded(batch, step % config.r1_every == 0)
        self.progress["images"] += config.batch
        horizon = min(config.ema, self.progress["images"] / 10)
        decay = 0.5 ** (config.batch / horizon)
        update_ema(self.G_ema, self.G, decay)
        update_ema(self.E_ema, self.E, decay)
        return terms

    def work(self, batch: Batch, penalised: bool) -> dict[str, Tensor]:
        """What a step computes and what a GPU records: it reads no value back. penalised: with
        R1."""
        with self.precision:
            fakes = self.generate(batch)
        return self.update_discriminator(batch, fakes, penalised) | self.update_generator(
            batch, fakes
        )

    def generate(self, batch: Batch) -> Fakes:
        """Pairs of fakes, and reconstructions of half of the reals, in one pass.

        Found lungs get the disease found with them, so that reconstructions, too, have to look
        real (a pixel loss alone would have them blurred); the healthy ones get another.
        """
        originals, original_logits = (
            interleave(*(half[::2] for half in t.chunk(2)))
            for t in (batch.reals, batch.real_logits)
        )
        w1_found, z2_found = self.E(originals)
        w1_kept, z2_kept = (
            t.unflatten(0, (-1, 2))[::2].flatten(0, 1) for t in (w1_found, z2_found)
        )  # [n/4], healthy and diseased in turn
        w1, (z2_drawn, z2_other) = torch.cat([self.G.M1(batch.z1), w1_kept]), batch.z2.chunk(2)
        healthy = torch.arange(len(z2_kept), device=z2_kept.device)[:, None] % 2 == 0
        z2_other = torch.where(healthy, z2_other, z2_kept)
        z2 = torch.cat([torch.zeros_like(batch.z2), z2_drawn, z2_other])
        noise = [torch.cat([a, a, b]) for a, b in zip(batch.noise, batch.noise_real)]
        x = self.G(torch.cat([w1, w1, w1_found]), torch.cat([z2, z2_found]), noise)
        n = len(z2)
        return Fakes(
            images=x[:n],
            w1=w1,
            z2=z2,
            doses=z2.detach().norm(dim=1),
            originals=originals,
            original_logits=original_logits,
            reconstructions=x[n:],
            encoded_doses=z2_found.norm(dim=1),
        )

    def update_discriminator(
        self, batch: Batch, fakes: Fakes, penalised: bool
    ) -> dict[str, Tensor]:
        """Non-saturating loss, if penalised with R1 on the reals, in fp32."""
        self.D.requires_grad_(True)
        reals = augment.apply(batch.reals, batch.augment_reals)
        shown = augment.apply(fakes.images.detach(), batch.augment_fakes)
        with self.precision:
            real = self.D(reals, batch.real_doses)
            fake = self.D(shown, fakes.doses)
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        terms = {"D": loss.detach(), "sign": real.detach().sign().mean()}
        if penalised:
            penalty = losses.r1(self.D, reals, batch.real_doses)
            loss = loss + penalty * self.config.r1 / 2 * self.config.r1_every
            terms["r1"] = penalty.detach()
        self.opt_D.zero_grad()
        loss.backward()
        self.world.average(self.D.parameters())
        self.opt_D.step()
        self.adaptive.see(self.world.mean(terms["sign"].clone()))
        return terms

    def update_generator(self, batch: Batch, fakes: Fakes) -> dict[str, Tensor]:
        """Fool the discriminator, answer to the classifier, be read by the encoder, and change no
        more than a dose needs."""
        self.D.requires_grad_(False)
        shown = augment.apply(fakes.images, batch.augment_fakes)
        nudged = augment.apply(fakes.images, batch.augment_response)
        with self.precision:
            score = self.D(shown, fakes.doses)
            w1_read, z2_read = self.E(fakes.images)
            logits = self.classifier(torch.cat([nudged, fakes.reconstructions]))
        target = self.model.logit(fakes.doses), fakes.original_logits
        terms = {
            "G": F.softplus(-score).mean(),
            "response": F.smooth_l1_loss(logits, torch.cat(target)) * self.config.response,
            "latent": losses.latent(w1_read, z2_read, fakes.w1, fakes.z2) * self.config.latent,
            "image": losses.image(fakes.reconstructions, fakes.originals).mean()
            * self.config.image,
            "proximity": losses.proximity(fakes.images) * self.config.proximity,
            "dose": (fakes.encoded_doses - self.model.dose(target[1])).square().mean(),
        }
        self.opt_G.zero_grad()
        self.opt_E.zero_grad()
        sum(terms.values()).backward()
        self.world.average(self.both)
        self.opt_G.step()
        self.opt_E.step()
        return {name: value.detach() for name, value in terms.items()}

    def done(self) -> str:
        return ""

    def report(self) -> dict[str, float]:
        """Measure the averaged networks, write a sample sheet and the model so far."""
        self.fit_structures(self.G_ema, self.E_ema)
        x = to_tensor(self.data.images[self.validation], self.device)
        labels = torch.from_numpy(self.data.labels[self.validation]).to(self.device)
        row = sampling.measure_fakes(self.model) | sampling.measure_inversions(
            self.model, x, labels
        )
        seen = self.progress["images"]
        if not row["spread"] >= 0.1 * x.std(0).mean().item():  # nor is it if it is no number
            raise CxrError(
                f"the generator collapsed before {seen} images: its fakes are all alike; the last "
                f"good state is kept in {self.run.folder}; begin again with another --seed and --out"
            )
        if self.world.first:
            sheet = sampling.sheet(self.model, x[:8])
            (self.run.folder / "samples").mkdir(exist_ok=True)
            film.write_png(self.run.folder / "samples" / f"{seen:08d}.png", sheet)
            self.model.info["provenance"]["gan"] = {
                **provenance(self.config, self.data),
                "classifier": self.model.path.name,
                "seen": seen,
            }
            self.model.info["metrics"]["gan"] = row
            self.model.info["thresholds"]["ssim"] = row["ssim_low"]
            self.model.save(self.run.model)
        return row | {"p": self.progress["p"]}

    def summary(self, row: dict) -> str:
        return (
            f"called right {row['healthy_at_zero']:.2f}/{row['diseased_at_full']:.2f}  "
            f"logit gap {row['logit_gap']:.2f}  SSIM {row['ssim']:.2f}"
        )


def interleave(a: Tensor, b: Tensor) -> Tensor:
    """a0, b0, a1, b1, ..."""
    return torch.stack([a, b], 1).flatten(0, 1)


def trim(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both cut to the shorter one's length."""
    n = min(len(a), len(b))
    return a[:n], b[:n]
