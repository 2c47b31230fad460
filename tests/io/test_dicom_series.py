"""Folders of DICOM slices as one volume."""

import numpy as np
import pytest
from pydicom.dataset import Dataset

from medclip_jax.errors import DataError
from medclip_jax.io import dicom, read
from tests.support.dicom import film, ramp, save


def slice_at(z: float, number: int, series="1.2", **elements) -> Dataset:
    return film(
        np.full((4, 5), 100 + round(10 * z), np.int16),
        SeriesInstanceUID=series,
        InstanceNumber=number,
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        ImagePositionPatient=[0, 0, z],
        PixelSpacing=[0.5, 0.5],
        **elements,
    )


def test_series_is_sorted_along_its_normal(tmp_path):
    for i, z in enumerate((3.0, -1.5, 0.0, 1.5)):  # names and numbers say otherwise
        save(tmp_path / f"{i}", slice_at(z, i))
    (tmp_path / "notes.txt").write_text("not an image")
    image = read.read(tmp_path)
    np.testing.assert_allclose(image.pixels[:, 0, 0], [0, 15 / 45, 30 / 45, 1], atol=1e-6)
    assert image.spacing == (0.5, 0.5) and image.meta == {"format": "DICOM", "modality": "MR"}
    np.testing.assert_array_equal(read.read(tmp_path, frames=(1, 3)).pixels, image.pixels[1:3])


@pytest.mark.parametrize("other, mm", [(0.50001, 0.5), (0.51, None), (None, None)])
def test_a_series_has_the_spacing_that_its_files_agree_on(tmp_path, other, mm):
    """A scanner may write the same one rounded otherwise."""
    save(tmp_path / "a", slice_at(0, 0))
    ds = slice_at(1, 1)
    ds.PixelSpacing = [other, other]
    if other is None:
        del ds.PixelSpacing
    save(tmp_path / "b", ds)
    assert read.read(tmp_path).spacing == ((mm, mm) if mm else None)


def test_series_without_positions_is_sorted_by_number(tmp_path):
    for i, (z, number) in enumerate(((3, 10), (1, 2), (2, 9))):
        ds = slice_at(z, number)
        del ds.ImagePositionPatient
        save(tmp_path / f"{i}.dcm", ds)
    result = read.read(tmp_path).pixels[:, 0, 0]
    np.testing.assert_allclose(result, [0, 0.5, 1], atol=1e-6)
    ds = slice_at(0, 0)
    del ds.ImagePositionPatient, ds.InstanceNumber
    save(tmp_path / "3.dcm", ds)
    with pytest.raises(DataError, match="without usable position and instance number"):
        read.read(tmp_path)


def test_series_with_windows_keeps_each(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}", slice_at(i, i, WindowCenter=100.5 + 10 * i, WindowWidth=21))
    np.testing.assert_allclose(read.read(tmp_path).pixels, 0.5, atol=1e-6)


def test_folders_that_are_not_one_series(tmp_path):
    with pytest.raises(DataError, match="holds no DICOM image"):
        read.read(tmp_path)
    save(tmp_path / "a", slice_at(0, 0))
    save(tmp_path / "b", slice_at(1, 1, series="1.3"))
    with pytest.raises(DataError, match="holds 2 series"):
        read.read(tmp_path)
    save(tmp_path / "b", film(ramp(9, 9), SeriesInstanceUID="1.2", InstanceNumber=4))
    with pytest.raises(DataError, match="several sizes"):
        read.read(tmp_path)


def test_a_series_of_too_many_pixels_is_refused_before_any_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "MAX_VOXELS", 50)
    monkeypatch.setattr(dicom, "_open", lambda *_: pytest.fail("opened"))
    for i in range(3):
        save(tmp_path / f"{i}", slice_at(i, i))
    with pytest.raises(DataError, match="has 60 pixels and at most 50"):
        read.read(tmp_path)
