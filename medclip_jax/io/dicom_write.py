"""DICOM results: a Segmentation of the alarmed pixels, and a secondary capture of the overlay.

Both lie in the study of their source and refer to it. Of the source only what these objects must
share with it is copied (PS3.3 C.7.1.1 Patient and C.7.2.1 General Study, type 1 and 2, and
geometry); other people's names, institutions, comments and private data are not.
"""

import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from jaxtyping import Bool, UInt8
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from medclip_jax import __version__

MODEL = "medclip-jax"
COMMON: dict[str, Any] = {
    "manufacturer": "medclip_jax",
    "manufacturer_model_name": MODEL,
    "software_versions": __version__,
    "instance_number": 1,
}
# type 2: present, empty where the source does not say
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
GEOMETRY = (
    *("SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "Laterality"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "PositionReferenceIndicator", "PatientOrientation"),
    *("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
GROUP_GEOMETRY = ("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence")
MIN_FILES = 128  # for fewer, processes would start for longer than they work


class DicomObjects(NamedTuple):
    files: dict[str, bytes]  # by name
    notes: list[str]  # why one is missing


Build = Callable[..., DicomObjects]  # as `build`


def build(
    paths: Sequence[str],
    key: str,
    mask: Bool[np.ndarray, "f h w"],
    picture: UInt8[np.ndarray, "a b 3"],
    top: int,
    pseudonymise: bool,
) -> DicomObjects:
    """Build `seg` and `capture` of one DICOM file or of the files of a series, in order.

    A header that highdicom refuses costs its object, with a note.

    Args:
      key: names the result; the objects' own UIDs follow from it.
      mask: alarmed pixels of every frame.
      picture: RGB overlay of frame `top`.
      pseudonymise: empty patient and study fields, and UIDs derived from those of the source.
    """
    built, notes = {}, []

    @cache
    def sources() -> list[Dataset]:
        return [source(Path(p), pseudonymise) for p in paths]

    jobs = {
        "seg": lambda: _segmentation(sources(), key, mask),
        "capture": lambda: _capture(sources()[min(top, len(paths) - 1)], key, picture),
    }
    for name, job in jobs.items():
        try:
            buffer = io.BytesIO()
            job().save_as(buffer)
            built[name] = buffer.getvalue()
        except Exception as error:  # highdicom raises many types on broken headers
            notes.append(f"no {name}: the source's header forbids it ({type(error).__name__})")
    return DicomObjects(built, notes)


@contextmanager
def builder(count: int) -> Iterator[Build]:
    """A `build` for `count` files: in processes, or in the caller's thread for few.

    Threads would delay each other and the caller's encoder, as highdicom and pydicom are Python.
    Where a process is killed, the objects are built in the caller's thread from then on. All
    processes have ended when the block is left, or when this process was killed.
    """
    if count < MIN_FILES or not _main_can_be_imported():
        yield build
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs JAX may hang
    pool = ProcessPoolExecutor(mp_context=context, initializer=_start_worker)

    def build_in_process(*args: Any) -> DicomObjects:
        try:
            return pool.submit(build, *args).result()
        except (BrokenProcessPool, OSError) as error:
            logging.debug("no process to build DICOM objects (%s)", type(error).__name__)
            return build(*args)

    try:
        yield build_in_process
    finally:
        pool.shutdown(cancel_futures=True)


def _main_can_be_imported() -> bool:
    """Whether a new process may import __main__: a script without a guard would run again."""
    main = sys.modules["__main__"]
    command = Path(getattr(main, "__file__", None) or MODEL).stem == MODEL
    return command or getattr(main, "__spec__", None) is not None


def _start_worker() -> None:
    """A worker prints nothing of headers, leaves Ctrl-C to its caller, and ends with it."""

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quieten()
    threading.Thread(target=end_with_parent, daemon=True).start()


def quieten() -> None:
    """Silence libraries that quote header values, which may name a patient, in their warnings."""
    for name in ("pydicom", "highdicom", "nibabel", "PIL"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", module=rf"{name}(\..*)?")


def source(path: Path, pseudonymise: bool) -> Dataset:
    """What derived objects need of one source, and no more; no pixels."""
    whole = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    copy = _only(whole, (*UIDS, *GEOMETRY))
    for name in (*PATIENT, *STUDY):
        setattr(copy, name, "" if pseudonymise else whole.get(name, ""))
    for name in GROUPS:
        if name in whole:
            setattr(copy, name, [_only(group, GROUP_GEOMETRY) for group in whole[name].value])
    for name in UIDS:
        if pseudonymise and name in copy:
            copy[name].value = generate_uid(entropy_srcs=[str(copy[name].value)])
    copy.file_meta = pydicom.dataset.FileMetaDataset()
    syntax = getattr(whole, "file_meta", {}).get("TransferSyntaxUID")
    copy.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ImplicitVRLittleEndian
    return copy


def _only(group: Dataset, names: Sequence[str]) -> Dataset:
    part = Dataset()
    for name in names:
        if name in group:
            part[name] = group[name]
    return part


def _segmentation(sources: list[Dataset], key: str, mask: Bool[np.ndarray, "f h w"]):
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


def _capture(source: Dataset, key: str, picture: np.ndarray):
    from highdicom.sc import SCImage
    from highdicom.sr import CodedConcept

    capture = SCImage.from_ref_dataset(
        source,
        pixel_array=np.ascontiguousarray(picture),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=_orientation(source),
        series_instance_uid=generate_uid(entropy_srcs=[key, "capture series"]),
        series_number=9002,
        sop_instance_uid=generate_uid(entropy_srcs=[key, "capture"]),
        **COMMON,
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
    )
    capture.SeriesDescription = "Anomaly overlay, research only"
    capture.DerivationDescription = "Overlay of an anomaly map; research only, not a diagnosis"
    capture.BurnedInAnnotation = "NO"
    if "Laterality" not in capture:
        capture.Laterality = source.get("Laterality", "")
    purpose = CodedConcept("121322", "DCM", "Source image for image processing operation")
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    reference.PurposeOfReferenceCodeSequence = [purpose]
    capture.SourceImageSequence = [reference]
    return capture


def _orientation(source: Dataset) -> tuple[str, str]:
    """Where rows and columns point in the patient; ("L", "P") where the source does not say."""
    stated = source.get("PatientOrientation")
    if stated and len(stated) == 2 and all(stated):
        return tuple(stated)
    cosines = source.get("ImageOrientationPatient")
    if not cosines or len(cosines) != 6:
        return "L", "P"
    vectors = np.array(cosines, float).reshape(2, 3)
    row, column = (
        ("LPH", "RAF")[int(v[axis] < 0)][axis]
        for v, axis in zip(vectors, np.abs(vectors).argmax(1), strict=True)
    )
    return row, column
