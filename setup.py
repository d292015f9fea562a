import os
import re
import sys
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "cxr" / "__init__.py").read_text())[1]
readme = here / "README.md"
# They travel inside cxr, so that no other top-level name reaches site-packages; git keeps no empty
# folder.
inner = [name for name in ("weights", "kernels") if (here / name).is_dir()]


def ahead_of_time() -> dict:
    """With CXRGAN_BUILD=1 the native kernels are compiled now, not on first use; torch, ninja and
    rich have to be there (`pip install --no-build-isolation`)."""
    if os.environ.get("CXRGAN_BUILD") != "1":
        return {}
    sys.path.insert(0, str(here))
    from torch.utils.cpp_extension import BuildExtension

    from cxr import build

    build_ext = BuildExtension.with_options(no_python_abi_suffix=True)
    return {"ext_modules": build.extensions(), "cmdclass": {"build_ext": build_ext}}


setup(
    **ahead_of_time(),
    name="cxrgan",
    version=version,
    description="Explain a chest X-ray classifier by moving an image from healthy to diseased",
    long_description=readme.read_text() if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="the cxrgan authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11",
        "numpy",
        "click>=8.2",
        "rich",
        "safetensors",
        "imageio",
        "ninja",
        "pillow>=10.1",
        "pypng",
        "tifffile",
    ],
    extras_require={
        "recipes": ["torchvision", "timm", "torchxrayvision", "monai"],
        "test": [
            *("pytest", "pytest-xdist", "ruff", "coverage", "captum", "setuptools>=70.1"),
            *("scikit-learn", "scikit-image"),
        ],
        "dicom": [
            "pydicom>=3",
            "pylibjpeg",
            "pylibjpeg-libjpeg",
            "pylibjpeg-openjpeg",
            "pyjpegls",
        ],
        "plots": ["matplotlib>=3.7"],
        "notebooks": ["jupyter", "matplotlib>=3.7", "torchvision"],
    },
    entry_points={"console_scripts": ["cxrgan=cxrgan:main"]},
    py_modules=["cxrgan"],
    packages=[
        "cxr",
        "cxr.cnn",
        "cxr.data",
        "cxr.evaluation",
        "cxr.phantoms",
        *(f"cxr.{name}" for name in inner),
    ],
    package_dir={f"cxr.{name}": name for name in inner},
    package_data={
        "cxr": ["py.typed", "pages/*"],
        "cxr.weights": ["*.safetensors", "*.md", "discriminators/*", "samples/*.png"],
        "cxr.kernels": ["*.cpp", "*.cu", "*.cuh", "*.h", "*.md"],
    },
    zip_safe=False,
)
