"""Where a DICOM header and its data disagree, the data are right."""

import io

import numpy as np
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import convert_color_space

from medclip_jax.errors import DataError
from medclip_jax.io import dicom_header, image, read
from tests.support.dicom import film, ramp, save

LUMA = np.array(image.LUMA)


def picture(height=32, width=48) -> np.ndarray:
    """Colour from black to white with a tinted corner."""
    grey = np.linspace(0, 255, height * width).reshape(height, width)
    rgb = np.repeat(grey[..., None], 3, -1)
    rgb[:8, -8:] = 200, 30, 30
    return rgb.astype(np.uint8)


def colour(pixels: np.ndarray, kind: str, **elements) -> Dataset:
    ds = film(pixels[..., 0], SamplesPerPixel=3, PhotometricInterpretation=kind)
    ds.PlanarConfiguration = 0
    ds.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def packed(ds: Dataset, syntax: str, stream: bytes) -> Dataset:
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([stream])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return ds


def jpeg(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=98, **options)
    return buffer.getvalue()


def without_jfif(stream: bytes) -> bytes:
    return stream[:2] + stream[4 + int.from_bytes(stream[4:6], "big") :]


@pytest.mark.parametrize("kind", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("marker", [True, False])
def test_a_jpeg_is_decoded_by_its_own_stream(tmp_path, kind, subsampling, marker):
    pixels = picture()
    stream = jpeg(pixels, subsampling=subsampling)
    ds = packed(
        colour(pixels, kind), uid.JPEGBaseline8Bit, stream if marker else without_jfif(stream)
    )
    result = read.read(save(tmp_path / "a.dcm", ds)).pixels[0]
    np.testing.assert_allclose(result, pixels @ LUMA / 255, atol=0.05)


@pytest.mark.parametrize("kind", ["RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT"])
def test_rgb_bytes_are_rgb_under_any_header(tmp_path, kind):
    pixels = picture()
    result = read.read(save(tmp_path / "a.dcm", colour(pixels, kind))).pixels[0]
    np.testing.assert_allclose(result, pixels @ LUMA / 255, atol=1e-6)


def test_ybr_bytes_are_ybr_also_subsampled(tmp_path):
    pixels = picture()
    ybr = convert_color_space(pixels, "RGB", "YBR_FULL")
    result = read.read(save(tmp_path / "a.dcm", colour(ybr, "YBR_FULL"))).pixels[0]
    np.testing.assert_allclose(result, pixels @ LUMA / 255, atol=0.01)
    half = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], -1)
    ds = colour(ybr, "YBR_FULL_422", PixelData=half.tobytes())
    result = read.read(save(tmp_path / "b.dcm", ds)).pixels[0]
    np.testing.assert_allclose(result, pixels @ LUMA / 255, atol=0.02)


@pytest.mark.parametrize("kind", ["RGB", "YBR_RCT", "YBR_FULL"])
def test_jpeg_2000_undoes_its_own_transform(tmp_path, kind):
    pixels, buffer = picture(), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG2000", no_jp2=True, mct=1)
    ds = packed(colour(pixels, kind), uid.JPEG2000Lossless, buffer.getvalue())
    result = read.read(save(tmp_path / "a.dcm", ds)).pixels[0]
    np.testing.assert_allclose(result, pixels @ LUMA / 255, atol=1e-6)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_stream_that_was_cut_is_an_error(tmp_path, share):
    grey = picture()[..., 0].copy()
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG2000", no_jp2=True)
    whole = {uid.JPEGBaseline8Bit: jpeg(grey), uid.JPEG2000Lossless: buffer.getvalue()}
    for syntax, stream in whole.items():
        ds = packed(film(grey), syntax, stream + b"\0\0")  # padding is no fault
        assert read.read(save(tmp_path / "a.dcm", ds)).pixels.shape == (1, *grey.shape)
        ds = packed(film(grey), syntax, stream[: int(share * len(stream))])
        with pytest.raises(DataError, match="truncated|no size"):
            read.read(save(tmp_path / "a.dcm", ds))


def test_values_above_unused_low_bits(tmp_path):
    values = ramp(8, 8) * 60
    left = film((values << 4).astype(np.uint16) | 5, BitsStored=12, HighBit=15)
    wrong = film(values.astype(np.uint16), BitsStored=12, HighBit=15)  # lies at bit 0
    for ds in (left, wrong):
        result = read.read(save(tmp_path / "a.dcm", ds)).pixels[0]
        np.testing.assert_allclose(result, values / values.max(), atol=1e-6)


def test_overlays_in_unused_high_bits_are_not_seen(tmp_path):
    values = ramp(8, 8) * 60
    ds = film(values.astype(np.uint16) | 0xA000, BitsStored=12, HighBit=11)
    result = read.read(save(tmp_path / "a.dcm", ds)).pixels[0]
    np.testing.assert_allclose(result, values / values.max(), atol=1e-6)


@pytest.mark.parametrize("bits, largest", [(8, 255), (16, 255), (16, 65535)])
@pytest.mark.parametrize("first", [0, 10])
def test_palettes_of_any_depth(tmp_path, bits, largest, first):
    table = np.linspace(0, largest, 64).round().astype(np.uint8 if bits == 8 else np.uint16)
    ds = film(ramp(8, 8, np.uint8) + np.uint8(first), PhotometricInterpretation="PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [64, first, bits])
        setattr(ds, f"{name}PaletteColorLookupTableData", table.tobytes())
    result = read.read(save(tmp_path / "a.dcm", ds)).pixels[0]
    np.testing.assert_allclose(result.ravel(), table / largest, atol=1e-5)


def test_a_palette_of_65536_entries(tmp_path):
    ds = film(ramp(8, 8) * 1000, PhotometricInterpretation="PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [0, 0, 16])
        table = np.arange(1 << 16, dtype=np.uint16)
        setattr(ds, f"{name}PaletteColorLookupTableData", table.tobytes())
    result = read.read(save(tmp_path / "a.dcm", ds)).pixels[0]
    np.testing.assert_allclose(result, ramp(8, 8) * 1000 / 65535, atol=1e-6)


@pytest.mark.parametrize(
    "window, expected",
    [
        ({"WindowCenter": 0.5, "WindowWidth": 0.5}, lambda v: np.clip((v - 0.25) / 0.5, 0, 1)),
        ({"WindowCenter": [9, 0.5], "WindowWidth": [0, 2]}, lambda v: np.clip(v + 0.5, 0, 1)),
        ({"WindowCenter": 9, "WindowWidth": 0}, lambda v: v / v.max()),
        (
            {"WindowCenter": 0.5, "WindowWidth": 0.4, "VOILUTFunction": "SIGMOID"},
            lambda v: 1 / (1 + np.exp(-4 * (v - 0.5) / 0.4)),
        ),
    ],
)
def test_narrow_windows_and_those_without_width(tmp_path, window, expected):
    values = ramp(8, 8) / 63
    ds = film(ramp(8, 8), RescaleSlope=f"{1 / 63:.12g}", RescaleIntercept=0, **window)
    result = read.read(save(tmp_path / "a.dcm", ds))
    np.testing.assert_allclose(result.pixels[0], expected(values), atol=1e-5)
    assert result.range


def test_one_bit_frames_off_byte_borders(tmp_path):
    bits = np.random.default_rng(0).random((5, 5, 7)) > 0.5
    raw = np.packbits(bits.ravel(), bitorder="little").tobytes()
    ds = film(bits.astype(np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0)
    ds.PixelData = raw + bytes(len(raw) % 2)
    np.testing.assert_array_equal(read.read(save(tmp_path / "a.dcm", ds)).pixels, bits)


def test_a_spike_without_window(tmp_path):
    values = np.random.default_rng(0).integers(100, 400, (64, 64)).astype(np.uint16)
    values[3, 3] = 65535
    result = read.read(save(tmp_path / "a.dcm", film(values)))
    clean = np.clip((values - 100.0) / 299, 0, 1)
    assert np.abs(result.pixels[0] - clean).max() < 0.02 and "spikes" in result.range


def test_more_frames_or_elements_than_an_image_needs(tmp_path, monkeypatch):
    ds = film(np.zeros((10_001, 1, 1), np.uint8))
    with pytest.raises(DataError, match="has 10,001 frames and at most 10,000"):
        read.read(save(tmp_path / "a.dcm", ds))
    monkeypatch.setattr(dicom_header, "MAX_READS", 1000)
    ds = film(ramp())
    ds.VOILUTSequence = [Dataset() for _ in range(1000)]
    with pytest.raises(DataError, match="far more header elements"):
        read.read(save(tmp_path / "a.dcm", ds))
    ds["VOILUTSequence"].is_undefined_length = True
    with pytest.raises(DataError, match="far more header elements"):
        read.read(save(tmp_path / "a.dcm", ds))
