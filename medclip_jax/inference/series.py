"""DICOM files -> series: which are images, which belong together, in which order, and copies."""

import hashlib
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset

from medclip_jax.errors import DataError
from medclip_jax.io import dicom_header

HEADER = (
    *("SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID", "Manufacturer", "InstanceNumber"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PhotometricInterpretation"),
    *("Rows", "Columns", "NumberOfFrames", "DirectoryRecordSequence"),
)
SLICED = {uid.CTImageStorage, uid.MRImageStorage, uid.PositronEmissionTomographyImageStorage}
FILMS = ("X-Ray", "Radiography", "Radiofluoroscopic", "Ultrasound")  # in names of their classes
SAME_TURN = 1e-3  # of direction cosines: nearer ones are of one stack
TAIL = 1024  # bytes at the end of a file that copies share
OURS = "medclip_jax"  # Manufacturer of what this program writes


class Slice(NamedTuple):
    """A file of one frame or more, by its header."""

    path: str
    uid: str  # SOPInstanceUID, "" if there is none
    series: tuple | None  # what files of one series share; None for what stands alone
    turn: tuple[float, ...]  # direction cosines, 6 or none
    corner: tuple[float, ...]  # mm, 3 or none
    number: int


def header(path: str) -> Dataset | None:
    """The elements of HEADER; None where they cannot be read, of which reading says why."""
    try:
        head = dicom_header.parse(Path(path), HEADER)
        list(head)  # pydicom converts values when they are read
        return head
    except Exception as error:  # pydicom raises anything on broken files
        logging.debug("no usable DICOM header (%s)", type(error).__name__)
        return None


def refusal(head: Dataset | None) -> str:
    """Why a file is not an image to score, such as a report or a segmentation; "" if it is one.

    Of the standard's storage classes those with "Image" in their names hold images; of others, and
    where the class is missing, files with rows.
    """
    if head is None:
        return ""
    storage = str(head.get("SOPClassUID") or head.file_meta.get("MediaStorageSOPClassUID") or "")
    name = uid.UID_dictionary.get(storage, ("",))[0]
    if "DirectoryRecordSequence" in head or storage == uid.MediaStorageDirectoryStorage:
        return "not an image (DICOMDIR)"
    if name and "Image" not in name.replace("Image Overlay", ""):
        return f"not an image ({name})"
    if not name and "Rows" not in head:
        return "not an image (DICOM without rows)"
    return ""


def is_ours(head: Dataset | None) -> bool:
    """Whether this program wrote it."""
    return head is not None and str(head.get("Manufacturer", "")).strip() == OURS


def slice_of(path: str, head: Dataset | None) -> Slice:
    """What grouping needs to know of a file."""
    if head is None:
        return Slice(path, "", None, (), (), 0)
    turn, corner = (_numbers(head, f"Image{name}Patient") for name in ("Orientation", "Position"))
    if len(turn) != 6 or len(corner) != 3:
        turn, corner = (), ()
    storage = str(head.get("SOPClassUID"))
    name = uid.UID_dictionary.get(storage, ("",))[0]
    stack = storage in SLICED or (turn and not any(word in name for word in FILMS))
    frames = _numbers(head, "NumberOfFrames") or (1,)
    # as text: a broken header may hold several values where there is one
    shape = [str(head.get(n)) for n in ("Rows", "Columns", "PhotometricInterpretation")]
    alone = not stack or frames[0] > 1 or not head.get("SeriesInstanceUID")
    common = (os.path.dirname(path), str(head.get("SeriesInstanceUID")), storage, *shape)
    series = None if alone else common
    number = int((_numbers(head, "InstanceNumber") or (0,))[0])
    return Slice(path, str(head.get("SOPInstanceUID") or ""), series, turn, corner, number)


def group(slices: Sequence[Slice]) -> tuple[list[list[Slice]], list[str]]:
    """(series, each in order of its slices; paths of files that are copies of others).

    Files are of one series if they share its UID, class, size, folder and, but for rounding, their
    orientation. Films, which only share a UID, stand alone.
    """
    groups: list[list[Slice]] = []
    stacks: dict[tuple, list[list[Slice]]] = {}
    for one in slices:
        if one.series is None:
            groups.append([one])
            continue
        known = stacks.setdefault(one.series, [])
        same = next((g for g in known if _same_turn(g[0].turn, one.turn)), None)
        if same is None:
            known.append([one])
            groups.append(known[-1])
        else:
            same.append(one)
    copies = _copies([one for g in groups for one in _in_order(g)])
    left = [[one for one in _in_order(g) if one.path not in copies] for g in groups]
    return [g for g in left if g], sorted(copies)


def _in_order(stack: list[Slice]) -> list[Slice]:
    """Along the normal of the first file's orientation, then by number and by name."""
    turn = stack[0].turn
    normal = np.cross(turn[:3], turn[3:]) if turn else np.zeros(3)

    def place(one: Slice) -> tuple:
        depth = round(float(np.dot(normal, one.corner)), 3) if one.corner else 0.0
        return depth, one.number, _plainness(one.path)

    return sorted(stack, key=place)


def _plainness(path: str) -> tuple[int, str]:
    name = os.path.basename(path)
    return len(name), name  # "2.dcm" before "2 (1).dcm"


def _same_turn(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    near = (abs(x - y) < SAME_TURN for x, y in zip(a, b, strict=False))
    return len(a) == len(b) and all(near)


def _copies(slices: Sequence[Slice]) -> set[str]:
    """Files with the instance UID, or the pixels, of an earlier one at the same place.

    Where places are not known, a copy has both. Other slices may share a UID that a careless
    program gave to all, or, as time points do, a place.
    """
    places: dict[Any, list[Slice]] = {}
    copies: set[str] = set()
    for one in sorted(slices, key=lambda one: _plainness(one.path)):
        folder = os.path.dirname(one.path)
        corner = tuple(round(x, 3) for x in one.corner)
        turn = tuple(round(x, 2) + 0.0 for x in one.turn)
        place = (folder, one.series, corner, turn) if corner else (folder, one.uid)
        if not corner and not one.uid:
            continue
        others = places.setdefault(place, [])
        if any(_is_copy(one, other) for other in others):
            copies.add(one.path)
        else:
            others.append(one)
    return copies


def _is_copy(one: Slice, other: Slice) -> bool:
    if one.corner and one.uid and one.uid == other.uid:
        return True
    if _tail(one.path) != _tail(other.path):  # spares reading most pixels
        return False
    pixels = _pixels(one.path)
    return pixels is not None and pixels == _pixels(other.path)


@cache
def _tail(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            return hashlib.sha256(file.read(TAIL)).digest()
    except OSError:  # it has vanished: reading will say so
        return path.encode("utf-8", "surrogateescape")


def _pixels(path: str) -> str | None:
    """Digest of the stored pixels; None where they cannot be read."""
    try:
        ds = dicom_header.parse(Path(path))
        return hashlib.sha256(ds.get("PixelData") or path.encode()).hexdigest()
    except (DataError, OSError, ValueError, TypeError, AttributeError, MemoryError) as error:
        logging.debug("no pixels of a file (%s)", type(error).__name__)
        return None


def _numbers(head: Dataset, name: str) -> tuple[float, ...]:
    """Finite numbers of an element; none where it is missing or broken."""
    try:
        value = head.get(name)
        values = () if value in (None, "") else np.atleast_1d(np.asarray(value, np.float64))
        return tuple(float(x) for x in values) if np.isfinite(values).all() else ()
    except (TypeError, ValueError, OverflowError):
        return ()
