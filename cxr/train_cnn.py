"""The classifier's training loop: healthy or diseased, from a data set to a calibrated logit."""

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import UsageError, augment, datasets, metrics
from cxr.checkpoints import Model, start_from
from cxr.classifier import (
    PERTURBATIONS,
    classifier_metrics,
    likeness_threshold,
    mean_auroc,
    mean_image,
    metrics_by_class,
    predict,
    to_tensor,
)
from cxr.data import identity, places
from cxr.data.spreadsheet import Reading
from cxr.datasets import Dataset
from cxr.device import half_precision, prepare, rng
from cxr.networks import PRESETS, Classifier
from cxr.training import Run, World, loop, update_ema

PLACES = 32  # pixels of the masks by which the classifier learns where the disease is


@dataclass(frozen=True)
class Config(Reading):
    data: str
    preset: str = "cxr64"
    size: int | None = None  # pixels; the preset's
    fit: str = "crop"
    fold: int = 0  # of ten, for cross-validation
    start: str | None = None  # a model whose weights are the first
    masks: str | None = None  # where the disease is: a folder,
    boxes: str | None = None  # or a table
    batch: int = 64
    images: int = 200_000  # that training sees
    tick: int = 8_192  # images between validations
    patience: int = 8  # ticks without a better validation
    rate: float = 2e-3
    decay: float = 0.05  # of the weights
    smoothing: float = 0.05  # of the labels
    ema: int = 8_000  # images over which half of the average is renewed
    seed: int = 0
    device: str = "auto"

    @property
    def pixels(self) -> int:
        return self.size or PRESETS[self.preset].size


def train(config: Config, out: str, resume: bool = False) -> Model:
    """Train a classifier; `out` receives the run folder with `model.safetensors`.

    Returns the model, its metrics on the test split in `info["metrics"]`. Raises CxrError where
    a class is missing from a split or the masks or boxes are malformed, `Interrupted` after Ctrl-C.
    """
    device = prepare(config.device)
    world = World(device)
    if config.batch % world.size:
        raise UsageError(f"--batch {config.batch} cannot be shared by {world.size} processes")
    asked = config.data, config.pixels, config.fit, config.fold
    data = datasets.open_dataset(*asked, **config.asked())
    for split in datasets.SPLITS:  # a class that is missing is told before hours of training
        data.by_class(split)
    found = places.find_places(config.masks, config.boxes, data)
    marks = places.marked(found, data, PLACES, config.fit) if found else None
    with Run(out, config, data, resume, world, marks) as run:
        trainer = Trainer(config, data, device, world, marks)
        if resume:
            trainer.progress = run.restore(trainer.parts(), trainer.progress)
        loop(trainer, run, "train-cnn")
        trainer.ema.load_state_dict(trainer.best.state_dict())
        model = finish(trainer.ema, data, config, trainer.progress)
        if world.first:
            model.save(run.model)
        run.show("train-cnn", metrics_by_class(model.info))
    world.close()
    return model


class Locator(nn.Module):
    """Says where the disease is, from what the classifier's last stage but one sees. It is for
    training alone: a classifier that has learnt this, too, does better on other hospitals' images
    (docs/ablations.md)."""

    def __init__(self, network: Classifier):
        super().__init__()
        self.head = nn.Conv2d(network.config.channels[-2], 1, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        network.trunk[-2 - network.config.blocks].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.seen = output

    def loss(self, masks: Tensor, known: Tensor) -> Tensor:
        """How far its answer to the images just classified is from their masks [N, 1, S, S], of those
        whose place is known [N]: the mean binary cross-entropy over the cells of its grid, healthy
        images among them."""
        where = self.head(F.relu(self.seen)).float()
        shares = F.adaptive_avg_pool2d(masks, where.shape[2:])
        losses = F.binary_cross_entropy_with_logits(where, shares, reduction="none")
        return (losses.mean((1, 2, 3)) * known).sum() / known.sum().clamp_min(1)


class Trainer:
    """The networks, the optimiser and one step of training. marks: how much of each pixel
    of all images is marked, uint8 [N, S, S], and of which the place is known, as of
    `places.marked`."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        device: torch.device,
        world: World,
        marks: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        self.config, self.data, self.device, self.world = config, data, device, world
        torch.manual_seed(config.seed)
        outputs = len(data.classes) if len(data.classes) > 2 else 1
        network = dataclasses.replace(PRESETS[config.preset].classifier, outputs=outputs)
        self.network = Classifier(network).to(device)
        if config.start:
            start_from(config.start, {"classifier": self.network})
            self.network.temperature.fill_(1.0)
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.best = copy.deepcopy(self.ema)
        self.marks, self.locator = marks, None
        if marks:
            self.locator = Locator(self.network).to(device)
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        plain = [p for p in self.network.parameters() if p.ndim <= 1]
        plain += [] if self.locator is None else self.locator.parameters()
        self.trained = decayed + plain
        groups = [{"params": decayed, "weight_decay": config.decay}, {"params": plain}]
        self.optimiser = torch.optim.AdamW(groups, lr=config.rate, weight_decay=0.0)
        self.precision = half_precision(device)
        self.classes = data.by_class("train")
        self.progress = {"images": 0, "best": -1.0, "best_images": 0}

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        parts = {"network": self.network, "ema": self.ema, "best": self.best}
        located = {} if self.locator is None else {"locator": self.locator}
        return parts | located | {"optimiser": self.optimiser}

    def done(self) -> str:
        """Early stopping: after `patience` ticks without a better validation, which is the reason."""
        stale = self.progress["images"] - self.progress["best_images"]
        over = stale >= self.config.patience * self.config.tick
        return f"no better AUROC on validation for the last {stale:,}" if over else ""

    def report(self) -> dict[str, float]:
        """AUROC on validation, of several classes their mean, clean and the mean over the
        perturbations; the latter decides which weights are kept, since the former saturates."""
        images, labels = self.data.pictures("val"), self.data.labels[self.data.rows("val")]
        aurocs = {
            change: mean_auroc(predict(self.ema, images, self.device, change), labels)
            for change in PERTURBATIONS
        }
        robust = float(np.mean(list(aurocs.values())))
        if robust >= self.progress["best"]:  # of equals the later ones
            self.best.load_state_dict(self.ema.state_dict())
        if robust > self.progress["best"]:
            self.progress |= {"best": robust, "best_images": self.progress["images"]}
        return {"auroc": aurocs["clean"], "auroc_robust": robust}

    def summary(self, row: dict) -> str:
        return f"loss {row['loss']:.3f}  val AUROC {row['auroc']:.4f}"

    def step(self) -> dict[str, Tensor]:
        """One optimiser step on one balanced, augmented batch."""
        config, seen = self.config, self.progress["images"]
        step = seen // config.batch
        rows = datasets.balanced_batch(self.classes, config.batch, config.seed, step)
        changes = augment.draw(config.batch, 0.7, rng(config.seed, step), augment.CLASSIFIER)
        rows = self.world.share(torch.from_numpy(rows)).numpy()
        changes = {name: self.world.share(values) for name, values in changes.items()}
        x = augment.apply(to_tensor(self.data.images[rows], self.device), changes)
        y = torch.from_numpy(self.data.labels[rows]).to(self.device)
        torch.manual_seed(config.seed + step * self.world.size + self.world.rank)  # of dropout
        with self.precision:
            logits = self.network(x)
        terms = {"loss": cross_entropy(logits, y, config.smoothing)} | self.where(rows, changes)
        self.optimiser.zero_grad()
        sum(terms.values()).backward()
        self.world.average(self.trained)
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate * schedule(seen / config.images)
        self.optimiser.step()
        self.progress["images"] = seen + config.batch
        horizon = min(config.ema, self.progress["images"] / 4)  # short at first
        update_ema(self.ema, self.network, 0.5 ** (config.batch / horizon))
        return {name: term.detach() for name, term in terms.items()}

    def where(self, rows: np.ndarray, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        """The locator's loss on the images of these rows, moved as they were; none without one."""
        if self.locator is None:
            return {}
        masks, known = (torch.from_numpy(t[rows]).float().to(self.device) for t in self.marks)
        masks = masks[:, None] / 255
        names = ("rotate", "scale", "aspect", "shift_x", "shift_y")
        moves = (changes[name].to(self.device) for name in names)
        return {"where": self.locator.loss(augment.move(masks, *moves), known)}


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Of two classes' logits [N] or several classes' [N, K], with smoothed labels."""
    if logits.ndim == 2:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    targets = labels.float() * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, targets)


def schedule(done: float) -> float:
    """Learning rate at the share `done` of training: a short warm-up, then a cosine."""
    return min(1.0, done / 0.03 + 1e-3) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def finish(network: Classifier, data: Dataset, config: Config, progress: dict) -> Model:
    """Calibrate on validation, measure on test, and put together the model."""
    device = network.temperature.device
    rows = data.rows("val")
    logits = predict(network, data.pictures("val"), device)
    network.temperature.fill_(metrics.fit_temperature(logits, data.labels[rows]))
    mean = mean_image(data)
    seen = {**provenance(config, data), "seen": progress["images"]}
    info = {
        "size": config.pixels,
        "fit": config.fit,
        "classes": list(data.classes),
        "split": data.rule,
        "fold": config.fold,
        "provenance": {
            "data": data.name,
            "counts": data.counts(),
            "digests": identity.of_data(data),
            "classifier": seen,
        },
        "metrics": {"classifier": classifier_metrics(network, data, "test", device)},
        "thresholds": {"likeness": likeness_threshold(data, mean)},
    }
    if config.leave_out:
        info["leave_out"] = config.leave_out
    return Model({"classifier": network}, info, {"mean_image": mean})


def provenance(config, data: Dataset) -> dict:
    """A training's options for its model file, which travels: names instead of paths."""
    options = dataclasses.asdict(config)
    paths = [name for name in ("start", "masks", "boxes") if options.get(name)]
    names = {name: Path(options[name]).name for name in paths}
    return {**options, "data": data.name, **names}
