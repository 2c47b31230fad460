"""DICOM results: a Segmentation of what the maps mark, and a secondary capture of the overlay.

Both lie in the study of their source and refer to it. Of the source only what these objects must
share with it is kept (PS3.3 C.7.1.1 Patient and C.7.2.1 General Study, type 1 and 2, and geometry);
names of people beside the patient, institutions, comments and private data are not.
"""

import io
import logging
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from jaxtyping import Bool
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from medclip_jax import __version__

MAKER, MODEL = "medclip_jax", "medclip-jax"
# type 2: present, empty where the source does not say
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
GEOMETRY = (
    *("SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "Laterality"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "PositionReferenceIndicator", "PatientOrientation"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
GROUPS = ("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence")


class Made(NamedTuple):
    """Objects by name, and why one is missing."""

    files: dict[str, bytes]
    notes: list[str]


def build(
    paths: Sequence[str],
    key: str,
    marked: Bool[np.ndarray, "f h w"],
    picture: np.ndarray,
    top: int,
    pseudonymise: bool,
) -> Made:
    """`seg` and `capture` of one DICOM file or of the files of a series, in order.

    key: names the result; the objects' own UIDs follow from it. marked: of every frame.
    picture: RGB overlay [a, b, 3] of frame `top`. pseudonymise: empty patient and study fields, and
    every UID of the source replaced by one derived from it.
    """
    made, notes = {}, []

    @cache
    def sources() -> list[Dataset]:
        return [source(Path(p), pseudonymise) for p in paths]

    jobs = {
        "seg": lambda: _segmentation(sources(), key, marked),
        "capture": lambda: _capture(sources()[min(top, len(paths) - 1)], key, picture),
    }
    for name, job in jobs.items():
        try:
            held = io.BytesIO()
            job().save_as(held)
            made[name] = held.getvalue()
        except Exception as error:  # highdicom raises many types on broken headers
            notes.append(f"no {name}: the source's header forbids it ({type(error).__name__})")
    return Made(made, notes)


def quieten() -> None:
    """Silence libraries that quote header values, which may name a patient, in their warnings."""
    for name in ("pydicom", "highdicom", "nibabel", "PIL"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=rf"{name}(\..*)?")


def source(path: Path, pseudonymise: bool) -> Dataset:
    """What derived objects need of one source, and no more; no pixels."""
    whole = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    kept = Dataset()
    for name in (*UIDS, *GEOMETRY):
        if name in whole:
            kept[name] = whole[name]
    for name in (*PATIENT, *STUDY):
        setattr(kept, name, "" if pseudonymise else whole.get(name, ""))
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if name in kept:
            kept[name] = _plain_groups(kept[name])
    if pseudonymise:
        for name in UIDS:
            if name in kept:
                kept[name].value = generate_uid(entropy_srcs=[str(kept[name].value)])
    kept.file_meta = pydicom.dataset.FileMetaDataset()
    syntax = getattr(whole, "file_meta", {}).get("TransferSyntaxUID")
    kept.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ImplicitVRLittleEndian
    return kept


def _plain_groups(element) -> pydicom.DataElement:
    """Functional groups with their geometry alone."""
    items = []
    for group in element.value:
        plain = Dataset()
        for name in GROUPS:
            if name in group:
                plain[name] = group[name]
        items.append(plain)
    return pydicom.DataElement(element.tag, "SQ", pydicom.Sequence(items))


def _segmentation(sources: list[Dataset], key: str, marked: Bool[np.ndarray, "f h w"]):
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    algorithm = AlgorithmIdentificationSequence(
        MODEL, codes.cid7162.ArtificialIntelligence, __version__
    )
    segment = SegmentDescription(
        1,
        "anomaly",
        codes.SCT.MorphologicallyAbnormalStructure,
        codes.SCT.Lesion,
        "AUTOMATIC",
        algorithm,
        tracking_uid=generate_uid(entropy_srcs=[key, "track"]),
        tracking_id="anomaly",
    )
    return Segmentation(
        source_images=sources,
        pixel_array=marked.astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        series_instance_uid=generate_uid(entropy_srcs=[key, "seg series"]),
        series_number=9001,
        sop_instance_uid=generate_uid(entropy_srcs=[key, "seg"]),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=MODEL,
        software_versions=__version__,
        device_serial_number="0",
        content_label="ANOMALY",
        content_description="Anomaly by few-shot detection; research only",
        content_creator_name="medclip_jax",
    )


def _capture(source: Dataset, key: str, picture: np.ndarray):
    from highdicom.sc import SCImage

    made = SCImage.from_ref_dataset(
        source,
        pixel_array=np.ascontiguousarray(picture),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=_orientation(source),
        series_instance_uid=generate_uid(entropy_srcs=[key, "capture series"]),
        series_number=9002,
        sop_instance_uid=generate_uid(entropy_srcs=[key, "capture"]),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=MODEL,
        software_versions=__version__,
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
    )
    made.SeriesDescription = "Anomaly overlay, research only"
    made.DerivationDescription = "Overlay of an anomaly map; research only, not a diagnosis"
    made.BurnedInAnnotation = "NO"
    if "Laterality" not in made:
        made.Laterality = source.get("Laterality", "")
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    purpose = Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    reference.PurposeOfReferenceCodeSequence = [purpose]
    made.SourceImageSequence = [reference]
    return made


def _orientation(source: Dataset) -> tuple[str, str]:
    """Where rows and columns point in the patient; ("L", "P") where the source does not say."""
    given = source.get("PatientOrientation")
    if given and len(given) == 2 and all(given):
        return tuple(given)
    look = source.get("ImageOrientationPatient")
    if not look or len(look) != 6:
        return "L", "P"

    def letter(vector) -> str:
        axis = int(np.argmax(np.abs(vector)))
        return ("LPH", "RAF")[int(vector[axis] < 0)][axis]

    return letter(np.array(look[:3], float)), letter(np.array(look[3:], float))
