"""Sources of DICOM objects, and what highdicom and dciodvfy read in what was written."""

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

import highdicom
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medclip_jax.io import dicom_write
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


@pytest.fixture
def dicom_warnings_off():
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
