"""Maps and masks of any number of images, read one at a time and checked."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat, zip_longest

import numpy as np

from medclip_jax.errors import DataError

Spacing = tuple[float, float] | Sequence[tuple[float, float] | None] | None


class MetricError(DataError, ValueError):
    """Scores, labels, maps or masks that cannot be measured."""


def read(
    maps: Iterable[np.ndarray], masks: Iterable[np.ndarray], spacing: Spacing
) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[float, float]]]:
    """Map, boolean mask and spacing of each image, checked."""
    spacings = _spacings(spacing)
    for index, (values, mask) in enumerate(zip_longest(maps, masks)):
        if values is None or mask is None:
            raise MetricError(f"Image {index} has no map or no mask; give one of each per image.")
        mm = next(spacings, None)
        if mm is None:
            raise MetricError(f"Image {index} has no spacing; give one per image, or one for all.")
        yield _checked_map(values, index), _checked_mask(mask, np.shape(values), index), mm
    of_each = isinstance(spacing, Sequence) and np.ndim(np.asarray(spacing)) == 2
    if of_each and next(spacings, None) is not None:
        raise MetricError("There are more spacings than images; give one per image.")


def bounds(maps: Iterable[np.ndarray]) -> tuple[float, float]:
    """Smallest and largest value; [0, 1] for what can be read only once."""
    if iter(maps) is maps:
        return 0.0, 1.0
    low, high = math.inf, -math.inf
    for index, values in enumerate(maps):
        values = _checked_map(values, index)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high


def _checked_map(values: np.ndarray, index: int) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.size == 0:
        raise MetricError(f"Map {index} has shape {values.shape}; maps must be height x width.")
    if not np.isfinite(values).all():
        raise MetricError(f"Map {index} holds NaN or inf; every pixel must be a finite number.")
    return values


def _checked_mask(mask: np.ndarray, shape: tuple[int, ...], index: int) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.shape != shape:
        raise MetricError(f"Mask {index} has shape {mask.shape} but its map {shape}; resize one.")
    if not ((mask == 0) | (mask == 1)).all():
        raise MetricError(f"Mask {index} holds values other than 0 and 1; threshold it first.")
    return mask == 1


def _spacings(spacing: Spacing) -> Iterator[tuple[float, float]]:
    """One (row, column) spacing per image: endless when there is one for all, or none."""
    if spacing is None:
        return repeat((1.0, 1.0))
    try:
        pairs = np.asarray(spacing, np.float64)
    except (TypeError, ValueError) as error:
        raise MetricError(
            "Some images have a spacing and some have not; give all in mm, or none."
        ) from error
    if (
        pairs.ndim not in (1, 2)
        or pairs.shape[-1] != 2
        or not (np.isfinite(pairs) & (pairs > 0)).all()
    ):
        raise MetricError(f"Spacing {spacing} is not (row, column) in mm; give positive pairs.")
    row_column = [(float(row), float(column)) for row, column in pairs.reshape(-1, 2)]
    return repeat(row_column[0]) if pairs.ndim == 1 else iter(row_column)
