"""Boxes around what an anomaly map marks, the same for command line, notebook and report."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from medclip_jax.io.image import bands

THRESHOLD = 0.5  # of a map in unit scores: a pixel of at least this is marked
SMALLEST = 2000  # a component holds at least one pixel in this many of its map
MOST = 10  # boxes of one image
PEAK = 0.01  # share of the largest pixels that the box of an alarm is about, if nothing is marked


class Box(NamedTuple):
    """Rows row0..row1-1 and columns col0..col1-1 of the map, in its pixel frame."""

    row0: int
    col0: int
    row1: int  # one past the last row
    col1: int  # one past the last column
    score: float  # largest value of the map inside the component
    area: int  # pixels in the component, at most the box's own area


def decided(map: Float[np.ndarray, "h w"], alarm: bool, of_passed: bool = False) -> list[Box]:
    """The boxes of an image that was decided on: one at least of an alarm, none if it passed.

    An alarm whose map marks nothing (or specks alone) has one box around its largest values, with
    a score below THRESHOLD.

    Args:
        map: as of `boxes_of`.
        of_passed: also those of an image that passed.
    """
    found = boxes_of(map) if alarm or of_passed else []
    return found if found or not alarm else [_peak(map)]


def _peak(map: Float[np.ndarray, "h w"]) -> Box:
    """The component of the largest value among the PEAK largest pixels."""
    from scipy import ndimage

    values = np.nan_to_num(np.asarray(map, np.float32), nan=-1)
    place = map.size - max(1, round(PEAK * map.size))
    level = np.partition(values, place, None)[place]
    labels, _ = ndimage.label(values >= level, np.ones((3, 3)))
    top = int(labels.flat[values.argmax()])
    rows, columns = ndimage.find_objects(labels, top)[top - 1]
    area = int(np.count_nonzero(labels == top))
    score = float(values.max())
    return Box(rows.start, columns.start, rows.stop, columns.stop, score, area)


def boxes_of(map: Float[np.ndarray, "h w"]) -> list[Box]:
    """Boxes around the 8-connected components of what a map marks, highest score first.

    Equal scores are ordered by area, larger first, then from the top left. Components smaller
    than 1/SMALLEST of the map are left out, and all but the first MOST.

    Args:
        map: unit scores in [0, 1] in the image's own frame; NaN is not marked.
    """
    from scipy import ndimage  # half a second to import, and only callers need it

    marked = map >= THRESHOLD
    if not marked.any():
        return []
    square = np.ones((3, 3))
    try:
        labels = np.empty(map.shape, np.uint16)  # half the memory
        count = ndimage.label(marked, square, labels)
    except RuntimeError:  # more components than 16 bits can number
        labels, count = ndimage.label(marked, square)
    areas, scores = np.zeros(count, np.int64), np.full(count, -np.inf, np.float32)
    for rows in bands(map.shape):
        # of marked pixels alone: sorting or summing all of them would be most of the time
        label = labels[rows][marked[rows]] - 1
        areas += np.bincount(label, minlength=count)
        np.maximum.at(scores, label, map[rows][marked[rows]].astype(np.float32))
    components = zip(ndimage.find_objects(labels, count), scores, areas, strict=True)
    boxes = [
        Box(rows.start, columns.start, rows.stop, columns.stop, float(score), int(area))
        for (rows, columns), score, area in components
        if area >= max(1, map.size // SMALLEST)
    ]
    return sorted(boxes, key=lambda box: (-box.score, -box.area, box.row0, box.col0))[:MOST]
