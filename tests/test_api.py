"""cxrgan from Python."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import cxrgan
from cxr import CxrError, UsageError, api, images

QUICK = {"frames": 2, "restarts": 1, "refine": 0}


class Bright(torch.nn.Module):
    """Several classes from colour pictures of any size: which is brightest on the right?"""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([-3.0, 4.0, 0.0]))

    def forward(self, x):
        assert not self.training and x.shape[1:] == (3, 48, 48)
        return x[..., 24:].mean((1, 2, 3))[:, None] * self.scale


def explain(image, model_file, **options):
    return cxrgan.explain(image, str(model_file), **QUICK, **options)


@pytest.fixture(scope="module")
def grey():
    return np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)


FORMS = {
    "uint8": lambda g: g,
    "colour": lambda g: np.stack([g] * 3, -1),
    "RGBA": lambda g: np.stack([g] * 4, -1),
    "floats": lambda g: g / 255,
    "floats from -1": lambda g: g / 127.5 - 1,
    "PIL": Image.fromarray,
    "PIL in colour": lambda g: Image.fromarray(g).convert("RGB"),
    "tensor [1, H, W]": lambda g: torch.from_numpy(g / np.float32(255))[None],
    "tensor [3, H, W]": lambda g: torch.from_numpy(np.stack([g] * 3) / np.float32(127.5) - 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_is_the_same_image(grey, model_file, form):
    given, file = explain(FORMS[form](grey), model_file), explain(grey, model_file)
    assert (given.image - file.image).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["CMYK", "turned", "MINISWHITE", "RGBA", "LA"])
def test_a_pil_image_is_read_as_its_file(kind, grey, tmp_path):
    x = Image.fromarray(grey)
    path, options = tmp_path / "x.png", {}
    if kind == "CMYK":
        path, x = tmp_path / "x.jpeg", x.convert("RGB").convert("CMYK")
    elif kind == "turned":
        exif = Image.Exif()
        exif[274] = 6
        options["exif"] = exif
    elif kind == "MINISWHITE":
        path, options["tiffinfo"] = tmp_path / "x.tiff", {262: 0}
        x = Image.fromarray(grey.astype(np.uint16) * 8)
    else:
        alpha = Image.fromarray(np.uint8(255 * (np.arange(40) > 20))[None].repeat(40, 0))
        x = Image.merge(kind, [x] * (3 if kind == "RGBA" else 1) + [alpha])
    x.save(path, **options)
    with Image.open(path) as opened:
        given = api._picture(opened)
        assert opened.getexif().get(274) == (6 if kind == "turned" else None)  # left as it was
    read = images.read(path)
    assert np.abs(given / 255 - read).max() < 0.01
    plain = np.abs(grey / 255 - read).max() if kind != "turned" else 1
    assert plain > 0.5 or kind == "CMYK"


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_a_deep_pil_image_has_its_files_contrast(dtype, grey, tmp_path):
    Image.fromarray((grey // 2).astype(dtype)).save(tmp_path / "x.tiff")
    with Image.open(tmp_path / "x.tiff") as opened:
        given = api._picture(opened)
    assert np.abs(given / 255 - images.read(tmp_path / "x.tiff")).max() < 0.01


def test_three_pictures_are_not_taken_for_one_in_colour(grey, model_file):
    three = np.stack([grey, grey[::-1], grey])
    with pytest.raises(UsageError, match="three pictures, or one in colour"):
        explain(three, model_file)
    assert len(explain([*three], model_file)) == 3
    assert len(explain(torch.from_numpy(three)[:, None], model_file)) == 3
    assert explain(np.moveaxis(three, 0, -1), model_file).image.shape[0] == 1
    assert explain(three[None], model_file)[0].image.shape[0] == 1
    with pytest.raises(UsageError, match="not of bool"):
        explain(grey > 99, model_file)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_a_file_takes_can_be_said_from_python(grey, model_file, tmp_path):
    net = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(1, 2)
    )
    torch.jit.trace(net, torch.zeros(1, 1, 32, 32)).save(str(tmp_path / "net.pt"))
    options = {"classifier": str(tmp_path / "net.pt"), "target": "1"}
    for image in (grey, [grey, grey]):
        with pytest.raises(UsageError, match="does not say what it takes"):
            explain(image, model_file, **options)
        assert explain(image, model_file, **options, classifier_input="32,1,-1,1")


@pytest.mark.parametrize("least", [-0.0005, -0.09])
def test_what_resizing_leaves_below_black_is_clipped(grey, least):
    floats = grey / 255
    floats[0, 0] = least
    floats[0, 1] = 1 - least
    given = api._picture(floats)
    assert np.abs(given.astype(int) - grey).reshape(-1)[2:].max() <= 1
    with pytest.raises(UsageError, match="give floats in"):
        api._picture(floats - 0.2)


@pytest.mark.parametrize("dtype", ["int64", "int16", "uint8"])
def test_integers_up_to_255_are_greys_of_any_type(grey, dtype):
    dull = (grey // 4 + 60).astype(dtype)
    assert (api._picture(dull) == dull).all()
    assert np.abs(api._picture(np.stack([dull] * 3, -1)).astype(int) - dull).max() <= 1
    assert (api._picture(torch.from_numpy(dull)) == dull).all()


def test_slips_from_python_are_told_in_a_line(grey, model_file):
    with pytest.raises(UsageError, match="no option refin; there are .*refine"):
        cxrgan.explain(grey, str(model_file), refin=3)
    with pytest.raises(UsageError, match="classifier_input is for a file"):
        net = torch.nn.Linear(1, 1)
        cxrgan.explain(grey, str(model_file), classifier=net, classifier_input="imagenet")
    with pytest.raises(UsageError, match="not a function; call it"):
        cxrgan.explain(grey, str(model_file), classifier=lambda: None)


def test_deep_pixels_get_the_contrast_of_a_file(grey, model_file, tmp_path):
    deep = grey.astype(np.uint16) * 8
    Image.fromarray(deep).save(tmp_path / "x.png")
    given, file = explain(deep, model_file), explain(tmp_path / "x.png", model_file)
    assert (given.image - file.image).abs().max() < 0.02
    assert file.numbers["image"].endswith("x.png")


@pytest.mark.parametrize("several", ["list", "array", "tensor"])
def test_several_images_give_a_list(grey, model_file, several):
    forms = {"list": [grey, grey], "array": np.stack([grey, grey])}
    forms["tensor"] = torch.from_numpy(forms["array"] / 255)[:, None]
    found = explain(forms[several], model_file)
    assert len(found) == 2 and torch.equal(found[0].image, found[1].image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((40, 40), np.nan), "NaN"),
        (np.linspace(0, 4000, 1600).reshape(40, 40), "values from 0 to 4000"),
        (np.zeros((2, 3, 4, 5, 6), np.uint8), "not .2, 3, 4, 5, 6."),
        ({"image": 1}, "not dict"),
        ("nowhere.png", "no such file"),
    ],
)
def test_what_is_no_image_is_said(image, message, model_file):
    with pytest.raises(CxrError, match=message):
        explain(image, model_file)


def test_a_module_of_ones_own_is_explained_for_one_of_its_classes(grey, model_file):
    module = Bright().train()
    options = {"classifier": module, "size": 48, "channels": 3, "output": "logits"}
    found = explain(grey, model_file, **options, target=1)
    x = torch.nn.functional.interpolate(found.image, (48, 48), mode="bilinear", antialias=True)
    shown = ((x + 1) / 2)[..., 24:].mean() * torch.tensor([-3.0, 4.0, 0.0])
    expected = shown[1] - shown[[0, 2]].logsumexp(0)
    assert found.logit.item() == pytest.approx(expected.item(), abs=1e-4)
    assert found.numbers["classifier"] == "Bright"
    assert module.training and module.scale.requires_grad  # the user's own is as it was
    with pytest.raises(CxrError, match="gives 3 answers"):
        explain(grey, model_file, **options)
    with pytest.raises(UsageError, match="only for a classifier that is a torch.nn.Module"):
        explain(grey, model_file, size=48)


def test_an_explanation_shows_itself(grey, model_file):
    found = explain(grey, model_file)
    assert len(repr(found).splitlines()) == 3 and "SICK 0." in repr(found)
    html = found._repr_html_()
    assert "data:image/png;base64," in html and "SICK 0." in html


def test_random_lungs_are_drawn(model_file):
    assert cxrgan.sample(str(model_file), 3).shape == (3, 5, 32, 32)


def test_the_front_door_imports_nothing_heavy():
    code = "import sys, cxrgan; assert 'torch' not in sys.modules; print(cxrgan.explain.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cxr.api"
    with pytest.raises(AttributeError):
        _ = cxrgan.nothing
