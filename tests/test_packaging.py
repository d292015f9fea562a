"""The wheel holds what the package needs and nothing else, and works away from the sources."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import cxr

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "cxrgan.py")
PROBES = (
    *("weights/probe.safetensors", "weights/probe.md", "weights/samples/probe.png"),
    "weights/discriminators/probe.safetensors",
    *(f"kernels/probe.{kind}" for kind in ("cpp", "cu", "cuh", "h", "md")),
)


def python(*words, folder, **environment):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy, since a build leaves its traces among the sources, with a file of each kind more."""
    folder = tmp_path_factory.mktemp("source")
    for name in filter(lambda name: (ROOT / name).exists(), SOURCES):
        shutil.copy(ROOT / name, folder)
    for name in filter(lambda name: (ROOT / name).exists(), ("cxr", "weights", "kernels")):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PROBES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    python(*build, folder=folder)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site-packages")
    wheel.extractall(folder)
    return folder


def test_only_cxr_and_cxrgan_reach_site_packages(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"cxr", "cxrgan.py", f"cxrgan-{cxr.__version__}.dist-info"}


def test_every_module_weight_and_kernel_is_in_the_wheel(wheel, source):
    patterns = (
        "cxr/**/*.py",
        "cxr/py.typed",
        "cxr/pages/*",
        "weights/*.safetensors",
        "weights/*.md",
        "weights/discriminators/*",
        "weights/samples/*",
        "kernels/*.*",
    )
    files = [path.relative_to(source) for pattern in patterns for path in source.glob(pattern)]
    wanted = {str(path if path.parts[0] == "cxr" else Path("cxr") / path) for path in files}
    assert {name for name in wheel.namelist() if name.startswith("cxr/")} == wanted


def test_metadata_name_the_licence_the_dependencies_and_the_command(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    requirements = metadata.get_all("Requires-Dist")
    assert metadata["Version"] == cxr.__version__ and "torch>=2.11" in requirements
    assert set(metadata.get_all("Provides-Extra")) == {
        "test",
        "dicom",
        "notebooks",
        "plots",
        "recipes",
    }
    assert any(name.endswith("LICENSE") for name in wheel.namelist())
    entry = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "cxrgan = cxrgan:main" in entry


def test_the_command_answers_from_an_empty_folder(unpacked, tmp_path):
    away = {"folder": tmp_path, "PYTHONPATH": str(unpacked)}
    version = python("-m", "cxrgan", "--version", **away)
    assert version == f"cxrgan, version {cxr.__version__}\n"
    code = (
        "from cxr import checkpoints, device; print(checkpoints.weights_folder()); device.machine()"
    )
    assert python("-c", code, **away).strip() == str(unpacked / "cxr" / "weights")
