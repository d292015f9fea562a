"""Every kind of file that `images.read` takes, every refusal, and what the writers leave behind."""

import io
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFile

from cxr import CxrError, UsageError, film, images
from cxr.files import replacing

RAMP = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))  # [48, 64], brighter to the right


def picture(mode="L"):
    return Image.fromarray(RAMP).convert(mode)


def refusal(path):
    """The message of the refusal, which is one line that begins with the path."""
    with pytest.raises(CxrError) as caught:
        images.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def bare_tiff(pixels, order="<", photometric=1):
    """An uncompressed 16-bit TIFF written by hand: Pillow writes one byte order and polarity."""
    height, width = pixels.shape
    data = pixels.astype(f"{order}u2").tobytes()
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, photometric), (273, 122)]
    tags += [(277, 1), (278, height), (279, len(data))]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    return head + entries + struct.pack(f"{order}I", 0) + data


# What is read


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif"])
def test_eight_bit_greyscale_is_value_over_255(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    picture().save(path)
    read = images.read(path)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.float32(RAMP) / 255)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_jpeg_of_any_colour_model_is_the_right_way_up(tmp_path, mode):
    path = tmp_path / "x.jpg"
    picture(mode).save(path, quality=95)
    np.testing.assert_allclose(images.read(path), RAMP / 255, atol=0.03)


def test_webp_is_read(tmp_path):
    path = tmp_path / "x.webp"
    picture("RGB").save(path, lossless=True)
    np.testing.assert_allclose(images.read(path), RAMP / 255, atol=0.01)


def test_content_decides_not_the_suffix(tmp_path):
    path = tmp_path / "x.jpg"
    picture().save(path, format="PNG")
    np.testing.assert_array_equal(images.read(path), np.float32(RAMP) / 255)


def test_colour_becomes_luma(tmp_path):
    path = tmp_path / "x.png"
    red = np.zeros((20, 20, 3), np.uint8)
    red[:, 10:, 0] = 255
    Image.fromarray(red).save(path)
    assert images.read(path)[0, -1] == pytest.approx(0.299, abs=0.005)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_black(tmp_path, mode):
    path = tmp_path / "x.png"
    half = picture(mode)
    alpha = np.full(RAMP.shape, 255, np.uint8)
    alpha[:24] = 0
    half.putalpha(Image.fromarray(alpha))
    half.save(path)
    read = images.read(path)
    assert (read[:24] == 0).all()
    np.testing.assert_allclose(read[24:], RAMP[24:] / 255, atol=0.01)


def test_palette_is_looked_up(tmp_path):
    path = tmp_path / "x.png"
    indexed = Image.fromarray(RAMP // 64, mode=None).convert("L")
    indexed = Image.frombytes("P", indexed.size, indexed.tobytes())
    indexed.putpalette([200, 200, 200, 10, 10, 10, 90, 90, 90, 0, 0, 0])
    indexed.save(path)
    expected = np.array([200, 10, 90, 0])[RAMP // 64] / 255
    np.testing.assert_allclose(images.read(path), expected, atol=0.005)


def test_transparent_palette_entry_is_black(tmp_path):
    path = tmp_path / "x.png"
    indexed = Image.frombytes("P", (64, 48), (RAMP // 128).tobytes())
    indexed.putpalette([200, 200, 200, 100, 100, 100])
    indexed.save(path, transparency=0)
    expected = np.array([0, 100])[RAMP // 128] / 255
    np.testing.assert_allclose(images.read(path), expected, atol=0.005)


def test_one_bit_is_black_and_white(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(RAMP > 127).save(path)
    np.testing.assert_array_equal(images.read(path), np.float32(RAMP > 127))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_sixteen_bits_are_stretched_not_clipped(tmp_path, suffix, bits):
    path = tmp_path / f"x.{suffix}"
    deep = np.linspace(0, 2**bits - 1, 48 * 64).reshape(48, 64)
    Image.fromarray(deep.astype(np.uint16)).save(path)
    np.testing.assert_allclose(images.read(path), deep / deep.max(), atol=0.002)


@pytest.mark.parametrize("order, photometric", [("<", 1), (">", 1), ("<", 0)])
def test_tiff_byte_order_and_polarity(tmp_path, order, photometric):
    path = tmp_path / "x.tif"
    path.write_bytes(bare_tiff(RAMP.astype(int) * 100, order, photometric))
    expected = RAMP / 255 if photometric else 1 - RAMP / 255
    np.testing.assert_allclose(images.read(path), expected, atol=0.002)


def test_float_tiff_is_stretched(tmp_path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.float32(RAMP) * 7 - 300).save(path)
    np.testing.assert_allclose(images.read(path), RAMP / 255, atol=0.002)


def test_one_hot_pixel_does_not_darken_a_deep_image(tmp_path):
    path = tmp_path / "x.png"
    deep = RAMP.astype(np.uint16) * 10
    deep[5, 5] = 65535
    Image.fromarray(deep).save(path)
    assert images.read(path)[20, 32] == pytest.approx(RAMP[20, 32] / 255, abs=0.01)


def test_a_deep_image_of_a_few_lit_pixels_keeps_them(tmp_path):
    path = tmp_path / "x.png"
    deep = np.zeros((48, 64), np.uint16)
    deep[5, 5] = 700
    Image.fromarray(deep).save(path)
    np.testing.assert_array_equal(images.read(path), deep / np.float32(700))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6  # hold it a quarter turn clockwise to see it upright
    picture().save(path, exif=exif)
    read = images.read(path)
    assert read.shape == (64, 48)
    np.testing.assert_allclose(read, np.rot90(RAMP, -1) / 255, atol=0.03)


def test_a_cameras_jpeg_with_a_preview_is_read(tmp_path):
    path = tmp_path / "x.jpg"
    preview = Image.fromarray(RAMP[::-1].copy()).resize((32, 24))
    picture().save(path, format="MPO", save_all=True, append_images=[preview])
    np.testing.assert_allclose(images.read(path), RAMP / 255, atol=0.03)


# DICOM


def write_dicom(path, pixels, syntax="1.2.840.10008.1.2.1", **attributes):
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"  # digital X-ray
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    meta.TransferSyntaxUID = syntax
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return dataset


@pytest.mark.parametrize("name", ["x.dcm", "IM00001"])
def test_dicom_is_told_by_its_content(tmp_path, name):
    write_dicom(tmp_path / name, RAMP.astype(np.uint16) * 16)
    np.testing.assert_allclose(images.read(tmp_path / name), RAMP / 255, atol=0.002)


def test_monochrome1_is_inverted(tmp_path):
    path = tmp_path / "x.dcm"
    write_dicom(path, RAMP.astype(np.uint16) * 16, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(images.read(path), 1 - RAMP / 255, atol=0.002)


def test_dicom_window_is_applied_after_the_rescale(tmp_path):
    path = tmp_path / "x.dcm"
    window = {"WindowCenter": 200, "WindowWidth": 100}
    write_dicom(path, RAMP.astype(np.int16), RescaleSlope=2, RescaleIntercept=-100, **window)
    expected = ((RAMP * 2.0 - 100 - 150) / 100).clip(0, 1)
    np.testing.assert_allclose(images.read(path), expected, atol=0.02)


def test_dicom_voi_lut_is_applied(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    path = tmp_path / "x.dcm"
    lut = pydicom.Dataset()
    lut.LUTDescriptor = [256, 0, 16]
    lut.add_new("LUTData", "OW", (np.arange(256, dtype=np.uint16) ** 2).tobytes())
    write_dicom(path, RAMP.astype(np.uint16), VOILUTSequence=[lut])
    np.testing.assert_allclose(images.read(path), (RAMP / 255) ** 2, atol=0.002)


def test_jpeg_inside_dicom_is_read(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    path, stream = tmp_path / "x.dcm", io.BytesIO()
    picture().save(stream, format="JPEG", quality=95)
    data = pydicom.encaps.encapsulate([stream.getvalue()])
    write_dicom(path, RAMP, pydicom.uid.JPEGBaseline8Bit, PixelData=data)
    np.testing.assert_allclose(images.read(path), RAMP / 255, atol=0.03)


def test_damaged_jpeg_inside_dicom_is_refused(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    path = tmp_path / "x.dcm"
    data = pydicom.encaps.encapsulate([b"1234"])
    write_dicom(path, RAMP, pydicom.uid.JPEGBaseline8Bit, PixelData=data)
    assert "damaged" in refusal(path)


def test_a_missing_dicom_decoder_is_named(tmp_path, monkeypatch):
    pydicom = pytest.importorskip("pydicom")
    monkeypatch.setattr(pydicom.pixels.decoders.JPEGLSLosslessDecoder, "_available", {})
    path = tmp_path / "x.dcm"
    data = pydicom.encaps.encapsulate([b"1234"])
    write_dicom(path, RAMP, pydicom.uid.JPEGLSLossless, PixelData=data)
    assert "JPEG-LS" in refusal(path) and "pip install 'cxrgan[dicom]'" in refusal(path)


def test_multi_frame_dicom_is_refused(tmp_path):
    path = tmp_path / "x.dcm"
    write_dicom(path, np.stack([RAMP, RAMP]), NumberOfFrames=2)
    assert "2 frames" in refusal(path)


def test_colour_dicom_is_refused(tmp_path):
    path = tmp_path / "x.dcm"
    rgb = np.stack([RAMP, RAMP[:, ::-1], RAMP], axis=-1).tobytes()
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    write_dicom(path, RAMP, PixelData=rgb, **colour)
    assert "colour" in refusal(path)


def test_dicom_without_an_image_is_refused(tmp_path):
    path = tmp_path / "x.dcm"
    dataset = write_dicom(path, RAMP)
    del dataset.PixelData
    dataset.save_as(path, enforce_file_format=True)
    assert "no image" in refusal(path)


@pytest.mark.parametrize("kept", [200, 0.5])
def test_truncated_dicom_is_refused(tmp_path, kept):
    path = tmp_path / "x.dcm"
    write_dicom(path, RAMP)
    data = path.read_bytes()
    path.write_bytes(data[: kept if kept > 1 else int(kept * len(data))])
    refusal(path)


def test_a_dicom_suffix_on_something_else_is_refused(tmp_path):
    pytest.importorskip("pydicom")
    path = tmp_path / "x.dcm"
    picture().save(path, format="PNG")
    assert "its content does not" in refusal(path)


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x.dcm"
    path.write_bytes(bytes(128) + b"DICM")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install 'cxrgan[dicom]'" in refusal(path)


# What is refused


def test_missing_file_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "nowhere.png")


def test_name_too_long_for_the_file_system_is_refused(tmp_path):
    assert "cannot be opened" in refusal(tmp_path / ("x" * 300))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    assert "not a regular file" in refusal(tmp_path / "x.png")


def test_folder_is_refused(tmp_path):
    assert "folder" in refusal(tmp_path)


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    picture().save(path)

    def forbid(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", forbid)  # chmod does not stop root
    assert "Permission denied" in refusal(path)


def test_zero_byte_file_is_refused(tmp_path):
    path = tmp_path / "x.png"
    path.touch()
    assert "empty" in refusal(path)


@pytest.mark.parametrize("content", [b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert "not an image" in refusal(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "webp"])
def test_truncated_file_is_refused_whatever_others_set(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = tmp_path / f"x.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (48, 64), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    refusal(path)


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    random = np.random.default_rng(0)
    whole = tmp_path / "whole"
    for kind in ("PNG", "JPEG", "TIFF", "GIF"):
        picture().save(whole, format=kind)
        for _ in range(60):
            data = np.frombuffer(whole.read_bytes(), np.uint8).copy()
            data[random.integers(0, min(400, data.size), 6)] = random.integers(0, 256, 6)
            path = tmp_path / "x"
            path.write_bytes(data.tobytes())
            try:
                images.read(path)
            except CxrError as error:
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_constant_image_is_refused(tmp_path):
    path = tmp_path / "x.png"
    Image.new("L", (64, 64), 77).save(path)
    assert "same value" in refusal(path)


@pytest.mark.parametrize("size", [(15, 64), (64, 15), (1, 1)])
def test_tiny_image_is_refused(tmp_path, size):
    path = tmp_path / "x.png"
    picture().resize(size).save(path)
    assert "at least 16" in refusal(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_float_image_with_nan_or_infinity_is_refused(tmp_path, value):
    path = tmp_path / "x.tif"
    pixels = RAMP.astype(np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(path)
    assert "NaN" in refusal(path)


@pytest.mark.parametrize("side", [8200, 10000, 20000])
def test_decompression_bomb_is_refused_without_decoding_it(tmp_path, side, recwarn):
    path = tmp_path / "x.bmp"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    path.write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header)
    assert "make it smaller" in refusal(path)
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_more_than_one_frame_is_refused(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    flipped = Image.fromarray(RAMP[:, ::-1].copy())
    picture().save(path, save_all=True, append_images=[flipped])
    assert "2 frames" in refusal(path)


# The square


def disc(height, width):
    y, x = np.mgrid[:height, :width]
    return np.float32(np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) < 60)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(160, 300), (300, 160), (201, 200)])
def test_a_circle_stays_a_circle(fit, shape):
    lit = images.square(disc(*shape), 64, fit) > 127
    assert lit.any(axis=0).sum() == pytest.approx(lit.any(axis=1).sum(), abs=1)
    side = min(shape) if fit == "crop" else max(shape)
    assert lit.sum() == pytest.approx(np.pi * (60 * 64 / side) ** 2, rel=0.05)


def test_crop_takes_the_centre():
    image = np.zeros((40, 100), np.float32)
    image[:, 30:70] = 1
    assert (images.square(image, 32, "crop") == 255).all()


def test_pad_adds_black_bars_on_the_short_sides():
    padded = images.square(np.ones((40, 80), np.float32), 32, "pad")
    assert (padded[:6] == 0).all() and (padded[-6:] == 0).all()
    assert (padded[10:22] == 255).all()


def test_shrinking_averages_instead_of_picking():
    stripes = np.tile(np.float32([0, 1]), (128, 64))
    assert np.ptp(images.square(stripes, 16)[:, 2:-2]) <= 2


def test_enlarging_is_smooth():
    step = np.repeat(np.float32([[0, 1]]), 16, axis=1).repeat(32, axis=0)
    row = images.square(step, 256)[128].astype(int)
    assert np.abs(np.diff(row)).max() < 60  # a blocky one would jump by 255


def test_an_unknown_fit_is_wrong_use():
    with pytest.raises(UsageError, match="squash"):
        images.square(disc(32, 32), 16, "squash")


def test_load_reads_and_squares(tmp_path):
    path = tmp_path / "x.png"
    picture().save(path)
    loaded = images.load(path, 48)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, RAMP[:, 8:56])


# Finding


def test_find_images_looks_below_and_skips_what_is_hidden(tmp_path):
    wanted = ["a.png", "b/c.JPG", "b/d.dcm", "e.tiff"]
    for name in [*wanted, ".hidden.png", "._a.png", ".cache/f.png", "notes.txt", "g.png/h.csv"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert images.find_images(tmp_path) == [tmp_path / name for name in wanted]


def test_find_images_takes_a_file_of_any_name(tmp_path):
    (tmp_path / "IM00001").touch()
    assert images.find_images(tmp_path / "IM00001") == [tmp_path / "IM00001"]


@pytest.mark.parametrize("name", ["", "nowhere", "x" * 300])
def test_find_images_says_when_there_is_nothing(tmp_path, name):
    with pytest.raises(CxrError, match="no image|no such") as caught:
        images.find_images(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path))


# Writing


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
def test_png_comes_back_as_written(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    film.write_png(tmp_path / "x.png", image)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "x.png")), image)
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    "kind, shown",
    [
        ("gif", [(0, 400), (60, 100), (120, 100), (255, 400)]),
        ("webp", [(0, 400), (60, 100), (120, 100), (255, 400), (120, 100), (60, 100)]),
    ],
)
def test_a_film_plays_for_ever_and_rests_at_both_ends(tmp_path, kind, shown):
    forth = [np.full((20, 30), value, np.uint8) for value in (0, 60, 120, 255)]
    film.write_film(tmp_path / f"x.{kind}", forth, 10)
    with Image.open(tmp_path / f"x.{kind}") as animation:
        assert animation.info["loop"] == 0
        for index, (grey, time) in enumerate(shown):
            animation.seek(index)
            animation.load()
            assert animation.convert("L").getpixel((5, 5)) == pytest.approx(grey, abs=2)
            assert animation.info["duration"] == time
        assert animation.n_frames == len(shown)


def test_gif_keeps_greys_grey_and_a_thin_red_line_red(tmp_path):
    frame = np.stack([RAMP] * 3, axis=-1)
    frame[20, 10:50] = (255, 96, 72)
    film.write_film(tmp_path / "x.gif", [frame, frame[::-1]], 10)
    with Image.open(tmp_path / "x.gif") as gif:
        for shown in (frame, frame[::-1]):
            found = np.array(gif.convert("RGB")).astype(int)
            assert np.abs(found - shown).max() <= 3  # of 64 greys
            assert np.ptp(found[shown[..., 0] == shown[..., 1]], axis=-1).max() == 0
            gif.seek(1)


def test_gif_of_one_frame_is_a_picture(tmp_path):
    film.write_film(tmp_path / "x.gif", [np.stack([RAMP] * 3, axis=-1)], 10)
    np.testing.assert_allclose(images.read(tmp_path / "x.gif"), RAMP / 255, atol=0.012)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    with pytest.raises(CxrError, match="cannot be written"):
        film.write_png(path, np.zeros((20, 20), np.float32))  # no PNG of floats
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", ["nowhere/x.png", "file/x.png"])
def test_writing_where_there_is_no_folder_says_so(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(CxrError, match="cannot be written"):
        film.write_png(tmp_path / place, RAMP)


def test_grid_lays_rows_and_columns_with_a_gap_below_their_heads():
    tiles = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1) * 40 + np.zeros((1, 1, 8, 8), np.uint8)
    sheet = film.grid(tiles, ("one", "", "three"))
    assert sheet.shape == (24 + 2 * 130 - 2, 3 * 130 - 2, 3) and sheet.dtype == np.uint8
    assert (sheet[24 + 130 :, 260:] == 200).all() and (sheet[24 : 24 + 128, :128] == 0).all()
    words = (sheet[:24] > 200).any((0, 2))
    assert words[:128].any() and words[260:].any() and not words[128:260].any()


def test_the_pixels_of_a_grid_stay_as_they_are():
    tile = np.random.default_rng(0).integers(0, 255, (1, 1, 64, 64), dtype=np.uint8)
    sheet = film.grid(tile, ("",))[24:, :, 0]
    assert np.array_equal(sheet[::2, ::2], tile[0, 0]) and np.array_equal(
        sheet[1::2, 1::2], tile[0, 0]
    )


def test_a_device_or_folder_is_never_replaced(tmp_path):
    with pytest.raises(CxrError, match="no file that could be replaced"):
        film.write_png(tmp_path, np.zeros((4, 4), np.uint8))
    assert tmp_path.is_dir()


@pytest.mark.parametrize("mark", [0, 65535])
def test_a_marker_of_one_percent_does_not_change_the_contrast(tmp_path, mark):
    deep = np.linspace(20000, 24000, 128 * 128).reshape(128, 128).astype(np.uint16)
    marked = deep.copy()
    marked[50:62, 50:63] = mark
    Image.fromarray(deep).save(tmp_path / "x.png")
    Image.fromarray(marked).save(tmp_path / "y.png")
    plain, found = images.read(tmp_path / "x.png"), images.read(tmp_path / "y.png")
    np.testing.assert_allclose(found[:50], plain[:50], atol=0.005)


@pytest.mark.parametrize("half", ["of the stream", "of the rows"])
def test_half_a_pixel_stream_of_a_png_is_refused(tmp_path, half):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    rows = b"".join(b"\0" + row.tobytes() for row in RAMP)
    stream = zlib.compress(rows)[:-9] if half == "of the stream" else zlib.compress(rows[: 24 * 65])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 48, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", stream)
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b""))
    refusal(path)


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "F"])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_loading_by_bands_equals_reading_the_whole(tmp_path, mode, fit):
    noise = np.random.default_rng(0).integers(0, 256, (600, 530, 4), np.uint8)
    pixels = {"L": noise[..., 0], "RGBA": noise, "F": np.float32(noise[..., 0])}.get(mode)
    pixels = np.uint16(noise[..., 0]) * 200 if pixels is None else pixels
    path = tmp_path / ("x.tif" if mode == "F" else "x.png")
    Image.fromarray(pixels).save(path)
    expected = images.square(images.read(path), 64, fit)
    np.testing.assert_array_equal(images.load(path, 64, fit), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_tiffs_are_turned_upright_as_shallow_ones(orientation, tmp_path):
    grey = np.arange(40 * 24, dtype=np.uint16).reshape(40, 24)
    tag = [(274, "H", 1, orientation, True)]
    colour = np.stack([grey * 60] * 3, -1)
    tifffile.imwrite(tmp_path / "deep.tif", colour, photometric="rgb", extratags=tag)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.uint8(grey // 4)).save(tmp_path / "x.tif", exif=exif)
    deep, x = images.read(tmp_path / "deep.tif"), images.read(tmp_path / "x.tif")
    assert deep.shape == x.shape and np.corrcoef(deep.ravel(), x.ravel())[0, 1] > 0.99
