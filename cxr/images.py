"""Read an X-ray file of nearly any kind as one greyscale picture; write PNG and GIF."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from cxr import CxrError, UsageError, console
from cxr.data import deep, dicom, folders

FORMATS = (
    "PNG",
    "JPEG",
    "TIFF",
    "BMP",
    "GIF",
    "WEBP",
    "JPEG2000",
)  # not EPS and its like: they run programs
LUMA = np.float32([0.299, 0.587, 0.114])  # ITU-R 601
MIN_SIDE = 16  # pixels; smaller files are icons
MAX_PIXELS = 2**26  # 8192 x 8192, four times the largest detectors: beyond is a decompression bomb


def read(path: str | Path) -> np.ndarray:
    """Read an X-ray file as float32 [H, W] in [0, 1]: greyscale, upright, bright bones.

    PNG, JPEG, TIFF, BMP, GIF and WebP are told by content; DICOM by content or suffix. Colour
    becomes ITU-R 601 luma, transparency black, EXIF orientation is applied. DICOM gets its modality
    and VOI LUT, and MONOCHROME1 is inverted.

    8-bit files give value / 255. Deeper files and DICOM do not say reliably how much of their range
    is in use (10, 12 or 14 bits of 16), so their 0.1 and 99.9 percentiles become 0 and 1: minimum
    and maximum would leave a picture grey for the sake of one hot pixel. A burnt-in marker of up to
    1% of the area, far brighter or darker than the rest, is left out of this.

    Raises CxrError, one line that begins with the path, for anything else: no such file, a folder,
    an empty, damaged, constant, tiny, huge or multi-frame image, NaN or infinite values.
    """
    pixels, low, high = _read_stored(Path(path))
    return _unit(pixels, low, high)


def _read_stored(path: Path) -> tuple[np.ndarray, float, float]:
    """(pixels [H, W] of the file's own type, the value of black, that of white)."""
    pixels = pixels_of(path)
    if pixels.min() == pixels.max():
        raise CxrError(f"{path}: every pixel has the same value; this is no X-ray")
    if pixels.dtype == np.uint8:
        return pixels, 0, 255
    if _is_dicom(path):
        return pixels, 0, 1
    return _contrast(pixels)


def unit(pixels: np.ndarray) -> np.ndarray:
    """An array [H, W] as `read` gives a picture of its pixels: float32 in [0, 1]."""
    return _unit(pixels, *((0, 255) if pixels.dtype == np.uint8 else _contrast(pixels)[1:]))


def _contrast(pixels: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Pixels deeper than 8 bits, and their values of black and of white."""
    if pixels.dtype != np.uint16:
        return pixels, *_range(pixels)
    counts = dicom.histogram(pixels, 2**16)
    values = np.flatnonzero(counts)
    return pixels, *_range(values, counts[values])


def _unit(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Float32 with `low` at 0 and `high` at 1."""
    if pixels.dtype == np.uint8:
        unit = pixels.astype(np.float32)
        unit /= 255
        return unit
    if pixels.dtype == np.float32 and (low, high) == (0, 1):
        return pixels.clip(0, 1)
    return _scale(pixels, low, high)


def pixels_of(path: Path) -> np.ndarray:
    """The pixels [H, W] of a file, of DICOM already in [0, 1] as float32; raises CxrError."""
    try:
        with warnings.catch_warnings():  # either refused below in our own words, or harmless
            warnings.filterwarnings("ignore", module="PIL|pydicom")
            pixels = _read_dicom(path) if _is_dicom(path) else _read_picture(path)
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise CxrError("contains NaN or infinite values; export it again")
    except CxrError as refusal:
        reason = " ".join(str(refusal).split())[:300]  # a header may hold line breaks
        raise CxrError(f"{path}: {reason}") from None
    return pixels


def pixel_spacing(path: str | Path) -> list[float] | None:
    """Millimetres [vertical, horizontal] between the pixels as a DICOM file stores them, None where
    the file is no DICOM or does not say. Raises CxrError."""
    path = Path(path)
    if not _is_dicom(path):
        return None
    with _decoding("DICOM"):
        return dicom.spacing(path)


def square(
    image: np.ndarray, size: int, fit: str = "crop", xray: np.ndarray | None = None
) -> np.ndarray:
    """Image [H, W] in [0, 1] -> uint8 [size, size], never squashed.

    `fit` is "crop" (the central square), "pad" (black bars on the short sides) or "lungs" (the
    square around the lungs, see `lungs.box`). Resized with an antialiased bicubic filter, which is
    smooth in both directions. xray: in which the lungs are sought, if the image is a mask of it.
    Raises UsageError on another `fit`, CxrError where there are no lungs.
    """
    if fit == "crop":
        image = _central_square(image)
    elif fit == "pad":
        image = _padded(image)
    elif fit == "lungs":
        top, left, side = lung_square(image if xray is None else xray)
        image = image[top : top + side, left : left + side]
    else:
        raise UsageError(f"fit is crop, pad or lungs, not {fit!r}")
    return _bytes(resize(image, size))


def lung_square(image: np.ndarray) -> tuple[int, int, int]:
    """(top, left, side) of the square around the lungs of an image [H, W] in [0, 1]. Raises
    CxrError where no lungs are found."""
    import torch  # only here: reading an image needs no network

    from cxr import lungs

    height, width = image.shape
    whole = max(height, width)
    small = resize(_padded(image), lungs.LungFinderConfig.size)
    found = lungs.find(torch.from_numpy(small)[None, None])[0, 0]
    down, across = (whole - height) // 2, (whole - width) // 2  # the bars
    top, left, side = (round(n * whole / len(small)) for n in lungs.box(found))
    side = min(side, height, width)
    top, left = min(max(top - down, 0), height - side), min(max(left - across, 0), width - side)
    return top, left, side


def _padded(image: np.ndarray) -> np.ndarray:
    side = max(image.shape)
    tall, wide = (side - length for length in image.shape)
    return np.pad(image, ((tall // 2, tall - tall // 2), (wide // 2, wide - wide // 2)))


def _bytes(unit: np.ndarray) -> np.ndarray:
    return np.uint8(np.rint(255 * unit.clip(0, 1)))


def _central_square(image: np.ndarray) -> np.ndarray:
    height, width = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def resize(image: np.ndarray, height: int, width: int | None = None) -> np.ndarray:
    """Float [H, W] -> float32 [height, width], square by default, by antialiased bicubic; may
    overshoot the range."""
    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    return np.array(picture.resize((width or height, height), Image.Resampling.BICUBIC))


def load(path: str | Path, size: int, fit: str = "crop") -> np.ndarray:
    """`read`, then `square`: file -> uint8 [size, size]. Raises CxrError.

    Cropped and made narrow by bands of rows, as a whole film in float32 needs much memory; the
    result is the same, as the filter works on the rows first and then on the columns.
    """
    pixels, low, high = _read_stored(Path(path))
    if fit != "crop":
        try:
            return square(_unit(pixels, low, high), size, fit)
        except UsageError:
            raise
        except CxrError as refusal:
            raise CxrError(f"{path}: {refusal}") from None
    pixels = _central_square(pixels)
    narrow = np.empty((len(pixels), size), np.float32)
    for start in range(0, len(pixels), 256):
        band = Image.fromarray(np.ascontiguousarray(_unit(pixels[start : start + 256], low, high)))
        wide = (size, band.height)
        narrow[start : start + 256] = band.resize(wide, Image.Resampling.BICUBIC)
    return _bytes(resize(narrow, size))


def find_images(path: str | Path) -> list[Path]:
    """The file itself, or every image below a folder, sorted; what is left out there is said.

    Raises CxrError when there is no such path or the folder holds no image.
    """
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path's, these never raise
        if not os.path.exists(path):
            raise CxrError(f"{path}: no such file or folder")
        return [path]
    found = folders.scan(path)
    found.report(path)
    if not found.files:
        raise CxrError(f"{path}: holds no image")
    return found.files


def _is_dicom(path: Path) -> bool:
    try:
        if path.is_dir():
            raise CxrError("is a folder; name an image file")
        if not path.is_file():  # opening a pipe would wait for ever
            raise CxrError("is not a regular file" if path.exists() else "no such file")
        if not path.stat().st_size:  # nor would /proc's, which are said to be empty, ever end
            raise CxrError("the file is empty (0 bytes)")
        with path.open("rb") as file:
            head = file.read(132)
    except OSError as error:
        raise CxrError(f"cannot be opened: {error.strerror}") from None
    return folders.is_dicom_head(head) or path.suffix.lower() in (".dcm", ".dicom")


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
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a decoder in Rust panics with one of its own
        reason = " ".join(str(error).split()).rpartition("all available plugins: ")[2]
        reason = reason[:200] or type(error).__name__
        raise CxrError(f"damaged or cut short, export it again ({reason})") from error


def _read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W], or another type [H, W] if the file is deeper than 8 bits."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whoever switched it on: half an X-ray is none
    with _decoding("PNG, JPEG, JPEG 2000, TIFF, BMP, GIF, WebP and DICOM"):
        if size := deep.strange_tiff(path):
            _check_size(*size[:2])
            _check_frames(size[2])
            return deep.read_tiff(path)
        # By its name, Pillow 13 would map a TIFF that is to be turned into memory askew.
        with path.open("rb") as raw, Image.open(raw, formats=FORMATS) as file:
            _check_size(*file.size)
            # A camera's MPO is a JPEG with a preview behind it, not a film.
            if file.format != "MPO":
                _check_frames(getattr(file, "n_frames", 1))
            if file.format == "PNG":
                deep.check_png_end(path)
                if deep.is_deep_png(path):
                    return deep.upright(deep.read_png(path), file.getexif().get(274))
            return grey(file, in_place=True)


def grey(picture: Image.Image, in_place: bool = False) -> np.ndarray:
    """The pixels [H, W] of an open picture as `read` takes them: uint8, or another type if it is
    deeper than 8 bits. in_place: whether the picture itself may be turned upright."""
    white_is_zero = getattr(picture, "tag_v2", {}).get(262) == 0
    picture.load()  # a TIFF is turned upright by this; else it would be turned twice below
    turned = ImageOps.exif_transpose(picture, in_place=in_place)
    picture = picture if turned is None else turned
    if picture.mode.startswith("I") or picture.mode == "F":  # convert("L") would clip these
        pixels = np.asarray(picture)
        return pixels.max() - pixels if white_is_zero else pixels
    plain = picture.mode == "L" and not picture.has_transparency_data
    return np.asarray(picture if plain else _luma(picture))


def _luma(picture: Image.Image) -> Image.Image:
    """Grey, transparency black; by bands of rows, as each step makes a copy."""
    grey = Image.new("L", picture.size)
    for top in range(0, picture.height, 256):
        band = picture.crop((0, top, picture.width, min(top + 256, picture.height)))
        if band.has_transparency_data:
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, (0, 0, 0, 255)), band)
        if band.mode not in ("1", "L"):
            band = band.convert("RGB")  # the only way from CMYK and Lab to grey
        grey.paste(band.convert("L"), (0, top))
    return grey


def _read_dicom(path: Path) -> np.ndarray:
    """Float32 [H, W] in [0, 1], its pixels made square."""
    with _decoding("DICOM"):
        places, table, counts, aspect, notes = dicom.read(path, _check_size)
        if counts is None:
            pixels = np.float32(table / 255)[places]
        else:
            used = counts > 0
            low, high = _range(table[used], counts[used])
            pixels = np.nan_to_num(_scale(table, low, high), nan=0.0)[places]
        for note in notes:
            console.warn(f"{path}: {note}")
        if abs(aspect - 1) < 0.01:
            return pixels
        height, width = pixels.shape
        tall, wide = max(1, round(height * max(aspect, 1))), max(1, round(width / min(aspect, 1)))
        _check_size(wide, tall)
        picture = Image.fromarray(pixels).resize((wide, tall), Image.Resampling.BICUBIC)
        return np.array(picture).clip(0, 1)


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise CxrError(f"only {width} x {height} pixels; at least {MIN_SIDE} a side are needed")
    if width * height > MAX_PIXELS:
        raise CxrError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels; make it smaller")


def _check_frames(count: int) -> None:
    if count > 1:
        raise CxrError(f"holds {count} frames or pages; save the one to look at on its own")


def _range(pixels: np.ndarray, counts: np.ndarray | None = None) -> tuple[float, float]:
    """The values that become black and white: the 0.1 and 99.9 percentiles.

    `counts` says how often each of `pixels` stands. What lies further from the central 97.8% than
    half their range is a marker, and the percentiles are those of the others.
    """
    low, first, last, high = _percentiles(pixels, counts, (0.1, 1.1, 98.9, 99.9))
    room = (last - first) / 2
    if first < last and (low < first - room or high > last + room):
        inside = (pixels >= first - room) & (pixels <= last + room)
        kept = None if counts is None else counts[inside]
        low, high = _percentiles(pixels[inside], kept, (0.1, 99.9))
    if low == high:  # all but a few pixels are alike
        low, high = pixels.min(), pixels.max()
    return float(low), float(high)


def _percentiles(values: np.ndarray, counts: np.ndarray | None, q: tuple) -> np.ndarray:
    if counts is None:
        return np.percentile(values, q)
    order = np.argsort(values)
    total = np.cumsum(counts[order])
    rank = np.array(q) / 100 * (total[-1] - 1)
    below, above = (
        values[order][np.searchsorted(total, whole(rank), side="right")]
        for whole in (np.floor, np.ceil)
    )
    return below + (above - below) * (rank % 1)


def _scale(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Float32 with `low` at 0 and `high` at 1, clipped; by pieces, to need no float64 copy."""
    scaled = np.empty(pixels.shape, np.float32)
    for start in range(0, len(pixels), 256):
        rows = pixels[start : start + 256].astype(np.float64)
        scaled[start : start + 256] = ((rows - low) / ((high - low) or 1)).clip(0, 1)
    return scaled
