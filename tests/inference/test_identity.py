"""Identity planted wherever a file can hold it; then every byte of what prediction leaves."""

import io
import shutil
import stat
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from medclip_jax import api, main
from medclip_jax.errors import WorkdirError
from medclip_jax.inference import pseudonyms
from medclip_jax.io import dicom_reference, dicom_write
from tests.support.planted import (
    MARK,
    NUMBER,
    SECRETS,
    pictures,
    plant_everywhere,
    texts_of,
    volume,
)
from tests.support.predicting import change, dicom, noise, pages, run, table

CINE = "1.2.840.10008.5.1.4.1.1.7.2"  # multi-frame grayscale byte secondary capture
# of a source, in a DICOM object: PS3.3 asks that objects of a study share these
KEPT = {
    *("PatientName", "PatientID", "AccessionNumber", "StudyID", "ReferringPhysicianName"),
    *("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyInstanceUID"),
    *("ReferencedSOPInstanceUID", "ReferencedSOPClassUID", "SeriesInstanceUID"),
    "FrameOfReferenceUID",
}
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


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A folder of every kind of file, some of them broken."""
    folder = tmp_path_factory.mktemp("inputs") / PLACE[0] / PLACE[1]
    for number in (1, 2):
        fill(dicom(folder / f"{MARK} slice{number}.dcm", number))
    alone = fill(dicom(folder / f"{MARK}_us.dcm", 7), SeriesInstanceUID=f"1.2.{NUMBER}")
    (folder / f"{MARK}_cut.dcm").write_bytes(alone.read_bytes()[:-500])
    (folder / f"{MARK}_head.dcm").write_bytes(alone.read_bytes()[:300] + MARK.encode() * 20)
    plant_everywhere(dicom(folder / f"{MARK} all.dcm", 3), SeriesInstanceUID=f"1.2.{NUMBER}.7")
    plant_everywhere(frames(dicom(folder / f"{MARK} cine.dcm", 4)))
    own = plant_everywhere(frames(dicom(folder / f"{MARK} own.dcm", 5)))
    change(own, SOPClassUID=f"1.2.{NUMBER}.1", SOPInstanceUID=f"1.2.{NUMBER}.3")
    change(dicom(folder / f"{MARK} plain.dcm", 9), SeriesInstanceUID=f"1.2.{NUMBER}.9")
    assert len(pictures(folder)) == 4
    (folder / f"{MARK}_cut.png").write_bytes((folder / f"{MARK}.png").read_bytes()[:-300])
    (folder / f"{MARK}_text.png").write_text(MARK)
    (folder / f"scan.{MARK}_JANE").write_text(MARK)
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


def has_secret(value) -> bool:
    return bool(SECRETS.search(value if isinstance(value, bytes) else str(value).encode()))


def frames(path: Path) -> Path:
    """Of one frame -> a multi-frame image."""
    pixels = noise(4, (3, 40, 50))
    return change(path, NumberOfFrames=3, PixelData=pixels.tobytes(), SOPClassUID=CINE)


def contents(path: Path) -> bytes:
    """All bytes of a file with its name, and those that are packed in it."""
    raw = path.read_bytes()
    parts = [path.name.encode(), *texts_of(raw)]
    if zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as packed:
            for name in packed.namelist():
                parts += [name.encode(), *texts_of(packed.read(name))]
    return b"\n".join(parts)


def test_under_pseudonyms_nothing_of_a_source_is_left(whole, planted, tmp_path, caplog, capfd):
    output = tmp_path / "out"
    caplog.set_level("DEBUG")
    absent = planted / f"{MARK}*.none"
    named = planted / f"scan.{MARK}_JANE", planted, planted.parent, absent
    assert run(whole, output, *named, more=["--pseudonymise"]) == 0
    rows, bad = table(output), table(output, "unreadable.csv")
    assert len(rows) == 2 + 1 + 1 + 1 + 3 + 3 + 4 + 3 and len(bad) >= 7
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
    patients = set()
    for path in output.glob("*.dcm"):
        ds = pydicom.dcmread(path)
        patients.add((str(ds.PatientName), ds.PatientID, ds.PatientBirthDate))
        assert "PatientIdentityRemoved" not in ds
        texts = {e.keyword for e in ds.iterall() if e.VR != "SQ" and has_secret(e.value)}
        assert {"PatientName", "PatientID", "StudyInstanceUID"} <= texts <= KEPT
        assert not [e for e in ds.iterall() if e.tag.is_private or e.tag.group >> 8 == 0x60]
    assert patients == {
        (f"{MARK}^NAME", f"{MARK}ID", ""),
        (f"{MARK}^{MARK}", MARK, ""),
        ("DOEPLANTED", "IDPLANTED77", "19611117"),
    }
    for path in (*output.glob("*.npz"), *output.glob("*.nii.gz"), *output.glob("*.png")):
        assert not has_secret(contents(path)[len(path.name) :]), path.name
    for page in pages(output):
        named = {"source", "frames", "files"}
        assert not has_secret({name: x for name, x in page.items() if name not in named})
        for frame in page["frames"]:
            named = {"file", "sop_instance_uid"}
            assert not has_secret({name: x for name, x in frame.items() if name not in named})
    names = {frame["file"].rpartition("/")[2] for page in pages(output) for frame in page["frames"]}
    assert {f"{MARK} slice1.dcm", f"{MARK} slice2.dcm", f"{MARK}.nii.gz"} <= names
    for row in table(output):
        assert row["file"].rpartition("/")[2] in names
        assert bool(row["sop_instance_uid"]) == (".dcm" in row["file"])


def test_a_workdir_names_its_images_in_these_files_alone(world, tmp_path):
    """What a trained model is passed on with names nothing: the two files of it, or one."""
    data, workdir = tmp_path / PLACE[0] / "data", tmp_path / "run"
    shutil.copytree(world.data, data)
    about = PngImagePlugin.PngInfo()
    about.add_text("Patient", f"{MARK} text")
    for path in list(data.rglob("*.png")):
        with Image.open(path) as image:
            image.save(path.with_name(f"{MARK}_{path.name}"), pnginfo=about)
        path.unlink()
    flags = "--config.steps=2", "--config.explained=1"
    assert world._replace(data=data).main(workdir, *flags) == 0
    named = {p.relative_to(workdir).parts[0] for p in workdir.rglob("*") if names_someone(p)}
    files = {"config.json", "split.json", "predictions.npz", "metrics.json", "report.html"}
    assert named == files
    exported = tmp_path / "x.medclip"
    assert main.main(["main", "--mode=export", f"--workdir={workdir}", f"--output={exported}"]) == 0
    assert not names_someone(exported)
    for name in ("scorer.json", "scorer.safetensors"):  # all that prediction needs
        (tmp_path / "passed").mkdir(exist_ok=True)
        shutil.copy(workdir / name, tmp_path / "passed")
    source = dicom(tmp_path / "in" / "a.dcm")
    assert run(tmp_path / "passed", tmp_path / "out", source) == 0


def names_someone(path: Path) -> bool:
    return path.is_file() and has_secret(contents(path))


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


def test_results_whose_salt_is_gone_are_not_mixed_with_others(tmp_path):
    (tmp_path / "results.csv").touch()
    with pytest.raises(WorkdirError, match=r"holds results and no \.pseudonyms: restore it"):
        pseudonyms.salt_of(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]


def test_results_with_names_are_not_mixed_with_pseudonyms(whole, tmp_path, capfd):
    """Also where that call was stopped, so that it left no table, and where a salt is there."""
    source, output = dicom(tmp_path / "in" / "a.dcm"), tmp_path / "out"
    pseudonyms.salt_of(output)
    assert run(whole, output, source) == 0
    for path in (output / "results.csv", output / "unreadable.csv"):
        path.unlink()
    assert run(whole, output, source, more=["--pseudonymise"]) == 2
    assert "holds results with names" in capfd.readouterr().err
    assert run(whole, tmp_path / "new", source, more=["--pseudonymise"]) == 0


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


def test_pictures_of_an_earlier_call_do_not_stay(whole, tmp_path):
    path, output = change(dicom(tmp_path / "a.dcm"), BurnedInAnnotation="YES"), tmp_path / "out"
    left = {}
    for more in (["--keep_burned_in", "--cam"], []):
        assert run(whole, output, path, more=["--pseudonymise", *more]) == 0
        (page,) = pages(output)
        left[len(more)] = {p.name.partition(".")[2] for p in output.glob(f"{page['source']}.*")}
        assert left[len(more)] == {x.partition(".")[2] for x in page["files"].values()} | {"json"}
    assert left[2] - left[0] == {"overlay.png", "cam.png", "capture.dcm"}


@pytest.mark.parametrize("more", [[], ["--pseudonymise"], ["--pseudonymise", "--keep_burned_in"]])
def test_text_burnt_into_pixels_of_a_source_that_nothing_can_refer_to(whole, tmp_path, more):
    """Without a series there are no DICOM objects; the mark counts for the pictures still."""
    path = change(
        dicom(tmp_path / "in" / "a.dcm"), BurnedInAnnotation="YES", SeriesInstanceUID=None
    )
    assert run(whole, tmp_path / "out", path, more=more) == 0
    (page,) = pages(tmp_path / "out")
    shown = more != ["--pseudonymise"]
    assert ("overlay" in page["files"]) == shown != any("no pictures" in x for x in page["notes"])
    assert bool([*(tmp_path / "out").glob("*.overlay.png")]) == ("overlay" in page["files"])


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


@pytest.mark.parametrize("vr", ["FD", "US", "OB", "UN", "LO", "UI"])
def test_a_header_whose_values_are_of_another_kind_is_no_fault_of_ours(tmp_path, vr):
    """Of each element that is taken over: objects, or a note; never an exception."""
    path, results = tmp_path / "a.dcm", set()
    mask, picture = np.ones((1, 40, 50), bool), np.zeros((40, 50, 3), np.uint8)
    for name in dicom_reference.TAGS:
        if name == "SpecificCharacterSet":
            continue
        for value in (b"abc ", b"9" * 20):
            tag = pydicom.tag.Tag(name)
            ds = pydicom.dcmread(dicom(path))
            ds[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
            ds.save_as(path)
            done = dicom_write.build(dicom_write.Task([str(path)], "key", mask, picture, 0))
            assert done.files or done.notes[0].startswith("no DICOM objects: "), (name, value)
            results.add(bool(done.files))
    assert results == {True, False}


def test_of_compression_and_sex_only_what_the_standard_has_is_taken_over(tmp_path):
    path = dicom(tmp_path / "a.dcm")
    fields = {"LossyImageCompression": "01", "LossyImageCompressionRatio": ["12.5", "3"]}
    fields |= {"LossyImageCompressionMethod": ["ISO_10918_1", "ISO_15444_1"], "PatientSex": "O"}
    source = dicom_reference.read(change(path, **fields), None)
    taken = {e.keyword: e.value for e in (*source.lossy, *source.identity)}
    assert {name: taken[name] for name in fields} == fields
    other = {"LossyImageCompressionRatio": "99775533", "LossyImageCompressionMethod": MARK.upper()}
    source = dicom_reference.read(change(path, **other, PatientSex="ANNA"), b"0" * 32)
    assert [(e.keyword, e.value) for e in source.lossy] == [("LossyImageCompression", "01")]
    source = dicom_reference.read(path, None)
    assert [e.value for e in source.identity if e.keyword == "PatientSex"] == [""]
