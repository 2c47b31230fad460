"""Distances between the outlines of two 2-D masks, with MONAI's conventions for empty masks."""

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from scipy.spatial import cKDTree

Distances = tuple[Float[np.ndarray, " a"], Float[np.ndarray, " b"]]


def surface_distances(
    predicted: Bool[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
    spacing: tuple[float, float] = (1.0, 1.0),
) -> Distances:
    """Distance of each predicted outline pixel to the mask's outline, and the reverse.

    An outline pixel has a 4-neighbour that is background or outside the image. Distances are
    Euclidean between pixel centres, in the unit of `spacing` (row, column). Where one of the two
    is empty the distances of the other are inf; an empty one has no distances.
    """
    a, b = (np.argwhere(x & ~ndimage.binary_erosion(x)) * spacing for x in (predicted, mask))
    if len(a) == 0 or len(b) == 0:
        return np.full(len(a), np.inf), np.full(len(b), np.inf)
    return cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]


def hausdorff(distances: Distances) -> float:
    """Largest of both directions: inf if one mask is empty, NaN if both are."""
    return float(np.concatenate(distances).max()) if any(map(len, distances)) else float("nan")


def hausdorff95(distances: Distances) -> float:
    """Larger of the two 95th percentiles (linear interpolation); NaN if either mask is empty.

    Pooling both directions first, as medpy does, gives another number.
    """
    if not all(map(len, distances)):
        return float("nan")
    return float(max(np.percentile(d, 95) for d in distances))


def boundary_f1(distances: Distances, tolerance: float) -> float:
    """F1 of the outline within `tolerance` (unit of the distances), [0, 1].

    Precision is the share of predicted outline pixels near the mask's outline, recall the reverse.
    1 if both masks are empty, 0 if one is.
    """
    if not all(map(len, distances)):
        return float(not any(map(len, distances)))
    precision, recall = (float(np.mean(d <= tolerance)) for d in distances)
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0
