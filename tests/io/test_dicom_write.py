"""DICOM objects: what highdicom and dciodvfy read in them, for every kind of source."""

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medclip_jax.io import dicom_seg, dicom_write
from tests.support.dicom import film, save

CT, MR, ENHANCED_MR = (f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("2", "4", "4.1"))
US, US_MULTI, XA, NM, DX, MG = (
    f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("6.1", "3.1", "12.1", "20", "1.1", "1.2")
)
PLACED = {
    "FrameOfReferenceUID": "1.2.3.9",
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "PixelSpacing": [0.8, 0.6],
    "SliceThickness": 3,
}
SHAPE = (8, 10)
SALT = b"0123456789abcdef"


@pytest.fixture(autouse=True)
def quiet():
    """As prediction does it."""
    dicom_write.quieten()


def source(path: Path, number: int = 1, frames: int = 0, sop: str = MR, **elements) -> Path:
    """One file of the series 1.2.3.2; frames 0: one frame and no NumberOfFrames."""
    pixels = np.zeros((frames, *SHAPE) if frames else SHAPE, np.uint8)
    ds = film(pixels, SOPClassUID=sop, SOPInstanceUID=f"1.2.3.5.{number}", InstanceNumber=number)
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = sop, "1.2.3"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3.1", "1.2.3.2"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20200101", "101010", "1", ""
    ds.PatientBirthDate, ds.PatientSex, ds.ReferringPhysicianName = "19600101", "O", ""
    for name, value in elements.items():
        setattr(ds, name, value)
    return save(path, ds)


def volume(folder: Path, count: int = 4, **elements) -> list[Path]:
    return [
        source(
            folder / f"{i}.dcm",
            i + 1,
            **PLACED | {"ImagePositionPatient": [0, 0, 3 * i]} | elements,
        )
        for i in range(count)
    ]


def objects(
    paths, frames: int, valid: bool = True, **options
) -> tuple[dicom_write.DicomObjects, np.ndarray]:
    """The objects, and the mask of every frame: all differ."""
    mask = np.zeros((frames, *SHAPE), bool)
    for i in range(frames):
        mask[i].flat[: i + 1] = True
    picture = np.zeros((*SHAPE, 3), np.uint8)
    task = dicom_write.Task([str(p) for p in paths], "key", mask, picture, 0, **options)
    built = dicom_write.build(task)
    for raw in built.files.values() if valid else ():
        check_with_dciodvfy(raw)
    return built, mask


def check_with_dciodvfy(raw: bytes) -> None:
    """No error of David Clunie's validator, where Debian's dicom3tools are installed."""
    if not shutil.which("dciodvfy"):
        return
    with tempfile.NamedTemporaryFile() as file:  # it seeks
        file.write(raw)
        file.flush()
        result = subprocess.run(["dciodvfy", file.name], capture_output=True)
    lines = (result.stdout + result.stderr).decode("latin-1").splitlines()
    assert not [line for line in lines if "error" in line.lower()]


def seg(built: dicom_write.DicomObjects, name: str = "seg") -> highdicom.seg.Segmentation:
    return highdicom.seg.segread(io.BytesIO(built.files[name]))


def references(ds) -> list[tuple[str, int | None]]:
    """(instance, frame number) of each frame."""
    found = []
    for group in ds.PerFrameFunctionalGroupsSequence:
        ref = group.DerivationImageSequence[0].SourceImageSequence[0]
        number = ref.get("ReferencedFrameNumber")
        found.append((ref.ReferencedSOPInstanceUID, None if number is None else int(number)))
    return found


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


def enhanced(path: Path, times: int, places: int, thickness=None) -> Path:
    """A 4-D enhanced MR, its frames by place and then by time."""
    per_frame = []
    for place in range(places):
        for _ in range(times):
            own, position = Dataset(), Dataset()
            position.ImagePositionPatient = [0, 0, 2 * place]
            own.PlanePositionSequence = Sequence([position])
            per_frame.append(own)
    shared, turn, pixel = Dataset(), Dataset(), Dataset()
    turn.ImageOrientationPatient, pixel.PixelSpacing = [1, 0, 0, 0, 1, 0], [0.5, 0.5]
    if thickness is not None:
        pixel.SliceThickness = thickness
    shared.PlaneOrientationSequence = Sequence([turn])
    shared.PixelMeasuresSequence = Sequence([pixel])
    return source(
        path,
        frames=times * places,
        sop=ENHANCED_MR,
        FrameOfReferenceUID="1.2.3.9",
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(per_frame),
    )


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


def test_values_that_the_standard_forbids_cost_no_object(tmp_path):
    broken = {"PatientBirthDate": "1960", "PatientSex": "female", "StudyTime": "noon"}
    path = source(tmp_path / "a.dcm", sop=CT, Modality="CT", PatientOrientation=["up", "down"])
    ds = pydicom.dcmread(path)
    for name, value in broken.items():
        ds[name]._value = value
    ds.save_as(path)
    task = ([str(path)], "key", np.ones((1, *SHAPE), bool), np.zeros((*SHAPE, 3), np.uint8), 0)
    built = dicom_write.build(dicom_write.Task(*task))
    assert set(built.files) == {"seg", "capture"}
    for raw in built.files.values():
        ds = pydicom.dcmread(io.BytesIO(raw))
        assert {name: str(ds[name].value) for name in broken} == broken
        assert not ds.get("PatientOrientation")


NAMES = [
    ("ISO_IR 100", "Müßig^Jörg"),
    ("ISO_IR 101", "Wałęsa^Łukasz"),
    ("ISO_IR 126", "Διονυσιος"),
    ("ISO_IR 144", "Люкceмбypг"),
    ("ISO_IR 138", "שרון^דבורה"),
    ("ISO_IR 166", "นามสกุล^ชื่อ"),
    ("ISO_IR 13", "ﾔﾏﾀﾞ^ﾀﾛｳ"),
    (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    (["ISO 2022 IR 13", "ISO 2022 IR 87"], "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"),
    (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    ("GB18030", "Wang^XiaoDong=王^小东"),
    ("GBK", "Wang^XiaoDong=王^小东"),
    ("ISO_IR 192", "Nowak^Łukasz=王^小东=やまだ"),
]


@pytest.mark.parametrize(("charset", "name"), NAMES)
def test_names_are_written_in_the_character_set_of_the_source(tmp_path, charset, name):
    last = name.split("=")[-1].split("^")[0]
    path = tmp_path / "a.dcm"
    texts = {"ReferringPhysicianName": name, "AccessionNumber": last, "StudyID": last}
    source(path, SpecificCharacterSet=charset, PatientName=name, PatientID=last, **texts)
    original = pydicom.dcmread(path)
    assert str(original.PatientName) == name
    known = charset not in ("ISO_IR 13", "GBK")  # to dciodvfy
    for raw in objects([path], 1, known)[0].files.values():
        ds = pydicom.dcmread(io.BytesIO(raw))
        assert ds.SpecificCharacterSet == charset and str(ds.PatientName) == name
        assert ds.PatientName.original_string == original.PatientName.original_string
        for element, value in (texts | {"PatientID": last}).items():
            assert str(ds[element].value) == value


@pytest.mark.parametrize(
    ("declared", "stored", "written", "name"),
    [
        (None, "Müßig^Jörg".encode(), "ISO_IR 192", "Müßig^Jörg"),
        (None, "Müßig^Jörg".encode("latin-1"), "ISO_IR 100", "Müßig^Jörg"),
        (None, b"Plain^Name", "ISO_IR 192", "Plain^Name"),
        ("LATIN1", "Müßig^Jörg".encode("latin-1"), "ISO_IR 100", "Müßig^Jörg"),
        ("ISO-IR 100", "Müßig^Jörg".encode("latin-1"), "ISO_IR 100", "Müßig^Jörg"),
        ("ISO 2022 IR 6", b"Plain^Name", "ISO 2022 IR 6", "Plain^Name"),
        (["ISO_IR 100", "ISO_IR 100"], "Jörg".encode("latin-1"), None, "Jörg"),
        (
            ["", "ISO 2022 IR 58"],  # GB2312, which pydicom does not encode
            b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab",
            ["", "ISO 2022 IR 58"],
            "Zhang^XiaoDong=\x1b$)A张^\x1b$)A小东",  # as pydicom reads it
        ),
    ],
)
def test_names_of_sources_without_or_with_a_wrong_character_set(
    tmp_path, declared, stored, written, name
):
    path = source(tmp_path / "a.dcm", PatientName="X" * (len(stored) + len(stored) % 2))
    ds = pydicom.dcmread(path)
    if declared:
        element = pydicom.DataElement("SpecificCharacterSet", "CS", None)
        element._value = declared
        ds.add(element)
        ds.save_as(path)
    padded = stored + b" " * (len(stored) % 2)
    path.write_bytes(path.read_bytes().replace(b"X" * len(padded), padded))
    for raw in objects([path], 1)[0].files.values():
        ds = pydicom.dcmread(io.BytesIO(raw))
        assert str(ds.PatientName) == name and stored in raw
        assert ds.SpecificCharacterSet and written in (None, ds.SpecificCharacterSet)


def test_several_values_and_empty_component_groups(tmp_path):
    path = source(
        tmp_path / "a.dcm",
        SpecificCharacterSet=["", "ISO 2022 IR 87"],
        ReferringPhysicianName=["A^B=山田^太郎", "C^D==やまだ^たろう"],
        PatientName="=山田^太郎",
    )
    original = pydicom.dcmread(path)
    for raw in objects([path], 1, valid=False)[0].files.values():  # one referring physician
        ds = pydicom.dcmread(io.BytesIO(raw))
        assert ds.PatientName == original.PatientName
        assert ds.ReferringPhysicianName == original.ReferringPhysicianName
        assert [n.phonetic for n in ds.ReferringPhysicianName] == ["", "やまだ^たろう"]


@pytest.mark.parametrize("missing", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_a_source_without_uid_gives_the_true_reason(tmp_path, missing):
    path = source(tmp_path / "a.dcm")
    ds = pydicom.dcmread(path)
    del ds[missing]
    ds.save_as(path)
    built, _ = objects([path], 1)
    assert not built.files and built.notes == [f"no DICOM objects: the source has no {missing}"]


def test_what_is_read_back_otherwise_is_not_handed_out(tmp_path, monkeypatch):
    add = dicom_seg._add_frames

    def shifted(ds, names, mask):
        add(ds, names, np.roll(mask, 1, axis=2))

    monkeypatch.setattr(dicom_seg, "_add_frames", shifted)
    built, _ = objects([source(tmp_path / "a.dcm", frames=2, sop=US_MULTI)], 2)
    assert set(built.files) == {"capture"}
    assert built.notes == ["no seg: what was written is not what is read back"]


@pytest.mark.parametrize("stated", ["YES", "NO", "", None])
def test_a_burnt_in_text_is_carried_over(tmp_path, stated):
    extra = {} if stated is None else {"BurnedInAnnotation": stated}
    paths = [source(tmp_path / "a.dcm", sop=US, **extra)]
    built, _ = objects(paths, 1)
    capture = pydicom.dcmread(io.BytesIO(built.files["capture"]))
    assert capture.get("BurnedInAnnotation", "") == (stated or "")
    burnt = stated == "YES"
    assert built.burned_in == burnt and len(built.notes) == int(burnt)
    hidden, _ = objects(paths, 1, salt=SALT)
    assert ("capture" in hidden.files) == (not burnt) and len(hidden.notes) == int(burnt)
    wanted, _ = objects(paths, 1, salt=SALT, burned_in=True)
    assert ("capture" in wanted.files) and len(wanted.notes) == int(burnt)


def test_pseudonymised_objects_say_so_and_agree_with_each_other(tmp_path):
    paths = volume(tmp_path)
    one, two = (objects(paths, 4, salt=SALT)[0] for _ in range(2))
    other, _ = objects(paths, 4, salt=SALT[::-1])
    uids = []
    for built in (one, two, other):
        ds = [pydicom.dcmread(io.BytesIO(built.files[n])) for n in ("seg", "capture")]
        for each in ds:
            assert each.PatientIdentityRemoved == "YES" and all(each.DeidentificationMethod)
            assert not each.PatientName and not each.PatientID and not each.StudyDate
        assert ds[0].StudyInstanceUID == ds[1].StudyInstanceUID
        referred = ds[1].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert referred == references(ds[0])[-1][0]
        uids.append({ds[0].StudyInstanceUID, ds[0].FrameOfReferenceUID, referred})
    assert uids[0] == uids[1] and not uids[0] & uids[2]
    assert not any("1.2.3" in value[:5] for value in uids[0])


def test_nothing_around_the_list_is_copied(tmp_path):
    """Comments and private elements in the file, in functional groups and in their items."""
    path = enhanced(tmp_path / "a.dcm", 1, 2)
    ds = pydicom.dcmread(path)
    groups = [*ds.SharedFunctionalGroupsSequence, *ds.PerFrameFunctionalGroupsSequence]
    items = [item for group in groups for e in group for item in e.value]
    for place in (ds, *groups, *items):
        place.FrameComments = place.ImageComments = place.PositionReferenceIndicator = "PLANTED"
        place.private_block(0x0029, "PLANTED", create=True).add_new(1, "LO", "PLANTED")
    ds.save_as(path)
    for options in ({}, {"salt": SALT}):
        for raw in objects([path], 2, **options)[0].files.values():
            assert b"PLANTED" not in raw


def test_all_transfer_syntaxes_of_headers_are_read(tmp_path):
    path = source(tmp_path / "a.dcm", **PLACED, ImagePositionPatient=[0, 0, 0])
    ds = pydicom.dcmread(path)
    expected = objects([path], 1)[0].frames
    for syntax, implicit, little in (
        (uid.ImplicitVRLittleEndian, True, True),
        (uid.ExplicitVRBigEndian, False, False),
        (uid.DeflatedExplicitVRLittleEndian, False, True),
    ):
        ds.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(path, ds, implicit_vr=implicit, little_endian=little)
        built, _ = objects([path], 1)
        assert built.frames == expected and not built.notes
        got = pydicom.dcmread(io.BytesIO(built.files["seg"]))
        assert got.PatientName == "DOE^JANE" and got.PatientBirthDate == "19600101"
