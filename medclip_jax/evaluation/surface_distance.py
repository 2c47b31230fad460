"""Outlines of 2-D masks and the distances between them."""

import numpy as np
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree

Distances = tuple[Float[np.ndarray, " a"], Float[np.ndarray, " b"]]


def outline(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Foreground pixels with a 4-neighbour that is background or outside the image."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def surface_distances(
    predicted: Bool[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
    spacing: tuple[float, float] = (1.0, 1.0),
) -> Distances:
    """Distance of each predicted outline pixel to the mask's outline, and the reverse.

    Euclidean between pixel centres, in the unit of `spacing` (row, column). Where only one of
    the two is empty the distances of the other are inf; an empty one has no distances.
    """
    a = np.argwhere(outline(predicted)) * np.asarray(spacing, float)
    b = np.argwhere(outline(mask)) * np.asarray(spacing, float)
    if len(a) == 0 or len(b) == 0:
        return np.full(len(a), np.inf), np.full(len(b), np.inf)
    return cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]


def hausdorff(distances: Distances) -> float:
    """Largest of both directions. As in MONAI: inf if one mask is empty, NaN if both are."""
    pooled = np.concatenate(distances)
    return float(pooled.max()) if len(pooled) else float("nan")


def hausdorff95(distances: Distances) -> float:
    """Larger of the two 95th percentiles (linear interpolation), as in MONAI.

    NaN if either mask is empty. Pooling both directions first (medpy) gives another number.
    """
    if any(len(d) == 0 for d in distances):
        return float("nan")
    return float(max(np.percentile(d, 95) for d in distances))


def outline_scores(distances: Distances, tolerance: float) -> tuple[float, float, float]:
    """Precision, recall and F1 of the outline within `tolerance` (same unit as the distances).

    Precision is the share of predicted outline pixels near the mask's outline, recall the
    reverse. F1 is 1 if both masks are empty and 0 if one is; precision and recall are NaN then.
    """
    to_mask, to_predicted = distances
    if len(to_mask) == 0 or len(to_predicted) == 0:
        return float("nan"), float("nan"), float(len(to_mask) == len(to_predicted))
    precision = float(np.mean(to_mask <= tolerance))
    recall = float(np.mean(to_predicted <= tolerance))
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0
