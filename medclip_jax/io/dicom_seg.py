"""DICOM Segmentations: built with highdicom, referring to their sources frame by frame."""

import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydicom
from jaxtyping import Bool
from pydicom.dataset import Dataset
from pydicom.pixels import pack_bits
from pydicom.uid import generate_uid

from medclip_jax import __version__
from medclip_jax.io import dicom_reference
from medclip_jax.io.dicom_reference import Plane

MODEL = "medclip-jax"
COMMON: dict[str, Any] = {
    "manufacturer": "medclip_jax",
    "manufacturer_model_name": MODEL,
    "software_versions": __version__,
    "instance_number": 1,
}
UNKNOWN_THICKNESS = 1.0  # mm, while an object is built; it is not in the object


class UnequalError(Exception):
    """What was written is not what is read; the message says in what."""


def segmentation(planes: Sequence[Plane], key: str, mask: Bool[np.ndarray, "f h w"]) -> Dataset:
    """Of planes that share a grid, or of frames without position.

    highdicom places frames by single-frame sources; it gets one for each plane under a UID of its
    own, and the references are set to the true files and frames afterwards.
    """
    thickness = dicom_reference.thickness(planes)
    placed = bool(planes[0].space)
    names = {f"2.25.{i + 1}": plane for i, plane in enumerate(planes)}
    stands_for = [stand_in(plane, planes[0], name, mask) for name, plane in names.items()]
    for ds in stands_for:
        ds.SliceThickness = thickness or UNKNOWN_THICKNESS
    used = len(planes) if placed else 1
    seg = _highdicom_segmentation(stands_for[:used], mask[:used], key)
    if not placed:
        _add_frames(seg, list(names), mask)
    for group in seg.PerFrameFunctionalGroupsSequence:
        reference = group.DerivationImageSequence[0].SourceImageSequence[0]
        plane = names[reference.ReferencedSOPInstanceUID]
        reference.ReferencedSOPClassUID = plane.sop_class
        reference.ReferencedSOPInstanceUID = plane.instance
        if plane.number is not None:
            reference.ReferencedFrameNumber = plane.number
    instances = {plane.instance: plane for plane in planes}.values()
    seg.SourceImageSequence = [reference_to(plane) for plane in instances]
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence = [
        reference_to(plane) for plane in instances
    ]
    if thickness is None or not planes[0].spacing:
        seg.SharedFunctionalGroupsSequence[0].pop("PixelMeasuresSequence", None)
    elif placed and len(planes) == 1:  # highdicom writes 1 mm
        del seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
    return seg


def stand_in(plane: Plane, first: Plane, name: str, mask: np.ndarray) -> Dataset:
    """A single-frame image in place of a plane, on the grid of the first one of its group."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, name
    ds.StudyInstanceUID, ds.SeriesInstanceUID = plane.study, plane.series
    ds.PatientName = ds.PatientID = ds.PatientBirthDate = ds.PatientSex = ""
    ds.StudyDate = ds.StudyTime = ds.StudyID = ds.AccessionNumber = ds.ReferringPhysicianName = ""
    ds.Modality, (ds.Rows, ds.Columns) = "OT", mask.shape[1:]
    if first.spacing:
        ds.PixelSpacing = list(first.spacing)
    if plane.space:
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = plane.space, ""
        ds.ImagePositionPatient = list(plane.position)
        ds.ImageOrientationPatient = list(first.orientation)
    return ds


def _highdicom_segmentation(sources: list[Dataset], mask: np.ndarray, key: str) -> Dataset:
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
        pixel_array=mask.astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        series_instance_uid=generate_uid(entropy_srcs=[key, "seg series"]),
        series_number=9001,
        sop_instance_uid=generate_uid(entropy_srcs=[key, "seg"]),
        **COMMON,
        device_serial_number="0",
        content_label="ANOMALY",
        content_description="Anomaly by few-shot detection; research only",
        content_creator_name="medclip_jax",
    )


def _add_frames(seg: Dataset, names: Sequence[str], mask: Bool[np.ndarray, "f h w"]) -> None:
    """All frames of a source without positions, of which highdicom places the first alone.

    Their order is a dimension of its own: In-Stack Position Number (PS3.3 C.7.6.16.2.2.1).
    """
    index = copy.deepcopy(seg.DimensionIndexSequence[0])
    index.DimensionIndexPointer = pydicom.datadict.tag_for_keyword("InStackPositionNumber")
    index.FunctionalGroupPointer = pydicom.datadict.tag_for_keyword("FrameContentSequence")
    index.DimensionDescriptionLabel = "In-Stack Position Number"
    seg.DimensionIndexSequence.append(index)
    (first,) = seg.PerFrameFunctionalGroupsSequence
    groups = []
    for number, name in enumerate(names, start=1):
        group = copy.deepcopy(first)
        content = group.FrameContentSequence[0]
        content.StackID, content.InStackPositionNumber = "1", number
        content.DimensionIndexValues = [1, number]
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        source.ReferencedSOPInstanceUID = name
        groups.append(group)
    seg.PerFrameFunctionalGroupsSequence = groups
    seg.NumberOfFrames = len(groups)
    seg.PixelData = pack_bits(mask.astype(np.uint8))


def reference_to(plane: Plane) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID = plane.sop_class
    reference.ReferencedSOPInstanceUID = plane.instance
    return reference


def check(raw: bytes, planes: Sequence[Plane], mask: Bool[np.ndarray, "f h w"]) -> None:
    """Raise UnequalError unless highdicom reads the mask of every plane under its reference."""
    from highdicom.seg import segread

    seg = segread(io.BytesIO(raw))
    frames = seg.pixel_array.reshape(-1, *mask.shape[1:])
    expected = {(p.instance, p.number): m for p, m in zip(planes, mask, strict=True)}
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        reference = group.DerivationImageSequence[0].SourceImageSequence[0]
        number = reference.get("ReferencedFrameNumber")
        plane = reference.ReferencedSOPInstanceUID, None if number is None else int(number)
        if not np.array_equal(expected.pop(plane), frame):
            raise UnequalError("what was written is not what is read back")
    if any(left.any() for left in expected.values()):
        raise UnequalError("what was written lacks a frame")
