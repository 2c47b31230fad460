"""Where the anomaly is, in a form a reader can check: boxes around what the map marks."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float


class Box(NamedTuple):
    """Rows row0..row1-1 and columns col0..col1-1 of the map, in its pixel frame."""

    row0: int
    col0: int
    row1: int  # one past the last row
    col1: int  # one past the last column
    score: float  # of the map inside the component, in the map's range
    area: int  # pixels in the component, at most the box's own area


def boxes(
    map: Float[np.ndarray, "h w"],
    threshold: float,
    *,
    min_area: int = 1,
    scores: Literal["max", "mean"] = "max",
    n: int = 10,
) -> list[Box]:
    """Boxes around the 8-connected components of map > threshold, highest score first, at most n.

    A component's score is the `scores` ("max" or "mean") of the map over the component's own
    pixels. Components of fewer than `min_area` pixels are dropped. NaN counts as not marked.
    Equal scores are ordered by area, larger first, then from the top left.

    Raises ValueError for another `scores`.
    """
    from scipy import ndimage  # scipy takes half a second to import and only callers need it

    if scores not in ("max", "mean"):
        raise ValueError(f"scores must be 'max' or 'mean', not {scores!r}")
    labels, count = ndimage.label(map > threshold, structure=np.ones((3, 3)))
    if count == 0:
        return []
    number = np.arange(1, count + 1)
    measure = ndimage.maximum if scores == "max" else ndimage.mean
    # float32 at least: half precision loses digits in a mean
    values = measure(map.astype(np.promote_types(map.dtype, np.float32)), labels, number)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    found = [
        Box(rows.start, cols.start, rows.stop, cols.stop, float(value), int(area))
        for (rows, cols), value, area in zip(
            ndimage.find_objects(labels), values, areas, strict=True
        )
        if area >= min_area
    ]
    return sorted(found, key=lambda box: (-box.score, -box.area, box.row0, box.col0))[:n]
