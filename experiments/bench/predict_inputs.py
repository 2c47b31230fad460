"""Files for the measurement of prediction: simulated images, each with noise of its own."""

from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from jaxtyping import UInt8
from PIL import Image

from medclip_jax.data import phantom

RENDERS = 16  # different simulated images; rendering more takes longer than scoring them
NOISE = 4  # grey values, standard deviation: no two files are alike
ROOT_UID = "1.2.826.0.1.3680043.8.498.9"


def pictures(
    modality: str, count: int, shape: tuple[int, int], seed: int
) -> Iterator[UInt8[np.ndarray, "h w"]]:
    """Simulated images, half of them with a lesion, as 8-bit grey."""
    images, _ = phantom.generate(modality, min(count, RENDERS), shape, seed)
    rng = np.random.default_rng([seed, 1])
    for i in range(count):
        noisy = 255 * images[i % len(images)] + rng.normal(0, NOISE, shape)
        yield np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def png(folder: Path, count: int, seed: int) -> Path:
    """Breast ultrasound, 500 x 560 pixels, as in BUSI."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(pictures("ultrasound", count, (500, 560), seed)):
        Image.fromarray(pixels).save(folder / f"{i:05}.png")
    return folder


def colour_png(folder: Path, count: int, seed: int) -> Path:
    """The same, each pixel three times, as BUSI itself."""
    for path in png(folder, count, seed).iterdir():
        Image.open(path).convert("RGB").save(path)
    return folder


def jpeg(folder: Path, count: int, seed: int) -> Path:
    """Chest films of 1024 x 1024 pixels."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(pictures("xray", count, (1024, 1024), seed)):
        Image.fromarray(pixels).save(folder / f"{i:05}.jpg", quality=90)
    return folder


def dicom(folder: Path, count: int, seed: int) -> Path:
    """Films of 512 x 512 pixels and 12 bits, each a series of its own."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(pictures("xray", count, (512, 512), seed)):
        ds = header(i)
        ds.Rows, ds.Columns = pixels.shape
        ds.PixelData = (pixels.astype(np.uint16) * 16).tobytes()
        ds.save_as(folder / f"{i:05}.dcm", enforce_file_format=True)
    return folder


def header(number: int) -> pydicom.Dataset:
    """An MR slice without its pixels."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ROOT_UID}.3.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{ROOT_UID}.1", f"{ROOT_UID}.2.{number}"
    ds.FrameOfReferenceUID = f"{ROOT_UID}.4"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "", "", "", ""
    ds.StudyDate, ds.StudyTime, ds.StudyID = "20200101", "101010", "1"
    ds.ReferringPhysicianName, ds.AccessionNumber, ds.PositionReferenceIndicator = "", "", ""
    ds.Modality, ds.InstanceNumber, ds.SeriesNumber = "MR", 1, number + 1
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness = [0.5, 0.5], 2
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.PixelRepresentation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 0, 16, 12, 11
    return ds


def nifti(folder: Path, count: int, seed: int) -> Path:
    """One volume of `count` axial slices of 256 x 256 voxels."""
    folder.mkdir(parents=True)
    slices = np.stack(list(pictures("mri", count, (256, 256), seed)))
    voxels = slices.transpose(2, 1, 0).astype(np.int16) * 4
    whole = nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0]))
    whole.to_filename(folder / "volume.nii.gz")
    return folder


MAKERS = {"png": png, "colour png": colour_png, "jpeg": jpeg, "dicom": dicom, "nifti": nifti}
