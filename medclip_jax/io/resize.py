"""The tower frame: the square that every image is brought into, and the way back."""

from typing import Literal

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float

Mode = Literal["stretch", "pad"]


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


def fit_spacing(
    spacing: tuple[float, float] | None,
    height: int,
    width: int,
    size: int,
    mode: Mode = "stretch",
) -> tuple[float, float] | None:
    """Size of a pixel after `fit`: the image covers as many mm as before.

    Args:
      spacing: mm per pixel (row, column) of the original; None if unknown, and so is the result.
      height: of the original image, pixels; `width` likewise.
      size: side of the tower frame, pixels; `mode` as in `fit`.

    Returns:
      mm per pixel (row, column) in the tower frame; "stretch" may make the two differ.
    """
    if spacing is None:
        return None
    _, _, rows, columns = _box(height, width, size, mode)
    return spacing[0] * height / rows, spacing[1] * width / columns


def _box(height: int, width: int, size: int, mode: Mode) -> tuple[int, int, int, int]:
    """Where the image lies in the tower frame: (top, left, rows, columns)."""
    if mode == "stretch":
        return 0, 0, size, size
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - rows) // 2, (size - columns) // 2, rows, columns


def _place(pixels: np.ndarray, size: int, mode: Mode, resample: PIL.Image.Resampling) -> np.ndarray:
    height, width = pixels.shape
    top, left, rows, columns = _box(height, width, size, mode)
    frame = np.zeros((size, size), pixels.dtype)
    frame[top : top + rows, left : left + columns] = _resize(pixels, rows, columns, resample)
    return frame


def _resize(
    pixels: np.ndarray, rows: int, columns: int, resample: PIL.Image.Resampling
) -> np.ndarray:
    return np.array(PIL.Image.fromarray(pixels).resize((columns, rows), resample))
