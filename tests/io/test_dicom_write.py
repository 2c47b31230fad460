"""DICOM objects: what highdicom and dciodvfy read in them, for every kind of source."""

import io
import shutil

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from medclip_jax.io import dicom_seg, dicom_write
from tests.support.dicom_objects import (
    DX,
    ENHANCED_MR,
    MG,
    MR,
    NM,
    PLACED,
    SHAPE,
    US_MULTI,
    XA,
    check_with_dciodvfy,
    enhanced,
    objects,
    references,
    seg,
    source,
    volume,
)

pytestmark = pytest.mark.usefixtures("dicom_warnings_off")


def test_dciodvfy_is_used():
    if not shutil.which("dciodvfy"):
        pytest.skip("no dciodvfy: install Debian's dicom3tools for it")
    with pytest.raises(AssertionError):
        check_with_dciodvfy(b"no DICOM")


def test_a_volume_is_one_segmentation_in_its_place(tmp_path):
    built, mask = objects(volume(tmp_path), 4)
    assert set(built.files) == {"seg", "capture"} and not built.notes
    ds = seg(built)
    # highdicom has the frames from head to foot
    assert references(ds)[::-1] == [(f"1.2.3.5.{n}", None) for n in (1, 2, 3, 4)]
    got = ds.get_pixels_by_source_instance([f"1.2.3.5.{n}" for n in (1, 2, 3, 4)])
    np.testing.assert_array_equal(got[..., 0], mask)
    volume_of = ds.get_volume()
    assert volume_of.spacing == pytest.approx((3, 0.8, 0.6))
    assert ds.FrameOfReferenceUID == "1.2.3.9"
    assert built.frames == [(i, 1) for i in range(4)]


@pytest.mark.parametrize(
    "frames, sop, changed, wrong",
    [
        (0, MR, {"StudyInstanceUID": "1.2.3.9"}, "one UID for several objects"),
        (0, MR, {"SeriesInstanceUID": "1.2.03"}, "invalid UIDs"),
        (0, MR, {"StudyInstanceUID": "3.2.1"}, "invalid UIDs"),
        (0, MR, {"StudyInstanceUID": "1.77.1"}, "invalid UIDs"),
        (2, MR, {}, "several frames in a single-frame class"),
        (2, US_MULTI, {}, ""),
        (0, MR, {"StudyInstanceUID": "2.25.340282366920938463463374607431768211455"}, ""),
    ],
)
def test_flaws_of_a_source_are_repeated_and_said(tmp_path, frames, sop, changed, wrong):
    place = PLACED | {"ImagePositionPatient": [0, 0, 0]}
    built, mask = objects(
        [source(tmp_path / "a.dcm", frames=frames, sop=sop, **place | changed)],
        frames or 1,
        not wrong,
    )
    assert built.notes == ([f"objects refer to a source with {wrong}"] if wrong else [])
    ds = seg(built)
    if not frames:
        assert ds.FrameOfReferenceUID == "1.2.3.9"
    for name, uid in changed.items():
        of = ds if name == "StudyInstanceUID" else ds.ReferencedSeriesSequence[0]
        assert of[name].value == uid
    assert references(ds) == (
        [("1.2.3.5.1", n + 1) for n in range(2)] if frames else [("1.2.3.5.1", None)]
    )
    assert ds.pixel_array.sum() == mask.sum()


@pytest.mark.parametrize("named", [True, False])
def test_each_time_of_a_series_has_its_segmentation(tmp_path, named):
    """Slices sorted by place, as a series is read; the times named in the header or not."""
    paths = []
    for i in range(6):
        place, time = divmod(i, 2)
        extra = {"TemporalPositionIdentifier": time + 1} if named else {}
        at = {"ImagePositionPatient": [0, 0, 3 * place]}
        paths.append(source(tmp_path / f"{i}.dcm", i + 1, **PLACED, **at, **extra))
    built, mask = objects(paths, 6)
    assert set(built.files) == {"1.seg", "2.seg", "capture"} and not built.notes
    for time in (0, 1):
        own = [f"1.2.3.5.{i + 1}" for i in range(time, 6, 2)]
        ds = seg(built, f"{time + 1}.seg")
        assert [name for name, _ in references(ds)[::-1]] == own
        got = ds.get_pixels_by_source_instance(own)
        np.testing.assert_array_equal(got[..., 0], mask[time::2])
    uids = {seg(built, f"{n}.seg").SOPInstanceUID for n in (1, 2)}
    assert len(uids) == 2


@pytest.mark.parametrize(
    ("sop", "elements"),
    [
        (US_MULTI, {"Modality": "US"}),
        (XA, {"Modality": "XA", "FrameOfReferenceUID": "1.2.3.9"}),
        (NM, {"Modality": "NM", **PLACED, "ImagePositionPatient": [0, 0, 0]}),
        (ENHANCED_MR, {"PerFrameFunctionalGroupsSequence": [Dataset()]}),  # of 1 frame, not 5
    ],
)
def test_a_cine_refers_to_its_frames_by_number(tmp_path, sop, elements):
    path = source(tmp_path / "a.dcm", frames=5, sop=sop, **elements)
    built, mask = objects([path], 5)
    assert set(built.files) == {"seg", "capture"} and not built.notes
    ds = seg(built)
    assert references(ds) == [("1.2.3.5.1", n) for n in (1, 2, 3, 4, 5)]
    got = ds.get_pixels_by_source_frame("1.2.3.5.1", [5, 2])
    np.testing.assert_array_equal(got[..., 0], mask[[4, 1]])
    assert "FrameOfReferenceUID" not in ds
    capture = pydicom.dcmread(io.BytesIO(built.files["capture"]))
    assert capture.SourceImageSequence[0].ReferencedFrameNumber == 1
    assert built.frames == [(0, n) for n in (1, 2, 3, 4, 5)]


def test_empty_frames_of_a_cine_stay(tmp_path):
    path = source(tmp_path / "a.dcm", frames=3, sop=US_MULTI)
    mask = np.zeros((3, *SHAPE), bool)
    mask[1, 2, 3] = True
    picture = np.zeros((*SHAPE, 3), np.uint8)
    built = dicom_write.build(dicom_write.Task([str(path)], "key", mask, picture, 0))
    np.testing.assert_array_equal(seg(built).pixel_array, mask)


@pytest.mark.parametrize("thickness", [None, 2])
def test_an_enhanced_file_of_two_times(tmp_path, thickness):
    built, mask = objects([enhanced(tmp_path / "a.dcm", 2, 3, thickness)], 6)
    assert set(built.files) == {"1.seg", "2.seg", "capture"} and not built.notes
    for time in (0, 1):
        ds = seg(built, f"{time + 1}.seg")
        numbers = [2 * place + time + 1 for place in range(3)]
        assert references(ds)[::-1] == [("1.2.3.5.1", n) for n in numbers]
        got = ds.get_pixels_by_source_frame("1.2.3.5.1", numbers)
        np.testing.assert_array_equal(got[..., 0], mask[[n - 1 for n in numbers]])
        measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        assert measures.SliceThickness == 2 and len(ds.SourceImageSequence) == 1


@pytest.mark.parametrize("stated", ["absent", None, "", 0, "thick"])
def test_a_thickness_that_is_missing_comes_from_the_positions(tmp_path, stated):
    paths = volume(tmp_path, 3, SliceThickness=None)
    for path in paths:
        ds = pydicom.dcmread(path)
        del ds.SliceThickness
        if stated != "absent":
            element = pydicom.DataElement("SliceThickness", "DS", None)
            element._value = stated
            ds.add(element)
        ds.save_as(path)
    built, _ = objects(paths, 3)
    measures = seg(built).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SliceThickness == 3 and not built.notes


def test_no_thickness_is_invented(tmp_path):
    """One slice without one, and a film, which has none: pixel measures are left out."""
    alone = source(
        tmp_path / "a.dcm", **PLACED | {"SliceThickness": None, "ImagePositionPatient": [0, 0, 0]}
    )
    x_ray = source(tmp_path / "b.dcm", sop=DX, Modality="DX", PixelSpacing=[0.17, 0.17])
    one = source(tmp_path / "c.dcm", **PLACED, ImagePositionPatient=[0, 0, 0])
    for path in (alone, x_ray):
        built, mask = objects([path], 1)
        ds = seg(built)
        assert "PixelMeasuresSequence" not in ds.SharedFunctionalGroupsSequence[0]
        np.testing.assert_array_equal(ds.pixel_array.reshape(mask.shape), mask)
    measures = seg(objects([one], 1)[0]).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.SliceThickness == 3 and "SpacingBetweenSlices" not in measures


def test_films_of_one_series_have_a_segmentation_each(tmp_path):
    paths = [
        source(tmp_path / f"{i}.dcm", i, sop=MG, Modality="MG", ImageLaterality=side)
        for i, side in enumerate("LRLR", start=1)
    ]
    built, mask = objects(paths, 4)
    assert set(built.files) == {*(f"{n}.seg" for n in (1, 2, 3, 4)), "capture"} and not built.notes
    for i in range(4):
        ds = seg(built, f"{i + 1}.seg")
        assert references(ds) == [(f"1.2.3.5.{i + 1}", None)]
        np.testing.assert_array_equal(ds.pixel_array, mask[i])
    assert pydicom.dcmread(io.BytesIO(built.files["capture"])).Laterality == "L"


def test_slices_without_frame_of_reference_share_a_segmentation(tmp_path):
    paths = [
        source(
            *(tmp_path / f"{i}.dcm", i + 1),
            **{k: v for k, v in PLACED.items() if k != "FrameOfReferenceUID"},
            ImagePositionPatient=[0, 0, 3 * i],
        )
        for i in range(3)
    ]
    built, mask = objects(paths, 3)
    ds = seg(built)
    assert references(ds) == [(f"1.2.3.5.{n}", None) for n in (1, 2, 3)]
    np.testing.assert_array_equal(ds.pixel_array, mask)


def test_localisers_keep_their_own_orientation(tmp_path):
    turns = ([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])
    paths = [
        source(
            *(tmp_path / f"{i}.dcm", i + 1),
            **PLACED | {"ImageOrientationPatient": turn, "ImagePositionPatient": [0, 0, 0]},
        )
        for i, turn in enumerate(turns)
    ]
    built, _ = objects(paths, 3)
    for i, turn in enumerate(turns):
        plane = seg(built, f"{i + 1}.seg").SharedFunctionalGroupsSequence[0]
        assert list(plane.PlaneOrientationSequence[0].ImageOrientationPatient) == turn


def test_what_is_read_back_otherwise_is_not_handed_out(tmp_path, monkeypatch):
    add = dicom_seg._add_frames

    def shifted(ds, names, mask):
        add(ds, names, np.roll(mask, 1, axis=2))

    monkeypatch.setattr(dicom_seg, "_add_frames", shifted)
    built, _ = objects([source(tmp_path / "a.dcm", frames=2, sop=US_MULTI)], 2)
    assert set(built.files) == {"capture"}
    assert built.notes == ["no seg: what was written is not what is read back"]
