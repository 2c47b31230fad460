"""Which files are images, and which slices are one series."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid

from medclip_jax.errors import DataError
from medclip_jax.inference import inputs, pseudonyms
from medclip_jax.io import nifti, pillow
from tests.support.predicting import change, dicom, noise, png, walked

MAMMOGRAM = "1.2.840.10008.5.1.4.1.1.1.2"


def test_results_of_this_program_are_no_images(tmp_path):
    import nibabel

    png(tmp_path / "in" / "scan.png")
    out = tmp_path / "in" / "results"
    out.mkdir()
    for name, pixels in {
        "overlay": noise(0, (9, 9, 3)),
        "map": noise().astype(np.uint16),
        "cam": noise(1, (1, 1)),
    }.items():
        (out / f"renamed_{name}.png").write_bytes(pillow.encode_png(pixels))
        assert np.array_equal(np.asarray(Image.open(out / f"renamed_{name}.png")), pixels)
    nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)).to_filename(
        tmp_path / "volume.nii.gz"
    )
    nifti.write_nifti(out / "v.nii.gz", tmp_path / "volume.nii.gz", np.zeros((6, 5, 4), np.uint16))
    change(dicom(out / "capture.dcm"), Manufacturer="medclip_jax")
    ours = {"Manufacturer": "medclip_jax", "SOPClassUID": uid.SegmentationStorage}
    change(dicom(out / "seg.dcm"), **ours)
    for named in ("in", "in/**/*", "in/**/*.png"):
        assert walked(tmp_path / named) == ([("in/scan.png",)], {}), named
    named = [tmp_path / "in" / "scan.png", *sorted(out.iterdir())]  # as a shell expands in/*
    names, refused = walked(*named)
    assert names == [("scan.png",)] and set(refused.values()) == {inputs.OURS}
    assert len(refused) == 6
    with pytest.raises(DataError, match="no image there"):
        walked(out)


@pytest.mark.parametrize(
    ("storage", "rows", "reason"),
    [
        (uid.MediaStorageDirectoryStorage, False, "DICOMDIR"),
        (uid.ComprehensiveSRStorage, False, "Comprehensive SR Storage"),
        (uid.KeyObjectSelectionDocumentStorage, False, "Key Object Selection"),
        (uid.GrayscaleSoftcopyPresentationStateStorage, False, "Presentation State"),
        (uid.RTStructureSetStorage, False, "RT Structure Set"),
        (uid.RTDoseStorage, True, "RT Dose"),
        (uid.RTPlanStorage, False, "RT Plan"),
        (uid.SegmentationStorage, True, "Segmentation Storage"),
        (uid.SurfaceSegmentationStorage, False, "Surface Segmentation"),
        (uid.ParametricMapStorage, True, "Parametric Map"),
        (uid.EncapsulatedPDFStorage, False, "Encapsulated PDF"),
        (uid.TwelveLeadECGWaveformStorage, False, "ECG"),
        (uid.MRSpectroscopyStorage, True, "Spectroscopy"),
        (uid.SpatialRegistrationStorage, False, "Registration"),
        (uid.RawDataStorage, False, "Raw Data"),
        ("1.2.826.0.1.77.9", False, "without rows"),
    ],
)
def test_dicom_objects_that_are_no_images(tmp_path, storage, rows, reason):
    dicom(tmp_path / "in" / "image.dcm")
    for name in ("other.dcm", "OTHER"):
        path = change(dicom(tmp_path / "in" / name, 7), SOPClassUID=str(storage))
        if not rows:
            change(path, Rows=None, Columns=None, PixelData=None)
    names, refused = walked(tmp_path / "in")
    assert names == [("in/image.dcm",)] and set(refused) == {"in/other.dcm", "in/OTHER"}
    assert all(text.startswith("not an image (") and reason in text for text in refused.values())


@pytest.mark.parametrize(
    "storage",
    [
        *(uid.CTImageStorage, uid.SecondaryCaptureImageStorage, uid.UltrasoundImageStorage),
        *(uid.EnhancedMRImageStorage, uid.RTImageStorage, uid.XRayAngiographicImageStorage),
        *("1.2.840.10008.5.1.4.1.1.1.2", "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.3.4.5"),
    ],
)
def test_dicom_images_of_all_classes_are_taken(tmp_path, storage):
    change(dicom(tmp_path / "in" / "a.dcm"), SOPClassUID=str(storage))
    assert walked(tmp_path / "in") == ([("in/a.dcm",)], {})


def test_an_image_without_rows_is_left_to_its_reader(tmp_path):
    change(dicom(tmp_path / "in" / "a.dcm"), Rows=None)
    assert walked(tmp_path / "in") == ([("in/a.dcm",)], {})


def stack(folder: Path, count: int = 4, **elements) -> list[Path]:
    return [change(dicom(folder / f"{i}.dcm", i), **elements) for i in range(count)]


@pytest.mark.parametrize("named", ["*.mr", "1.mr", "3.mr"])
def test_dicom_of_an_unusual_ending_is_dicom_where_it_is_named(tmp_path, named):
    """So that it has its objects, its series, and what its header says of burnt-in text."""
    for number in (1, 2):
        dicom(tmp_path / f"{number}.dcm", number).rename(tmp_path / f"{number}.mr")
    report = change(dicom(tmp_path / "3.dcm", 3), SOPClassUID=uid.ComprehensiveSRStorage)
    report.rename(tmp_path / "3.mr")
    found = inputs.find([str(tmp_path / named)])
    kinds = {item.paths[0][-4:]: (item.kind, len(item.paths)) for item in found}
    whole = {"1.mr": ("dicom", 2), "3.mr": ("", 1)}
    assert (
        kinds == {"*.mr": whole, "1.mr": {"1.mr": ("dicom", 1)}, "3.mr": {"3.mr": ("", 1)}}[named]
    )


def test_a_series_names_its_files_and_instances_in_order(tmp_path):
    folder = tmp_path / "in"
    for i, name in enumerate("cabd"):
        dicom(folder / name, i)
    (item,) = inputs.find([str(folder)])
    assert item.names == ("in/c", "in/a", "in/b", "in/d") and item.source == "in/c (+3)"
    assert item.paths == tuple(str(folder / name) for name in "cabd")
    assert item.uids == tuple(f"1.2.826.0.1.77.3.{i}" for i in range(4))
    (hidden,) = pseudonyms.rename([item], b"salt")
    assert len(set(hidden.names)) == 4 and not hidden.uids and hidden.source == hidden.output
    assert not set(hidden.names) & set(item.names) and hidden.paths == item.paths
    assert pseudonyms.rename([item], b"salt") == [hidden]
    assert pseudonyms.rename([item], b"other")[0].output != hidden.output


@pytest.mark.parametrize("case", ["copied", "resent"])
def test_a_slice_that_is_there_twice_counts_once(tmp_path, case):
    folder = tmp_path / "in"
    stack(folder)
    twin = folder / "2 (1).dcm"
    shutil.copy(folder / "2.dcm", twin)
    if case == "resent":  # by a server that gave it another UID
        change(twin, SOPInstanceUID="1.2.3.4", InstanceNumber=77)
    names, refused = walked(folder)
    assert names == [tuple(f"in/{i}.dcm" for i in range(4))]
    assert refused == {"in/2 (1).dcm": inputs.COPY}


def test_slices_that_only_look_like_copies_stay(tmp_path):
    """Time points at one place, and one UID that a careless program gave to all."""
    first = stack(tmp_path / "points", 3)
    for path in first:
        later = change(Path(shutil.copy(path, path.with_name(f"t{path.name}"))))
        ds = pydicom.dcmread(later)
        pixels = noise(99 + ds.InstanceNumber).tobytes()
        number = f"1.2.3.{ds.InstanceNumber + 1}"
        change(later, PixelData=pixels, SOPInstanceUID=number)
    stack(tmp_path / "careless", 3, SOPInstanceUID="1.2.3")
    (points,), refused = walked(tmp_path / "points")
    assert len(points) == 6 and not refused
    (careless,), refused = walked(tmp_path / "careless")
    assert len(careless) == 3 and not refused


@pytest.mark.parametrize(
    "storage",
    [
        MAMMOGRAM,
        uid.DigitalXRayImageStorageForPresentation,
        uid.ComputedRadiographyImageStorage,
        uid.UltrasoundImageStorage,
        uid.XRayAngiographicImageStorage,
        uid.SecondaryCaptureImageStorage,
        uid.VLPhotographicImageStorage,
    ],
)
@pytest.mark.parametrize("places", [False, True])
def test_films_of_one_series_are_items_of_their_own(tmp_path, storage, places):
    if places and storage in (uid.SecondaryCaptureImageStorage, uid.VLPhotographicImageStorage):
        return  # reformatted stacks have places
    gone = {} if places else {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    stack(tmp_path / "in", SOPClassUID=str(storage), **gone)
    names, refused = walked(tmp_path / "in")
    assert names == [(f"in/{i}.dcm",) for i in range(4)] and not refused
    shutil.copy(tmp_path / "in" / "3.dcm", tmp_path / "in" / "copy of 3.dcm")
    names, refused = walked(tmp_path / "in")
    assert len(names) == 4 and refused == ({"in/copy of 3.dcm": inputs.COPY})


def test_slices_without_places_stay_one_series(tmp_path):
    stack(tmp_path / "in", ImagePositionPatient=None, ImageOrientationPatient=None)
    assert walked(tmp_path / "in") == ([tuple(f"in/{i}.dcm" for i in range(4))], {})


@pytest.mark.parametrize("jitter", [2e-9, 5e-5, 4e-4])
def test_cosines_a_rounding_apart_are_one_stack_and_others_are_not(tmp_path, jitter):
    """Around a value that rounds either way."""
    folder = tmp_path / "in"
    for i, path in enumerate(stack(folder)):
        tilt = 0.12345 + jitter * (-1) ** i
        change(path, ImageOrientationPatient=[1, 0, 0, 0, (1 - tilt**2) ** 0.5, tilt])
    scout = dicom(folder / "scout.dcm", 9)
    change(scout, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    names, refused = walked(folder)
    assert names == [tuple(f"in/{i}.dcm" for i in range(4)), ("in/scout.dcm",)] and not refused


def test_damaged_headers_stop_nobody(tmp_path):
    """Each byte of a header in turn: an item, or a refusal, and the others as they are."""
    whole = dicom(tmp_path / "in" / "b.dcm").read_bytes()
    rng = np.random.default_rng(0)
    dicom(tmp_path / "in" / "a.dcm", 2)
    for _ in range(300):
        raw = bytearray(whole)
        for at in rng.integers(132, len(whole) - 2000, 3):
            raw[at] = rng.integers(256)
        (tmp_path / "in" / "b.dcm").write_bytes(raw)
        names, refused = walked(tmp_path / "in")
        named = sorted(name for item in names for name in item)
        assert sorted([*named, *refused]) == ["in/a.dcm", "in/b.dcm"]


def test_a_uid_that_is_none_is_no_formula_and_no_control_codes(tmp_path):
    change(dicom(tmp_path / "a.dcm"), SOPInstanceUID='=HYPERLINK("x")\x1b[2J')
    dicom(tmp_path / "b.dcm", 2)
    (item,) = inputs.find([str(tmp_path)])
    assert item.uids == ('./=HYPERLINK("x")\\x1b[2J', "1.2.826.0.1.77.3.2")
