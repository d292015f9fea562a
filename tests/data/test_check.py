import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import cxrgan
from cxr.data.check import check

BASE = np.hypot(*np.mgrid[-1:1:160j, -1:1:160j])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty sound pictures that look alike, and one of each odd kind."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    sound = [
        np.uint8((150 - 80 * BASE + random.normal(0, 20, BASE.shape)).clip(20, 235))
        for _ in range(40)
    ]
    files = {f"{('NORMAL', 'SICK')[n % 2]}/{n}.png": picture for n, picture in enumerate(sound)}
    files |= {
        "NORMAL/black.png": np.uint8(random.integers(0, 9, (160, 160))),
        "NORMAL/white.png": np.uint8(random.integers(247, 255, (160, 160))),
        "NORMAL/inverted.png": 255 - sound[0],
        "SICK/tiny.png": sound[1][:100, :100],
        "SICK/again.png": sound[3],
        "SICK/both.png": sound[2],
    }
    for name, pixels in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    (root / "SICK" / "broken.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def numbers(data):
    return check(data)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("unreadable", {"broken.png"}),
        ("nearly black", {"black.png"}),
        ("nearly white", {"white.png"}),
        ("inverted", {"inverted.png"}),
        ("tiny", {"tiny.png"}),
        ("in two classes", {"2.png", "both.png"}),
        ("duplicates", {"again.png"}),
    ],
)
def test_what_is_odd_is_named(numbers, kind, names):
    found = numbers["odd"][kind]
    assert {path.rsplit("/", 1)[1] for path in found["images"]} == names
    assert found["count"] == len(names)


def test_classes_splits_sizes_and_depths_are_counted(numbers):
    assert numbers["classes"] == ["NORMAL", "SICK"]
    assert np.sum(list(numbers["images"].values()), 0).tolist() == [23, 23]
    assert np.sum(list(numbers["patients"].values()), 0).tolist() == [23, 23]
    assert numbers["sizes"] == {"129 to 256 pixels": 45, "65 to 128 pixels": 1}
    assert numbers["depths"] == {"8 bits, grey": 46}


def test_the_command_draws_a_sheet_and_says_what_to_type_next(data, tmp_path):
    words = ["check", str(data), "--out", str(tmp_path / "sheet.png"), "--positive", "SICK"]
    result = CliRunner().invoke(cxrgan.cli, words)
    assert result.exit_code == 0 and "odd: inverted" in result.stdout
    assert f"next:  cxrgan train-cnn {data} --positive SICK" in result.stderr
    assert Image.open(tmp_path / "sheet.png").width > 1000
    result = CliRunner().invoke(cxrgan.cli, [*words, "--json"])
    assert json.loads(result.stdout)["classes"] == ["NORMAL", "SICK"]
