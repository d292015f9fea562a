"""The recipes of docs/own-cnn.md, as they stand there, with the real packages."""

import re
from pathlib import Path

import pytest
import torch

from cxr import checkpoints

TEXT = (Path(__file__).parents[2] / "docs" / "own-cnn.md").read_text()
RECIPES = dict(re.findall(r"### (\w+)\n\n```python\n(.*?)```", TEXT, re.DOTALL))
PACKAGES = {"torchvision": "torchvision", "timm": "timm", "MONAI": "monai"}
PACKAGES["TorchXRayVision"] = "torchxrayvision"


@pytest.fixture(scope="module", autouse=True)
def compiled_operators():
    """A torchvision that was built for GPUs cannot load its detection operators beside a torch for
    CPUs, and cannot be imported without them; no classifier needs them."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name) and torch.version.cuda is None:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield
    del library


def test_every_recipe_names_a_package():
    assert set(RECIPES) == set(PACKAGES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_to_the_contract(name, tmp_path):
    pytest.importorskip(PACKAGES[name], exc_type=ImportError)
    torch.manual_seed(0)
    path = tmp_path / "own.py"
    path.write_text(RECIPES[name])
    network = checkpoints.load_classifier(f"{path}:net", 32).classifier
    x = torch.rand(1, 1, 32, 32, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x).sum(), x)
    assert slope.any() and slope.isfinite().all()
