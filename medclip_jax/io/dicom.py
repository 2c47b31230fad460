"""DICOM through pydicom: films, multi-frame files, and folders as sorted series.

Only format and modality of a file are returned. No text of pydicom's errors is passed on, since it
may quote the patient's name.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from pydicom.dataset import Dataset

from medclip_jax.errors import DataError
from medclip_jax.io import dicom_frames, dicom_header, dicom_pixels, image
from medclip_jax.io.image import MAX_BYTES, MAX_VOXELS, SAMPLE, Frames, Stretch, Window

# PS3.3 C.7.3.1.1.1, those with images; anything else becomes "OT" (other)
MODALITIES = set(
    "BI BMD CR CT DG DX ES GM IO IVOCT IVUS LS MG MR NM OCT OP OPM OPT OT PT PX RF RG RTDOSE "
    "RTIMAGE SC SEG SM TG US XA XC".split()
)
SIZE_TAGS = ("NumberOfFrames", "Rows", "Columns")
SORT_TAGS = (
    *("SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient"),
    *SIZE_TAGS,
)


def open_dicom(path: Path, window: Window | None = None) -> Frames:
    """Open a DICOM file, or a folder of them as one series sorted along the slice normal.

    Modality LUT or rescale, then the first VOI LUT, else the first window (LINEAR, LINEAR_EXACT,
    SIGMOID), mapped to [0, 1] as PS3.3 C.11.2 says. Files without either are stretched together by
    the least and the largest of their frames (a constant becomes 0; single spikes are clipped, see
    `image.stretch_of`). MONOCHROME1 is inverted; palette, RGB and YBR become BT.601 luminance;
    padding becomes 0.

    A series is sorted by Image Position projected on the normal of Image Orientation, ties by
    Instance Number; by Instance Number alone where a position is missing or orientations differ.
    Files without the letters DICM and files without rows (a DICOMDIR, a report) are skipped.

    Args:
      window: maps the Hounsfield units of a CT to [0, 1] in place of the files' own windows.

    Raises:
      DataError: whatever keeps a file from being shown, or from being windowed by `window`; no
        DICOM image, several series, or sizes that differ.
    """
    return open_slices(_sorted_series(path) if path.is_dir() else [path], path, window)


def open_slices(paths: Sequence[Path], source: Path, window: Window | None = None) -> Frames:
    """Open files, in order, as one series that messages call `source`; else as `open_dicom`.

    Spacing is None where the files differ in it by more than rounding.
    """
    files: list[_File] = []
    for path in paths:
        files.append(_open(path, window))
        _check_series(source, files)
    places = [(f, i) for f in files for i in range(f.stored.number)]
    stretch, ranges = _ranges(places, window)
    modalities = {file.modality for file in files}

    def part(first: int, end: int) -> Float[np.ndarray, "n h w"]:
        pixels = np.empty((end - first, *files[0].shape), np.float32)
        for into, (file, index) in zip(pixels, places[first:end], strict=True):
            into[:], scaled = file.frame(index, window)
            if not scaled:
                image.stretch_to_unit(into, stretch)
                if file.ds.PhotometricInterpretation == "MONOCHROME1":
                    np.subtract(1, into, out=into)
                np.nan_to_num(into, copy=False, nan=0.0)  # padding
        return pixels

    return Frames(
        (len(places), *files[0].shape),
        part,
        dicom_header.common_spacing([file.spacing for file in files]),
        {"format": "DICOM", "modality": modalities.pop() if len(modalities) == 1 else "OT"},
        ranges,
        sum(file.nbytes for file in files),
    )


class _File(NamedTuple):
    """One opened file."""

    path: Path
    ds: Dataset
    stored: dicom_frames.Stored
    shape: tuple[int, int]
    spacing: tuple[float, float] | None
    modality: str
    nbytes: int

    def frame(self, index: int, window: Window | None) -> tuple[Float[np.ndarray, "h w"], bool]:
        """`display_values` of a frame; raises DataError."""
        with _no_foreign_errors(self.path):
            raw = self.stored.frame(index)
            return dicom_pixels.display_values(self.ds, raw, index, window, self.stored.white)


def _open(path: Path, window: Window | None) -> _File:
    with _no_foreign_errors(path):
        ds = dicom_header.parse(path)
        dicom_header.check(path, ds)
        if window and (reason := dicom_pixels.lacks_hounsfield(ds)):
            raise image.no_hounsfield(path, reason)
        shape = dicom_header.count(path, ds, "Rows"), dicom_header.count(path, ds, "Columns")
        modality = str(ds.get("Modality", "")).strip()
        modality = modality if modality in MODALITIES else "OT"
        stored = dicom_frames.stored(path, ds)
        nbytes = path.stat().st_size
        return _File(path, ds, stored, shape, _spacing(ds), modality, nbytes)


def _spacing(ds: Dataset) -> tuple[float, float] | None:
    """As of `dicom_pixels`; None also where it is no numbers, since the pixels are good without."""
    try:
        return dicom_pixels.spacing(ds)
    except (TypeError, ValueError):  # pydicom converts a value when it is read
        return None


def _check_series(source: Path, files: Sequence[_File]) -> None:
    """Raise DataError where the newest file does not belong to the others, or is one too many."""
    if len({file.shape for file in files}) > 1:
        raise DataError(f"{source} has images of several sizes: give a folder with one series.")
    image.check_size(source, *files[0].shape[::-1], sum(file.stored.number for file in files))
    if sum(file.nbytes for file in files) > MAX_BYTES:
        raise DataError(
            f"{source} has more than {MAX_BYTES:,} bytes in its files and no more are read: "
            "give it in parts."
        )


def _ranges(places: Sequence[tuple[_File, int]], window: Window | None) -> tuple[Stretch, str]:
    """What the frames without a range of their own are stretched by; all ranges in words."""
    words, bare = set(), []
    for file, index in places:
        with _no_foreign_errors(file.path):
            words.add(text := dicom_pixels.range_of(file.ds, index, window))
        if not text:
            bare.append((file, index))
    if not bare:
        return Stretch(0, 1), words.pop() if len(words) == 1 else "each frame's own window"
    low, high, samples = np.inf, -np.inf, []
    step = len(bare) * math.prod(bare[0][0].shape) // SAMPLE | 1  # odd: passes all columns
    for file, index in bare:
        values = file.frame(index, window)[0].ravel()
        low, high = min(low, np.nanmin(values)), max(high, np.nanmax(values))
        samples.append(values[::step].copy())
    stretch = image.stretch_of(float(low), float(high), np.concatenate(samples))
    of = "its" if len(places) == 1 else f"all {len(bare)} frames'"
    text = f"{of} values: {stretch.words()}"
    return stretch, text if len(words) == 1 else f"{text}; some frames have their own window"


def _sorted_series(folder: Path) -> list[Path]:
    headers = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and dicom_header.is_dicom(path):
            with _no_foreign_errors(path):
                ds = dicom_header.parse(path, SORT_TAGS)
            if "Rows" in ds:
                headers.append((path, ds))
    if not headers:
        raise DataError(f"{folder} holds no DICOM image: give a folder with one series.")
    series = len({str(ds.get("SeriesInstanceUID")) for _, ds in headers})
    if series > 1:
        raise DataError(f"{folder} holds {series} series: give each a folder of its own.")
    voxels = sum(
        math.prod(dicom_header.count(path, ds, name) for name in SIZE_TAGS) for path, ds in headers
    )
    if voxels > MAX_VOXELS:
        raise DataError(f"{folder} has {voxels:,} pixels and at most {MAX_VOXELS:,} are read.")
    try:
        keys = _slice_positions([ds for _, ds in headers])
    except (TypeError, ValueError, AttributeError):
        raise DataError(
            f"{folder} has an image without usable position and instance number: "
            "give its files one by one."
        ) from None
    return [headers[i][0] for i in sorted(range(len(headers)), key=keys.__getitem__)]


def _slice_positions(series: list[Dataset]) -> list[tuple[float, int]]:
    """(mm along the common normal, instance number) of each image; mm 0 where they have none."""
    if len(series) == 1:
        return [(0.0, 0)]
    cosines = [ds.get("ImageOrientationPatient") or () for ds in series]
    corners = [ds.get("ImagePositionPatient") or () for ds in series]
    if {len(c) for c in cosines} == {6} and {len(c) for c in corners} == {3}:
        turn, corner = np.asarray(cosines, np.float64), np.asarray(corners, np.float64)
        if np.isfinite(turn).all() and np.isfinite(corner).all() and np.ptp(turn, 0).max() < 1e-3:
            along = corner @ np.cross(turn[0, :3], turn[0, 3:])
            numbers = [int(ds.get("InstanceNumber") or 0) for ds in series]
            return list(zip(along.round(4).tolist(), numbers, strict=True))
    return [(0.0, int(ds.InstanceNumber)) for ds in series]


@contextmanager
def _no_foreign_errors(path: Path) -> Iterator[None]:
    """Replace every error that is not ours by one that quotes nothing of the file."""
    try:
        yield
    except DataError:
        raise
    except dicom_pixels.GreyError as error:
        raise DataError(f"{path} cannot be shown: {error}; fix its header or remove it.") from None
    except Exception as error:  # pydicom and decoders may raise anything for hostile bytes
        raise DataError(
            f"{path} cannot be read as DICOM ({type(error).__name__}): the file is damaged or "
            "truncated, copy it again or remove it."
        ) from None
