"""The encoder's input: the square that every image is resized to, and the way back."""

from typing import Literal

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, Num

Mode = Literal["stretch", "pad"]


def fit(
    pixels: Float[np.ndarray, "h w"], size: int, mode: Mode = "stretch"
) -> Float[np.ndarray, "s s"]:
    """Resize an image to the encoder's input, antialiased bilinear, pixel centres at halves.

    Args:
      pixels: any range, which is preserved.
      size: side of the square, pixels.
      mode: "stretch" fills the square; "pad" preserves the aspect and fills with zeros, centred.
    """
    return _place(pixels.astype(np.float32), size, mode, PIL.Image.Resampling.BILINEAR)


def fit_mask(
    mask: Bool[np.ndarray, "h w"], size: int, mode: Mode = "stretch"
) -> Bool[np.ndarray, "s s"]:
    """Resize a mask by nearest neighbour; the same geometry as `fit`."""
    return _place(mask.astype(np.uint8), size, mode, PIL.Image.Resampling.NEAREST) > 0


def to_frame(
    heat: Float[np.ndarray, "s s"], height: int, width: int, mode: Mode = "stretch"
) -> Float[np.ndarray, "h w"]:
    """Inverse of `fit`, bilinear: a map over the square becomes one of height x width pixels."""
    top, left, rows, columns = _box(height, width, heat.shape[0], mode)
    inside = heat[top : top + rows, left : left + columns].astype(np.float32)
    return _resize(inside, height, width, PIL.Image.Resampling.BILINEAR)


def to_square(patch: Num[np.ndarray, "n p"], size: int) -> Float[np.ndarray, "n s s"]:
    """A value per patch (square grid, row-major) -> pixels, bilinear with pixel centres at halves.

    The anomaly map itself aligns corners instead.
    """
    grid = round(patch.shape[1] ** 0.5)
    squares = np.asarray(patch, np.float32).reshape(-1, grid, grid)
    return np.stack([to_frame(square, size, size) for square in squares])


def pixel_area(
    spacing: tuple[float, float] | None, shape: tuple[int, ...], size: int, mode: Mode
) -> float | None:
    """Area in mm² that a pixel of the square covers, None without a spacing.

    Args:
      spacing: of the image, mm (row, column).
      shape: of the image, (height, width).
      size: side of the square, pixels.
      mode: the one `fit` was called with.
    """
    if spacing is None:
        return None
    height, width = shape if mode == "stretch" else (max(shape),) * 2
    return spacing[0] * height / size * spacing[1] * width / size


def _box(height: int, width: int, size: int, mode: Mode) -> tuple[int, int, int, int]:
    """Where the image lies in the square: (top, left, rows, columns)."""
    if mode == "stretch":
        return 0, 0, size, size
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - rows) // 2, (size - columns) // 2, rows, columns


def _place(pixels: np.ndarray, size: int, mode: Mode, resample: PIL.Image.Resampling) -> np.ndarray:
    height, width = pixels.shape
    top, left, rows, columns = _box(height, width, size, mode)
    square = np.zeros((size, size), pixels.dtype)
    square[top : top + rows, left : left + columns] = _resize(pixels, rows, columns, resample)
    return square


def _resize(
    pixels: np.ndarray, rows: int, columns: int, resample: PIL.Image.Resampling
) -> np.ndarray:
    return np.array(PIL.Image.fromarray(pixels).resize((columns, rows), resample))
