"""DICOM against pydicom's arrays in the reference set, and files of others."""

import csv
import warnings

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from medclip_jax.errors import DataError
from medclip_jax.io import image, read
from tests.support.dicom import CASES, EXPECTED, file, film, ramp, save
from tests.support.reference import data_files

ARRAYS = np.load(EXPECTED.with_suffix(".npz"))
GOOD = [k for k, v in CASES.items() if v["status"] == "readable"]
BAD = {  # what the message must say
    "bad_missing_pixeldata": "without an image (no PixelData)",
    "bad_truncated_pixels": "cannot be decoded (ValueError)",
    "bad_truncated_header": "without an image",
    "bad_text_renamed": "no DICM prefix",
    "bad_empty": "is empty",
    "bad_rows_mismatch": "cannot be decoded (ValueError)",
    "bad_unsupported_jpeg2000": "JPEG 2000",
}


def item(**elements) -> Dataset:
    ds = Dataset()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


# ---------------------------------------------------------------- reference


@pytest.mark.parametrize("name", GOOD)
def test_grey_values_of_the_reference(name):
    """A window where there is one, else the stretch by least and largest; colour by BT.601."""
    image = read.read(file(name))
    if f"{name}__luma601" in ARRAYS:
        wanted = ARRAYS[f"{name}__luma601"] / 255
    else:
        kind = "unit_voi" if f"{name}__unit_voi" in ARRAYS else "unit_minmax"
        wanted = ARRAYS[f"{name}__{kind}"]
    wanted = wanted if wanted.ndim == 3 else wanted[None]
    assert image.pixels.dtype == np.float32
    np.testing.assert_allclose(image.pixels, wanted, atol=1e-6)
    assert set(image.meta) == {"format", "modality"}


@pytest.mark.parametrize("name", list(BAD))
def test_malformed_files_are_told_apart(name):
    with pytest.raises(DataError) as caught:
        read.read(file(name))
    message = str(caught.value)
    assert BAD[name] in message and str(file(name)) in message and "\n" not in message


@pytest.mark.parametrize("path", data_files("dicom/good/*") + data_files("dicom/bad/*"))
@pytest.mark.filterwarnings("ignore:The .0028,0004. :UserWarning")  # a fault of one file
def test_files_of_others(path):
    """What the index calls good is read as pydicom reads it; what it calls bad may be refused."""
    with (path.parents[1] / "index.csv").open() as lines:
        row = next(r for r in csv.DictReader(lines) if r["file"].endswith(f"/{path.name}"))
    try:
        image = read.read(path)
    except DataError as error:
        assert path.parent.name == "bad" or row["decode"] != "ok", error
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert image.pixels.shape == (int(row["frames"] or 1), int(row["rows"]), int(row["cols"]))
    assert np.isfinite(image.pixels).all() and 0 <= image.pixels.min() < image.pixels.max() <= 1
    if row["ts"] and row["pi"].startswith("MONO"):
        with warnings.catch_warnings(action="ignore"):
            ds = pydicom.dcmread(path, force=True)
            stored = ds.pixel_array
            peer = pydicom.pixels.apply_modality_lut(stored, ds)
            if "WindowWidth" not in ds and "VOILUTSequence" not in ds:
                unit = (peer - peer.min()) / (np.ptp(peer))
            else:
                peer = pydicom.pixels.apply_voi_lut(peer.astype(np.int32), ds).astype(np.float64)
                unit = None
        sign = -1 if row["pi"] == "MONOCHROME1" else 1
        if unit is not None:
            wanted = unit if sign > 0 else 1 - unit
            np.testing.assert_allclose(image.pixels.squeeze(), wanted, atol=1e-6)
        else:  # pydicom's range after a window depends on the header: compare up to a line
            together = np.corrcoef(peer.ravel(), image.pixels.ravel())[0, 1]
            assert together * sign > 0.9999


# ---------------------------------------------------------------- grey values


def test_modality_table_and_rescale(tmp_path):
    pixels = ramp(4, 4, np.uint8)
    table = item(LUTDescriptor=[16, 0, 16], LUTData=[int(x) for x in np.arange(16) ** 2])
    table["LUTDescriptor"].VR, table["LUTData"].VR, table.ModalityLUTType = "US", "US", "US"
    result = read.read(save(tmp_path / "a.dcm", film(pixels, ModalityLUTSequence=[table])))
    np.testing.assert_allclose(result.pixels[0], (pixels / 15.0) ** 2, atol=1e-6)
    window = dict(RescaleSlope="2", RescaleIntercept="-10", WindowCenter="0", WindowWidth="20")
    window["VOILUTFunction"] = "LINEAR_EXACT"
    result = read.read(save(tmp_path / "b.dcm", film(pixels, **window)))
    np.testing.assert_allclose(
        result.pixels[0], np.clip((2.0 * pixels - 10) / 20 + 0.5, 0, 1), atol=1e-6
    )


def test_enhanced_frames_have_windows_of_their_own(tmp_path):
    pixels = np.stack([ramp(), ramp()])
    groups = [
        item(
            FrameVOILUTSequence=[item(WindowCenter=c, WindowWidth=11)],
            PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.25])],
        )
        for c in (10, 30)
    ]
    path = save(tmp_path / "a.dcm", film(pixels, PerFrameFunctionalGroupsSequence=groups))
    image = read.read(path)
    for frame, center in zip(image.pixels, (10, 30), strict=True):
        wanted = np.clip((ramp() - (center - 0.5)) / 10 + 0.5, 0, 1)
        np.testing.assert_allclose(frame, wanted, atol=1e-6)
    assert image.spacing == (0.5, 0.25)
    np.testing.assert_array_equal(read.read(path, frames=(1, 2)).pixels, image.pixels[1:])


def palette(words: bytes, entries=256, segmented=False) -> dict:
    prefix = "Segmented" if segmented else ""
    result = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        result[f"{colour}PaletteColorLookupTableDescriptor"] = [entries, 0, 16]
        result[f"{prefix}{colour}PaletteColorLookupTableData"] = words
    return result


def test_palettes(tmp_path):
    pixels = ramp(4, 4, np.uint8)
    table = (np.arange(256, dtype=np.uint16) * 257)[::-1]
    result = read.read(save(tmp_path / "a.dcm", film(pixels, **palette(table.tobytes()))))
    np.testing.assert_allclose(result.pixels[0], 1 - pixels / 255.0, atol=1e-6)
    line = np.array([0, 1, 0, 1, 255, 255 * 257], np.uint16).tobytes()  # one entry 0, then a line
    result = read.read(save(tmp_path / "b.dcm", film(pixels, **palette(line, segmented=True))))
    np.testing.assert_allclose(result.pixels[0], pixels / 255.0, atol=1e-6)


def test_a_palette_that_unrolls_for_ever_is_refused(tmp_path):
    bomb = np.array([0, 1, 0, *[1, 65535, 9, 1, 65535, 0] * 400], np.uint16).tobytes()
    pixels = ramp(4, 4, np.uint8)
    path = save(tmp_path / "a.dcm", film(pixels, **palette(bomb, segmented=True)))
    with pytest.raises(DataError, match="palette is larger"):
        read.read(path)
    again = np.array([0, 1, 0, 2, 1, 0, 0], np.uint16).tobytes()  # repeats itself
    path = save(tmp_path / "b.dcm", film(pixels, **palette(again, segmented=True)))
    with pytest.raises(DataError, match="indirect segments"):
        read.read(path)


# ---------------------------------------------------------------- spacing and identity


@pytest.mark.parametrize(
    "elements, wanted",
    [
        ({}, None),
        ({"PixelSpacing": [0.4, 0.3]}, (0.4, 0.3)),
        ({"ImagerPixelSpacing": [0.2, 0.2]}, (0.2, 0.2)),
        (
            {"ImagerPixelSpacing": [0.2, 0.2], "EstimatedRadiographicMagnificationFactor": "1.25"},
            (0.16, 0.16),
        ),
        ({"PixelSpacing": [0, 0.3]}, None),
    ],
)
def test_spacing_is_row_then_column_in_mm(tmp_path, elements, wanted):
    result = read.read(save(tmp_path / "a.dcm", film(ramp(), **elements))).spacing
    assert result is wanted is None or result == pytest.approx(wanted)


@pytest.mark.parametrize("written", [b"0.5", b"0,5\\0,5", b"0.5\\x", b"0.5\\0.5\\0.5", b"", b"\\"])
@pytest.mark.parametrize("name", ["PixelSpacing", "ImagerPixelSpacing"])
def test_a_spacing_that_is_no_two_numbers_is_unknown_and_the_pixels_are_read(
    tmp_path, name, written
):
    path = save(tmp_path / "a.dcm", film(ramp(), **{name: ["1111.111", "2222.222"]}))
    raw, known = path.read_bytes(), b"1111.111\\2222.222"
    assert raw.count(known) == 1
    path.write_bytes(raw.replace(known, written.ljust(len(known))))
    found = read.read(path)
    assert found.spacing is None and np.ptp(found.pixels) == 1


def test_ultrasound_regions_give_spacing_where_they_agree(tmp_path):
    def region(delta):
        return item(
            RegionSpatialFormat=1,
            PhysicalUnitsXDirection=3,
            PhysicalUnitsYDirection=3,
            PhysicalDeltaX=delta,
            PhysicalDeltaY=0.02,
        )

    one = film(ramp(), SequenceOfUltrasoundRegions=[region(0.01), region(0.01)])
    two = film(ramp(), SequenceOfUltrasoundRegions=[region(0.01), region(0.03)])
    assert read.read(save(tmp_path / "a.dcm", one)).spacing == pytest.approx((0.2, 0.1))
    assert read.read(save(tmp_path / "b.dcm", two)).spacing is None


def test_the_patient_stays_in_the_file(tmp_path, caplog, capfd, recwarn):
    """Name and number in every place a message might quote."""
    ok = film(ramp(), InstitutionName="DOE^JANE", Modality="DOE^JANE")
    image = read.read(save(tmp_path / "a.dcm", ok))
    assert image.meta == {"format": "DICOM", "modality": "OT"} and "DOE" not in str(image)
    broken = [
        {"PhotometricInterpretation": "DOE^JANE"},
        {"VOILUTFunction": "DOE^JANE", "WindowCenter": 1, "WindowWidth": 9},
        {"PixelData": b"DOE^JANE"},
        {"SamplesPerPixel": 4711},
    ]
    said = []
    for elements in broken:
        path = save(tmp_path / "b.dcm", film(ramp(), **elements))
        with pytest.raises(DataError) as caught:
            read.read(path)
        said.append(f"{caught.value} {caught.value.__cause__}")
    whole = (tmp_path / "a.dcm").read_bytes()
    for tag in (b"\x28\x00\x10\x00US", b"\x28\x00\x02\x00US"):  # a name where a number belongs
        at = whole.index(tag)
        (tmp_path / "c.dcm").write_bytes(whole[: at + 4] + b"IS\x08\x00DOE^JANE" + whole[at + 10 :])
        with pytest.raises(DataError) as caught:
            read.read(tmp_path / "c.dcm")
        said.append(f"{caught.value} {caught.value.__cause__}")
    everything = " ".join(said) + caplog.text + "".join(capfd.readouterr())
    assert len(said) == 6 and "DOE" not in everything and " 4711 " not in said[2]


def test_the_same_on_threads():
    from concurrent.futures import ThreadPoolExecutor

    paths = [file(name) for name in GOOD] * 3
    alone = [read.read(path).pixels for path in paths]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(alone, pool.map(lambda p: read.read(p).pixels, paths), strict=True):
            np.testing.assert_array_equal(one, other)


def voi_lut(first: int, bits: int, vr: str = "US", count: int = 4096) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", vr, [count, first, bits])
    item.add_new("LUTData", "OW", np.arange(count, dtype=np.uint16).tobytes())
    return [item]


def test_a_voi_lut_that_starts_below_zero_in_implicit_vr(tmp_path):
    """The descriptor's first value is signed after a rescale, but implicit VR does not say so."""
    stored = np.linspace(0, 3000, 64).reshape(8, 8).astype(np.uint16)
    ds = film(stored, Modality="CT", RescaleSlope=1, RescaleIntercept=-1024, BitsStored=12)
    ds.HighBit, ds.VOILUTSequence = 11, voi_lut(-1024, 12, "SS")
    ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    pixels = read.read(save(tmp_path / "a.dcm", ds)).pixels[0]
    np.testing.assert_allclose(pixels, stored / 4095, atol=1e-6)


def test_a_table_that_starts_high_serves_dark_rows_as_bright_ones(tmp_path, monkeypatch):
    """Rows are converted in bands; what the table's start means is decided for the whole frame."""
    stored = np.repeat(np.array([[0], [39_000], [41_000], [44_095]], np.uint16), 4, axis=1)
    path = save(tmp_path / "a.dcm", film(stored, VOILUTSequence=voi_lut(40_000, 12)))
    monkeypatch.setattr(image, "BAND", 4)
    shown = read.read(path).pixels[0]
    np.testing.assert_allclose(shown[:, 0], [0, 0, 1000 / 4095, 1], atol=1e-6)
    assert (shown == shown[:, :1]).all()


def test_a_voi_lut_whose_descriptor_says_more_bits_than_it_has(tmp_path):
    stored = np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)
    for bits in (12, 16):
        path = save(tmp_path / "a.dcm", film(stored, VOILUTSequence=voi_lut(0, bits)))
        np.testing.assert_allclose(read.read(path).pixels[0], stored / 4095, atol=1e-6)


@pytest.mark.parametrize("kind", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 1000, "WindowWidth": 2001}])
def test_padding_is_black_and_does_not_widen_the_range(tmp_path, kind, window):
    stored = np.linspace(0, 2000, 64).reshape(8, 8).astype(np.int16)
    plain = film(stored, PhotometricInterpretation=kind, **window)
    expected = read.read(save(tmp_path / "a.dcm", plain)).pixels[0]
    padded = stored.copy()
    padded[0] = -32768
    padded[1] = -32760
    more = {"PixelPaddingValue": -32768, "PixelPaddingRangeLimit": -32760}
    ds = film(padded, PhotometricInterpretation=kind, **window)
    for name, value in more.items():
        ds.add_new(name, "SS", value)
    ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    pixels = read.read(save(tmp_path / "b.dcm", ds)).pixels[0]
    assert not pixels[:2].any()
    if window:
        np.testing.assert_allclose(pixels[2:], expected[2:], atol=1e-6)
    else:  # stretched over what is left
        left = (stored[2:] - stored[2:].min()) / np.ptp(stored[2:])
        left = left if kind == "MONOCHROME2" else 1 - left
        np.testing.assert_allclose(pixels[2:], left, atol=1e-6)
