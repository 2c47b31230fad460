"""Odd but legal DICOM by value: bit depths, tables, padding, rescaling of frames, colour, cuts."""

import io
import re
import struct
import warnings

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_windowing

from medclip_jax.errors import DataError
from medclip_jax.io import read
from tests.io.test_dicom_trust import colour, jpeg, packed, picture
from tests.support.dicom import film, ramp, save

V = ramp(8, 8).astype(int) * 60
WORDS = V.astype(np.uint16)
RNG = np.random.default_rng(0)
LUMA = np.array([0.299, 0.587, 0.114])


def shown(tmp_path, ds: Dataset) -> np.ndarray:
    pixels = read.read(save(tmp_path / "a.dcm", ds)).pixels
    return pixels[0] if len(pixels) == 1 else pixels


def stretched(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / np.ptp(values)


def linear(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 100, "WindowWidth": 1000}])
def test_twelve_bits_with_anything_above(tmp_path, signed, window):
    values = V - 2000 if signed else V
    raw = (values & 0xFFF).astype(np.uint16) | (RNG.integers(0, 16, V.shape) << 12).astype("u2")
    ds = film(raw.view(np.int16) if signed else raw, BitsStored=12, HighBit=11, **window)
    expected = linear(values, 100, 1000) if window else stretched(values)
    np.testing.assert_allclose(shown(tmp_path, ds), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
@pytest.mark.parametrize("kind_of_grey", ["MONOCHROME1", "MONOCHROME2"])
def test_every_allocation(tmp_path, kind, kind_of_grey):
    values = (V // 30 - (60 if np.dtype(kind).kind == "i" else 0)).astype(kind)
    ds = film(values, PhotometricInterpretation=kind_of_grey)
    ds.RescaleSlope, ds.RescaleIntercept = -0.5, 3
    expected = stretched(apply_modality_lut(values, ds))
    expected = 1 - expected if kind_of_grey == "MONOCHROME1" else expected
    np.testing.assert_allclose(shown(tmp_path, ds), expected, atol=1e-6)


@pytest.mark.parametrize("name, kind", [("Float", np.float32), ("DoubleFloat", np.float64)])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 10, "WindowWidth": 20}])
def test_float_pixels_state_no_bits(tmp_path, name, kind, window):
    values = (V / 7 - 3).astype(kind)
    ds = film(values, **window)
    for absent in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(ds, absent)
    setattr(ds, f"{name}PixelData", values.tobytes())
    expected = linear(values, 10, 20) if window else stretched(values)
    np.testing.assert_allclose(shown(tmp_path, ds), expected, atol=1e-6)


@pytest.mark.parametrize("slope", [0, "", 3])
def test_a_slope_of_nothing_leaves_the_values(tmp_path, slope):
    ds = film(WORDS, RescaleSlope=slope, RescaleIntercept=-5)
    np.testing.assert_allclose(shown(tmp_path, ds), stretched(V), atol=1e-6)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("slope, intercept", [(1, 0), (2, -1000), (0.5, 300)])
def test_windows_as_pydicom_applies_them(tmp_path, function, slope, intercept):
    ds = film(WORDS, WindowCenter=1800.5, WindowWidth=900, VOILUTFunction=function)
    ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
    peer = apply_windowing(apply_modality_lut(WORDS, ds), ds)
    low, high = intercept, 65535 * slope + intercept
    np.testing.assert_allclose(shown(tmp_path, ds), (peer - low) / (high - low), atol=1e-5)


def table(entries: int, first: int, bits: int, data: np.ndarray, kind: str = "US") -> Dataset:
    item = Dataset()
    item.add(DataElement(0x00283002, kind, [entries, first, bits]))
    item.add(DataElement(0x00283006, "OW", data.tobytes()))
    item.ModalityLUTType = "US"
    return item


WHOLE = (65535 - np.arange(1 << 16)).astype(np.uint16)
SQUARES = (np.arange(200) ** 2 // 10).astype(np.uint16)  # up to 3960: 12 bits
TABLES = {  # stored, table, expected of (VOI table, modality table)
    "65536 entries": (ramp(8, 8) * 1000, table(0, 0, 16, WHOLE), WHOLE[V // 60 * 1000] / 65535),
    "from 10": (
        WORDS // 60,
        table(200, 10, 12, SQUARES),
        SQUARES[np.clip(V // 60 - 10, 0, 199)] / 4095,
    ),
    "from 40000": (
        WORDS // 60 + np.uint16(40000),
        table(200, 40000, 12, SQUARES),
        SQUARES[V // 60] / 4095,
    ),
    "from -20, signed": (
        (V // 60 - 30).astype(np.int16),
        table(200, -20, 12, SQUARES, "SS"),
        SQUARES[np.clip(V // 60 - 10, 0, 199)] / 4095,
    ),
    "from -20, as unsigned": (
        (V // 60 - 30).astype(np.int16),
        table(200, 65516, 12, SQUARES),
        SQUARES[np.clip(V // 60 - 10, 0, 199)] / 4095,
    ),
    "8 bits in bytes": (WORDS // 60, table(64, 0, 8, np.arange(64, dtype=np.uint8)), V / 60 / 255),
    "8 bits in words": (WORDS // 60, table(64, 0, 8, np.arange(64, dtype=np.uint16)), V / 60 / 255),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("place", ["VOI", "Modality"])
def test_look_up_tables(tmp_path, name, place):
    stored, item, expected = TABLES[name]
    ds = film(stored.astype(stored.dtype), **{f"{place}LUTSequence": [item]})
    if place == "Modality":  # its values have no range of their own
        expected = stretched(expected)
    np.testing.assert_allclose(shown(tmp_path, ds), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["SS", "US"])
@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian])
@pytest.mark.parametrize("limit", [None, -990])
def test_signed_padding_and_its_range(tmp_path, kind, syntax, limit):
    values = (V - 1000).astype(np.int16)
    values[0, 0] = values[7, 7] = -2000
    ds = film(values)
    ds.file_meta.TransferSyntaxUID = syntax
    for tag, number in ((0x00280120, -2000), (0x00280121, limit)):
        if number is not None:
            ds.add(DataElement(tag, kind, number if kind == "SS" else number + 65536))
    outside = values <= (limit or -2000)
    body = values[~outside].astype(int)
    expected = np.where(outside, 0, (values - body.min()) / np.ptp(body))
    np.testing.assert_allclose(shown(tmp_path, ds), expected, atol=1e-6)


def group(slope: float, intercept: float, *window: float) -> Dataset:
    frame, rescale, voi = Dataset(), Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = slope, intercept, "HU"
    frame.PixelValueTransformationSequence = [rescale]
    if window:
        voi.WindowCenter, voi.WindowWidth = window
        frame.FrameVOILUTSequence = [voi]
    return frame


def test_frames_with_a_rescale_of_their_own(tmp_path):
    ds = film(np.stack([WORDS, WORDS]))
    ds.PerFrameFunctionalGroupsSequence = [group(1, 0), group(2, -500)]
    both = np.stack([V, 2 * V - 500])
    np.testing.assert_allclose(shown(tmp_path, ds), stretched(both), atol=1e-6)
    ds.PerFrameFunctionalGroupsSequence = [group(1, 0, 2000, 1000), group(2, -500, 1000, 500)]
    expected = np.stack([linear(V, 2000, 1000), linear(2 * V - 500, 1000, 500)])
    np.testing.assert_allclose(shown(tmp_path, ds), expected, atol=1e-6)
    del ds.PerFrameFunctionalGroupsSequence
    ds.SharedFunctionalGroupsSequence = [group(2, -500, 1000, 500)]
    np.testing.assert_allclose(shown(tmp_path, ds), np.stack([expected[1]] * 2), atol=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
def test_colour_by_planes_and_frames(tmp_path, bits):
    frames = RNG.integers(0, 1 << bits, (2, 6, 10, 3)).astype(f"u{bits // 8}")
    planes = np.moveaxis(frames, 3, 1)
    for stored, planar in ((frames, 0), (planes, 1)):
        ds = colour(frames[0], "RGB", NumberOfFrames=2, PlanarConfiguration=planar)
        ds.BitsAllocated = ds.BitsStored = bits
        ds.HighBit, ds.PixelData = bits - 1, stored.tobytes()
        np.testing.assert_allclose(shown(tmp_path, ds), frames @ LUMA / (2**bits - 1), atol=1e-5)


@pytest.mark.parametrize("width", [8, 16])
def test_segmented_palettes(tmp_path, width):
    """A discrete segment of two entries, then a line to the last."""
    kind, last = (np.uint8, 252) if width == 8 else (np.uint16, 64_500)
    segments = np.array([0, 2, 0, last // 63, 1, 62, last], kind)
    ds = film(ramp(8, 8, np.uint8), PhotometricInterpretation="PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [64, 0, width])
        data = segments.tobytes()
        setattr(ds, f"Segmented{name}PaletteColorLookupTableData", data + bytes(len(data) % 2))
    expected = np.linspace(0, last, 64).reshape(8, 8) / (2**width - 1)
    np.testing.assert_allclose(shown(tmp_path, ds), expected, atol=0.005)


@pytest.mark.parametrize("surplus", [1, 101])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_lengths_and_bytes_behind_the_pixels(tmp_path, surplus):
    values = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    ds = film(values, PixelData=values.tobytes() + bytes(surplus))
    np.testing.assert_allclose(shown(tmp_path, ds), stretched(values.astype(int)), atol=1e-6)
    ds.PixelData = values.tobytes()[:-5]
    with pytest.raises(DataError, match="damaged or truncated"):
        shown(tmp_path, ds)


@pytest.mark.parametrize(
    "syntax",
    [uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian, uid.ExplicitVRBigEndian]
    + [uid.RLELossless, uid.JPEGLSLossless],
)
@pytest.mark.parametrize("signed", [False, True])
def test_transfer_syntaxes(tmp_path, syntax, signed):
    values = (V - 2000 if signed else V).astype(np.int16 if signed else np.uint16)
    ds = film(values)
    if syntax == uid.ExplicitVRBigEndian:
        ds.PixelData = values.astype(values.dtype.newbyteorder(">")).tobytes()
        ds["PixelData"].VR = "OW"
    if syntax.is_encapsulated:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds.compress(syntax, generate_instance_uid=False)
    ds.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(tmp_path / "a.dcm", ds, enforce_file_format=True)
    found = read.read(tmp_path / "a.dcm").pixels[0]
    np.testing.assert_allclose(found, stretched(values.astype(int)), atol=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_rle_that_was_cut(tmp_path, share):
    ds = film(RNG.integers(0, 4000, (32, 48)).astype(np.uint16))
    ds.compress(uid.RLELossless, generate_instance_uid=False)
    stream = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
    cut = stream[: int(share * len(stream)) // 2 * 2]
    with pytest.raises(DataError, match="RLE Lossless pixels that cannot be decoded"):
        shown(tmp_path, packed(ds, uid.RLELossless, cut))


@pytest.mark.parametrize("interval", [1, 2, 9, 100])
def test_a_jpeg_that_was_cut_between_restart_intervals_and_closed(tmp_path, interval):
    noise = np.random.default_rng(1).integers(60, 159, (80, 112)).astype(np.uint8)
    stream = jpeg(noise, restart_marker_blocks=1)
    marks = [m.start() for m in re.finditer(b"\xff[\xd0-\xd7]", stream)]
    (tmp_path / "a.jpg").write_bytes(stream)
    assert read.read(tmp_path / "a.jpg").pixels.shape == (1, 80, 112)
    (tmp_path / "a.jpg").write_bytes(stream[: marks[interval]] + b"\xff\xd9")
    with pytest.raises(DataError, match="truncated"):
        read.read(tmp_path / "a.jpg")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.95])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("bands", [1, 3])
def test_a_jpeg_that_was_cut_and_closed(tmp_path, share, options, bands):
    """Decoders fill what is missing with grey and say nothing."""
    noise = RNG.integers(0, 99, (80, 112, 3)).astype(np.uint8) + 60
    pixels = noise if bands == 3 else noise[..., 0].copy()
    stream = jpeg(pixels, **options)
    cut = stream[: int(share * len(stream))] + b"\xff\xd9"
    ds = colour(pixels, "YBR_FULL_422") if bands == 3 else film(pixels)
    assert shown(tmp_path, packed(ds, uid.JPEGBaseline8Bit, stream)).shape == (80, 112)
    with pytest.raises(DataError, match="damaged or truncated"):
        shown(tmp_path, packed(ds, uid.JPEGBaseline8Bit, cut))
    (tmp_path / "a.jpg").write_bytes(stream)
    assert read.read(tmp_path / "a.jpg").pixels.shape == (1, 80, 112)
    (tmp_path / "a.jpg").write_bytes(cut)
    with pytest.raises(DataError, match=r"a\.jpg stops before its last pixel: it is truncated"):
        read.read(tmp_path / "a.jpg")


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_other_streams_that_were_cut_and_closed(tmp_path, share):
    grey, buffer = picture()[..., 0].copy(), io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG2000", no_jp2=True)
    ls = film(grey)
    ls.compress(uid.JPEGLSLossless, generate_instance_uid=False)
    streams = {
        uid.JPEG2000Lossless: buffer.getvalue(),
        uid.JPEGLSLossless: next(pydicom.encaps.generate_frames(ls.PixelData, number_of_frames=1)),
    }
    for syntax, stream in streams.items():
        cut = stream[: int(share * len(stream))] + b"\xff\xd9"
        with pytest.raises(DataError, match="truncated"):
            shown(tmp_path, packed(film(grey), syntax, cut))


def test_a_jpeg_whose_last_pixel_is_grey_is_whole(tmp_path):
    Image.new("L", (40, 40), 128).save(tmp_path / "a.jpg")
    np.testing.assert_allclose(read.read(tmp_path / "a.jpg").pixels, 128 / 255, atol=1e-6)


@pytest.mark.parametrize(
    "apart, spacing", [(1.0000001, (0.2, 0.3)), (1.00005, (0.2, 0.3)), (1.1, None)]
)
def test_ultrasound_regions_a_rounding_apart(tmp_path, apart, spacing):
    regions = []
    for factor in (1, apart):
        region = Dataset()
        region.RegionSpatialFormat = 1
        region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3  # cm
        region.PhysicalDeltaX, region.PhysicalDeltaY = 0.03 * factor, -0.02 * factor
        regions.append(region)
    ds = film(WORDS, Modality="US", SequenceOfUltrasoundRegions=regions)
    found = read.read(save(tmp_path / "a.dcm", ds)).spacing
    assert found == (pytest.approx(spacing) if spacing else None)


def scans_of(stream: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes `count` times more."""
    last = stream.rindex(b"\xff\xda")
    return stream[:-2] + stream[last:-2] * count + b"\xff\xd9"


def jpeg_tiff(stream: bytes, height: int, width: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 7), (262, 1), (273, 122), (277, 1)]
    tags += [(278, height), (279, len(stream))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<4sIH", b"II*\0", 8, len(tags)) + entries + bytes(4) + stream


@pytest.mark.parametrize("suffix", ["jpg", "dcm", "tif"])
def test_a_jpeg_of_very_many_scans_is_not_decoded(tmp_path, suffix):
    """Each scan takes as long as the whole picture, and a few bytes."""
    grey = picture()[..., 0].copy()
    stream, path = jpeg(grey, progressive=True), tmp_path / f"a.{suffix}"

    def pixels(count):
        content = scans_of(stream, count)
        if suffix == "dcm":
            ds = packed(film(grey), uid.JPEGBaseline8Bit, content)
            return shown(tmp_path, ds)
        path.write_bytes(content if suffix == "jpg" else jpeg_tiff(content, *grey.shape))
        return read.read(path).pixels[0]

    whole = np.asarray(Image.open(io.BytesIO(stream))) / 255
    np.testing.assert_allclose(pixels(0), whole, atol=1e-6)
    with pytest.raises(DataError, match="a JPEG of 20[0-9] scans and at most 100 are decoded"):
        pixels(200)
