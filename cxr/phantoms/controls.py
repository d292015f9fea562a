"""The controls of the phantom protocol: what the measures say when there is nothing to explain.

`no_cnn`: a GAN that is trained without the classifier's losses. Its doses come from the labels
alone: 0 for a healthy image, random for a diseased one, because a label does not say how diseased
an image is. The CNN of the lesion arm is explained with this GAN. A map that finds lesions as well
here owes this to the data, not to the CNN. The relation of dose and response should become weaker.

`untrained`, `shuffled`: the whole pipeline for a CNN that knows nothing about lesions, because it
keeps its first weights or was trained on shuffled labels. Its logits hardly tell the classes apart.
Therefore they are scaled to the spread of the real CNN's logits, and the GAN is trained with the
verdicts of this CNN as labels. To the GAN, this CNN is as good as any. A true explanation of it
does not point at lesions, so a map that still does so does not ask the CNN. `real_cnn` has the
responses of the lesion arm's CNN to these paths; it should see nothing in them.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from cxr import train_gan
from cxr.checkpoints import Model, load_classifier
from cxr.datasets import Dataset
from cxr.device import prepare
from cxr.files import replacing
from cxr.networks import PRESETS, Classifier
from cxr.phantoms.arm import Arm, Row, begun, explained, kept
from cxr.training import Run, World, loop


def run(arm: Arm) -> Iterator[tuple[str, list[Row]]]:
    """The name and the rows of each control, on an arm's phantoms."""
    for name, make in (("no_cnn", no_cnn), ("untrained", ignorant), ("shuffled", ignorant)):
        folder = arm.folder.parent / name.replace("_", "-")
        folder.mkdir(parents=True, exist_ok=True)

        def rows(make=make, folder=folder) -> list[Row]:
            real = arm.load(arm.cnn)
            return explained(arm, make(arm, folder), "lesion", real)

        yield name, kept(folder / "explained.json", rows)


# ---------------------------------------------------------------------------------------------
# No CNN


class LabelTrainer(train_gan.Trainer):
    """A trainer of GANs that does not use the classifier's answers."""

    def read_classifier(self) -> tuple[np.ndarray, np.ndarray]:
        """Doses from the labels alone, random for diseased images. The logit of a healthy image is
        that of dose 0; the logit of a diseased image is that of dose 0.5, the mean dose."""
        super().read_classifier()  # sets the logits of dose 0 and 1, which the explanation needs
        diseased = self.data.labels == 1
        drawn = np.random.default_rng(self.config.seed).uniform(0, 1, len(self.data))
        doses = np.where(diseased, drawn, 0.0).astype(np.float32)
        means = torch.from_numpy(np.where(diseased, 0.5, 0.0).astype(np.float32))
        return doses, self.model.logit(means).numpy()


def no_cnn(arm: Arm, folder: Path) -> Model:
    config = arm.gan_config(response=0.0)
    device, out = prepare(config.device), folder / "gan"
    world, resume = World(device), begun(out)
    model = load_classifier(config.classifier, arm.plan.size, device)
    data = train_gan.open_data(config, model)
    with Run(out, config, data, resume, world) as run:
        trainer = LabelTrainer(config, data, model, device, world, run)
        if resume:
            trainer.restore()
        loop(trainer, run, "train-gan")
    return arm.load(out)


# ---------------------------------------------------------------------------------------------
# CNNs that know nothing


def ignorant(arm: Arm, folder: Path) -> Model:
    """The GAN of an untrained CNN or of a CNN trained on shuffled labels, as the folder's name
    says."""
    cnn, data = folder / "standardised", arm.dataset()
    if not (cnn / "model.safetensors").exists():
        if folder.name == "untrained":
            model = untrained(arm)
        else:
            labels = np.random.default_rng(arm.seed).permutation(data.labels)
            model = arm.train_cnn(relabelled(data, labels, folder / "shuffled.csv"), folder / "cnn")
        cnn.mkdir(parents=True, exist_ok=True)
        standardise(model, *(arm.logits(m, data.images) for m in (model, arm.load(arm.cnn))))
        model.save(cnn / "model.safetensors")
    model = arm.load(cnn)
    verdicts = arm.logits(model, data.images) > 0
    labels = relabelled(data, verdicts.astype(int), folder / "verdicts.csv")
    out = folder / "gan"
    config = arm.gan_config(labels, cnn)
    train_gan.train(config, str(out), resume=begun(out))
    return arm.load(out)


def untrained(arm: Arm) -> Model:
    """The CNN of an arm with the initial weights of another seed."""
    model = arm.load(arm.cnn)
    torch.manual_seed(arm.seed + 1)
    network = Classifier(PRESETS[arm.plan.preset].classifier).eval().requires_grad_(False)
    return Model({"classifier": network}, model.info, model.buffers)


def standardise(model: Model, logits: np.ndarray, wanted: np.ndarray) -> None:
    """Shift and scale a classifier's logit to median 0 and to the spread of the wanted logits.

    logits, wanted: [N], the classifier's own logits and those of the real CNN.
    """
    network = model.classifier
    factor = wanted.std() / max(logits.std(), 1e-9) / network.temperature.item()
    network.head.bias.sub_(float(np.median(logits)) * network.temperature)
    network.head.weight.mul_(factor)
    network.head.bias.mul_(factor)
    network.temperature.fill_(1.0)


def relabelled(data: Dataset, labels: np.ndarray, file: Path) -> Path:
    """A CSV of the same images in the same splits, with other labels."""
    if not file.exists():
        with replacing(file) as temporary, open(temporary, "w", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(("path", "label", "patient"))
            for path, label, patient in zip(data.paths, labels, data.patients):
                table.writerow((Path(path).resolve(), data.classes[label], patient))
    return file
