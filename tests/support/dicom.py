"""DICOM files: those of the reference and small ones that tests fill."""

import json
from pathlib import Path

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset

from tests.support.reference import reference_files

EXPECTED = reference_files("io/expected.json")[0]
CASES = json.loads(EXPECTED.read_text())["dicom"]


def file(name: str) -> Path:
    return EXPECTED.parent / CASES[name]["file"]


def film(pixels: np.ndarray, **elements) -> Dataset:
    """A small uncompressed secondary capture of one patient."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid(entropy_srcs=["test"])
    ds.PatientName, ds.PatientID, ds.Modality = "DOE^JANE", "4711", "MR"
    ds.SOPClassUID, ds.SOPInstanceUID = uid.SecondaryCaptureImageStorage, "1.2.3"
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.itemsize
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def save(path: Path, ds: Dataset) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


def ramp(height=6, width=8, dtype=np.uint16) -> np.ndarray:
    return np.arange(height * width, dtype=dtype).reshape(height, width)
