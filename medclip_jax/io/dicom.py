"""DICOM through pydicom: films, multi-frame files, and folders as sorted series.

Only format and modality of a file are returned. No text of pydicom's errors is passed on, since it
may quote the patient's name.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom.pixels
from jaxtyping import Float
from pydicom.dataset import Dataset

from medclip_jax.errors import DataError
from medclip_jax.io import dicom_header, dicom_pixels
from medclip_jax.io.image import (
    MAX_VOXELS,
    Image,
    Window,
    choose,
    no_hounsfield,
    stretch_to_unit,
)

# fmt: off
MODALITIES = {  # PS3.3 C.7.3.1.1.1, those with images; anything else becomes "OT" (other)
    "BI", "BMD", "CR", "CT", "DG", "DX", "ES", "GM", "IO", "IVOCT", "IVUS", "LS", "MG", "MR", "NM",
    "OCT", "OP", "OPM", "OPT", "OT", "PT", "PX", "RF", "RG", "RTDOSE", "RTIMAGE", "SC", "SEG", "SM",
    "TG", "US", "XA", "XC",
}
# fmt: on
SORT_TAGS = (
    *("SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient", "NumberOfFrames"),
    *("ImageOrientationPatient", "Rows", "Columns"),
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
    """Read one DICOM file, all frames or a range of them.

    Modality LUT or rescale, then the first VOI LUT, else the first window (LINEAR, LINEAR_EXACT,
    SIGMOID), mapped to [0, 1] as PS3.3 C.11.2 says. Without either, values are stretched by the
    least and the largest of all frames (a constant becomes 0). MONOCHROME1 is inverted; palette,
    RGB and YBR become BT.601 luminance.

    Args:
      frames: (first, end) of the frames to return, end not included.
      window: maps the Hounsfield units of a CT to [0, 1] in place of the file's own window.

    Returns:
      pixels [f, h, w] in [0, 1]; spacing in mm; meta with format and modality, nothing else.

    Raises:
      DataError: missing, empty, not DICOM, without image, truncated, too large, of a transfer
        syntax without decoder, with an impossible window or table, or without Hounsfield units
        where `window` needs them.
    """
    decoded = _decode(path, window)
    _stretch([decoded])
    pixels = decoded.pixels[choose(path, len(decoded.pixels), frames)]
    return Image(pixels, decoded.spacing, {"format": "DICOM", "modality": decoded.modality})


def read_series(
    folder: Path, frames: tuple[int, int] | None = None, window: Window | None = None
) -> Image:
    """Read a folder of DICOM files as one series, sorted along the slice normal.

    Sorted by Image Position projected on the normal of Image Orientation, ties by Instance Number;
    by Instance Number alone where a position is missing or orientations differ. Files without the
    letters DICM and files without rows (a DICOMDIR, a report) are skipped. Each image's own window
    applies unless `window` is given; images without one are stretched together.

    Args:
      frames: (first, end) of the sorted frames to return, end not included.
      window: as `read_dicom`.

    Returns:
      As `read_dicom`; spacing None where the images differ in it.

    Raises:
      DataError: as `read_dicom`; no DICOM image, several series, or sizes that differ.
    """
    image = read_slices(_sorted_series(folder), folder, window)
    return image._replace(pixels=image.pixels[choose(folder, len(image.pixels), frames)])


def read_slices(paths: Sequence[Path], source: Path, window: Window | None = None) -> Image:
    """Read the given files, in order, as one series; messages name `source`.

    Returns and raises as `read_series`.
    """
    series = [_decode(path, window) for path in paths]
    if len({decoded.pixels.shape[1:] for decoded in series}) > 1:
        raise DataError(f"{source} has images of several sizes: give a folder with one series.")
    _stretch(series)
    spacings, modalities = {d.spacing for d in series}, {d.modality for d in series}
    return Image(
        np.concatenate([decoded.pixels for decoded in series]),
        spacings.pop() if len(spacings) == 1 else None,
        {"format": "DICOM", "modality": modalities.pop() if len(modalities) == 1 else "OT"},
    )


def _stretch(series: list[_Decoded]) -> None:
    """Stretch all images without a window together, in place, and invert MONOCHROME1."""
    raw = [decoded for decoded in series if not decoded.scaled]
    if not raw:
        return
    low = min(float(decoded.pixels.min()) for decoded in raw)
    high = max(float(decoded.pixels.max()) for decoded in raw)
    for decoded in raw:
        stretch_to_unit(decoded.pixels, low, high)
        if decoded.inverted:
            np.subtract(1, decoded.pixels, out=decoded.pixels)


def _sorted_series(folder: Path) -> list[Path]:
    headers = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and dicom_header.is_dicom(path):
            ds = _guarded(path, lambda path: dicom_header.parse(path, SORT_TAGS))
            if "Rows" in ds:
                headers.append((path, ds))
    if not headers:
        raise DataError(f"{folder} holds no DICOM image: give a folder with one series.")
    series = len({str(ds.get("SeriesInstanceUID")) for _, ds in headers})
    if series > 1:
        raise DataError(f"{folder} holds {series} series: give each a folder of its own.")
    sizes = ("Rows", "Columns", "NumberOfFrames")
    voxels = sum(
        int(np.prod([dicom_header.count(path, ds, name) for name in sizes], dtype=object))
        for path, ds in headers
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
    return [headers[i][0] for i in sorted(range(len(headers)), key=lambda i: keys[i])]


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


def _guarded(path: Path, work: Callable[[Path], Any]) -> Any:
    """`work(path)`, with every error that is not ours replaced by one that quotes nothing."""
    try:
        return work(path)
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
    return _guarded(path, lambda path: _decode_frames(path, window))


def _decode_frames(path: Path, window: Window | None) -> _Decoded:
    ds = dicom_header.parse(path)
    dicom_header.check(path, ds)
    if window and (reason := dicom_pixels.lacks_hounsfield(ds)):
        raise no_hounsfield(path, reason)
    shape = tuple(dicom_header.count(path, ds, n) for n in ("NumberOfFrames", "Rows", "Columns"))
    pixels, count, scaled = np.empty(shape, np.float32), 0, True
    for count, stored in enumerate(_frames(path, ds), start=1):
        values, scaled = dicom_pixels.display_values(ds, stored, count - 1, window)
        with np.errstate(over="ignore"):  # beyond float32: infinite, refused below
            pixels[count - 1] = values
    if count != len(pixels) or not np.isfinite(pixels).all():
        raise DataError(f"{path} has missing, NaN or infinite pixels: remove it.")
    modality = str(ds.get("Modality", "")).strip()
    return _Decoded(
        pixels,
        scaled,
        ds.PhotometricInterpretation == "MONOCHROME1" and not scaled,
        dicom_pixels.spacing(ds),
        modality if modality in MODALITIES else "OT",
    )


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
