"""Read a DICOM radiograph: stored values, rescale, window, padding, square pixels."""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cxr import CxrError

REQUIRED = ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation")
COLOUR = 0.05  # of the range: channels that differ by more are a colour picture
CLIPPED = 0.99  # a window that drives this share of the pixels to its two ends shows nothing


def read(path: Path, check_size: Callable[[int, int], None]) -> tuple:
    """(places [H, W], table [n], counts [n], aspect, notes): a pixel's grey value is table[place].

    `counts` says how many pixels outside the padding have each place; padding is NaN in the table.
    `counts` is None where the table holds final values of 8 bits. `check_size(width, height)`
    raises CxrError for a size that is refused. The window is DICOM PS3.3 C.11.2.
    """
    dataset = _open(path)
    _check_header(dataset, check_size)
    stored = _stored(dataset)
    places, values = _indexed(stored)
    table, notes, final = _grey(places, values, dataset)
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    if inverted:
        table = 255 - table if final else -table
    padding = _padding(values, dataset)
    counts = histogram(places, len(values))
    counts[padding] = 0
    if not counts.any():
        raise CxrError("every pixel is padding; this is no X-ray")
    table[padding] = 0 if final else np.nan
    return places, table, None if final else counts, _aspect(dataset), notes


def histogram(places: np.ndarray, size: int) -> np.ndarray:
    """How often each of 0 ... size - 1 stands in [H, W]; by bands, as bincount copies to int64."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(places), 256):
        counts += np.bincount(places[start : start + 256].ravel(), minlength=size)
    return counts


def decoded_bytes(path: Path) -> int:
    """Bytes of the pixels that the header tells; raises what a damaged file raises."""
    header = _open(path, stop_before_pixels=True)
    samples = int(header.get("SamplesPerPixel") or 1)
    return header.Rows * header.Columns * samples * header.BitsAllocated // 8


def spacing(path: Path) -> list[float] | None:
    """Millimetres [vertical, horizontal] between pixels of the file as stored, if it says so."""
    return _spacing(_open(path, stop_before_pixels=True))


def size_and_depth(path: Path) -> tuple[tuple[int, int], str]:
    """Width and height, and the depth in words; raises what a damaged file raises."""
    header = _open(path, stop_before_pixels=True)
    kind = "colour" if int(header.get("SamplesPerPixel") or 1) > 1 else "grey"
    return (header.Columns, header.Rows), f"DICOM, {header.BitsStored} bits, {kind}"


def patient_id(path: Path) -> str | None:
    """The PatientID of a DICOM file, if it has one. Raises CxrError, and what a damaged file raises."""
    header = _open(path, stop_before_pixels=True, specific_tags=["PatientID"])
    return str(header.get("PatientID") or "").strip() or None


def _spacing(dataset) -> list[float] | None:
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        pair = _numbers(dataset, name)
        if len(pair) == 2 and 0 < min(pair) <= max(pair) < np.inf:
            return pair
    return None


def _aspect(dataset) -> float:
    """Height of a pixel over its width; 1 where the file does not say."""
    pair = _spacing(dataset) or _numbers(dataset, "PixelAspectRatio")
    return pair[0] / pair[1] if len(pair) == 2 and 0 < min(pair) <= max(pair) < np.inf else 1.0


def _open(path: Path, **how):
    try:
        import pydicom
    except ImportError:
        raise CxrError("reading DICOM needs pydicom: pip install 'cxrgan[dicom]'") from None
    _check_inflated(path, pydicom)
    dataset = pydicom.dcmread(path, force=True, **how)
    known = {"SOPClassUID", "PixelData", "Rows", "Modality"} & set(dataset.dir())
    if not known and not dataset.preamble:
        raise CxrError("its name says DICOM, its content does not")
    if "TransferSyntaxUID" not in getattr(dataset, "file_meta", {}):
        implicit = dataset.original_encoding[0]
        name = "ImplicitVRLittleEndian" if implicit else "ExplicitVRLittleEndian"
        dataset.ensure_file_meta()
        dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, name)
    return dataset


def _check_inflated(path: Path, pydicom) -> None:
    """A deflated file of a few kilobytes may hold gigabytes: count them before they are kept."""
    with open(path, "rb") as file:
        try:
            pydicom.filereader.read_preamble(file, force=True)
            meta = pydicom.filereader._read_file_meta_info(file)
        except Exception:  # noqa: BLE001 - damaged, which reading the whole file will say
            return
        if meta.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
            return
        packer, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while data := packer.unconsumed_tail or file.read(1 << 16):
            size += len(packer.decompress(data, 1 << 20))
            if size > 2**28:
                raise CxrError("unpacks to more than 256 MiB; save it without compression")
            if packer.eof:
                return


def _check_header(dataset, check_size) -> None:
    """Refuses what is no single greyscale frame; raises CxrError."""
    if "PixelData" not in dataset:
        named = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
        kind = getattr(named, "name", "") or dataset.get("Modality", "")
        raise CxrError(f"this DICOM file holds no image ({kind or 'no pixel data'})")
    missing = [name for name in REQUIRED if dataset.get(name) in (None, "")]
    if missing:
        raise CxrError(f"its header does not say {', '.join(missing)}; export it again")
    check_size(dataset.Columns, dataset.Rows)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise CxrError(f"holds {frames} frames or pages; save the one to look at on its own")
    kind, samples = dataset.PhotometricInterpretation, int(dataset.get("SamplesPerPixel") or 1)
    grey = kind.startswith("MONOCHROME") or kind == "PALETTE COLOR"
    if samples != (1 if grey else 3):
        raise CxrError(f"the header says {kind} with {samples} samples a pixel; export it again")
    one = dataset.Rows * dataset.Columns * samples * dataset.BitsAllocated // 8
    if not dataset.file_meta.TransferSyntaxUID.is_compressed and len(dataset.PixelData) >= 2 * one:
        raise CxrError("its pixel data hold more frames or channels than its header says")


def _stored(dataset) -> np.ndarray:
    """The stored values [H, W]; colour whose channels agree becomes one channel."""
    from pydicom.pixels import apply_color_lut

    try:
        pixels = dataset.pixel_array
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        name = dataset.file_meta.TransferSyntaxUID.name
        raise CxrError(f"{name} needs another decoder: pip install 'cxrgan[dicom]'") from None
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    del dataset.PixelData
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    if pixels.shape[:2] != (dataset.Rows, dataset.Columns) or pixels.shape[2:] not in ((), (3,)):
        raise CxrError(f"its pixel data are {pixels.shape}, which its header does not say")
    if pixels.ndim == 3:
        if (
            kind.startswith("YBR_FULL")
            and dataset.file_meta.TransferSyntaxUID.is_compressed is False
        ):
            from pydicom.pixels import convert_color_space

            pixels = convert_color_space(pixels, kind, "RGB")
        spread = pixels.max(2).astype(np.int64) - pixels.min(2)
        if np.percentile(spread, 99) > COLOUR * np.iinfo(pixels.dtype).max:
            raise CxrError(f"colour DICOM ({kind}) is no radiograph; export a greyscale one")
        return pixels[..., 1]
    bits = pixels.dtype.itemsize * 8
    extra = bits - int(dataset.get("BitsStored") or bits)
    if pixels.dtype.kind in "iu" and 0 < extra < bits and kind != "PALETTE COLOR":
        pixels = pixels << extra
        pixels >>= extra  # overlays or junk may lie in the high bits
    return pixels


def _indexed(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places [H, W], values [n]) with values[places] == stored."""
    if stored.dtype.kind == "f" or stored.dtype.itemsize > 2:
        values, places = np.unique(stored, return_inverse=True)
        return places.reshape(stored.shape), values
    limits = np.iinfo(stored.dtype)
    values = np.arange(limits.min, limits.max + 1).astype(stored.dtype)
    if stored.dtype.kind == "u":
        return stored, values
    flipped = limits.bits - 1  # the sign bit turned makes places from signed values
    unsigned = stored.view(f"u{stored.dtype.itemsize}")
    return unsigned ^ unsigned.dtype.type(1 << flipped), values


def _grey(places: np.ndarray, values: np.ndarray, dataset) -> tuple[np.ndarray, list[str], bool]:
    """(table, notes, whether it is plain 8-bit): modality and VOI applied to the values."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    for name in ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
        if name in dataset and not _numbers(dataset, name):
            delattr(dataset, name)
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        if name in dataset and not (dataset[name].value and "LUTData" in dataset[name].value[0]):
            delattr(dataset, name)
    if ("RescaleSlope" in dataset) != ("RescaleIntercept" in dataset):
        dataset.RescaleSlope = dataset.get("RescaleSlope", 1)
        dataset.RescaleIntercept = dataset.get("RescaleIntercept", 0)
    if dataset.get("RescaleSlope") == 0:
        del dataset.RescaleSlope, dataset.RescaleIntercept
    plain = apply_modality_lut(values, dataset).astype(np.float64)
    lut, widths = "VOILUTSequence" in dataset, _numbers(dataset, "WindowWidth")
    if not lut and not (widths and "WindowCenter" in dataset):
        same = np.array_equal(plain, values) and values.dtype == np.uint8
        return plain, [], same and dataset.get("BitsStored") == 8
    if not lut and widths[0] < (
        1 if dataset.get("VOILUTFunction") in (None, "", "LINEAR") else 1e-9
    ):
        return plain, [f"its window of width {widths[0]:g} is not used"], False
    shown = apply_voi_lut(apply_modality_lut(values, dataset), dataset).astype(np.float64)
    counts = histogram(places, len(values)) * ~_padding(values, dataset)
    ends = (shown == shown.min()) | (shown == shown.max())
    if counts[ends].sum() >= CLIPPED * counts.sum() and (counts > 0).sum() > 2:
        return plain, ["its window clips nearly every pixel and is not used"], False
    return shown, [], False


def _padding(values: np.ndarray, dataset) -> np.ndarray:
    """Which stored values stand for no picture, bool [n]."""
    first = _numbers(dataset, "PixelPaddingValue")
    if not first:
        return np.zeros(len(values), bool)
    last = _numbers(dataset, "PixelPaddingRangeLimit") or first
    wrap = np.array([first[0], last[0]]).astype(np.int64)
    if values.dtype.kind == "i":  # some write the unsigned form of a negative number
        wrap = wrap.astype(values.dtype)
    return (values >= wrap.min()) & (values <= wrap.max())


def _numbers(dataset, name: str) -> list[float]:
    """The numbers of an element; empty if it is absent, empty or no number."""
    value = dataset.get(name)
    try:
        many = [value] if isinstance(value, (int, float, str)) else list(value or [])
        return [float(number) for number in many]
    except (TypeError, ValueError):
        return []
