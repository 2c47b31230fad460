"""What derived DICOM objects take of their sources, by a list: references, geometry, identity.

Each value is read and rebuilt, never copied with what lies around it, so that no comment, private
element or nested item comes along. Sources: PS3.3 C.7.1.1 (Patient), C.7.2.1 (General Study),
C.7.6.16.2 (functional groups), C.12.1.1.2 and PS3.5 6.1 (character sets).
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom.charset
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.uid import UID_dictionary, generate_uid

from medclip_jax.io import dicom_header

# type 2: present, empty where the source does not say
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
METHODS = "10918_1 14495_1 15444_1 15444_15 18181_1 13818_2 14496_10 23008_2"  # C.7.6.1.1.5.1
TAGS = (
    *("SpecificCharacterSet", "FrameOfReferenceUID", "NumberOfFrames", "Rows", "Columns"),
    *("TemporalPositionIdentifier", "BurnedInAnnotation", "Laterality", "ImageLaterality"),
    *("PatientOrientation", *PATIENT, *STUDY, *UIDS, *GEOMETRY, *GROUPS, *LOSSY),
)
UTF8 = "ISO_IR 192"
DEIDENTIFICATION = (  # LO, at most 64 characters each
    "Attributes copied by a list without identity or dates",
    "UIDs replaced by salted hashes; pixels not searched for text",
)
SPACING_TOLERANCE = 1e-3  # mm, between positions that are one


class Plane(NamedTuple):
    """One frame of a source; every UID as the derived objects shall have it."""

    instance: str  # SOPInstanceUID
    sop_class: str
    series: str
    study: str
    number: int | None  # of the frame in its file, from 1; None in a file of one
    space: str  # FrameOfReferenceUID; "" unless position, orientation and spacing are usable
    position: tuple[float, ...]  # mm; () if unknown
    orientation: tuple[float, ...]  # cosines of a row and of a column; () if unknown
    spacing: tuple[float, ...]  # mm (row, column); () if unknown
    thickness: float | None  # mm
    time: str  # TemporalPositionIdentifier or index


class Source(NamedTuple):
    """One file."""

    planes: list[Plane]
    charset: Any  # SpecificCharacterSet to write
    identity: list[DataElement]  # of PATIENT and STUDY, empty where they are unknown or left out
    burned_in: str  # BurnedInAnnotation
    laterality: str
    directions: tuple[str, ...]  # PatientOrientation, of two values or none
    lossy: list[DataElement]


class NoReferenceError(Exception):
    """A source that nothing can refer to; the message says why, without quoting a value."""


def read(path: Path, salt: bytes | None) -> Source:
    """What derived objects need of one file, and no more; no pixels.

    Args:
      salt: leave out patient and study, and derive UIDs from the source's and this; None keeps
        both as they are.

    Raises NoReferenceError where a UID is missing, DataError where the file is gone.
    """
    head = dicom_header.parse(path, TAGS)
    for name in UIDS:
        if not head.get(name):
            raise NoReferenceError(f"the source has no {name}")
    charset, identity = (UTF8, _empty()) if salt else _identity(head)
    directions = head.get("PatientOrientation") or ()
    directions = tuple(str(d) for d in directions) if not isinstance(directions, str) else ()
    return Source(
        _planes(path, head, salt),
        charset,
        identity,
        _text(head, "BurnedInAnnotation", {"YES", "NO"}),
        _text(head, "ImageLaterality", {"L", "R", "B", "U"})
        or _text(head, "Laterality", {"L", "R"}),
        directions if len(directions) == 2 and all(map(_is_direction, directions)) else (),
        _lossy(head),
    )


def pseudonym(uid: str, salt: bytes | None) -> str:
    """The UID itself, or one that only the owner of the salt can derive from it."""
    return generate_uid(entropy_srcs=[salt.hex(), str(uid)]) if salt else str(uid)


def _planes(path: Path, head: Dataset, salt: bytes | None) -> list[Plane]:
    count = dicom_header.count(path, head, "NumberOfFrames")
    shared = (head.get(GROUPS[0]) or [Dataset()])[0]
    each: Sequence[Dataset] = head.get(GROUPS[1]) or []
    if len(each) != count:  # none, or broken: geometry is that of the file, if it is of one frame
        each = [Dataset()] * count
    plain = head if count == 1 else Dataset()
    ids = [pseudonym(head[name].value, salt) for name in UIDS[:3]]
    space = str(head.get("FrameOfReferenceUID") or "")
    sop_class = str(head.SOPClassUID)
    if sop_class not in UID_dictionary:  # a maker's own
        sop_class = pseudonym(sop_class, salt)
    planes = []
    for i, own in enumerate(each):

        def find(group: str, name: str, own: Dataset = own) -> Any:
            places = [g.get(group) for g in (own, shared)]
            return next((p[0].get(name) for p in places if p), plain.get(name))

        position = _numbers(find("PlanePositionSequence", "ImagePositionPatient"), 3)
        orientation = _numbers(find("PlaneOrientationSequence", "ImageOrientationPatient"), 6)
        spacing = _numbers(find("PixelMeasuresSequence", "PixelSpacing"), 2)
        spacing = spacing if spacing and min(spacing) > 0 else ()
        thickness = _numbers(find("PixelMeasuresSequence", "SliceThickness"), 1)
        time = find("FrameContentSequence", "TemporalPositionIndex")
        orientation = orientation if _is_orthonormal(orientation) else ()
        in_space = space and position and orientation and spacing
        planes.append(
            Plane(
                *(ids[2], sop_class, ids[1], ids[0]),
                i + 1 if count > 1 else None,
                pseudonym(space, salt) if in_space else "",
                *(position, orientation, spacing),
                thickness[0] if thickness and thickness[0] > 0 else None,
                str(time or plain.get("TemporalPositionIdentifier") or ""),
            )
        )
    return planes


def groups(planes: Sequence[Plane]) -> list[list[int]]:
    """Which planes share a Segmentation: those of one grid, each place in it once.

    A slice that is there at several times is in as many groups, in order. Planes without position
    share one only within a file, as nothing says that unrelated films belong together.
    """
    result: dict[tuple, list[int]] = {}
    used: dict[tuple, int] = {}  # times that a place was seen
    for i, plane in enumerate(planes):
        grid = tuple(round(v, 3) for v in (*plane.orientation, *plane.spacing))
        key: tuple = (plane.study, plane.series, plane.space, grid)
        if plane.space:
            place = tuple(round(v / SPACING_TOLERANCE) for v in plane.position)
            turn = used[*key, plane.time, place] = used.get((*key, plane.time, place), 0) + 1
            key = (*key, plane.time, turn)
        elif not (plane.position and plane.orientation) or plane.number is not None:
            key = (*key, plane.instance)
        result.setdefault(key, []).append(i)
    return list(result.values())


def thickness(planes: Sequence[Plane]) -> float | None:
    """Slice thickness in mm: the header's, else the distance of neighbours; None if unknown."""
    if planes[0].thickness is not None:
        return planes[0].thickness
    if not (planes[0].orientation and all(plane.position for plane in planes)):
        return None
    row, column = np.reshape(planes[0].orientation, (2, 3))
    depths = np.unique(np.round([np.cross(row, column) @ plane.position for plane in planes], 3))
    return float(np.median(np.diff(depths))) if len(depths) > 1 else None


def directions(source: Source, plane: Plane) -> tuple[str, ...]:
    """Where rows and columns point in the patient, such as ("L", "P"); () where nothing says it."""
    if source.directions or not plane.orientation:
        return source.directions
    vectors = np.reshape(plane.orientation, (2, 3))
    row, column = (
        ("LPH", "RAF")[int(v[axis] < 0)][axis]
        for v, axis in zip(vectors, np.abs(vectors).argmax(1), strict=True)
    )
    return row, column


def _identity(head: Dataset) -> tuple[Any, list[DataElement]]:
    """The character set to write, and the elements of PATIENT and STUDY as they are stored.

    A source without a character set, or with an unknown one, is taken as UTF-8 if its bytes are
    that, else as Latin-1.
    """
    stored = [head.get_item(name) for name in (*PATIENT, *STUDY) if name in head]
    charset = _charset(head.get("SpecificCharacterSet"))
    if charset is None:
        raw = b"".join(e.value or b"" for e in stored if isinstance(e, RawDataElement))
        try:
            raw.decode()
            charset = UTF8
        except UnicodeDecodeError:
            charset = "ISO_IR 100"
    encodings = pydicom.charset.convert_encodings(charset)
    elements = {e.tag: e for e in _empty()}
    for element in stored:
        if isinstance(element, RawDataElement):
            vr = pydicom.datadict.dictionary_VR(element.tag)  # whatever the file says
            element = convert_raw_data_element(element._replace(VR=vr), encoding=encodings)
        elements[element.tag] = _valid(element)
    return charset, list(elements.values())


def _valid(element: DataElement) -> DataElement:
    """Dates, times and sex as the standard has them, of 1996.10.29 and 15:18:59 too; else empty."""
    valid = {
        "DA": r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])",
        "TM": r"([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?",
        "CS": "[MFO]",
    }.get(element.VR)
    if valid is None:
        return element
    separators = {"DA": r"(?<=\d)[.:](?=\d\d)", "TM": ":"}.get(element.VR, "^$")
    text = re.sub(separators, "", str(element.value or "")).strip()
    text = text if re.fullmatch(valid, text) else ""
    return DataElement(element.tag, element.VR, text, validation_mode=0)


def as_utf8(elements: Sequence[DataElement]) -> list[DataElement]:
    """The same text without the bytes that it was stored as."""
    result = []
    for element in elements:
        many = element.VM > 1
        value = [str(v) for v in element.value] if many else str(element.value or "")
        result.append(DataElement(element.tag, element.VR, value, validation_mode=0))
    return result


def _charset(value: Any) -> Any:
    """SpecificCharacterSet in the standard's spelling; None if there is none that is known."""
    terms = [str(value)] if isinstance(value, str) else [str(v or "") for v in value or ()]
    known = []
    for term in terms:
        match = re.fullmatch(r"ISO[ _-]?(2022)?[ _-]?IR[ _-]?(\d+)", term.strip().upper())
        number = match and (f"ISO 2022 IR {match[2]}" if match[1] else f"ISO_IR {match[2]}")
        known.append(number or term.strip())
    if not any(known) or any(t not in pydicom.charset.python_encoding for t in known):
        return None
    return known if len(known) > 1 else known[0]


def _empty() -> list[DataElement]:
    ds = Dataset()
    for name in (*PATIENT, *STUDY):
        setattr(ds, name, "")
    return list(ds)


def _lossy(head: Dataset) -> list[DataElement]:
    """LOSSY where they are what the standard has: no other text comes along."""
    ratios = [_numbers(ratio, 1) for ratio in np.ravel(head.get(LOSSY[1]) or [])]
    methods = [str(method) for method in np.ravel(head.get(LOSSY[2]) or [])]
    known = {f"ISO_{number}" for number in METHODS.split()}
    usual = all(ratio and 1 <= ratio[0] < 1e4 for ratio in ratios)
    ds = Dataset()
    ds.LossyImageCompression = _text(head, LOSSY[0], {"00", "01"})
    ds.LossyImageCompressionRatio = [f"{ratio[0]:g}" for ratio in ratios] if usual else []
    ds.LossyImageCompressionMethod = methods if set(methods) <= known else []
    return [element for element in ds if element.value]


def _text(head: Dataset, name: str, allowed: set[str]) -> str:
    """A code of the header; "" for one that the standard does not know."""
    value = str(head.get(name) or "").strip().upper()
    return value if value in allowed else ""


def _is_direction(text: str) -> bool:
    return bool(re.fullmatch(r"[APRLHF]{1,3}", text))


def _numbers(value: Any, count: int) -> tuple[float, ...]:
    """That many finite numbers, else ()."""
    try:
        numbers = tuple(float(v) for v in np.ravel([] if value is None else value))
    except (TypeError, ValueError):
        return ()
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else ()


def _is_orthonormal(cosines: tuple[float, ...]) -> bool:
    if not cosines:
        return False
    row, column = np.reshape(cosines, (2, 3))
    return bool(np.allclose((row @ row, column @ column, row @ column), (1, 1, 0), atol=1e-2))
