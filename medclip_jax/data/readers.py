"""Reading images and masks: one door, `read(path)`, whatever the format.

Files are untrusted: limits are in `sources`, and every broken file is one `DataError` naming it.
"""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from medclip_jax.data.dicom import read_dicom, read_series
from medclip_jax.data.dicom_files import is_dicom
from medclip_jax.data.frame import Mode, fit, fit_mask, fit_spacing, to_frame
from medclip_jax.data.nifti import Axis, read_nifti
from medclip_jax.data.pillow_images import read_pillow
from medclip_jax.data.sources import choose
from medclip_jax.errors import DataError
from medclip_jax.structs import Image, Record

__all__ = [
    "SUFFIXES",
    "Axis",
    "Mode",
    "fit",
    "fit_mask",
    "fit_spacing",
    "read",
    "read_all",
    "read_mask",
    "read_series",
    "to_frame",
]

MASK_THRESHOLD = 127  # of 255: JPEG-like noise round 0 and 255 stays on its side
PILLOW = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DICOM = (".dcm", ".dicom", ".ima")
NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
SUFFIXES = PILLOW + DICOM + NIFTI  # besides these, any file with the letters DICM at byte 128


def read(path: Path, axis: Axis = "axial", frames: tuple[int, int] | None = None) -> Image:
    """Read an image file by its suffix, a DICOM file whatever its suffix, or a DICOM folder.

    Args:
      path: PNG, JPEG, BMP, TIFF, DICOM, NIfTI (.nii, .nii.gz, a pair), or a folder with one DICOM
        series.
      axis: along which a NIfTI volume is sliced; of no meaning to the rest.
      frames: (first, end) of the frames, pages or slices wanted, end not included; None for all.

    Returns:
      pixels float32 [f, h, w] in [0, 1], luminance, upright; spacing in mm or None; meta with
      format and (DICOM) modality, never with identity. How stored values become [0, 1]: see
      `read_pillow`, `read_dicom`, `read_nifti`.

    Raises:
      DataError: missing, empty, truncated, too large or of a kind that cannot be read.
    """
    name = path.name.lower()
    if path.is_dir():
        return read_series(path, frames)
    if name.endswith(PILLOW):
        image = read_pillow(path)
        return image._replace(pixels=image.pixels[choose(path, len(image.pixels), frames)])
    if name.endswith(NIFTI):
        return read_nifti(path, axis, frames)
    if name.endswith(DICOM) or is_dicom(path):
        return read_dicom(path, frames)
    raise DataError(
        f"{path} has the suffix '{path.suffix}', which cannot be read, and is not DICOM: "
        f"give one of {', '.join(SUFFIXES)}."
    )


def read_mask(paths: Iterable[Path], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Union of mask files, True where a pixel is brighter than 127 of 255.

    Args:
      paths: mask files of one image; none gives an empty mask.
      shape: (height, width) of the image, pixels.

    Raises:
      DataError: a mask is missing, unreadable, or of another size than its image.
    """
    union = np.zeros(shape, bool)
    for path in paths:
        pixels = read(path).pixels[0]
        if pixels.shape != tuple(shape):
            raise DataError(
                f"mask {path} is {_size(pixels.shape)} pixels but its image is {_size(shape)}: "
                "give a mask drawn on the image itself."
            )
        union |= pixels > MASK_THRESHOLD / 255
    return union


def read_all(
    records: Iterable[Record], size: int, mode: Mode = "stretch", workers: int | None = None
) -> Iterator[tuple[Record, Float[np.ndarray, "s s"]]]:
    """Read and fit many images, in order, on threads (Pillow decodes outside the GIL).

    At most four images per worker are held at a time, however slowly the caller takes them.

    Yields:
      (record, pixels [size, size] in [0, 1]).

    Raises:
      DataError: as `read`, at the broken image's turn.
    """
    workers = workers or os.cpu_count() or 1
    waiting = iter(records)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = collections.deque(
            (record, pool.submit(_read_fit, record.path, size, mode))
            for record in itertools.islice(waiting, 4 * workers)
        )
        while running:
            record, future = running.popleft()
            pixels = future.result()
            for follower in itertools.islice(waiting, 1):
                running.append((follower, pool.submit(_read_fit, follower.path, size, mode)))
            yield record, pixels


def _read_fit(path: Path, size: int, mode: Mode) -> Float[np.ndarray, "s s"]:
    pixels = read(path).pixels
    if pixels.shape[0] != 1:
        raise DataError(
            f"{path} holds {pixels.shape[0]} frames where one image is needed: "
            "save the frames as files of their own."
        )
    return fit(pixels[0], size, mode)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
