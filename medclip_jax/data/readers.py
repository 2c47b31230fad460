"""Reading images and masks: one door, `read(path)`, and the way into the tower frame and back.

Files are untrusted. The header is checked before anything is decoded, and whatever a decoder
throws at broken bytes becomes one `DataError` that names the file.
"""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Bool, Float

from medclip_jax.errors import DataError
from medclip_jax.structs import Image, Record

MAX_PIXELS = 64_000_000  # a mammogram has 14 million; below Pillow's own warning at 89 million
MASK_THRESHOLD = 127  # of 255: JPEG-like noise round 0 and 255 stays on its side
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: red, green, blue
FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
COLOUR = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "LA", "La", "CMYK", "YCbCr")

Mode = Literal["stretch", "pad"]


def read(path: Path) -> Image:
    """Read one image file by its suffix.

    Returns:
      pixels float32 [f=1, h, w] in [0, 1], luminance, EXIF orientation applied; spacing None.

    Raises:
      DataError: missing, empty, truncated, too large or of a kind that cannot be read.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} has the suffix '{path.suffix}', which cannot be read: "
            f"give one of {', '.join(READERS)}."
        )
    return reader(path)


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


def fit(
    pixels: Float[np.ndarray, "h w"], size: int, mode: Mode = "stretch"
) -> Float[np.ndarray, "s s"]:
    """Bring an image into the tower frame, antialiased bilinear, pixel centres at halves.

    Args:
      pixels: any range; kept.
      size: side of the tower frame, pixels.
      mode: "stretch" fills the square; "pad" keeps the aspect and fills with zeros, centred.
    """
    return _place(pixels.astype(np.float32), size, mode, PIL.Image.Resampling.BILINEAR)


def fit_mask(
    mask: Bool[np.ndarray, "h w"], size: int, mode: Mode = "stretch"
) -> Bool[np.ndarray, "s s"]:
    """Bring a mask into the tower frame by nearest neighbour; the same geometry as `fit`."""
    return _place(mask.astype(np.uint8), size, mode, PIL.Image.Resampling.NEAREST) > 0


def to_frame(
    heat: Float[np.ndarray, "s s"], height: int, width: int, mode: Mode = "stretch"
) -> Float[np.ndarray, "h w"]:
    """Inverse of `fit`: bring a map in the tower frame back to the image's frame, bilinear.

    Args:
      heat: map in the tower frame; range kept.
      height: of the original image, pixels; `width` likewise.
      mode: the one `fit` was called with.
    """
    top, left, rows, columns = _box(height, width, heat.shape[0], mode)
    inside = heat[top : top + rows, left : left + columns].astype(np.float32)
    return _resize(inside, height, width, PIL.Image.Resampling.BILINEAR)


def _read_pillow(path: Path) -> Image:
    pixels, kind = _decode(path)
    return Image(pixels[None], None, {"format": kind})


READERS: dict[str, Callable[[Path], Image]] = {
    ".png": _read_pillow,
    ".jpg": _read_pillow,
    ".jpeg": _read_pillow,
    ".bmp": _read_pillow,
    ".tif": _read_pillow,
    ".tiff": _read_pillow,
}


def _decode(path: Path) -> tuple[Float[np.ndarray, "h w"], str]:
    """Luminance and format name. A decoder fed hostile bytes may throw anything: all is caught."""
    try:
        with PIL.Image.open(path, formats=FORMATS) as image:
            _check_header(path, image)
            kind = image.format or "unknown"
            upright = PIL.ImageOps.exif_transpose(image)
            return _luminance(path, upright, kind), kind
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: check the path or restore the file.") from error
    except PIL.UnidentifiedImageError as error:
        raise DataError(
            f"{path} is empty or is not a PNG, JPEG, BMP or TIFF image: replace or remove it."
        ) from error
    except PIL.Image.DecompressionBombError as error:
        raise DataError(_too_large(path, "far more")) from error
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"{path} cannot be decoded ({reason}): the file is damaged or truncated, "
            "copy it again or remove it."
        ) from error


def _check_header(path: Path, image: PIL.Image.Image) -> None:
    """Refuse by the header alone what would be dear or ambiguous to decode."""
    if image.width * image.height > MAX_PIXELS:
        raise DataError(_too_large(path, f"{image.width} x {image.height}"))
    pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if pages > 1:
        raise DataError(f"{path} is a TIFF of {pages} pages: save each page as a file of its own.")


def _too_large(path: Path, what: str) -> str:
    return (
        f"{path} has {what} pixels and at most {MAX_PIXELS:,} are read: "
        "scale it down or remove it if it is not yours."
    )


def _luminance(path: Path, image: PIL.Image.Image, kind: str) -> Float[np.ndarray, "h w"]:
    """Scale by the stored type's full range; transparent pixels fade to black."""
    deep = image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG")
    if deep:
        return np.asarray(image).astype(np.float32) / 65535
    if image.mode == "F":
        return _unit_float(path, np.asarray(image, np.float32))
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return np.asarray(image.convert("L"), np.float32) / 255
    if image.mode not in COLOUR + ("1", "L"):
        raise DataError(
            f"{path} holds pixels of kind '{image.mode}', whose white is not known: "
            "save it as 8-bit or 16-bit grey or as RGB."
        )
    if image.has_transparency_data:
        *colour, alpha = image.convert("RGBA").split()
        return _mix(colour) * (np.asarray(alpha, np.float32) / 255)
    return _mix(image.convert("RGB").split())


def _mix(colour: Iterable[PIL.Image.Image]) -> Float[np.ndarray, "h w"]:
    """Weighted sum of the bands, one at a time: three float bands at once would be dear."""
    bands = zip(LUMA, colour, strict=True)
    return np.minimum(sum(w * np.asarray(band, np.float32) for w, band in bands) / 255, 1)


def _unit_float(path: Path, pixels: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Floating-point files say nothing about their white: only [0, 1] is taken."""
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise DataError(f"{path} holds floats outside [0, 1] or NaN: scale them to [0, 1] first.")
    return pixels


def _read_fit(path: Path, size: int, mode: Mode) -> Float[np.ndarray, "s s"]:
    pixels = read(path).pixels
    if pixels.shape[0] != 1:
        raise DataError(
            f"{path} holds {pixels.shape[0]} frames where one image is needed: "
            "save the frames as files of their own."
        )
    return fit(pixels[0], size, mode)


def _box(height: int, width: int, size: int, mode: Mode) -> tuple[int, int, int, int]:
    """Where the image lies in the tower frame: (top, left, rows, columns)."""
    if mode == "stretch":
        return 0, 0, size, size
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - rows) // 2, (size - columns) // 2, rows, columns


def _place(pixels: np.ndarray, size: int, mode: Mode, resample: PIL.Image.Resampling) -> np.ndarray:
    top, left, rows, columns = _box(*pixels.shape, size, mode)
    frame = np.zeros((size, size), pixels.dtype)
    frame[top : top + rows, left : left + columns] = _resize(pixels, rows, columns, resample)
    return frame


def _resize(
    pixels: np.ndarray, rows: int, columns: int, resample: PIL.Image.Resampling
) -> np.ndarray:
    return np.array(PIL.Image.fromarray(pixels).resize((columns, rows), resample))


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
