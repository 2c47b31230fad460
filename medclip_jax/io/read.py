"""Reading images and masks: one function, `read(path)`, whatever the format; resizing them.

Files are untrusted: limits are in `image`, and every broken file is one `DataError` naming it.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import PIL.Image
import PIL.ImageFilter
from jaxtyping import Bool, Float, Num
from scipy import ndimage

from medclip_jax import files
from medclip_jax.errors import DataError
from medclip_jax.io import pillow, tiff
from medclip_jax.io.dicom import open_dicom
from medclip_jax.io.dicom_header import is_dicom
from medclip_jax.io.image import (
    BAND,
    Frames,
    Image,
    Mode,
    bands,
    no_hounsfield,
    parse_axis,
    parse_window,
)
from medclip_jax.io.nifti import Axis, open_nifti
from medclip_jax.io.nifti_header import files_of

__all__ = ["Axis", "Mode", "fit", "fit_mask", "read", "read_all", "read_mask", "to_frame"]

MASK_THRESHOLD = 127  # of 255: JPEG-like noise round 0 and 255 stays on its side
MASK_NOISE = 16  # of 255: darker than that is no lesion, where others are bright
MASK_LABELS = 16  # values of a mask whose values are labels
PILLOW = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DICOM = (".dcm", ".dicom", ".ima")
NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
SUFFIXES = PILLOW + DICOM + NIFTI  # besides these, any file with the letters DICM at byte 128


@runtime_checkable
class Source(Protocol):
    """Whatever names an image file and the CT window it is read with."""

    @property
    def path(self) -> Path: ...
    @property
    def window(self) -> str: ...


S = TypeVar("S", bound=Source)


def read(
    path: Path,
    axis: Axis = "acquisition",
    frames: tuple[int, int] | None = None,
    window: str | None = None,
) -> Image:
    """Read an image file by its suffix, a DICOM file whatever its suffix, or a DICOM folder.

    Args:
      path: PNG, JPEG, BMP, TIFF, DICOM, NIfTI (.nii, .nii.gz, a pair), or a folder with one DICOM
        series.
      axis: along which a NIfTI volume is sliced, see `nifti.open_nifti`; ignored for others.
      frames: (first, end) of the frames, pages or slices to return, end not included; None for all.
      window: CT window in place of the file's own: "brain", "lung", "soft_tissue", "bone" or
        "centre/width" in Hounsfield units; None or "" for none. An axis may follow or stand alone
        ("lung,coronal"), for a volume whose `axis` is "acquisition".

    Returns:
      pixels float32 [f, h, w] in [0, 1], luminance, upright; spacing in mm or None; meta with
      format and (DICOM) modality, never with identity; range in words. How stored values become
      [0, 1]: see `open_pillow`, `open_tiff`, `open_dicom`, `open_nifti`.

    Raises:
      DataError: missing, empty, truncated, too large, of a kind that cannot be read, or without
        Hounsfield units where a window needs them.
      ConfigError: no such window.
    """
    return open_image(path, axis, window).image(path, frames)


def open_image(path: Path, axis: Axis = "acquisition", window: str | None = None) -> Frames:
    """As `read`, without making the frames yet: the way to read what is large."""
    name, ct_window = path.name.lower(), parse_window(window)
    if path.is_dir():
        return open_dicom(path, ct_window)
    if name.endswith(PILLOW):
        opened = (tiff.open_tiff if tiff.is_tiff(path) else pillow.open_pillow)(path)
        if ct_window:
            raise no_hounsfield(path, opened.meta["format"])
        return opened
    if name.endswith(NIFTI):
        named: Any = parse_axis(window) if axis == "acquisition" else None
        return open_nifti(path, named or axis, ct_window)
    if name.endswith(DICOM) or is_dicom(path):
        return open_dicom(path, ct_window)
    raise DataError(
        f"{path} has a suffix that is not read, and is not DICOM: "  # which may be part of a name
        f"give one of {', '.join(SUFFIXES)}."
    )


def pixels_of(path: Path) -> int:
    """Pixels of all frames of a PNG, JPEG, BMP or TIFF, by its header."""
    return (tiff if tiff.is_tiff(path) else pillow).pixels_of(path)


def read_all(
    sources: Iterable[S], size: int, mode: Mode = "stretch"
) -> Iterator[tuple[S, Float[np.ndarray, "s s"]]]:
    """Read and resize many images, in order, on threads (Pillow decodes outside the GIL).

    At most four images per core are in memory, however slowly the caller consumes them.

    Yields:
      (source, pixels [size, size] in [0, 1]).

    Raises:
      DataError: as `read`, at the broken image's turn; an image of several frames; or one whose
        `sha256`, where the source has it, is no longer that of the file.
    """

    def one(source: S) -> Float[np.ndarray, "s s"]:
        pixels = read(source.path, window=source.window).pixels
        known = getattr(source, "sha256", "")
        if known and files.sha256_of(*files_of(source.path)) != known:
            raise DataError(f"{source.path} was changed while it was read: run the command again.")
        if len(pixels) != 1:
            text = "frames where one image is needed: save the frames as files of their own."
            raise DataError(f"{source.path} holds {len(pixels)} {text}")
        return fit(pixels[0], size, mode)

    workers, waiting = os.cpu_count() or 1, iter(sources)
    with ThreadPoolExecutor(workers) as pool:
        running = deque((s, pool.submit(one, s)) for s in islice(waiting, 4 * workers))
        while running:
            source, future = running.popleft()
            pixels = future.result()
            running.extend((s, pool.submit(one, s)) for s in islice(waiting, 1))
            yield source, pixels


def pixel_areas(sources: Iterable[Source], size: int, mode: Mode) -> list[float | None]:
    """`pixel_area` of each image, which is opened for it. Raises DataError."""
    images = (open_image(source.path, window=source.window) for source in sources)
    return [pixel_area(x.spacing, x.shape[1:], size, mode) for x in images]


def read_mask(
    paths: Iterable[Path], shape: tuple[int, int], image: Path | None = None
) -> Bool[np.ndarray, "h w"]:
    """Union of the mask files of an image [h, w]; no files give an empty mask.

    Of 0 to 255, what is brighter than 127 is True. Files of at most 16 values (labels: 0 and 1, a
    palette's colours, 16 bits) are True wherever they are not 0, but for soft edges, which lie
    beside brighter pixels, and for noise up to 16. A JPEG is True above half of its brightest.

    Raises:
      DataError: a mask is unreadable, of another size, of several frames, or of several values
        of which none is bright or none dark.
    """
    union = np.zeros(shape, bool)
    for path in paths:
        frames, _, meta, _ = read(path)
        if len(frames) != 1 or frames[0].shape != tuple(shape):
            (height, width), (rows, columns) = frames.shape[1:], shape
            count = "" if len(frames) == 1 else f"{len(frames)} frames of "
            raise DataError(
                f"mask {path} is {count}{width} x {height} pixels but its image is {columns} x "
                f"{rows}: give a mask drawn on {image or 'the image'} itself."
            )
        lesion = _foreground(255 * frames[0], meta["format"] == "JPEG")
        if lesion is None:
            raise DataError(
                f"mask {path} has several values and none is bright or none is dark: save it as "
                "0 and 255."
            )
        union |= lesion
    return union


def _foreground(values: Float[np.ndarray, "h w"], lossy: bool) -> Bool[np.ndarray, "h w"] | None:
    """Where a mask of 0 to 255 is True; None where nothing tells."""
    top, levels = values.max(), np.unique(values)
    if lossy:
        return values > max(top / 2, MASK_NOISE)
    bright, labels = values > MASK_THRESHOLD, len(levels) <= MASK_LABELS
    if bright.any():
        dim = (values > MASK_NOISE) & ~bright
        near = PIL.Image.fromarray(bright.astype(np.uint8)).filter(PIL.ImageFilter.MaxFilter(3))
        foreground = bright | dim if labels and (dim & ~np.asarray(near, bool)).any() else bright
        return None if len(levels) > 1 and foreground.all() else foreground
    return values > 0 if labels and (levels[0] == 0 or len(levels) == 1) else None


# --- the square that every image is resized to, and the way back ---


def fit(
    pixels: Float[np.ndarray, "h w"], size: int, mode: Mode = "stretch"
) -> Float[np.ndarray, "s s"]:
    """Resize an image to the encoder's input, antialiased bilinear, pixel centres at halves.

    Args:
      pixels: any range, which is preserved.
      size: side of the square, pixels.
      mode: "stretch" fills the square; "pad" preserves the aspect and fills with zeros, centred.
    """
    return _place(pixels.astype(np.float32, copy=False), size, mode, PIL.Image.Resampling.BILINEAR)


def fit_mask(
    mask: Bool[np.ndarray, "h w"], size: int, mode: Mode = "stretch"
) -> Bool[np.ndarray, "s s"]:
    """Resize a mask by nearest neighbour, as `fit`; of a lesion that it misses a pixel stays."""
    owners, count = ndimage.label(mask, np.ones((3, 3)))
    square = _place(owners.astype(np.int32, copy=False), size, mode, PIL.Image.Resampling.NEAREST)
    corner, sides = np.array(box(len(mask), mask.shape[1], size, mode)).reshape(2, 2)
    lost = np.setdiff1d(np.arange(1, count + 1), square)
    boxes = ndimage.find_objects(owners) if len(lost) else ()
    for number in lost:
        inside = np.argwhere(owners[boxes[number - 1]] == number)
        middle = inside[len(inside) // 2] + [edge.start + 0.5 for edge in boxes[number - 1]]
        square[tuple((corner + middle * sides / mask.shape).astype(int))] = number
    return square > 0


def to_frame(
    heat: Float[np.ndarray, "s s"], height: int, width: int, mode: Mode = "stretch"
) -> Float[np.ndarray, "h w"]:
    """Inverse of `fit`, bilinear: a map over the square becomes one of height x width pixels."""
    top, left, rows, columns = box(height, width, heat.shape[0], mode)
    inside = heat[top : top + rows, left : left + columns].astype(np.float32, copy=False)
    return _resize(inside, height, width, PIL.Image.Resampling.BILINEAR)


def to_square(patch: Num[np.ndarray, "n p"], size: int) -> Float[np.ndarray, "n s s"]:
    """A value per patch (square grid, row-major) -> pixels, as maps without score.corners."""
    grid = round(patch.shape[1] ** 0.5)
    squares = np.asarray(patch, np.float32).reshape(-1, grid, grid)
    return np.stack([to_frame(square, size, size) for square in squares])


def pixel_area(
    spacing: tuple[float, float] | None, shape: tuple[int, ...], size: int, mode: Mode
) -> float | None:
    """Area in mm² that a pixel of the square covers, None without a spacing, mm (row, column).

    shape: of the image, (height, width). size, mode: as of `fit`.
    """
    if spacing is None:
        return None
    height, width = shape if mode == "stretch" else (max(shape),) * 2
    return spacing[0] * height / size * spacing[1] * width / size


def box(height: int, width: int, size: int, mode: Mode) -> tuple[int, int, int, int]:
    """Where the image lies in the square: (top, left, rows, columns)."""
    if mode == "stretch":
        return 0, 0, size, size
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - rows) // 2, (size - columns) // 2, rows, columns


def _place(pixels: np.ndarray, size: int, mode: Mode, resample: PIL.Image.Resampling) -> np.ndarray:
    height, width = pixels.shape
    top, left, rows, columns = box(height, width, size, mode)
    square = np.zeros((size, size), pixels.dtype)
    square[top : top + rows, left : left + columns] = _resize(pixels, rows, columns, resample)
    return square


def _resize(
    pixels: np.ndarray, rows: int, columns: int, resample: PIL.Image.Resampling
) -> np.ndarray:
    """Pillow's resize; of what grows by strips, since it has the whole result twice in memory."""

    def strip(part: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.array(PIL.Image.fromarray(part).resize((width, height), resample))

    if rows * columns <= BAND or rows < len(pixels):
        return strip(pixels, rows, columns)
    wide = strip(pixels, len(pixels), columns)  # as Pillow does where rows do not become fewer
    values = np.empty((rows, columns), pixels.dtype)
    for part in bands((columns, rows)):
        values[:, part] = strip(wide[:, part], rows, len(wide[0, part]))
    return values
