"""CT windows: right values on synthetic DICOM and NIfTI, and clear refusals elsewhere."""

import logging
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pydicom
import pytest

from medclip_jax.data import check, datasets
from medclip_jax.errors import ConfigError, DataError
from medclip_jax.io import read
from medclip_jax.io.image import WINDOWS, Window, parse_window
from tests.support.dicom import film, save
from tests.support.reference import data_files

HOUNSFIELD = np.array([[-1024, -1000, -600, -160, 0, 40], [60, 80, 240, 400, 1300, 3000]])

FAR = ("0/1e-50", "1e39/1", "40/1e300")  # float32 has no such numbers


def ct(path: Path, values=HOUNSFIELD, **changes) -> Path:
    """A CT slice stored with intercept -1024 and a window of its own."""
    stored = (values + 1024).astype(np.uint16)
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024, "RescaleType": "HU"}
    window = {"WindowCenter": 0, "WindowWidth": 2000}
    return save(path, film(stored, **({"Modality": "CT"} | rescale | window | changes)))


def nifti(path: Path, voxels=HOUNSFIELD) -> Path:
    volume = np.ascontiguousarray(np.asarray(voxels)[::-1, ::-1].T)[:, :, None]  # as axial slices
    nibabel.Nifti1Image(volume.astype(np.int16), np.eye(4)).to_filename(path)
    return path


@pytest.mark.parametrize("window", [*WINDOWS, "40/80", "-12.5/7"])
def test_values_in_a_window(tmp_path, window):
    centre, width = parse_window(window)
    low = centre - width / 2
    expected = np.clip((HOUNSFIELD - low) / width, 0, 1)
    for path in (ct(tmp_path / "a.dcm"), nifti(tmp_path / "a.nii.gz")):
        np.testing.assert_allclose(read.read(path, window=window).pixels[0], expected, atol=1e-6)


def test_standard_windows():
    assert WINDOWS == {
        "brain": (40, 80),
        "lung": (-600, 1500),
        "soft_tissue": (40, 400),
        "bone": (400, 1800),
    }
    assert parse_window("") is None and parse_window(None) is None
    assert parse_window("-600/1500") == Window(-600, 1500)
    assert parse_window("lung,coronal") == parse_window("coronal,lung") == WINDOWS["lung"]
    assert parse_window("sagittal") is None
    for text in ("liver", "40", "40/0", "40/-80", "nan/80", "40/inf", "40/80/2", *FAR):
        with pytest.raises(ConfigError, match="config.data.window is .* such as 40/80"):
            parse_window(text)


def test_a_series_in_a_window(tmp_path):
    for i in range(2):
        ct(tmp_path / f"{i}.dcm", SeriesInstanceUID="1.2", InstanceNumber=i + 1)
    pixels = read.read(tmp_path, window="brain").pixels
    assert pixels.shape == (2, 2, 6)
    np.testing.assert_allclose(pixels[1, 1, :2], [0.75, 1])


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"Modality": "MR"}, "it is not CT"),
        ({"RescaleSlope": None}, "no rescale slope"),
        ({"RescaleType": "EDW"}, "its rescale type is another"),
    ],
)
def test_dicom_without_hounsfield_units(tmp_path, changes, reason):
    path = ct(tmp_path / "a.dcm", **changes)
    assert read.read(path).pixels.shape == (1, 2, 6)
    with pytest.raises(DataError, match=f"no Hounsfield units .*{reason}.*config.data.window"):
        read.read(path, window="lung")


def test_other_formats_without_hounsfield_units(tmp_path, caplog):
    PIL.Image.fromarray(np.eye(5, dtype=np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png has no Hounsfield units \(PNG\)"):
        read.read(tmp_path / "a.png", window="lung")
    voxels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(DataError, match="its voxels have 8 bits"):
        read.read(tmp_path / "a.nii", window="lung")
    with caplog.at_level(logging.WARNING):
        read.read(nifti(tmp_path / "b.nii", HOUNSFIELD + 1024), window="lung")
    assert "b.nii has no value below 0: are these Hounsfield units?" in caplog.text


def test_a_data_set_in_a_window(tmp_path):
    """Records carry the window to whoever reads them; a data set of PNG files is refused."""
    root = tmp_path / "ct"
    for part in ("train/good", "test/good", "test/bleed"):
        (root / part).mkdir(parents=True)
        for i in range(2):
            noise = np.random.default_rng(len(part) + i).integers(0, 80, HOUNSFIELD.shape)
            ct(root / part / f"{i}.dcm", noise)
    loaded = datasets.load("folder", root, tmp_path / "cache", window="brain")
    for record, pixels in read.read_all(loaded, 6):
        assert record.window == "brain"
        whole = read.read(record.path, window="brain").pixels[0]
        np.testing.assert_array_equal(pixels, read.fit(whole, 6))
        assert whole.max() > 0.8  # in the file's own window at most .54
    contrast = {
        window: next(
            row.detail
            for row in check.run("folder", root, tmp_path / "cache", 2, window=window)
            if row.subject == "contrast"
        )
        for window in ("", "brain")
    }
    assert contrast[""] < "median 0.05" < "median 0.5" < contrast["brain"]
    PIL.Image.fromarray(np.eye(5, dtype=np.uint8)).save(root / "train" / "good" / "c.png")
    with pytest.raises(DataError, match=r"c\.png has no Hounsfield units"):
        datasets.load("folder", root, tmp_path / "cache", window="brain")


@pytest.mark.slow
@pytest.mark.parametrize("path", data_files("dicom/good/*"))
def test_real_dicom(path):
    """Real CT gives what pydicom says its values are; everything else is refused."""
    ds = pydicom.dcmread(path, force=True)
    if ds.get("Modality") != "CT" or ds.get("RescaleSlope") is None:
        with pytest.raises(DataError, match="no Hounsfield units|without an image|not a DICOM"):
            read.read(path, window="soft_tissue")
        return
    pixels = read.read(path, window="soft_tissue").pixels
    stored = ds.pixel_array.astype(np.float64).reshape(pixels.shape)
    values = stored * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    np.testing.assert_allclose(pixels, np.clip((values + 160) / 400, 0, 1), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("path", data_files("volumes/*flair.nii.gz"))
def test_real_nifti(path):
    """No CT, but its values are windowed as nibabel reads them."""
    values = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    expected = np.transpose(np.clip((values - 75) / 50, 0, 1), (2, 1, 0))[:, ::-1, ::-1]
    pixels = read.read(path, window="100/50").pixels
    np.testing.assert_allclose(pixels, expected, atol=1e-5)
