"""PNG and TIFF files beyond Pillow: each has to give the greys that its 16-bit grey twin gives."""

import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from cxr import CxrError, images

GREY = np.linspace(0, 1, 64 * 64).reshape(64, 64)
DEEP = (GREY * 4000).astype("u2")
OPAQUE = np.full((64, 64), 65535, "u2")
UNASSOCIATED = {"extrasamples": ["unassalpha"]}


@pytest.mark.parametrize(
    ("pixels", "how"),
    [
        *((DEEP.astype(kind), {}) for kind in ("f8", "u8", "i8", "f2", "u4")),
        (DEEP, {"bigtiff": True}),
        (DEEP.astype("f8"), {"bigtiff": True, "compression": "zlib"}),
        (np.stack([DEEP] * 3, -1), {"photometric": "rgb"}),
        (np.stack([DEEP] * 3), {"photometric": "rgb", "planarconfig": "separate"}),
        (np.stack([DEEP] * 3 + [OPAQUE], -1), {"photometric": "rgb", **UNASSOCIATED}),
        (np.stack([DEEP, OPAQUE], -1), {"photometric": "minisblack", **UNASSOCIATED}),
        (DEEP.max() - DEEP.astype("f8"), {"photometric": "miniswhite"}),
        (DEEP.astype("i4") - 2000, {}),
    ],
)
def test_a_deep_tiff_gives_the_greys_of_its_grey_twin(tmp_path, pixels, how):
    Image.fromarray(DEEP).save(tmp_path / "twin.png")
    tifffile.imwrite(tmp_path / "x.tif", pixels, **how)
    twin, read = (images.read(tmp_path / name) for name in ("twin.png", "x.tif"))
    np.testing.assert_allclose(read, twin, atol=2e-3)


def test_signed_bytes_are_read(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", (GREY * 200 - 100).astype("i1"))
    np.testing.assert_allclose(images.read(tmp_path / "x.tif"), GREY, atol=0.02)


def test_several_deep_pages_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", np.stack([GREY, GREY]))
    with pytest.raises(CxrError, match="holds 2 frames or pages"):
        images.read(tmp_path / "x.tif")


@pytest.mark.parametrize("bits", ["L", "I;16"])
def test_jpeg_2000_is_read(tmp_path, bits):
    pixels = (GREY * 255).astype("u1") if bits == "L" else DEEP
    Image.fromarray(pixels).save(tmp_path / "x.jp2", quality_layers=[0])
    assert images.read(tmp_path / "x.jp2").shape == (64, 64)
    np.testing.assert_allclose(images.read(tmp_path / "x.jp2"), GREY, atol=0.02)


def chunk(kind, data):
    crc = zlib.crc32(kind + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + kind + data + crc


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_png_whose_stream_ends_early_is_refused(tmp_path, interlaced, share):
    header = (64).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, interlaced])
    rows = 64 * 65 if not interlaced else 64 * 64 + 8 + 8 + 8 + 16 + 16 + 32 + 32
    raw = np.random.default_rng(0).integers(0, 255, rows, dtype=np.uint8)
    sizes = ((8, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (32, 64))
    place = 0
    for height, width in sizes if interlaced else ((64, 64),):
        for _ in range(height):
            raw[place] = 0  # the filter of the row
            place += width + 1
    data = zlib.compress(raw[: int(rows * share)].tobytes())
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(png)
    if share == 1:
        assert images.read(tmp_path / "x.png").shape == (64, 64)
    else:
        with pytest.raises(CxrError, match="pixel data do not end"):
            images.read(tmp_path / "x.png")
