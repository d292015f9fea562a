"""DICOM as hospitals write it: what is missing, empty, wrong or odd in the header."""

import numpy as np
import pytest
from test_images import RAMP, refusal, write_dicom

from cxr import CxrError, images
from cxr.data import cache

pydicom = pytest.importorskip("pydicom")
DEEP = RAMP.astype(np.uint16) * 16


def read(path, pixels=DEEP, **attributes):
    write_dicom(path, pixels, **attributes)
    return images.read(path)


@pytest.mark.parametrize("window", [(1, 0), (0.5, 0.9), (-9000, 10)])
def test_a_window_that_shows_nothing_is_not_used(tmp_path, window, capsys):
    found = read(tmp_path / "x.dcm", WindowCenter=window[0], WindowWidth=window[1])
    np.testing.assert_allclose(found, RAMP / 255, atol=0.002)
    assert "is not used" in capsys.readouterr().err


def test_empty_rescale_is_none(tmp_path):
    found = read(tmp_path / "x.dcm", RescaleSlope=None, RescaleIntercept=None)
    np.testing.assert_allclose(found, RAMP / 255, atol=0.002)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_left_out_of_the_contrast(tmp_path, kind):
    pixels = DEEP.copy()
    pixels[:12] = 65535
    write_dicom(tmp_path / "x.dcm", pixels, PhotometricInterpretation=kind)
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    dataset.add_new("PixelPaddingValue", "US", 65535)
    dataset.save_as(tmp_path / "x.dcm")
    found = images.read(tmp_path / "x.dcm")
    expected = RAMP / 255 if kind == "MONOCHROME2" else 1 - RAMP / 255
    assert (found[:12] == 0).all()
    np.testing.assert_allclose(found[12:], expected[12:], atol=0.002)


def test_pixels_become_square_and_the_spacing_is_told(tmp_path):
    assert read(tmp_path / "x.dcm", PixelSpacing=[0.4, 0.2]).shape == (96, 64)
    assert images.pixel_spacing(tmp_path / "x.dcm") == [0.4, 0.2]


def test_eight_bits_without_a_window_are_value_over_255(tmp_path):
    np.testing.assert_array_equal(read(tmp_path / "x.dcm", RAMP), np.float32(RAMP / 255))


def test_grey_stored_as_colour_is_read(tmp_path):
    rgb = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    found = read(tmp_path / "x.dcm", RAMP, PixelData=np.stack([RAMP] * 3, -1).tobytes(), **rgb)
    np.testing.assert_allclose(found, RAMP / 255, atol=0.005)


def test_junk_above_the_stored_bits_is_ignored(tmp_path):
    junk = DEEP | np.uint16(0x3000)
    found = read(tmp_path / "x.dcm", junk, BitsStored=12, HighBit=11)
    np.testing.assert_allclose(found, RAMP / 255, atol=0.002)


def test_signed_pixels_are_read(tmp_path):
    found = read(tmp_path / "x.dcm", DEEP.astype(np.int16) - 2000)
    np.testing.assert_allclose(found, RAMP / 255, atol=0.002)


def test_signed_big_endian_pixels_are_read(tmp_path):
    syntax = pydicom.uid.ExplicitVRBigEndian
    write_dicom(tmp_path / "x.dcm", DEEP.astype(">i2") - 2000, syntax)
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    stored = (DEEP.astype(np.int16) - 2000).astype(">i2")
    dataset.PixelData = stored.tobytes()
    dataset.save_as(tmp_path / "x.dcm")
    np.testing.assert_allclose(images.read(tmp_path / "x.dcm"), RAMP / 255, atol=0.002)


def test_a_file_without_preamble_is_read(tmp_path):
    whole = write_dicom(tmp_path / "x.dcm", DEEP)
    bare = pydicom.Dataset()
    bare.update({element.tag: element for element in whole})
    bare.save_as(tmp_path / "y", implicit_vr=True, little_endian=True, enforce_file_format=False)
    np.testing.assert_allclose(images.read(tmp_path / "y"), RAMP / 255, atol=0.002)


@pytest.mark.parametrize("samples", [1, 3])
def test_more_pixels_than_the_header_says_are_refused_and_end_no_folder(tmp_path, samples):
    write_dicom(tmp_path / "x.dcm", RAMP, PixelData=bytes(3 * RAMP.size), SamplesPerPixel=samples)
    refusal(tmp_path / "x.dcm")
    write_dicom(tmp_path / "y.dcm", RAMP)
    pixels, bad = cache.packed([str(tmp_path / "x.dcm"), str(tmp_path / "y.dcm")], 32, "crop")
    assert len(pixels) == 1 and list(bad) == [0]


def test_a_deflated_bomb_is_refused(tmp_path):
    path = tmp_path / "x.dcm"
    syntax = pydicom.uid.DeflatedExplicitVRLittleEndian
    write_dicom(path, RAMP, syntax, PixelData=bytes(2**28 + 2**20))
    with pytest.raises(CxrError, match="unpacks to more than"):
        images.read(path)


def test_a_sigmoid_window_bends_the_greys(tmp_path):
    window = {"WindowCenter": 2040, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"}
    found = read(tmp_path / "x.dcm", **window)
    bent = 1 / (1 + np.exp(-4 * (DEEP - 2040.0) / 1000))
    expected = (bent - bent.min()) / (bent.max() - bent.min())
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_of_several_windows_the_first_is_used(tmp_path):
    several = read(tmp_path / "x.dcm", WindowCenter=[1000, 3000], WindowWidth=[800, 200])
    first = read(tmp_path / "y.dcm", WindowCenter=1000, WindowWidth=800)
    np.testing.assert_array_equal(several, first)


def test_a_pixel_aspect_ratio_makes_pixels_square(tmp_path):
    assert read(tmp_path / "x.dcm", PixelAspectRatio=[2, 1]).shape == (96, 64)


def test_a_range_of_padding_is_black(tmp_path):
    pixels = DEEP.copy()
    pixels[:6], pixels[6:12] = 65000, 65500
    write_dicom(tmp_path / "x.dcm", pixels)
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    dataset.add_new("PixelPaddingValue", "US", 65535)
    dataset.add_new("PixelPaddingRangeLimit", "US", 65000)
    dataset.save_as(tmp_path / "x.dcm")
    found = images.read(tmp_path / "x.dcm")
    assert (found[:12] == 0).all()
    np.testing.assert_allclose(found[12:], RAMP[12:] / 255, atol=0.002)
