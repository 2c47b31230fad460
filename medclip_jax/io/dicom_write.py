"""DICOM results: Segmentations of the alarmed pixels, and a secondary capture of the overlay.

All lie in the study of their source and refer to it frame by frame. `dicom_reference` lists what is
taken from a source. A Segmentation is read back and compared before it is handed out.
"""

import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from jaxtyping import Bool, UInt8
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from medclip_jax.errors import DataError
from medclip_jax.io import dicom_header, dicom_reference, dicom_seg
from medclip_jax.io.dicom_reference import NoReferenceError, Plane, Source

MIN_FILES = 128  # for fewer, processes would start for longer than they work
UID = re.compile(r"(?=.{1,64}$)([01]\.[1-3]?\d|2\.(0|[1-9]\d*))(\.(0|[1-9]\d*))*")
SINGLE = {  # classes whose files have one frame, PS3.3 A.2 to A.4, A.6, A.8, A.21, A.26 to A.28
    f"1.2.840.10008.5.1.4.1.1.{n}"
    for n in ("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1", "2", "4", "6.1", "7", "128")
}
BURNED_IN = "the source says that text is burnt into its pixels"
NO_PICTURES = f"no capture and no pictures: {BURNED_IN}; --keep_burned_in writes them"


class DicomObjects(NamedTuple):
    files: dict[str, bytes]  # "capture", and "seg" or, where several are needed, "1.seg", "2.seg"
    notes: list[str]  # why one is missing
    frames: list[tuple[int, int]]  # (file, frame in it from 1) of each frame
    burned_in: bool  # the source says that text is burnt into its pixels


class Task(NamedTuple):
    """One DICOM file, or the files of a series in order, with its result."""

    paths: Sequence[str]
    key: str  # names the result; the objects' own UIDs follow from it
    mask: Bool[np.ndarray, "f h w"]  # alarmed pixels of every frame
    picture: UInt8[np.ndarray, "a b 3"]  # RGB overlay of frame `top`
    top: int
    salt: bytes | None = None  # as of `dicom_reference.read`
    burned_in: bool = False  # write a pseudonymised capture also where its pixels show text


Build = Callable[[Task], DicomObjects]  # as `build`


def build(task: Task) -> DicomObjects:
    """The objects of one item. One that cannot be built costs itself and leaves a note."""
    try:
        sources = [dicom_reference.read(Path(p), task.salt) for p in task.paths]
    except Exception as error:  # pydicom raises many types when a value is of another kind
        return _no_objects(task, _reason(error), any(map(_is_burned_in, task.paths)))
    owners = [(i, plane) for i, source in enumerate(sources) for plane in source.planes]
    planes = [plane for _, plane in owners]
    frames = [(i, plane.number or 1) for i, plane in owners]
    burned_in = any(source.burned_in == "YES" for source in sources)
    if len(planes) != len(task.mask):
        why = f"headers state {len(planes)} frames, {len(task.mask)} were read"
        return _no_objects(task, why, burned_in)
    files, notes = _segmentations(task, sources, owners)
    notes += _flaws(planes)
    if _hides_pictures(task, burned_in):
        notes.append(NO_PICTURES)
        return DicomObjects(files, notes, frames, burned_in)
    if burned_in:
        notes.append(f"{BURNED_IN}: pictures and capture show it")
    source, plane = sources[owners[task.top][0]], planes[task.top]
    try:
        capture = _capture(source, plane, task.key, task.picture)
        stated = "YES" if burned_in else source.burned_in
        if stated:  # else nothing is claimed
            capture.BurnedInAnnotation = stated
        files["capture"] = _finished(capture, source, task.salt)
    except Exception as error:  # as of the Segmentations
        notes.append(f"no capture: {_reason(error)}")
    return DicomObjects(files, notes, frames, burned_in)


def _no_objects(task: Task, why: str, burned_in: bool) -> DicomObjects:
    notes = [f"no DICOM objects: {why}"]
    notes += [NO_PICTURES] if _hides_pictures(task, burned_in) else []
    return DicomObjects({}, notes, [], burned_in)


def _hides_pictures(task: Task, burned_in: bool) -> bool:
    """Under pseudonyms text that is burnt into pixels is not shown unless it was asked for."""
    return burned_in and bool(task.salt) and not task.burned_in


def _is_burned_in(path: str) -> bool:
    """What a header says that can be read in part alone; True where it cannot be read at all."""
    try:
        head = dicom_header.parse(Path(path), ("BurnedInAnnotation",))
        return "YES" in str(head.get("BurnedInAnnotation") or "").upper()
    except Exception as error:  # of a file that was read a moment ago: rather no pictures
        logging.debug("no header of a file (%s)", type(error).__name__)
        return True


def _segmentations(
    task: Task, sources: Sequence[Source], owners: Sequence[tuple[int, Plane]]
) -> tuple[dict[str, bytes], list[str]]:
    """The Segmentations by name, and why one is missing."""
    planes = [plane for _, plane in owners]
    parts = dicom_reference.groups(planes)
    files: dict[str, bytes] = {}
    notes = []
    for number, part in enumerate(parts, start=1):
        name = f"{number}.seg" if len(parts) > 1 else "seg"
        own = [planes[i] for i in part]
        source = sources[owners[part[0]][0]]
        try:
            seg = dicom_seg.segmentation(own, f"{task.key} {number}", task.mask[part])
            if not own[0].space:  # PS3.3 C.7.6.1: where no position says it
                _set_directions(seg, source, own[0])
            raw = _finished(seg, source, task.salt)
            dicom_seg.check(raw, own, task.mask[part])
            files[name] = raw
        except Exception as error:  # highdicom raises many types on broken headers
            notes.append(f"no {name}: {_reason(error)}")
    return files, notes


def _flaws(planes: Sequence[Plane]) -> list[str]:
    """What is wrong in the headers of the sources and stays so, as objects have to agree with them;
    validators complain of it."""
    names = {tuple(filter(None, (p.instance, p.series, p.study, p.space))) for p in planes}
    flaws = {
        "invalid UIDs": any(not UID.fullmatch(uid) for ids in names for uid in ids),
        "one UID for several objects": any(len(set(ids)) < len(ids) for ids in names),
        "several frames in a single-frame class": any(
            p.number and p.sop_class in SINGLE for p in planes
        ),
    }
    wrong = [text for text, true in flaws.items() if true]
    return [f"objects refer to a source with {' and '.join(wrong)}"] if wrong else []


def _set_directions(ds: Dataset, source: Source, plane: Plane) -> None:
    ds.PatientOrientation = list(dicom_reference.directions(source, plane)) or ""


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

    def build_in_process(task: Task) -> DicomObjects:
        try:
            return pool.submit(build, task).result()
        except (BrokenProcessPool, OSError) as error:
            logging.debug("no process to build DICOM objects (%s)", type(error).__name__)
            return build(task)

    try:
        yield build_in_process
    finally:
        pool.shutdown(cancel_futures=True)


def _main_can_be_imported() -> bool:
    """Whether a new process may import __main__: a script without a guard would run again."""
    main = sys.modules["__main__"]
    command = Path(getattr(main, "__file__", None) or dicom_seg.MODEL).stem == dicom_seg.MODEL
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


def _reason(error: Exception) -> str:
    """For people; texts of libraries may quote a value of the header."""
    if isinstance(error, dicom_seg.UnequalError | NoReferenceError):
        return str(error)
    if isinstance(error, DataError):
        return "its header cannot be read again"
    return f"the source's header forbids it ({type(error).__name__})"


def _capture(source: Source, plane: Plane, key: str, picture: np.ndarray) -> Dataset:
    from highdicom.sc import SCImage
    from highdicom.sr import CodedConcept

    capture = SCImage.from_ref_dataset(
        dicom_seg.stand_in(plane, plane, plane.instance, picture[None, ..., 0]),
        pixel_array=np.ascontiguousarray(picture),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),  # highdicom wants one
        series_instance_uid=generate_uid(entropy_srcs=[key, "capture series"]),
        series_number=9002,
        sop_instance_uid=generate_uid(entropy_srcs=[key, "capture"]),
        **dicom_seg.COMMON,
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
    )
    _set_directions(capture, source, plane)
    capture.SeriesDescription = "Anomaly overlay, research only"
    capture.DerivationDescription = "Overlay of an anomaly map; research only, not a diagnosis"
    capture.Laterality = source.laterality
    reference = dicom_seg.reference_to(plane)
    if plane.number is not None:
        reference.ReferencedFrameNumber = plane.number
    reference.PurposeOfReferenceCodeSequence = [
        CodedConcept("121322", "DCM", "Source image for image processing operation")
    ]
    capture.SourceImageSequence = [reference]
    return capture


def _finished(ds: Dataset, source: Source, salt: bytes | None) -> bytes:
    """The bytes of an object with its patient and study, whose text is read as the source's is."""
    for element in source.lossy:
        ds[element.tag] = element
    if salt:
        ds.PatientIdentityRemoved = "YES"
        ds.DeidentificationMethod = list(dicom_reference.DEIDENTIFICATION)
        ds.LongitudinalTemporalInformationModified = "REMOVED"
    ds.SpecificCharacterSet = source.charset
    for element in source.identity:
        ds[element.tag] = element
    raw = _bytes(ds)
    again = pydicom.dcmread(io.BytesIO(raw), stop_before_pixels=True)
    if any(again[e.tag].value != e.value for e in source.identity):  # no such text in this set
        ds.SpecificCharacterSet = dicom_reference.UTF8
        for element in dicom_reference.as_utf8(source.identity):
            ds[element.tag] = element
        raw = _bytes(ds)
    return raw


def _bytes(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
