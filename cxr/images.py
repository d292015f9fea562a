"""Read an X-ray file of nearly any kind as one greyscale picture; write PNG and GIF."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from cxr import CxrError, UsageError

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"),
    *(".dcm", ".dicom"),
)
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")  # not EPS and its like: they run programs
MIN_SIDE = 16  # pixels; smaller files are icons
MAX_PIXELS = 2**26  # 8192 x 8192, four times the largest detectors: beyond is a decompression bomb


def read(path: str | Path) -> np.ndarray:
    """Read an X-ray file as float32 [H, W] in [0, 1]: greyscale, upright, bright bones.

    PNG, JPEG, TIFF, BMP, GIF and WebP are told by content; DICOM by content or suffix. Colour
    becomes ITU-R 601 luma, transparency black, EXIF orientation is applied. DICOM gets its modality
    and VOI LUT, and MONOCHROME1 is inverted.

    8-bit files give value / 255. Deeper files and DICOM do not say reliably how much of their range
    is in use (10, 12 or 14 bits of 16), so their 0.1 and 99.9 percentiles become 0 and 1: minimum
    and maximum would leave a picture grey for the sake of one hot pixel or a burnt-in marker.
    Colour files of 16 bits a channel are read to their upper 8.

    Raises CxrError, one line that begins with the path, for anything else: no such file, a folder,
    an empty, damaged, constant, tiny, huge or multi-frame image, NaN or infinite values.
    """
    pixels = _pixels(Path(path))
    if pixels.min() == pixels.max():
        raise CxrError(f"{path}: every pixel has the same value; this is no X-ray")
    return np.float32(pixels) / 255 if pixels.dtype == np.uint8 else _stretch(pixels)


def _pixels(path: Path) -> np.ndarray:
    """The pixels [H, W] of a file as they are; raises CxrError."""
    try:
        with warnings.catch_warnings():  # either refused below in our own words, or harmless
            warnings.filterwarnings("ignore", module="PIL|pydicom")
            pixels = _read_dicom(path) if _is_dicom(path) else _read_picture(path)
        if not np.isfinite(pixels).all():
            raise CxrError("contains NaN or infinite values; export it again")
    except CxrError as refusal:
        raise CxrError(f"{path}: {refusal}") from None
    return pixels


def square(image: np.ndarray, size: int, fit: str = "crop") -> np.ndarray:
    """Image [H, W] in [0, 1] -> uint8 [size, size], never squashed.

    `fit` is "crop" (the central square) or "pad" (black bars on the short sides). Resized with an
    antialiased bicubic filter, which is smooth in both directions. Raises UsageError on another
    `fit`.
    """
    height, width = image.shape
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    elif fit == "pad":
        side = max(height, width)
        tall, wide = side - height, side - width
        image = np.pad(image, ((tall // 2, tall - tall // 2), (wide // 2, wide - wide // 2)))
    else:
        raise UsageError(f"fit is 'crop' or 'pad', not {fit!r}")
    return np.uint8(np.rint(255 * resize(image, size).clip(0, 1)))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Float [H, W] -> float32 [size, size] by antialiased bicubic; may overshoot the range."""
    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    return np.array(picture.resize((size, size), Image.Resampling.BICUBIC))


def load(path: str | Path, size: int, fit: str = "crop") -> np.ndarray:
    """`read`, then `square`: file -> uint8 [size, size]. Raises CxrError."""
    return square(read(path), size, fit)


def load_mask(path: str | Path, size: int, fit: str = "crop") -> np.ndarray:
    """A mask, bool [size, size], brought to size as its image is; it may be empty. Raises
    CxrError."""
    pixels = _pixels(Path(path)).astype(np.float32)
    return square(pixels / max(pixels.max(), 1), size, fit) > 127


def find_images(path: str | Path) -> list[Path]:
    """The file itself, or every image below a folder (by SUFFIXES), sorted, hidden ones left out.

    Raises CxrError when there is no such path or the folder holds no image.
    """
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path's, these never raise
        if not os.path.exists(path):
            raise CxrError(f"{path}: no such file or folder")
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise CxrError(f"{path}: holds no image (looked for {' '.join(SUFFIXES)})")
    return found


def names_apart(paths: Sequence[Path]) -> list[str]:
    """A folder's name for each image: its stem, with its own folder's name or a number where
    another image has that name already. It is never hidden, and never leaves its folder."""
    names: dict[str, str] = {}  # the keys as a file system that ignores case sees them
    for path in paths:
        stem, parent = (_folder_name(s) for s in (path.stem, path.absolute().parent.name))
        tries = chain((stem, f"{parent}_{stem}"), (f"{stem}_{n}" for n in count(2)))
        name = next(name for name in tries if name.casefold() not in names)
        names[name.casefold()] = name
    return list(names.values())


def _folder_name(name: str) -> str:
    """The name without control characters, separators, dots in front, and what is too long."""
    kept = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name)
    kept = kept.encode(errors="replace")[:100].decode(errors="ignore")
    return kept.strip(". ") or "image"


def _is_dicom(path: Path) -> bool:
    try:
        if path.is_dir():
            raise CxrError("is a folder; name an image file")
        if not path.is_file():  # opening a pipe would wait for ever
            raise CxrError("is not a regular file" if path.exists() else "no such file")
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        raise CxrError(f"cannot be opened: {error.strerror}") from None
    if not head:
        raise CxrError("the file is empty (0 bytes)")
    return head[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


@contextmanager
def _decoding(kinds: str) -> Iterator[None]:
    """Damaged bytes make decoders raise nearly anything: all of it is one refusal."""
    try:
        yield
    except CxrError:
        raise
    except Image.DecompressionBombError:
        raise CxrError(f"has more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise CxrError(f"not an image, or a damaged one; {kinds} can be read") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CxrError(f"damaged or cut short, export it again ({reason})") from error


def _read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W], or another type [H, W] if the file is deeper than 8 bits."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whoever switched it on: half an X-ray is none
    with _decoding("PNG, JPEG, TIFF, BMP, GIF, WebP and DICOM"):
        with Image.open(path, formats=FORMATS) as file:
            _check_size(*file.size)
            # A camera's MPO is a JPEG with a preview behind it, not a film.
            if file.format != "MPO":
                _check_frames(getattr(file, "n_frames", 1))
            white_is_zero = getattr(file, "tag_v2", {}).get(262) == 0
            picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I") or picture.mode == "F":  # convert("L") would clip these
            pixels = np.array(picture)
            return -pixels.astype(np.float64) if white_is_zero else pixels
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
            picture = Image.alpha_composite(black, picture)
        if picture.mode not in ("1", "L"):
            picture = picture.convert("RGB")  # the only way from CMYK and Lab to grey
        return np.array(picture.convert("L"))


def _read_dicom(path: Path) -> np.ndarray:
    """Float64 [H, W], in the units of the VOI LUT, larger is brighter."""
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise CxrError("reading DICOM needs pydicom: pip install 'cxrgan[dicom]'") from None
    with _decoding("DICOM"):
        try:
            dataset = pydicom.dcmread(path)
        except pydicom.errors.InvalidDicomError:
            raise CxrError("its name says DICOM, its content does not") from None
        if "PixelData" not in dataset:
            raise CxrError("this DICOM file holds no image")
        _check_size(dataset.Columns, dataset.Rows)
        _check_frames(int(dataset.get("NumberOfFrames") or 1))
        kind = dataset.PhotometricInterpretation
        if kind not in ("MONOCHROME1", "MONOCHROME2"):
            raise CxrError(f"colour DICOM ({kind}) is no radiograph; export a greyscale one")
        try:
            pixels = dataset.pixel_array
        except RuntimeError as error:
            if "missing dependencies" not in str(error):
                raise
            raise CxrError(
                f"{dataset.file_meta.TransferSyntaxUID.name} needs another decoder:"
                " pip install 'pylibjpeg[all]', or save it uncompressed"
            ) from None
        pixels = apply_voi_lut(apply_modality_lut(pixels, dataset), dataset)
    pixels = pixels.astype(np.float64)
    return -pixels if kind == "MONOCHROME1" else pixels


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise CxrError(f"only {width} x {height} pixels; at least {MIN_SIDE} a side are needed")
    if width * height > MAX_PIXELS:
        raise CxrError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels; make it smaller")


def _check_frames(count: int) -> None:
    if count > 1:
        raise CxrError(f"holds {count} frames or pages; save the one to look at on its own")


def _stretch(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels.astype(np.float64)
    low, high = np.percentile(pixels, (0.1, 99.9))
    if low == high:  # all but a few pixels are alike
        low, high = pixels.min(), pixels.max()
    return np.float32(((pixels - low) / (high - low)).clip(0, 1))
