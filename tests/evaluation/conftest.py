"""What the tests of several rooms of the evaluation need: classifiers, masks, a judge."""

import functools

import numpy as np
import pytest
import torch

from cxr import datasets, film, lungs, metrics
from cxr.checkpoints import Model
from cxr.data import places
from cxr.evaluation import cases, heatmaps, realism
from cxr.networks import Classifier, ClassifierConfig


def in_the_middle(x):
    """Lungs in every image [N, 1, R, R], where the pictures of the tests have none."""
    marked = torch.zeros_like(x, dtype=torch.bool)
    marked[..., 8:20, 6:26] = True
    return marked


@pytest.fixture(scope="module")
def quick():
    """Few of what is many only for precision's sake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(realism, "DRAWN", realism.CHUNK)
        patch.setattr(realism, "HALVINGS", 10)
        patch.setattr(heatmaps, "STAGES", 2)
        patch.setattr(lungs, "find", in_the_middle)
        patch.setattr(metrics, "bootstrap", functools.partial(metrics.bootstrap, samples=40))
        yield


@pytest.fixture(scope="session")
def saved():
    """A function that writes a model file with the classifier of a model alone, and other facts."""

    def save(model, path, **info):
        classifier = {"classifier": model.classifier}
        buffers = {} if "size" in info else model.buffers  # the mean image has the model's size
        Model(classifier, {**model.info, **info}, buffers).save(path)
        return path

    return save


@pytest.fixture(scope="session")
def oracle(model, tmp_path_factory):
    """Another classifier than the model's, in a file."""
    torch.manual_seed(1)
    network = Classifier(ClassifierConfig((16, 24), 1)).eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("oracle") / "model.safetensors"
    Model({"classifier": network}, model.info, model.buffers).save(path)
    return str(path)


SEVERAL = """
import torch


class Several(torch.nn.Module):
    pathologies = ["Effusion", "", "sick", "Mass"]

    def forward(self, x):
        mean, left = x.mean((1, 2, 3)), x[..., : x.shape[-1] // 2].mean((1, 2, 3))
        return torch.stack([mean, mean - 1, mean - 2, left - mean], 1)


def several():
    return Several()
"""


@pytest.fixture(scope="session")
def several(tmp_path_factory):
    """A CNN of several findings, by its file and function; one has no name, one is explained."""
    file = tmp_path_factory.mktemp("findings") / "own.py"
    file.write_text(SEVERAL)
    return f"{file}:several"


class Brightness(torch.nn.Module):
    """A classifier that asks how bright the image is."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1, bias=False)
        torch.nn.init.constant_(self.conv.weight, 1 / 9)

    def forward(self, x):
        return 40 * self.conv(x).mean((1, 2, 3))


@pytest.fixture(scope="session")
def bright(model):
    """The untrained tiny model, with a classifier that finds both classes in `xrays`."""
    networks = {**model.networks, "classifier": Brightness().requires_grad_(False)}
    return Model(networks, dict(model.info), model.buffers, "bright")


@pytest.fixture(scope="session")
def masks(xrays, tmp_path_factory):
    """A mask for every diseased image: the place of its disease, and its lungs."""
    folders = tmp_path_factory.mktemp("masks"), tmp_path_factory.mktemp("lungs")
    for folder, rows in zip(folders, (slice(8, 16), slice(8, 20))):
        mask = np.zeros((32, 32), np.uint8)
        mask[rows, rows] = 255
        for path in (xrays / "SICK").iterdir():
            film.write_png(folder / path.name, mask)
    return folders


@pytest.fixture(scope="module")
def judged(bright, xrays, masks):
    """A judge with masks, a diseased row and its explanation."""
    data = datasets.open_dataset(xrays, 32)
    files = [places.mask_files(folder, "--masks", data) for folder in masks]
    own = cases.Judge(bright, data, None, *files, refine=1)
    row = int(data.rows("test")[-1])
    return own, row, own.explain([row])[0]
