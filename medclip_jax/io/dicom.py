"""DICOM through pydicom: films, multi-frame files, and folders as sorted series.

Only format and modality are told of a file. No text of pydicom's errors is passed on, since it may
quote the patient's name.
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
from medclip_jax.io.image import MAX_VOXELS, Image, choose, stretch_to_unit

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


class _Film(NamedTuple):
    """Decoded frames before the stretch that a whole series shares."""

    pixels: Float[np.ndarray, "f h w"]
    done: bool  # in [0, 1] already
    inverted: bool  # MONOCHROME1, still to be inverted
    spacing: tuple[float, float] | None
    modality: str


def read_dicom(path: Path, frames: tuple[int, int] | None = None) -> Image:
    """Read one DICOM file, all frames or a range of them.

    Modality LUT or rescale, then the first VOI LUT, else the first window (LINEAR, LINEAR_EXACT,
    SIGMOID), mapped to [0, 1] as PS3.3 C.11.2 says. Without either, values are stretched by the
    least and the largest of all frames (a constant becomes 0). MONOCHROME1 is inverted; palette,
    RGB and YBR become BT.601 luminance.

    Args:
      frames: (first, end) of the frames wanted, end not included.

    Returns:
      pixels [f, h, w] in [0, 1]; spacing in mm; meta with format and modality, nothing else.

    Raises:
      DataError: missing, empty, not DICOM, without image, truncated, too large, of a transfer
        syntax without decoder, or with a window or table that cannot be.
    """
    film = _decode(path)
    _finish([film])
    pixels = film.pixels[choose(path, len(film.pixels), frames)]
    return Image(pixels, film.spacing, {"format": "DICOM", "modality": film.modality})


def read_series(folder: Path, frames: tuple[int, int] | None = None) -> Image:
    """Read a folder of DICOM files as one series, sorted along the slice normal.

    Sorted by Image Position projected on the normal of Image Orientation, ties by Instance Number;
    by Instance Number alone where a position is missing or orientations differ. Files without the
    letters DICM and files without rows (a DICOMDIR, a report) are passed over. Each image's own
    window counts; images without one are stretched together.

    Args:
      frames: (first, end) of the sorted frames wanted, end not included.

    Returns:
      As `read_dicom`; spacing None where the images differ in it.

    Raises:
      DataError: as `read_dicom`; no DICOM image, several series, or sizes that differ.
    """
    return read_slices(_sorted_series(folder), folder, frames)


def read_slices(paths: Sequence[Path], named: Path, frames: tuple[int, int] | None = None) -> Image:
    """Read the given files, in order, as one series; `named` is what messages call it.

    Returns and raises as `read_series`.
    """
    folder = named
    films = [_decode(path) for path in paths]
    if len({film.pixels.shape[1:] for film in films}) > 1:
        raise DataError(f"{folder} has images of several sizes: give a folder with one series.")
    _finish(films)
    pixels = np.concatenate([film.pixels for film in films])
    spacings, kinds = {f.spacing for f in films}, {f.modality for f in films}
    return Image(
        pixels[choose(folder, len(pixels), frames)],
        spacings.pop() if len(spacings) == 1 else None,
        {"format": "DICOM", "modality": kinds.pop() if len(kinds) == 1 else "OT"},
    )


def _finish(films: list[_Film]) -> None:
    """Stretch all films without a window together, in place, and invert MONOCHROME1."""
    raw = [film for film in films if not film.done]
    if not raw:
        return
    low = min(float(film.pixels.min()) for film in raw)
    high = max(float(film.pixels.max()) for film in raw)
    for film in raw:
        stretch_to_unit(film.pixels, low, high)
        if film.inverted:
            np.subtract(1, film.pixels, out=film.pixels)


def _sorted_series(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and dicom_header.is_dicom(path):
            ds = _guarded(path, lambda path: dicom_header.parse(path, SORT_TAGS))
            if "Rows" in ds:
                found.append((path, ds))
    if not found:
        raise DataError(f"{folder} holds no DICOM image: give a folder with one series.")
    several = len({str(ds.get("SeriesInstanceUID")) for _, ds in found})
    if several > 1:
        raise DataError(f"{folder} holds {several} series: give each a folder of its own.")
    sizes = ("Rows", "Columns", "NumberOfFrames")
    voxels = sum(
        int(np.prod([dicom_header.count(p, ds, n) for n in sizes], dtype=object)) for p, ds in found
    )
    if voxels > MAX_VOXELS:
        raise DataError(f"{folder} has {voxels:,} pixels and at most {MAX_VOXELS:,} are read.")
    try:
        keys = _places([ds for _, ds in found])
    except (TypeError, ValueError, AttributeError):
        raise DataError(
            f"{folder} has an image without usable position and instance number: "
            "give its files one by one."
        ) from None
    return [found[i][0] for i in sorted(range(len(found)), key=lambda i: keys[i])]


def _places(series: list[Dataset]) -> list[tuple[float, int]]:
    """(mm along the common normal, instance number) of each image; mm 0 where they have none."""
    if len(series) == 1:
        return [(0.0, 0)]
    turns = [ds.get("ImageOrientationPatient") or () for ds in series]
    spots = [ds.get("ImagePositionPatient") or () for ds in series]
    if {len(t) for t in turns} == {6} and {len(s) for s in spots} == {3}:
        turn, spot = np.asarray(turns, np.float64), np.asarray(spots, np.float64)
        if np.isfinite(turn).all() and np.isfinite(spot).all() and np.ptp(turn, 0).max() < 1e-3:
            along = spot @ np.cross(turn[0, :3], turn[0, 3:])
            numbers = [int(ds.get("InstanceNumber") or 0) for ds in series]
            return list(zip(along.round(4).tolist(), numbers, strict=True))
    return [(0.0, int(ds.InstanceNumber)) for ds in series]


def _decode(path: Path) -> _Film:
    return _guarded(path, _film)


def _guarded(path: Path, work: Callable[[Path], Any]) -> Any:
    """`work(path)`, with every error that is not ours replaced by one that quotes nothing."""
    try:
        return work(path)
    except DataError:
        raise
    except dicom_pixels.GreyError as error:
        raise DataError(f"{path} cannot be shown: {error}; mend its header or remove it.") from None
    except Exception as error:  # pydicom and decoders fed hostile bytes may throw anything
        raise DataError(
            f"{path} cannot be read as DICOM ({type(error).__name__}): the file is damaged or "
            "truncated, copy it again or remove it."
        ) from None


def _film(path: Path) -> _Film:
    ds = dicom_header.parse(path)
    dicom_header.check(path, ds)
    shape = tuple(dicom_header.count(path, ds, n) for n in ("NumberOfFrames", "Rows", "Columns"))
    pixels, seen, done = np.empty(shape, np.float32), 0, True
    for seen, stored in enumerate(_frames(path, ds), start=1):
        values, done = dicom_pixels.shown(ds, stored, seen - 1)
        with np.errstate(over="ignore"):  # beyond float32: infinite, refused below
            pixels[seen - 1] = values
    if seen != len(pixels) or not np.isfinite(pixels).all():
        raise DataError(f"{path} has missing, NaN or infinite pixels: remove it.")
    modality = str(ds.get("Modality", "")).strip()
    return _Film(
        pixels,
        done,
        ds.PhotometricInterpretation == "MONOCHROME1" and not done,
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
