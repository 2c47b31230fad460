"""Identity planted wherever a file can hold it; then every byte of what prediction leaves."""

import gzip
import io
import re
import stat
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset

from medclip_jax import api
from medclip_jax.errors import WorkdirError
from medclip_jax.inference import pseudonyms
from medclip_jax.io import dicom_reference
from tests.support.predicting import dicom, noise, pages, run, table

MARK = "Zq7Plant"  # in every text and every name
NUMBER = "99775533"  # in every identifier, date, time and number
PLACE = [f"{MARK}Ward", f"{MARK} (Bay)"]  # folders
TEXTS = {  # of each VR that holds text, and identifiers
    "PatientName": f"{MARK}^NAME",  # PN
    "PatientID": f"{MARK}ID",  # LO
    "PatientBirthDate": "19997755",  # DA
    "StudyTime": "997755.33",  # TM
    "AcquisitionDateTime": "9977553311",  # DT
    "AccessionNumber": f"{MARK}ACC",  # SH
    "PatientAge": "977Y",  # AS
    "ImageComments": f"{MARK} comment",  # LT
    "PatientAddress": f"{MARK} street",  # LO
    "AdditionalPatientHistory": f"{MARK} history",  # LT
    "DerivationDescription": f"{MARK} derived",  # ST
    "TextValue": f"{MARK} text",  # UT
    "LongCodeValue": f"{MARK} code",  # UC
    "RetrieveURL": f"http://{MARK}",  # UR
    "RetrieveAETitle": f"{MARK}AE",  # AE
    "BodyPartExamined": f"{MARK.upper()}",  # CS
    "PositionReferenceIndicator": f"{MARK} XY",  # LO
    "WindowCenterWidthExplanation": f"{MARK} window",  # LO
    "SeriesDescription": f"{MARK} series",
    "InstitutionName": f"{MARK} hospital",
    "StudyID": f"{MARK}SID",
    "ReferringPhysicianName": f"{MARK}^DOCTOR",
    "Manufacturer": f"{MARK} maker",
}
SECRETS = re.compile(
    f"{MARK}|{NUMBER}|19997755|997755|977Y|Müßig|1\\.2\\.826\\.0\\.1\\.77".encode(), re.I
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A folder of every kind of file, some of them broken."""
    folder = tmp_path_factory.mktemp("inputs") / PLACE[0] / PLACE[1]
    for number in (1, 2):
        fill(dicom(folder / f"{MARK} slice{number}.dcm", number))
    alone = fill(dicom(folder / f"{MARK}_us.dcm", 7), SeriesInstanceUID=f"1.2.{NUMBER}")
    (folder / f"{MARK}_cut.dcm").write_bytes(alone.read_bytes()[:-500])
    (folder / f"{MARK}_head.dcm").write_bytes(alone.read_bytes()[:300] + MARK.encode() * 20)
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Patient", MARK)
    texts.add_text("History", f"{MARK} " * 99, zip=True)
    texts.add_itxt("Naam", MARK, zip=True)
    exif = Image.Exif()
    exif[0x010E], exif[0x013B], exif[0x8298] = (MARK,) * 3  # description, artist, copyright
    exif[0x0132] = f"{NUMBER}:01"
    picture = Image.fromarray(noise())
    picture.save(folder / f"{MARK}.png", pnginfo=texts, exif=exif)
    picture.save(folder / f"{MARK}.jpg", comment=MARK.encode(), exif=exif)
    picture.save(folder / f"{MARK}.tif", tiffinfo={270: MARK, 315: MARK, 33432: MARK})
    (folder / f"{MARK}_cut.png").write_bytes((folder / f"{MARK}.png").read_bytes()[:-300])
    (folder / f"{MARK}_text.png").write_text(MARK)
    volume(folder / f"{MARK}.nii.gz")
    (folder / f"{MARK}_cut.nii.gz").write_bytes((folder / f"{MARK}.nii.gz").read_bytes()[:-40])
    (folder / f"{MARK}_head.nii").write_bytes(MARK.encode() * 60)
    (folder / f"{MARK}_gone.png").symlink_to(f"/{MARK}")
    (folder / f"{MARK}_out.png").symlink_to("/")
    return folder


def fill(path: Path, **elements) -> Path:
    """Plant texts in a DICOM file, in nested items and private elements, and write it again."""
    ds = pydicom.dcmread(path)
    ds.SpecificCharacterSet = "ISO_IR 192"
    item = Dataset()
    for name, value in (TEXTS | elements).items():
        for place in (ds, item):
            vr = pydicom.datadict.dictionary_VR(name)
            place.add(pydicom.DataElement(name, vr, value, validation_mode=0))
    item.add_new(0x00290010, "LO", MARK)
    item.add_new(0x00291001, "UN", MARK.encode())
    for name in ("RequestAttributesSequence", "SharedFunctionalGroupsSequence"):
        setattr(ds, name, [item])
    pixels = Dataset()
    pixels.PixelSpacing, pixels.SliceThickness, pixels.FrameComments = [0.5, 0.7], 2, MARK
    ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = [pixels]
    ds.private_block(0x0029, MARK, create=True).add_new(1, "LT", MARK)
    ds.WindowCenter, ds.WindowWidth = 100, 200
    ds.save_as(path)
    return path


def volume(path: Path) -> None:
    image = nibabel.Nifti1Image(noise(1, (20, 24, 3)), np.eye(4))
    for name in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[name] = MARK.encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", MARK.encode() * 9))
    image.to_filename(path)


def contents(path: Path) -> bytes:
    """All bytes of a file, and those that are packed in it; the zlib chunks of a PNG too."""
    raw = path.read_bytes()
    parts = [path.name.encode(), raw]
    if raw[:2] == b"\x1f\x8b":
        parts.append(gzip.decompress(raw))
    if zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as packed:
            parts += [packed.read(name) + name.encode() for name in packed.namelist()]
    if raw[:4] == b"\x89PNG":
        at = 8
        while at < len(raw):
            size, kind = int.from_bytes(raw[at : at + 4]), raw[at + 4 : at + 8]
            data = raw[at + 8 : at + 8 + size]
            assert kind in (b"IHDR", b"tEXt", b"IDAT", b"IEND"), kind
            if kind == b"tEXt":
                assert data == b"Software\0medclip_jax"
            at += size + 12
        with Image.open(path) as image:
            parts.append(image.tobytes() + repr(image.info).encode())
    return b"\n".join(parts)


def test_under_pseudonyms_nothing_of_a_source_is_left(whole, planted, tmp_path, caplog, capfd):
    output = tmp_path / "out"
    caplog.set_level("DEBUG")
    absent = planted / f"{MARK}*.none"
    assert run(whole, output, planted, planted.parent, absent, more=["--pseudonymise"]) == 0
    rows, bad = table(output), table(output, "unreadable.csv")
    assert len(rows) == 2 + 1 + 3 + 3 and len(bad) >= 7
    assert sum(name.endswith(".dcm") for page in pages(output) for name in page["files"].values())
    said = capfd.readouterr()
    ours = [record.getMessage() for record in caplog.records if record.name == "root"]
    for text in (said.out, said.err, "\n".join(ours)):
        assert not SECRETS.search(text.encode()), text
    for path in output.rglob("*"):
        hit = SECRETS.search(contents(path))
        assert not hit, (path.name, hit)
    for path in output.glob("*.dcm"):
        ds = pydicom.dcmread(path)
        assert ds.PatientIdentityRemoved == "YES" and ds.DeidentificationMethod
        own = [e for e in ds.iterall() if e.tag.is_private]
        assert not own and ds.PatientName == "" and ds.StudyDate == ""
    for page in pages(output):
        assert page["sha256"] is None
        assert all(frame["sop_instance_uid"] is None for frame in page["frames"])
    salt = output / pseudonyms.SALT_FILE
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600


def test_plain_results_name_files_and_the_patient_in_dicom_alone(whole, planted, tmp_path):
    """PS3.3 asks that objects of a study share these; comments and private data are not copied."""
    output = tmp_path / "out"
    assert run(whole, output, planted) == 0
    allowed = {f"{MARK}{e}" for e in ("^NAME", "ID", "ACC", "SID", "^DOCTOR")}
    for path in output.glob("*.dcm"):
        ds = pydicom.dcmread(path)
        assert ds.PatientName == f"{MARK}^NAME" and ds.PatientID == f"{MARK}ID"
        assert "PatientIdentityRemoved" not in ds
        values = {str(e.value) for e in ds.iterall() if MARK in str(e.value) and e.VR != "SQ"}
        assert values == allowed
        assert not [e for e in ds.iterall() if e.tag.is_private]
    names = {frame["file"].rpartition("/")[2] for page in pages(output) for frame in page["frames"]}
    assert {f"{MARK} slice1.dcm", f"{MARK} slice2.dcm", f"{MARK}.nii.gz"} <= names
    for row in table(output):
        assert row["file"].rpartition("/")[2] in names
        assert row["sop_instance_uid"].startswith("1.2.826.0.1.77.3") == (".dcm" in row["file"])
    for path in output.rglob("*.png"):
        assert MARK.encode() not in contents(path)[len(path.name) :]


def test_pseudonyms_are_of_their_folder_and_resume(whole, tmp_path):
    source = dicom(tmp_path / "in" / "a.dcm")
    result = []
    for output in (tmp_path / "one", tmp_path / "two", tmp_path / "one"):
        assert run(whole, output, source, more=["--pseudonymise"]) == 0
        (page,) = pages(output)
        seg = pydicom.dcmread(output / page["files"]["seg"])
        result.append((page["source"], seg.StudyInstanceUID, page["key"], seg.SOPInstanceUID))
    assert result[0] == result[2] and not set(result[0]) & set(result[1])
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "one").glob("*.dcm")}
    assert run(whole, tmp_path / "one", source, more=["--pseudonymise"]) == 0
    assert times == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "one").glob("*.dcm")}


@pytest.mark.parametrize("broken", [b"", b"abc", b"0" * 65])
def test_a_damaged_salt_is_not_replaced(tmp_path, broken):
    salt = pseudonyms.salt_of(tmp_path)
    assert len(salt) == 32
    assert pseudonyms.salt_of(tmp_path) == salt
    (tmp_path / pseudonyms.SALT_FILE).write_bytes(broken)
    with pytest.raises(WorkdirError, match=r"\.pseudonyms"):
        pseudonyms.salt_of(tmp_path)
    assert (tmp_path / pseudonyms.SALT_FILE).read_bytes() == broken


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / pseudonyms.SALT_FILE).symlink_to(tmp_path / "absent")
    with pytest.raises(WorkdirError):
        pseudonyms.salt_of(tmp_path)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("more", [[], ["--pseudonymise"], ["--pseudonymise", "--keep_burned_in"]])
def test_text_burnt_into_pixels(whole, tmp_path, caplog, more):
    path = dicom(tmp_path / "in" / "a.dcm")
    ds = pydicom.dcmread(path)
    ds.BurnedInAnnotation = "YES"
    ds.save_as(path)
    assert run(whole, tmp_path / "out", path, more=more) == 0
    (page,) = pages(tmp_path / "out")
    shown = more != ["--pseudonymise"]
    assert ("capture" in page["files"]) == ("overlay" in page["files"]) == shown
    (note,) = page["notes"]
    assert "text is burnt into its pixels" in note and ("--keep_burned_in" in note) != shown
    assert sum(note in message for message in caplog.messages) == 1
    if shown:
        capture = pydicom.dcmread(tmp_path / "out" / page["files"]["capture"])
        assert capture.BurnedInAnnotation == "YES"


def test_a_missing_segmentation_is_said_once_with_its_reason(whole, tmp_path, caplog):
    for number in (1, 2):
        path = dicom(tmp_path / "in" / f"{number}.dcm", number)
        ds = pydicom.dcmread(path)
        del ds.StudyInstanceUID
        ds.SeriesInstanceUID = f"1.2.3.{number}"
        ds.save_as(path)
    assert run(whole, tmp_path / "out", tmp_path / "in") == 0
    note = "no DICOM objects: the source has no StudyInstanceUID"
    assert [page["notes"] for page in pages(tmp_path / "out")] == [[note], [note]]
    said = [message for message in caplog.messages if note in message]
    assert said == [f"{note}: 2 item(s), the first is in/1.dcm"]


def test_a_notebook_leaves_as_little_under_pseudonyms(whole, tmp_path):
    source = fill(dicom(tmp_path / PLACE[0] / f"{MARK}.dcm"))
    summary = api.load(whole).predict_files(str(source), output=tmp_path / "out", pseudonymise=True)
    assert summary.scored == 1
    assert not [p for p in (tmp_path / "out").rglob("*") if SECRETS.search(contents(p))]


@pytest.mark.parametrize(
    "name, stored, written",
    [
        ("StudyDate", "1996.10.29", "19961029"),
        ("StudyDate", "19961331", ""),
        ("PatientBirthDate", "00000000", ""),
        ("StudyTime", "15:18:59", "151859"),
        ("StudyTime", "1518", "1518"),
        ("StudyTime", "101010.5", "101010.5"),
        ("StudyTime", "25", ""),
        ("StudyTime", "1015.5", ""),
    ],
)
def test_dates_and_times_are_written_as_the_standard_has_them(tmp_path, name, stored, written):
    path = dicom(tmp_path / "a.dcm")
    ds = pydicom.dcmread(path)
    ds[name] = pydicom.DataElement(name, ds[name].VR, stored, validation_mode=0)
    ds.save_as(path)
    identity = pydicom.Dataset({e.tag: e for e in dicom_reference.read(path, None).identity})
    assert identity[name].value == written
