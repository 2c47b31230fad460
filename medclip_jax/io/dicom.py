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
import pydicom.pixels
from jaxtyping import Float
from pydicom.dataset import Dataset

from medclip_jax.errors import DataError
from medclip_jax.io import dicom_header, dicom_pixels, image
from medclip_jax.io.image import MAX_VOXELS, Image, Window

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


class _Decoded(NamedTuple):
    """Decoded frames before the stretch that a whole series shares."""

    pixels: Float[np.ndarray, "f h w"]
    scaled: bool  # in [0, 1] already
    inverted: bool  # MONOCHROME1, still to be inverted
    spacing: tuple[float, float] | None
    modality: str


def read_dicom(
    path: Path, frames: tuple[int, int] | None = None, window: Window | None = None
) -> Image:
    """Read a DICOM file, or a folder of them as one series sorted along the slice normal.

    Modality LUT or rescale, then the first VOI LUT, else the first window (LINEAR, LINEAR_EXACT,
    SIGMOID), mapped to [0, 1] as PS3.3 C.11.2 says. Files without either are stretched together by
    the least and the largest of their frames (a constant becomes 0). MONOCHROME1 is inverted;
    palette, RGB and YBR become BT.601 luminance.

    A series is sorted by Image Position projected on the normal of Image Orientation, ties by
    Instance Number; by Instance Number alone where a position is missing or orientations differ.
    Files without the letters DICM and files without rows (a DICOMDIR, a report) are skipped.

    Args:
      frames: (first, end) of the (sorted) frames to return, end not included.
      window: maps the Hounsfield units of a CT to [0, 1] in place of the files' own windows.

    Raises:
      DataError: whatever keeps a file from being shown, or from being windowed by `window`; no
        DICOM image, several series, or sizes that differ.
    """
    series = read_slices(_sorted_series(path) if path.is_dir() else [path], path, window)
    return series._replace(pixels=series.pixels[image.choose(path, len(series.pixels), frames)])


def read_slices(paths: Sequence[Path], source: Path, window: Window | None = None) -> Image:
    """Read files, in order, as one series that messages call `source`; else as `read_dicom`.

    Spacing is None where the files differ in it.
    """
    series = [_decode(path, window) for path in paths]
    if len({decoded.pixels.shape[1:] for decoded in series}) > 1:
        raise DataError(f"{source} has images of several sizes: give a folder with one series.")
    raw = [decoded for decoded in series if not decoded.scaled]
    low = min((float(decoded.pixels.min()) for decoded in raw), default=0.0)
    high = max((float(decoded.pixels.max()) for decoded in raw), default=0.0)
    for decoded in raw:
        image.stretch_to_unit(decoded.pixels, low, high)
        if decoded.inverted:
            np.subtract(1, decoded.pixels, out=decoded.pixels)
    spacings, modalities = {d.spacing for d in series}, {d.modality for d in series}
    return Image(
        series[0].pixels if len(series) == 1 else np.concatenate([d.pixels for d in series]),
        spacings.pop() if len(spacings) == 1 else None,
        {"format": "DICOM", "modality": modalities.pop() if len(modalities) == 1 else "OT"},
    )


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


def _decode(path: Path, window: Window | None) -> _Decoded:
    with _no_foreign_errors(path):
        return _decode_frames(path, window)


def _decode_frames(path: Path, window: Window | None) -> _Decoded:
    ds = dicom_header.parse(path)
    dicom_header.check(path, ds)
    if window and (reason := dicom_pixels.lacks_hounsfield(ds)):
        raise image.no_hounsfield(path, reason)
    shape = tuple(dicom_header.count(path, ds, name) for name in SIZE_TAGS)
    pixels, count, scaled = np.empty(shape, np.float32), 0, True
    for count, stored in enumerate(_frames(path, ds), start=1):
        values, scaled = dicom_pixels.display_values(ds, stored, count - 1, window)
        with np.errstate(over="ignore"):  # beyond float32: infinite, refused below
            pixels[count - 1] = values
    if count != len(pixels) or not np.isfinite(pixels).all():
        raise DataError(f"{path} has missing, NaN or infinite pixels: remove it.")
    inverted = ds.PhotometricInterpretation == "MONOCHROME1" and not scaled
    modality = str(ds.get("Modality", "")).strip()
    modality = modality if modality in MODALITIES else "OT"
    return _Decoded(pixels, scaled, inverted, dicom_pixels.spacing(ds), modality)


def _frames(path: Path, ds: Dataset) -> Iterator[np.ndarray]:
    """Decoded frames one by one; a decoder's error becomes one that names the transfer syntax."""
    plugin = dicom_header.plugin(path, ds)
    try:
        yield from pydicom.pixels.iter_pixels(ds, decoding_plugin=plugin)
    except Exception as error:
        raise DataError(
            f"{path} has {dicom_header.syntax_name(ds)} pixels that cannot be decoded "
            f"({type(error).__name__}): it is damaged or truncated, copy it again or remove it."
        ) from None
