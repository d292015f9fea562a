"""Small things that several test files need: a data set, a model, a user's own classifier."""

import shutil

import numpy as np
import pytest
import torch

from cxr import film
from cxr.checkpoints import Model
from cxr.networks import PRESETS, Classifier, Discriminator, Encoder, Generator

OWN_CLASSIFIER = """
import torch


class Brightness(torch.nn.Module):
    def forward(self, x):
        return 20 * (x.mean((1, 2, 3)) + 0.1)


def bright():
    return Brightness()


def fails():
    raise ValueError("no such weights")


def wrong_shape():
    return torch.nn.Flatten()
"""


LONG = ("test_protocol.py", "test_cuda.py", "test_training.py", "test_train_gan.py")


def pytest_configure(config):
    """Of several processes each begins with a long file: xdist would keep those of few tests for
    the end, when one of them works alone."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Decoded images go where the tests' files go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXRGAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def compiled_operators():
    """A torchvision that was built for GPUs cannot load its detection operators beside a torch for
    CPUs, and cannot be imported without them; no classifier needs them."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name) and torch.version.cuda is None:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield
    del library


@pytest.fixture(scope="session")
def xrays(tmp_path_factory):
    """A folder of 60 healthy and 60 diseased pictures, the latter brighter; one file a patient."""
    folder, rng = tmp_path_factory.mktemp("xrays"), np.random.default_rng(0)
    for name, level in (("NORMAL", 90), ("SICK", 140)):
        (folder / name).mkdir()
        for number in range(60):
            picture = rng.normal(level, 30, (32, 32)).clip(0, 255).astype(np.uint8)
            film.write_png(folder / name / f"{name}{number}.png", picture)
    return folder


@pytest.fixture(scope="session")
def own_classifier(tmp_path_factory):
    """A Python file with the functions `bright`, `fails` and `wrong_shape`."""
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN_CLASSIFIER)
    return path


@pytest.fixture(scope="session")
def model():
    """All four networks of the tiny preset, untrained."""
    torch.manual_seed(0)
    preset = PRESETS["tiny"]
    networks = {
        "classifier": Classifier(preset.classifier),
        "encoder": Encoder(preset.encoder),
        "generator": Generator(preset.generator),
        "discriminator": Discriminator(preset.discriminator),
    }
    for network in networks.values():
        network.eval().requires_grad_(False)
    info = {
        "size": 32,
        "fit": "crop",
        "classes": ["NORMAL", "SICK"],
        "logits": [-3.0, 3.0],
        "provenance": {"data": "elsewhere"},
        "metrics": {"classifier": {"auroc": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}},
        "thresholds": {},
    }
    return Model(networks, info, {"mean_image": torch.zeros(1, 1, 32, 32)})


@pytest.fixture(scope="session")
def model_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model.save(path)
    return path


@pytest.fixture(scope="session")
def classifier_file(model, tmp_path_factory):
    """A model file as `train-cnn` leaves it: a classifier alone."""
    path = tmp_path_factory.mktemp("classifier") / "model.safetensors"
    Model({"classifier": model.classifier}, model.info, model.buffers).save(path)
    return path


@pytest.fixture(scope="session")
def visit():
    """A function that opens a page in a browser, and returns the browser once the page has begun."""
    webdriver = pytest.importorskip("selenium.webdriver")
    wait = pytest.importorskip("selenium.webdriver.support.wait")
    program, binary = shutil.which("chromedriver"), shutil.which("chromium")
    if not program or not binary:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(program))
    driver.implicitly_wait(5)  # for what a page makes a moment after a click

    def opened(path):
        driver.get(path.as_uri())
        wait.WebDriverWait(driver, 20).until(
            lambda d: d.find_element("tag name", "body").get_attribute("data-ready")
        )
        return driver

    yield opened
    driver.quit()
