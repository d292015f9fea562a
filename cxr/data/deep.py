"""PNG and TIFF files that Pillow reads wrongly or not at all: 16 bits a channel, 64-bit numbers; and
PNG files that end early."""

import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import png
import tifffile

from cxr import CxrError

logging.getLogger("tifffile").disabled = True  # what is damaged is refused in our own words
LUMA = np.float32([0.299, 0.587, 0.114])  # ITU-R 601
UPRIGHT = {  # what is done to [H, W] of each orientation (TIFF 6.0, tag 274)
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).T,
    8: np.rot90,
}
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def check_png_end(path: Path) -> None:
    """Half a PNG may decode: what was to follow is then black. Its pixel stream has to end; raises
    CxrError if it does not."""
    with path.open("rb") as file:
        file.seek(8)
        packer, got, whole = zlib.decompressobj(), 0, 0
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IHDR":
                whole = _png_bytes(*struct.unpack(">IIBBBBB", file.read(13)))
                file.seek(4, os.SEEK_CUR)
                continue
            if kind != b"IDAT":
                file.seek(length + 4, os.SEEK_CUR)
                continue
            data = file.read(length)
            while data and not packer.eof:
                got += len(packer.decompress(data, 1 << 20))
                data = packer.unconsumed_tail
            file.seek(4, os.SEEK_CUR)
        if not packer.eof or got < whole:
            raise CxrError("damaged or cut short, export it again (its pixel data do not end)")


def _png_bytes(width: int, height: int, bits: int, colour: int, *rest: int) -> int:
    """How many bytes the pixels of a PNG unpack to (PNG specification, sections 7 and 8)."""
    depth = bits * {2: 3, 4: 2, 6: 4}.get(colour, 1)
    passes = ADAM7 if rest[-1] else ((0, 0, 1, 1),)
    sizes = ((-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes)
    return sum(
        rows * (1 + (columns * depth + 7) // 8) for columns, rows in sizes if columns > 0 < rows
    )


def is_deep_png(path: Path) -> bool:
    """Whether Pillow would read only the upper 8 bits of this PNG."""
    with path.open("rb") as file:
        head = file.read(26)
    return head[24] == 16 and head[25] in (2, 4, 6)  # colour, grey with alpha, colour with alpha


def read_png(path: Path) -> np.ndarray:
    """uint16 [H, W] of a PNG of 16 bits a channel: luma, transparency black."""
    with path.open("rb") as file:
        width, height, rows, info = png.Reader(file=file).read()
        grey = np.empty((height, width), np.uint16)
        for y, row in enumerate(rows):
            pixels = np.asarray(row, np.float32).reshape(width, info["planes"])
            line = pixels[:, 0] if info["greyscale"] else pixels[:, :3] @ LUMA
            grey[y] = np.rint(line * pixels[:, -1] / 65535 if info["alpha"] else line)
    return grey


def strange_tiff(path: Path) -> tuple[int, int, int] | None:
    """Width, height and number of pages of a TIFF that Pillow reads wrongly or not at all, None for
    other files. Raises what a damaged file raises."""
    with path.open("rb") as file:
        if file.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return None
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        kind = "" if page.dtype is None else page.dtype.str[1:]
        colour = page.samplesperpixel > 1 and page.bitspersample not in (1, 8)
        if not colour and kind not in ("f8", "u8", "i8", "f2", "i1"):
            return None
        return page.imagewidth, page.imagelength, len(file.pages)


def read_tiff(path: Path) -> np.ndarray:
    """[H, W] of such a TIFF, of its own type or float32: luma, transparency black."""
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        pixels = page.asarray()
    if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.shape[:2] != (page.imagelength, page.imagewidth) or pixels.ndim > 3:
        raise CxrError("damaged or cut short, export it again (its header contradicts itself)")
    if pixels.ndim == 3:
        full = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else 1
        alpha = pixels[..., -1] / np.float32(full) if page.extrasamples else 1
        colours = pixels[..., : 3 if page.samplesperpixel > 2 else 1].astype(np.float32)
        pixels = (colours @ LUMA if colours.shape[-1] == 3 else colours[..., 0]) * alpha
    pixels = pixels.astype(np.float32) if pixels.dtype.itemsize != 1 else pixels.astype(np.int16)
    pixels = upright(pixels, getattr(page.tags.get(274), "value", 1))
    return pixels.max() - pixels if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE else pixels


def upright(pixels: np.ndarray, orientation: object) -> np.ndarray:
    """Pixels [H, W] of a file with this orientation, as they are to be seen."""
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return np.ascontiguousarray(turn(pixels)) if turn else pixels
