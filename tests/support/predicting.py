"""Prediction through the command line, and what it leaves."""

import csv
import json
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image

from medclip_jax import main
from medclip_jax.inference import inputs

PLANTED = ("DOEPLANTED", "IDPLANTED77", "19611117", "HOSPITALPLANTED", "PHYSICIANPLANTED")


def run(whole: Path, output: Path, *named, more=()) -> int:
    inputs = [f"--input={n}" for n in named]
    flags = ["main", "--mode=predict", f"--workdir={whole}", f"--output={output}", *inputs, *more]
    return main.main(flags)


def table(output: Path, name: str = "results.csv") -> list[dict]:
    with (output / name).open(newline="") as file:
        return list(csv.DictReader(file))


def pages(output: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted(output.glob("*.json"))]


def noise(seed: int = 0, shape=(40, 50)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def dicom(path: Path, number: int = 1) -> Path:
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.77.3.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.826.0.1.77.1", "1.2.826.0.1.77.2"
    ds.FrameOfReferenceUID = "1.2.826.0.1.77.4"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = PLANTED[0], PLANTED[1], PLANTED[2]
    ds.PatientSex, ds.StudyDate, ds.StudyTime, ds.StudyID = "F", "20200101", "101010", "1"
    ds.InstitutionName, ds.PerformingPhysicianName = PLANTED[3:]
    ds.ReferringPhysicianName, ds.AccessionNumber = "", ""
    ds.Modality, ds.InstanceNumber, ds.SeriesNumber = "MR", number, 1
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 2 * number], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness, ds.PositionReferenceIndicator = [0.5, 0.7], 2, ""
    ds.Rows, ds.Columns, ds.SamplesPerPixel = 40, 50, 1
    ds.PhotometricInterpretation, ds.PixelRepresentation = "MONOCHROME2", 0
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelData = noise(number).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def png(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path)
    return path


def change(path: Path, **elements) -> Path:
    """A DICOM file with other elements; None removes one."""
    ds = pydicom.dcmread(path)
    for name, value in elements.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
        if name in ("SOPClassUID", "SOPInstanceUID"):
            setattr(ds.file_meta, f"MediaStorage{name}", value)
    ds.save_as(path, enforce_file_format=True)
    return path


def walked(*named, **options) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """(names of the files of each item, why the others are none)."""
    items = inputs.find([str(name) for name in named], **options)
    assert len({item.output for item in items}) == len(items)
    return [i.names for i in items if not i.error], {i.source: i.error for i in items if i.error}
