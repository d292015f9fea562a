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


def test_every_recipe_names_a_package():
    assert set(RECIPES) == set(PACKAGES)


@pytest.mark.usefixtures("compiled_operators")
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
