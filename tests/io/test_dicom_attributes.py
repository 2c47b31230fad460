"""DICOM objects: names, identities and other elements that come from the source."""

import io

import numpy as np
import pydicom
import pytest
from pydicom import uid

from medclip_jax.io import dicom_write
from tests.support.dicom_objects import (
    CT,
    PLACED,
    SALT,
    SHAPE,
    US,
    enhanced,
    objects,
    references,
    source,
    volume,
)

pytestmark = pytest.mark.usefixtures("dicom_warnings_off")


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
        assert {str(ds[name].value) for name in broken} == {""}  # no date, no time, no code
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
